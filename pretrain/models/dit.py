"""The diffusion transformer: Qwen-Image's double-stream MMDiT over packs of documents.

Words and latents of a document attend to each other both ways, and to nothing else; each stream has weights of its
own. Modulation (AdaLN) comes from the noise level of a token's *segment*: computed once a segment and looked up by
its tokens, so documents of any noise level, size and number of layers share a pack. Parameters have the names of
diffusers' `QwenImageTransformer2DModel`, so checkpoints and exports need no map.

Like every model here it contains no collectives and knows no ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ringweave.kernels.rotary import apply_interleaved, axes_table
from ringweave.parallel.packed import PackedAttention
from ringweave.pretrain.models.lwm import Attention

#: Numbers of the sinusoid of a noise level, and its longest period (in thousandths).
TIME_CHANNELS, TIME_PERIOD = 256, 10_000.0
EPS = 1e-6


@dataclass(frozen=True, slots=True)
class DiTShape:
    """channels: of a latent token in; out: of the velocity out; text: of a word's embedding; axes: channels of a head
    that each axis of the positions turns, whose sum is the width of a head."""

    layers: int
    heads: int
    axes: tuple[int, ...]
    channels: int
    out: int
    text: int
    mlp: int = 4
    theta: float = 10_000.0

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return sum(self.axes)

    @property
    def width(self) -> int:
        """Width of both streams."""
        return self.heads * self.head_dim


@dataclass(frozen=True, slots=True)
class Streams:
    """Which slot of the pack is what, on this rank: T slots, n words, m latents.

    text_at [n], image_at [m]: slots; text_segment [n], image_segment [m]: row of the modulation table; positions
    [T, axes].
    """

    text_at: Tensor
    image_at: Tensor
    text_segment: Tensor
    image_segment: Tensor
    positions: Tensor


def time_features(sigma: Tensor) -> Tensor:
    """Sinusoid of noise levels [S] in [0, 1]: float32 [S, 256], cosines first."""
    half = TIME_CHANNELS // 2
    rates = torch.exp(
        -torch.log(torch.tensor(TIME_PERIOD))
        * torch.arange(half, dtype=torch.float32, device=sigma.device)
        / half
    )
    angles = 1000.0 * (sigma.float()[:, None] * rates[None, :])
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """Noise level -> vector of the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.timestep_embedder = nn.ModuleDict(
            {"linear_1": nn.Linear(TIME_CHANNELS, width), "linear_2": nn.Linear(width, width)}
        )

    def forward(self, sigma: Tensor, dtype: torch.dtype) -> Tensor:
        """[S] -> [S, width]."""
        hidden = self.timestep_embedder["linear_1"](time_features(sigma).to(dtype))
        return self.timestep_embedder["linear_2"](F.silu(hidden))


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

    def __init__(self, shape: DiTShape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            setattr(self, name, nn.Linear(shape.width, shape.width))
        self.to_out = nn.ModuleDict({"0": nn.Linear(shape.width, shape.width)})
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            setattr(self, name, nn.RMSNorm(shape.head_dim, eps=EPS))

    def forward(
        self,
        text: Tensor,
        image: Tensor,
        streams: Streams,
        rope: tuple[Tensor, Tensor],
        attend: Callable[..., Tensor],
    ) -> tuple[Tensor, Tensor]:
        """text [n, width], image [m, width] -> the same; heads are whatever this rank holds."""

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, self.head_dim))

        def joined(words: Tensor, latents: Tensor) -> Tensor:
            whole = words.new_zeros((len(streams.positions), *words.shape[1:]))
            return whole.index_copy(0, streams.text_at, words).index_copy(0, streams.image_at, latents)

        q = joined(self.norm_added_q(heads(self.add_q_proj(text))), self.norm_q(heads(self.to_q(image))))
        k = joined(self.norm_added_k(heads(self.add_k_proj(text))), self.norm_k(heads(self.to_k(image))))
        v = joined(heads(self.add_v_proj(text)), heads(self.to_v(image)))
        out = attend(apply_interleaved(q, *rope), apply_interleaved(k, *rope), v).flatten(1)
        return self.to_add_out(out[streams.text_at]), self.to_out["0"](out[streams.image_at])


