"""An exported diffusion folder run by the stock classes with our positions: any number of conditions, clips as layers.

`LayerPipeline` is for what `QwenImageTransformer2DModel` alone cannot say (`stock_positions.py`). The transformer is
the stock class, and so are the text encoder and the VAE; only `pos_embed`, which has no weights, is ours. Documents are
`Grid`s, targets first and conditions behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ringweave.kernels.rotary import axes_table
from ringweave.pretrain.dit_sample import SampleSettings, Wish, guided, schedule, walk
from ringweave.pretrain.flow import FlowSettings, noise_of
from ringweave.pretrain.import_dit import (
    PRIVATE,
    llama_config,
    read_private,
    stock_arguments,
    stock_shape,
    words_shape,
)
from ringweave.pretrain.models.dit_positions import Grid, Preset, document_positions
from ringweave.pretrain.private_fields import check_against, check_statistics, check_words, flow_of
from ringweave.tokenizers.errors import DataError, VocabularyError
from ringweave.tokenizers.latent_codec import LatentCodec
from ringweave.tokenizers.manifest import BOS
from ringweave.tokenizers.outside_files import build, check_shapes, read_weights

F32 = NDArray[np.float32]


class SignedRope(nn.Module):
    """Takes the place of `pos_embed`: turns of signed layers, for sequences of any length."""

    def __init__(self, axes: Sequence[int], *, preset: Preset, sign: int, theta: float = 1e4) -> None:
        super().__init__()
        self.axes, self.preset, self.sign, self.theta = tuple(axes), preset, sign, theta

    def forward(
        self,
        img_shapes: Sequence[Sequence[Grid]],
        max_txt_seq_len: int,
        device: torch.device | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(latents complex64 [cells, head / 2], words [n, head / 2]) of a batch whose documents have the same grids."""
        grids = list(img_shapes[0])
        if any(list(other) != grids for other in img_shapes):
            raise DataError(
                "documents of different grids in one batch",
                fix="give each a call of its own, or pack them in a run",
            )
        words, latents = document_positions(grids, int(max_txt_seq_len), self.preset, sign=self.sign)
        turns = [
            torch.complex(*axes_table(torch.from_numpy(places).to(device), dims=self.axes, theta=self.theta))
            for places in (latents, words)
        ]
        return turns[0], turns[1]


