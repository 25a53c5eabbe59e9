"""Rules that span several config keys. Pure functions; messages carry the numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ringweave.data_pipes.plan_items import ITEMS, entries, of_latents, parse_entry
from ringweave.pretrain.config_words import words_problems
from ringweave.pretrain.source_weights import parts_of, stage_shares

if TYPE_CHECKING:
    from ringweave.pretrain.config_schema import Layout, ModelSection, RunConfig, Stage

#: What a plan may name, in the order of docs/config.md. A trailing "?" makes the item a condition: seen, without loss.
PLAN_ITEMS = ("text", "caption", "image", "rgba", "score", "audio", "video", "latents", "embeddings")

#: The plan of each source of the demo data, for commands that are given no config.
DEFAULT_PLANS: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "image": ("caption", "image"),
    "rgba": ("caption", "rgba"),
    "score": ("score",),
    "audio": ("audio",),
    "video": ("caption", "video"),
}

#: Pipeline schedules that visit every rank more than once.
LOOPED = ("interleaved", "zero_bubble", "zbv")

Finding = tuple[tuple[str | int, ...], str, str]


class CrossFieldError(Exception):
    """Raised inside validation; `findings` are (path, message, hint). The loader makes it a ConfigError."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        self.findings = tuple(findings)
        super().__init__("; ".join(f"{'.'.join(map(str, path))}: {text}" for path, text, _ in findings))


def check_plan_item(item: str) -> None:
    """ValueError unless `item` is a known plan item, with an argument it takes or none, and maybe a `?`."""
    try:
        parse_entry(item)
    except ValueError as error:
        if item.removesuffix("?").partition(":")[0] in ITEMS:
            raise ValueError(f"expected another plan entry than {item[:80]!r}: {error}") from None
        raise ValueError(
            f"expected plan items of {', '.join(PLAN_ITEMS)} (each may end in '?') or fields, got {item[:80]!r}"
        ) from None


def check_plan(plan: Sequence[str]) -> None:
    """ValueError for a bad item, and for items that cannot stand together in one plan."""
    for item in plan:
        check_plan_item(item)
    try:
        of_latents(entries(plan))
    except ValueError as error:
        raise ValueError(f"expected another plan: {error}") from None


def cross_problems(config: RunConfig, *, world: int | None = None) -> list[Finding]:
    """Everything that is impossible about `config`; `world` is the number of processes, when known."""
    return [
        *_model_problems(config.model),
        *_kind_problems(config),
        *_data_problems(config),
        *_world_problems(config, world),
        *_engine_problems(config),
        *_recompute_problems(config),
        *(found for i in range(len(config.stages)) for found in layout_problems(config, i)),
    ]


def layout_problems(config: RunConfig, i: int) -> Iterator[Finding]:
    """What is impossible about the layout of stage `i` (0-based), whatever the number of processes."""
    stage = config.stages[i]
    yield from _engine_layout_problems(config, stage, i)
    yield from _stage_problems(config.model, stage, i)


