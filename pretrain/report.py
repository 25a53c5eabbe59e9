"""`ringweave report RUN`: one self-contained HTML page about a run, from the files in its folder.

Every input is optional; what is absent is said on the page and never guessed. The page has no script and no
external address, works in light and dark, and stays below LARGEST bytes (pictures that no longer fit are
named instead).

Inputs of the run folder: metrics.jsonl · exit.json · config.yaml · proof.json · verify.json ·
export/export.json · tokenizers/figures.json · tokenizers/show/* · samples/*. The verdict is judged here
(`judge`); charts are drawn in `report_charts`; text is made safe and styled in `report_style`.
"""

from __future__ import annotations

import base64
import json
import os
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ringweave.pretrain import report_charts as charts
from ringweave.pretrain.metrics_log import TIME_PARTS, RunHistory, layout_name, read_metrics
from ringweave.pretrain.metrics_log import finite as num
from ringweave.pretrain.report_style import (
    COLOURS,
    OTHER_COLOUR,
    context_name,
    count,
    details,
    duration,
    facts,
    figure,
    icon,
    missing,
    number,
    page,
    percent,
    plural,
    section,
    short,
    swatch,
    table,
    text,
    tile,
)
from ringweave.tokenizers.errors import (
    EXIT_CONFIG,
    EXIT_DATA,
    EXIT_HANG,
    EXIT_NONFINITE,
    EXIT_RESUMABLE,
    EXIT_STORAGE,
    UserError,
)

LARGEST = 3_000_000  # bytes of the page
MEDIA_BUDGET = 2_300_000  # of them for pictures and sound, as base64
LOSS_LIMIT, GRAD_LIMIT, LOGIT_LIMIT = 1e-6, 1e-5, 1e-5  # laws 2 and 5: relative, relative, absolute in fp32
EXITS = {
    0: "finished", EXIT_RESUMABLE: "stopped (resumable)", EXIT_CONFIG: "failed (configuration)",
    EXIT_DATA: "failed (data)", EXIT_NONFINITE: "failed (loss or gradient not finite)",
    EXIT_HANG: "failed (hang)",
    EXIT_STORAGE: "failed (storage)",
}  # fmt: skip
SECTIONS = (
    ("loss", "Loss"),
    ("speed", "Throughput"),
    ("restarts", "Restarts"),
    ("data", "Data"),
    ("pictures", "Decodings"),
    ("samples", "Samples"),
    ("tokenizers", "Tokenizers"),
    ("layouts", "Layouts"),
    ("environment", "Environment"),
)


# --- inputs -----------------------------------------------------------------------------------------------


@dataclass
class Inputs:
    """What the run folder holds. `notes`: (file, what was found) of every input; `media_left`: bytes."""

    run_dir: Path
    history: RunHistory
    files: dict[str, Any] = field(default_factory=dict)
    notes: list[tuple[str, str]] = field(default_factory=list)
    config: str = ""
    media_left: int = MEDIA_BUDGET

    def get(self, name: str, *keys: str) -> dict[str, Any]:
        """The mapping at `keys` of a JSON input; {} when the file or a key is absent or of another type."""
        value = self.files.get(name)
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return dict(value) if isinstance(value, Mapping) else {}

    def heldout(self) -> dict[str, dict[str, Any]]:
        """Held-out figures by modality: proof.json's, else those of the last evaluation."""
        proof = {k: dict(v) for k, v in self.get("proof.json", "heldout").items() if isinstance(v, Mapping)}
        if proof or not self.history.evaluations:
            return proof
        return dict(self.history.evaluations[-1].heldout)


def load_inputs(run_dir: Path) -> Inputs:
    """Read everything small. Damaged JSON becomes a note on the page, not an exception."""
    inputs = Inputs(run_dir=run_dir, history=read_metrics(run_dir))
    h = inputs.history
    found = f"{plural(h.lines, 'line')}, {plural(len(h.bad_lines), 'bad line')}" + (
        ", last line torn" * h.torn_tail
    )
    inputs.notes.append(("metrics.jsonl", found if h.found else "absent"))
    names = (
        "exit.json",
        "proof.json",
        "verify.json",
        "export/export.json",
        "tokenizers/figures.json",
        "samples/samples.json",
    )
    for name in names:
        try:
            inputs.files[name] = json.loads((run_dir / name).read_text(encoding="utf-8"))
            inputs.notes.append((name, "read"))
        except FileNotFoundError:
            inputs.notes.append((name, "absent"))
        except (OSError, ValueError, RecursionError) as error:
            inputs.notes.append((name, f"unreadable: {type(error).__name__}"))
    try:
        inputs.config = (run_dir / "config.yaml").read_text(encoding="utf-8", errors="replace")
        inputs.notes.append(("config.yaml", "read"))
    except OSError:
        inputs.notes.append(("config.yaml", "absent"))
    return inputs


