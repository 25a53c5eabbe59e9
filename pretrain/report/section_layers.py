"""Section "Layers": the flow loss of a diffusion transformer by noise level, its mattes, and its export."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ringweave.pretrain.report.inputs import Inputs
from ringweave.pretrain.report.markup import facts, figure, table
from ringweave.pretrain.report.metric_lines import finite
from ringweave.pretrain.report.safe_text import text
from ringweave.pretrain.report.words import number, percent


def layers_section(inputs: Inputs) -> tuple[str, str]:
    """("", "") where the run has no diffusion part."""
    proof = inputs.get("proof.json", "dit")
    found = {"rgba": (proof.get("val_loss_by_sigma"), proof.get("untrained_loss_by_sigma"))} if proof else {}
    for evaluation in inputs.history.evaluations[-1:]:
        for name, item in evaluation.levels.items():
            found[name] = (item.get("by_sigma"), item.get("untrained_by_sigma"))
    tables = "".join(_levels(name, *pair) for name, pair in found.items())
    told = _facts(proof)
    if not tables and not told:
        return "", ""
    lede = (
        "A diffusion transformer on RGBA layers: mean square error of the velocity on held-out documents at fixed "
        "noise levels, beside the same model before its first step."
    )
    return lede, tables + (facts(told) if told else "")


def _levels(name: str, after: Any, before: Any) -> str:
    if not isinstance(after, Mapping):
        return ""
    before = before if isinstance(before, Mapping) else {}
    rows = []
    for level, loss in list(after.items())[:32]:
        now, then = finite(loss), finite(before.get(level))
        left = percent(now / then) if now is not None and then else "–"
        rows.append((text(str(level)), number(now), number(then), left))
    return figure(table(("Noise level", "Held out", "Untrained", "Left"), rows, css="narrow"), title=name)


def _facts(proof: Mapping[str, Any]) -> list[tuple[str, str]]:
    matte, export = proof.get("matting"), proof.get("export")
    told = []
    if isinstance(matte, Mapping):
        told.append(("mattes, SAD", number(finite(matte.get("sad")))))
        told.append(("best threshold, SAD", number(finite(matte.get("baseline_sad")))))
    if isinstance(export, Mapping):
        told.append(("exported as", str(export.get("class", "–"))[:80]))
        told.append(("outputs differ by", number(finite(export.get("max_rel_output_diff")))))
    return told
