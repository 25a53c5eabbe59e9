"""Laws 1 to 3 for the diffusion transformer: documents of mixed sizes, odd grids, layers and conditions, in packs.

The same checks as `verify.py` makes for the causal backbone, on latents made of arithmetic.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ringweave.data_pipes.pack import Pack, PackPlan
from ringweave.data_pipes.packing import materialise
from ringweave.data_pipes.planner import PackPlanner
from ringweave.data_pipes.stream import PackStream
from ringweave.parallel.ring_layout import RingLayout
from ringweave.pretrain import verify
from ringweave.pretrain.config import RunConfig, config_from_dict
from ringweave.pretrain.dit_batch import DiffusionSettings, DiTBatch, collate_diffusion
from ringweave.pretrain.engine import TorchEngine, world_loss
from ringweave.pretrain.models.dit import DiTShape
from ringweave.pretrain.models.lwm import LWMShape
from ringweave.pretrain.parallelize import build_model
from ringweave.pretrain.synthetic import SyntheticLatents

VOCAB, CHANNELS, CONTEXT, PACKS = 64, 8, 127, 8  # a prime context: nothing may rely on divisibility
WORDS = LWMShape(vocab=VOCAB, layers=1, width=16, heads=4, kv_heads=4, ffn=32, head_chunk=16)
SHAPE = DiTShape(
    layers=4, heads=4, axes=(4, 6, 6), channels=CHANNELS, out=CHANNELS, text=16, words=WORDS, head=True,
    zero_init=False,
)  # fmt: skip
SETTINGS = DiffusionSettings(seed=5, drop=0.3, per="layer", words=True)
WEIGHTS = {"text": 0.25}


def make_packs(count: int = PACKS, context: int = CONTEXT) -> list[Pack]:
    """Packs of the synthetic latents; the first holds no document."""
    corpus = SyntheticLatents(vocab=VOCAB, channels=CHANNELS)
    planner = PackPlanner(
        lengths=corpus.lengths, weights={"rgba": 1.0, "video": 1.0}, seed=3, context=context, bins=4
    )
    stream = PackStream(corpus, planner)
    packs = [stream.materialise(plan) for plan in stream.next_batch(count).plans]
    packs[0] = materialise(PackPlan(packs[0].plan.index, context, ()), lambda piece: None)
    return packs


def reference(
    packs: Sequence[Pack], precision: str, *, shape: DiTShape = SHAPE, settings: DiffusionSettings = SETTINGS
) -> tuple[float, dict[str, torch.Tensor], float]:
    """(loss, gradients, squared norm) of one process without any wrapper."""
    model = build_model(shape, None, seed=1, precision=precision)
    engine = TorchEngine(model, None, micro_batch=1, precision=precision, modality_weights=WEIGHTS)
    sums, counts = engine.forward_backward(collate_diffusion(packs, settings, channels=CHANNELS))
    loss = world_loss(sums, counts, WEIGHTS, normalize="modality")
    return loss, verify._gradients(model), float(engine.grad_squares())


def alone(pack: Pack) -> list[Pack]:
    """Every document of a pack in a pack of exactly its length."""
    corpus = SyntheticLatents(vocab=VOCAB, channels=CHANNELS)
    return [materialise(PackPlan(0, len(piece), (piece,)), corpus.document) for piece in pack.plan.pieces]


def one_by_one(
    packs: Sequence[Pack],
    precision: str,
    *,
    shape: DiTShape = SHAPE,
    settings: DiffusionSettings = SETTINGS,
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of packs that are computed one after the other, counted as one step."""
    model = build_model(shape, None, seed=1, precision=precision)
    engine = TorchEngine(model, None, micro_batch=1, precision=precision, modality_weights=WEIGHTS)
    batches = [collate_diffusion([one], settings, channels=CHANNELS) for one in packs]
    counts = sum((b.counts for b in batches), np.zeros_like(batches[0].counts))
    sums = torch.zeros(len(counts), dtype=torch.float64)
    for batch in batches:
        batch.counts = counts
        sums += engine.forward_backward(batch)[0]
    return world_loss(sums, counts, WEIGHTS, normalize="modality"), verify._gradients(model)


def check_packing(precision: str, *, shape: DiTShape = SHAPE) -> dict[str, Any]:
    """Law 1: loss and gradients of packs against those of their documents alone."""
    packs = make_packs()
    loss, grads, _ = reference(packs, precision, shape=shape)
    other, separate = one_by_one([one for pack in packs for one in alone(pack)], precision, shape=shape)
    bound = 1e-10 if precision == "fp64" else 1e-5
    return verify._row(
        1, f"dit, packed = separate, {precision}", abs(loss - other) / abs(loss),
        verify._worst(separate, grads), bound, bound,
    )  # fmt: skip


