"""The diffusion stage of `ringweave demo`: a DiT on layered scenes, exported to diffusers, its mattes measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from ringweave.pretrain.config import load_config
from ringweave.pretrain.run_folder import write_json

RECIPE = Path(__file__).parent / "recipes" / "demo_dit.yaml"
#: Held-out scenes whose mattes are measured, and pictures shown of each kind.
MEASURED, SHOWN = 32, 4
#: Held-out tokens of each task that are evaluated, at eight noise levels.
EVALUATED = 4000
#: Steps of the autoencoder of layers; the closed form has none.
VAE_STEPS = 450
#: The source of the demo data that the stage trains on, and how many of its records the autoencoder sees.
SOURCE, SCENES_LEARNED = "scenes", 400


def settings(out: Path) -> list[str]:
    """The overrides of the recipe for a demo in `out`."""
    return [f"run.dir={out / 'dit'}", f"tokenizers.dir={out / 'tokenizers'}", f"data.dir={out / 'data'}"]


def learn_latents(out: Path, folder: Path, progress: Callable[..., None]) -> None:
    """Train the autoencoder of layers on the drawings and the scenes, into the set in `folder`."""
    from ringweave.launch.commands_data import records_by_source
    from ringweave.tokenizers.learn_run import learn_codecs
    from ringweave.tokenizers.learn_vae import VaeSchedule

    records = records_by_source(out / "data", "train")
    layers = [*records["rgba"], *islice(records[SOURCE], SCENES_LEARNED)]
    learn_codecs(
        {"rgba": layers}, folder, names=["latents"], schedule=VaeSchedule(steps=VAE_STEPS), progress=progress
    )  # fmt: skip


def run_stage(out: Path, train: Callable[[list[str]], None]) -> dict[str, Any]:
    """Train by the recipe (`train` gets the overrides), export, measure, draw; gives `dit` of proof.json.

    Pictures go to `out/samples` beside those of the decoder.
    """
    from ringweave.pretrain.evaluate import evaluate_run
    from ringweave.pretrain.export_dit import export_diffusion
    from ringweave.pretrain.matting_figures import matting_of_run

    overrides = settings(out)
    config = load_config(RECIPE, overrides)
    run = out / "dit"
    train(overrides)
    exported = export_diffusion(run)
    heldout = evaluate_run(run, max_tokens_per_source=EVALUATED)["heldout"]
    figures, made = matting_of_run(run, source="scenes/matting", count=MEASURED)
    _pictures(out, run, made[:SHOWN])
    return {
        "export": {name: exported[name] for name in ("class", "max_rel_output_diff")},
        "val_loss_by_sigma": heldout["rgba"]["by_sigma"],
        "untrained_loss_by_sigma": heldout["rgba"]["untrained_by_sigma"],
        "matting": {name: round(figures[name], 4) for name in ("sad", "baseline_sad")},
        "parameters": exported["parameters"],
        "steps": config.total_steps,
    }


def _pictures(out: Path, run: Path, made: list[Any]) -> None:
    """The mattes and a few drawings made of words, as sheets beside the decoder's samples."""
    from PIL import Image

    from ringweave.pretrain.sample_dit import sample_diffusion, sheet

    folder = out / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet(made)).save(folder / "dit-matting.png")
    drawn = sample_diffusion(run, (), run / "samples", sources=["scenes/text_to_foreground"], count=SHOWN)
    (entry,) = drawn["samples"]
    (folder / "dit-drawings.png").write_bytes((run / "samples" / entry["file"]).read_bytes())
    listed = folder / "samples.json"
    entries = json.loads(listed.read_text()) if listed.is_file() else []
    entries += [
        {"modality": "rgba", "file": "dit-matting.png", "prompt": "cut out: scene | matte made | true matte"},
        {
            "modality": "rgba",
            "file": "dit-drawings.png",
            "prompt": "drawn of words: made | true (" + "; ".join(entry["words"]) + ")",
        },
    ]
    write_json(listed, entries)


def broken(dit: dict[str, Any]) -> list[str]:
    """Which claims of the stage do not hold, in words."""
    bad = [
        f"dit: held-out loss at sigma {level} is {loss:.3f}, untrained {dit['untrained_loss_by_sigma'][level]:.3f}"
        for level, loss in dit["val_loss_by_sigma"].items()
        if not loss < dit["untrained_loss_by_sigma"][level]
    ]
    if dit["export"]["max_rel_output_diff"] > 5e-5:
        bad.append(f"dit: exported outputs differ by {dit['export']['max_rel_output_diff']:.1e}")
    return bad


def summary(dit: dict[str, Any]) -> str:
    """The line that a person reads at the end."""
    losses, first = list(dit["val_loss_by_sigma"].values()), list(dit["untrained_loss_by_sigma"].values())
    mean, start = sum(losses) / len(losses), sum(first) / len(first)
    matte = dit["matting"]
    return (
        f"layers   {dit['export']['class']} in diffusers, outputs within {dit['export']['max_rel_output_diff']:.1e}; "
        f"held-out flow loss {start:.2f} -> {mean:.2f}; mattes: SAD {matte['sad']:.3f}, best threshold "
        f"{matte['baseline_sad']:.3f}"
    )
