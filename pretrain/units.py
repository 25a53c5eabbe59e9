"""Numbers as people write them: `4K` slots, `1M` tokens, `5min`, `3e-4`.

Contexts are powers of two, so there K = 1024 and M = 1024²; token budgets are decimal, K = 1000 and M = 10⁶.
Everything raises ValueError with the expected form; the config loader adds file and line.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer

_NUMBER = re.compile(r"^\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+]?[0-9]+)?)\s*([A-Za-z]*)\s*$")
_SECONDS = {"ms": 1e-3, "s": 1.0, "sec": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DECIMAL = {"": 1, "k": 1000, "m": 1000**2, "b": 1000**3, "g": 1000**3, "t": 1000**4}
_BINARY = {"": 1, "k": 1024, "m": 1024**2}
_BYTES = {"": 1, "b": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("kmgt", 1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}


def _scaled(value: Any, units: dict[str, int], expected: str) -> int:
    """`value` (int, whole float or text with a unit) as a whole number of at least 1."""
    error = ValueError(f"expected {expected}, got {value!r}")
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise error
    match = _NUMBER.match(value) if isinstance(value, str) else None
    if isinstance(value, str):
        if match is None or match[2].lower() not in units:
            raise error
        number = float(match[1].replace("_", "")) * units[match[2].lower()]
    else:
        number = value
    if not math.isfinite(number) or number != int(number) or number < 1:
        raise error
    return int(number)


def parse_tokens(value: Any) -> int:
    """A token budget: `400K` is 400,000 and `1M` is 1,000,000."""
    return _scaled(value, _DECIMAL, "a number of tokens such as 400000, 400K or 1M (K = 1000)")


def parse_context(value: Any) -> int:
    """A context length in slots: `4K` is 4,096 and `1M` is 1,048,576."""
    return _scaled(value, _BINARY, "a context length such as 4096, 4K or 1M (K = 1024)")


def parse_bytes(value: Any) -> int:
    """A size in bytes: `20GiB` is 20 * 2**30 and `20GB` 20 * 10**9; a plain number is bytes."""
    return _scaled(value, _BYTES, "a size such as 512MiB, 20GiB or a number of bytes")


def parse_seconds(value: Any) -> float:
    """A duration in seconds, > 0: `30s`, `5min`, `2h`, or a number of seconds."""
    error = ValueError(f"expected a duration such as 30s, 5min or 2h, got {value!r}")
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise error
    if isinstance(value, str):
        match = _NUMBER.match(value)
        if match is None or (match[2] or "s").lower() not in _SECONDS:
            raise error
        value = float(match[1].replace("_", "")) * _SECONDS[(match[2] or "s").lower()]
    if not math.isfinite(value) or value <= 0:
        raise error
    return float(value)


def parse_interval(value: Any) -> str:
    """How often a checkpoint is made, as canonical text: `20 steps` or a duration such as `300s`."""
    error = ValueError(f"expected a duration such as 5min, or steps such as 20 or '20 steps', got {value!r}")
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise error
    match = re.match(r"^\s*([0-9][0-9_]*)\s*(steps?)?\s*$", str(value))
    if match:
        if int(match[1]) < 1:
            raise error
        return f"{int(match[1])} steps"
    try:
        return show_seconds(parse_seconds(value))
    except ValueError:
        raise error from None


def show_seconds(seconds: float) -> str:
    """`90s`: reads back through parse_seconds to the same value."""
    return f"{seconds:.12g}s"


def parse_float(value: Any) -> float:
    """A finite number; text such as `3e-4` counts, since YAML reads it as text."""
    error = ValueError(f"expected a number, got {value!r}")
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise error
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise error from None
    if not math.isfinite(number):
        raise error
    return number


def parse_int(value: Any) -> int:
    """A whole number; true and false do not count as 1 and 0."""
    if isinstance(value, bool) or not (
        isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    ):
        raise ValueError(f"expected a whole number, got {value!r}")
    return int(value)


def parse_bool(value: Any) -> bool:
    """true or false only."""
    if not isinstance(value, bool):
        raise ValueError(f"expected true or false, got {value!r}")
    return value


def parse_text(value: Any) -> str:
    """Non-empty text without line breaks."""
    if not isinstance(value, str) or not value.strip() or "\n" in value or "\0" in value:
        raise ValueError(f"expected text, got {value!r}")
    return value


Tokens = Annotated[int, BeforeValidator(parse_tokens)]
Context = Annotated[int, BeforeValidator(parse_context)]
Bytes = Annotated[int, BeforeValidator(parse_bytes)]
Seconds = Annotated[float, BeforeValidator(parse_seconds), PlainSerializer(show_seconds, return_type=str)]
Interval = Annotated[str, BeforeValidator(parse_interval)]
Number = Annotated[float, BeforeValidator(parse_float)]
Whole = Annotated[int, BeforeValidator(parse_int)]
Switch = Annotated[bool, BeforeValidator(parse_bool)]
Text = Annotated[str, BeforeValidator(parse_text)]
