"""Audio codecs brought from outside: EnCodec, DAC and Mimi, by their transformers classes.

Each clip is encoded alone at its true length, in float32 on one thread (`outside_files.exactly`). In a padded batch
the classes let the padding into the last frames of the shorter clips, so their ids would depend on the company
they were in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ringweave.tokenizers.errors import DataError, VocabularyError
from ringweave.tokenizers.outside_files import (
    Weights,
    check_codes,
    exactly,
    library,
    read_weights,
    refuse_unfit,
)

if TYPE_CHECKING:
    import torch

#: model_type of config.json -> class of transformers.
CLASSES = {"encodec": "EncodecModel", "dac": "DacModel", "mimi": "MimiModel"}
FULL = 32768.0  # int16 steps in 1.0


class OutsideAudio:
    """int16 [T] mono at `rate` Hz <-> codes int32 [F, books], F = ceil(T / hop).

    kind: "audio.encodec", "audio.dac" or "audio.mimi"; hop: samples a frame; books: number of codebooks used, the
    first ones of `all_books`; codes: size of each; sha256: identity of weights and config; channels: "mono", or
    "downmix" when [T, C] is averaged instead of refused.
    """

    def __init__(
        self, model: Any, weights: Weights, *, books: int | None, channels: str, device: str
    ) -> None:
        name = model.config.model_type
        self.model, self.device, self.channels, self.kind = model, device, channels, f"audio.{name}"
        config = model.config
        self.rate, self.codes = int(config.sampling_rate), int(config.codebook_size)
        self.hop = int(config.frame_size if name == "mimi" else config.hop_length)
        self.all_books = int(config.n_codebooks if name == "dac" else config.num_quantizers)
        fewest = int(config.num_semantic_quantizers) if name == "mimi" else 1
        self.books = self.all_books if books is None else books
        if not fewest <= self.books <= self.all_books:
            raise VocabularyError(
                f"books must be from {fewest} to {self.all_books}, got {books}", where=weights.where
            )
        self.sha256 = weights.identity(self.kind, {"channels": channels})

    @classmethod
    def load(
        cls, path: Path, *, books: int | None = None, channels: str = "mono", device: str = "cpu"
    ) -> OutsideAudio:
        """Read a folder or .safetensors file with its config.json (`read_weights`).

        books: how many codebooks to use, the coarsest first; all by default. channels: "mono" refuses stereo,
        "downmix" takes the mean of the channels, rounded to even. Models that are stereo, or scale each chunk by
        its loudness, are refused by name: their codes alone do not hold the sound.
        """
        weights = read_weights(path)
        kind = weights.config.get("model_type")
        if kind not in CLASSES:
            raise VocabularyError(
                f"config.json names the model {kind!r}, not one of {', '.join(CLASSES)}", where=weights.where
            )
        if channels not in ("mono", "downmix"):
            raise VocabularyError(
                f"channels must be 'mono' or 'downmix', got {channels!r}", where=weights.where
            )
        model = _build(weights, library("transformers", CLASSES[kind], extra=""), device=device)
        _refuse_unsupported(model.config, weights.where)
        return cls(model, weights, books=books, channels=channels, device=device)

    def frames(self, samples: int) -> int:
        """Number of frames of a clip of `samples`."""
        return -(-samples // self.hop)

    def encode(self, samples: NDArray[np.int16], rate: int) -> NDArray[np.int32]:
        """Codes int32 [F, books] of int16 [T] at `rate` Hz, which has to be the codec's; DataError otherwise."""
        import torch

        wave = self._checked(np.asarray(samples), rate)
        if (
            self.kind == "audio.dac"
        ):  # its strides drop an unfinished frame; its own extractor pads it with zeros
            wave = np.pad(wave, (0, -len(wave) % self.hop))
        with exactly(self.device):
            values = torch.from_numpy(wave.astype(np.float32) / np.float32(FULL)).to(self.device)[None, None]
            codes = self._codes(values)[: self.books].T.cpu().numpy().astype(np.int32)
        if len(codes) != self.frames(len(wave)):
            raise DataError(
                f"{len(wave)} samples gave {len(codes)} frames where {self.frames(len(wave))} were due",
                where=self.kind,
            )
        return codes

    def _checked(self, samples: NDArray[Any], rate: int) -> NDArray[np.int16]:
        """Mono int16 [T], T > 0, at the codec's rate."""
        if samples.dtype != np.int16 or samples.ndim not in (1, 2) or 0 in samples.shape:
            raise DataError(f"audio must be int16 [T], T > 0, got {samples.dtype} {list(samples.shape)}")
        if rate != self.rate:
            raise DataError(
                f"audio at {rate} Hz for a codec of {self.rate} Hz",
                where=self.kind,
                fix="resample it first: ringweave.tokenizers.audio.resample",
            )
        if samples.ndim == 1:
            return samples
        if self.channels != "downmix":
            raise DataError(
                f"{samples.shape[1]} channels for a mono codec",
                where=self.kind,
                fix="load the codec with channels='downmix', or encode each channel as a clip of its own",
            )
        return np.rint(samples.mean(1, dtype=np.float64)).astype(np.int16)

    def _codes(self, values: torch.Tensor) -> torch.Tensor:
        """At least `books` rows of codes [Q, F] of a wave [1, 1, T]."""
        if self.kind == "audio.dac":
            return self.model.encode(values, n_quantizers=self.books).audio_codes[0]
        if self.kind == "audio.mimi":
            return self.model.encode(values, num_quantizers=self.books).audio_codes[0]
        config = self.model.config
        count = self.model.quantizer.get_num_quantizers_for_bandwidth
        bandwidth = min(width for width in config.target_bandwidths if count(width) >= self.books)
        return self.model.encode(values, bandwidth=bandwidth, return_dict=True).audio_codes[0, 0]

    def decode(self, codes: NDArray[np.int32]) -> NDArray[np.int16]:
        """int16 [F * hop] of codes [F, Q], Q from 1 to all books; the caller cuts it to the clip's length.

        -1 (missing) decodes as code 0. DataError unless the codes are integers of the codebooks.
        """
        import torch

        whole = check_codes(np.asarray(codes), self.codes, what=self.kind, dims=2)
        if whole.ndim != 2 or not 1 <= whole.shape[1] <= self.all_books:
            raise DataError(
                f"codes must be [F, 1 to {self.all_books}], got {list(whole.shape)}", where=self.kind
            )
        ids = torch.from_numpy(np.maximum(whole, 0).T[None].copy()).to(self.device)  # [1, Q, F]
        with exactly(self.device):
            if self.kind == "audio.encodec":
                wave = self.model.decode(ids[None], [None], return_dict=True).audio_values
            else:
                wave = self.model.decode(audio_codes=ids).audio_values
        wave = wave.reshape(-1).cpu()
        if not wave.isfinite().all():
            raise DataError("the decoder gave values that are not finite", where=self.kind)
        out = np.clip(np.rint(wave.numpy().astype(np.float64) * FULL), -32768, 32767).astype(np.int16)
        length = len(whole) * self.hop  # odd strides of DAC lose a few samples at the end
        return np.pad(out[:length], (0, max(0, length - len(out))))


