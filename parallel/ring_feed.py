"""How keys and values reach a rank, hop by hop, and how their gradients get home: the transports of a `RingPlan`.

A feed gives the keys of each hop and starts the transfer for the next one before this one is computed. A drain takes
the gradients of each hop and brings them to the keys' owner. Buffers are never shared between a send and a receive:
on gloo that corrupts silently. Messages are flat: [keys | values] of the tokens that travel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from ringweave.parallel import watch
from ringweave.parallel.ring_plan import RingPlan

Spans = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Ring:
    """The process group of one ring and this rank's place in it; `group` None is a ring of one.

    overlap: receive the next hop's keys while this hop is computed (off: one after the other, for tests).
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    overlap: bool = True

    def exchange(
        self, sends: list[tuple[Tensor, int]], receives: list[tuple[Tensor, int]]
    ) -> list[dist.Work]:
        """Start sending tensors to, and receiving tensors from, ring ranks; wait on the result before use."""
        if self.group is None:
            raise ValueError("a ring of one exchanges nothing")
        group = self.group
        ops = [
            dist.P2POp(dist.isend, x, dist.get_global_rank(group, to % self.size), group) for x, to in sends
        ]
        ops += [
            dist.P2POp(dist.irecv, x, dist.get_global_rank(group, of % self.size), group)
            for x, of in receives
        ]
        return dist.batch_isend_irecv(ops) if ops else []


def wait(work: list[dist.Work], what: str = "ring transfer", peer: int | None = None) -> None:
    """Wait for every transfer; `what` and the ring rank `peer` name the wait if it never ends."""
    if not work:
        return
    with watch.at(what, "its ring neighbours" if peer is None else f"ring rank {peer}"):
        for w in work:
            w.wait()
    work.clear()


