"""Commands about vocabularies: `tokenizer add|compare|remap`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ringweave.launch.commands_tokenizer import tokenizer_app
from ringweave.launch.console import JsonOption, Output, SetOption
from ringweave.launch.data_sources import load_tokenizers
from ringweave.pretrain.errors import ConfigError
from ringweave.tokenizers.errors import DataError, VocabularyError

if TYPE_CHECKING:
    from ringweave.tokenizers.manifest import VocabularyManifest

#: What needs no weights: words of notes.
WORDS = ("symbolic", "midi")


def register(app: typer.Typer) -> None:
    """The commands hang on `tokenizer`, which is registered elsewhere; importing this module adds them."""


@tokenizer_app.command(
    "add",
    epilog="Example: ringweave tokenizer add symbolic midi -t runs/demo/tokenizers --out runs/tokenizers-2",
)
def add(
    codecs: Annotated[
        list[str],
        typer.Argument(
            metavar="CODEC...",
            help="symbolic, midi; image=FOLDER, audio=FOLDER[,books=4] or latents=FOLDER of weights from outside.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the new tokenizer set.")],
    tokenizers: Annotated[
        Path | None,
        typer.Option("--tokenizers", "-t", metavar="DIR", help="The set to add to; else an empty one."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a set with further codecs, whose ids come after the present ones: every id keeps its meaning."""
    from ringweave.tokenizers.set import TokenizerSet

    printer = Output(as_json)
    wanted = [parse_codec(text) for text in codecs]
    names = [name for name, _, _ in wanted]
    if len(set(names)) < len(names):
        raise ConfigError("a codec is named twice", where=", ".join(codecs))
    before = load_tokenizers(tokenizers) if tokenizers is not None else TokenizerSet({})
    after = before.extended({name: _make(name, weights, options) for name, weights, options in wanted})
    after.save(out)
    manifest = after.manifest
    added = [block for block in manifest.blocks if block.codec in names]
    for block in added:
        printer.say(f"{block.name}: ids {block.start:,} to {block.stop - 1:,}")
    for name in names:
        if not any(block.codec == name for block in added):
            about = manifest.preprocessing[name]
            printer.say(f"{name}: no ids; cells of {about['patch']} pixels, {about['channels']} channels")
    printer.say(f"wrote {out}: {manifest.size:,} ids, vocabulary {manifest.hash[:12]}")
    blocks = [{"name": block.name, "start": block.start, "size": block.size} for block in added]
    printer.result({"out": str(out), "hash": manifest.hash, "size": manifest.size, "added": blocks})


def parse_codec(text: str) -> tuple[str, Path | None, dict[str, Any]]:
    """`midi`, `audio=FOLDER` or `audio=FOLDER,books=4` as (name, folder, options). ConfigError for anything else."""
    head, *settings = text.split(",")
    name, _, folder = head.partition("=")
    known = {
        "midi": ("velocity_bins",), "symbolic": (), "image": ("pixels",), "audio": ("books", "channels"),
        "latents": (),
    }  # fmt: skip
    if name not in known:
        raise ConfigError(
            f"unknown codec {name!r}", fix="name symbolic, midi, image=FOLDER, audio=FOLDER or latents=FOLDER"
        )
    if (name in WORDS) == bool(folder):
        wants = "takes no folder" if name in WORDS else "needs the folder of its weights"
        raise ConfigError(
            f"{name} {wants}", where=text, fix=f"write {name if name in WORDS else f'{name}=FOLDER'}"
        )
    options: dict[str, Any] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in known[name] or not value:
            raise ConfigError(
                f"{name} has no setting {setting!r}", fix=f"it has: {', '.join(known[name]) or 'none'}"
            )
        options[key] = int(value) if value.isdecimal() else value
    return name, Path(folder) if folder else None, options


def _make(name: str, weights: Path | None, options: dict[str, Any]) -> Any:
    from ringweave.tokenizers.symbols import MidiCodec, SymbolicCodec

    if name == "symbolic":
        return SymbolicCodec()
    if name == "midi":
        return MidiCodec(**options)
    from ringweave.tokenizers.brought import Brought
    from ringweave.tokenizers.latent_codec import LatentCodec

    assert weights is not None
    if name == "latents":
        return LatentCodec.from_diffusers(weights)
    return Brought.load(name, weights, **options)