def mappings(value: Any) -> list[Mapping[str, Any]]:
    """The mappings of a list; [] for anything else."""
    return [v for v in value if isinstance(v, Mapping)] if isinstance(value, list) else []


# --- verdict ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """One judged claim: `state` good | warn | bad | none; `clause` joins the verdict sentence."""

    state: str
    title: str
    figure: str
    detail: str
    clause: str


def judge(inputs: Inputs) -> list[Claim]:
    """The four claims of the verdict, in the order of the page."""
    return [_learned(inputs), _resumed(inputs), _layouts(inputs), _exported(inputs)]


def _learned(inputs: Inputs) -> Claim:
    rows = {}
    for name, figures in inputs.heldout().items():
        if name == "control":  # delimiters are no modality; they have their panel all the same
            continue
        loss, floor = num(figures.get("loss")), num(figures.get("unigram_entropy"))
        if loss is not None and floor is not None:
            rows[name] = (loss, floor)
    if not rows:
        return Claim(
            "none",
            "Learned",
            "–",
            "No held-out loss with a unigram entropy.",
            "held-out loss was not measured",
        )
    above = [m for m, (loss, floor) in rows.items() if loss >= floor]
    worst = max(rows, key=lambda m: rows[m][0] / rows[m][1] if rows[m][1] else 0.0)
    loss, floor = rows[worst]
    detail = (
        f"modalities below their unigram entropy; closest: {worst}, "
        f"{number(loss)} against {number(floor)} nats"
    )
    state = "good" if not above else ("bad" if len(above) == len(rows) else "warn")
    many = f"all {_word(len(rows))} modalities" if len(rows) > 1 else f"{next(iter(rows))}"
    clause = (
        f"{many} ended below their unigram entropy"
        if not above
        else f"{_and(above)} did not fall below the unigram entropy"
    )
    return Claim(state, "Learned", f"{len(rows) - len(above)} of {len(rows)}", detail, clause)


def _resumed(inputs: Inputs) -> Claim:
    title, resume, history = "Resumed exactly", inputs.get("proof.json", "resume"), inputs.history
    seen = history.repeated_loss_diff()
    if not resume and seen is None:
        why = (
            "The run was never interrupted."
            if len(history.attempts) == 1
            else "No proof and no repeated steps."
        )
        return Claim("none", title, "–", why, "resuming was not measured")
    diffs = [d for d in (num(resume.get("max_loss_diff")), seen) if d is not None]
    diff = max(diffs) if diffs else None
    lost, again = num(resume.get("samples_lost")), num(resume.get("samples_repeated"))
    killed = (
        f"killed at step {count(num(resume['killed_at_step']))}"
        if num(resume.get("killed_at_step")) is not None
        else ""
    )
    samples = (
        f"{count(lost)} samples lost, {count(again)} repeated"
        if None not in (lost, again)
        else "samples not counted"
    )
    twice = f"{plural(len(history.repeated), 'step')} trained twice" if seen is not None else ""
    detail = "; ".join(filter(None, ("largest loss difference", killed, samples, twice)))
    if lost or again or (diff is not None and diff > LOSS_LIMIT):
        state, clause = "bad", "the resumed run differs from an unbroken one"
    elif diff == 0 and lost == 0 and again == 0:
        state, clause = "good", f"the {killed.replace('killed', 'kill') or 'interruption'} left no trace"
    else:
        state = "warn"
        clause = (
            "it resumed within tolerance"
            if diff
            else "its repeated steps agree, but samples were not counted"
        )
    return Claim(state, title, f"Δ {number(diff)}", detail, clause)


