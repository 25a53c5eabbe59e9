"""The config of a run as frozen pydantic models: every key, its type, its default. No torch here.

Unknown keys are errors. Rules that span several keys are in `config_checks.py`; reading files, overrides and
messages with line numbers in `config.py`. docs/config.md describes each key.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationInfo, field_validator, model_validator

from ringweave.pretrain.config_base import Count, NonNegative, Positive, Section
from ringweave.pretrain.config_checks import LOOPED, CrossFieldError, cross_problems
from ringweave.pretrain.config_data import DataSection
from ringweave.pretrain.config_layouts import with_suggestions
from ringweave.pretrain.errors import redact
from ringweave.pretrain.source_weights import stage_shares
from ringweave.pretrain.units import Bytes, Context, Interval, Number, Seconds, Switch, Text, Tokens, Whole

#: Names of tokenizers/segment.py's MODALITIES; repeated here so that reading a config imports no numpy.
MODALITIES = ("control", "text", "image", "rgba", "video", "audio", "score", "symbolic", "midi")


class RunSection(Section):
    """Name, seed and folder of the run."""

    name: Text
    seed: Annotated[Whole, Field(ge=0, lt=2**63)] = 0
    dir: Text


class TokenizersSection(Section):
    """Folder of a fitted tokenizer set (`ringweave tokenizer train`)."""

    dir: Text


class WordsSection(Section):
    """The small decoder that makes the words of a diffusion document into vectors, trained along with the model.

    given: numbers of the vectors that the records hold instead (plan item `embeddings`); 0: none, there is a decoder.
    """

    layers: Annotated[Whole, Field(ge=0)] = 2
    width: Count = 256
    heads: Count = 4
    given: Annotated[Whole, Field(ge=0)] = 0


class ModelSection(Section):
    """Shape of the transformer. The vocabulary size and the channels of latents come from the tokenizers.

    kind "lwm": causal, over ids. attention "prefix": the leading conditions of a document see each other both ways.
    window: keys further away than this are not seen, but by every `full_every`-th layer (1: the window holds in all).
    kind "dit": two-way, over words and latents. axes: channels of a head that turn with layer or frame, row and column
    (four: layer, frame, row, column); preset and sign: of the layer axis; streams: weights of their own for words and
    latents, or one set; words: what reads the words.
    """

    kind: Literal["lwm", "dit"] = "lwm"
    layers: Count
    width: Count
    heads: Count
    kv_heads: Count = Field(default_factory=lambda seen: seen.get("heads", 1))
    attention: Literal["causal", "prefix"] = "causal"
    window: Count | None = None
    full_every: Count = 1
    ffn: Count = Field(
        default_factory=lambda seen: (
            4 * seen.get("width", 64) if seen.get("kind") == "dit" else default_ffn(seen.get("width", 64))
        )
    )
    norm_eps: Positive = 1e-6
    head_chunk: Count = 512
    axes: Annotated[tuple[Count, ...], Field(min_length=3, max_length=4)] | None = Field(
        default_factory=lambda seen: (
            default_axes(seen.get("width", 0) // max(1, seen.get("heads", 1)))
            if seen.get("kind") == "dit"
            else None
        )
    )
    preset: Literal["bil", "layer3d", "msrope"] = "bil"
    sign: Literal[1, -1] = 1
    streams: Literal["double", "single"] = "double"
    words: WordsSection = WordsSection()

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.width // self.heads


class ObjectiveSection(Section):
    """Loss terms and how modalities are weighed against each other.

    "modality": mean loss of each modality, then the weighted mean of those (LWM). "tokens": every target
    token counts its modality's weight.
    """

    next_token: Positive = 1.0
    modality_weights: dict[str, NonNegative] = Field(default_factory=dict)
    normalize: Literal["modality", "tokens"] = "modality"

    @field_validator("modality_weights")
    @classmethod
    def _fill(cls, weights: dict[str, float]) -> dict[str, float]:
        unknown = [name for name in weights if name not in MODALITIES]
        if unknown:
            raise ValueError(f"expected modalities ({', '.join(MODALITIES)}), got {', '.join(unknown)}")
        return {name: float(weights.get(name, 1.0)) for name in MODALITIES}


class FlowSection(Section):
    """Flow matching: how noise levels are drawn, and over what the loss is a mean (docs/dit.md gives the formulas).

    sampler with mean and std (of the logit) or scale (of the mode); shift of a document's levels by its own number of
    latents: exponential from (tokens, mu) to (tokens, mu), or linear over a base; weighting of levels; drop_words:
    share of documents that are trained without their words, for guidance.
    """

    sampler: Literal["logit_normal", "uniform", "mode"] = "logit_normal"
    mean: Number = 0.0
    std: Positive = 1.0
    scale: Number = 1.29
    shift: Literal["exponential", "linear", "none"] = "exponential"
    shift_from: tuple[Count, Number] = (256, 0.5)
    shift_to: tuple[Count, Number] = (8192, 0.9)
    shift_base: Count = 256
    weighting: Literal["none", "bell"] = "none"
    loss_per: Literal["token", "layer", "sample"] = "token"
    drop_words: Annotated[Number, Field(ge=0, le=1)] = 0.1


class OptimizerSection(Section):
    """AdamW and its learning-rate schedule over the optimizer steps of all stages together.

    ema: how much of the moving average of the parameters each step keeps (0: none); exports prefer the average.
    """

    kind: Literal["adamw"] = "adamw"
    lr: Positive
    min_lr_ratio: Annotated[Number, Field(ge=0, le=1)] = 0.1
    warmup: Annotated[Whole, Field(ge=0)] = 0
    schedule: Literal["cosine", "constant"] = "cosine"
    betas: tuple[Annotated[Number, Field(ge=0, lt=1)], Annotated[Number, Field(ge=0, lt=1)]] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.1
    clip: Positive = 1.0
    ema: Annotated[Number, Field(ge=0, lt=1)] = 0.0


class Layout(Section):
    """Ranks along each mesh axis, and how parameters, layers and tokens are dealt to them.

    ring, transport, ulysses: the ring over sp; replicate: copies of the parameters within dp·sp; schedule,
    virtual, split: the pipeline over pp; norms: where norms are computed under tp. docs/parallel.md explains.
    """

    dp: Count = 1
    pp: Count = 1
    tp: Count = 1
    sp: Count = 1
    ring: Literal["planned", "zigzag", "contiguous", "per_document"] = "planned"
    transport: Literal["auto", "ring", "direct", "gather"] = "auto"
    ulysses: Count = 1
    replicate: Count = 1
    schedule: Literal["1f1b", "gpipe", "interleaved", "zero_bubble", "zbv"] = "1f1b"
    virtual: Count = Field(default_factory=lambda seen: 2 if seen.get("schedule") in LOOPED else 1)
    split: Annotated[tuple[Count, ...], Field(min_length=1)] | None = None
    norms: Literal["sequence", "replicated"] = "sequence"

    @property
    def world(self) -> int:
        """Processes this layout needs."""
        return self.dp * self.pp * self.tp * self.sp

    @property
    def parts(self) -> int:
        """Parts the layers are cut into: pipeline ranks times the parts each holds."""
        return self.pp * self.virtual


class Stage(Section):
    """A part of the run at one context length. `tokens` counts packed slots, padding included.

    recompute "auto": by a table of memory and time measured at the start of the stage; recompute_memory: what a rank
    may use (none: what the machine has). words_loss: of a dit, the weight of the words' next-token loss beside the
    flow loss, which has weight 1.
    """

    context: Annotated[Context, Field(ge=2)]
    tokens: Tokens
    batch: Count
    micro_batch: Count = 1
    rope_theta: Positive = 1e4
    recompute: Literal["none", "selective", "full", "auto"] = "none"
    recompute_memory: Bytes | None = None
    words_loss: NonNegative = 0.0
    layout: Layout = Layout()
    weights: dict[str, NonNegative] | None = None

    @property
    def tokens_per_step(self) -> int:
        """Slots of one optimizer step over all ranks."""
        return self.context * self.batch

    @property
    def steps(self) -> int:
        """Optimizer steps of this stage: tokens // (context · batch), at least 1."""
        return max(1, self.tokens // self.tokens_per_step)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one dp rank in one optimizer step."""
        return self.batch // self.layout.dp // self.micro_batch


class EngineSection(Section):
    """What runs a step: torch itself, or DeepSpeed with a ZeRO stage, its optimizer perhaps in host memory."""

    kind: Literal["torch", "deepspeed"] = "torch"
    zero: Literal[1, 2, 3] = 1
    offload: Literal["none", "cpu"] = "none"


class CheckpointSection(Section):
    """How often checkpoints are made (steps or time) and how many of the newest are kept."""

    every: Interval = "5min"
    keep: Count = 3

    @property
    def every_steps(self) -> int | None:
        """Steps between checkpoints, or None when `every` is a time."""
        return int(self.every.split()[0]) if self.every.endswith("steps") else None

    @property
    def every_seconds(self) -> float | None:
        """Seconds between checkpoints, or None when `every` is a number of steps."""
        return None if self.every.endswith("steps") else float(self.every[:-1])


class LogSection(Section):
    """Steps between two lines on the terminal, and whether TensorBoard files are written.

    previews: of a dit, documents of each held-out source that are made anew by the model of each stage's end.
    """

    every: Count = 10
    tensorboard: Switch = True
    previews: Annotated[Whole, Field(ge=0, le=64)] = 0


class TimeoutSection(Section):
    """How long to wait before a run counts as hung."""

    start: Seconds = 300.0
    collective: Seconds = 60.0
    stop: Seconds = 60.0


class RunConfig(Section):
    """Everything one run needs to be repeated, apart from the data and the code."""

    run: RunSection
    tokenizers: TokenizersSection
    data: DataSection
    model: ModelSection
    objective: ObjectiveSection = ObjectiveSection()
    flow: FlowSection = FlowSection()
    optimizer: OptimizerSection
    precision: Literal["fp32", "bf16"] = "fp32"
    engine: EngineSection = EngineSection()
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()
    timeout: TimeoutSection = TimeoutSection()

    @model_validator(mode="after")
    def _cross_checks(self, info: ValidationInfo) -> RunConfig:
        world = info.context.get("world") if info.context else None
        problems = cross_problems(self, world=world)
        if problems:
            raise CrossFieldError(with_suggestions(self, problems, world))
        return self

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def world(self) -> int:
        """Processes every stage's layout needs (equal for all stages)."""
        return self.stages[0].layout.world

    def stage_weights(self, stage: int) -> dict[str, float]:
        """Share of each source in stage `stage`, summing to 1. An override names all sources it wants."""
        override = self.stages[stage].weights
        sources = self.data.sources
        raw = {s.name: s.weight for s in sources} if override is None else stage_shares(sources, override)
        total = sum(raw.values())
        return {name: weight / total for name, weight in raw.items()}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values of every key, secrets in URLs hidden; `config_from_dict` reads them back."""
        dumped: dict[str, Any] = redact(self.model_dump(mode="json"))
        return dumped

    def to_yaml(self) -> str:
        """The effective config as YAML that `load_config` reads back."""
        head = "# effective config; units: K = 1024 for context, K = 1000 for tokens; both count slots\n"
        return head + yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=100)

    def hash(self) -> str:
        """sha256 (hex) of the effective config; independent of key order and of hidden secrets."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def default_axes(head_dim: int) -> tuple[int, int, int]:
    """Channels of (layer, row, column) when none are given: about an eighth and equal halves of the rest, all even;
    128 is (16, 56, 56), as in Qwen-Image."""
    first = max(2, head_dim // 8 // 2 * 2)
    first += (head_dim - first) % 4
    return first, (head_dim - first) // 2, (head_dim - first) // 2


def default_ffn(width: int) -> int:
    """Feed-forward width when none is given: the multiple of 64 nearest to 8/3 · width, at least 64."""
    return max(64, round(width * 8 / 3 / 64) * 64)
