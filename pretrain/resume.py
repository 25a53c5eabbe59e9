"""Whether a checkpoint may be continued under the present config, vocabulary and data."""

from __future__ import annotations

from typing import Any

from ringweave.pretrain.config import RunConfig, resume_differences
from ringweave.pretrain.errors import ConfigError
from ringweave.tokenizers.errors import DataError, VocabularyError


def check_resume(
    manifest: dict[str, Any], config: RunConfig, vocabulary: str, corpus: str, allow_change: bool
) -> list[str]:
    """Raise when resuming would not continue the saved run; the harmless differences as text otherwise.

    Layouts, logging, checkpointing and folders may change freely. What changes the result needs
    `--allow-change`; what makes the saved tensors or the data cursor meaningless is refused.
    """
    if manifest["vocabulary"] != vocabulary:
        raise VocabularyError(
            "the checkpoint was trained on another vocabulary",
            where="tokenizers",
            why=f"manifest hash {manifest['vocabulary'][:12]}… in the checkpoint, {vocabulary[:12]}… in tokenizers.dir",
            fix="point tokenizers.dir at the set this run was started with",
        )
    if manifest["corpus"] != corpus:
        raise DataError(
            "the data is not what the checkpoint was trained on",
            where="data.sources",
            why="sources, shards or document lengths differ, so the saved position means nothing",
            fix="restore the shards, or start a new run folder",
        )
    differences = resume_differences(manifest["config"], config)
    impossible = [d for d in differences if d[3] == "impossible"]
    risky = [d for d in differences if d[3] == "needs --allow-change"]
    for found, fix in (
        (impossible, "start a new run folder for another model"),
        ([] if allow_change else risky, "take the change back, or pass --allow-change to train on with it"),
    ):
        if found:
            what = "; ".join(_text(d) for d in found)
            raise ConfigError(
                "the config differs from the checkpoint's",
                where=what,
                why="resuming would not continue that run",
                fix=fix,
            )
    return [_text(d) for d in differences]


def _text(difference: tuple[str, Any, Any, str]) -> str:
    key, old, new, _ = difference
    return f"{key}: {old} -> {new}"
