"""Training of the learned codecs: from the closed form, on crops of records, in torch; rounded to integers at the end.

Two phases. First encoder, codebooks and decoder learn together, with codes picked greedily and gradients passed
straight through. Then encoder and codebooks are rounded to integers and kept, and the decoder alone learns from the
codes that the finished encoder gives, beam search and all. What a step sees depends on (seed, step) only, so a run that
was stopped and goes on equals one that was not, and so does one over more ranks (to rounding).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor, nn

from ringweave.tokenizers.codec import Tensors
from ringweave.tokenizers.conv_codec import ConvCore
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.learn_core import LearnedCore
from ringweave.tokenizers.learn_start import Crops

STATE_FORMAT = 1
#: What of a core the second phase trains.
LATE = ("decoder.", "back")


@dataclass(frozen=True)
class Schedule:
    """steps: both phases together, the last third for the decoder alone; batch: crops of one step over all ranks;
    rate: highest learning rate; absolute: weight of the absolute beside the squared error; ema: share of the old
    weights kept by each step in the averages that become the codec; book_share: learning rate of the codebooks beside
    `rate`; decoder_only: encoder, codebooks and basis stay those of the closed form."""

    steps: int = 2000
    batch: int = 24
    rate: float = 2e-3
    absolute: float = 0.05
    commit: float = 1.0
    ema: float = 0.995
    book_share: float = 0.25
    seed: int = 0
    decoder_only: bool = False

    @property
    def joint(self) -> int:
        """Steps of the first phase."""
        return 0 if self.decoder_only else self.steps * 2 // 3


def _digest(tensors: Tensors) -> str:
    """Of the closed form a training starts from: other records, other digest."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + np.ascontiguousarray(tensors[name]).tobytes())
    return found.hexdigest()


@dataclass(frozen=True)
class Coded:
    """What a step coded with the books [Q, K, D] that the core calls `books`.

    z: float32 [m, D], where lost codes may move to; codes: [n, Q], those that count as used.
    """

    books: str
    z: Tensor
    codes: Tensor


