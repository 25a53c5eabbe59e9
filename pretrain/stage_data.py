"""The data of one stage on one rank: its stream at the cursor, and the thread that prepares batches from it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from ringweave.data_pipes.pack import packs_for_rank
from ringweave.data_pipes.quarantine import Quarantine
from ringweave.data_pipes.stream import Documents, PackStream
from ringweave.parallel.mesh import Mesh
from ringweave.pretrain.batch_reader import BatchReader, ReadyBatch
from ringweave.pretrain.config import RunConfig
from ringweave.pretrain.data_exchange import data_groups
from ringweave.pretrain.prefetch import Prefetcher
from ringweave.pretrain.stage_plan import changed_settings, enter_stage, first_planner


def open_stream(
    config: RunConfig, corpus: Documents, number: int, *, saved: Mapping[str, Any] | None, begins: bool
) -> tuple[PackStream, list[str]]:
    """The stream of stage `number` at a saved state (None: of a run that begins), and what the config changed in it.

    begins: no step of the stage was made yet. Inside a stage a changed mixture, window or temperature (the user
    allowed it, see `resume.py`) begins a new stage of the planner: token counts start anew, nothing is lost.
    Raises DataError if the state does not belong to the corpus.
    """
    limits = config.data.quarantine
    quarantine = Quarantine(max_share=limits.share, max_in_a_row=limits.run)
    if saved is None:
        return PackStream(corpus, first_planner(config, corpus.lengths, number), quarantine), []
    stream = PackStream.restore(corpus, saved, seed=config.run.seed, quarantine=quarantine)
    changes = [] if begins else changed_settings(stream.planner, config, number)
    if begins or changes:
        enter_stage(stream.planner, config, number)
    return stream, changes


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
