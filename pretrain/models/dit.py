"""The diffusion transformer: Qwen-Image's double-stream MMDiT over packs of documents.

Words and latents of a document attend to each other both ways, and to nothing else. Documents of any noise level, size
and number of layers share a pack (`dit_blocks.py` says how). Parameters of the transformer have the names of
diffusers' `QwenImageTransformer2DModel`, so checkpoints and exports need no map; those of the words (`dit_words.py`)
are under `words.`.

Like every model here it contains no collectives and knows no ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ringweave.kernels.modulation import runs_of
from ringweave.kernels.rotary import axes_table
from ringweave.parallel.packed import PackedAttention
from ringweave.pretrain.models import lwm
from ringweave.pretrain.models.dit_blocks import (
    EPS,
    BlockContext,
    DoubleBlock,
    SingleBlock,
    Streams,
    modulated,
)
from ringweave.pretrain.models.dit_words import Words
from ringweave.pretrain.models.lwm import Attention, LWMShape

#: Numbers of the sinusoid of a noise level, and its longest period (in thousandths).
TIME_CHANNELS, TIME_PERIOD = 256, 10_000.0
#: What a slot holds.
NOTHING, WORD, LATENT = 0, 1, 2


@dataclass(frozen=True, slots=True)
class DiTShape:
    """channels: of a latent token in; out: of the velocity out; text: of a word's vector; axes: channels of a head
    that each axis of the positions turns, whose sum is the width of a head.

    streams: "double" or "single" (one set of weights for words and latents); words: sizes of the model that makes the
    words' vectors (None: they are given); head: whether it has a head, for a loss of its own; zero_init: modulation
    and the last layer begin at zero, so a block begins as the identity (Peebles & Xie 2023, adaLN-Zero).
    """

    layers: int
    heads: int
    axes: tuple[int, ...]
    channels: int
    out: int
    text: int
    mlp: int = 4
    theta: float = 10_000.0
    streams: str = "double"
    words: LWMShape | None = None
    head: bool = False
    zero_init: bool = True

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> DiTShape:
        """Inverse of `dataclasses.asdict`, also after JSON."""
        words = record["words"]
        values = {
            **record,
            "axes": tuple(record["axes"]),
            "words": None if words is None else LWMShape(**words),
        }
        return cls(**values)

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return sum(self.axes)

    @property
    def width(self) -> int:
        """Width of both streams."""
        return self.heads * self.head_dim

    @property
    def kv_heads(self) -> int:
        """Key-value heads: as many as heads."""
        return self.heads

    @property
    def window(self) -> None:
        """No window: a document sees all of itself."""
        return None

    @property
    def parameters(self) -> int:
        """Number of parameters, those of the words included."""
        with torch.device("meta"):
            return sum(p.numel() for p in DiT(self).parameters())


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


def _same(x: Tensor) -> Tensor:
    return x


class DiT(nn.Module):
    """Packed documents -> velocity of each latent, or the losses; whole, or one part of it in a pipeline."""

    def __init__(self, shape: DiTShape) -> None:
        super().__init__()
        self.shape = shape
        self.attention: Attention = PackedAttention()
        self.after_backward: Callable[[], None] = lwm._nothing
        self.hidden_shape: Callable[[int, int, int], tuple[int, int, int]] = lwm._unsharded
        #: what stands between the noise vectors and the blocks' modulation
        self.enter_level: Callable[[Tensor], Tensor] = _same
        self.words: Words | None = None if shape.words is None else Words(shape.words, head=shape.head)
        self.time_text_embed: TimeEmbedding | None = TimeEmbedding(shape.width)
        self.txt_norm: nn.RMSNorm | None = nn.RMSNorm(shape.text, eps=EPS)
        self.img_in: nn.Linear | None = nn.Linear(shape.channels, shape.width)
        self.txt_in: nn.Linear | None = nn.Linear(shape.text, shape.width)
        block = SingleBlock if shape.streams == "single" else DoubleBlock
        self.transformer_blocks = nn.ModuleDict(
            {str(i): block(shape.width, shape.head_dim, shape.mlp) for i in range(shape.layers)}
        )
        self.norm_out: nn.ModuleDict | None = nn.ModuleDict(
            {"linear": nn.Linear(shape.width, 2 * shape.width)}
        )
        self.proj_out: nn.Linear | None = nn.Linear(shape.width, shape.out)

    # --- what the engine, the pipeline and the sharding ask ----------------------------------------------

    @property
    def is_first(self) -> bool:
        """Whether this part reads ids and latents."""
        return self.img_in is not None

    @property
    def is_last(self) -> bool:
        """Whether this part gives velocities and losses."""
        return self.proj_out is not None

    def recomputable(self) -> Iterator[nn.Module]:
        """Modules whose `forward` or `feed_forward` may be computed again in the backward."""
        yield from self.transformer_blocks.values()

    def units(self) -> list[nn.Module]:
        """Modules that are sharded each as one unit."""
        words = [] if self.words is None else [self.words]
        return [*words, *self.transformer_blocks.values()]

    def extra_rows(self, slots: int, segments: int) -> int:
        """Rows that travel between the parts of a pipeline beside the hidden states of a pack's `slots`."""
        return segments + (-(-slots // self.shape.width) if self.shape.head else 0)

    def keep_part(self, layers: range, *, first: bool, last: bool) -> None:
        """Drop all but these blocks, what reads (kept by the first part) and what gives velocities (by the last)."""
        for i in range(self.shape.layers):
            if i not in layers:
                del self.transformer_blocks[str(i)]
        if not first:
            self.words = self.time_text_embed = self.txt_norm = self.img_in = self.txt_in = None
        if not last:
            self.norm_out = self.proj_out = None

    def initial_value(self, name: str, size: tuple[int, ...], *, seed: int) -> Tensor:
        """The whole initial fp32 tensor of one parameter, a function of (seed, name) only."""
        if name.startswith("words."):
            return lwm.initial_value(name, size, seed=seed, layers=self.words_layers)
        if name.endswith(".bias"):
            return torch.zeros(size)
        if "norm_" in name.rsplit(".", 2)[-2] or name == "txt_norm.weight":
            return torch.ones(size)
        if self.shape.zero_init and (
            "_mod." in name or ".mod." in name or name.startswith(("norm_out.", "proj_out."))
        ):
            return torch.zeros(size)
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") % (2**63))
        bound = (6.0 / sum(size)) ** 0.5  # Xavier, as in Peebles & Xie's DiT
        return torch.empty(size).uniform_(-bound, bound, generator=generator)

    @property
    def words_layers(self) -> int:
        """Layers of the words' model."""
        return 1 if self.shape.words is None else self.shape.words.layers

    # --- the pass ------------------------------------------------------------------------------------------

    def forward(
        self,
        x: Tensor,
        *,
        kind: Tensor,
        places: Tensor,
        segment: Tensor,
        sigma: Tensor,
        documents: Tensor,
        words: Tensor,
        owner: Tensor | None = None,
        order: Tensor | None = None,
        latents: Tensor | None = None,
        embeddings: Tensor | None = None,
        velocity: Tensor | None = None,
        targets: Tensor | None = None,
        expected: Tensor | None = None,
    ) -> Tensor:
        """One part's pass over B packs, l of whose L slots are here.

        x: ids [B, l] on the first part, what it gave on later ones; kind [B, l]: NOTHING, WORD or LATENT; places
        [B, l, axes]; segment [B, l]: column of sigma [B, S], noise levels in [0, 1]; documents, owner, words [B, L]:
        document (-1: none), ring rank and whether a word stands there, of every slot; order [B, l]: position of a
        word among its document's; latents [B, l, channels]; embeddings [B, l, text]: vectors of the words, where no
        model of words is there; velocity [B, l, out]: what is to be learnt; targets [B, l]: next words, -1 for none;
        expected [B, l]: see `LossHead.forward`.

        The last part gives velocities [B, l, out] if `velocity` is None, else losses [B, l]: the mean square over the
        channels of a latent, the nats of a word.
        """
        rows, slots = kind.shape
        streams = _streams(kind, segment, sigma.shape[1])
        if self.is_first:
            text, nll = self._read_words(
                x, streams, documents, words, owner, order, embeddings, targets, expected
            )
            image, level = self._read_latents(latents, sigma, streams)
        else:
            text, image, level, nll = self._unpacked(x, streams, slots, sigma.shape[1])
        attend = partial(
            self.attention, plan=self.attention.plan(documents, owner, whole_documents(documents), None)
        )
        wide = torch.float64 if self._dtype == torch.float64 else torch.float32
        cos, sin = axes_table(places.flatten(0, 1), dims=self.shape.axes, theta=self.shape.theta, dtype=wide)
        ctx, here = BlockContext(streams, cos, sin, attend), self.enter_level(level)
        for block in self.transformer_blocks.values():
            text, image = block(text, image, here, ctx)
        if self.norm_out is None or self.proj_out is None:
            return self._packed(text, image, level, nll, streams, rows)
        # Scale first here, shift first in the blocks: so it is in Qwen-Image.
        scale, shift = self.norm_out["linear"](here).chunk(2, dim=-1)
        out = self.proj_out(modulated(image, shift, scale, streams.image_runs))
        if velocity is None:
            return streams.joined(out.new_zeros((len(text), out.shape[-1])), out).view(rows, slots, -1)
        wanted = velocity.flatten(0, 1)[streams.image_at]
        errors = (out.to(wide) - wanted.to(wide)).square().mean(-1)
        told = errors.new_zeros(len(text)) if nll is None else nll.to(wide)
        return streams.joined(told, errors).view(rows, slots)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def _read_words(
        self,
        ids: Tensor,
        streams: Streams,
        documents: Tensor,
        words: Tensor,
        owner: Tensor | None,
        order: Tensor | None,
        embeddings: Tensor | None,
        targets: Tensor | None,
        expected: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Words as the blocks want them [n, width], and their losses."""
        assert self.txt_norm is not None and self.txt_in is not None

        def here(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.flatten(0, 1)[streams.text_at]

        nll: Tensor | None = None
        if self.words is None:
            assert embeddings is not None, "a model without words of its own needs their embeddings"
            vectors = embeddings.flatten(0, 1)[streams.text_at].to(self._dtype)
        else:
            mask = words.bool()
            # Documents of all packs in one row: numbers must not meet.
            number = (
                documents + (documents.shape[1] * torch.arange(len(documents), device=ids.device))[:, None]
            )
            own, place = here(ids), here(order)
            assert own is not None and place is not None
            vectors, nll = self.words(
                own, order=place, documents=number[mask][None].int(),
                owner=None if owner is None else owner[mask][None],
                targets=here(targets), expected=here(expected),
            )  # fmt: skip
        return self.txt_in(self.txt_norm(vectors)), nll

    def _read_latents(self, latents: Tensor | None, sigma: Tensor, streams: Streams) -> tuple[Tensor, Tensor]:
        """Latents as the blocks want them [m, width], and the segments' noise vectors [S, width]."""
        assert self.img_in is not None and self.time_text_embed is not None and latents is not None
        dtype = self._dtype
        image = self.img_in(latents.flatten(0, 1)[streams.image_at].to(dtype))
        return image, F.silu(self.time_text_embed(sigma.flatten(), dtype))

    def _packed(
        self, text: Tensor, image: Tensor, level: Tensor, nll: Tensor | None, streams: Streams, rows: int
    ) -> Tensor:
        """What the next part needs, [B, l + extra rows, width]: streams in slots, noise vectors, words' losses."""
        parts = [
            streams.joined(text, image).view(rows, -1, self.shape.width),
            level.view(rows, -1, self.shape.width),
        ]
        if self.shape.head:
            told = text.new_zeros(len(text)) if nll is None else nll.to(text.dtype)
            flat = streams.joined(told, image.new_zeros(len(image))).view(rows, -1)
            need = -flat.shape[1] % self.shape.width
            parts.append(F.pad(flat, (0, need)).view(rows, -1, self.shape.width))
        return torch.cat(parts, dim=1)

    def _unpacked(
        self, x: Tensor, streams: Streams, slots: int, segments: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Inverse of `_packed`."""
        states, level = x[:, :slots].flatten(0, 1), x[:, slots : slots + segments].flatten(0, 1)
        nll = None
        if self.shape.head:
            flat = x[:, slots + segments :].flatten(1)[:, :slots].flatten()
            nll = flat[streams.text_at]
        return states[streams.text_at], states[streams.image_at], level, nll


def _streams(kind: Tensor, segment: Tensor, segments: int) -> Streams:
    """From kinds and segments [B, l], with `segments` noise levels a pack."""
    rows = torch.arange(len(kind), device=kind.device)[:, None] * segments
    flat, row = kind.flatten(), (segment + rows).flatten()
    text_at, image_at = (flat == WORD).nonzero()[:, 0], (flat == LATENT).nonzero()[:, 0]
    return Streams(flat.numel(), text_at, image_at, runs_of(row[text_at]), runs_of(row[image_at]))


def whole_documents(documents: Tensor) -> Tensor:
    """For every slot of documents [B, L] (-1: padding) the length of its document: all of it is seen both ways."""
    lengths = torch.zeros_like(documents)
    for row, out in zip(documents, lengths):
        counts = torch.bincount(row[row >= 0].long(), minlength=1)
        out[row >= 0] = counts[row[row >= 0].long()].to(out.dtype)
    return lengths
