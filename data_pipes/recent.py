"""`Recent`: the entries used last, for files that stay open."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

_K = TypeVar("_K")
_V = TypeVar("_V")


class Recent(Generic[_K, _V]):
    """What was used last, up to a number of entries."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: OrderedDict[_K, _V] = OrderedDict()

    def get(self, key: _K, load: Callable[[], _V]) -> _V:
        """The entry, loaded if it is not held."""
        if key not in self._held:
            self.keep(key, load())
        self._held.move_to_end(key)
        return self._held[key]

    def keep(self, key: _K, value: _V) -> None:
        """Holds an entry as the one used last."""
        self._held[key] = value
        self._held.move_to_end(key)
        while len(self._held) > self._limit:
            self._held.popitem(last=False)

    def peek(self, key: _K) -> _V | None:
        """The entry if it is held."""
        return self._held.get(key)