def _modulated(x: Tensor, shift: Tensor, scale: Tensor, segment: Tensor) -> Tensor:
    """Layer norm without weights, then scale and shift of each token's segment."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale[segment]) + shift[segment]


class Block(nn.Module):
    """Joint attention and two MLPs, each modulated, with gated residuals."""

    def __init__(self, shape: DiTShape) -> None:
        super().__init__()
        # Index 1, because diffusers has the SiLU as index 0.
        self.img_mod = nn.ModuleDict({"1": nn.Linear(shape.width, 6 * shape.width)})
        self.txt_mod = nn.ModuleDict({"1": nn.Linear(shape.width, 6 * shape.width)})
        self.attn = JointAttention(shape)
        self.img_mlp, self.txt_mlp = MLP(shape.width, shape.mlp), MLP(shape.width, shape.mlp)

    def forward(
        self,
        text: Tensor,
        image: Tensor,
        level: Tensor,
        streams: Streams,
        rope: tuple[Tensor, Tensor],
        attend: Callable[..., Tensor],
    ) -> tuple[Tensor, Tensor]:
        """text [n, width], image [m, width], level [S, width] = SiLU of the segments' noise vectors -> both streams."""
        img, txt = self.img_mod["1"](level).chunk(6, dim=-1), self.txt_mod["1"](level).chunk(6, dim=-1)
        here, there = streams.text_segment, streams.image_segment
        words, latents = self.attn(
            _modulated(text, txt[0], txt[1], here),
            _modulated(image, img[0], img[1], there),
            streams,
            rope,
            attend,
        )
        text, image = text + txt[2][here] * words, image + img[2][there] * latents
        text = text + txt[5][here] * self.txt_mlp(_modulated(text, txt[3], txt[4], here))
        image = image + img[5][there] * self.img_mlp(_modulated(image, img[3], img[4], there))
        return text, image


class DiT(nn.Module):
    """Latents, words and noise levels of packed documents -> velocity of each latent."""

    def __init__(self, shape: DiTShape) -> None:
        super().__init__()
        self.shape = shape
        self.attention: Attention = PackedAttention()
        self.time_text_embed = TimeEmbedding(shape.width)
        self.txt_norm = nn.RMSNorm(shape.text, eps=EPS)
        self.img_in = nn.Linear(shape.channels, shape.width)
        self.txt_in = nn.Linear(shape.text, shape.width)
        self.transformer_blocks = nn.ModuleDict({str(i): Block(shape) for i in range(shape.layers)})
        self.norm_out = nn.ModuleDict({"linear": nn.Linear(shape.width, 2 * shape.width)})
        self.proj_out = nn.Linear(shape.width, shape.out)

    def forward(
        self,
        latents: Tensor,
        text: Tensor,
        sigma: Tensor,
        streams: Streams,
        *,
        documents: Tensor,
        owner: Tensor | None = None,
    ) -> Tensor:
        """latents [m, channels], text [n, text], sigma [S] in [0, 1] -> velocity [m, out].

        documents, owner [B, L]: see `Attention.plan`; B·l = T slots are on this rank.
        """
        attend = partial(
            self.attention, plan=self.attention.plan(documents, owner, whole_documents(documents), None)
        )
        wide = torch.float64 if latents.dtype == torch.float64 else torch.float32
        rope = axes_table(streams.positions, dims=self.shape.axes, theta=self.shape.theta, dtype=wide)
        level = F.silu(self.time_text_embed(sigma, latents.dtype))
        image, words = self.img_in(latents), self.txt_in(self.txt_norm(text))
        for block in self.transformer_blocks.values():
            words, image = block(words, image, level, streams, rope, attend)
        # Scale first here, shift first in the blocks: so it is in Qwen-Image.
        scale, shift = self.norm_out["linear"](level).chunk(2, dim=-1)
        return self.proj_out(_modulated(image, shift, scale, streams.image_segment))


def whole_documents(documents: Tensor) -> Tensor:
    """For every slot of documents [B, L] (-1: padding) the length of its document: all of it is seen both ways."""
    lengths = torch.zeros_like(documents)
    for row, out in zip(documents, lengths):
        counts = torch.bincount(row[row >= 0].long(), minlength=1)
        out[row >= 0] = counts[row[row >= 0].long()].to(out.dtype)
    return lengths