@dataclass(frozen=True, slots=True)
class Form:
    """Shapes of one rank's keys [., Hk, D] and values [., Hk, Dv]."""

    heads: int
    key: int
    value: int

    @classmethod
    def of(cls, k: Tensor, v: Tensor) -> Form:
        """From the tensors themselves."""
        return cls(k.shape[1], k.shape[2], v.shape[2])

    def size(self, tokens: int) -> int:
        """Elements of the message that carries so many tokens."""
        return tokens * self.heads * (self.key + self.value)

    def split(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """The message as (keys, values), as views."""
        tokens = flat.numel() // (self.heads * (self.key + self.value))
        cut = tokens * self.heads * self.key
        return flat[:cut].view(tokens, self.heads, self.key), flat[cut:].view(tokens, self.heads, self.value)


def pack(k: Tensor, v: Tensor, spans: Spans | None = None) -> Tensor:
    """One flat message of keys and values, of all tokens or of the intervals `spans` [m, 2]."""
    if spans is None:
        return torch.cat([k.reshape(-1), v.reshape(-1)])
    cuts = spans.tolist()
    return torch.cat([k[a:b].reshape(-1) for a, b in cuts] + [v[a:b].reshape(-1) for a, b in cuts])


def span_tokens(spans: Spans) -> int:
    """Tokens in intervals [m, 2]."""
    return int((spans[:, 1] - spans[:, 0]).sum())


class Feed(Protocol):
    """Keys and values by hop; call for hops 0, 1, …, ring - 1 in order."""

    def take(self, hop: int) -> tuple[Tensor, Tensor]:
        """(k, v) of the hop's source in the plan's coordinates; valid until the next call."""
        ...


class Drain(Protocol):
    """Gradients of keys and values by hop; `give` for every hop in order, then `total`."""

    def buffer(self, hop: int) -> tuple[Tensor, Tensor]:
        """Zeroed (dk, dv) for the hop's source, in the plan's coordinates."""
        ...

    def give(self, hop: int) -> None:
        """Send the hop's buffer on its way."""
        ...

    def total(self) -> tuple[Tensor, Tensor]:
        """The summed gradients of this rank's own keys and values."""
        ...


def make_feed(plan: RingPlan, ring: Ring, k: Tensor, v: Tensor) -> Feed:
    """The feed of the plan's transport."""
    if ring.size == 1:
        return _Own(k, v)
    return _Rotation(plan, ring, k, v) if plan.transport == "ring" else _Direct(plan, ring, k, v)


def make_drain(plan: RingPlan, ring: Ring, form: Form, like: Tensor) -> Drain:
    """The drain of the plan's transport; `like` gives dtype (the accumulator's) and device."""
    if ring.size == 1:
        return _Home(plan, form, like)
    return _Return(plan, ring, form, like) if plan.transport == "ring" else _Deliver(plan, ring, form, like)


class _Own:
    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = k, v

    def take(self, hop: int) -> tuple[Tensor, Tensor]:
        return self.k, self.v


class _Home:
    def __init__(self, plan: RingPlan, form: Form, like: Tensor) -> None:
        self.own = form.split(like.new_zeros(form.size(plan.tokens)))

    def buffer(self, hop: int) -> tuple[Tensor, Tensor]:
        return self.own

    def give(self, hop: int) -> None:
        pass

    def total(self) -> tuple[Tensor, Tensor]:
        return self.own


class _Rotation:
    """Round the ring: each rank passes on what it holds, as far as someone needs it."""

    def __init__(self, plan: RingPlan, ring: Ring, k: Tensor, v: Tensor) -> None:
        self.plan, self.ring, self.form = plan, ring, Form.of(k, v)
        self.own, self.work = (k, v), list[dist.Work]()
        self.held = pack(k, v) if plan.last[plan.rank] > 0 else k.new_empty(0)
        self.incoming = self.held

    def take(self, hop: int) -> tuple[Tensor, Tensor]:
        wait(self.work, f"keys of ring hop {hop}", (self.plan.rank - 1) % self.plan.ring)
        if hop > 0:
            self.held = self.incoming
        if hop + 1 < self.plan.ring:
            self._start(hop)
        if hop == 0:
            return self.own
        return self.form.split(self.held)

    def _start(self, hop: int) -> None:
        plan, last = self.plan, self.plan.last
        here, left = (plan.rank - hop) % plan.ring, (plan.rank - hop - 1) % plan.ring
        coming = hop + 1 <= last[left]
        size = self.form.size(plan.lengths[left]) if coming else 0
        self.incoming = self.held.new_empty(size)
        sends = [(self.held, plan.rank + 1)] if hop + 1 <= last[here] and self.held.numel() else []
        receives = [(self.incoming, plan.rank - 1)] if size else []
        self.work = self.ring.exchange(sends, receives)
        if not self.ring.overlap:
            wait(self.work)


class _Return:
    """Gradients travel with their keys, one hop behind; from the last rank that needs the keys they go home."""

    def __init__(self, plan: RingPlan, ring: Ring, form: Form, like: Tensor) -> None:
        self.plan, self.ring, self.form, self.like = plan, ring, form, like
        self.work: list[dist.Work] = []
        self.held = self.sending = like.new_empty(0)
        self.incoming: Tensor | None = None
        self.home: Tensor | None = None

    def buffer(self, hop: int) -> tuple[Tensor, Tensor]:
        source = (self.plan.rank - hop) % self.plan.ring
        needed = hop <= self.plan.last[source]
        self.held = self.like.new_zeros(self.form.size(self.plan.lengths[source] if needed else 0))
        return self.form.split(self.held)

    def give(self, hop: int) -> None:
        plan, last = self.plan, self.plan.last
        wait(self.work, f"key gradients before ring hop {hop}", (plan.rank - 1) % plan.ring)
        source = (plan.rank - hop) % plan.ring
        if self.incoming is not None and hop <= last[source]:
            self.held += self.incoming
        self.incoming = None
        sends: list[tuple[Tensor, int]] = []
        receives: list[tuple[Tensor, int]] = []
        if self.held.numel() and hop < last[source]:
            sends.append((self.held, plan.rank + 1))
        elif self.held.numel() and hop == last[source] > 0:
            sends.append((self.held, source))
        elif hop == last[source] == 0:
            self.home = self.held
        left = (plan.rank - hop - 1) % plan.ring
        if hop + 1 < plan.ring and hop < last[left] and plan.lengths[left]:
            self.incoming = self.like.new_empty(self.form.size(plan.lengths[left]))
            receives.append((self.incoming, plan.rank - 1))
        if hop == last[plan.rank] > 0 and plan.tokens:
            self.home = self.like.new_empty(self.form.size(plan.tokens))
            receives.append((self.home, plan.rank + hop))
        self.sending = self.held  # kept until it is sent
        self.work = self.ring.exchange(sends, receives)

    def total(self) -> tuple[Tensor, Tensor]:
        wait(self.work, "key gradients on their way home")
        return self.form.split(self.like.new_zeros(0) if self.home is None else self.home)


class _Direct:
    """From the owner, what is needed: hop by hop ("direct"), or everything before the first hop ("gather")."""

    def __init__(self, plan: RingPlan, ring: Ring, k: Tensor, v: Tensor) -> None:
        self.plan, self.ring, self.form = plan, ring, Form.of(k, v)
        self.k, self.v = k, v
        self.work: list[list[dist.Work]] = [[] for _ in range(plan.ring)]
        self.arrived: list[Tensor | None] = [None] * plan.ring
        self.sending: list[Tensor | None] = [None] * plan.ring  # kept until sent
        if plan.transport == "gather":
            for hop in range(1, plan.ring):
                self._start(hop)

    def _start(self, hop: int) -> None:
        plan = self.plan
        assert plan.sends is not None and plan.receives is not None
        sends: list[tuple[Tensor, int]] = []
        receives: list[tuple[Tensor, int]] = []
        if len(plan.sends[hop]):
            message = pack(self.k, self.v, plan.sends[hop])
            self.sending[hop] = message
            sends.append((message, plan.rank + hop))
        buffer = self.k.new_empty(self.form.size(span_tokens(plan.receives[hop])))
        self.arrived[hop] = buffer
        if buffer.numel():
            receives.append((buffer, plan.rank - hop))
        self.work[hop] = self.ring.exchange(sends, receives)
        if not self.ring.overlap:
            wait(self.work[hop])

    def take(self, hop: int) -> tuple[Tensor, Tensor]:
        plan = self.plan
        wait(self.work[hop], f"keys of ring hop {hop}", (plan.rank - hop) % plan.ring)
        self.sending[hop] = None
        if hop > 1:
            self.arrived[hop - 1] = None
        if plan.transport != "gather" and hop + 1 < plan.ring:
            self._start(hop + 1)
        if hop == 0:
            return self.k, self.v
        arrived = self.arrived[hop]
        assert arrived is not None
        return self.form.split(arrived)


class _Deliver:
    """Each hop's gradients go straight to the owner of the keys, who adds them in the order of the hops."""

    def __init__(self, plan: RingPlan, ring: Ring, form: Form, like: Tensor) -> None:
        self.plan, self.ring, self.form, self.like = plan, ring, form, like
        self.own = form.split(like.new_zeros(form.size(plan.tokens)))
        self.work: list[dist.Work] = []
        self.held = self.sending = like.new_empty(0)
        self.coming: tuple[Tensor, Spans] | None = None

    def buffer(self, hop: int) -> tuple[Tensor, Tensor]:
        if hop == 0:
            return self.own
        assert self.plan.receives is not None
        self.held = self.like.new_zeros(self.form.size(span_tokens(self.plan.receives[hop])))
        return self.form.split(self.held)

    def give(self, hop: int) -> None:
        if hop == 0:
            return
        plan = self.plan
        assert plan.sends is not None
        self._collect()
        sends = [(self.held, plan.rank - hop)] if self.held.numel() else []
        receives: list[tuple[Tensor, int]] = []
        spans = plan.sends[hop]
        if len(spans):
            buffer = self.like.new_empty(self.form.size(span_tokens(spans)))
            self.coming = (buffer, spans)
            receives.append((buffer, plan.rank + hop))
        self.sending = self.held  # kept until it is sent
        self.work = self.ring.exchange(sends, receives)

    def _collect(self) -> None:
        wait(self.work, "key gradients on their way home")
        if self.coming is None:
            return
        flat, spans = self.coming
        dk, dv = self.form.split(flat)
        at = 0
        for a, b in spans.tolist():
            self.own[0][a:b] += dk[at : at + b - a]
            self.own[1][a:b] += dv[at : at + b - a]
            at += b - a
        self.coming = None

    def total(self) -> tuple[Tensor, Tensor]:
        self._collect()
        return self.own
