"""From packs to a diffusion step: what is noised, dropped, weighed and refused."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ringweave.data_pipes.pack import Pack, PackPlan, Piece
from ringweave.data_pipes.packing import materialise
from ringweave.parallel.ring_layout import RingLayout
from ringweave.pretrain import job, verify_dit
from ringweave.pretrain.config import config_from_dict, load_config
from ringweave.pretrain.dit_batch import DiffusionSettings, collate_diffusion
from ringweave.pretrain.errors import ConfigError, NonFiniteError
from ringweave.pretrain.evaluate_dit import loss_by_level
from ringweave.pretrain.flow import VALIDATION_LEVELS, FlowSettings, level_of
from ringweave.pretrain.models.dit import LATENT, NOTHING, WORD
from ringweave.pretrain.parallelize import build_model
from ringweave.pretrain.stage_data import whole_documents_fit
from ringweave.pretrain.synthetic import SyntheticLatents
from ringweave.tokenizers import bare
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.manifest import BOS
from ringweave.tokenizers.segment import Document, Segment

Z = 4


def _document(key: str, *, words: int = 3, grids: tuple[tuple[int, int, str], ...]) -> Document:
    rng = np.random.default_rng(len(key) + words)
    text = Segment(np.arange(40, 40 + words, dtype=np.int32), "text", np.zeros((words, 4), np.int32))
    segments = [
        bare.latent_segment(
            rng.standard_normal((1, h, w, Z), dtype=np.float32), layer=n, role=role,  # type: ignore[arg-type]
            weight=float(role == "target"),
        )
        for n, (h, w, role) in enumerate(grids)
    ]  # fmt: skip
    return bare.document(key, text if words else None, segments)


DOCS = [
    _document("a", grids=((2, 3, "target"), (2, 3, "target"), (2, 3, "condition"))),
    _document("bb", words=0, grids=((3, 1, "target"),)),
]


def _pack(context: int = 30, documents: list[Document] = DOCS, epoch: int = 0) -> Pack:
    pieces = tuple(Piece("s", epoch, n, 0, len(d)) for n, d in enumerate(documents))
    return materialise(PackPlan(0, context, pieces), lambda piece: documents[piece.sample])


def test_what_stands_in_each_slot() -> None:
    settings = DiffusionSettings(drop=0.0, words=True)
    batch = collate_diffusion([_pack()], settings, channels=Z)
    assert batch.kind[0].tolist() == [WORD] * 4 + [LATENT] * 18 + [WORD] + [LATENT] * 3 + [NOTHING] * 4
    assert batch.ids[0, :4].tolist() == [BOS, 40, 41, 42] and batch.ids[0, 22] == BOS
    clean = torch.from_numpy(_pack().latents)  # type: ignore[arg-type]
    assert torch.equal(batch.latents[0, 16:22], clean[16:22]), "a condition is seen as it is"
    assert not batch.velocity[0, 16:22].any() and not batch.weights[0, 16:22].any()
    # x_s = (1 - s) x + s e and v = e - x, so x = x_s - s v: for both layers of the document at one s.
    s = float(batch.sigma[0, 0])
    assert torch.allclose(batch.latents[0, 4:16] - s * batch.velocity[0, 4:16], clean[4:16], atol=1e-5)
    noise = batch.velocity[0, 4:16] + clean[4:16]
    assert (noise[:6] - noise[6:]).abs().max() > 0.1, "each layer has noise of its own"
    assert batch.weights[0].tolist() == [1, 1, 1, 0] + [1] * 12 + [0] * 6 + [0] + [1] * 3 + [0] * 4
    assert batch.targets[0, :4].tolist() == [40, 41, 42, -1], "a latent is nobody's next word"
    assert batch.counts[1] == 3 and batch.counts[3] == 15
    assert batch.sigma[0, 1] != s and batch.segment[0, 23] == 1
    assert batch.sigma[0, 0] == np.float32(level_of(0, "s/0", 0, 6, FlowSettings()))


@pytest.mark.parametrize(
    ("per", "weights"),
    [("token", [1, 1, 1]), ("layer", [1 / 6, 1 / 6, 1 / 3]), ("sample", [1 / 12, 1 / 12, 1 / 3])],
)
def test_means_over_tokens_layers_or_samples(per: str, weights: list[float]) -> None:
    batch = collate_diffusion([_pack()], DiffusionSettings(per=per, drop=0.0), channels=Z)
    found = [float(batch.weights[0, at]) for at in (4, 10, 23)]
    assert found == pytest.approx(weights)
    assert batch.counts[3] == pytest.approx({"token": 15, "layer": 3, "sample": 2}[per])


def test_dropped_words_leave_the_empty_prompt() -> None:
    batch = collate_diffusion([_pack()], DiffusionSettings(drop=1.0, words=True), channels=Z)
    assert batch.kind[0, :5].tolist() == [NOTHING] * 3 + [WORD, LATENT]
    assert batch.documents[0, :5].tolist() == [-1, -1, -1, 0, 0]
    assert batch.ids[0, 3] == BOS and batch.order[0, 3] == 0 and batch.counts[1] == 0
    silent = _document("a", words=0, grids=((2, 3, "target"), (2, 3, "target"), (2, 3, "condition")))
    without = collate_diffusion([_pack(documents=[silent])], DiffusionSettings(drop=0.0), channels=Z)
    assert (batch.places[0, 3] == without.places[0, 0]).all(), "it stands where an empty prompt stands"


def test_every_document_drops_its_words_by_itself_at_the_rate_that_is_set() -> None:
    """10,000 documents: within 3 sigma of the rate, as are pairs that share a pack (one coin a batch would not be)."""
    one = _document("a", words=2, grids=((1, 1, "target"),))
    dropped = []
    settings = DiffusionSettings(drop=0.15)
    for at in range(0, 10_000, 50):
        pieces = tuple(Piece("s", 0, at + n, 0, len(one)) for n in range(50))
        pack = materialise(PackPlan(0, 50 * len(one), pieces), lambda piece: one)
        kinds = collate_diffusion([pack], settings, channels=Z).kind.view(50, -1)
        dropped += (kinds[:, 0] == NOTHING).tolist()
    rate = np.mean(dropped)
    assert abs(rate - 0.15) < 3 * (0.15 * 0.85 / 10_000) ** 0.5
    pairs = np.mean(np.array(dropped[::2]) & np.array(dropped[1::2]))
    both = 0.15**2
    assert abs(pairs - both) < 3 * (both * (1 - both) / 5_000) ** 0.5


def test_another_pass_draws_other_numbers_and_validation_draws_its_own() -> None:
    first, again = (collate_diffusion([_pack()], DiffusionSettings(), channels=Z) for _ in range(2))
    assert torch.equal(first.latents, again.latents)
    later = collate_diffusion([_pack(epoch=1)], DiffusionSettings(), channels=Z)
    assert not torch.equal(first.velocity, later.velocity) and not torch.equal(first.sigma, later.sigma)
    fixed = [
        collate_diffusion([_pack(epoch=e)], DiffusionSettings(drop=1.0), channels=Z, levels=[0.25])
        for e in (0, 1)
    ]
    assert torch.equal(fixed[0].latents, fixed[1].latents)
    assert fixed[0].sigma[0, :2].tolist() == [0.25, 0.25]
    assert fixed[0].kind[0, 0] == WORD, "words are never dropped"


def test_ring_ranks_share_out_the_slots() -> None:
    packs = verify_dit.make_packs()[1:3]
    whole = collate_diffusion(packs, verify_dit.SETTINGS, channels=verify_dit.CHANNELS)
    parts = [
        collate_diffusion(
            packs, verify_dit.SETTINGS, channels=verify_dit.CHANNELS, ring=RingLayout(2), rank=r
        )
        for r in range(2)
    ]
    for name in ("kind", "latents", "velocity", "places", "segment", "targets"):
        joined = torch.empty_like(getattr(whole, name))
        for rank, part in enumerate(parts):
            joined[part.owner == rank] = getattr(part, name).flatten(0, 1)
        assert torch.equal(joined, getattr(whole, name)), name
    assert sum(p.weights.sum() for p in parts) == pytest.approx(whole.weights.sum())


def test_latents_that_are_not_finite_stop_the_run_by_name() -> None:
    pack = _pack()
    assert pack.latents is not None
    pack.latents[12, 1] = np.nan
    with pytest.raises(NonFiniteError, match=r"(?s)latents of layer 1.*s sample 0") as caught:
        collate_diffusion([pack], DiffusionSettings(), channels=Z)
    assert caught.value.exit_code == 4


def test_what_is_no_document_of_latents_is_refused() -> None:
    with pytest.raises(DataError, match="latents of 4 channels, the model reads 6"):
        collate_diffusion([_pack()], DiffusionSettings(), channels=6)
    cut = materialise(PackPlan(0, 12, (Piece("s", 0, 0, 0, 12),)), lambda piece: DOCS[0])
    with pytest.raises(DataError, match="no whole document"):
        collate_diffusion([cut], DiffusionSettings(), channels=Z)
    text = Document("t", (Segment(np.arange(40, 44, dtype=np.int32), "text", np.zeros((4, 4), np.int32)),))
    with pytest.raises(DataError, match="plans of `latents`"):
        collate_diffusion([_pack(8, [text])], DiffusionSettings(), channels=Z)


def test_documents_that_no_context_holds_are_told_before_training(tmp_path: Path) -> None:
    data = SyntheticLatents(vocab=64, channels=8)
    config = verify_dit.tiny_config(tmp_path, "x", world=1)
    whole_documents_fit(config, data, 0)
    data.lengths["video"][7] = 500
    with pytest.raises(DataError, match=r"(?s)1 of 24 documents of source video.*sample 7 with 500 tokens"):
        whole_documents_fit(config, data, 0)


def test_the_longest_document_is_numbered_over_all_shards(tmp_path: Path) -> None:
    data = SyntheticLatents(vocab=64, channels=8)
    config = verify_dit.tiny_config(tmp_path, "x", world=1)
    rest = data.lengths["video"]
    data.lengths["video"] = [rest, np.array([3, 500, 400])]  # type: ignore[assignment]
    with pytest.raises(DataError, match=r"(?s)2 of 27 documents of source video.*sample 25 with 500 tokens"):
        whole_documents_fit(config, data, 0)


def test_the_empty_prompt_stands_before_the_words() -> None:
    places = np.zeros((3, 4), np.int32)
    places[:, 0] = np.arange(3)
    words = Segment(np.arange(40, 43, dtype=np.int32), "text", places)
    made = bare.document(
        "k", words, [bare.latent_segment(np.zeros((2, 2, 3, Z), np.float32), modality="video")]
    )
    assert made.segments[0].ids.tolist() == [BOS, 40, 41, 42]
    assert made.segments[0].positions[:, 0].tolist() == [0, 1, 2, 3]
    assert bare.shape_of(made.segments[1]) == (2, 2, 3)


def _validation(model: Any) -> dict[str, dict[str, float]]:
    packs = verify_dit.make_packs()[1:4]
    return loss_by_level(model, packs, replace(verify_dit.SETTINGS, words=False))


def test_validation_at_fixed_levels_by_hand() -> None:
    """A model that says nothing (its last layer begins at zero) errs by E(e - x)² = 2 at every level."""
    model = build_model(replace(verify_dit.SHAPE, zero_init=True), None, seed=1).eval()
    found = _validation(model)
    assert set(found) == {"rgba", "video"}
    assert list(found["rgba"]) == [f"{level:g}" for level in VALIDATION_LEVELS]
    for losses in found.values():
        assert all(abs(value - 2.0) < 0.3 for value in losses.values())
    assert found == _validation(model)


@pytest.mark.slow
def test_a_moving_average_is_kept_and_exported(tmp_path: Path) -> None:
    """Three steps of a run with `ema`: the average is that of the parameters after each, and load_run prefers it."""
    from ringweave.pretrain.export import load_run
    from ringweave.pretrain.verify import tensor_digests

    plain = verify_dit.tiny_config(tmp_path, "x", world=1).to_dict()
    plain["stages"] = plain["stages"][:1]
    plain["checkpoint"] = {"every": "1 steps", "keep": 9}
    config = config_from_dict(plain, source="test")
    code = job.run_rank(config, lambda: (SyntheticLatents(vocab=64, channels=8), 64, "0" * 64), channels=8)
    assert code == 0
    assert "RANK" not in os.environ, "what starts after it in this process is no rank"
    run = Path(config.run.dir)
    name = "transformer_blocks.0.attn.to_q.weight"
    raw = [load_run(run, step=s, average=False)[0].state_dict()[name] for s in (1, 2)]
    average = [load_run(run, step=s)[0].state_dict()[name] for s in (1, 2)]
    assert torch.allclose(average[1], 0.9 * average[0] + 0.1 * raw[1], atol=1e-7)
    assert not torch.equal(raw[1], average[1])
    assert any("ema." in key for key in tensor_digests(run / "checkpoints" / "step-00000002"))
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [e["loss_by_modality"] for e in events if e["event"] == "step"]
    assert losses and set(losses[0]) <= {"rgba", "video", "text"}


BASE = """
run: {name: x, dir: runs/x}
tokenizers: {dir: none}
data: {dir: data, sources: [{name: s, shards: s.tar, plan: ["caption?", "latents:layers"]}]}
model: {kind: dit, layers: 2, width: 128, heads: 4}
optimizer: {lr: 1e-3}
stages: [{context: 256, tokens: 8K, batch: 2}]
"""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("model.axes=[8, 12, 10]", r"(?s)add up to 30.*head size"),
        ("model.kv_heads=2", "as many key-value heads"),
        ("model.ffn=256", r"4 · width = 512"),
        ("model.window=64", "belongs to kind: lwm"),
        ("model.words.heads=3", "no even head size"),
        ("engine.kind=deepspeed", "cannot run kind: dit"),
        ("stages.0.layout={tp: 2, norms: sequence}", "set norms: replicated"),
        ("stages.0.layout={tp: 2, norms: replicated, ulysses: 3, sp: 3}", "words.heads"),
        ("model.kind=lwm stages.0.words_loss=0.5", "an lwm predicts its words anyway"),
        ("model.kind=lwm model.preset=msrope", "belongs to kind: dit"),
    ],
)
def test_impossible_configs_say_why(tmp_path: Path, change: str, said: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(BASE)
    assert load_config(file).model.axes == (4, 14, 14)
    with pytest.raises(ConfigError, match=said):
        load_config(file, change.split(" ") if "kind=lwm" in change else [change])
