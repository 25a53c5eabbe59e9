"""`ringweave verify`: the laws of the design, checked on the user's own machine with tiny models.

1. packed = separate, 2. any layout = one process, 3. stopped and resumed = never stopped, 5. exported = trained.
Each check gives rows with its errors, its bounds and `holds`.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from ringweave.data_pipes.pack import Pack, packs_for_rank
from ringweave.data_pipes.planner import PackPlanner
from ringweave.data_pipes.stream import Documents, PackStream
from ringweave.parallel.grad_norm import world_sum
from ringweave.parallel.mesh import AXES, Mesh, describe_layout
from ringweave.parallel.ring_layout import RingLayout
from ringweave.parallel.spawn import run_ranks
from ringweave.pretrain.batch import Batch, collate
from ringweave.pretrain.checkpoint import checkpoint_name
from ringweave.pretrain.config import RunConfig, config_from_dict
from ringweave.pretrain.engine import TorchEngine, world_loss
from ringweave.pretrain.models.dit import DiT, DiTShape
from ringweave.pretrain.models.lwm import LWM, LWMShape
from ringweave.pretrain.parallelize import build_model, build_parts
from ringweave.pretrain.run_folder import RunFolder, read_events
from ringweave.pretrain.synthetic import SyntheticCorpus
from ringweave.pretrain.trainer import Trainer

VOCAB, CONTEXT, PACKS = 256, 61, 8  # a prime context: nothing may rely on divisibility
SHAPE = LWMShape(vocab=VOCAB, layers=4, width=32, heads=4, kv_heads=4, ffn=64, head_chunk=16)
LAYOUTS: tuple[dict[str, int], ...] = (
    {"dp": 4}, {"tp": 4}, {"pp": 4}, {"sp": 4}, {"dp": 2, "tp": 2}, {"pp": 2, "sp": 2}, {"tp": 2, "sp": 2},
)  # fmt: skip
MORE_LAYOUTS: tuple[dict[str, int], ...] = (
    {"dp": 2, "pp": 2}, {"dp": 2, "sp": 2}, {"pp": 2, "tp": 2},
    {"dp": 1}, {"dp": 2}, {"pp": 2}, {"tp": 2}, {"sp": 2}, {"sp": 3},
)  # fmt: skip
LOSS_BOUND, GRAD_BOUND = 1e-6, 1e-5

Progress = Callable[[str], None]


def run(*, quick: bool = True, world: int = 4, progress: Progress = lambda line: None) -> dict[str, Any]:
    """Run the checks on `world` gloo processes (at most 4 are used). Gives {"holds", "rows", "seconds", …}.

    `quick` compares the four axes and their pairs that the demo uses; without it every layout known here that
    fits the world.
    """
    started = time.monotonic()
    known = LAYOUTS if quick and world >= 4 else LAYOUTS + MORE_LAYOUTS
    layouts = [x for x in known if _product(x) == min(world, 4)]
    from ringweave.pretrain import verify_dit  # which builds on this module

    rows = [check_packing("fp64"), check_packing("fp32"), check_isolation()]
    rows += [verify_dit.check_packing("fp64"), verify_dit.check_isolation()]
    progress(f"law 1, packed = separate: {_word(rows)}")
    with tempfile.TemporaryDirectory() as place:
        ranks = min(world, 4)
        progress(f"laws 2 and 3: {len(layouts)} layouts and a run that dies twice, on {ranks} processes …")
        found, resumed = run_ranks(ranks, _world_worker, layouts, place, ranks, quick, timeout=600)[0]
    rows += [*found, resumed]
    progress(f"law 2, any layout = one process: {_word(found)}")
    progress(f"law 3, resumed = uninterrupted: {_word([resumed])}")
    rows.append(check_export())
    progress(f"law 5, exported = trained: {_word(rows[-1:])}")
    laws = [r for r in rows if r["law"] == 2]
    return {
        "holds": all(r["holds"] for r in rows),
        "rows": rows,
        "max_rel_loss_diff": max(r["max_rel_loss_diff"] for r in laws),
        "max_rel_grad_diff": max(r["max_rel_grad_diff"] for r in laws),
        "bounds": {"loss": LOSS_BOUND, "gradient": GRAD_BOUND},
        "quick": quick,
        "world": min(world, 4),
        "seconds": round(time.monotonic() - started, 1),
    }


def make_packs(count: int = PACKS, context: int = CONTEXT) -> list[Pack]:
    """Packs of the synthetic corpus; the first has no target at all, as one data rank may find itself."""
    corpus = SyntheticCorpus(vocab=VOCAB)
    planner = PackPlanner(
        lengths=corpus.lengths, weights={"text": 1.0, "image": 1.0}, seed=3, context=context, bins=4
    )
    stream = PackStream(corpus, planner)
    packs = [stream.materialise(p) for p in stream.next_batch(count).plans]
    packs[0].weights[:] = 0.0
    packs[0].targets[:] = -1
    return packs


# --- law 1 -----------------------------------------------------------------------------------------------


def _gradients(model: LWM | DiT) -> dict[str, torch.Tensor]:
    return {n: p.grad.double().clone() for n, p in model.named_parameters() if p.grad is not None}


def _reference(
    packs: list[Pack], precision: str, *, prefix: bool = False
) -> tuple[float, dict[str, torch.Tensor], float]:
    """(loss, gradients, squared norm) of one process without any wrapper."""
    model = build_model(SHAPE, None, seed=1, rope_theta=1e4, precision=precision)
    engine = TorchEngine(model, None, micro_batch=1, precision=precision)
    sums, counts = engine.forward_backward(collate(packs, prefix=prefix))
    return world_loss(sums, counts, {}, normalize="modality"), _gradients(model), float(engine.grad_squares())


def separate(packs: list[Pack]) -> list[Pack]:
    """Every document of the packs alone in a pack of exactly its length."""
    alone = []
    for pack in packs:
        for number in np.unique(pack.doc[pack.doc >= 0]):
            at = np.flatnonzero(pack.doc == number)
            fields = {
                f: getattr(pack, f)[at].copy()
                for f in (
                    "ids",
                    "order",
                    "positions",
                    "modality",
                    "targets",
                    "target_modality",
                    "weights",
                    "prefix",
                )
            }
            alone.append(Pack(plan=pack.plan, doc=np.zeros(len(at), np.int32), **fields))
    return alone


def check_packing(precision: str) -> dict[str, Any]:
    """Law 1: loss and gradients of packs against those of their documents alone (no padding, no neighbour)."""
    packs = make_packs()
    loss, grads, _ = _reference(packs, precision)
    model = build_model(SHAPE, None, seed=1, rope_theta=1e4, precision=precision)
    engine = TorchEngine(model, None, micro_batch=1, precision=precision)
    alone = [collate([p]) for p in separate(packs)]
    counts = sum((b.counts for b in alone), np.zeros_like(alone[0].counts))
    sums = torch.zeros(len(counts), dtype=torch.float64)
    for batch in alone:
        batch.counts = counts
        sums += engine.forward_backward(batch)[0]
    other = world_loss(sums, counts, {}, normalize="modality")
    loss_diff, grad_diff = abs(loss - other) / abs(loss), _worst(_gradients(model), grads)
    bound = 1e-10 if precision == "fp64" else 1e-5
    return _row(1, f"packed = separate, {precision}", loss_diff, grad_diff, bound, bound)


def check_isolation() -> dict[str, Any]:
    """Law 1: changing one document leaves the losses of the others bit-identical."""
    richest = max(range(1, PACKS), key=lambda i: make_packs()[i].doc.max())
    packs, changed = [make_packs()[richest]], [make_packs()[richest]]
    at = changed[0].doc == 0
    changed[0].ids[at] = (changed[0].ids[at] + 1) % VOCAB
    model = build_model(SHAPE, None, seed=1, rope_theta=1e4)
    losses = []
    for some in (packs, changed):
        b = collate(some)
        with torch.no_grad():
            losses.append(model(b.ids, **b.inputs())[0].numpy())
    others = packs[0].doc > 0
    differ = int((losses[0][others] != losses[1][others]).sum())
    moved = int((losses[0][at] != losses[1][at]).sum())
    return {
        "law": 1, "layout": "one document perturbed", "tokens_of_others": int(others.sum()),
        "tokens_of_others_changed": differ, "tokens_of_it_changed": moved,
        "holds": differ == 0 and moved > 0 and bool(others.any()),
    }  # fmt: skip


def _world_worker(
    layouts: list[dict[str, int]], place: str, world: int, quick: bool
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Laws 2 and 3 in one start of the processes, which is most of what either costs.

    quick: the diffusion transformer on single axes only.
    """
    from ringweave.pretrain import verify_dit

    some = [x for x in layouts if len(x) == 1 or not quick]
    rows = _layout_worker(layouts, "fp32") + verify_dit.check_rows(some)
    return rows, _resume_worker(place, world)


