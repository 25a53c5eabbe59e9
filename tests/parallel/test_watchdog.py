"""The watch that ends a job: whose alarm stands, told to the rank that raised it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ringweave.parallel.watch_board import FolderBoard
from ringweave.parallel.watch_verdict import Alarm
from ringweave.parallel.watchdog import Watchdog


class Quick(FolderBoard):
    """A board whose thread hears the alarm before the rank that raises it goes on."""

    def raise_alarm(self, text: str) -> str:
        """See Board."""
        standing = super().raise_alarm(text)
        self.dog._hear(Alarm.from_json(standing))
        return standing

    dog: Watchdog


def _dog(place: Path, rank: int) -> Watchdog:
    board = Quick(place, world=2, token="a" * 16)
    dog = Watchdog(
        rank=rank, world=2, token="a" * 16, boards=[board], timeout=60.0, end=lambda alarm, mine: None
    )
    board.dog = dog
    return dog


def test_a_rank_knows_its_own_alarm_though_its_board_heard_it_first(tmp_path: Path) -> None:
    """Else it would leave the writing of exit.json to a rank that does not exist."""
    first, second = _dog(tmp_path, 1), _dog(tmp_path, 0)
    with pytest.raises(KeyError) as caught:
        raise KeyError("lost")
    alarm, mine = first.failed(caught.value, message="KeyError: 'lost'", exit_code=1)
    assert mine and alarm.rank == 1
    late, mine = second.failed(caught.value, message="another", exit_code=1)
    assert not mine and late.rank == 1 and late.error == "KeyError: 'lost'"
