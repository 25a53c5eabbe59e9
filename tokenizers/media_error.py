"""The one error of everything that decodes media."""

from __future__ import annotations

from ringweave.tokenizers.errors import DataError


class Damage(ValueError):
    """Why a file is not whole, or not readable here; the decoders turn it into a DataError that names the place."""

    def __init__(self, why: str, fix: str = "") -> None:
        self.fix = fix
        super().__init__(why)


def refuse(kind: str, where: str, why: str, fix: str = "") -> DataError:
    """The error of one file; `kind` is image, audio or video."""
    return DataError(
        f"cannot decode this {kind}", where=where, why=why, fix=fix or "remove the record, or write it again"
    )
