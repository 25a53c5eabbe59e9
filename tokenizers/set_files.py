"""What a tokenizer folder holds: which codecs there are, their files, and the vocabulary they make."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ringweave.tokenizers import sub_ids
from ringweave.tokenizers.audio import AudioCodec
from ringweave.tokenizers.brought import BROUGHT, DESCRIPTION, Brought, read_brought
from ringweave.tokenizers.codec import kind_of, sha256
from ringweave.tokenizers.conv_codecs import ConvAudioCodec, ConvImageCodec, ConvScoreCodec
from ringweave.tokenizers.conv_rgba import ConvRgbaCodec
from ringweave.tokenizers.errors import VocabularyError
from ringweave.tokenizers.image import ImageCodec
from ringweave.tokenizers.latent_codec import LatentCodec
from ringweave.tokenizers.manifest import CONTROL, VocabularyManifest
from ringweave.tokenizers.rgba import RgbaCodec
from ringweave.tokenizers.score import ScoreCodec
from ringweave.tokenizers.symbols import MidiCodec, SymbolicCodec
from ringweave.tokenizers.text import TextCodec
from ringweave.tokenizers.video import VideoCodec

MANIFEST_NAME = "tokenizers.json"
#: Unit of the time axis of positions.
TIME_UNIT_MS = 40
#: Order of the blocks in a new vocabulary. Only append.
CODECS: dict[str, Any] = {
    "text": TextCodec,
    "image": ImageCodec,
    "rgba": RgbaCodec,
    "audio": AudioCodec,
    "score": ScoreCodec,
    "symbolic": SymbolicCodec,
    "midi": MidiCodec,
    "video": VideoCodec,
    "latents": LatentCodec,
}
#: Those that have no ids and so no block: preprocessing holds their hash under their name.
WITHOUT_IDS = ("latents",)
#: How the books of a frame of sound become one stream; "delay" says book q of frame t after book 0 of frame t + q.
AUDIO_ORDERS = ("frame-major", "coarse-first", "delay")
#: Codecs that may stand in for those of CODECS: the kind that their file names -> class.
LEARNED: dict[str, Any] = {
    codec.kind: codec for codec in (ConvImageCodec, ConvRgbaCodec, ConvScoreCodec, ConvAudioCodec)
}


def codec_class(name: str, data: bytes) -> Any:
    """The class that reads the file `data` of the codec `name`: a learned one where it says so."""
    kind = kind_of(data) if name != "text" else ""
    return LEARNED[kind] if kind in LEARNED and kind.partition(".")[0] == name else CODECS[name]


def file_name(codec: str) -> str:
    """The codec's file in a tokenizer folder."""
    return "text.model" if codec == "text" else f"{codec}.safetensors"


def digest_of(name: str, codec: Any, data: bytes) -> str:
    """What stands for a codec in the vocabulary: its pieces (text), its weights (from outside), else its file."""
    if name == "text":
        return str(codec.piece_hash())
    return codec.sha256 if isinstance(codec, Brought) else sha256(data)


def make_manifest(
    codecs: Mapping[str, Any],
    files: Mapping[str, bytes],
    *,
    control: dict[str, int] | None = None,
    audio_order: str = AUDIO_ORDERS[0],
) -> VocabularyManifest:
    """The vocabulary of codecs, blocks in their order. control: of an older version, where the set is from one."""
    control = CONTROL.copy() if control is None else control
    preprocessing = _preprocessing(codecs) | {"control_size": len(control)}
    if "audio" in codecs:
        preprocessing["audio"]["order"] = audio_order
    parts = []
    for name, codec in codecs.items():
        digest = digest_of(name, codec, files[name])
        parts += [(block, size, name, name, digest) for block, size in blocks_of(name, codec)]
        if name in WITHOUT_IDS:
            preprocessing[name]["sha256"] = digest
    text = codecs.get("text")
    return VocabularyManifest.build(
        parts,
        text_pieces=text.piece_hash() if text else "",
        preprocessing=preprocessing,
        control=control,
    )


