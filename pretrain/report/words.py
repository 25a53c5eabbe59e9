"""Numbers as people write them: measured values, counts, large quantities, contexts, shares, times."""

from __future__ import annotations


def number(value: float | None, digits: int = 3) -> str:
    """A measured number: fixed point in the ordinary range, `3.1e-8` when tiny, "–" when absent."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e7:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:,.{digits}f}"


def count(value: float | None) -> str:
    """A whole number with thousands separated: 1,234,567."""
    return "–" if value is None else f"{value:,.0f}"


def short(value: float | None) -> str:
    """A large quantity in three figures: 412 K, 1.23 M (decimal thousands)."""
    if value is None:
        return "–"
    for limit, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " K")):
        if abs(value) >= limit * 0.9995:
            scaled = value / limit
            return f"{scaled:.3g}{unit}" if scaled < 999.5 else f"{scaled:.0f}{unit}"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def context_name(value: int | None) -> str:
    """A context length as configs write it (binary thousands): 512, 4K, 1M."""
    if value is None:
        return "?"
    for bits, unit in ((20, "M"), (10, "K")):
        if value >= 1 << bits and value % (1 << bits) == 0:
            return f"{value >> bits}{unit}"
    return str(value)


def percent(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def duration(seconds: float | None) -> str:
    """3.2 s, 4 min 05 s, 2 h 07 min, 3 d 4 h."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def plural(n: int, word: str, words: str = "") -> str:
    return f"{n:,} {word if n == 1 else words or word + 's'}"
