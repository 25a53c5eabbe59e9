"""What recomputation costs and saves, measured: a table of memory and time, and the choice that it makes.

Two layers of a stage's model, as large as on a rank of it (its tensor-parallel shard, the collectives replaced by
empty tensors of the same size), run forward and backward over a pack of documents for each kind of recomputation.

- Kept a layer: tensors that a forward pass made and that are alive after it, counted by their storages: what autograd
  holds, what activation checkpointing stashes, and the output. Two layers less one: what they share counts once.
- Activations of a rank = kept a layer and slot x slots of a micro-batch on the rank x layers alive at once (by the
  pipeline's table) + what one layer computes again while its backward runs.
- Total = activations + states, gathered parameters and logits of `memory.py`, and of a dit its words' decoder.
- Step time = forward and backward of the two layers (best of three), as a ratio to "none". Embedding, head, optimizer
  and communication take the same time in all rows and are left out, so a step differs by less.

Not counted: copies that Ulysses exchanges, and what DeepSpeed keeps otherwise than FSDP2.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ringweave.parallel.tensor import LIBRARY, HiddenStates, TensorGroup
from ringweave.pretrain.backbone import Shape
from ringweave.pretrain.config import RunConfig, Stage
from ringweave.pretrain.memory import GIB, layers_alive, memory_estimate, memory_limit
from ringweave.pretrain.models.dit import LATENT, WORD, DiT, DiTShape
from ringweave.pretrain.models.lwm import LWM
from ringweave.pretrain.parallelize import DTYPES, new_model
from ringweave.pretrain.parallelize_tensor import shard_decoder, shard_dit
from ringweave.pretrain.recompute import recompute_activations

#: The rows, fastest first where nothing is measured.
KINDS = ("none", "selective", "full")
#: Most slots that are measured, slots of a document of the measured pack, and the share of words in one of a dit.
MOST_SLOTS, DOCUMENT, WORDS = 4096, 512, 8
#: Floating point operations of one measured pass that are not exceeded, by device: a table takes seconds, not minutes.
WORK = {"cpu": 2e10, "cuda": 2e13}
#: Timed rounds, and seconds after which no further one begins.
ROUNDS, PATIENCE = 3, 4.0


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of recomputation. step_time_ratio: of the layers, to "none"."""

    recompute: str
    activations_gib: float
    total_gib: float
    step_time_ratio: float


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of a stage (0-based), the one chosen and why. slots: that were measured; limit_from: whose limit it is."""

    stage: int
    rows: tuple[Row, ...]
    limit_gib: float
    limit_from: str
    chosen: str
    fits: bool
    reason: str
    slots: int
    kept_bytes_per_slot: dict[str, float]
    device: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people, aligned; the chosen row is marked."""
        head = ("recompute", "activations GiB", "total GiB", "step time")
        out = [
            f"stage {self.stage + 1}: recompute, with {size(self.limit_gib)} GiB a rank ({self.limit_from}); measured "
            f"on layers of {self.slots} slots, {self.device}",
            f"    {head[0]:<10}{head[1]:>16}{head[2]:>11}{head[3]:>11}",
        ]
        for row in self.rows:
            mark = "  > " if row.recompute == self.chosen else "    "
            out.append(
                f"{mark}{row.recompute:<10}{size(row.activations_gib):>16}{size(row.total_gib):>11}"
                f"{row.step_time_ratio:>10.2f}x"
            )
        return [*out, f"    {self.chosen}: {self.reason}"]


def size(gib: float) -> str:
    """`24.00`, `0.13`, `0.0029`: two places, or two figures of what is less than that."""
    return f"{gib:.2f}" if gib >= 0.1 else f"{gib:.2g}"


def choose(rows: Sequence[Row], limit_gib: float) -> tuple[str, bool, str]:
    """(the fastest row whose total fits, or the smallest if none does; whether it fits; why, in words)."""
    fitting = [row for row in rows if row.total_gib <= limit_gib]
    if fitting:
        best = min(fitting, key=lambda row: (row.step_time_ratio, row.total_gib))
        left = f"leaves {size(limit_gib - best.total_gib)} GiB"
        if len(fitting) == 1:
            return best.recompute, True, f"the only one that fits, {left}"
        return best.recompute, True, f"the fastest that fits, {left}"
    least = min(rows, key=lambda row: row.total_gib)
    over = least.total_gib - limit_gib
    return least.recompute, False, f"none fits; the smallest exceeds the limit by {size(over)} GiB"


