"""Section "Layouts and laws": each layout against one process, one table a law."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ringweave.pretrain.report.history import layout_name
from ringweave.pretrain.report.inputs import Inputs, mappings
from ringweave.pretrain.report.laws import GRAD_LIMIT, LAWS, LOSS_LIMIT, law_of
from ringweave.pretrain.report.markup import icon, missing, table
from ringweave.pretrain.report.metric_lines import finite as num
from ringweave.pretrain.report.safe_text import text
from ringweave.pretrain.report.values import shown
from ringweave.pretrain.report.words import number


def layouts_section(inputs: Inputs) -> tuple[str, str]:
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
    for row in sorted(rows, key=lambda r: law_of(r) != 2):
        law = law_of(row)
        groups.setdefault(LAWS.get(law, str(law or "Layouts")), []).append(row)
    tables = [_law_table(title, group) for title, group in groups.items()]
    body = "".join(f"<div>{t}</div>" for t in tables)
    held = sum(r.get("holds") is True for r in rows)
    lede = (
        f"{held} of {len(rows)} checks hold. Layouts may differ from one process by {number(LOSS_LIMIT)} of "
        f"the loss and {number(GRAD_LIMIT)} of the gradient."
    )
    return lede, body


def _law_table(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """One law: a table for each set of figures that its rows have, for empty columns squeeze the others."""
    alike: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        alike.setdefault(tuple(k for k in row if k not in _NAMING), []).append(row)
    first = "Layout" if title == LAWS[2] else "Check"
    return f'<h3 class="sub">{text(title)}</h3>' + "".join(
        _rows(first, k, group) for k, group in alike.items()
    )


#: What a row is called and how it ended: no figures. A layout's name has its model.
_NAMING = ("law", "layout", "model", "holds")


def _rows(first: str, keys: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    names = {
        "max_rel_loss_diff": "Loss difference",
        "max_rel_grad_diff": "Gradient difference",
        "rel_norm_diff": "Norm difference",
    }
    cells = [
        (
            text(layout_name(r.get("layout")) or "–"),
            *(_measured(r.get(k)) for k in keys),
            _holds(r.get("holds")),
        )
        for r in rows
    ]
    head = (first, *(names.get(k, k.replace("_", " ")) for k in keys), "")
    return table(head, cells, left=(0, len(head) - 1))


def _measured(value: Any) -> str:
    """A difference: tiny numbers in powers of ten, whole numbers whole."""
    return number(value) if isinstance(value, float) and num(value) is not None else shown(value)


def _holds(value: Any) -> str:
    state = "good" if value is True else "bad" if value is False else "none"
    word = {"good": "holds", "bad": "fails", "none": "not judged"}[state]
    return f'<span class="nb">{icon(state)} <small>{word}</small></span>'
