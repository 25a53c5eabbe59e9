"""Demo data: small shards of real text, drawings, layers, scores, audio, video and scenes, built without a network.

Everything comes out of wheels of the `demo` extra (docs/data.md lists them with their licences).
`build_demo(out)` writes the shards, an index beside each and LICENSES.md; the bytes are the same on every run
with the same package versions.
"""

from ringweave.data_pipes.demo.build import SOURCES, build_demo

__all__ = ["SOURCES", "build_demo"]