@dataclass(frozen=True)
class Backbone:
    """What law 2 needs to know of a model: its sizes, how packs become a ring rank's batch, weights of its losses."""

    shape: LWMShape | DiTShape
    batch: Callable[[Sequence[Pack], RingLayout, int], Batch]
    weights: Mapping[str, float]


def lwm_backbone(mask: str = "causal") -> Backbone:
    """The decoder; mask "bidirectional" for packs whose prefixes count."""
    prefix = mask == "bidirectional"
    return Backbone(SHAPE, lambda packs, ring, rank: collate(packs, ring=ring, rank=rank, prefix=prefix), {})


# --- law 2 -----------------------------------------------------------------------------------------------


def _layout_worker(layouts: list[dict[str, int]], precision: str) -> list[dict[str, Any]]:
    # Gathering whole gradients to compare them is slow on tensor-parallel shards, and torch says so each time.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    packs = make_packs()
    reference = _reference(packs, precision)
    return [check_layout(layout, packs, reference, precision) for layout in layouts]


def check_layout(
    layout: Mapping[str, Any],
    packs: list[Pack],
    reference: tuple[float, dict[str, torch.Tensor], float],
    precision: str,
    backbone: Backbone | None = None,
) -> dict[str, Any]:
    """Law 2 for one layout, on the running world: loss, every gradient and the gradient norm.

    layout: sizes by axis, and beside them `ring`, `transport`, `ulysses`, `replicate`, `norms`, `recompute`,
    `schedule`, `virtual` and `split` as in a config's stage; `mask` "bidirectional" for packs whose prefixes count;
    `engine` "zero1", "zero2" or "zero3" for DeepSpeed. backbone: the decoder, if not another.
    """
    loss, grads, squares = reference
    options = {key: value for key, value in layout.items() if key not in AXES}
    named = " ".join(
        [
            describe_layout(dict(layout)),
            *(f"{key} {value}" for key, value in options.items() if key != "mask"),
        ]
    )
    kind = options.pop("ring", "planned")
    backbone = lwm_backbone(options.pop("mask", "causal")) if backbone is None else backbone
    mesh = Mesh.build(
        {axis: layout[axis] for axis in AXES if axis in layout},
        replicate=options.pop("replicate", 1),
        ulysses=options.pop("ulysses", 1),
    )
    engine = _engine(backbone, mesh, precision, **options)
    mine = packs_for_rank(0, len(packs), mesh.rank_on["dp"], mesh.sizes["dp"])
    ring = RingLayout(mesh.sizes["sp"], kind, width=backbone.shape.width)
    sums, counts = engine.forward_backward(backbone.batch([packs[i] for i in mine], ring, mesh.rank_on["sp"]))
    ours = world_loss(world_sum(sums), counts, backbone.weights, normalize="modality")
    norm = float(world_sum(engine.grad_squares())) ** 0.5
    whole = {
        name: (g.full_tensor() if isinstance(g, DTensor) else g).double()
        for name, g in _live_gradients(engine).items()
    }
    worst = torch.tensor(
        [_worst(whole, {k: grads[k] for k in whole}), abs(norm / squares**0.5 - 1)], dtype=torch.float64
    )
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    row = _row(2, named, abs(ours - loss) / abs(loss), float(worst[0]), LOSS_BOUND, GRAD_BOUND)
    row["rel_norm_diff"] = float(worst[1])
    row["holds"] = row["holds"] and row["rel_norm_diff"] <= GRAD_BOUND
    return row


