"""Sampling from a run's export with transformers: text as text, images as PNG.

Ids of a modality are drawn under its grammar (which block may follow, where a row ends), so what comes out
always decodes.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ringweave.pretrain.errors import ConfigError
from ringweave.pretrain.export import export_run
from ringweave.pretrain.run_folder import write_json
from ringweave.tokenizers.manifest import BOS, CONTROL, EOS, VocabularyManifest
from ringweave.tokenizers.set import TokenizerSet

TEXT_PROMPTS = ("And it came to pass, that ", "In the beginning ")
IMAGE_PROMPTS = ("red circle", "smiling face", "a photograph: astronaut")
GRID = 8  # rows and columns of codes of a sampled image: 64 x 64 pixels

#: The ids allowed at the next place.
Allowed = NDArray[np.int64]


class Sampler:
    """A loaded export: draws ids one at a time under a list of allowed ids, with a key-value cache."""

    def __init__(self, export: Path, *, temperature: float = 0.8, top_k: int = 40, seed: int = 0) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
        self.tokenizers = TokenizerSet.load(export / "ringweave_tokenizers")
        self.temperature, self.top_k = temperature, top_k
        # transformers renamed the argument in 5.2x; older versions know only the first name.
        known = inspect.signature(type(self.model).forward).parameters
        self._cache_argument = "cache" if "cache" in known else "past_key_values"
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def manifest(self) -> VocabularyManifest:
        """The vocabulary of the export."""
        return self.tokenizers.manifest

    def block(self, name: str) -> Allowed:
        """All ids of a block."""
        b = self.manifest.block(name)
        return np.arange(b.start, b.start + b.size)

    @torch.no_grad()
    def draw(self, prompt: Sequence[int], plan: Sequence[Allowed], *, stop: int | None = None) -> list[int]:
        """Continue `prompt` with one id for each entry of `plan`, drawn among its ids; ends early at `stop`."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        step = torch.tensor([list(prompt)])
        out: list[int] = []
        for allowed in plan:
            if len(allowed) == 1:
                choice = int(allowed[0])
                out.append(choice)
                step = torch.cat([step, torch.tensor([[choice]])], dim=1)
                continue
            logits = self.model(step, **{self._cache_argument: cache}, use_cache=True).logits
            choice = self._choose(logits[0, -1], torch.from_numpy(allowed))
            out.append(choice)
            if choice == stop:
                break
            step = torch.tensor([[choice]])
        return out

    def _choose(self, logits: Tensor, allowed: Tensor) -> int:
        scores = logits[allowed] / self.temperature
        best = torch.topk(scores, min(self.top_k, len(allowed)))
        picked = torch.multinomial(torch.softmax(best.values, 0), 1, generator=self.generator)
        return int(allowed[best.indices[picked]])


def sample_run(
    run_dir: Path, prompts: Sequence[str], modalities: Sequence[str], out: Path, *, tokens: int = 96
) -> dict[str, Any]:
    """Sample `modalities` (default text and image) from a run's export, made if it is missing.

    Writes `text-N.txt`, `image-N.png` and `samples.json` into `out`; gives {"samples": [{modality, prompt, …}]}.
    """
    wanted = list(modalities) or ["text", "image"]
    unknown = [m for m in wanted if m not in ("text", "image")]
    if unknown:
        raise ConfigError(f"cannot sample {', '.join(unknown)} yet", where="--modality", fix="text or image")
    export = run_dir / "export"
    if not (export / "export.json").is_file():
        export_run(run_dir)
    sampler = Sampler(export)
    out.mkdir(parents=True, exist_ok=True)
    samples: list[dict[str, Any]] = []
    if "text" in wanted:
        samples += [_text(sampler, p, i, out, tokens) for i, p in enumerate(prompts or TEXT_PROMPTS)]
    if "image" in wanted:
        samples += [_image(sampler, p, i, out) for i, p in enumerate(prompts or IMAGE_PROMPTS)]
    write_json(out / "samples.json", samples)
    return {"samples": samples, "path": str(out)}


def _text(sampler: Sampler, prompt: str, number: int, out: Path, tokens: int) -> dict[str, Any]:
    """Go on from `prompt`."""
    ids = [BOS, *sampler.tokenizers.text_segment(prompt).ids.tolist()]
    allowed = np.concatenate([sampler.block("text"), [EOS]])
    drawn = sampler.draw(ids, [allowed] * tokens, stop=EOS)
    text = prompt + _decoded(sampler, drawn, "text", "")
    (out / f"text-{number}.txt").write_text(text, encoding="utf-8")
    return {"modality": "text", "prompt": prompt, "text": text, "ids": len(drawn)}


def _image(sampler: Sampler, prompt: str, number: int, out: Path) -> dict[str, Any]:
    """Draw the image that a caption asks for."""
    from PIL import Image

    ids = [BOS, *sampler.tokenizers.text_segment(prompt).ids.tolist()]
    codes, eol = sampler.block("image"), np.array([CONTROL["eol"]])
    plan = [np.array([CONTROL["boi"]]), *([codes] * GRID + [eol]) * GRID, np.array([CONTROL["eoi"]])]
    drawn = sampler.draw(ids, plan)
    pixels = _decoded(sampler, drawn, "image", None)
    name = f"image-{number}.png"
    Image.fromarray(pixels).save(out / name)
    return {"modality": "image", "prompt": prompt, "file": name, "ids": len(drawn)}


def _decoded(sampler: Sampler, ids: Sequence[int], modality: str, missing: Any) -> Any:
    """The value of the first part of that modality in an id stream."""
    for part in sampler.tokenizers.decode(np.asarray(ids, np.int32)):
        if part.modality == modality:
            return part.value
    return missing