class LayerPipeline:
    """Transformer, text encoder, codec of latents and tokenizer of a folder; those it does not have are None.

    flow: how the run drew noise levels, for a sampler that shifts its own alike. `velocity` is what a solver calls.
    """

    def __init__(
        self,
        transformer: Any,
        *,
        preset: Preset,
        sign: int = 1,
        text_encoder: Any = None,
        codec: LatentCodec | None = None,
        tokenizer: Any = None,
        flow: FlowSettings | None = None,
    ) -> None:
        self.transformer, self.text_encoder, self.codec, self.tokenizer = (
            transformer,
            text_encoder,
            codec,
            tokenizer,
        )
        self.preset, self.sign, self.flow = preset, sign, flow or FlowSettings()
        transformer.pos_embed = SignedRope(transformer.config.axes_dims_rope, preset=preset, sign=sign)

    @classmethod
    def load(cls, folder: Path, *, device: str = "cpu") -> LayerPipeline:
        """Of a folder that `ringweave export` wrote. Raises VocabularyError as `read_diffusers`."""
        from diffusers import QwenImageTransformer2DModel

        folder = Path(folder)
        about = read_private(folder)
        weights = read_weights(folder / "transformer")
        config, where = stock_arguments(weights), str(folder / PRIVATE)
        flow = flow_of(about, where=where)
        transformer = build(
            lambda: QwenImageTransformer2DModel(**config), weights.tensors, where=weights.where, device=device
        )
        check_against(about, stock_shape(config), where=where)
        codec = LatentCodec.from_diffusers(folder / "vae") if (folder / "vae").is_dir() else None
        if codec is not None:
            check_statistics(about, codec, where=where)
        return cls(
            transformer, preset=about["preset"], sign=about["sign"], codec=codec, flow=flow,
            text_encoder=_text_encoder(folder, about, text=config["joint_attention_dim"], device=device),
            tokenizer=_tokenizer(folder / "tokenizer"),
        )  # fmt: skip

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        device: torch.device = next(self.transformer.parameters()).device
        return device

    def ids(self, prompt: str | None) -> Tensor:
        """Ids [n] of a prompt: bos, then its own; None is the empty prompt, bos alone, of guidance."""
        told: list[int] = []
        if prompt:
            if self.tokenizer is None:
                raise VocabularyError("the folder has no tokenizer", fix="give ids to `words`, bos first")
            told = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return torch.tensor([BOS, *told])

    @torch.no_grad()
    def words(self, prompt: str | Tensor | None) -> Tensor:
        """Vectors [n, text] of a prompt, or of its ids [n]."""
        if self.text_encoder is None:
            raise VocabularyError("the folder has no text encoder", fix="give vectors of words to `velocity`")
        ids = prompt if isinstance(prompt, Tensor) else self.ids(prompt)
        hidden: Tensor = self.text_encoder(ids[None].to(self.device), use_cache=False).last_hidden_state[0]
        return hidden

    @torch.no_grad()
    def velocity(
        self, latents: Tensor, sigma: float | Tensor, *, grids: Sequence[Grid], words: Tensor
    ) -> Tensor:
        """noise - latents as the model sees it, [..., cells, out], of a document or B of the same grids.

        latents [cells, channels] or [B, cells, channels]: targets at noise level sigma (one, or [B]) in [0, 1], and
        conditions as they are, in the order of grids; words [n, text] or [B, n, text]. What it says of conditions
        means nothing. DataError for other shapes.
        """
        one = latents.ndim == 2
        batch = latents[None] if one else latents
        told = words.expand(len(batch), *words.shape) if words.ndim == 2 else words
        cells = sum(grid.cells for grid in grids)
        if batch.ndim != 3 or batch.shape[1] != cells or len(told) != len(batch) or not told.shape[1]:
            raise DataError(
                f"latents are {list(latents.shape)} and words {list(words.shape)}, the grids have {cells} cells",
                fix="give latents [cells, channels] and the vectors of one word at least (bos)",
            )
        levels = torch.as_tensor(sigma, dtype=torch.float32).expand(len(batch)).to(self.device)
        out: Tensor = self.transformer(
            batch.to(self.device), told.to(self.device), timestep=levels, img_shapes=[list(grids)] * len(batch),
            return_dict=False,
        )[0]  # fmt: skip
        return out[0] if one else out

    def _said(self, wish: Wish) -> Tensor:
        """Vectors [n, text] of a wish's words; where they come from the record, one of zeros is the empty prompt."""
        if wish.embeddings is not None:
            return torch.from_numpy(wish.embeddings)
        if self.text_encoder is None and not wish.words:
            return torch.zeros(1, self.transformer.config.joint_attention_dim)
        return self.words(torch.tensor([BOS, *wish.words]))

    def sample(self, wish: Wish, settings: SampleSettings | None = None) -> list[F32]:
        """Latents [cells, channels] of every target of a document, in order: as `dit_sample.sample`, by stock classes.

        The words of the wish are ids without bos, or vectors where the run had no encoder of its own.
        """
        settings = settings or SampleSettings()
        told = self._said(wish)
        empty = self._said(replace(wish, words=(), embeddings=None)) if settings.guidance != 1.0 else None
        ends = np.cumsum([grid.cells for grid in wish.grids]).tolist()
        slots = [slice(end - grid.cells, end) for grid, end in zip(wish.grids, ends)]
        targets = [n for n, grid in enumerate(wish.grids) if not grid.condition]
        channels = self.transformer.config.in_channels
        latents, given = np.zeros((ends[-1], channels), np.float32), iter(wish.given)
        for grid, place in zip(wish.grids, slots):
            if grid.condition:
                latents[place] = next(given)

        def said(words: Tensor, level: float) -> list[F32]:
            out = self.velocity(torch.from_numpy(latents), level, grids=wish.grids, words=words).cpu().numpy()
            return [out[slots[n]] for n in targets]

        def velocity(states: list[list[F32]], levels: Sequence[float]) -> list[list[F32]]:
            for n, state in zip(targets, states[0]):
                latents[slots[n]] = state
            found = said(told, levels[0])
            if empty is None:
                return [found]
            return [[guided(c, u, settings) for c, u in zip(found, said(empty, levels[0]))]]

        noise = [
            noise_of(settings.seed, f"sample/{wish.name}", 0, n, (wish.grids[n].cells, channels))
            for n in targets
        ]
        levels = self._levels(settings.steps, wish.grids[targets[0]].cells)
        return walk(velocity, [noise], [levels], solver=settings.solver)[0]

    def _levels(self, steps: int, cells: int) -> list[float]:
        """As `dit_sample.schedule`, on the folder's shift."""
        try:
            return schedule(steps, cells, self.flow)
        except OverflowError as error:
            raise DataError(
                f"no noise levels for a target of {cells} cells", where=PRIVATE,
                why=f"flow.shift_from {self.flow.shift_from} and flow.shift_to {self.flow.shift_to} shift them beyond "
                "all numbers", fix="sample smaller targets, or export a run with another flow.shift",
            ) from error  # fmt: skip


def _text_encoder(folder: Path, about: dict[str, Any], *, text: int, device: str) -> Any:
    """The stock LlamaModel, of the sizes that ringweave.json tells; None where the folder has none."""
    from transformers import LlamaModel

    shape, where = words_shape(folder, about), folder / "text_encoder"
    if shape is None:
        return None
    check_words(shape, text, where=str(folder / PRIVATE))
    found = read_weights(where).tensors
    tensors = {
        name.removeprefix("model."): value for name, value in found.items() if name != "lm_head.weight"
    }
    with torch.device("meta"):  # before a file makes us take memory
        asked = {
            name: tuple(value.shape) for name, value in LlamaModel(llama_config(shape)).state_dict().items()
        }
    check_shapes(asked, {name: tuple(value.shape) for name, value in tensors.items()}, where=str(where))
    model = LlamaModel(llama_config(shape))
    model.load_state_dict(tensors)
    return model.requires_grad_(False).eval().to(device)


def _tokenizer(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    if not folder.is_dir():
        return None
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever a library raises on a file it does not like
        raise VocabularyError(
            "not a readable tokenizer", where=str(folder), why=f"{type(error).__name__}: {error}"
        ) from error
