"""The LWM backbone: a Llama-style causal decoder over one token space of all modalities.

RMSNorm, grouped-query attention, SwiGLU, rotary positions with a theta per stage, untied head (Liu et al.
2024, LWM; Touvron et al. 2023, Llama). The model holds no collective and knows no rank: attention and the
head's cross-entropy are functions it is given (`attention`, `cross_entropy`), replaced from outside by
`pretrain/parallelize.py`. Names of parameters are the same under every layout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
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

    def plan(self, documents: Tensor) -> Any:
        """documents [B, L]: the document of each *global* slot of each pack; -1 is padding."""
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
        return self.wo(ctx.attend(q, k, v).reshape(*x.shape[:-1], -1))


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
        return x + self.mlp(self.mlp_norm(x))


class LossHead(nn.Module):
    """The untied output head; gives each token's loss without whole logits, or logits for sampling."""

    def __init__(self, shape: LWMShape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape.vocab, shape.width))
        self.chunk = shape.head_chunk
        self.cross_entropy: Callable[..., Tensor] = head_cross_entropy

    def forward(self, hidden: Tensor, targets: Tensor | None) -> Tensor:
        """hidden [B, l, width], targets [B, l] (-1: none) -> nll [B, l] nats; targets None -> logits [B, l, V]."""
        if targets is None:
            return hidden @ self.weight.t()
        flat = self.cross_entropy(hidden.flatten(0, 1), self.weight, targets.flatten(), chunk=self.chunk)
        return flat.view(targets.shape)


class LWM(nn.Module):
    """The decoder, whole or one pipeline stage of it (parts of other stages are None)."""

    def __init__(self, shape: LWMShape, *, rope_theta: float = 1e4) -> None:
        super().__init__()
        self.shape = shape
        self.rope_theta = rope_theta
        self.attention: Attention = PackedAttention()
        self.embed: nn.Embedding | None = nn.Embedding(shape.vocab, shape.width)
        self.layers = nn.ModuleDict({str(i): Layer(shape) for i in range(shape.layers)})
        self.norm: nn.RMSNorm | None = nn.RMSNorm(shape.width, eps=shape.norm_eps)
        self.head: LossHead | None = LossHead(shape)

    def forward(
        self, x: Tensor, *, order: Tensor, documents: Tensor, targets: Tensor | None = None
    ) -> Tensor:
        """One stage's pass.

        x: ids [B, l] on the first stage, hidden states [B, l, width] on later ones; order [B, l]: position in the
        document; documents [B, L]: document of each slot of the *whole* pack (l < L on a ring); targets [B, l].
        Gives hidden states, or on the last stage what LossHead gives.
        """
        plan = self.attention.plan(documents)
        wide = torch.float64 if self._dtype == torch.float64 else torch.float32
        cos, sin = rotary_table(order.flatten(), dim=self.shape.head_dim, theta=self.rope_theta, dtype=wide)
        ctx = LayerContext(cos, sin, lambda q, k, v: self.attention(q, k, v, plan))
        h = self.embed(x) if self.embed is not None else x
        for layer in self.layers.values():
            h = layer(h, ctx)
        if self.head is None:
            return h
        assert self.norm is not None
        return self.head(self.norm(h), targets)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def keep_stage(self, stage: int, stages: int) -> None:
        """Drop what other pipeline stages hold. Layers are split evenly, the first stages taking the rest."""
        mine = layers_of_stage(self.shape.layers, stage, stages)
        for i in range(self.shape.layers):
            if i not in mine:
                del self.layers[str(i)]
        if stage > 0:
            self.embed = None
        if stage < stages - 1:
            self.norm = self.head = None


def layers_of_stage(layers: int, stage: int, stages: int) -> range:
    """Layers of one pipeline stage."""
    return range(layers * stage // stages, layers * (stage + 1) // stages)


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
