"""Triton's attention kernels: bidirectional blocks and tail tiles in the interpreter, and a build for a GPU.

The conformance test (`test_attention.py`) covers the rest of what they have to do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ringweave.kernels.attention import block_backward, block_forward, why_unavailable

CPU = torch.device("cpu")
REASON = why_unavailable("triton", CPU, torch.float32)


# Interpreted tiles are 64 x 32 (forward, dq) and 32 x 64 (dk, dv): lengths of one, just below, at and above them.
@pytest.mark.skipif(REASON is not None, reason=f"triton does not run here: {REASON}")
@pytest.mark.parametrize(
    ("lq", "lk", "lower", "upper"),
    [
        (1, 1, None, None),
        (31, 65, None, None),
        (64, 32, None, None),
        (129, 33, None, None),
        (33, 129, None, None),
        (65, 65, None, 0),
        (64, 128, None, 64),  # the band's edge on the edges of tiles
        (128, 64, -64, None),
        (130, 100, -31, -31),  # a single diagonal
        (100, 130, 32, 63),
    ],
)
def test_bidirectional_and_tail_tiles_forward_and_backward(
    lq: int, lk: int, lower: int | None, upper: int | None
) -> None:
    g = torch.Generator().manual_seed(lq * 1000 + lk)
    q, k, v, dout, dlse = (
        torch.randn(s, generator=g) for s in ((lq, 2, 16), (lk, 1, 16), (lk, 1, 16), (lq, 2, 16), (lq, 2))
    )
    band = {"lower": lower, "upper": upper, "scale": 0.25}
    got = block_forward(q, k, v, backend="triton", **band)
    exact = [x.double() for x in (q, k, v)]
    want = block_forward(*exact, backend="reference", **band)
    rows = want[1].isfinite().all(1)
    assert torch.equal(got[1].isfinite().all(1), rows)
    assert (got[0] - want[0]).abs().max() < 2e-6
    assert (got[1] - want[1])[rows].abs().max() < 2e-6
    grads = block_backward(dout, q, k, v, *got, dlse=dlse, backend="triton", **band)
    wanted = block_backward(dout.double(), *exact, *want, dlse=dlse.double(), backend="reference", **band)
    for name, a, b in zip(("dq", "dk", "dv"), grads, wanted, strict=True):
        assert (a - b).abs().max() < 1e-5, name


_BUILD = """
import json, re, subprocess, sys
from pathlib import Path
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from ringweave.kernels import attention_triton as launcher, attention_triton_kernels as kernels

STATS = ("lse_ptr", "delta_ptr", "dlse_ptr")
ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
for dim, value in ((64, 64), (128, 128), (80, 48)):
    for kind in ("forward", "dq", "dkv"):
        kernel = getattr(kernels, f"{kind}_kernel")
        tiles = launcher._tiles(dim, value, torch.bfloat16, kind=kind)
        constants = dict(HAS_LOWER=dim == 80, HAS_UPPER=True, GROUP=4, D=dim, DV=value, BLOCK_M=tiles.m,
            BLOCK_N=tiles.n, BLOCK_D=launcher._channels(dim), BLOCK_DV=launcher._channels(value), UPCAST=False)
        types, hints = {}, {}
        for at, name in enumerate(kernel.arg_names):
            pointer = name.endswith("_ptr")
            types[name] = ("constexpr" if name in constants else "*fp32" if name in STATS else "*bf16" if pointer
                else "fp32" if name.endswith("scale") else "i32")
            if pointer or name.startswith("stride") and name[-2] != "l":
                hints[(at,)] = [["tt.divisibility", 16]]
        built = compile(ASTSource(kernel, types, constants, hints), target=GPUTarget("cuda", 90, 32),
            options=dict(num_warps=tiles.warps, num_stages=tiles.stages))
        Path("kernel.ptx").write_text(built.asm["ptx"])
        made = subprocess.run([ptxas, "-v", "--gpu-name=sm_90a", "kernel.ptx", "-o", "kernel.cubin"],
            capture_output=True, text=True, check=True).stderr
        print(json.dumps(dict(kernel=f"{kind} {dim} {value}", shared=built.metadata.shared,
            wgmma="wgmma" in built.asm["ptx"], registers=int(re.search(r"Used (\\d+) registers", made)[1]),
            spilled=int(re.search(r"(\\d+) bytes spill stores", made)[1]))), flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Triton ships its assembler for Linux only")
def test_kernels_build_for_compute_capability_9_without_spilling(tmp_path: Path) -> None:
    """Compiled and assembled for an H100 on a machine without a GPU: they fit, use its tensor cores, hardly spill."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", _BUILD],
        capture_output=True,
        text=True,
        timeout=550,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    built = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(built) == 9
    for one in built:
        assert one["wgmma"], one
        assert one["shared"] <= 160 * 1024, one
        assert one["spilled"] <= 512, one
