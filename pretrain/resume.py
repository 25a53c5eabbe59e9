"""Whether a checkpoint may be continued under the present config, vocabulary and data."""

from __future__ import annotations

import json
from typing import Any

from ringweave.pretrain.config import RunConfig, resume_differences
from ringweave.pretrain.errors import ConfigError
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.manifest import VocabularyManifest, require_same


def vocabulary_record(vocabulary: VocabularyManifest | str) -> dict[str, Any]:
    """What a checkpoint's manifest says of the vocabulary: its hash, and all of it where it is known."""
    if isinstance(vocabulary, str):
        return {"vocabulary": vocabulary}
    return {"vocabulary": vocabulary.hash, "vocabulary_manifest": json.loads(vocabulary.to_json())}


def vocabulary_of(manifest: dict[str, Any], *, where: str = "") -> VocabularyManifest | str:
    """The vocabulary a checkpoint was trained on; its hash alone where the checkpoint holds no more."""
    if "vocabulary_manifest" not in manifest:
        return str(manifest["vocabulary"])
    found = VocabularyManifest.from_json(json.dumps(manifest["vocabulary_manifest"]), where=where)
    return found if found.hash == manifest["vocabulary"] else str(manifest["vocabulary"])


def cursor_at(config: RunConfig, step: int) -> tuple[dict[str, Any], float]:
    """(cursor of a run that starts at `step` of its stages with its data from the start, rope theta of that stage)."""
    stage, before = 0, 0
    while stage < len(config.stages) and step >= before + config.stages[stage].steps:
        before += config.stages[stage].steps
        stage += 1
    tokens = sum(s.steps * s.tokens_per_step for s in config.stages[:stage])
    within = step - before if stage < len(config.stages) else 0
    if within:
        tokens += within * config.stages[stage].tokens_per_step
    last = config.stages[min(stage, len(config.stages) - 1)]
    cursor = {"step": step, "stage": stage, "stage_step": within, "tokens": tokens, "stream": None}
    return cursor, last.rope_theta


def check_resume(
    manifest: dict[str, Any],
    config: RunConfig,
    vocabulary: VocabularyManifest | str,
    corpus: str,
    allow_change: bool,
) -> list[str]:
    """Raise when resuming would not continue the saved run; the harmless differences as text otherwise.

    Layouts, logging, checkpointing and folders may change freely. What changes the result needs
    `--allow-change`; what makes the saved tensors or the data cursor meaningless is refused.
    """
    require_same(
        vocabulary,
        vocabulary_of(manifest),
        mine_is="tokenizers.dir",
        theirs_is="the checkpoint",
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
