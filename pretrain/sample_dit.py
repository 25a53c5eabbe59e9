"""Pictures from a run of a diffusion transformer: held-out documents of its sources, or words, made anew.

Each held-out document is a wish: its words and conditions are given, its targets are made and shown beside the true
ones. The layers made are written as PNG, bottom first, so `ringweave eval rgba` reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringweave.data_pipes.corpus import Corpus
from ringweave.data_pipes.lengths import as_lengths
from ringweave.data_pipes.pack import Piece
from ringweave.pretrain.backbone import diffusion_settings
from ringweave.pretrain.config import RunConfig
from ringweave.pretrain.dit_sample import SampleSettings, Wish, sample
from ringweave.pretrain.errors import ConfigError
from ringweave.pretrain.export import load_run, same_vocabulary
from ringweave.pretrain.job import open_corpus
from ringweave.pretrain.models.dit import DiT
from ringweave.pretrain.models.dit_positions import Grid
from ringweave.pretrain.run_folder import write_json
from ringweave.tokenizers.bare import shape_of
from ringweave.tokenizers.manifest import VocabularyManifest
from ringweave.tokenizers.segment import Document
from ringweave.tokenizers.set import TokenizerSet

U8 = NDArray[np.uint8]
#: Documents that are made in one pack, and the side of a square of the checkerboard under transparent pictures.
AT_ONCE, CHECK = 8, 8
GAP = 4


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """A wish that was granted: layers uint8 [H, W, 4] given, made and (of a held-out document) true, bottom first."""

    source: str
    key: str
    prompt: str
    given: list[U8]
    made: list[U8]
    true: list[U8]


def wish_of(document: Document, *, name: str) -> tuple[Wish, list[NDArray[np.float32]]]:
    """(the wish to make a document's targets from its words and conditions, latents of the true targets)."""
    words, grids = document.segments[0], list[Grid]()
    given, true = list[NDArray[np.float32]](), list[NDArray[np.float32]]()
    for segment in document.segments[1:]:
        shape = shape_of(segment)
        assert shape is not None and segment.latents is not None
        condition = segment.role == "condition"
        grids.append(Grid(shape[1], shape[2], shape[0], condition))
        (given if condition else true).append(segment.latents)
    if words.latents is not None:
        return Wish(name, (), grids, given, words.latents), true
    return Wish(name, words.ids[1:].tolist(), grids, given), true


def make_heldout(
    model: DiT,
    corpus: Corpus,
    config: RunConfig,
    tokenizers: TokenizerSet,
    *,
    source: str,
    count: int,
    settings: SampleSettings,
) -> list[Made]:
    """The first `count` held-out documents of a source, their targets made anew."""
    known = as_lengths(corpus.lengths)
    lengths = np.concatenate([known.of(source, shard) for shard in range(len(known.counts(source)))])
    numbers = np.flatnonzero(lengths > 0)[:count].tolist()
    documents = [corpus.document(Piece(source, 0, n, 0, int(lengths[n]))) for n in numbers]
    diffusion = diffusion_settings(config, len(config.stages) - 1)
    out: list[Made] = []
    for at in range(0, len(documents), AT_ONCE):
        some = documents[at : at + AT_ONCE]
        pairs = [wish_of(d, name=f"{source}/{n}") for d, n in zip(some, numbers[at:])]
        found = sample(model, [wish for wish, _ in pairs], diffusion, settings)
        for document, (wish, true), made in zip(some, pairs, found):
            targets = [g for g in wish.grids if not g.condition]
            conditions = [g for g in wish.grids if g.condition]
            out.append(
                Made(
                    source, document.key, _words(wish, tokenizers),
                    _layers(wish.given, conditions, tokenizers), _layers(made, targets, tokenizers),
                    _layers(true, targets, tokenizers),
                )
            )  # fmt: skip
    return out


def make_prompts(
    model: DiT,
    config: RunConfig,
    tokenizers: TokenizerSet,
    prompts: Sequence[str],
    *,
    grids: Sequence[Grid],
    settings: SampleSettings,
) -> list[Made]:
    """Layers of these grids from words alone."""
    wishes = [
        Wish(f"prompt/{n}", tokenizers.text_segment(prompt).ids.tolist(), grids)
        for n, prompt in enumerate(prompts)
    ]
    found = sample(model, wishes, diffusion_settings(config, len(config.stages) - 1), settings)
    return [
        Made("prompt", f"{n:03d}", prompt, [], _layers(made, grids, tokenizers), [])
        for n, (prompt, made) in enumerate(zip(prompts, found))
    ]


def _words(wish: Wish, tokenizers: TokenizerSet) -> str:
    parts = tokenizers.decode(np.asarray(wish.words, np.int32)) if wish.words else []
    return "".join(str(part.value) for part in parts if part.modality == "text")


def _layers(
    latents: Sequence[NDArray[np.float32]], grids: Sequence[Grid], tokenizers: TokenizerSet
) -> list[U8]:
    """Each grid as a picture; of a clip its first frame."""
    return [
        tokenizers.decode_layer(values.reshape(g.frames, g.height, g.width, -1)[0])
        for values, g in zip(latents, grids)
    ]


def on_checks(layer: U8) -> U8:
    """RGBA uint8 [H, W, 4] over a grey checkerboard -> [H, W, 3]."""
    height, width = layer.shape[:2]
    checks = (np.arange(height)[:, None] // CHECK + np.arange(width)[None, :] // CHECK) % 2
    page = np.where(checks[..., None] > 0, 204.0, 255.0)
    alpha = layer[..., 3:].astype(np.float64) / 255
    return np.rint(layer[..., :3] * alpha + page * (1 - alpha)).astype(np.uint8)


def sheet(items: Sequence[Made]) -> U8:
    """One row a document: given | made | true, on checkerboards, as a picture [H, W, 3]."""
    rows = []
    for item in items:
        groups = [[on_checks(layer) for layer in some] for some in (item.given, item.made, item.true) if some]
        height = max(p.shape[0] for group in groups for p in group)
        parts: list[U8] = []
        for number, group in enumerate(groups):
            if number:
                parts.append(np.full((height, 3 * GAP, 3), 255, np.uint8))
            for p in group:
                box = np.full((height, p.shape[1] + GAP, 3), 255, np.uint8)
                box[: p.shape[0], : p.shape[1]] = p
                parts.append(box)
        rows.append(np.concatenate(parts, axis=1))
    width = max(row.shape[1] for row in rows)
    padded = [np.pad(row, ((0, GAP), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    return np.concatenate(padded)


def sample_diffusion(
    run_dir: Path,
    prompts: Sequence[str],
    out: Path,
    *,
    sources: Sequence[str] = (),
    count: int = 4,
    settings: SampleSettings | None = None,
    step: int | None = None,
) -> dict[str, Any]:
    """Make `count` held-out documents of each source of a run (or of `sources`), and a picture for each prompt.

    step: of the checkpoint, the newest unless given.
    Writes `SOURCE.png` with rows of given | made | true, `SOURCE/made/KEY/layerN.png` and the same of true ones,
    `prompts.png`, and `samples.json`.
    Raises ConfigError for a run of another kind, a source it does not have, and prompts where it reads no text.
    """

    model, saved, config = load_run(run_dir, step=step)
    if not isinstance(model, DiT):
        raise ConfigError(
            "this run is no diffusion run", where=str(run_dir), why=f"kind: {config.model.kind}"
        )
    if prompts and config.model.words.given:
        raise ConfigError(
            "this run cannot read a prompt",
            where="--prompt",
            why=f"its words are vectors of {config.model.words.given} numbers that another model made "
            "(model.words.given): there is no text encoder in the run",
            fix="leave --prompt out: held-out records are made from the embeddings in them",
        )
    settings = settings or SampleSettings(seed=config.run.seed)
    same_vocabulary(saved, Path(config.tokenizers.dir))
    tokenizers = TokenizerSet.load(Path(config.tokenizers.dir))
    manifest = VocabularyManifest.load(Path(config.tokenizers.dir) / "tokenizers.json")
    entries: list[dict[str, Any]] = []
    out.mkdir(parents=True, exist_ok=True)
    with closing(open_corpus(config, manifest, heldout=True)) as corpus:
        known = list(as_lengths(corpus.lengths).names)
        if unknown := [name for name in sources if name not in known]:
            raise ConfigError(
                f"no held-out source is called {', '.join(unknown)}", where="--source",
                fix=f"its held-out sources: {', '.join(known) or 'none'}",
            )  # fmt: skip
        for source in sources or (() if prompts else known):
            made = make_heldout(
                model, corpus, config, tokenizers, source=source, count=count, settings=settings
            )
            entries.append(_write(made, source, out))
        if prompts:
            grids = _usual_grids(corpus, known, tokenizers)
            made = make_prompts(model, config, tokenizers, prompts, grids=grids, settings=settings)
            entries.append(_write(made, "prompts", out))
    write_json(out / "samples.json", entries)
    return {"samples": entries, "path": str(out)}


def _usual_grids(corpus: Corpus, sources: Sequence[str], tokenizers: TokenizerSet) -> list[Grid]:
    """The target grids of the first held-out document."""
    known = as_lengths(corpus.lengths)
    for source in sources:
        lengths = known.of(source, 0) if len(known.counts(source)) else np.zeros(0, np.int64)
        if len(lengths) and lengths[0]:
            wish, _ = wish_of(corpus.document(Piece(source, 0, 0, 0, int(lengths[0]))), name="")
            return [grid for grid in wish.grids if not grid.condition][:1]
    raise ConfigError(
        "the size of a picture is not known",
        why="the run has no held-out document",
        fix="name held-out shards",
    )


def _write(made: Sequence[Made], name: str, out: Path) -> dict[str, Any]:
    """The sheet and the layers of one source; gives its entry in samples.json."""
    from PIL import Image

    safe = name.replace("/", "-")
    Image.fromarray(sheet(made)).save(out / f"{safe}.png")
    for item in made:
        for which, layers in (("made", item.made), ("true", item.true)):
            folder = out / safe / which / item.key.replace("/", "-")
            for number, layer in enumerate(layers):
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(layer).save(folder / f"layer{number}.png")
    shown = "; ".join(item.prompt for item in made if item.prompt)
    return {
        "modality": "rgba", "source": name, "file": f"{safe}.png", "documents": len(made),
        "prompt": f"{name}: given | made | true" + (f" ({shown[:400]})" if shown else ""),
        "words": [item.prompt for item in made],
    }  # fmt: skip
