"""Sources with tasks in the mixture: a source of its own for each task, `<source>/<task>`, and what stages call them.

The `weights` of a stage may name one of them, or the whole: `scenes` stands for all `scenes/...` but those that the
stage names themselves, and its weight is divided by theirs. Pure functions without numpy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ringweave.pretrain.config_data import Source

#: Stands between a source and its task. Sources name no files, and metrics, tensorboard tags and overrides take it.
TASK_MARK = "/"


def parts_of(name: str, sources: Sequence[Source], weights: Mapping[str, float]) -> dict[str, float]:
    """The sources that `name` in the weights of a stage stands for, and the share of its weight that each gets.

    ValueError for a name that stands for nothing, or for tasks that have no weight of their own to divide it by.
    """
    if any(source.name == name for source in sources):
        return {name: 1.0}
    parts = {
        source.name: source.weight
        for source in sources
        if source.name.rpartition(TASK_MARK)[0] == name and source.name not in weights
    }
    if not parts:
        raise ValueError(f"name an unknown source {name!r}")
    total = sum(parts.values())
    if not total:
        raise ValueError(f"name {name!r}, whose tasks have weight 0 to divide it by")
    return {part: weight / total for part, weight in parts.items()}


def stage_shares(sources: Sequence[Source], weights: Mapping[str, float]) -> dict[str, float]:
    """What the weights of a stage give each source, 0 where they name it neither by itself nor as a task of another.

    ValueError as `parts_of`.
    """
    shares = dict.fromkeys((source.name for source in sources), 0.0)
    for name, weight in weights.items():
        shares |= {part: weight * share for part, share in parts_of(name, sources, weights).items()}
    return shares
