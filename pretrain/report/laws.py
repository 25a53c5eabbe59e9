"""The laws that `ringweave verify` measures: their names, their limits, and which one a row speaks of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LOSS_LIMIT, GRAD_LIMIT, LOGIT_LIMIT = 1e-6, 1e-5, 1e-5  # laws 2 and 5: relative, relative, absolute in fp32
LAWS = {
    1: "Packed = separate", 2: "Any layout = one process", 3: "Killed and resumed = never killed",
    4: "Chunked = batched = whole", 5: "Exported = trained",
}  # fmt: skip


def law_of(row: Mapping[str, Any]) -> Any:
    """The law a row of verify.json speaks of: its number, or the text given; None when none is."""
    law = row.get("law")
    return next(
        (n for n, words in LAWS.items() if law in (n, str(n), words)), None if law is None else str(law)
    )
