"""What several charts share: context stages and restarts over tokens, and the legend of colours."""

from __future__ import annotations

from collections.abc import Mapping

from ringweave.pretrain.report.history import RunHistory
from ringweave.pretrain.report.plot import Band, Mark
from ringweave.pretrain.report.safe_text import text
from ringweave.pretrain.report.words import context_name


def stage_bands(h: RunHistory, *, levels: bool = False) -> list[Band]:
    return [
        Band(
            s.tokens_begin,
            s.tokens_end,
            f"{context_name(s.context)} context",
            " → ".join(s.layouts) or "layout not logged",
            s.tokens_per_s if levels else None,
        )
        for s in h.stages
    ]


def restart_marks(h: RunHistory) -> list[Mark]:
    return [
        Mark(h.tokens_at(a.start_step), f"attempt {a.number} goes on after step {a.start_step}")
        for a in h.attempts[1:]
    ]


def legend(colours: Mapping[str, str]) -> str:
    items = "".join(
        f'<span><i class="sw" style="background:{c}"></i>{text(k)}</span>' for k, c in colours.items()
    )
    return f'<div class="legend">{items}</div>'
