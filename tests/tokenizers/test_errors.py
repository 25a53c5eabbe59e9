"""The one shape of errors that users see."""

from __future__ import annotations

import pytest

from ringweave.tokenizers.errors import DataError, printable


@pytest.mark.parametrize("part", ["what", "where", "why", "fix"])
def test_an_error_about_hostile_data_holds_nothing_a_terminal_obeys(part: str) -> None:
    """A key, caption or header may hold escape sequences; whoever renders the error, they do not reach the screen."""
    hostile = "a\x1b]0;owned\x07\u202egnp.\x9b31m"
    said = DataError(**{"what": "x", part: hostile})
    for text in (said.render(), str(said)):
        assert "a\ufffd]0;owned\ufffd\ufffdgnp.\ufffd31m" in text
        assert printable(text) == text
    assert said.as_dict()["next" if part == "fix" else part] == hostile, "JSON escapes by itself"