def write_files(folder: Path, codecs: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    """One file per codec; those from outside also a folder of weights beside their description."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        codec = codecs[name]
        target, stale = folder / file_name(name), folder / f"{name}{DESCRIPTION}"
        if isinstance(codec, Brought):
            target, stale = stale, target
            codec.copy_weights(folder / name)
        target.write_bytes(data)
        stale.unlink(missing_ok=True)


def read_codecs(folder: Path, manifest: VocabularyManifest) -> tuple[dict[str, Any], dict[str, bytes]]:
    """(codecs, files) in the order of the manifest's blocks, those without ids last; VocabularyError names a codec that
    is missing, damaged, or not the one the manifest was made with."""
    codecs: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    for name, expected in _digests(manifest, str(folder / MANIFEST_NAME)).items():
        if name not in CODECS:
            raise VocabularyError(f"the manifest names an unknown codec {name!r}", where=str(folder))
        path = folder / file_name(name)
        brought = name in BROUGHT and (folder / f"{name}{DESCRIPTION}").is_file()
        if brought:
            path = folder / f"{name}{DESCRIPTION}"
        try:
            files[name] = path.read_bytes()
        except OSError as error:
            raise VocabularyError(f"the {name} codec is missing", where=str(path), why=str(error)) from error
        if name != "text" and not brought:
            _same(name, expected, sha256(files[name]), path)
        try:
            if brought:
                codecs[name] = read_brought(name, files[name], folder / name, where=str(path))
            else:
                codecs[name] = codec_class(name, files[name]).from_bytes(files[name], where=str(path))
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise VocabularyError(
                f"the {name} codec is malformed", where=str(path), why=f"{type(error).__name__}: {error}"
            ) from error
        _same(name, expected, digest_of(name, codecs[name], files[name]), path)
    return codecs, files


def _digests(manifest: VocabularyManifest, where: str) -> dict[str, str]:
    """Codec -> the hash it must have; VocabularyError when the manifest names one without ids but not its hash."""
    digests: dict[str, str] = {}
    for block in manifest.blocks:
        digests.setdefault(block.codec, block.sha256)
    for name in WITHOUT_IDS:
        if name in manifest.preprocessing:
            about = manifest.preprocessing[name]
            if not isinstance(about, dict) or not isinstance(about.get("sha256"), str):
                raise VocabularyError(
                    f"the manifest does not state the hash of the {name} codec", where=where
                )
            digests[name] = about["sha256"]
    return digests


def _same(name: str, expected: str, found: str, path: Path) -> None:
    if expected != found:
        raise VocabularyError(
            f"the {name} codec is not the one the vocabulary was made with",
            where=str(path),
            why=f"its hash is {found[:12]}, the manifest says {expected[:12]}",
            fix="restore the file, or train tokenizers again: ringweave tokenizer train",
        )


def blocks_of(name: str, codec: Any) -> list[tuple[str, int]]:
    """(block name, number of ids) of a codec, in the order its ids are written."""
    if name in WITHOUT_IDS:
        return []
    if name in ("text", "symbolic", "midi"):
        return [(name, codec.size)]
    if name == "image":
        sizes = sub_ids.block_sizes(codec.codes)
        return (
            [("image", codec.codes)] if len(sizes) == 1 else list(zip(("image.coarse", "image.fine"), sizes))
        )
    if name == "video":
        return [("video.move", codec.move_size), ("video.run", codec.run_size)]
    if name == "rgba":
        labels = [f"rgba.alpha{i}" for i in range(codec.books)] + ["rgba.colour"]
        return list(zip(labels, codec.block_sizes))
    return [(f"{name}.q{i}", codec.codes) for i in range(codec.books)]


def _preprocessing(codecs: Mapping[str, Any]) -> dict[str, Any]:
    """What happens before the codecs, and the sizes a reader of ids needs."""
    out: dict[str, Any] = {"time_unit_ms": TIME_UNIT_MS}
    if "text" in codecs:
        out["text"] = {"normalisation": "identity", "escape": "U+2581 as U+E000 1, U+E000 as U+E000 0"}
    if "image" in codecs:
        out["image"] = {"patch": codecs["image"].patch, "pad": "edge", "colour": "RGB as stored"}
        out["video"] = {"codec": "image, each frame", "frames": "all, at their own times"}
    if "rgba" in codecs:
        out["rgba"] = {"patch": codecs["rgba"].patch, "pad": "edge", "alpha": "straight"}
    if "audio" in codecs:
        audio = codecs["audio"]
        out["audio"] = {"rate": audio.rate, "hop": audio.hop, "channels": "mono"}
    if "score" in codecs:
        out["score"] = {"patch": codecs["score"].patch, "pad": "white", "colour": "grey"}
    if "symbolic" in codecs:
        out["symbolic"] = {"words": "LMX", "left_out": "lyrics, dynamics, text, repeats, layout"}
    if "midi" in codecs:
        out["midi"] = {"step_ms": 10, "segment_ms": 10_000, "velocity_bins": codecs["midi"].velocity_bins}
    if "video" in codecs:
        out["video_moves"] = {"reach": codecs["video"].reach, "runs": codecs["video"].runs}
    if "latents" in codecs:
        latents = codecs["latents"]
        size = {"patch": latents.patch, "channels": latents.channels}
        out["latents"] = size | {"kind": latents.kind, "pad": "edge", "alpha": "straight", "hidden": "black"}
    for name, codec in codecs.items():
        if codec.kind in LEARNED or isinstance(codec, Brought):
            out[name]["codec"] = codec.kind
    return out
