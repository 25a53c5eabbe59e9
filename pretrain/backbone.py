"""What depends on the backbone that a config names: its sizes, how packs become batches, how losses are weighed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ringweave.data_pipes.pack import Pack
from ringweave.parallel.ring_layout import RingLayout
from ringweave.pretrain.batch import Batch, collate
from ringweave.pretrain.config import RunConfig
from ringweave.pretrain.dit_batch import DiffusionSettings, collate_diffusion
from ringweave.pretrain.flow import FlowSettings
from ringweave.pretrain.models.dit import DiTShape
from ringweave.pretrain.models.lwm import LWMShape
from ringweave.tokenizers.errors import VocabularyError
from ringweave.tokenizers.manifest import VocabularyManifest

Shape = LWMShape | DiTShape


def shape_of(config: RunConfig, *, vocab: int, channels: int = 0) -> Shape:
    """Sizes of the model. vocab: of the tokenizers; channels: of their latents, which a dit needs."""
    m = config.model
    if m.kind == "lwm":
        return LWMShape(
            vocab=vocab, layers=m.layers, width=m.width, heads=m.heads, kv_heads=m.kv_heads, ffn=m.ffn,
            norm_eps=m.norm_eps, head_chunk=m.head_chunk, window=m.window, full_every=m.full_every,
        )  # fmt: skip
    w = m.words
    words = None if w.given else LWMShape(
        vocab=vocab, layers=w.layers, width=w.width, heads=w.heads, kv_heads=w.heads,
        ffn=max(64, round(w.width * 8 / 3 / 64) * 64), norm_eps=m.norm_eps, head_chunk=m.head_chunk,
    )  # fmt: skip
    assert m.axes is not None
    return DiTShape(
        layers=m.layers, heads=m.heads, axes=m.axes, channels=channels, out=channels, text=w.given or w.width,
        streams=m.streams, words=words, head=any(stage.words_loss > 0 for stage in config.stages),
    )  # fmt: skip


def channels_of(config: RunConfig, vocabulary: VocabularyManifest | str) -> int:
    """Channels of the latents that the tokenizers give; 0 where the model reads none.

    Raises VocabularyError when a dit is to train with tokenizers that have no codec of latents.
    """
    if config.model.kind == "lwm" or isinstance(vocabulary, str):
        return 0
    about = vocabulary.preprocessing.get("latents")
    if not isinstance(about, dict) or not about.get("channels"):
        raise VocabularyError(
            "these tokenizers have no codec of latents, which kind: dit trains on",
            where=config.tokenizers.dir,
            why=f"their codecs: {', '.join(dict.fromkeys(b.codec for b in vocabulary.blocks))}",
            fix="learn one: ringweave tokenizer train --learn latents",
        )
    return int(about["channels"])


def shape_from(config: RunConfig, record: Mapping[str, Any]) -> Shape:
    """The sizes that a checkpoint's manifest holds."""
    return DiTShape.of(record) if config.model.kind == "dit" else LWMShape(**record)


def flow_settings(config: RunConfig) -> FlowSettings:
    """How noise levels are drawn."""
    f = config.flow
    return FlowSettings(
        sampler=f.sampler, mean=f.mean, std=f.std, scale=f.scale, shift=f.shift, shift_from=f.shift_from,
        shift_to=f.shift_to, shift_base=f.shift_base, weighting=f.weighting,
    )  # fmt: skip


def diffusion_settings(config: RunConfig, stage: int) -> DiffusionSettings:
    """What a diffusion step of stage `stage` (0-based) asks of packs."""
    m, f = config.model, config.flow
    return DiffusionSettings(
        flow=flow_settings(config), seed=config.run.seed, preset=m.preset, sign=m.sign, axes=len(m.axes or ()),
        drop=f.drop_words, per=f.loss_per, words=config.stages[stage].words_loss > 0, given=m.words.given,
    )  # fmt: skip


def make_batch(
    config: RunConfig, shape: Shape, packs: Sequence[Pack], stage: int, *, ring: RingLayout, rank: int
) -> Batch:
    """The packs of a step as this ring rank's tensors."""
    if isinstance(shape, DiTShape):
        settings = diffusion_settings(config, stage)
        return collate_diffusion(packs, settings, channels=shape.channels, ring=ring, rank=rank)
    return collate(packs, ring=ring, rank=rank, prefix=config.model.attention == "prefix")


def modality_weights(config: RunConfig, stage: int) -> dict[str, float]:
    """Weight of each modality's loss in stage `stage`; the words of a dit weigh what the stage says."""
    weights = dict(config.objective.modality_weights)
    if config.model.kind == "dit":
        weights["text"] = config.stages[stage].words_loss
    return weights
