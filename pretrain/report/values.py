"""Names and values of JSON files as cells of a table."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ringweave.pretrain.report.metric_lines import finite as num
from ringweave.pretrain.report.safe_text import text
from ringweave.pretrain.report.words import count

_UNITS = (("psnr", "dB"), ("sdr", "dB"), ("snr", "dB"), ("seconds", "s"))


def flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Nested mappings as dotted names with their values."""
    if isinstance(value, Mapping):
        return [pair for k, v in value.items() for pair in flat(v, f"{prefix}{'.' if prefix else ''}{k}")]
    return [(prefix, value)]


def shown(value: Any) -> str:
    """A number as measured; whole numbers stay whole; other values as text."""
    if isinstance(value, bool) or num(value) is None:
        return text("–" if value is None else value)
    return count(value) if isinstance(value, int) and abs(value) < 1e15 else f"{value:.4g}"


def metric_words(key: str) -> str:
    """`image_psnr` as words: "image PSNR"."""
    words = key.replace("si_sdr", "SI-SDR").replace("_", " ").replace(".", " · ")
    return text(
        re.sub(r"\b(psnr|ssim|f1|rgb|mse|iou|snr)\b", lambda m: m[0].upper(), words).replace(" gib", " GiB")
    )


def unit_of(key: str) -> str:
    return next((f"<small>{u}</small>" for part, u in _UNITS if part in key), "")
