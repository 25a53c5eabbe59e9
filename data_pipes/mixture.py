"""Which source gives the next document: the largest-deficit rule, counted in tokens and in integers.

With W the sum of the integer weights w_s, T the tokens drawn and T_s those of source s, the source with the
largest w_s·T − W·T_s is served; ties go to the first name in alphabetical order. A source is served only
while it is not ahead, so it is never more than one document ahead of its share. The state is T_s.
A source that has ended is closed: W and T then run over the others, whose ratios stay.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
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


#: Significant digits of a weight after a temperature: as powers have no exact form, one is agreed on.
_DIGITS = 6


def tempered(weights: Mapping[str, float], temperature: float) -> dict[str, float]:
    """w_s^(1/T), rounded to six digits so that no machine's power function changes a plan; T = 1 changes nothing.

    T above 1 evens the shares out, T below 1 sharpens them (Arivazhagan et al. 2019). Raises DataError if T is not
    a positive number.
    """
    if not math.isfinite(temperature) or temperature <= 0:
        raise DataError(f"mixture temperature {temperature}", fix="give a number above 0 (1: as weighted)")
    whole = integer_weights(weights)
    if temperature == 1:
        return {name: float(value) for name, value in weights.items()}
    largest = max(whole.values())
    powers = {name: (value / largest) ** (1 / temperature) for name, value in whole.items()}
    rounded = {name: float(f"{power:.{_DIGITS - 1}e}") for name, power in powers.items()}
    return {name: rounded.get(name, 0.0) for name in weights}


class Mixture:
    """Serves sources by the largest-deficit rule. `names` are those with a positive weight."""

    def __init__(
        self,
        weights: Mapping[str, float],
        *,
        tokens: Mapping[str, int] | None = None,
        closed: Collection[str] = (),
    ) -> None:
        """tokens: drawn so far by source, closed: those that have ended (the state of an earlier mixture of the
        same weights)."""
        whole = integer_weights(weights)
        self.names: list[str] = list(whole)
        self._weights = list(whole.values())
        self._tokens = [int((tokens or {}).get(name, 0)) for name in self.names]
        self._open = [i for i, name in enumerate(self.names) if name not in closed]
        self._count()

    def _count(self) -> None:
        """Makes the deficits from the tokens. Closed sources have weight 0 and the lowest deficit."""
        self._sum = sum(self._weights[i] for i in self._open)
        total = sum(self._tokens[i] for i in self._open)
        self._shares = [w if i in self._open else 0 for i, w in enumerate(self._weights)]
        self._deficits: list[float] = [
            w * total - self._sum * t if i in self._open else -math.inf
            for i, (w, t) in enumerate(zip(self._weights, self._tokens))
        ]

    def next(self) -> int:
        """Index in `names` of the source to serve; -1 when all are closed."""
        if len(self._open) < 2:
            return self._open[0] if self._open else -1
        deficits = self._deficits
        return deficits.index(max(deficits))

    def add(self, source: int, tokens: int) -> None:
        """Counts a document of that many tokens, drawn from `names[source]`."""
        self._tokens[source] += tokens
        if len(self._shares) == 1:
            return
        self._deficits = [d + w * tokens for d, w in zip(self._deficits, self._shares)]
        self._deficits[source] -= self._sum * tokens

    def close(self, source: int) -> None:
        """Serves `names[source]` no more."""
        self._open = [i for i in self._open if i != source]
        self._count()

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens drawn by source; with the closed ones the whole state."""
        return dict(zip(self.names, self._tokens))
