"""The page of proofs: one row a proof, the last result only, and a failure is written down as one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

HARNESS = Path(__file__).parent / "prove" / "_harness.py"


@pytest.fixture(scope="module")
def harness(load_script: Callable[[Path, str], ModuleType]) -> ModuleType:
    return load_script(HARNESS, "_prove_harness")


def rows(page: Path) -> list[list[str]]:
    lines = [line for line in page.read_text().splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]


def test_a_second_run_replaces_the_row_of_the_first(harness: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "proofs.md"
    for flips in (1, 2):
        with harness.prove("one", "claim one", page=page) as proof:
            proof.found(bit_flips=flips)
        with harness.prove("two", "a | b", page=page):
            pass
    assert [(row[0], row[2], row[3]) for row in rows(page)] == [
        ("`one`", "yes", "bit flips 2"),
        ("`two`", "yes", ""),
    ]
    assert "a \\| b" in page.read_text()


def test_a_broken_claim_and_a_crash_are_written_and_end_with_code_1(
    harness: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "proofs.md"
    with (  # noqa: PT012 - the block is what fails
        pytest.raises(SystemExit) as ended,
        harness.prove("broken", "nothing is lost", page=page) as proof,
    ):
        proof.found(lost=3)
        proof.holds(False, "3 samples lost")
    assert ended.value.code == 1
    with pytest.raises(SystemExit), harness.prove("crashed", "it runs", page=page):
        raise ValueError("no data")
    broken, crashed = rows(page)
    assert broken[2:4] == ["no", "3 samples lost; lost 3"]
    assert crashed[2] == "no"
    assert "stopped by ValueError: no data" in crashed[3]
    assert '"holds": false' in capsys.readouterr().out


def test_a_tiny_proof_leaves_the_page_alone(harness: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "proofs.md"
    for words, written in ((["--tiny"], False), ([], True)):
        options = harness.arguments("a proof", tiny="few files").parse_args([*words, "--page", str(page)])
        with harness.prove_with(options, "one", "a claim") as proof:
            proof.found(tiny=int(options.tiny))
        assert page.exists() == written
    assert [row[3] for row in rows(page)] == ["tiny 0"]
