"""Which source gives the next document: the largest-deficit rule, counted in tokens and in integers.

With W the sum of the integer weights w_s, T the tokens drawn and T_s those of source s, the source with the
largest w_s·T − W·T_s is served; ties go to the first name in alphabetical order. A source is served only
while it is not ahead, so it is never more than one document ahead of its share. The state is T_s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

from ringweave.tokenizers.errors import DataError


def integer_weights(weights: Mapping[str, float]) -> dict[str, int]:
    """The weights as the smallest integers of the same ratios, by name in alphabetical order; zeros left out.

    A weight counts as its shortest decimal form (0.3 is 3/10). Raises DataError on a negative or non-finite
    weight, or if none is positive.
    """
    exact: dict[str, Fraction] = {}
    for name in sorted(weights):
        value = float(weights[name])
        if not math.isfinite(value) or value < 0:
            raise DataError(f"weight of source {name!r} is {value}", fix="give a finite number, 0 or above")
        if value:
            exact[name] = Fraction(repr(value))
    if not exact:
        raise DataError("no source has a positive weight", fix="give at least one source a weight above 0")
    denominator = math.lcm(*(f.denominator for f in exact.values()))
    whole = {name: int(f * denominator) for name, f in exact.items()}
    divisor = math.gcd(*whole.values())
    return {name: value // divisor for name, value in whole.items()}


class Mixture:
    """Serves sources by the largest-deficit rule. `names` are those with a positive weight."""

    def __init__(self, weights: Mapping[str, float], *, tokens: Mapping[str, int] | None = None) -> None:
        """tokens: drawn so far by source (the state of an earlier mixture of the same weights)."""
        whole = integer_weights(weights)
        self.names: list[str] = list(whole)
        self._weights = list(whole.values())
        self._sum = sum(self._weights)
        self._tokens = [int((tokens or {}).get(name, 0)) for name in self.names]
        total = sum(self._tokens)
        self._deficits = [w * total - self._sum * t for w, t in zip(self._weights, self._tokens)]

    def next(self) -> int:
        """Index in `names` of the source to serve."""
        deficits = self._deficits
        return deficits.index(max(deficits))

    def add(self, source: int, tokens: int) -> None:
        """Counts a document of that many tokens, drawn from `names[source]`."""
        self._tokens[source] += tokens
        self._deficits = [d + w * tokens for d, w in zip(self._deficits, self._weights)]
        self._deficits[source] -= self._sum * tokens

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens drawn by source: the whole state."""
        return dict(zip(self.names, self._tokens))
