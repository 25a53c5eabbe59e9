"""The four judged claims at the top of the page: learned, resumed, layouts, export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ringweave.pretrain.report.inputs import Inputs, mappings
from ringweave.pretrain.report.laws import GRAD_LIMIT, LOGIT_LIMIT, LOSS_LIMIT, law_of
from ringweave.pretrain.report.metric_lines import finite as num
from ringweave.pretrain.report.words import count, number, plural


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
        else f"{joined(above)} did not fall below the unigram entropy"
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
    rows = [r for r in mappings(verify.get("rows")) if law_of(r) in (2, None)]
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


def joined(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
