"""Section "Tokenizer figures": what was measured of each tokenizer on held-out shards."""

from __future__ import annotations

from ringweave.pretrain.report.inputs import Inputs
from ringweave.pretrain.report.markup import missing, swatch, table
from ringweave.pretrain.report.safe_text import text
from ringweave.pretrain.report.style import COLOURS, ordered
from ringweave.pretrain.report.values import flat, metric_words, shown, unit_of


def tokenizers_section(inputs: Inputs) -> tuple[str, str]:
    figures = inputs.get("tokenizers/figures.json")
    rows = [(name, key, value) for name in ordered(figures) for key, value in flat(figures[name])]
    proof = inputs.get("proof.json", "tokenizers")
    if not rows:
        rows = [(k.split("_")[0] if k.split("_")[0] in COLOURS else "", k, v) for k, v in flat(proof)]
    if not rows:
        return "", missing("tokenizer figures", "`ringweave tokenizer train` writes them.")
    body = ""
    for name in dict.fromkeys(r[0] for r in rows):
        cells = [
            (metric_words(key or name), f"{shown(value)} {unit_of(key)}".strip())
            for who, key, value in rows
            if who == name
        ]
        body += f"<div><h3 class='sub'>{swatch(name)}{text(name or 'all')}</h3>{table(('', ''), cells)}</div>"
    return "Measured on held-out shards.", f'<div class="multi">{body}</div>'