def _refuse_unsupported(config: Any, where: str) -> None:
    reasons = {
        "it is stereo": getattr(config, "audio_channels", 1) != 1,
        "it divides each chunk by its loudness, which the codes do not hold": getattr(
            config, "normalize", False
        ),
        "it encodes overlapping chunks": getattr(config, "chunk_length_s", None) is not None,
    }
    found = [reason for reason, true in reasons.items() if true]
    if found:
        raise VocabularyError(
            f"this {config.model_type} is not supported: {'; '.join(found)}",
            where=where,
            fix="use a mono model, such as the 24 kHz EnCodec",
        )


def _build(weights: Weights, cls: Any, *, device: str) -> Any:
    """The transformers model with exactly these weights; its own loader knows older names of the tensors."""
    import torch

    try:
        config = cls.config_class.from_dict(dict(weights.config))
        with _quiet():
            model, info = cls.from_pretrained(
                None,
                config=config,
                state_dict=dict(weights.tensors),
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # so that they are listed below
                output_loading_info=True,
            )
    except Exception as error:  # whatever the library raises on a config it does not like
        raise VocabularyError(
            "config.json does not describe a model",
            where=weights.where,
            why=f"{type(error).__name__}: {error}",
        ) from error
    missing, surplus = info["missing_keys"], set(info["unexpected_keys"])
    surplus |= _passed_over(weights.tensors, model.state_dict(), missing=len(missing), known=len(surplus))
    shaped = [f"{key[0]} is {list(key[1])}, not {list(key[2])}" for key in info["mismatched_keys"]]
    refuse_unfit(missing, surplus, shaped, where=weights.where)
    return model.requires_grad_(False).eval().to(device)


def _passed_over(
    stored: dict[str, torch.Tensor], used: dict[str, torch.Tensor], *, missing: int, known: int
) -> set[str]:
    """Stored tensors the loader left out without listing them, as Mimi's does with all under its halves' names.

    The loader only renames, so they are counted; their names are found by their values.
    """
    import torch

    kept = {name: tensor for name, tensor in stored.items() if not name.endswith("rotary_emb.inv_freq")}
    left = len(kept) - (len(used) - missing) - known
    if left <= 0:
        return set()
    values = list(used.values())
    found = {k for k, t in kept.items() if not any(t.shape == v.shape and torch.equal(t, v) for v in values)}
    return found or {f"{left} tensors"}


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar or report of the library's own: what is wrong is raised."""
    from transformers.utils import logging

    bar, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
