"""Section "Originals and decodings": held-out samples beside what the tokenizers give back."""

from __future__ import annotations

import re
from pathlib import Path

from ringweave.pretrain.report.inputs import Inputs
from ringweave.pretrain.report.markup import missing, swatch
from ringweave.pretrain.report.media import beginning, inside, media
from ringweave.pretrain.report.safe_text import text
from ringweave.pretrain.report.style import ordered


def pictures_section(inputs: Inputs) -> tuple[str, str]:
    folder = inputs.run_dir / "tokenizers" / "show"
    files = (
        sorted(
            p
            for p in folder.glob("*")
            if p.suffix.lower() in (".png", ".jpg", ".wav", ".flac", ".ogg", ".txt")
        )
        if folder.is_dir()
        else []
    )
    if not files:
        return "", missing("originals and decodings", "`ringweave tokenizer show` draws them.")
    groups: dict[str, list[Path]] = {}
    for p in files:
        groups.setdefault(re.split(r"[^A-Za-z]", p.stem, maxsplit=1)[0].lower(), []).append(p)
    body = ""
    for name in ordered(groups):
        inner = ""
        for p in groups[name]:
            if p.suffix.lower() == ".txt" and inside(inputs, p):
                inner += f'<pre class="body">{text(beginning(p))}</pre>'
            else:
                inner += (
                    f'<p class="note">{text(p.stem)}</p>' if p.suffix.lower() not in (".png", ".jpg") else ""
                )
                inner += media(inputs, p, alt=f"{name}: original beside decoding ({p.stem})")
        body += f"<div><h3>{swatch(name)}{text(name)}</h3>{inner}</div>"
    lede = (
        "Held-out originals beside what comes back after encoding to ids and decoding. This bounds what the "
        "model can say."
    )
    return lede, f'<div class="pics">{body}</div>'
