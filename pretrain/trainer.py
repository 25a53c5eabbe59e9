"""The training loop: stages, steps, checkpoints, resume and orderly stops, on any layout.

Every rank runs the same loop. One small all-reduce a step carries the loss sums, the gradient norm and the
flags (stop asked for, checkpoint due, not finite), so all ranks decide alike.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from ringweave.data_pipes.stream import Documents, PackStream
from ringweave.parallel import watch
from ringweave.parallel.grad_norm import world_sum
from ringweave.parallel.mesh import Mesh, describe_layout
from ringweave.parallel.ring_layout import RingLayout
from ringweave.pretrain import checkpoint
from ringweave.pretrain.backbone import channels_of, make_batch, modality_weights, shape_of
from ringweave.pretrain.batch import Batch
from ringweave.pretrain.batch_reader import BatchReader, ReadyBatch
from ringweave.pretrain.config import RunConfig, Stage
from ringweave.pretrain.engine import TorchEngine, make_adamw, world_loss
from ringweave.pretrain.errors import NonFiniteError
from ringweave.pretrain.models.lwm import LWMShape
from ringweave.pretrain.parallelize import build_parts
from ringweave.pretrain.prefetch import Prefetcher, Stopped
from ringweave.pretrain.progress import Board, Clock, environment, step_line, tokens_by_source
from ringweave.pretrain.recompute_table import stage_table
from ringweave.pretrain.resume import check_resume, vocabulary_record
from ringweave.pretrain.run_folder import RunFolder
from ringweave.pretrain.schedule import learning_rate
from ringweave.pretrain.stage_data import open_source, open_stream
from ringweave.tokenizers.errors import EXIT_OK, EXIT_RESUMABLE, printable
from ringweave.tokenizers.manifest import VocabularyManifest
from ringweave.tokenizers.segment import MODALITIES


@dataclass(slots=True)
class Cursor:
    """Where a run stands: what a checkpoint needs beside tensors."""

    step: int = 0
    stage: int = 0
    stage_step: int = 0
    tokens: int = 0
    stream: dict[str, Any] | None = None


@dataclass(slots=True)
class StageRun:
    """What lives while one stage trains."""

    number: int
    mesh: Mesh
    engine: TorchEngine
    stream: PackStream
    ring: RingLayout
    source: Prefetcher[ReadyBatch]
    reader: BatchReader
    layout: dict[str, int] = field(default_factory=dict)
    recompute: str = "none"


class Trainer:
    """One rank of a run. `folder` is used by rank 0 only; `report` gets each step's record on rank 0; channels: of the
    latents, where the vocabulary does not tell."""

    def __init__(
        self,
        config: RunConfig,
        corpus: Documents,
        *,
        vocab: int,
        vocabulary: VocabularyManifest | str,
        folder: RunFolder,
        rank: int,
        channels: int | None = None,
        allow_change: bool = False,
        report: Callable[[str], None] = lambda line: print(line, flush=True),
    ) -> None:
        self.config, self.corpus, self.folder, self.rank = config, corpus, folder, rank
        self.vocabulary, self.allow_change, self.report = vocabulary, allow_change, report
        self.shape = shape_of(
            config, vocab=vocab, channels=channels_of(config, vocabulary) if channels is None else channels
        )
        self.cursor = Cursor()
        self.saved: checkpoint.Saved | None = None
        self.stop_signal = 0
        self.last_save, self.save_seconds = time.monotonic(), 0.0
        self.step_seconds: list[float] = []

    def run(self) -> int:
        """Train from wherever the folder stands to the end, or to a stop. Gives the exit code (0 or 75)."""
        previous = self._catch_signals()
        board = Board(
            self.folder.path / "tensorboard", enabled=self.rank == 0 and self.config.log.tensorboard
        )
        try:
            self._resume()
            while self.cursor.stage < len(self.config.stages):
                outcome = self._train_stage(board)
                if outcome == "stopped":
                    self._end(EXIT_RESUMABLE, f"stopped by {signal.Signals(self.stop_signal or 15).name}")
                    return EXIT_RESUMABLE
                if outcome == "data":
                    self._end(EXIT_OK, self._end_of_data())
                    return EXIT_OK
            self._end(EXIT_OK, "done")
            return EXIT_OK
        finally:
            board.close()
            for number, handler in previous.items():
                signal.signal(number, handler)

    # --- start -----------------------------------------------------------------------------------------

    def _catch_signals(self) -> dict[int, Any]:
        def handler(number: int, _frame: Any) -> None:
            self.stop_signal = number  # acted on at the end of the step, on all ranks together

        return {n: signal.signal(n, handler) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}

    def _resume(self) -> None:
        """Find the newest whole checkpoint and take its cursor."""
        warnings: list[str] = []
        found = checkpoint.on_first_rank(
            lambda: checkpoint.find(self.folder.checkpoints, warn=warnings.append)
        )
        for what in warnings:
            self._warn(what)
        if found is not None:
            check_resume(found.manifest, self.config, self.vocabulary, self.corpus.digest, self.allow_change)
            self.saved = found
            self.cursor = Cursor(**found.manifest["cursor"])
        self._log(
            "start",
            step=self.cursor.step,
            resumed_from=found.path.name if found else None,
            layout=self._layout(min(self.cursor.stage, len(self.config.stages) - 1)),
            world=self.config.world,
            config_hash=self.config.hash(),
            params=self.shape.parameters,
            **environment(),
        )
        if found is not None and self.rank == 0:
            self.report(
                f"resumed from {found.path.name}: step {self.cursor.step}, {self.cursor.tokens:,} tokens"
            )

    def _layout(self, stage: int) -> dict[str, int]:
        layout = self.config.stages[stage].layout
        return {axis: getattr(layout, axis) for axis in ("dp", "pp", "tp", "sp")}

    def _open_stage(self, number: int) -> StageRun:
        """Build mesh, model, optimizer and stream of a stage, and load the newest checkpoint into them."""
        cfg = self.config
        watch.begin("start", step=self.cursor.step + 1)
        stage = self._settled(number)
        layout = self._layout(number)
        mesh = Mesh.build(layout, replicate=stage.layout.replicate, ulysses=stage.layout.ulysses)
        if cfg.engine.kind == "deepspeed":
            from ringweave.pretrain.engine_deepspeed import deepspeed_engine

            assert isinstance(self.shape, LWMShape)
            engine: TorchEngine = deepspeed_engine(cfg, stage, self.shape, mesh)
        else:
            engine = self._torch_engine(number, stage, mesh)
        if self.saved is not None:
            state = engine.tensors()
            averaged = bool(self.saved.manifest["config"]["optimizer"].get("ema"))
            if not averaged:
                state = {name: value for name, value in state.items() if not name.startswith("ema.")}
            checkpoint.load(self.saved, state)
            if not averaged:
                engine.start_average()
            if hasattr(engine, "loaded"):  # its tensors are copies
                engine.loaded(state)
            engine.set_optimizer_step(self.cursor.step)
        ring = RingLayout(layout["sp"], stage.layout.ring, width=self.shape.width, window=self.shape.window)
        stream, changes = open_stream(
            cfg, self.corpus, number, saved=self.cursor.stream, begins=self.cursor.stage_step == 0
        )
        for what in changes:
            self._warn(f"the data of this stage changed with the config: {what}")
        source, reader = open_source(cfg, stream, number, mesh, steps=stage.steps - self.cursor.stage_step)
        return StageRun(number, mesh, engine, stream, ring, source, reader, layout, stage.recompute)

    def _settled(self, number: int) -> Stage:
        """The stage with `recompute: auto` replaced by what rank 0's table chooses, the same on every rank."""
        stage = self.config.stages[number]
        if stage.recompute != "auto":
            return stage
        found = checkpoint.on_first_rank(lambda: stage_table(self.config, number, self.shape))
        self._log("recompute", step=self.cursor.step, **found.to_dict())
        if self.rank == 0:
            self.report("\n".join(found.lines()))
        if not found.fits:
            self._warn(f"stage {number + 1}: recompute {found.chosen}: {found.reason}")
        return stage.model_copy(update={"recompute": found.chosen, "recompute_memory": None})

    def _torch_engine(self, number: int, stage: Stage, mesh: Mesh) -> TorchEngine:
        cfg = self.config
        parts = build_parts(
            self.shape, mesh, seed=cfg.run.seed, rope_theta=stage.rope_theta, precision=cfg.precision,
            schedule=stage.layout.schedule, virtual=stage.layout.virtual, split=stage.layout.split,
            norms=stage.layout.norms, recompute=stage.recompute, transport=stage.layout.transport,
        )  # fmt: skip
        o = cfg.optimizer
        optimizer = make_adamw(parts, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay)
        return TorchEngine(
            parts, mesh, micro_batch=stage.micro_batch, precision=cfg.precision, optimizer=optimizer,
            modality_weights=modality_weights(cfg, number), normalize=cfg.objective.normalize, ema=o.ema,
            schedule=stage.layout.schedule, split_backward=stage.recompute == "none",
        )  # fmt: skip

    # --- the loop --------------------------------------------------------------------------------------

    def _train_stage(self, board: Board) -> str:
        """Train the cursor's stage. "done": to its end; "stopped": a stop was asked for, and the state is saved;
        "data": finite data ended before the stage did."""
        number = self.cursor.stage
        stage = self.config.stages[number]
        run = self._open_stage(number)
        self._log(
            "stage", step=self.cursor.step, stage=number, context=stage.context, rope_theta=stage.rope_theta,
            layout=run.layout, batch=stage.batch, sources=self.config.stage_weights(number),
            lanes=run.stream.planner.lanes, window=run.stream.planner.window, recompute=run.recompute,
        )  # fmt: skip
        try:
            outcome = self._steps(run, board)
        except BaseException:
            run.source.abandon()
            raise
        run.source.stop()
        return outcome

    def _steps(self, run: StageRun, board: Board) -> str:
        number, stage = run.number, self.config.stages[run.number]
        while self.cursor.stage == number:
            clock = Clock()
            watch.begin("data", step=self.cursor.step + 1)
            try:
                ready = run.source.next()
            except Stopped:
                return self._data_ended(run)
            batch = make_batch(
                self.config, self.shape, ready.packs, number, ring=run.ring, rank=run.mesh.rank_on["sp"]
            )
            clock.lap("data")
            record, stopping, due = self._step(run, batch, clock)
            self.cursor.stream = ready.state_after
            self._advance(stage.steps)
            ended = self.cursor.stage != number
            # Recorded before it is saved: a kill between the two repeats a step's record, never loses it.
            watch.begin("record")
            self._record(record, ready, board, stopping or ended)
            if due or stopping or ended:
                watch.begin("checkpoint")
                self.save_seconds += self._save(run)
            if stopping and not (ended and self.cursor.stage == len(self.config.stages)):
                return "stopped"
        return "done"

    def _data_ended(self, run: StageRun) -> str:
        """Every source was read `data.epochs` times: keep what was trained since the last checkpoint."""
        if not run.reader.ended:
            raise RuntimeError("the data stopped without an end: another rank stopped reading by itself")
        if self.saved is None or self.saved.step != self.cursor.step:
            watch.begin("checkpoint")
            self._save(run)
        return "data"

    def _step(self, run: StageRun, batch: Batch, clock: Clock) -> tuple[dict[str, Any], bool, bool]:
        """One update. Gives the step's record, whether a stop was asked for, whether a checkpoint is due."""
        engine, o = run.engine, self.config.optimizer
        watch.begin("compute")
        sums, counts = engine.forward_backward(batch)
        clock.lap("compute")
        watch.begin("reduce")
        lead = run.layout["pp"] * run.layout["tp"] * run.layout["sp"]  # ranks that hold the same packs
        flags = [
            float(self.stop_signal > 0),
            float(self._due()),
            batch.real_tokens / lead,
            batch.slots / lead,
            run.source.waited,
        ]
        shared = world_sum(
            torch.cat([sums, engine.grad_squares()[None], torch.tensor(flags, dtype=torch.float64)])
        )
        sums, (squares, stop, due, real, slots, waited) = (
            shared[: len(MODALITIES)],
            shared[len(MODALITIES) :].tolist(),
        )
        loss = world_loss(
            sums, counts, modality_weights(self.config, run.number), normalize=self.config.objective.normalize
        )
        norm = squares**0.5
        if not (np.isfinite(loss) and np.isfinite(norm)):
            raise NonFiniteError(
                f"step {self.cursor.step + 1}: loss {loss}, gradient norm {norm}",
                where=f"stage {run.number + 1}, {describe_layout(run.layout)}",
                why="a non-finite loss or gradient; no parameter was updated",
                fix="lower optimizer.lr or raise optimizer.warmup, and resume from the last checkpoint",
            )
        watch.begin("update")
        engine.clip(norm, o.clip)
        lr = learning_rate(
            self.cursor.step + 1, peak=o.lr, warmup=o.warmup, total=self.config.total_steps, schedule=o.schedule,
            min_ratio=o.min_lr_ratio,
        )  # fmt: skip
        engine.step(lr)
        clock.lap("optimizer")
        self.cursor.tokens += round(real)
        means = {m: float(sums[i] / counts[i]) for i, m in enumerate(MODALITIES) if counts[i] > 0}
        seconds = clock.total()
        record = {
            "step": self.cursor.step + 1, "stage": run.number, "context": self.config.stages[run.number].context,
            "tokens": self.cursor.tokens, "loss": loss, "loss_by_modality": means,
            "tokens_by_modality": {m: round(float(counts[i]), 3) for i, m in enumerate(MODALITIES) if counts[i] > 0},
            "lr": lr, "grad_norm": norm, "fill": real / slots, "tokens_per_s": real / seconds["step"],
            "data_wait": round(min(1.0, waited / self.config.world / seconds["step"]), 4), "seconds": seconds,
        }  # fmt: skip
        return record, stop > 0, due > 0

    def _due(self) -> bool:
        """Whether this rank thinks a checkpoint is due: by steps on all ranks, by time on rank 0's clock."""
        every = self.config.checkpoint
        if every.every_steps is not None:
            return (self.cursor.step + 1) % every.every_steps == 0
        return self.rank == 0 and time.monotonic() - self.last_save >= (every.every_seconds or 0)

    def _end_of_data(self) -> str:
        epochs = self.config.data.epochs
        return (
            f"end of data: every source was read {epochs} time{'s' if epochs != 1 else ''} "
            f"(data.epochs), {self.config.total_steps - self.cursor.step} steps were not needed"
        )

    def _advance(self, stage_steps: int) -> None:
        self.cursor.step += 1
        self.cursor.stage_step += 1
        if self.cursor.stage_step >= stage_steps:
            self.cursor.stage += 1
            self.cursor.stage_step = 0

    # --- what is written -------------------------------------------------------------------------------

    def _save(self, run: StageRun) -> float:
        """Checkpoint the state after the step just made; gives the seconds it took."""
        manifest = {
            "cursor": asdict(self.cursor),
            **vocabulary_record(self.vocabulary),
            "corpus": self.corpus.digest,
            "config": self.config.to_dict(),
            "rope_theta": self.config.stages[run.number].rope_theta,
            "shape": asdict(self.shape),
            "layout": run.layout,
            "recompute": run.recompute,
        }
        saved, figures = checkpoint.save(
            self.folder.checkpoints,
            self.cursor.step,
            run.engine.tensors(),
            manifest,
            keep=self.config.checkpoint.keep,
            stage_ends=self.config.log.previews > 0,
        )
        self.saved, self.last_save = saved, time.monotonic()
        self._log("checkpoint", step=self.cursor.step, path=saved.path.name, **figures)
        return figures["seconds"]

    def _record(self, record: dict[str, Any], ready: ReadyBatch, board: Board, last: bool) -> None:
        """Rank 0: ledger first, then metrics, so that a step with a metric always has its samples on record."""
        if self.rank != 0:
            return
        plans = ready.plans
        for f in ready.quarantined:
            where = {
                "source": f.source,
                "sample": f.sample,
                "shard": f.shard,
                "key": f.key,
                "offset": f.offset,
            }
            self._log("quarantine", step=record["step"], **where, reason=f.reason)
            said = f"skipped {f.shard}#{f.key} ({f.source}) at step {record['step']}: {f.reason}"
            self.report(printable(said))
        total = self.config.total_steps
        self.step_seconds = [*self.step_seconds[-49:], record["seconds"]["step"]]
        record["seconds"]["checkpoint"], self.save_seconds = round(self.save_seconds, 4), 0.0
        record["progress"] = record["step"] / total
        record["eta_s"] = float(np.median(self.step_seconds)) * (total - record["step"])
        record["tokens_by_source"] = tokens_by_source(plans)
        pieces = [[[p.source, p.epoch, p.sample, p.start, p.end] for p in plan.pieces] for plan in plans]
        self.folder.consumed(record["step"], pieces)
        self._log("step", **record)
        board.step(record)
        if record["step"] % self.config.log.every == 0 or last or record["step"] == 1:
            layout = describe_layout(self._layout(record["stage"]))
            self.report(step_line(record, total=total, stages=len(self.config.stages), layout=layout))

    def _warn(self, what: str) -> None:
        self._log("warning", step=self.cursor.step, what=what)
        if self.rank == 0:
            self.report(f"warning: {what}")

    def _log(self, event: str, **fields: Any) -> None:
        if self.rank == 0:
            self.folder.log(event, **fields)

    def _end(self, code: int, reason: str) -> None:
        self._log("stop", step=self.cursor.step, reason=reason, exit_code=code)
        if self.rank == 0:
            self.folder.exit(code, reason, step=self.cursor.step)
            self.report(f"{reason} at step {self.cursor.step}")
