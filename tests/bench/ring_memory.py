"""Peak memory of a rank in one training step at 8K, 16K, 32K tokens on 1, 2, 4 ring ranks: it fits a + b·tokens/ranks
within 10 %, so what grows with the context falls as one over the ranks. The rival is the fit's own value."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
import _harness as bench

from ringweave.parallel.mesh import Mesh
from ringweave.parallel.ring_layout import RingLayout
from ringweave.pretrain.batch import Batch
from ringweave.pretrain.engine import TorchEngine, make_adamw
from ringweave.pretrain.models.lwm import LWMShape
from ringweave.pretrain.parallelize import build_parts
from ringweave.tokenizers.segment import MODALITIES

CLAIM = "peak memory of a ring rank is a + b·tokens/ranks within 10 %"
SHAPE = LWMShape(vocab=4096, layers=4, width=256, heads=4, kv_heads=2, ffn=512, head_chunk=512)


def one_step(tokens: int) -> float:
    """MiB that one step takes on this rank above what stood before it."""
    world = dist.get_world_size()
    mesh = Mesh.build({"sp": world})
    parts = build_parts(SHAPE, mesh, seed=0, rope_theta=1e4)
    optimizer = make_adamw(parts, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    engine = TorchEngine(parts, mesh, micro_batch=1, optimizer=optimizer)
    engine.forward_backward(_batch(64, mesh))  # kernels, buffers and gradients that stay
    engine.step(1e-3)
    batch = _batch(tokens, mesh)
    baseline = bench._forget_peak()
    engine.forward_backward(batch)
    engine.step(1e-3)
    return (bench._peak_bytes() - baseline) / bench.MIB


def _batch(tokens: int, mesh: Mesh) -> Batch:
    """One document that fills the context, this rank's slots of it."""
    documents = np.zeros((1, tokens), np.int32)
    owner = RingLayout(mesh.sizes["sp"], "zigzag").owner(documents)
    order = np.flatnonzero(owner[0] == mesh.rank_on["sp"])
    ids = torch.from_numpy(order % SHAPE.vocab)[None]
    ones = np.ones((1, len(order)), np.float32)
    counts = np.zeros(len(MODALITIES))
    counts[1] = tokens
    return Batch(
        ids=ids, order=torch.from_numpy(order)[None], targets=ids, documents=torch.from_numpy(documents),
        owner=torch.from_numpy(owner), prefix=torch.from_numpy(np.zeros_like(documents)), weights=ones,
        modality=ones.astype(np.int8), counts=counts, real_tokens=tokens, slots=tokens,
    )  # fmt: skip


def main() -> None:
    """Print the claim's line."""
    options = bench.arguments(__doc__)
    # glibc keeps freed blocks of up to 32 MiB for reuse; given back at once, what is resident is what is in use.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(64 * 1024)
    contexts = (512, 1024, 2048) if options.tiny else (8192, 16384, 32768)
    points = [(n, p, max(bench.pinned_ranks(p, one_step, n))) for n in contexts for p in (1, 2, 4)]
    held = np.array([n / p for n, p, _ in points])
    peak = np.array([m for _, _, m in points])
    b, a = np.polyfit(held, peak, 1, w=1 / peak)  # relative errors count
    fit = a + b * held
    worst = int(np.argmax(np.abs(peak / fit - 1)))
    bench.emit(
        CLAIM,
        bench.Part("largest over fit", [float((peak / fit).max())], [1.0], "peak / fit", 1.1, "lower"),
        bench.Part("smallest over fit", [float((peak / fit).min())], [1.0], "peak / fit", 0.9, "higher"),
        mib={"a": round(float(a), 1), "b_per_1k_tokens": round(float(b) * 1024, 2)},
        worst={"tokens": points[worst][0], "ranks": points[worst][1]},
        points=[{"tokens": n, "ranks": p, "mib": round(m, 1)} for n, p, m in points],
    )


if __name__ == "__main__":
    main()