@tokenizer_app.command(
    "compare",
    epilog="Example: ringweave tokenizer compare runs/demo/tokenizers runs/new/checkpoints/step-00000100",
)
def compare(
    first: Annotated[
        Path, typer.Argument(metavar="A", help="A tokenizer set, a checkpoint, an export or a manifest.")
    ],
    second: Annotated[Path, typer.Argument(metavar="B", help="The other one.")],
    as_json: JsonOption = False,
) -> None:
    """Say whether two vocabularies are equal, where they first differ, and how many ids one could take over."""
    from ringweave.tokenizers.manifest import remap

    printer = Output(as_json)
    older, newer = vocabulary_at(first), vocabulary_at(second)
    difference = older.difference(newer, mine=str(first), theirs=str(second))
    table = remap(older, newer)
    blocks = []
    for block in older.blocks:
        moved = int((table[block.start : block.stop] >= 0).sum())
        where = int(table[block.start]) if moved else None
        blocks.append(
            {"block": block.name, "size": block.size, "kept": moved, "start": block.start, "now": where}
        )
    printer.say("the vocabularies are equal" if difference is None else f"they differ: {difference}")
    if difference is not None:
        if newer.extends(older):
            printer.say(f"{second} only adds to {first}: ids may be used as they are")
        rows = [[b["block"], b["size"], b["start"], "-" if b["now"] is None else b["now"]] for b in blocks]
        printer.table("ids of the first in the second", ["block", "ids", "from", "to"], rows)
    printer.result({
        "equal": difference is None, "difference": difference, "extends": newer.extends(older), "blocks": blocks,
        "hashes": [older.hash, newer.hash],
    })  # fmt: skip


def vocabulary_at(path: Path) -> VocabularyManifest:
    """The vocabulary of a tokenizer set, of a checkpoint (`step-N`), of an export, or in a JSON file.

    Raises DataError where there is none, VocabularyError for a checkpoint that holds only its hash.
    """
    from ringweave.tokenizers.manifest import VocabularyManifest

    for name in ("tokenizers.json", "vocabulary.json"):
        if (path / name).is_file():
            return VocabularyManifest.load(path / name)
    if path.is_file():
        return VocabularyManifest.load(path)
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            "no vocabulary here", where=str(path), why=str(error),
            fix="give a tokenizer folder, a checkpoint (RUN/checkpoints/step-N), an export or a manifest",
        ) from error  # fmt: skip
    if not isinstance(manifest, dict) or "vocabulary_manifest" not in manifest:
        raise VocabularyError(
            "the checkpoint holds the hash of its vocabulary only", where=str(path),
            why="it is of an older version", fix="give the tokenizers it was trained with",
        )  # fmt: skip
    return VocabularyManifest.from_json(json.dumps(manifest["vocabulary_manifest"]), where=str(path))


@tokenizer_app.command(
    "remap", epilog="Example: ringweave tokenizer remap runs/old/checkpoints/step-00000100 --config new.yaml"
)
def remap_command(
    source: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="RUN/checkpoints/step-N.")],
    config: Annotated[
        Path,
        typer.Option(
            "--config", metavar="YAML", help="The run that goes on from it, with the new tokenizers."
        ),
    ],
    older: Annotated[
        Path | None,
        typer.Option(
            "--from", metavar="DIR", help="Tokenizers of the checkpoint, if it does not hold its vocabulary."
        ),
    ] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint for another vocabulary: rows of embedding and head go where their ids' meaning went.

    Encodes the data of the new run first where that is not done. The new run's model, optimizer and step are those of
    the checkpoint; it reads its data from the start.
    """
    from ringweave.pretrain.config import load_config
    from ringweave.pretrain.job import open_corpus
    from ringweave.pretrain.remap_checkpoint import remap_checkpoint

    printer = Output(as_json)
    checked = load_config(config, overrides or [])
    newer = vocabulary_at(Path(checked.tokenizers.dir))
    corpus = open_corpus(checked, newer)
    try:
        saved, counts = remap_checkpoint(
            source, checked, newer, corpus_digest=corpus.digest, older=vocabulary_at(older) if older else None
        )
    finally:
        corpus.close()
    printer.say(f"wrote {saved.path}")
    printer.say(f"ids: {counts['kept']:,} kept, {counts['new']:,} new, {counts['dropped']:,} dropped")
    printer.say(f"go on with: ringweave train {config}")
    printer.result({"path": str(saved.path), **counts})
