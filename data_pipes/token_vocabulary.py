"""Which vocabulary cached tokens belong to: its manifest beside them, so that a mismatch can name the block.

Files of tokens carry the hash of their manifest only. `vocabulary-<first 12 digits>.json`, one a folder, holds the
manifest itself; without it a mismatch still is an error, with both hashes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ringweave.tokenizers.errors import VocabularyError
from ringweave.tokenizers.manifest import VocabularyManifest, require_same

FIX = "run `ringweave data index DIR --tokenizers TOKENIZERS`"


def vocabulary_path(folder: Path, manifest_hash: str) -> Path:
    """Where the manifest of this hash lies in a folder of token caches."""
    return folder / f"vocabulary-{manifest_hash[:12]}.json"


def remember_vocabulary(folder: Path, manifest: Any) -> None:
    """Writes the manifest into a folder of token caches. What is no `VocabularyManifest`, and a folder that cannot be
    written to, are passed over: only the words of an error depend on it."""
    if not isinstance(manifest, VocabularyManifest):
        return
    path = vocabulary_path(folder, manifest.hash)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        if not path.is_file():
            manifest.save(temporary)
            os.replace(temporary, path)


class OtherVocabulary(VocabularyError):
    """Tokens, or their lengths, that another manifest made. made_with: that manifest, if it lies beside them."""

    made_with: VocabularyManifest | None = None


def other_vocabulary(where: Path | str, found: str, wanted: str, *, folder: Path) -> OtherVocabulary:
    """found, wanted: hashes of the manifests of what lies at `where` and of the tokenizers; folder: of the caches."""
    error = OtherVocabulary(
        "tokens made under another vocabulary",
        where=str(where),
        why=f"cached with manifest {found[:12]}, the tokenizers are {wanted[:12]}",
        fix=f"use the tokenizers the cache was made with, or {FIX} again",
    )
    with contextlib.suppress(VocabularyError):
        manifest = VocabularyManifest.load(vocabulary_path(folder, found))
        error.made_with = manifest if manifest.hash == found else None
    return error


@contextlib.contextmanager
def naming_blocks(manifest: VocabularyManifest) -> Iterator[None]:
    """Within it, `OtherVocabulary` says in which block the tokens' vocabulary and `manifest` differ, if it can."""
    try:
        yield
    except OtherVocabulary as error:
        if error.made_with is None:
            raise
        try:
            require_same(
                manifest,
                error.made_with,
                mine_is="the vocabulary of the tokenizers",
                theirs_is="that of the cache",
            )
        except VocabularyError as named:
            raise VocabularyError(error.what, where=error.where, why=named.why, fix=error.fix) from error
        raise