def _engine(
    backbone: Backbone, mesh: Mesh, precision: str, *, engine: str = "torch", **options: Any
) -> TorchEngine:
    if engine.startswith("zero"):
        from ringweave.pretrain.engine_deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(
            SHAPE,
            mesh,
            seed=1,
            rope_theta=1e4,
            micro_batch=1,
            zero=int(engine[4:]),
            precision=precision,
            **options,
        )
    # unit=1: a sharding unit a layer, as models of real size have (the trainer's runs here use one unit)
    parts = build_parts(backbone.shape, mesh, seed=1, precision=precision, unit=1, **options)
    return TorchEngine(
        parts, mesh, micro_batch=1, precision=precision, modality_weights=backbone.weights,
        schedule=options.get("schedule", "1f1b"),
        split_backward=options.get("recompute", "none") == "none",
    )  # fmt: skip


def _live_gradients(engine: TorchEngine) -> dict[str, torch.Tensor]:
    """Gradients by name, sharded ones as DTensors."""
    if hasattr(engine, "gradients"):
        return dict(engine.gradients())
    named = chain.from_iterable(part.named_parameters() for part in engine.parts)
    return {name: p.grad for name, p in named if p.grad is not None}


# --- law 3 -----------------------------------------------------------------------------------------------


def tiny_config(place: Path, name: str, *, world: int, steps: int = 4) -> RunConfig:
    """A two-stage run over the synthetic corpus: dp x tp, then pp x sp where the world allows."""
    first, second = {"dp": 2, "tp": 2}, {"pp": 2, "sp": 2}
    if world != 4:
        first, second = ({"dp": world} if 4 % world == 0 else {"pp": world}), {"sp": world}
    stage = {"tokens": 64 * 4 * steps, "context": 64, "batch": 4}
    return config_from_dict(
        {
            "run": {"name": name, "seed": 5, "dir": str(place / name)},
            "tokenizers": {"dir": "none"},
            "data": {
                "dir": "none",
                "sources": [{"name": n, "shards": "none", "plan": [n]} for n in ("text", "image")],
            },
            "model": {"kind": "lwm", "layers": 4, "width": 32, "heads": 4, "kv_heads": 2, "ffn": 64},
            "optimizer": {"lr": 1e-3, "warmup": 2},
            "stages": [
                {**stage, "layout": first},
                {**stage, "context": 128, "batch": 2, "rope_theta": 1e5, "layout": second},
            ],
            "checkpoint": {"every": "3 steps", "keep": 3},
            "log": {"every": 1000, "tensorboard": False},
        },
        source="verify",
    )