class Training:
    """Steps, averages, dead codes, and the state that a stopped training goes on from.

    A core has its codebooks in parameters named `books...`, and what the second phase trains in `back...` and
    `decoder.`; a subclass with another core says what a step misses in `_joint_terms` and `_decoder_terms`.
    """

    #: The core that learns, the integer core it becomes, and the books it has.
    learner: type[Any] = LearnedCore
    integer: type[Any] = ConvCore
    books: tuple[str, ...] = ("books",)

    def __init__(self, config: dict[str, int], tensors: Tensors, crops: Crops, schedule: Schedule) -> None:
        self.config, self.crops, self.schedule = config, crops, schedule
        self.core = self.learner(config, tensors, seed=schedule.seed)
        self.average = self.learner(config, tensors, seed=schedule.seed)
        self.average.requires_grad_(False)
        shapes = [getattr(self.core, name).shape for name in self.books]
        #: 1 when code 0 of every book is the zero vector and stays it: a codec that says silence with it.
        self.reserved = int("codebooks" in tensors and not tensors["codebooks"][:, 0].any())
        self._start = _digest(tensors)
        self.step = 0
        # A trace of when each code was last used: the books of all names one after another.
        self.seen = torch.ones(sum(shape[0] for shape in shapes), max(shape[1] for shape in shapes))
        self.loss = float("nan")
        self._optimizer = self._new_optimizer()
        self._finished: Any = None

    def _new_optimizer(self) -> torch.optim.Optimizer:
        fixed = self.step >= self.schedule.joint
        for name, parameter in self.core.named_parameters():
            parameter.requires_grad_(
                not fixed or name.startswith(LATE[:1] if self.schedule.decoder_only else LATE)
            )
        learning = [p for n, p in self.core.named_parameters() if p.requires_grad and n not in self.books]
        groups: list[dict[str, Any]] = [{"params": learning, "share": 1.0}]
        if not fixed:
            # A code is chosen by few cells of a step: its vector must not follow each of them.
            books = [getattr(self.core, name) for name in self.books]
            groups.append({"params": books, "share": self.schedule.book_share})
        return torch.optim.AdamW(groups, lr=self.schedule.rate, betas=(0.9, 0.99), weight_decay=0.0)

    def run(self, *, until: int | None = None, progress: Callable[[int, float], Any] | None = None) -> None:
        """Step on to `until` (at most the schedule's end). progress(step, loss)."""
        stop = min(self.schedule.steps, until if until is not None else self.schedule.steps)
        while self.step < stop:
            if self.step == self.schedule.joint:
                self._fix_encoder()
            self._one_step()
            self.step += 1
            if progress is not None:
                progress(self.step, self.loss)

    def _fix_encoder(self) -> None:
        """Second phase: the averages become the encoder and the books, and stay."""
        self.core.load_state_dict(self.average.state_dict())
        self._optimizer = self._new_optimizer()

    def _rate(self) -> float:
        """Linear warm-up over 50 steps, then a cosine to zero, in each phase anew (half as high in the second)."""
        joint = self.schedule.joint
        second = self.step >= joint
        at, length = (self.step - joint, self.schedule.steps - joint) if second else (self.step, joint)
        warm = min(1.0, (at + 1) / 50)
        return (
            self.schedule.rate * warm * 0.5 * (1 + math.cos(math.pi * at / length)) * (0.5 if second else 1)
        )

    def _one_step(self) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate() * group["share"]
        cells, weights = self._my_part()
        if self.step < self.schedule.joint:
            terms, coded = self._joint_terms(cells, weights)
        else:
            terms, coded = [self._decoder_terms(cells, weights)], []
        # Sums over all ranks, divided once: the number of cells that count differs between them.
        count = _over_ranks((weights > 0).sum().float())
        total = sum(terms) / count.clamp(min=1.0)
        self.core.zero_grad()  # those of the first phase too: they must not count in the norm of the second
        total.backward()
        parameters = [p for p in self.core.parameters() if p.grad is not None]
        for parameter in parameters:
            assert parameter.grad is not None
            _over_ranks(parameter.grad)
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        self.loss = float(_over_ranks(total.detach().clone()))
        if not (math.isfinite(self.loss) and math.isfinite(float(norm))):
            raise DataError(
                f"training of the codec diverged at step {self.step}", fix="lower the learning rate"
            )
        self._optimizer.step()
        if self.reserved:
            with torch.no_grad():
                self.core.books[:, 0] = 0
        if coded:
            self._revive(coded)
        self._average()

    def _my_part(self) -> tuple[Tensor, Tensor]:
        """This rank's share of the step's crops: cells in `unit`s and their weights."""
        rng = np.random.Generator(np.random.Philox(key=[self.schedule.seed, self.step]))
        cells, weights = self.crops.batch(rng, self.schedule.batch)
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        mine = slice(rank * len(cells) // world, (rank + 1) * len(cells) // world)
        unit = float(self.config["unit"])
        return torch.tensor(cells[mine] / unit, dtype=torch.float32), torch.tensor(
            weights[mine], dtype=torch.float32
        )

    def _joint_terms(self, x: Tensor, weights: Tensor) -> tuple[list[Tensor], list[Coded]]:
        z = self.core.encode(x)
        flat = z.reshape(-1, z.shape[-1])
        live = (weights > 0).reshape(-1, 1)
        codes = self.core.nearest(flat)
        share = weights.reshape(-1)
        # Each book is drawn to what it was asked for, each residual to the code it got (van den Oord et al., 2017).
        rest, pull = flat, flat.new_zeros(())
        for q, book in enumerate(self.core.books):
            chosen = book[codes[:, q]]
            to_book = (chosen - rest.detach()).pow(2).sum(1)
            to_code = (rest - chosen.detach()).pow(2).sum(1)
            pull = pull + ((to_book + self.schedule.commit * to_code) * share).sum() / x.shape[-1]
            rest = rest - chosen.detach()
        passed = (flat - rest.detach()) * live  # the sum of the codes, with the gradient of what was coded
        out = self.core.decode(passed.reshape(z.shape))
        return [self._misses(out, x, weights), pull], [Coded("books", flat.detach(), codes[live[:, 0]])]

    def finished(self) -> Any:
        """The integer core that gives the codes in the second phase."""
        if self._finished is None:
            self._finished = self.integer(self.config, self.core.rounded())
        return self._finished

    def _decoder_terms(self, x: Tensor, weights: Tensor) -> Tensor:
        """Codes by the finished integer encoder, and the decoder's misses."""
        finished = self.finished()
        codes = finished.encode(np.rint(x.double().numpy() * self.config["unit"]))
        vectors = finished.quantizer.decode(codes.reshape(-1, codes.shape[-1]))
        q = torch.tensor(vectors / (self.config["steps"] * self.config["unit"]), dtype=torch.float32)
        q = q.reshape(*codes.shape[:-1], -1) * (weights > 0)[..., None]
        return self._misses(self.core.decode(q), x, weights)

    def _misses(self, out: Tensor, x: Tensor, weights: Tensor) -> Tensor:
        error = out - x
        return ((error.pow(2).mean(-1) + self.schedule.absolute * error.abs().mean(-1)) * weights).sum()

    def _revive(self, coded: list[Coded]) -> None:
        """Every 50 steps a code that was not used for long moves to where a cell of this step is badly served."""
        used, row = torch.zeros_like(self.seen), 0
        for part in coded:
            for q in range(part.codes.shape[1]):
                used[row + q, part.codes[:, q]] = 1
            row += part.codes.shape[1]
        used = _over_ranks(used).clamp(max=1)
        self.seen = torch.maximum(self.seen * 0.98, used)
        if self.step % 50 != 49 or self.step > 0.8 * self.schedule.joint:
            return
        generator = torch.Generator().manual_seed(self.schedule.seed * 1_000_003 + self.step)
        row = 0
        with torch.no_grad():
            for part in coded:
                rest = _gathered(part.z)
                for q, book in enumerate(getattr(self.core, part.books)):
                    average, seen = getattr(self.average, part.books)[q], self.seen[row + q, : len(book)]
                    rest = rest - self._move(book, average, seen, rest, generator)
                row += part.codes.shape[1]

    def _move(
        self, book: Tensor, average: Tensor, seen: Tensor, rest: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Moves the lost codes of one book, in place; returns the vectors [m, D] that `rest` had before."""
        chosen = book[((book * book).sum(1) - 2 * rest @ book.T).argmin(1)]
        lost = torch.nonzero(seen < 0.2)[:, 0]
        lost = lost[lost >= self.reserved]
        cost = (rest - chosen).pow(2).sum(1)
        many = min(len(lost), int((cost > 0).sum()))
        if many:
            places = torch.multinomial(cost, many, generator=generator)
            book[lost[:many]] = rest[places]
            average[lost[:many]] = rest[places]
            seen[lost[:many]] = 1
        return chosen

    def _average(self) -> None:
        # A short memory at first, so that the average is not of where training began.
        start = self.schedule.joint if self.step >= self.schedule.joint else 0
        keep = min(self.schedule.ema, (1 + self.step - start) / (10 + self.step - start))
        with torch.no_grad():
            for mine, now in zip(self.average.parameters(), self.core.parameters(), strict=True):
                mine.lerp_(now, 1 - keep)

    def tensors(self) -> Tensors:
        """Tensors of the `ConvCore` that the averaged weights make."""
        if self.step < self.schedule.joint:
            return self.average.rounded()
        fixed = self.core.rounded()  # encoder and books as the codes were made with
        mine = self.average.rounded()
        return {name: mine[name] if name.startswith(LATE) else fixed[name] for name in fixed}

    # ---- going on ----

    def save(self, path: Path) -> None:
        """Write the state (rank 0 only); `restore` reads it."""
        if dist.is_initialized() and dist.get_rank():
            return
        tensors = {f"core.{k}": v for k, v in self.core.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for name, moments in self._moments().items():
            tensors |= {
                f"optimizer.{name}.{k}": v.reshape(1) if v.ndim == 0 else v for k, v in moments.items()
            }
        tensors["seen"] = self.seen
        about = {
            "format": STATE_FORMAT,
            "step": self.step,
            "schedule": asdict(self.schedule),
            "config": self.config,
            "start": self._start,
            "loss": self.loss,
        }
        data = save(
            {k: v.detach().contiguous().clone() for k, v in tensors.items()}, {"ringweave": json.dumps(about)}
        )
        partial = path.with_suffix(".partial")
        partial.write_bytes(data)
        partial.replace(path)

    def restore(self, path: Path) -> None:
        """Go on from `save`. DataError when it was another training."""
        data = path.read_bytes()
        try:
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            about = json.loads(header["__metadata__"]["ringweave"])
            tensors = load(data)
            wanted = {
                "format": STATE_FORMAT, "schedule": asdict(self.schedule), "config": self.config, "start": self._start,
            }  # fmt: skip
            other = [k for k, v in wanted.items() if about.get(k) != v]
        except Exception as error:  # safetensors raises its own exception type on damage
            raise DataError(
                "cannot read the state of a codec's training", where=str(path), why=str(error),
                fix="remove the file to start over",
            ) from error  # fmt: skip
        if other:
            raise DataError(
                f"the state of a codec's training is of another {' and '.join(other)}", where=str(path),
                fix="use the settings it was started with, or remove the file to start over",
            )  # fmt: skip
        self.step, self.loss = int(about["step"]), float(about["loss"])
        for part, module in (("core.", self.core), ("average.", self.average)):
            module.load_state_dict({k[len(part) :]: v for k, v in tensors.items() if k.startswith(part)})
        self.seen = tensors["seen"]
        self._optimizer = self._new_optimizer()
        for name, parameter in self.core.named_parameters():
            found = {k: v for k, v in tensors.items() if k.startswith(f"optimizer.{name}.")}
            if parameter.requires_grad and found:
                self._optimizer.state[parameter] = {
                    k.rpartition(".")[2]: v.reshape(()) if k.endswith(".step") else v
                    for k, v in found.items()
                }

    def _moments(self) -> dict[str, dict[str, Tensor]]:
        state = self._optimizer.state
        return {name: state[p] for name, p in self.core.named_parameters() if p.requires_grad and p in state}


def _over_ranks(value: Tensor) -> Tensor:
    """The sum over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def _gathered(value: Tensor) -> Tensor:
    """The rows of all ranks, in their order."""
    if not dist.is_initialized():
        return value
    parts: list[Any] = [None] * dist.get_world_size()
    counts = torch.tensor([len(value)])
    sizes = [torch.zeros_like(counts) for _ in parts]
    dist.all_gather(sizes, counts)
    longest = max(int(s) for s in sizes)
    padded = torch.zeros(longest, *value.shape[1:])
    padded[: len(value)] = value
    out = [torch.zeros_like(padded) for _ in parts]
    dist.all_gather(out, padded)
    return torch.cat([rows[: int(size)] for rows, size in zip(out, sizes)])
