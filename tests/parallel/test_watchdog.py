"""The watch that ends a job: whose alarm stands, told to the rank that raised it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from ringweave.parallel import watch, watchdog
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


def _dog(place: Path, rank: int, **settings: float) -> Watchdog:
    board = Quick(place, world=2, token="a" * 16)
    dog = Watchdog(
        rank=rank, world=2, token="a" * 16, boards=[board], end=lambda alarm, mine: None,
        **{"timeout": 60.0, **settings},
    )  # fmt: skip
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


def test_a_fault_of_the_watch_itself_is_said_and_ends_no_watch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Both threads go on after an exception that nobody foresaw: this rank's mark is published, its hang is found."""
    left = iter(range(4))  # looks that fail, of either thread

    def look(frames: object) -> tuple[bool, str]:
        if next(left, None) is not None:
            raise AttributeError("no frame")
        return True, "recv"

    monkeypatch.setattr(watch, "look", look)
    dog, found, done = _dog(tmp_path, 1, timeout=0.3, grace=0.0, interval=0.05), [], threading.Event()

    def leave(alarm: Alarm, mine: bool) -> None:
        found.append(alarm)
        dog._stopped.set()
        done.set()

    monkeypatch.setattr(dog, "_leave", leave)
    dog.start()
    assert done.wait(30), "the hang was not found"
    assert found[0].rank == 0 and found[0].kind == "gone" and found[0].found_by == 1
    assert '"rank": 1' in dog.boards[0].marks()[1]
    assert next(left, None) is None
    said = capfd.readouterr().err
    assert said.count("warning (rank 1): the watch met a fault, and goes on") == 1 and "no frame" in said


def test_a_culprit_that_cannot_be_ended_keeps_no_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own end comes last, whatever goes wrong before."""
    dog, codes = _dog(tmp_path, 0), []
    with pytest.raises(KeyError) as caught:
        raise KeyError("lost")
    alarm, mine = dog.failed(caught.value, message="KeyError: 'lost'", exit_code=4)

    def fail(*_: object) -> None:
        raise AttributeError("no such process")

    monkeypatch.setattr(watchdog.os, "_exit", codes.append)
    for name in ("_write_stack", "end", "end_culprit"):
        monkeypatch.setattr(dog, name, fail)
    dog._leave(alarm, mine)
    assert codes == [4]
