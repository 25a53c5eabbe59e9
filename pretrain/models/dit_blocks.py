"""Blocks of the diffusion transformer: attention of words and latents together, modulated per segment.

Modulation (AdaLN) comes from the noise level of a token's *segment*: computed once a segment and looked up by its
tokens. `DoubleBlock` has weights of its own for each stream, as Qwen-Image has; `SingleBlock` has one set for both.
Names of parameters in a double block are those of diffusers' `QwenImageTransformer2DModel`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ringweave.kernels.modulation import Runs, gated, modulate
from ringweave.kernels.rotary import apply_interleaved

EPS = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class Streams:
    """Which slot is what on this rank: T = B·l slots, n words, m latents.

    text_at [n], image_at [m]: slots; text_runs, image_runs: tokens that share a row of the modulation table.
    """

    slots: int
    text_at: Tensor
    image_at: Tensor
    text_runs: Runs
    image_runs: Runs

    def joined(self, words: Tensor, latents: Tensor) -> Tensor:
        """[n, ...] and [m, ...] -> [T, ...], zeros in the other slots."""
        whole = words.new_zeros((self.slots, *words.shape[1:]))
        return whole.index_copy(0, self.text_at, words).index_copy(0, self.image_at, latents)


class BlockContext:
    """What every block needs beside the streams: a plain class, because sharding wrappers cast the floating tensors of
    containers they know to the compute dtype, and the rotary table must stay fp32."""

    __slots__ = ("attend", "cos", "sin", "streams")

    def __init__(self, streams: Streams, cos: Tensor, sin: Tensor, attend: Callable[..., Tensor]) -> None:
        self.streams, self.cos, self.sin, self.attend = streams, cos, sin, attend


def modulated(x: Tensor, shift: Tensor, scale: Tensor, runs: Runs) -> Tensor:
    """Layer norm without weights, then scale and shift of each token's segment."""
    return modulate(F.layer_norm(x, x.shape[-1:], eps=EPS), shift, scale, runs)


class MLP(nn.Module):
    """Linear, tanh-GELU, Linear, under the names of diffusers' FeedForward."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__()
        self.net = nn.ModuleDict(
            {
                "0": nn.ModuleDict({"proj": nn.Linear(width, factor * width)}),
                "2": nn.Linear(factor * width, width),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        """[n, width] -> [n, width]."""
        inner: nn.ModuleDict = self.net["0"]  # type: ignore[assignment]
        return self.net["2"](F.gelu(inner["proj"](x), approximate="tanh"))


class JointAttention(nn.Module):
    """Both streams in one attention, each with its own projections and norms of queries and keys."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            setattr(self, name, nn.Linear(width, width))
        self.to_out = nn.ModuleDict({"0": nn.Linear(width, width)})
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            setattr(self, name, nn.RMSNorm(head_dim, eps=EPS))

    def forward(self, text: Tensor, image: Tensor, ctx: BlockContext) -> tuple[Tensor, Tensor]:
        """text [n, width], image [m, width] -> the same; heads are whatever this rank holds."""

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, self.head_dim))

        streams = ctx.streams
        q = streams.joined(
            self.norm_added_q(heads(self.add_q_proj(text))), self.norm_q(heads(self.to_q(image)))
        )
        k = streams.joined(
            self.norm_added_k(heads(self.add_k_proj(text))), self.norm_k(heads(self.to_k(image)))
        )
        v = streams.joined(heads(self.add_v_proj(text)), heads(self.to_v(image)))
        q, k = apply_interleaved(q, ctx.cos, ctx.sin), apply_interleaved(k, ctx.cos, ctx.sin)
        out = ctx.attend(q, k, v).flatten(1)
        return self.to_add_out(out[streams.text_at]), self.to_out["0"](out[streams.image_at])


