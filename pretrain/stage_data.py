"""The data of one stage on one rank: its stream at the cursor, and the thread that prepares batches from it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import numpy as np

from ringweave.data_pipes.lengths import as_lengths
from ringweave.data_pipes.pack import packs_for_rank
from ringweave.data_pipes.quarantine import Quarantine
from ringweave.data_pipes.stream import Documents, PackStream
from ringweave.parallel.mesh import Mesh
from ringweave.pretrain.batch_reader import BatchReader, ReadyBatch
from ringweave.pretrain.config import RunConfig
from ringweave.pretrain.data_exchange import data_groups
from ringweave.pretrain.prefetch import Prefetcher
from ringweave.pretrain.stage_plan import changed_settings, enter_stage, first_planner
from ringweave.tokenizers.errors import DataError


def open_stream(
    config: RunConfig, corpus: Documents, number: int, *, saved: Mapping[str, Any] | None, begins: bool
) -> tuple[PackStream, list[str]]:
    """The stream of stage `number` at a saved state (None: of a run that begins), and what the config changed in it.

    begins: no step of the stage was made yet. Inside a stage a changed mixture, window or temperature (the user
    allowed it, see `resume.py`) begins a new stage of the planner: token counts start anew, nothing is lost.
    Raises DataError if the state does not belong to the corpus.
    """
    if config.model.kind == "dit":
        whole_documents_fit(config, corpus, number)
    limits = config.data.quarantine
    quarantine = Quarantine(max_share=limits.share, max_in_a_row=limits.run)
    if saved is None:
        return PackStream(corpus, first_planner(config, corpus.lengths, number), quarantine), []
    stream = PackStream.restore(corpus, saved, seed=config.run.seed, quarantine=quarantine)
    changes = [] if begins else changed_settings(stream.planner, config, number)
    if begins or changes:
        enter_stage(stream.planner, config, number)
    return stream, changes


def whole_documents_fit(config: RunConfig, corpus: Documents, number: int) -> None:
    """DataError unless every document of stage `number` fits its context: latents that see each other both ways cannot
    be trained on in pieces."""
    context, weights = config.stages[number].context, config.stage_weights(number)
    lengths = as_lengths(corpus.lengths)
    for name in lengths.names:
        if weights.get(name, 0) <= 0:
            continue
        over = longest = total = before = where = 0
        for shard, count in enumerate(lengths.counts(name).tolist()):
            tokens = np.asarray(lengths.of(name, shard))
            over += int((tokens > context).sum())
            if count and int(tokens.max()) > longest:
                longest, where = int(tokens.max()), before + int(tokens.argmax())
            before, total = before + count, total + count
        if over:
            raise DataError(
                f"{over} of {total} documents of source {name} are longer than the context of {context}",
                where=f"stage {number + 1}; the longest is sample {where} with {longest} tokens",
                why="a document of latents cannot be cut: all of it is seen both ways",
                fix="raise the context, give the source weight 0 in this stage, or make its pictures smaller",
            )


def open_source(
    config: RunConfig, stream: PackStream, number: int, mesh: Mesh, *, steps: int
) -> tuple[Prefetcher[ReadyBatch], BatchReader]:
    """What prepares the next `steps` global batches of a stage for this rank. Every rank calls it at the same time.

    Batches hold the packs of this rank's dp index; the documents in them are made by its pp x tp x sp ranks together.
    The reader's `ended` tells whether finite data is over. Its groups are separate from those of training: it runs in
    a thread beside it.
    """
    stage = config.stages[number]
    exchange, everyone = data_groups(
        mesh.device_mesh.mesh.numpy(), timeout=timedelta(seconds=config.timeout.collective)
    )
    mine = packs_for_rank(0, stage.batch, mesh.rank_on["dp"], mesh.sizes["dp"])
    reader = BatchReader(stream, count=stage.batch, mine=mine, exchange=exchange, everyone=everyone)
    return Prefetcher(reader, depth=config.data.workers.ahead, limit=steps), reader
