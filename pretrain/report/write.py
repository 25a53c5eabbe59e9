"""One self-contained HTML page about a run: the sections in order, written atomically.

The page has no script and no external address, works in light and dark, and stays below LARGEST bytes
(pictures that no longer fit are named instead).
"""

from __future__ import annotations

import os
from pathlib import Path

from ringweave.pretrain.report.header import header
from ringweave.pretrain.report.inputs import load_inputs
from ringweave.pretrain.report.markup import page, section
from ringweave.pretrain.report.section_data import data_section
from ringweave.pretrain.report.section_environment import environment_section
from ringweave.pretrain.report.section_layers import layers_section
from ringweave.pretrain.report.section_layouts import layouts_section
from ringweave.pretrain.report.section_loss import loss_section
from ringweave.pretrain.report.section_pictures import pictures_section
from ringweave.pretrain.report.section_restarts import restarts_section
from ringweave.pretrain.report.section_samples import samples_section
from ringweave.pretrain.report.section_speed import speed_section
from ringweave.pretrain.report.section_tokenizers import tokenizers_section
from ringweave.tokenizers.errors import UserError

LARGEST = 3_000_000  # bytes of the page
SECTIONS = (
    ("loss", "Loss"),
    ("speed", "Throughput"),
    ("restarts", "Restarts"),
    ("data", "Data"),
    ("pictures", "Decodings"),
    ("samples", "Samples"),
    ("layers", "Layers"),
    ("tokenizers", "Tokenizers"),
    ("layouts", "Layouts"),
    ("environment", "Environment"),
)

_BUILDERS = {
    "loss": ("Loss by modality", loss_section), "speed": ("Throughput and time", speed_section),
    "restarts": ("Restarts", restarts_section),
    "data": ("Packing and data mix", data_section), "pictures": ("Originals and decodings", pictures_section),
    "samples": ("Samples", samples_section), "layers": ("Layers, by diffusion", layers_section),
    "tokenizers": ("Tokenizer figures", tokenizers_section),
    "layouts": ("Layouts and laws", layouts_section),
    "environment": ("Environment and configuration", environment_section),
}  # fmt: skip


def render(run_dir: Path) -> str:
    """The whole page as text."""
    inputs = load_inputs(run_dir)
    body, nav = [], []
    for slug, name in SECTIONS:
        title, build = _BUILDERS[slug]
        lede, content = build(inputs)
        if not content:  # what this run does not have at all
            continue
        nav.append((slug, name))
        body.append(section(len(nav), slug, title, lede, content))
    return page(
        title=f"{run_dir.resolve().name} · ringweave report",
        nav=nav,
        header_html=header(inputs),
        body_html="\n".join(body),
        footer_html="Written by <code>ringweave report</code>. One file, no script, nothing loaded.",
    )


def write_report(run_dir: Path, *, out: Path | None = None) -> Path:
    """Write the report of `run_dir` to `out` (default `run_dir/report.html`), atomically; returns its path.

    Raises UserError when `run_dir` is not a folder. Missing or damaged inputs are told on the page.
    """
    if not run_dir.is_dir():
        raise UserError("No such run folder", where=str(run_dir), fix="ringweave report runs/NAME")
    out = out or run_dir / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        part.write_bytes(render(run_dir).encode("utf-8", errors="replace"))
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    return out
