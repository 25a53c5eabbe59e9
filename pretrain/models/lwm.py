"""The LWM backbone: a Llama-style causal decoder over one token space of all modalities.

RMSNorm, grouped-query attention, SwiGLU, rotary positions with a theta per stage, untied head (Liu et al.
2024, LWM; Touvron et al. 2023, Llama). The model holds no collective and knows no rank: attention and the
head's cross-entropy are functions it is given (`attention`, `cross_entropy`), replaced from outside by
`pretrain/parallelize.py`. Names of parameters are the same under every layout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ringweave.kernels.cross_entropy import head_cross_entropy
from ringweave.kernels.rotary import apply_rotary, rotary_table
from ringweave.parallel.packed import PackedAttention


@dataclass(frozen=True, slots=True)
class LWMShape:
    """Sizes of the model. `ffn` is the SwiGLU width."""

    vocab: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    ffn: int
    norm_eps: float = 1e-6
    head_chunk: int = 512
    window: int | None = None
    full_every: int = 1

    def layer_window(self, layer: int) -> int | None:
        """The attention window of a layer: `window`, but none in every `full_every`-th layer."""
        alternates = self.full_every > 1 and (layer + 1) % self.full_every == 0
        return None if alternates else self.window

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads

    @property
    def parameters(self) -> int:
        """Number of parameters, embedding and head included."""
        kv = self.kv_heads * self.head_dim
        layer = 2 * self.width * self.width + 2 * self.width * kv + 3 * self.width * self.ffn + 2 * self.width
        return 2 * self.vocab * self.width + self.layers * layer + self.width


class Attention(Protocol):
    """Attention over packs: a plan per micro-batch, then the same plan in every layer."""

    def plan(self, documents: Tensor, owner: Tensor | None, prefix: Tensor | None, window: int | None) -> Any:
        """The plan of these packs, all [B, L] over *global* slots: document (-1 is padding), ring rank (None: all
        here), leading slots of the document that all of it sees (None: 0, causal). window: keys at this distance
        or further are not seen."""
        ...

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, plan: Any) -> Tensor:
        """q [T, H, D], k and v [T, Hk, D], T = this rank's tokens of all rows -> [T, H, D]."""
        ...


class LayerContext:
    """What every layer needs beside the hidden states.

    A plain class on purpose: sharding wrappers cast the floating tensors of known containers to the compute
    dtype, and the rotary table must stay fp32.
    """

    __slots__ = ("attend", "cos", "sin")

    def __init__(self, cos: Tensor, sin: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        self.cos, self.sin, self.attend = cos, sin, attend


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, shape: LWMShape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        kv = shape.kv_heads * shape.head_dim
        self.wq = nn.Linear(shape.width, shape.width, bias=False)
        self.wk = nn.Linear(shape.width, kv, bias=False)
        self.wv = nn.Linear(shape.width, kv, bias=False)
        self.wo = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: Tensor, ctx: LayerContext) -> Tensor:
        """x [B, l, width] -> [B, l, width]; the number of heads is whatever this rank holds."""
        q, k, v = (w(x).flatten(0, 1).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k = apply_rotary(q, ctx.cos, ctx.sin), apply_rotary(k, ctx.cos, ctx.sin)
        out = ctx.attend(q, k, v).flatten(1)
        return self.wo(out.view(*x.shape[:-1], out.shape[-1]))


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, shape: LWMShape) -> None:
        super().__init__()
        self.gate = nn.Linear(shape.width, shape.ffn, bias=False)
        self.up = nn.Linear(shape.width, shape.ffn, bias=False)
        self.down = nn.Linear(shape.ffn, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, l, width] -> [B, l, width]."""
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    """Pre-norm attention and SwiGLU with residuals."""

    def __init__(self, shape: LWMShape) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.width, eps=shape.norm_eps)
        self.attention = SelfAttention(shape)
        self.mlp_norm = nn.RMSNorm(shape.width, eps=shape.norm_eps)
        self.mlp = SwiGLU(shape)

    def forward(self, x: Tensor, ctx: LayerContext) -> Tensor:
        """x [B, l, width] -> [B, l, width]."""
        x = x + self.attention(self.attention_norm(x), ctx)
        return x + self.feed_forward(x)

    def feed_forward(self, x: Tensor) -> Tensor:
        """The second half without its residual: x [B, l, width] -> [B, l, width]."""
        return self.mlp(self.mlp_norm(x))


class LossHead(nn.Module):
    """The untied output head; gives each token's loss without whole logits, or logits for sampling."""

    def __init__(self, shape: LWMShape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape.vocab, shape.width))
        self.chunk = shape.head_chunk
        self.cross_entropy: Callable[..., Tensor] = head_cross_entropy

    def forward(self, hidden: Tensor, targets: Tensor | None, expected: Tensor | None = None) -> Tensor:
        """hidden [B, l, width], targets [B, l] (-1: none) -> nll [B, l] nats; targets None -> logits [B, l, V].

        expected [B, l]: the gradient that will come back for each nll, if known (see head_cross_entropy).
        """
        if targets is None:
            return hidden @ self.weight.t()
        flat = self.cross_entropy(
            hidden.flatten(0, 1), self.weight, targets.flatten(), chunk=self.chunk,
            expected=None if expected is None else expected.flatten(),
        )  # fmt: skip
        return flat.view(targets.shape)