class DoubleBlock(nn.Module):
    """Joint attention and two MLPs, each modulated, with gated residuals."""

    def __init__(self, width: int, head_dim: int, mlp: int) -> None:
        super().__init__()
        # Index 1, because diffusers has the SiLU as index 0.
        self.img_mod = nn.ModuleDict({"1": nn.Linear(width, 6 * width)})
        self.txt_mod = nn.ModuleDict({"1": nn.Linear(width, 6 * width)})
        self.attn = JointAttention(width, head_dim)
        self.img_mlp, self.txt_mlp = MLP(width, mlp), MLP(width, mlp)

    def forward(self, text: Tensor, image: Tensor, level: Tensor, ctx: BlockContext) -> tuple[Tensor, Tensor]:
        """text [n, width], image [m, width], level [S, width] = SiLU of the segments' noise vectors -> both streams."""
        img, txt = self.img_mod["1"](level).chunk(6, dim=-1), self.txt_mod["1"](level).chunk(6, dim=-1)
        here, there = ctx.streams.text_runs, ctx.streams.image_runs
        words, latents = self.attn(
            modulated(text, txt[0], txt[1], here), modulated(image, img[0], img[1], there), ctx
        )
        text, image = gated(text, txt[2], words, here), gated(image, img[2], latents, there)
        words, latents = self.feed_forward(text, image, txt[3], txt[4], img[3], img[4], ctx)
        return gated(text, txt[5], words, here), gated(image, img[5], latents, there)

    def feed_forward(
        self,
        text: Tensor,
        image: Tensor,
        txt_shift: Tensor,
        txt_scale: Tensor,
        img_shift: Tensor,
        img_scale: Tensor,
        ctx: BlockContext,
    ) -> tuple[Tensor, Tensor]:
        """The second half without gates and residuals; shifts and scales [S, width]."""
        streams = ctx.streams
        return (
            self.txt_mlp(modulated(text, txt_shift, txt_scale, streams.text_runs)),
            self.img_mlp(modulated(image, img_shift, img_scale, streams.image_runs)),
        )


class SingleAttention(nn.Module):
    """Both streams with one set of weights."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        for name in ("to_q", "to_k", "to_v"):
            setattr(self, name, nn.Linear(width, width))
        self.to_out = nn.ModuleDict({"0": nn.Linear(width, width)})
        for name in ("norm_q", "norm_k"):
            setattr(self, name, nn.RMSNorm(head_dim, eps=EPS))

    def forward(self, text: Tensor, image: Tensor, ctx: BlockContext) -> tuple[Tensor, Tensor]:
        """text [n, width], image [m, width] -> the same; heads are whatever this rank holds."""
        streams, count = ctx.streams, len(text)
        x = torch.cat([text, image])

        def heads(values: Tensor) -> Tensor:
            return streams.joined(*values.unflatten(-1, (-1, self.head_dim)).tensor_split([count]))

        q, k, v = self.norm_q(heads(self.to_q(x))), self.norm_k(heads(self.to_k(x))), heads(self.to_v(x))
        q, k = apply_interleaved(q, ctx.cos, ctx.sin), apply_interleaved(k, ctx.cos, ctx.sin)
        out = ctx.attend(q, k, v).flatten(1)
        both = self.to_out["0"](torch.cat([out[streams.text_at], out[streams.image_at]]))
        return both[:count], both[count:]


class SingleBlock(nn.Module):
    """As `DoubleBlock` with one set of weights for words and latents: half the parameters, no stock class."""

    def __init__(self, width: int, head_dim: int, mlp: int) -> None:
        super().__init__()
        self.mod = nn.ModuleDict({"1": nn.Linear(width, 6 * width)})
        self.attn = SingleAttention(width, head_dim)
        self.mlp = MLP(width, mlp)

    def forward(self, text: Tensor, image: Tensor, level: Tensor, ctx: BlockContext) -> tuple[Tensor, Tensor]:
        """See `DoubleBlock.forward`."""
        mod = self.mod["1"](level).chunk(6, dim=-1)
        here, there = ctx.streams.text_runs, ctx.streams.image_runs
        words, latents = self.attn(
            modulated(text, mod[0], mod[1], here), modulated(image, mod[0], mod[1], there), ctx
        )
        text, image = gated(text, mod[2], words, here), gated(image, mod[2], latents, there)
        words, latents = self.feed_forward(text, image, mod[3], mod[4], ctx)
        return gated(text, mod[5], words, here), gated(image, mod[5], latents, there)

    def feed_forward(
        self, text: Tensor, image: Tensor, shift: Tensor, scale: Tensor, ctx: BlockContext
    ) -> tuple[Tensor, Tensor]:
        """The second half without gates and residuals."""
        streams, count = ctx.streams, len(text)
        both = torch.cat(
            [
                modulated(text, shift, scale, streams.text_runs),
                modulated(image, shift, scale, streams.image_runs),
            ]
        )
        both = self.mlp(both)
        return both[:count], both[count:]
