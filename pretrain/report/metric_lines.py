"""One line of `metrics.jsonl` and its values, read so that nothing in them can raise.

The file is append-only text written by processes that may die at any byte: a line that a dying attempt left
unfinished and the next one wrote on is read from where the new record begins. No numpy, no torch.
"""

from __future__ import annotations

import json
import math
from datetime import datetime
from typing import Any

_RECORD_START = '{"event"'


def parse_line(line: bytes) -> tuple[dict[str, Any] | None, str]:
    """(record or None, problem or ""). Both are set when a record follows the remains of a torn one."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        return None, "not UTF-8"
    record = _object(text)
    if record is not None:
        return record, ""
    cut = text.rfind(_RECORD_START)
    record = _object(text[cut:]) if cut > 0 else None
    return record, "an unfinished record before this one" if record else "not a JSON object"


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def finite(value: Any) -> float | None:
    """A finite number, or None (NaN and infinities are not drawn and not averaged)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def integer(value: Any) -> int | None:
    number = finite(value)
    return None if number is None else int(number)


def numbers(value: Any) -> dict[str, float]:
    """The finite numbers of a mapping; anything else is left out."""
    if not isinstance(value, dict):
        return {}
    return {str(k): n for k, v in value.items() if (n := finite(v)) is not None}


def moment(value: Any) -> float | None:
    """Seconds since the epoch from a number or an ISO 8601 text."""
    if isinstance(value, str):
        try:
            return datetime.fromisoformat(value).timestamp()
        except (ValueError, OverflowError):
            return None
    return finite(value)