class _Crash(Exception):
    """Stands for a process that dies between two steps."""


class _Fragile(Trainer):
    dies_after = 10**9

    def _record(self, *args: Any, **kwargs: Any) -> None:
        super()._record(*args, **kwargs)
        if self.cursor.step >= self.dies_after:
            raise _Crash


def _one_run(
    config: RunConfig, data: Documents | None = None, *, channels: int = 0, dies_after: int | None = None
) -> None:
    folder = RunFolder(Path(config.run.dir))
    if dist.get_rank() == 0:
        folder.acquire()
    dist.barrier()
    trainer = _Fragile(
        config, data or SyntheticCorpus(vocab=VOCAB), vocab=VOCAB, vocabulary="0" * 64, channels=channels,
        folder=folder, rank=dist.get_rank(), report=lambda line: None,
    )  # fmt: skip
    trainer.dies_after = dies_after or 10**9
    try:
        trainer.run()
    except _Crash:
        pass
    finally:
        folder.release()
    dist.barrier()


def _resume_worker(place: str, world: int) -> dict[str, Any]:
    whole, broken = (tiny_config(Path(place), n, world=world) for n in ("whole", "broken"))
    return check_resume(whole, broken, SyntheticCorpus(vocab=VOCAB))


def check_resume(
    whole: RunConfig, broken: RunConfig, data: Documents, *, channels: int = 0, name: str = ""
) -> dict[str, Any]:
    """Law 3: a run that dies twice (inside each stage) against one that does not: every loss, every parameter byte.

    channels: of the latents, for a dit; name: what to put before the row's name.
    """
    _one_run(whole, data, channels=channels)
    for dies_after in (2, 7, None):
        _one_run(broken, data, channels=channels, dies_after=dies_after)
    if dist.get_rank() != 0:
        return {}
    loss = [final_losses(Path(c.run.dir)) for c in (whole, broken)]
    last = checkpoint_name(whole.total_steps)
    tensors = [tensor_digests(Path(c.run.dir) / "checkpoints" / last) for c in (whole, broken)]
    differ = [s for s in loss[0] if loss[0][s] != loss[1].get(s)]
    return {
        "law": 3, "layout": f"{name}died at steps 2 and 7, resumed",
        "steps": len(loss[0]), "steps_with_other_loss": len(differ),
        "tensors": len(tensors[0]), "tensors_that_differ": sum(tensors[0].get(k) != v for k, v in tensors[1].items()),
        "holds": not differ and len(loss[0]) == whole.total_steps and tensors[0] == tensors[1],
    }  # fmt: skip


