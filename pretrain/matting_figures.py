"""How well a diffusion run cuts drawings out of held-out scenes: SAD beside the best threshold on luminance."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ringweave.data_pipes.layer_documents import layers_of
from ringweave.data_pipes.layer_views import pictures_of
from ringweave.data_pipes.store import reader_of
from ringweave.pretrain.config import RunConfig
from ringweave.pretrain.data_store import data_specs, store_of
from ringweave.pretrain.dit_sample import SampleSettings
from ringweave.pretrain.errors import ConfigError
from ringweave.pretrain.export import load_run, same_vocabulary
from ringweave.pretrain.job import open_corpus
from ringweave.pretrain.models.dit import DiT
from ringweave.pretrain.rgba_metrics import matting, threshold_baseline
from ringweave.pretrain.sample_dit import Made, make_heldout
from ringweave.tokenizers.manifest import VocabularyManifest
from ringweave.tokenizers.set import TokenizerSet

U8 = NDArray[np.uint8]


def heldout_layers(config: RunConfig, source: str) -> dict[str, list[U8]]:
    """{key: layers uint8 [H, W, 4], bottom first} of a source's held-out records, as they were drawn."""
    found: dict[str, list[U8]] = {}
    for spec in data_specs(config.data, store_of(config), heldout=True):
        for shard in spec.shards if spec.name == source else ():
            with reader_of(shard) as reader:
                for number in range(len(reader)):
                    sample = reader.read(number)
                    found[sample.key] = layers_of(sample)
    return found


def matting_figures(made: Sequence[Made], records: dict[str, list[U8]]) -> dict[str, float]:
    """{"sad", "baseline_sad", "mse", "documents"} over whole pictures: the alpha that was made against the true one.

    baseline_sad: of the alpha that the one threshold on the composites' luminance gives that is best over these very
    documents, either way round; it knows the answers, which the model does not.
    """
    pictures, alphas, sads, errors = [], [], [], []
    for item in made:
        layers = records[item.key]
        (_, composite), *_ = pictures_of(layers, "composite", key=item.key)
        (_, foreground), *_ = pictures_of(layers, "foreground", key=item.key)
        true = foreground[..., 3]
        mine = item.made[-1][: true.shape[0], : true.shape[1], 3]
        figures = matting(mine, true, where=item.key)
        sads.append(figures["sad"])
        errors.append(figures["mse"])
        pictures.append(composite[..., :3])
        alphas.append(true)
    baseline = threshold_baseline(pictures, alphas)
    return {
        "sad": float(np.mean(sads)),
        "baseline_sad": baseline.sad,
        "mse": float(np.mean(errors)),
        "documents": len(made),
    }


def matting_of_run(
    run_dir: Path, *, source: str, count: int = 32, settings: SampleSettings | None = None
) -> tuple[dict[str, float], list[Made]]:
    """Figures of the newest checkpoint on the first `count` held-out documents of a matting source, and what it made.

    Raises ConfigError for a run of another kind.
    """
    model, saved, config = load_run(run_dir)
    if not isinstance(model, DiT):
        raise ConfigError(
            "this run is no diffusion run", where=str(run_dir), why=f"kind: {config.model.kind}"
        )
    same_vocabulary(saved, Path(config.tokenizers.dir))
    tokenizers = TokenizerSet.load(Path(config.tokenizers.dir))
    manifest = VocabularyManifest.load(Path(config.tokenizers.dir) / "tokenizers.json")
    settings = settings or SampleSettings(steps=8, guidance=1.0, seed=config.run.seed)
    with closing(open_corpus(config, manifest, heldout=True)) as corpus:
        made = make_heldout(model, corpus, config, tokenizers, source=source, count=count, settings=settings)
    return matting_figures(made, heldout_layers(config, source)), made
