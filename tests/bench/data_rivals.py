"""Samples a second of verified reading beside mosaicml-streaming, litdata and megatron-energon, each on its own copy of
the same samples, converted, in one process on one and the same core, from the page cache.

The rivals' requirements (numpy < 2.2) do not fit the versions that ringweave is tested with, so they run under an
interpreter of their own:

    python -m venv rivals && rivals/bin/pip install mosaicml-streaming litdata megatron-energon pillow
    .venv/bin/python tests/bench/data_rivals.py --python rivals/bin/python

Without `--python` those that this interpreter lacks are left out, and the line says so.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import _harness as bench
from data_reading import Ours, decoded, make_shards, raw, speed

from ringweave.data_pipes.index import load_index

CLAIM = "verified, resumable reading is at least as fast as other streaming loaders on their own formats"
RIVALS = ("mosaicml-streaming", "litdata", "megatron-energon")


class Rival:
    """A loader in its own process (`_data_rivals.py`), with its copy of the samples made."""

    def __init__(self, python: str, name: str, shards: Path, out: Path) -> None:
        script = str(Path(__file__).with_name("_data_rivals.py"))
        command = [python, script, name, str(shards), str(out)]
        self.name = name
        self.log = open(out.with_name(f"{name}.log"), "w+", encoding="utf-8")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        hello = self._answer()
        self.skipped, self.version = hello.get("skipped"), hello.get("version")

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.log.seek(0)
        tail = self.log.read().strip().splitlines()[-1:]
        return {"skipped": f"{self.name} failed: {' '.join(tail)[:200]}"}

    def epoch(self, kind: str) -> dict[str, Any]:
        """{"samples", "bytes", "speed"} of one pass."""
        assert self.process.stdin is not None
        print(kind, file=self.process.stdin, flush=True)
        answer = self._answer()
        if "skipped" in answer:
            raise RuntimeError(answer["skipped"])
        return answer

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.kill()
        self.process.wait()
        self.log.close()


def measure(rival: Rival, paths: list[Path], runs: int) -> list[bench.Part]:
    """Bytes alone and with decoding, beside one rival; both sides must have read the same."""
    total, parts = sum(load_index(p).count for p in paths), []
    for kind, function in (("raw", raw), ("decoded", decoded)):
        found = rival.epoch(kind)
        assert (found["samples"], found["bytes"]) == (total, sum(Ours(paths, function))), found
        ours, theirs = bench.paired(
            [
                lambda f=function: speed(Ours(paths, f), 0, total),
                lambda k=kind: float(rival.epoch(k)["speed"]),
            ],
            runs=runs,
        )
        what = "bytes alone" if kind == "raw" else "with decoding"
        parts.append(bench.Part(f"{rival.name}, {what}", ours, theirs, "samples/s", 1.0, "higher"))
    return parts


def options() -> argparse.Namespace:
    """The harness's options, `--python` and `--only` (one rival; more runs fit)."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--only", choices=RIVALS)
    mine, rest = parser.parse_known_args()
    sys.argv[1:] = rest
    return argparse.Namespace(**vars(mine), **vars(bench.arguments(__doc__)))


def main() -> None:
    """Print the claim's line."""
    chosen = options()
    shards, samples, side = (2, 96, 64) if chosen.tiny else (4, 1500, 224)
    parts: list[bench.Part] = []
    left_out: dict[str, str] = {}
    bench.one_thread()  # the rivals' processes inherit the core
    versions: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        tars = Path(folder) / "tars"
        tars.mkdir()
        paths = make_shards(tars, shards=shards, samples=samples, side=side)
        for name in (chosen.only,) if chosen.only else RIVALS:
            rival = Rival(chosen.python, name, tars, Path(folder) / name)
            try:
                if rival.skipped:
                    left_out[name] = rival.skipped
                else:
                    parts += measure(rival, paths, chosen.runs)
                    versions[name] = str(rival.version)
            except RuntimeError as error:
                left_out[name] = str(error)
            finally:
                rival.close()
    if not parts:
        bench.skip(CLAIM, "; ".join(left_out.values()) + " (see the head of tests/bench/data_rivals.py)")
        return
    bench.emit(
        CLAIM, *parts, versions=["pillow"], rivals=versions, left_out=left_out, samples=shards * samples
    )


if __name__ == "__main__":
    main()