def final_losses(run: Path) -> dict[int, float]:
    """Loss of each step, the last attempt's word counting."""
    return {e["step"]: e["loss"] for e in read_events(run / "metrics.jsonl") if e.get("event") == "step"}


def tensor_digests(step_folder: Path) -> dict[str, str]:
    """sha256 of every tensor shard in a checkpoint, by file and name: equal content whatever the order in the file."""
    from hashlib import sha256

    from safetensors.numpy import load_file

    return {
        f"{file.name}/{name}": sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        for file in sorted(step_folder.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


# --- law 5 -----------------------------------------------------------------------------------------------


def check_export() -> dict[str, Any]:
    """Law 5: a transformers Llama loaded from our weights gives our logits."""
    from ringweave.pretrain.export import logit_difference, write_llama

    model = build_model(LWMShape(**{**_as_dict(SHAPE), "kv_heads": 2}), None, seed=2, rope_theta=1e5)
    with tempfile.TemporaryDirectory() as place:
        write_llama(model, Path(place))
        diff = logit_difference(model, Path(place))
    return {
        "law": 5,
        "layout": "transformers LlamaForCausalLM",
        "max_abs_logit_diff": diff,
        "holds": diff <= 1e-5,
    }


# --- helpers ---------------------------------------------------------------------------------------------


def _as_dict(shape: LWMShape) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(shape)


def _row(
    law: int, layout: str, loss: float, grad: float, loss_bound: float, grad_bound: float
) -> dict[str, Any]:
    return {
        "law": law, "layout": layout, "max_rel_loss_diff": loss, "max_rel_grad_diff": grad,
        "holds": bool(loss <= loss_bound and grad <= grad_bound),
    }  # fmt: skip


def _worst(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Largest relative difference over parameters, ‖a − b‖ / ‖b‖."""
    if ours.keys() != theirs.keys():
        raise ValueError(f"parameters differ: {sorted(ours.keys() ^ theirs.keys())}")
    return max(float((ours[n] - theirs[n]).norm() / theirs[n].norm()) for n in ours)


def _product(layout: dict[str, int]) -> int:
    return int(np.prod(list(layout.values())))


def _word(rows: list[dict[str, Any]]) -> str:
    bad = [r["layout"] for r in rows if not r["holds"]]
    return "holds" if not bad else f"BROKEN for {', '.join(bad)}"