def _unsharded(rows: int, tokens: int, width: int) -> tuple[int, int, int]:
    return rows, tokens, width


def _nothing() -> None:
    pass


class LWM(nn.Module):
    """The decoder, whole or one part of it in a pipeline (what other parts hold is None)."""

    def __init__(self, shape: LWMShape, *, rope_theta: float = 1e4) -> None:
        super().__init__()
        self.shape = shape
        self.rope_theta = rope_theta
        self.attention: Attention = PackedAttention()
        #: (packs, tokens of each, width) -> shape of the hidden states between blocks, and so between parts
        self.hidden_shape: Callable[[int, int, int], tuple[int, int, int]] = _unsharded
        #: what the gradients still need when a step's last backward is done
        self.after_backward: Callable[[], None] = _nothing
        self.embed: nn.Embedding | None = nn.Embedding(shape.vocab, shape.width)
        self.layers = nn.ModuleDict({str(i): Layer(shape) for i in range(shape.layers)})
        self.norm: nn.RMSNorm | None = nn.RMSNorm(shape.width, eps=shape.norm_eps)
        self.head: LossHead | None = LossHead(shape)

    def forward(
        self,
        x: Tensor,
        *,
        order: Tensor,
        documents: Tensor,
        owner: Tensor | None = None,
        prefix: Tensor | None = None,
        targets: Tensor | None = None,
        expected: Tensor | None = None,
    ) -> Tensor:
        """One part's pass.

        x: ids [B, l] on the first part, hidden states [B, l, width] on later ones; order [B, l]: position in the
        document; documents, owner, prefix [B, L]: see `Attention.plan` (l < L on a ring); targets,
        expected [B, l]: see `LossHead.forward`. Gives hidden states, or on the last part what LossHead gives.
        """
        plans = {
            window: self.attention.plan(documents, owner, prefix, window)
            for window in {self.shape.layer_window(int(name)) for name in self.layers}
        }
        wide = torch.float64 if self._dtype == torch.float64 else torch.float32
        cos, sin = rotary_table(order.flatten(), dim=self.shape.head_dim, theta=self.rope_theta, dtype=wide)
        h = self.embed(x) if self.embed is not None else x
        for name, layer in self.layers.items():
            attend = partial(self.attention, plan=plans[self.shape.layer_window(int(name))])
            h = layer(h, LayerContext(cos, sin, attend))
        if self.head is None:
            return h
        assert self.norm is not None
        return self.head(self.norm(h), targets, expected)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def is_first(self) -> bool:
        """Whether this part reads ids."""
        return self.embed is not None

    @property
    def is_last(self) -> bool:
        """Whether this part gives losses."""
        return self.head is not None

    def recomputable(self) -> Iterator[nn.Module]:
        """Modules whose `forward` or `feed_forward` may be computed again in the backward."""
        yield from self.layers.values()

    def units(self) -> list[nn.Module]:
        """Modules that are sharded each as one unit."""
        return [m for m in (self.embed, *self.layers.values(), self.head) if m is not None]

    def extra_rows(self, slots: int, segments: int) -> int:
        """Rows that travel between the parts of a pipeline beside the hidden states of a pack's `slots`."""
        return 0

    def initial_value(self, name: str, size: tuple[int, ...], *, seed: int) -> Tensor:
        """See the function of this name."""
        return initial_value(name, size, seed=seed, layers=self.shape.layers)

    def keep_part(self, layers: range, *, first: bool, last: bool) -> None:
        """Drop all but these layers, the embedding (kept by the first part) and norm and head (by the last).

        What stays keeps its names, so a parameter is called the same on every layout.
        """
        for i in range(self.shape.layers):
            if i not in layers:
                del self.layers[str(i)]
        if not first:
            self.embed = None
        if not last:
            self.norm = self.head = None


def initial_value(name: str, size: tuple[int, ...], *, seed: int, layers: int) -> Tensor:
    """The whole initial fp32 tensor of one parameter, a function of (seed, name) only, so equal on any layout.

    Norms are 1; matrices are normal with std 0.02, those that write into the residual stream scaled by
    1/sqrt(2·layers) (GPT-2, Radford et al. 2019).
    """
    if name.endswith("norm.weight"):
        return torch.ones(size)
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") % (2**63))
    std = 0.02
    if name.endswith(("attention.wo.weight", "mlp.down.weight")):
        std /= (2 * layers) ** 0.5
    return torch.empty(size).normal_(0.0, std, generator=generator)
