"""The top of the page: how the run ended, the verdict sentence, the claims and the first facts."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from ringweave.pretrain.report.inputs import Inputs
from ringweave.pretrain.report.markup import facts, icon, tile
from ringweave.pretrain.report.metric_lines import finite as num
from ringweave.pretrain.report.safe_text import text
from ringweave.pretrain.report.verdict import Claim, joined, judge
from ringweave.pretrain.report.words import context_name, count, duration, plural, short
from ringweave.tokenizers.errors import (
    EXIT_CONFIG,
    EXIT_DATA,
    EXIT_HANG,
    EXIT_NONFINITE,
    EXIT_RESUMABLE,
    EXIT_STORAGE,
)

EXITS = {
    0: "finished", EXIT_RESUMABLE: "stopped (resumable)", EXIT_CONFIG: "failed (configuration)",
    EXIT_DATA: "failed (data)", EXIT_NONFINITE: "failed (loss or gradient not finite)",
    EXIT_HANG: "failed (hang)",
    EXIT_STORAGE: "failed (storage)",
}  # fmt: skip


def exit_words(inputs: Inputs) -> tuple[str, str]:
    """(state, words) of how the run ended, from exit.json, else from the last stop record."""
    code = num(inputs.get("exit.json").get("exit_code"))
    if code is None and inputs.history.attempts:
        code = num(inputs.history.attempts[-1].exit_code)
    if code is None:
        return "none", "no end recorded"
    return ("good" if code == 0 else "warn" if code == EXIT_RESUMABLE else "bad"), EXITS.get(
        int(code), f"failed (exit {code:.0f})"
    )


def _sentence(inputs: Inputs, claims: Sequence[Claim]) -> str:
    h = inputs.history
    state, ended = exit_words(inputs)
    if not h.steps and state == "none":
        return "Nothing is recorded of this run yet."
    start = f"The run {ended}" if state != "none" else "The run has no recorded end; its log reaches"
    if h.steps:
        start += " after" if state != "none" else ""
        start += f" {plural(h.steps[-1].step, 'step')} and {short(h.tokens)} tokens"
        contexts = list(dict.fromkeys(context_name(s.context) for s in h.stages))
        start += f" with its context grown from {contexts[0]} to {contexts[-1]}" if len(contexts) > 1 else ""
    good = [c.clause for c in claims if c.state == "good"]
    bad = [c.clause for c in claims if c.state in ("bad", "warn")]
    unknown = [c.clause for c in claims if c.state == "none"]
    told = start + (": " + joined(good) if good else "")
    told += ("; but " if good else ": ") + joined(bad) if bad else ""
    return told + ("; " + joined(unknown) if unknown and len(unknown) < 4 else "") + "."


def _date(seconds: float | None) -> str:
    try:
        return (
            datetime.fromtimestamp(seconds or 0, UTC).strftime("%d %B %Y, %H:%M UTC").lstrip("0")
            if seconds
            else ""
        )
    except (ValueError, OverflowError, OSError):
        return ""


def header(inputs: Inputs) -> str:
    h, claims = inputs.history, judge(inputs)
    first = next((a.began for a in h.attempts if a.began is not None), None)
    when = _date(first)
    state, ended = exit_words(inputs)
    kicker = f"ringweave run report · <b>{text(inputs.run_dir.resolve().name)}</b>" + (
        f" · {text(when)}" if when else ""
    )
    tiles = "".join(tile(state=c.state, claim=c.title, figure=c.figure, detail=c.detail) for c in claims)
    proof = inputs.get("proof.json")
    params = next(
        (num(a.start.get("params")) for a in reversed(h.attempts) if num(a.start.get("params"))), None
    )
    took = (
        max(a.ended for a in h.attempts if a.ended is not None) - first
        if first is not None
        else num(proof.get("seconds"))
    )
    memory = num(proof.get("peak_rss_gib"))
    pairs = [
        ("Steps", count(h.steps[-1].step) if h.steps else "–"),
        ("Tokens", short(h.tokens) if h.steps else "–"),
        ("Parameters", short(params)),
        ("Context", " → ".join(context_name(s.context) for s in h.stages) or "–"),
        ("Wall time", duration(took)),
        ("Restarts", count(max(0, len(h.attempts) - 1)) if h.attempts else "–"),
        ("Peak memory", f"{memory:.2f} GiB" if memory is not None else "not measured"),
    ]
    return (
        f'<p class="kicker">{kicker} · {icon(state)} {text(ended)}</p>'
        f'<h1 class="verdict">{text(_sentence(inputs, claims))}</h1>'
        f'<div class="tiles">{tiles}</div>{facts(pairs)}'
    )