def _layouts(inputs: Inputs) -> Claim:
    title, verify, proof = "Layouts agree", inputs.get("verify.json"), inputs.get("proof.json", "layouts")
    rows = [r for r in mappings(verify.get("rows")) if _law(r) in (2, None)]
    if not rows and not proof:
        return Claim("none", title, "–", "Run `ringweave verify`.", "layouts were not compared")
    worst = {}
    for key in ("max_rel_loss_diff", "max_rel_grad_diff"):
        worst[key] = max((d for r in [*rows, proof] if (d := num(r.get(key))) is not None), default=None)
    loss, grad = worst.values()
    broken = [r for r in rows if r.get("holds") is False]
    over = (loss or 0.0) > LOSS_LIMIT or (grad or 0.0) > GRAD_LIMIT
    state = "bad" if broken or (over and not rows) else ("warn" if over or loss is None else "good")
    tried = {str(r.get("layout")) for r in rows}
    agree = tried - {str(r.get("layout")) for r in broken}
    detail = (
        f"largest relative difference to one process: loss {number(loss)} (limit {number(LOSS_LIMIT)}), "
        f"gradient {number(grad)} (limit {number(GRAD_LIMIT)})"
    )
    clause = {
        "good": "every layout agrees with one process",
        "warn": "layouts agree only loosely",
        "bad": "layouts disagree with one process",
    }[state]
    return Claim(state, title, f"{len(agree)} of {len(tried)}" if rows else number(loss), detail, clause)


def _exported(inputs: Inputs) -> Claim:
    export = inputs.get("export/export.json") or inputs.get("proof.json", "export")
    diff, name = num(export.get("max_abs_logit_diff")), str(export.get("class") or "the stock class")
    if diff is None:
        return Claim("none", "Export agrees", "–", "Run `ringweave export`.", "no export was compared")
    state = "good" if diff <= LOGIT_LIMIT else ("warn" if diff <= 100 * LOGIT_LIMIT else "bad")
    detail = f"largest logit difference to {name} (limit {number(LOGIT_LIMIT)})"
    clause = (
        "the export gives the same logits"
        if state == "good"
        else f"the export's logits are {number(diff)} off"
    )
    return Claim(state, "Export agrees", f"Δ {number(diff)}", detail, clause)


def _word(n: int) -> str:
    words = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    return words[n] if n < len(words) else str(n)


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


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
    told = start + (": " + _and(good) if good else "")
    told += ("; but " if good else ": ") + _and(bad) if bad else ""
    return told + ("; " + _and(unknown) if unknown and len(unknown) < 4 else "") + "."


def _date(seconds: float | None) -> str:
    try:
        return (
            datetime.fromtimestamp(seconds or 0, UTC).strftime("%d %B %Y, %H:%M UTC").lstrip("0")
            if seconds
            else ""
        )
    except (ValueError, OverflowError, OSError):
        return ""


def _header(inputs: Inputs) -> str:
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


# --- sections ---------------------------------------------------------------------------------------------


def _bands(h: RunHistory, *, levels: bool = False) -> list[charts.Band]:
    return [
        charts.Band(
            s.tokens_begin,
            s.tokens_end,
            f"{context_name(s.context)} context",
            " → ".join(s.layouts) or "layout not logged",
            s.tokens_per_s if levels else None,
        )
        for s in h.stages
    ]


def _marks(h: RunHistory) -> list[charts.Mark]:
    return [
        charts.Mark(h.tokens_at(a.start_step), f"attempt {a.number} goes on after step {a.start_step}")
        for a in h.attempts[1:]
    ]


