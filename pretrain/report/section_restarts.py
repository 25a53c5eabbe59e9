"""Section "Restarts": attempts over time, steps trained twice, warnings."""

from __future__ import annotations

from ringweave.pretrain.report.bar_charts import Bar, timeline
from ringweave.pretrain.report.history import Attempt, RunHistory
from ringweave.pretrain.report.inputs import Inputs
from ringweave.pretrain.report.markup import figure, icon, missing
from ringweave.pretrain.report.metric_lines import finite as num
from ringweave.pretrain.report.safe_text import text
from ringweave.pretrain.report.words import duration, number, plural

_MOST_BARS = 24


def restarts_section(inputs: Inputs) -> tuple[str, str]:
    h = inputs.history
    timed = [a for a in h.attempts if a.began is not None and a.ended is not None]
    if not timed:
        return "", missing("attempts", "metrics.jsonl holds no start record with a time.")
    zero = min(a.began or 0.0 for a in timed)
    bars = [_bar(h, a, zero=zero, last=a is timed[-1]) for a in timed[-_MOST_BARS:]]
    caption = (
        "Pale: start-up. Solid: training. Hatched: steps that had to be trained again. Cross: ended without "
        "a stop record (killed). Triangles: checkpoints."
        + (f" The first {len(timed) - _MOST_BARS} attempts are not drawn." if len(timed) > _MOST_BARS else "")
    )
    body = figure(f'<div class="wide-chart">{timeline(bars)}</div>', caption)
    diff = h.repeated_loss_diff()
    if diff is not None:
        body += (
            f'<p class="note">{plural(len(h.repeated), "step")} ran twice; the largest difference between '
            f"the two losses is <b>{number(diff)}</b>.</p>"
        )
    for w in h.warnings[-20:]:
        said = f"Step {text(w.get('step', '?'))}: {text(w.get('what', ''))}"
        body += f'<div class="alert warn">{icon("warn")} {said}</div>'
    if len(h.attempts) == 1:
        return "One attempt, no restart.", body
    lost = (
        f"{plural(len(h.superseded), 'step')} ({duration(h.wasted_seconds())}) trained again"
        if h.superseded
        else "nothing trained twice"
    )
    return f"{plural(len(h.attempts), 'attempt')}, {lost}.", body


def _bar(h: RunHistory, a: Attempt, *, zero: float, last: bool) -> Bar:
    """The bar of an attempt that has both times, in seconds after `zero`; `last`: no later one is timed."""
    began, ended = a.began or 0.0, a.ended or 0.0
    mine = [s for s in (*h.superseded, *h.steps) if s.attempt == a.number and s.time is not None]
    mine.sort(key=lambda s: s.step)
    begun = (mine[0].time or 0.0) - mine[0].wall if mine else ended
    again = None
    if a.steps_again:
        again = max((s.time or 0.0 for s in mine if s.step <= (a.kept_step or a.start_step)), default=begun)
    saved = [num(c.get("time")) for c in h.checkpoints if c.get("attempt") == a.number]
    return Bar(
        f"attempt {a.number}",
        _outcome(a, last=last),
        began - zero,
        max(began, begun) - zero,
        ended - zero,
        None if again is None else max(again, begun) - zero,
        killed=a.stop_reason is None and not last,
        checkpoints=[t - zero for t in saved if t is not None],
    )


def _outcome(a: Attempt, *, last: bool) -> str:
    """Where an attempt came from, what it trained and how it ended, in words."""
    ended = a.stop_reason if a.stop_reason is not None else ("no stop record" if last else "killed")
    code = f" (exit {a.exit_code})" if a.exit_code is not None else ""
    span = f"steps {a.start_step + 1:,}–{a.last_step:,}" if a.last_step is not None else "no step"
    twice = f", {a.steps_again:,} of them trained again" if a.steps_again else ""
    source = f"resumed from {a.resumed_from}, " if a.resumed_from else ""
    return f"{source}{span}{twice}, {ended}{code}"