def _model_problems(model: ModelSection) -> Iterator[Finding]:
    width, heads, kv_heads = model.width, model.heads, model.kv_heads
    if width % heads:
        yield (
            ("model", "heads"),
            f"width {width} is not divisible by heads {heads}",
            "choose heads that divide width",
        )
    elif (width // heads) % 2:
        yield (
            ("model", "heads"),
            f"head size width / heads = {width} / {heads} = {width // heads} is odd",
            "rotary positions need an even head size",
        )
    if heads % kv_heads:
        yield (
            ("model", "kv_heads"),
            f"heads {heads} is not divisible by kv_heads {kv_heads}",
            "each key-value head serves the same number of heads",
        )


#: Keys of `model` and their values at rest, by the only kind they say something to.
_OF_LWM = {"attention": "causal", "window": None, "full_every": 1}
_OF_DIT = {"preset": "bil", "sign": 1, "streams": "double", "axes": None}


def _kind_problems(config: RunConfig) -> Iterator[Finding]:
    """Keys that the chosen backbone does not have, and what a dit cannot do."""
    model = config.model
    for key, rest in (_OF_LWM if model.kind == "dit" else _OF_DIT).items():
        if getattr(model, key) != rest:
            yield (
                ("model", key),
                f"model.{key} = {getattr(model, key)} with kind: {model.kind}",
                f"leave it out: it belongs to kind: {'lwm' if model.kind == 'dit' else 'dit'}",
            )
    if model.kind == "lwm":
        if config.log.previews:
            yield (
                ("log", "previews"),
                f"log.previews = {config.log.previews} with kind: lwm",
                "leave it out: previews are pictures of a dit",
            )
        for i, stage in enumerate(config.stages):
            if stage.words_loss:
                yield (
                    ("stages", i, "words_loss"),
                    f"words_loss = {stage.words_loss} with kind: lwm",
                    "leave it out: an lwm predicts its words anyway",
                )
        return
    yield from _dit_problems(config)


def _dit_problems(config: RunConfig) -> Iterator[Finding]:
    model, axes = config.model, config.model.axes or ()
    if sum(axes) != model.width // model.heads or any(axis % 2 for axis in axes):
        yield (
            ("model", "axes"),
            f"axes {list(axes)} add up to {sum(axes)}, the head size width / heads is {model.width // model.heads}",
            "even numbers of channels that add up to the head size, as 16, 56, 56 for 128",
        )
    if model.kv_heads != model.heads:
        yield (
            ("model", "kv_heads"),
            f"kv_heads = {model.kv_heads} with heads = {model.heads}",
            "a dit has as many key-value heads as heads: leave kv_heads out",
        )
    if model.ffn != 4 * model.width:
        yield (
            ("model", "ffn"),
            f"ffn = {model.ffn}, 4 · width = {4 * model.width}",
            "leave ffn out: the stock class that reads exports has 4 · width",
        )
    yield from words_problems(config)
    if model.words.width % model.words.heads or (model.words.width // model.words.heads) % 2:
        yield (
            ("model", "words", "heads"),
            f"words.width {model.words.width} / words.heads {model.words.heads} is no even head size",
            "choose heads that divide the width into even parts",
        )
    if config.log.previews and not any(source.heldout for source in config.data.sources):
        yield (
            ("log", "previews"),
            f"log.previews = {config.log.previews}, and no source has held-out shards",
            "name heldout shards of a source: previews are made of them",
        )
    if config.engine.kind == "deepspeed":
        yield (
            ("engine", "kind"),
            "engine deepspeed cannot run kind: dit",
            "set engine.kind: torch, which shards parameters, gradients and moments as well",
        )
    for i, stage in enumerate(config.stages):
        if stage.layout.tp > 1 and stage.layout.norms == "sequence":
            yield (
                ("stages", i, "layout", "norms"),
                f"norms: sequence with kind: dit and tp = {stage.layout.tp}",
                "leave norms out or set norms: replicated: modulation looks tokens up by document, so every rank "
                "keeps all of them",
            )
        if model.words.given:
            continue
        if stage.layout.tp > 1 and model.words.heads % stage.layout.tp:
            yield (
                ("stages", i, "layout", "tp"),
                f"model.words.heads = {model.words.heads} is not divisible by tp = {stage.layout.tp}",
                f"choose words.heads that {stage.layout.tp} divides",
            )
        if stage.layout.ulysses > 1 and model.words.heads % (stage.layout.tp * stage.layout.ulysses):
            yield (
                ("stages", i, "layout", "ulysses"),
                f"model.words.heads = {model.words.heads} is not divisible by tp · ulysses",
                "the ring (ulysses: 1) needs no such rule",
            )


def _data_problems(config: RunConfig) -> Iterator[Finding]:
    names = [source.name for source in config.data.sources]
    for name, count in Counter(names).items():
        if count > 1:
            last = len(names) - 1 - names[::-1].index(name)
            yield (
                ("data", "sources", last, "name"),
                f"source name {name!r} is used {count} times",
                "rename one",
            )
    if not any(source.weight > 0 for source in config.data.sources):
        yield ("data", "sources"), "every source has weight 0", "give at least one source a weight above 0"
    for i, stage in enumerate(config.stages):
        if stage.weights is None:
            continue
        known: dict[str, float] = {}
        for name, weight in stage.weights.items():
            try:
                parts_of(name, config.data.sources, stage.weights)
                known[name] = weight
            except ValueError as error:
                yield (
                    ("stages", i, "weights", name),
                    f"weights of stage {i} {error}",
                    f"sources are {', '.join(names)}",
                )
        if not any(share > 0 for share in stage_shares(config.data.sources, known).values()):
            yield (
                ("stages", i, "weights"),
                f"weights of stage {i} leave no source",
                "give one a weight above 0",
            )


def _world_problems(config: RunConfig, world: int | None) -> Iterator[Finding]:
    first = config.stages[0].layout.world
    for i, stage in enumerate(config.stages):
        layout = stage.layout
        sizes = f"dp {layout.dp}, pp {layout.pp}, tp {layout.tp}, sp {layout.sp}"
        if world is not None and layout.world != world:
            yield (
                ("stages", i, "layout"),
                f"dp·pp·tp·sp = {layout.world}, world = {world} ({sizes})",
                f"change the layout so that the product is {world}, or start {layout.world} processes",
            )
        elif world is None and layout.world != first:
            yield (
                ("stages", i, "layout"),
                f"dp·pp·tp·sp = {layout.world}, but stage 0 has {first} ({sizes})",
                "all stages run on the same processes, so all products must be equal",
            )


def _engine_problems(config: RunConfig) -> Iterator[Finding]:
    engine = config.engine
    if engine.kind != "deepspeed" and engine.offload != "none":
        yield (
            ("engine", "offload"),
            f"engine.offload = {engine.offload} with engine.kind = {engine.kind}",
            "only DeepSpeed offloads: set engine.kind: deepspeed, or engine.offload: none",
        )


def _recompute_problems(config: RunConfig) -> Iterator[Finding]:
    for i, stage in enumerate(config.stages):
        if stage.recompute_memory is not None and stage.recompute != "auto":
            yield (
                ("stages", i, "recompute_memory"),
                f"recompute_memory = {stage.recompute_memory} with recompute: {stage.recompute}",
                "set recompute: auto, which chooses by it, or leave it out",
            )


def _engine_layout_problems(config: RunConfig, stage: Stage, i: int) -> Iterator[Finding]:
    """What DeepSpeed cannot do inside this trainer (docs/deepspeed.md says why)."""
    engine, layout, at = config.engine, stage.layout, ("stages", i, "layout")
    if engine.kind != "deepspeed":
        return
    if layout.pp > 1:
        yield (
            (*at, "pp"),
            f"engine deepspeed cannot run pp = {layout.pp}: DeepSpeed's pipeline engine owns its schedule and "
            "asserts ZeRO < 2; nesting it in this trainer's pipeline is undefined",
            "set pp: 1, or engine.kind: torch",
        )
    if layout.replicate > 1:
        yield (
            (*at, "replicate"),
            f"engine deepspeed cannot run replicate = {layout.replicate}: ZeRO shards over all of dp·sp",
            "set replicate: 1, or engine.kind: torch",
        )
    if stage.recompute != "none" and engine.zero == 3:
        yield (
            ("stages", i, "recompute"),
            f"engine deepspeed with zero 3 cannot run recompute = {stage.recompute}: computing a layer again "
            "lets ZeRO-3 release parameters that its backward still needs",
            "set recompute: none, engine.zero: 2, or engine.kind: torch, which shards parameters just as well",
        )


def _stage_problems(model: ModelSection, stage: Stage, i: int) -> Iterator[Finding]:
    layout, at = stage.layout, ("stages", i, "layout")
    for name, value in (("heads", model.heads), ("kv_heads", model.kv_heads), ("ffn", model.ffn)):
        if value % layout.tp:
            yield (
                (*at, "tp"),
                f"model.{name} = {value} is not divisible by tp = {layout.tp}",
                f"choose tp that divides {value}",
            )
    yield from _pipeline_problems(model, layout, at)
    yield from _ring_problems(model, layout, at)
    if stage.context < 2 * layout.sp:
        yield (
            (*at, "sp"),
            f"context = {stage.context} is less than 2·sp = {2 * layout.sp}",
            "every ring rank needs two chunks of the sequence",
        )
    if stage.batch % layout.dp:
        yield (
            ("stages", i, "batch"),
            f"batch = {stage.batch} is not divisible by dp = {layout.dp}",
            f"every dp rank takes batch / dp packs; {_nearest_multiple(stage.batch, layout.dp)} would do",
        )
        return
    per_rank = stage.batch // layout.dp
    if per_rank % stage.micro_batch:
        yield (
            ("stages", i, "micro_batch"),
            f"batch / dp = {stage.batch} / {layout.dp} = {per_rank} is not divisible by "
            f"micro_batch = {stage.micro_batch}",
            "choose micro_batch that divides batch / dp",
        )
    elif stage.micro_batches < layout.pp:
        need = layout.pp * layout.dp * stage.micro_batch
        yield (
            ("stages", i, "batch"),
            f"micro-batches per rank = batch / dp / micro_batch = {stage.micro_batches} "
            f"is less than pp = {layout.pp}",
            f"a pipeline of {layout.pp} needs batch of at least {need}",
        )


def _pipeline_problems(model: ModelSection, layout: Layout, at: tuple[str | int, ...]) -> Iterator[Finding]:
    if model.layers < layout.parts:
        held = f" · virtual = {layout.parts}" if layout.virtual > 1 else ""
        yield (
            (*at, "pp"),
            f"model.layers = {model.layers} is less than pp{held} = {layout.parts}",
            "every part of a pipeline needs a layer",
        )
    looped = layout.schedule in LOOPED
    if (looped and layout.virtual < 2) or (layout.schedule == "zbv" and layout.virtual != 2):
        yield (
            (*at, "virtual"),
            f"schedule {layout.schedule} needs {'2' if layout.schedule == 'zbv' else '2 or more'} parts a "
            f"rank, virtual = {layout.virtual}",
            "set virtual: 2",
        )
    elif not looped and layout.virtual > 1:
        yield (
            (*at, "virtual"),
            f"schedule {layout.schedule} holds one part a rank, virtual = {layout.virtual}",
            "set virtual: 1, or schedule: interleaved",
        )
    if layout.split is not None and (len(layout.split) != layout.parts or sum(layout.split) != model.layers):
        yield (
            (*at, "split"),
            f"split has {len(layout.split)} parts of {sum(layout.split)} layers, pp·virtual = {layout.parts} "
            f"parts of {model.layers} layers are needed",
            "name the layers of every part, in order",
        )


def _ring_problems(model: ModelSection, layout: Layout, at: tuple[str | int, ...]) -> Iterator[Finding]:
    if layout.sp % layout.ulysses:
        yield (
            (*at, "ulysses"),
            f"sp = {layout.sp} is not divisible by ulysses = {layout.ulysses}",
            f"choose a divisor of {layout.sp}",
        )
    for name, value in (("heads", model.heads), ("kv_heads", model.kv_heads)):
        if layout.ulysses > 1 and value % (layout.tp * layout.ulysses):
            yield (
                (*at, "ulysses"),
                f"model.{name} = {value} is not divisible by tp · ulysses = {layout.tp * layout.ulysses}",
                "each rank of a Ulysses group takes whole heads; the ring (ulysses: 1) needs no such rule",
            )
    if (layout.dp * layout.sp) % layout.replicate:
        yield (
            (*at, "replicate"),
            f"dp · sp = {layout.dp * layout.sp} is not divisible by replicate = {layout.replicate}",
            f"choose a divisor of {layout.dp * layout.sp}",
        )


def _nearest_multiple(value: int, of: int) -> int:
    return max(of, round(value / of) * of)