def _ordered(names: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """Modalities in their fixed order, unknown ones after."""
    return [m for m in COLOURS if m in names] + sorted(n for n in names if n not in COLOURS)


def _series(inputs: Inputs) -> list[charts.Series]:
    h, heldout = inputs.history, inputs.heldout()
    names = dict.fromkeys(m for s in h.steps for m in s.loss_by_modality)
    out = []
    for name in _ordered(names):
        rows = [(s.tokens, s.loss_by_modality[name], s.tokens_by_modality.get(name, 1.0)) for s in h.steps
                if s.tokens is not None and name in s.loss_by_modality]  # fmt: skip
        points = [
            (float(h.tokens_at(e.step)), e.heldout[name]["loss"])
            for e in h.evaluations
            if "loss" in e.heldout.get(name, {})
        ]
        figures = heldout.get(name, {})
        final = num(figures.get("loss"))
        if final is not None and (not points or points[-1][1] != final):
            points.append((float(h.tokens), final))
        if rows:
            xs, ys, weights = zip(*rows)
            out.append(charts.Series(name, xs, ys, weights, points, num(figures.get("unigram_entropy"))))
    return out


def _loss(inputs: Inputs) -> tuple[str, str]:
    h, series, heldout = inputs.history, _series(inputs), inputs.heldout()
    if not series:
        return "", missing("training loss by modality", "metrics.jsonl holds no steps.") + _heldout_table(
            heldout
        )
    bands, marks = _bands(h), _marks(h)
    reach = charts.window(len(h.steps))
    caption = (
        (
            f"Strong lines: token-weighted mean over {2 * reach + 1} points; faint: as logged. "
            if reach
            else "Lines: as logged. "
        )
        + "Shapes: held-out loss. Shaded columns: context stages with their layout. Dashed verticals with a "
        "turning arrow: restarts; of steps trained twice only the later, final one is drawn."
    )
    body = figure(f'<div class="wide-chart">{charts.loss_chart(series, bands, marks)}</div>', caption)
    panels = []
    for i, s in enumerate(series):
        loss = num(heldout.get(s.name, {}).get("loss"))
        told = "held out: not measured"
        if loss is not None:
            told = f"{number(loss)} held out" + (f" · unigram {number(s.reference)}" if s.reference else "")
        head = f'<div class="fig-title">{swatch(s.name)}{text(s.name)} <small>{text(told)}</small></div>'
        panels.append(f"<figure>{head}{charts.loss_panel(s, bands, marks, ident=str(i))}</figure>")
    total = [(s.tokens, s.loss) for s in h.steps if s.tokens is not None and s.loss is not None]
    if total and len(series) > 1:
        xs, ys = zip(*total)
        chart = charts.loss_panel(charts.Series("the objective", xs, ys), bands, marks, ident="all")
        panels.append(
            f'<figure><div class="fig-title">objective <small>what is minimised</small></div>{chart}</figure>'
        )
    for key, title, told in (("lr", "learning rate", ""), ("grad_norm", "gradient norm", "before clipping")):
        rows = [(s.tokens, v) for s in h.steps if s.tokens is not None and (v := getattr(s, key)) is not None]
        if rows:
            xs, ys = zip(*rows)
            chart = charts.value_chart(key, xs, ys, bands, marks, unit="", small=True)
            panels.append(
                f'<figure><div class="fig-title">{title} <small>{told}</small></div>{chart}</figure>'
            )
    return _gain(heldout), body + f'<div class="multi">{"".join(panels)}</div>'


def _gain(heldout: Mapping[str, Mapping[str, Any]]) -> str:
    """How far the held-out loss is from the unigram entropy, in words."""
    gains = {}
    for name, figures in heldout.items():
        loss, floor = num(figures.get("loss")), num(figures.get("unigram_entropy"))
        if loss is not None and floor:
            gains[name] = 1 - loss / floor
    if not gains:
        return "No held-out figures were logged; the curves are training loss only."
    low, high = min(gains, key=lambda m: gains[m]), max(gains, key=lambda m: gains[m])
    ends = [
        f"{percent(abs(gains[m]))} {'below' if gains[m] > 0 else 'above'} ({m})"
        for m in dict.fromkeys((low, high))
    ]
    return (
        f"Held-out loss ended {' to '.join(ends)} the unigram entropy: the entropy of a modality's token "
        "frequencies, which is as far as counting tokens gets."
    )


def _heldout_table(heldout: Mapping[str, Mapping[str, Any]]) -> str:
    if not heldout:
        return missing("held-out loss")
    rows = [
        (
            swatch(m) + text(m),
            number(num(heldout[m].get("loss"))),
            number(num(heldout[m].get("unigram_entropy"))),
        )
        for m in _ordered(heldout)
    ]
    return table(("Modality", "Held-out loss, nats", "Unigram entropy, nats"), rows, css="narrow")


_PARTS = {p: f"var(--p-{p})" for p in (*TIME_PARTS, "other")}


def _legend(colours: Mapping[str, str]) -> str:
    items = "".join(
        f'<span><i class="sw" style="background:{c}"></i>{text(k)}</span>' for k, c in colours.items()
    )
    return f'<div class="legend">{items}</div>'


def _speed(inputs: Inputs) -> tuple[str, str]:
    h = inputs.history
    rows = [
        (s.tokens, s.tokens_per_s) for s in h.steps if s.tokens is not None and s.tokens_per_s is not None
    ]
    if not rows:
        proof = mappings(inputs.get("proof.json").get("stages"))
        told = table(
            ("Context", "Layout", "Steps", "Tokens", "Tokens/s"),
            [
                (
                    context_name(int(num(s.get("context")) or 0)),
                    text(layout_name(s.get("layout"))),
                    count(num(s.get("steps"))),
                    short(num(s.get("tokens"))),
                    short(num(s.get("tokens_per_s"))),
                )
                for s in proof
            ],
            left=(0, 1),
        )
        return "", missing("throughput by step", "metrics.jsonl holds no steps.") + (told if proof else "")
    xs, ys = zip(*rows)
    left = figure(
        charts.value_chart("tokens_per_s", xs, ys, _bands(h, levels=True), _marks(h), unit="tokens/s"),
        "Faint: each step; strong: median of the stage.",
        title="Tokens per second",
    )
    split = [(f"{context_name(s.context)}\n{' → '.join(s.layouts)}", s.seconds) for s in h.stages]
    bars = charts.stacked_bars(split, _PARTS, description="Share of step time by stage", unit=duration)
    right = figure(_legend(_PARTS) + bars, "Percent of step time.", title="Where the time went")
    total = {k: sum(s.seconds.get(k, 0.0) for s in h.stages) for k in _PARTS}
    whole = sum(total.values())
    lede = (
        f"Waiting for data took {percent(total['data'] / whole, 1)} of step time and saving checkpoints "
        f"{percent(total['checkpoint'] / whole, 1)}."
        if whole
        else ""
    )
    stages = table(
        ("Stage", "Context", "Layout", "Steps", "Tokens", "Batch", "RoPE θ", "Median step", "Tokens/s"),
        [
            (
                str(s.number),
                context_name(s.context),
                text(" → ".join(s.layouts) or "–"),
                f"{count(s.steps)}",
                short(s.tokens_end - s.tokens_begin),
                text("–" if s.batch is None else s.batch),
                short(s.rope_theta),
                duration(s.step_seconds),
                short(s.tokens_per_s),
            )
            for s in h.stages
        ],
        left=(0, 1, 2),
    )
    eta = h.eta_check()
    note = ""
    if eta:
        progress, said, true = eta
        note = (
            f'<p class="note">The time left given at {percent(progress)} of the run was {duration(said)}; '
            f"the steps then took {duration(true)} ({(said - true) / true * 100:+.0f} %).</p>"
        )
    return lede, f'<div class="cols">{left}{right}</div>{stages}{note}'


def _restarts(inputs: Inputs) -> tuple[str, str]:
    h = inputs.history
    timed = [a for a in h.attempts if a.began is not None and a.ended is not None]
    if not timed:
        return "", missing("attempts", "metrics.jsonl holds no start record with a time.")
    zero, bars, shown = min(a.began or 0.0 for a in timed), [], timed[-24:]
    for a in shown:
        mine = [s for s in (*h.superseded, *h.steps) if s.attempt == a.number and s.time is not None]
        mine.sort(key=lambda s: s.step)
        begun = (mine[0].time or 0.0) - mine[0].wall if mine else a.ended
        again = None
        if a.steps_again:
            again = max(
                (s.time or 0.0 for s in mine if s.step <= (a.kept_step or a.start_step)), default=begun
            )
        ended = (
            a.stop_reason if a.stop_reason is not None else ("no stop record" if a is timed[-1] else "killed")
        )
        code = f" (exit {a.exit_code})" if a.exit_code is not None else ""
        span = f"steps {a.start_step + 1:,}–{a.last_step:,}" if a.last_step is not None else "no step"
        twice = f", {a.steps_again:,} of them trained again" if a.steps_again else ""
        source = f"resumed from {a.resumed_from}, " if a.resumed_from else ""
        saved = [num(c.get("time")) for c in h.checkpoints if c.get("attempt") == a.number]
        bars.append(
            charts.Bar(
                f"attempt {a.number}",
                f"{source}{span}{twice}, {ended}{code}",
                a.began - zero,
                max(a.began, begun) - zero,
                a.ended - zero,
                None if again is None else max(again, begun) - zero,
                killed=a.stop_reason is None and a is not timed[-1],
                checkpoints=[t - zero for t in saved if t is not None],
            )
        )
    caption = (
        "Pale: start-up. Solid: training. Hatched: steps that had to be trained again. Cross: ended without "
        "a stop record (killed). Triangles: checkpoints."
        + (f" The first {len(timed) - 24} attempts are not drawn." if len(timed) > 24 else "")
    )
    body = figure(f'<div class="wide-chart">{charts.timeline(bars)}</div>', caption)
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


def _data(inputs: Inputs) -> tuple[str, str]:
    h, corpus = inputs.history, inputs.get("proof.json", "data")
    body = ""
    filled = [
        (
            f"{context_name(s.context)}\n{' → '.join(s.layouts)}",
            {"tokens": s.fill, "padding": max(0.0, 1 - s.fill)},
        )
        for s in h.stages
        if s.fill is not None
    ]
    lede = ""
    if filled:
        colours = {"tokens": "var(--p-compute)", "padding": "var(--pad)"}
        bars = charts.stacked_bars(
            filled, colours, description="Packing fill by stage", unit=percent, digits=1
        )
        body += figure(
            _legend(colours) + bars, "Slots of a pack that hold a token, percent.", title="Packing fill"
        )
        low = min(parts["tokens"] for _, parts in filled)
        lede = f"Packs were at least {percent(low, 1)} full in every stage."
    mixed = [
        (
            f"{context_name(s.context)}\n{short(sum(s.tokens_by_modality.values()))} targets",
            s.tokens_by_modality,
        )
        for s in h.stages
        if s.tokens_by_modality
    ]
    if mixed:
        names = _ordered(dict.fromkeys(m for _, parts in mixed for m in parts))
        colours = {m: COLOURS.get(m, OTHER_COLOUR) for m in names}
        bars = charts.stacked_bars(mixed, colours, description="Target tokens by modality and stage")
        body += figure(_legend(colours) + bars, "Tokens that carried loss, percent.", title="Mix by modality")
    body = f'<div class="cols">{body}</div>' if body else missing("packing fill and mix")
    sources = dict.fromkeys([*(n for s in h.stages for n in (*s.sources, *s.tokens_by_source)), *corpus])
    if not sources:
        return lede, body + missing("sources and their sizes")
    return lede, body + _source_table(h, corpus, list(sources))


def _source_table(h: RunHistory, corpus: Mapping[str, Any], sources: Sequence[str]) -> str:
    """Weights (one number, or how it changed over the stages) and sizes of the sources."""
    rows, logged = [], any(s.tokens_by_source for s in h.stages)
    for name in sources:
        found = corpus.get(name)
        size = found if isinstance(found, Mapping) else {}
        weights = list(dict.fromkeys(percent(_share(s.sources, name)) for s in h.stages))
        seen = sum(s.tokens_by_source.get(name, 0.0) for s in h.stages)
        rows.append(
            (
                swatch(name) + text(name),
                " → ".join(weights) or "–",
                *([short(seen)] if logged else []),
                count(num(size.get("records"))),
                short(num(size.get("tokens"))),
                count(num(size.get("heldout_records"))),
            )
        )
    head = (
        "Source",
        "Weight",
        *(["Tokens trained"] * logged),
        "Records",
        "Corpus tokens",
        "Held-out records",
    )
    return table(head, rows)


def _share(weights: Mapping[str, float], name: str) -> float | None:
    total = sum(weights.values())
    return weights.get(name, 0.0) / total if total else None


# --- pictures, sound, samples -----------------------------------------------------------------------------

_MAGIC = {
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"RIFF": "audio/wav",
    b"fLaC": "audio/flac",
    b"OggS": "audio/ogg",
}


def media(inputs: Inputs, path: Path, *, alt: str, room: int = 440) -> str:
    """A picture or sound as a data URI. The type is read from the bytes, never from the name; files outside
    the run folder (by link or `..`), of another type or over the budget are named, not embedded. Small
    pictures are enlarged by a whole factor to at most `room` px and kept pixelated."""
    name, data = path.name, b""
    if not _inside(inputs, path):
        return missing(f"{name} is absent or lies outside the run folder")
    try:
        data = path.read_bytes() if path.stat().st_size <= MEDIA_BUDGET else b""
    except OSError as error:
        return missing(f"{name} cannot be read ({type(error).__name__})")
    kind = next((k for magic, k in _MAGIC.items() if data.startswith(magic)), "")
    coded = base64.b64encode(data).decode("ascii")
    if data and not kind:
        return missing(f"{name} is not a PNG, JPEG, WAV, FLAC or OGG file")
    if not data or len(coded) > inputs.media_left:
        return missing(
            f"{name} left out ({path.stat().st_size / 1000:,.0f} kB), the page would grow too large"
        )
    inputs.media_left -= len(coded)
    if kind.startswith("audio"):
        source = f"data:{kind};base64,{coded}"
        return f'<audio controls preload="metadata" aria-label="{text(alt)}" src="{source}"></audio>'
    css, size = "", ""
    if kind == "image/png" and len(data) > 26:
        width, height = struct.unpack(">II", data[16:24])
        factor = max(1, room // max(1, width))
        css = ("px " if factor > 1 else "") + ("check" if data[25] in (4, 6) else "")
        size = f' width="{width * factor}" height="{height * factor}"'
    return f'<img class="{css.strip()}"{size} alt="{text(alt)}" src="data:{kind};base64,{coded}">'


def _inside(inputs: Inputs, path: Path) -> bool:
    """Whether `path` is a file of the run folder, links followed."""
    try:
        return path.resolve().is_relative_to(inputs.run_dir.resolve()) and path.is_file()
    except (OSError, ValueError):  # ValueError: a NUL in a name
        return False


def _pictures(inputs: Inputs) -> tuple[str, str]:
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
    for name in _ordered(groups):
        inner = ""
        for p in groups[name]:
            if p.suffix.lower() == ".txt" and _inside(inputs, p):
                inner += f'<pre class="body">{text(_head(p))}</pre>'
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


def _head(path: Path, limit: int = 6000) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        return f"(unreadable: {type(error).__name__})"
    return raw[:limit].decode("utf-8", errors="replace") + ("\n…" if len(raw) > limit else "")


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
            found = _inside(inputs, folder / file)
            content = (
                f'<div class="body">{text(_head(folder / file))}</div>'
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


# --- tables -----------------------------------------------------------------------------------------------

_UNITS = (("psnr", "dB"), ("sdr", "dB"), ("snr", "dB"), ("seconds", "s"))


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Nested mappings as dotted names with their values."""
    if isinstance(value, Mapping):
        return [pair for k, v in value.items() for pair in _flat(v, f"{prefix}{'.' if prefix else ''}{k}")]
    return [(prefix, value)]


def _shown(value: Any) -> str:
    """A number as measured; whole numbers stay whole; other values as text."""
    if isinstance(value, bool) or num(value) is None:
        return text("–" if value is None else value)
    return count(value) if isinstance(value, int) and abs(value) < 1e15 else f"{value:.4g}"


def _tokenizers(inputs: Inputs) -> tuple[str, str]:
    figures = inputs.get("tokenizers/figures.json")
    rows = [(name, key, value) for name in _ordered(figures) for key, value in _flat(figures[name])]
    proof = inputs.get("proof.json", "tokenizers")
    if not rows:
        rows = [(k.split("_")[0] if k.split("_")[0] in COLOURS else "", k, v) for k, v in _flat(proof)]
    if not rows:
        return "", missing("tokenizer figures", "`ringweave tokenizer train` writes them.")
    body = ""
    for name in dict.fromkeys(r[0] for r in rows):
        cells = [
            (_metric(key or name), f"{_shown(value)} {_unit(key)}".strip())
            for who, key, value in rows
            if who == name
        ]
        body += f"<div><h3 class='sub'>{swatch(name)}{text(name or 'all')}</h3>{table(('', ''), cells)}</div>"
    return "Measured on held-out shards.", f'<div class="multi">{body}</div>'


def _metric(key: str) -> str:
    """`image_psnr` as words: "image PSNR"."""
    words = key.replace("si_sdr", "SI-SDR").replace("_", " ").replace(".", " · ")
    return text(
        re.sub(r"\b(psnr|ssim|f1|rgb|mse|iou|snr)\b", lambda m: m[0].upper(), words).replace(" gib", " GiB")
    )


def _unit(key: str) -> str:
    return next((f"<small>{u}</small>" for part, u in _UNITS if part in key), "")


_LAWS = {
    1: "Packed = separate", 2: "Any layout = one process", 3: "Killed and resumed = never killed",
    4: "Chunked = batched = whole", 5: "Exported = trained",
}  # fmt: skip


def _law(row: Mapping[str, Any]) -> Any:
    """The law a row of verify.json speaks of: its number, or the text given; None when none is."""
    law = row.get("law")
    return next(
        (n for n, words in _LAWS.items() if law in (n, str(n), words)), None if law is None else str(law)
    )


def _layout_matrix(inputs: Inputs) -> tuple[str, str]:
    """One table a law: its rows, every figure logged for them, and whether it holds."""
    rows = mappings(inputs.get("verify.json").get("rows"))
    proof = inputs.get("proof.json", "layouts")
    if not rows:
        cells = [
            (
                "All layouts",
                number(num(proof.get("max_rel_loss_diff"))),
                number(num(proof.get("max_rel_grad_diff"))),
            )
        ]
        head = ("Layout", "Relative loss difference", "Relative gradient difference")
        return "", missing("each layout against one process", "`ringweave verify` measures it.") + (
            table(head, cells) if proof else ""
        )
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda r: _law(r) != 2):
        law = _law(row)
        groups.setdefault(_LAWS.get(law, str(law or "Layouts")), []).append(row)
    tables = [_law_table(title, group) for title, group in groups.items()]
    body = f'<div class="cols"><div>{tables[0]}</div><div>{"".join(tables[1:])}</div></div>'
    held = sum(r.get("holds") is True for r in rows)
    lede = (
        f"{held} of {len(rows)} checks hold. Layouts may differ from one process by {number(LOSS_LIMIT)} of "
        f"the loss and {number(GRAD_LIMIT)} of the gradient."
    )
    return lede, body


def _law_table(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    keys = list(dict.fromkeys(k for r in rows for k in r if k not in ("law", "layout", "holds")))
    names = {"max_rel_loss_diff": "Loss difference", "max_rel_grad_diff": "Gradient difference"}
    cells = [
        (
            text(layout_name(r.get("layout")) or "–"),
            *(_measured(r.get(k)) for k in keys),
            _holds(r.get("holds")),
        )
        for r in rows
    ]
    head = (
        "Layout" if title == _LAWS[2] else "Check",
        *(names.get(k, k.replace("_", " ")) for k in keys),
        "",
    )
    return f'<h3 class="sub">{text(title)}</h3>' + table(head, cells, left=(0, len(head) - 1))


def _measured(value: Any) -> str:
    """A difference: tiny numbers in powers of ten, whole numbers whole."""
    return number(value) if isinstance(value, float) and num(value) is not None else _shown(value)


def _holds(value: Any) -> str:
    state = "good" if value is True else "bad" if value is False else "none"
    word = {"good": "holds", "bad": "fails", "none": "not judged"}[state]
    return f'<span class="nb">{icon(state)} <small>{word}</small></span>'


def _environment(inputs: Inputs) -> tuple[str, str]:
    h = inputs.history
    start: dict[str, Any] = next((a.start for a in reversed(h.attempts) if a.start), {})
    pairs = [(k, start.get(k)) for k in ("world", "config_hash") if start.get(k) is not None]
    pairs += [(k.replace("_", " "), v) for k, v in _flat(start.get("host") or {}) if k]
    pairs += [("layout at start", layout_name(start.get("layout")))] if start.get("layout") else []
    versions = [(k, v) for k, v in _flat(start.get("versions") or {}) if k]
    exit_rows = [(k, v) for k, v in _flat(inputs.get("exit.json")) if k and v not in (None, "")]
    body = ""
    for title, rows in (("Machine", pairs), ("Versions", versions), ("End (exit.json)", exit_rows)):
        cells = [(_metric(k), text(v)) for k, v in rows]
        body += (
            f"<div><h3 class='sub'>{title}</h3>"
            + (table(("", ""), cells, left=(0, 1), css="plain") if cells else missing(title.lower()))
            + "</div>"
        )
    body = f'<div class="cols">{body}</div>'
    if inputs.config:
        shown = inputs.config[:60_000] + (
            "\n… (cut at 60,000 characters)" if len(inputs.config) > 60_000 else ""
        )
        body += details(
            "Effective configuration (config.yaml, credentials redacted)", f"<pre>{text(shown)}</pre>"
        )
    else:
        body += missing("configuration", "config.yaml is absent.")
    notes = [(text(name), text(told)) for name, told in inputs.notes]
    notes += [(f"metrics.jsonl, line {n}", text(why)) for n, why in h.bad_lines[:50]]
    told = f"What this page was made from ({plural(len(h.bad_lines), 'bad line')} in metrics.jsonl)"
    return "", body + details(told, table(("File", "State"), notes, left=(0, 1)), opened=bool(h.bad_lines))


_BUILDERS = {
    "loss": ("Loss by modality", _loss), "speed": ("Throughput and time", _speed),
    "restarts": ("Restarts", _restarts),
    "data": ("Packing and data mix", _data), "pictures": ("Originals and decodings", _pictures),
    "samples": ("Samples", _samples), "tokenizers": ("Tokenizer figures", _tokenizers),
    "layouts": ("Layouts and laws", _layout_matrix),
    "environment": ("Environment and configuration", _environment),
}  # fmt: skip


def render(run_dir: Path) -> str:
    """The whole page as text."""
    inputs = load_inputs(run_dir)
    body = []
    for i, (slug, _) in enumerate(SECTIONS, start=1):
        title, build = _BUILDERS[slug]
        lede, content = build(inputs)
        body.append(section(i, slug, title, lede, content))
    return page(
        title=f"{run_dir.resolve().name} · ringweave report",
        nav=SECTIONS,
        header_html=_header(inputs),
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
