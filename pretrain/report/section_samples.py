"""Section "Samples": what the trained model wrote, with its prompts."""

from __future__ import annotations

import re

from ringweave.pretrain.report.inputs import Inputs, mappings
from ringweave.pretrain.report.markup import missing, swatch
from ringweave.pretrain.report.media import beginning, inside, media
from ringweave.pretrain.report.safe_text import text
from ringweave.pretrain.report.section_previews import previews


def samples_section(inputs: Inputs) -> tuple[str, str]:
    """What the run's end gives, then the previews of its stages."""
    lede, content = _samples(inputs)
    stages = previews(inputs)
    if not stages:
        return lede, content
    if not lede:  # nothing but previews
        content = ""
    return " ".join(
        (lede, "Below: the model as it was at the end of each stage, with the same noise.")
    ).strip(), (content + stages)


def _samples(inputs: Inputs) -> tuple[str, str]:
    folder, listed = inputs.run_dir / "samples", inputs.files.get("samples/samples.json")
    items = mappings(listed)
    if not items and folder.is_dir():
        items = [
            {"file": p.name}
            for p in sorted(folder.iterdir())
            if p.suffix.lower() in (".txt", ".png", ".jpg", ".wav", ".flac", ".ogg")
        ]
    if not items:
        return "", missing("samples", "None were drawn from the trained model.")
    cards = ""
    for item in items[:48]:
        file = str(item.get("file") or "")
        name = str(item.get("modality") or re.split(r"[^A-Za-z]", file, maxsplit=1)[0] or "sample")
        prompt = item.get("prompt")
        who = f"{swatch(name)}<b>{text(name)}</b>" + (
            f' <span class="prompt">prompt: {text(prompt)}</span>' if prompt not in (None, "") else ""
        )
        if file and not file.lower().endswith(".txt"):
            content = media(inputs, folder / file, alt=f"sample of {name}", room=400)
        elif file:
            found = inside(inputs, folder / file)
            content = (
                f'<div class="body">{text(beginning(folder / file))}</div>'
                if found
                else missing(f"{file} is absent or lies outside the run folder")
            )
        else:
            content = f'<div class="body">{text(str(item.get("text", ""))[:6000])}</div>'
        cards += f'<article class="card"><p class="who">{who}</p>{content}</article>'
    more = f" The first 48 of {len(items)} are shown." if len(items) > 48 else ""
    return (
        f"Drawn from the model as it stands at the end, not picked.{more}",
        f'<div class="samples">{cards}</div>',
    )
