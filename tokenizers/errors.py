"""The one shape every user-facing failure has: what, where, why, what next, and an exit code.

Lives in the lowest folder so that data, tokenizers and the trainer can all raise it; the command line
turns any `UserError` into one message and its documented exit code (docs/errors.md).
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_CONFIG = 2
EXIT_DATA = 3
EXIT_NONFINITE = 4
EXIT_HANG = 5
EXIT_STORAGE = 6
EXIT_RESUMABLE = 75


_DIRECTION = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def printable(text: str) -> str:
    """Text from data for a terminal: control, escape and text-direction characters become U+FFFD."""
    return "".join("\ufffd" if _is_control(c) else c for c in text)


def _is_control(c: str) -> bool:
    return (
        (ord(c) < 32 and c not in "\n\t")
        or 127 <= ord(c) < 160
        or c in _DIRECTION
        or 0xD800 <= ord(c) < 0xE000
    )


class UserError(Exception):
    """A failure the user can act on. `what` is required; the rest is printed when given."""

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", why: str = "", fix: str = "") -> None:
        self.what, self.where, self.why, self.fix = what, where, why, fix
        super().__init__(self.render())

    def render(self) -> str:
        """The message as printed: one line a part, empty parts left out; nothing from data that a terminal obeys."""
        parts = [self.what]
        parts += [f"  where: {self.where}"] if self.where else []
        parts += [f"  why:   {self.why}"] if self.why else []
        parts += [f"  next:  {self.fix}"] if self.fix else []
        return printable("\n".join(parts))

    def as_dict(self) -> dict[str, object]:
        """The same, for `--json` and exit.json."""
        return {
            "error": type(self).__name__,
            "exit_code": self.exit_code,
            "what": self.what,
            "where": self.where,
            "why": self.why,
            "next": self.fix,
        }


class DataError(UserError):
    """Damaged, missing or undecodable input (exit 3)."""

    exit_code = EXIT_DATA


class VocabularyError(DataError):
    """Ids, tokens or a checkpoint made under another vocabulary manifest."""