def velocities(pack: Pack, settings: DiffusionSettings, model: Any) -> torch.Tensor:
    """What the model says of a pack, [L, channels]."""
    inputs = collate_diffusion([pack], settings, channels=CHANNELS)
    given = inputs.inputs()
    del given["velocity"], given["targets"]
    with torch.no_grad():
        out: torch.Tensor = model(inputs.ids, **given)[0]
    return out


def check_isolation() -> dict[str, Any]:
    """Law 1: another level, word or latent of one document leaves what is said of the others bit-identical."""
    pack = max(make_packs(), key=lambda p: len(p.plan.pieces))
    model = build_model(SHAPE, None, seed=1)
    before = velocities(pack, SETTINGS, model)
    others = torch.from_numpy(pack.doc > 0)
    differ = moved = 0
    for change in ("sample", "words", "latents"):
        changed = max(make_packs(), key=lambda p: len(p.plan.pieces))
        at = changed.doc == 0
        if change == "sample":  # another key: another level, other noise, maybe no words
            first = changed.plan.pieces[0]
            plan = replace(changed.plan, pieces=(replace(first, epoch=7), *changed.plan.pieces[1:]))
            changed.plan = plan
        elif change == "words":
            words = at & (changed.ids != 22)
            changed.ids[words] = (changed.ids[words] + 1) % 20
        else:
            assert changed.latents is not None
            changed.latents[at] *= 0.5
        after = velocities(changed, SETTINGS, model)
        differ += int((before[others] != after[others]).any(-1).sum())
        moved += int(not torch.equal(before[~others], after[~others]))
    return {
        "law": 1, "layout": "dit, one document's level, words, latents changed",
        "tokens_of_others": int(others.sum()), "tokens_of_others_changed": differ, "changes_seen": moved,
        "holds": differ == 0 and moved == 3 and bool(others.any()),
    }  # fmt: skip


def backbone(shape: DiTShape = SHAPE, settings: DiffusionSettings = SETTINGS) -> verify.Backbone:
    """The diffusion transformer, for law 2."""

    def batch(packs: Sequence[Pack], ring: RingLayout, rank: int) -> DiTBatch:
        return collate_diffusion(packs, settings, channels=shape.channels, ring=ring, rank=rank)

    return verify.Backbone(shape, batch, WEIGHTS)


@lru_cache
def _right(
    precision: str, shape: DiTShape
) -> tuple[list[Pack], tuple[float, dict[str, torch.Tensor], float]]:
    """The packs, and what one process makes of them."""
    packs = make_packs()
    return packs, reference(packs, precision, shape=shape)


def check_rows(rows: Sequence[Mapping[str, Any]], precision: str = "fp32") -> list[dict[str, Any]]:
    """Law 2 for every layout in `rows`, on the running world."""
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    found = []
    for row in rows:
        shape = replace(SHAPE, streams=row.get("streams", "double"))
        options = {key: value for key, value in row.items() if key != "streams"}
        packs, right = _right(precision, shape)
        result = verify.check_layout(options, packs, right, precision, backbone(shape))
        named = f"dit {result['layout']}" + (", one stream" if shape.streams == "single" else "")
        found.append({**result, "layout": named, "model": "dit"})
    return found


def tiny_config(place: Path, name: str, *, world: int) -> RunConfig:
    """A two-stage run over the synthetic latents with a moving average of the parameters, as `verify.tiny_config`."""
    plain = verify.tiny_config(place, name, world=world).to_dict()
    plain["model"] = {
        "kind": "dit", "layers": 4, "width": 64, "heads": 4, "words": {"layers": 1, "width": 16, "heads": 4}
    }  # fmt: skip
    plain["optimizer"] |= {"ema": 0.9}
    for source, name in zip(plain["data"]["sources"], ("rgba", "video")):
        source |= {"name": name, "plan": [name]}
    for stage in plain["stages"]:
        stage["context"], stage["layout"]["norms"] = 2 * stage["context"], "replicated"
        stage["tokens"] *= 2
    plain["stages"][1]["words_loss"] = 0.1
    return config_from_dict(plain, source="verify")


def check_killed(place: str, world: int) -> dict[str, Any]:
    """Law 3 on the running world."""
    whole, broken = (tiny_config(Path(place), name, world=world) for name in ("whole", "broken"))
    data = SyntheticLatents(vocab=verify.VOCAB, channels=CHANNELS)
    return verify.check_resume(whole, broken, data, channels=CHANNELS, name="dit, ")
