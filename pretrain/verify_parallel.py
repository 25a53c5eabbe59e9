"""`ringweave verify parallel`: law 2 over the whole matrix of layouts that a number of ranks allows.

Every factorisation over the four axes, and beside them what a stage's layout can choose: ring layouts and transports,
Ulysses, pipeline schedules, copies of the parameters, norms, recompute, and the DeepSpeed engine; for a causal model,
a bidirectional one, and the diffusion transformer where it has the choice. Each row compares loss, every gradient and
the gradient norm with one process.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ringweave.data_pipes.pack import Pack
from ringweave.parallel.gloo import join_world
from ringweave.parallel.mesh import AXES
from ringweave.parallel.spawn import run_ranks
from ringweave.pretrain import verify

MODELS = ("causal", "bidirectional", "dit")
#: Choices that the diffusion transformer does not have.
NOT_DIT = ("engine", "norms")


def factorisations(world: int, *, heads: int, layers: int) -> Iterator[dict[str, int]]:
    """Every (dp, pp, tp, sp) whose product is `world` that a model of so many heads and layers allows."""
    for dp in _divisors(world):
        for pp in _divisors(world // dp):
            for tp in _divisors(world // dp // pp):
                sp = world // dp // pp // tp
                if heads % tp == 0 and layers >= pp and verify.PACKS % dp == 0 and verify.PACKS // dp >= pp:
                    yield {a: n for a, n in zip(AXES, (dp, pp, tp, sp), strict=True) if n > 1}


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def matrix(world: int, *, deepspeed: bool = True) -> list[dict[str, Any]]:
    """The rows for `world` ranks: plain layouts first, then the choices, each on a layout that has room for it."""
    shape = verify.SHAPE
    plain = list(factorisations(world, heads=shape.heads, layers=shape.layers)) or [{}]
    rows: list[dict[str, Any]] = [dict(x) for x in plain]

    def best(axis: str, size: int) -> dict[str, int] | None:
        fits = [x for x in plain if x.get(axis, 1) == size]
        return min(fits, key=lambda x: -x.get("dp", 1), default=None)

    def add(layout: Mapping[str, int] | None, **options: Any) -> None:
        if layout is not None:
            rows.append({**layout, **options})

    for pp in (2, 4):
        for schedule in ("gpipe", "interleaved", "zero_bubble", "zbv"):
            virtual = 1 if schedule == "gpipe" else 2
            if pp * virtual <= shape.layers:
                add(best("pp", pp), schedule=schedule, virtual=virtual)
    add(best("pp", 2), split=(3, 1))
    for sp in sorted({x.get("sp", 1) for x in plain} - {1}):
        for ring in ("zigzag", "contiguous", "per_document"):
            add(best("sp", sp), ring=ring, transport="direct" if ring == "contiguous" else "ring")
        add(best("sp", sp), transport="gather")
        for size in _divisors(sp)[1:]:
            if shape.kv_heads % size == 0:
                add(best("sp", sp), ulysses=size)
    add(best("tp", 2), norms="replicated")
    for copies in _divisors(world)[1:]:
        add(best("dp", world), replicate=copies)
    for recompute in ("selective", "full"):
        add(plain[-1], recompute=recompute)
        add(best("tp", 2), recompute=recompute)
    if deepspeed:
        for zero in (1, 2, 3):
            add(best("dp", world), engine=f"zero{zero}")
            add(next((x for x in plain if set(x) == {"dp", "sp"}), None), engine=f"zero{zero}")
    return rows


def model_packs(mask: str) -> list[Pack]:
    """The packs of `verify`; for a bidirectional model every document is two-way, and half of the packs have no target,
    so that with dp 2 a whole rank has none."""
    packs = verify.make_packs()
    if mask == "bidirectional":
        for pack in packs[: verify.PACKS // 2]:
            pack.weights[:], pack.targets[:] = 0.0, -1
        for pack in packs:
            real = pack.doc >= 0
            sizes = torch.bincount(torch.from_numpy(pack.doc[real]).long()).numpy()
            pack.prefix[real] = sizes[pack.doc[real]]
    return packs


def check_rows(
    rows: Sequence[Mapping[str, Any]], precision: str = "fp32", models: Sequence[str] = MODELS
) -> list[dict[str, Any]]:
    """Every row for these models, on the running world."""
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    from ringweave.pretrain import verify_dit

    found = []
    for mask in (name for name in models if name != "dit"):
        packs = model_packs(mask)
        reference = verify._reference(packs, precision, prefix=mask == "bidirectional")
        for row in rows:
            started = time.monotonic()
            result = verify.check_layout({**row, "mask": mask}, packs, reference, precision)
            found.append({**result, "model": mask, "seconds": round(time.monotonic() - started, 2)})
    for row in rows if "dit" in models else ():
        if not set(row) & set(NOT_DIT):
            started = time.monotonic()
            (result,) = verify_dit.check_rows([row], precision)
            found.append({**result, "seconds": round(time.monotonic() - started, 2)})
    return found


def run(
    *,
    world: int,
    deepspeed: bool = True,
    models: Sequence[str] = MODELS,
    progress: verify.Progress = lambda line: None,
) -> dict[str, Any]:
    """The matrix on `world` gloo processes made here, or on the ranks a launcher started (then all call this)."""
    started = time.monotonic()
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        if not dist.is_initialized():
            join_world()
        world = dist.get_world_size()
        rows = matrix(world, deepspeed=deepspeed)
        found = check_rows(rows, models=models)
    else:
        rows = matrix(world, deepspeed=deepspeed)
        progress(f"{len(rows)} layouts of {world} ranks, {len(models)} models …")
        found = run_ranks(
            world, check_rows, rows, "fp32", models, timeout=60.0 + 20.0 * len(rows), collective=120.0
        )[0]
    return {
        "holds": all(r["holds"] for r in found),
        "rows": found,
        "world": world,
        "max_rel_loss_diff": max(r["max_rel_loss_diff"] for r in found),
        "max_rel_grad_diff": max(r["max_rel_grad_diff"] for r in found),
        "bounds": {"loss": verify.LOSS_BOUND, "gradient": verify.GRAD_BOUND},
        "seconds": round(time.monotonic() - started, 1),
    }
