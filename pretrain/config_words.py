"""Rules of `model.words`: the words of a diffusion transformer are text for its own decoder, or vectors in the records.

Pure functions, as in `config_checks.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ringweave.data_pipes.plan_items import WORDS, entries

if TYPE_CHECKING:
    from ringweave.pretrain.config_checks import Finding
    from ringweave.pretrain.config_schema import RunConfig

#: Keys of the words' decoder and their values at rest.
_OF_DECODER = {"layers": 2, "width": 256, "heads": 4}


def words_problems(config: RunConfig) -> Iterator[Finding]:
    """Words are vectors in the records (`model.words.given`) and in the plans, or text in both."""
    given = config.model.words.given
    for key, rest in _OF_DECODER.items() if given else ():
        if (value := getattr(config.model.words, key)) != rest:
            yield (
                ("model", "words", key),
                f"words.{key} = {value} with words.given = {given}",
                "leave it out: where vectors are given there is no decoder of words",
            )
    for i, stage in enumerate(config.stages):
        if given and stage.words_loss:
            yield (
                ("stages", i, "words_loss"),
                f"words_loss = {stage.words_loss} with words.given = {given}",
                "leave it out: vectors are no next words to predict",
            )
    plans = [[entry.item for entry in entries(source.plan)] for source in config.data.sources]
    for i, items in enumerate(plans):
        at, name = ("data", "sources", i, "plan"), config.data.sources[i].name
        if given and (text := [item for item in items if item in WORDS]):
            yield (
                at,
                f"source {name!r} has words as text ({text[0]}) with words.given = {given}",
                "name `embeddings` in their place, or leave words.given out",
            )
        if not given and "embeddings" in items:
            yield (
                at,
                f"source {name!r} has embeddings, and words.given is 0",
                "set model.words.given to the numbers of a vector, or name `caption` in their place",
            )
    if given and any("latents" in items for items in plans) and not any("embeddings" in p for p in plans):
        yield (
            ("model", "words", "given"),
            f"words.given = {given}, and no plan holds embeddings",
            'add them to a plan, as in ["embeddings", "latents:layers"], or leave words.given out',
        )