def stage_table(
    config: RunConfig,
    number: int,
    shape: Shape,
    *,
    device: str = "cpu",
    limit: int | None = None,
    ranks: int | None = None,
) -> Table:
    """The table of stage `number` (0-based) of a run whose model has `shape`, measured on this machine.

    limit: bytes a rank may use; unless given the stage's `recompute_memory`, or this machine's (`memory_limit`) shared
    by `ranks` (those the launcher started on this host, or all).
    """
    stage = config.stages[number]
    if limit is None:
        limit = stage.recompute_memory
    where = "as asked"
    if limit is None:
        here = ranks or int(os.environ.get("LOCAL_WORLD_SIZE", config.world))
        limit, where = memory_limit(device=device, ranks=here)
    tokens = -(-stage.context // stage.layout.sp) * stage.micro_batch
    found = measure(
        shape, tokens, tp=stage.layout.tp, norms=stage.layout.norms, precision=config.precision, device=device
    )
    rows = _rows(config, stage, shape, tokens, found)
    chosen, fits, reason = choose(rows, limit / GIB)
    return Table(
        number, rows, limit / GIB, where, chosen, fits, reason, found.slots,
        {how: found.kept[how] / found.slots for how in KINDS}, device,
    )  # fmt: skip


def _rows(config: RunConfig, stage: Stage, shape: Shape, tokens: int, found: Measured) -> tuple[Row, ...]:
    if isinstance(shape, DiTShape):
        vocab, channels = 1 if shape.words is None else shape.words.vocab, shape.channels
    else:
        vocab, channels = shape.vocab, None
    fixed = memory_estimate(config, stage, vocab=vocab, channels=channels)
    other = fixed["total_gib"] - fixed["activations_gib"]
    if isinstance(shape, DiTShape) and shape.words is not None:
        # The words' decoder is kept, by memory.py's formula.
        held = (12 * shape.words.width + 3 * shape.words.ffn) * DTYPES[config.precision].itemsize
        other += shape.words.layers * held * tokens / WORDS / GIB
    alive, scale = layers_alive(stage, layers=shape.layers), tokens / found.slots / GIB
    rows = []
    for how in KINDS:
        again = max(0, found.kept["none"] - found.kept[how])
        activations = (alive * found.kept[how] + again) * scale
        ratio = round(found.seconds[how] / found.seconds["none"], 2)
        rows.append(Row(how, round(activations, 6), round(activations + other, 6), ratio))
    return tuple(rows)


@dataclass(frozen=True, slots=True)
class Measured:
    """By kind: bytes that a layer keeps for its backward, output included, over `slots`; seconds of two layers."""

    slots: int
    kept: dict[str, int]
    seconds: dict[str, float]


def measure(
    shape: Shape,
    tokens: int,
    *,
    tp: int = 1,
    norms: str = "sequence",
    precision: str = "fp32",
    device: str = "cpu",
) -> Measured:
    """Layers of `shape`, or the shard of one of `tp` ranks, over at most `tokens` slots of a pack."""
    slots = _slots(shape, tokens, tp=tp, device=device)
    passes = {}
    kept = {}
    for how in KINDS:
        one, two = (
            _layers(shape, n, how, tp=tp, norms=norms, precision=precision, device=device) for n in (1, 2)
        )
        kept[how] = kept_bytes(*two, slots) - kept_bytes(*one, slots)
        passes[how] = two
    seconds = {how: float("inf") for how in KINDS}
    started = time.monotonic()
    for turn in range(ROUNDS + 1):  # the first warms up
        if turn > 1 and time.monotonic() - started > PATIENCE:
            break
        for how, (model, sharded) in passes.items():
            took = _time(model, sharded, slots, device)
            if turn:
                seconds[how] = min(seconds[how], took)
    return Measured(slots, kept, seconds)


def _slots(shape: Shape, tokens: int, *, tp: int, device: str) -> int:
    """How many slots are measured: those of the stage, but no more than MOST_SLOTS and WORK allow."""
    if isinstance(shape, DiTShape):
        matrices = (4 + 2 * shape.mlp) * shape.width**2
    else:
        matrices = (
            2 * shape.width * (shape.width + shape.kv_heads * shape.head_dim) + 3 * shape.width * shape.ffn
        )
    affordable = int(WORK[device] / (2 * 6 * matrices / tp))
    return max(1, min(tokens, MOST_SLOTS, max(64, affordable)))


# --- two layers of a rank ------------------------------------------------------------------------------------

LIBRARY.define("stand_in(Tensor x, int[] shape) -> Tensor")
LIBRARY.impl("stand_in", lambda x, shape: x.new_zeros(shape), "CompositeExplicitAutograd")


class _Alone(TensorGroup):
    """A tensor-parallel group whose other ranks are not there: tensors of the right size, kept as collectives' are."""

    def __init__(self, size: int) -> None:
        self.rank, self.size = 0, size

    def gather(self, x: Tensor) -> Tensor:
        """As there, of zeros."""
        out: Tensor = torch.ops.ringweave.stand_in(x, [x.shape[0] * self.size, *x.shape[1:]])
        return out

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """As there, of zeros."""
        out: Tensor = torch.ops.ringweave.stand_in(x, [x.shape[0] // self.size, *x.shape[1:]])
        return out

    def all_reduce(self, x: Tensor) -> Tensor:
        """As there, of zeros."""
        out: Tensor = torch.ops.ringweave.stand_in(x, list(x.shape))
        return out


def _layers(
    shape: Shape, count: int, how: str, *, tp: int, norms: str, precision: str, device: str
) -> tuple[LWM | DiT, HiddenStates | None]:
    """`count` layers without ends, filled with small random numbers, and how their hidden states lie under tp."""
    shape = (
        replace(shape, layers=count, words=None, head=False)
        if isinstance(shape, DiTShape)
        else replace(shape, layers=count)
    )
    with torch.device("meta"):
        model = new_model(shape, rope_theta=1e4).to(DTYPES[precision])
    model.keep_part(range(count), first=False, last=False)
    states = None
    if tp > 1:
        sharded = norms == "sequence" and isinstance(model, LWM)
        states = HiddenStates(_Alone(tp), sharded=sharded)

        def split(weight: torch.nn.Parameter, dim: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(weight.detach().chunk(tp, dim)[0].clone())

        # The mesh is asked for nothing but what stands at the ends.
        if isinstance(model, DiT):
            shard_dit(model, states, split, None)  # type: ignore[arg-type]
            model.enter_level = states.enter
        else:
            shard_decoder(model, states, split, None)  # type: ignore[arg-type]
    recompute_activations(model, how)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02, generator=generator)
    return model, states


def _inputs(model: LWM | DiT, states: HiddenStates | None, slots: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states that want a gradient, and a pack of documents of DOCUMENT slots (a dit's: words in front)."""
    some = next(model.parameters())
    at = torch.arange(slots, device=some.device)[None]
    documents, place = (at // DOCUMENT).int(), at % DOCUMENT
    count = int(documents.max()) + 1
    if isinstance(model, DiT):
        segments = -(-count // 8) * 8
        kind = torch.where(place < DOCUMENT // WORDS, WORD, LATENT)
        kind[:, -1] = LATENT
        axes = len(model.shape.axes)
        x = some.new_zeros((1, slots + model.extra_rows(slots, segments), model.shape.width))
        inputs = {
            "kind": kind, "places": place[..., None].expand(-1, -1, axes), "segment": documents.long(),
            "sigma": torch.full((1, segments), 0.5, device=some.device), "documents": documents,
            "words": kind == WORD,
        }  # fmt: skip
    else:
        lies = (1, slots, model.shape.width)
        x = some.new_zeros(lies if states is None else states.shape(*lies))
        inputs = {"order": place, "documents": documents}
    generator = torch.Generator(some.device).manual_seed(1)
    return x.normal_(0, 1, generator=generator).requires_grad_(), inputs


# --- counting and timing -------------------------------------------------------------------------------------


class _Births(TorchDispatchMode):
    """Remembers, weakly, the storage of every tensor that an operator gives."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def know(self, value: Any) -> None:
        """Remember the storages of the tensors in `value`."""
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                # A weak reference keeps the address from being used again.
                self.seen.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it and remember what it gives."""
        out = func(*args, **(kwargs or {}))
        self.know(out)
        return out

    def alive(self) -> int:
        """Bytes of those that are still there."""
        return sum(size for ref, size in self.seen.values() if not ref.expired())


def living(forward: Callable[[], Tensor], known: Any) -> int:
    """Bytes of the tensors that `forward` made and that live as long as its result does, the result included.

    known: tensors that were there before, parameters and inputs.
    """
    births, before = _Births(), _Births()
    before.know(known)
    with births:
        out = forward()
    size = births.alive() - sum(births.seen[key][1] for key in before.seen if key in births.seen)
    assert out.requires_grad  # and so the graph is alive until here
    return size


def kept_bytes(model: LWM | DiT, states: HiddenStates | None, slots: int) -> int:
    """Bytes that a forward pass of `_layers` over a pack of so many slots leaves alive."""
    x, inputs = _inputs(model, states, slots)
    return living(lambda: model(x, **inputs), [list(model.parameters()), x, inputs])


def _time(model: LWM | DiT, states: HiddenStates | None, slots: int, device: str) -> float:
    """Seconds of a forward and backward pass; on a CPU of its cores, which other processes disturb less."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    x, inputs = _inputs(model, states, slots)
    model.zero_grad(set_to_none=True)
    if device == "cuda":
        torch.cuda.synchronize()
    started = clock()
    model(x, **inputs).sum().backward()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - started
