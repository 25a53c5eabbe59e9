"""What a run does when its folder, its disk or its checkpoints misbehave, on one rank and the synthetic corpus."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from ringweave.pretrain import checkpoint
from ringweave.pretrain.config_schema import TokenizersSection
from ringweave.pretrain.errors import ConfigError, NonFiniteError, StorageError
from ringweave.pretrain.export import export_run
from ringweave.pretrain.run_folder import RunFolder, read_events
from ringweave.pretrain.synthetic import SyntheticCorpus
from ringweave.pretrain.trainer import Trainer
from ringweave.pretrain.verify import VOCAB, final_losses, tiny_config
from ringweave.tokenizers.errors import DataError, VocabularyError
from ringweave.tokenizers.manifest import VocabularyManifest


@pytest.fixture(scope="module", autouse=True)
def _group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Run:
    """One tiny run that can be started again and again."""

    def __init__(self, place: Path, name: str = "run", steps: int = 4) -> None:
        self.config = tiny_config(place, name, world=1, steps=steps)
        self.path = Path(self.config.run.dir)
        self.said: list[str] = []

    def train(
        self,
        *,
        trainer: type[Trainer] = Trainer,
        vocabulary: VocabularyManifest | str = "0" * 64,
        seed: int = 0,
        change: bool = False,
        **set_,
    ) -> int:
        folder = RunFolder(self.path)
        folder.acquire()
        config = self.config.model_copy(update=set_)
        try:
            return trainer(
                config, SyntheticCorpus(vocab=VOCAB, seed=seed), vocab=VOCAB, vocabulary=vocabulary,
                folder=folder, rank=0, allow_change=change, report=self.said.append,
            ).run()  # fmt: skip
        finally:
            folder.release()

    @property
    def names(self) -> list[str]:
        return sorted(p.name for p in (self.path / "checkpoints").iterdir())


class Stopped(Trainer):
    """Sends itself a signal after step 5, as a cluster would."""

    number = signal.SIGTERM

    def _record(self, *args, **kwargs) -> None:
        super()._record(*args, **kwargs)
        if self.cursor.step == 5:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGUSR1))],
)
def test_a_signal_finishes_the_step_saves_and_exits_75(tmp_path: Path, number: signal.Signals) -> None:
    whole, stopped = Run(tmp_path, "whole"), Run(tmp_path, "stopped")
    assert whole.train() == 0
    kind = type("StoppedBy", (Stopped,), {"number": number})
    assert stopped.train(trainer=kind) == 75
    assert json.loads((stopped.path / "exit.json").read_text())["exit_code"] == 75
    assert stopped.names[-1] == "step-00000006"
    assert stopped.train() == 0
    assert final_losses(stopped.path) == final_losses(whole.path)
    assert json.loads((stopped.path / "exit.json").read_text())["exit_code"] == 0


def test_a_finished_run_started_again_does_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.train()
    before = final_losses(run.path)
    assert run.train() == 0
    assert final_losses(run.path) == before
    assert len([e for e in read_events(run.path / "metrics.jsonl") if e["event"] == "step"]) == 8


def _damage(path: Path, kind: str) -> None:
    shard = next(path.glob("*.safetensors"))
    if kind == "missing shard":
        shard.unlink()
    elif kind == "missing manifest":
        (path / "manifest.json").unlink()
    elif kind == "truncated":
        shard.write_bytes(shard.read_bytes()[:-9])
    elif kind == "flipped byte":
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    elif kind == "manifest not JSON":
        (path / "manifest.json").write_text('{"format": 1, "files"')
    else:
        (path / "manifest.json").write_text('{"format": 1}')


KINDS = [
    "missing shard",
    "missing manifest",
    "truncated",
    "flipped byte",
    "manifest not JSON",
    "manifest empty",
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_checkpoint_is_passed_over_loudly_and_the_result_is_the_same(
    tmp_path: Path, kind: str
) -> None:
    whole, run = Run(tmp_path, "whole"), Run(tmp_path)
    whole.train()
    run.train(trainer=Stopped)  # leaves steps 3, 4 (stage end) and 6
    newest = run.names[-1]
    _damage(run.path / "checkpoints" / newest, kind)
    assert run.train() == 0
    assert any(newest in line and "passed over" in line for line in run.said)
    assert any(
        e["event"] == "warning" and newest in e["what"] for e in read_events(run.path / "metrics.jsonl")
    )
    assert final_losses(run.path) == final_losses(whole.path)


def test_only_damaged_checkpoints_is_an_error_that_keeps_them(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.train(trainer=Stopped)
    for name in run.names:
        _damage(run.path / "checkpoints" / name, "flipped byte")
    before = run.names
    with pytest.raises(StorageError, match="none of the 3 checkpoints is usable"):
        run.train()
    assert run.names == before


def test_a_half_written_checkpoint_is_never_taken(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.train(trainer=Stopped)
    root = run.path / "checkpoints"
    shutil.copytree(root / run.names[-1], root / "step-00000099.tmp")
    assert run.train() == 0
    assert any("step 6" in line for line in run.said)


def test_a_folder_in_use_is_refused_by_name(tmp_path: Path) -> None:
    run = Run(tmp_path)
    holder = RunFolder(run.path)
    holder.acquire()
    with pytest.raises(StorageError, match=f"already in use[\\s\\S]*pid {os.getpid()}") as caught:
        run.train()
    assert caught.value.exit_code == 6
    holder.release()
    assert run.train() == 0


def test_a_dead_holder_does_not_block(tmp_path: Path) -> None:
    run = Run(tmp_path)
    code = (
        "import os,sys; from pathlib import Path; from ringweave.pretrain.run_folder import RunFolder;"
        "RunFolder(Path(sys.argv[1])).acquire(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(run.path)], check=False)
    assert run.train() == 0


@pytest.mark.parametrize("where", ["shards", "manifest"])
def test_a_full_disk_at_save_time_keeps_older_checkpoints(tmp_path: Path, where: str, monkeypatch) -> None:
    """A real full file system where one may be mounted; else writes that fail as on one."""
    run = Run(tmp_path)
    run.train(trainer=Stopped)
    before = run.names
    real = checkpoint._fsync if where == "manifest" else checkpoint.dcp_save

    def full(*args, **kwargs):
        if where == "manifest" and args[0].name != "manifest.json":
            return real(*args, **kwargs)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_fsync" if where == "manifest" else "dcp_save", full)
        with pytest.raises(StorageError, match="No space left") as caught:
            run.train()
    assert caught.value.exit_code == 6
    assert run.names == before
    assert run.train() == 0


def _tmpfs(place: Path, size: int) -> bool:
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True, check=False
    )
    return done.returncode == 0


def test_a_really_full_disk(tmp_path: Path) -> None:
    """A tmpfs that holds about two checkpoints of three."""
    measured = Run(tmp_path, "measured")
    measured.train()
    newest = measured.path / "checkpoints" / measured.names[-1]
    small, one = tmp_path / "small", sum(f.stat().st_size for f in newest.iterdir())
    if not _tmpfs(small, 5 * one // 2):
        pytest.skip(
            "mounting a tmpfs needs root; test_a_full_disk_at_save_time covers the same path without one"
        )
    try:
        run = Run(small)
        with pytest.raises(StorageError, match=r"No space left|could not be saved") as caught:
            run.train()
        assert caught.value.exit_code == 6
        kept = [checkpoint.verify(run.path / "checkpoints" / n)["step"] for n in run.names]
        assert kept
        assert not any(n.endswith(".tmp") for n in run.names)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_another_vocabulary_data_or_model_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.train(trainer=Stopped)
    with pytest.raises(VocabularyError, match="another vocabulary"):
        run.train(vocabulary="1" * 64)
    with pytest.raises(DataError, match="not what the checkpoint was trained on"):
        run.train(seed=9)
    optimizer = run.config.optimizer.model_copy(update={"lr": 2e-3})
    with pytest.raises(ConfigError, match=r"optimizer.lr: 0.001 -> 0.002"):
        run.train(optimizer=optimizer)
    assert run.train(optimizer=optimizer, change=True) == 0


def vocabulary(*, text: int, weights: str = "b") -> VocabularyManifest:
    """Text and pictures."""
    parts = [("text", text, "text", "text", "a" * 64), ("image", 64, "image", "image", weights * 64)]
    return VocabularyManifest.build(parts, text_pieces="a" * 64, preprocessing={})


def test_a_checkpoint_names_the_block_in_which_vocabularies_differ(tmp_path: Path) -> None:
    """Retrained image weights and a grown text block are both named, with both sides."""
    run = Run(tmp_path)
    run.train(trainer=Stopped, vocabulary=vocabulary(text=300))
    with pytest.raises(VocabularyError) as caught:
        run.train(vocabulary=vocabulary(text=300, weights="c"))
    assert "block 'image': weights cccccccccccc… in tokenizers.dir, bbbbbbbbbbbb… in the checkpoint" in str(
        caught.value
    )
    with pytest.raises(VocabularyError, match="block 'text': size 301 in tokenizers"):
        run.train(vocabulary=vocabulary(text=301))
    assert run.train(vocabulary=vocabulary(text=300)) == 0


def test_an_export_with_the_tokenizers_of_another_run_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.config = run.config.model_copy(update={"tokenizers": TokenizersSection(dir=str(tmp_path / "tokens"))})
    run.train(trainer=Stopped, vocabulary=vocabulary(text=300))
    (tmp_path / "tokens").mkdir()
    vocabulary(text=300, weights="c").save(tmp_path / "tokens" / "tokenizers.json")
    with pytest.raises(
        VocabularyError, match=r"the checkpoint step-[\s\S]*block 'image': weights cccccccccccc"
    ):
        export_run(run.path)
    assert not (run.path / "export").exists()


class Poisoned(Trainer):
    """Turns one parameter into NaN before step 6."""

    def _step(self, run, batch, clock):
        if self.cursor.step == 5:
            next(iter(run.engine.parameters())).data.mul_(float("nan"))
        return super()._step(run, batch, clock)


def test_a_non_finite_loss_stops_before_the_update(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with pytest.raises(NonFiniteError, match="step 6: loss nan") as caught:
        run.train(trainer=Poisoned)
    assert caught.value.exit_code == 4
    assert run.names[-1] == "step-00000004"
    assert run.train() == 0


def test_finite_data_ends_the_run_once_every_sample_is_trained_on(tmp_path: Path) -> None:
    """data.epochs: 1, more steps asked for than there is data: exit 0, nothing lost, nothing twice, and for good."""
    run = Run(tmp_path, steps=400)
    data = run.config.data.model_copy(update={"epochs": 1})
    assert run.train(trainer=Stopped, data=data) == 75
    assert run.train(data=data) == 0
    note = json.loads((run.path / "exit.json").read_text())
    assert note["reason"].startswith("end of data: every source was read 1 time (data.epochs)")
    steps = final_losses(run.path)
    assert max(steps) < 400
    ledger = [json.loads(line) for line in (run.path / "consumed.jsonl").read_text().splitlines()]
    assert [r["step"] for r in ledger] == sorted(steps), "no step was trained twice"
    spans: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for source, epoch, sample, start, end in (p for r in ledger for pack in r["packs"] for p in pack):
        assert epoch == 0
        spans.setdefault((source, sample), []).append((start, end))
    lengths = SyntheticCorpus(vocab=VOCAB).lengths
    assert set(spans) == {(name, i) for name, v in lengths.items() for i in range(len(v))}
    for (source, sample), cuts in spans.items():
        cuts.sort()
        assert cuts[0][0] == 0
        assert cuts[-1][1] == lengths[source][sample]
        assert all(a[1] == b[0] for a, b in itertools.pairwise(cuts))
    assert run.train(data=data) == 0
    assert final_losses(run.path) == steps


@pytest.mark.slow
def test_a_mixture_changed_in_the_middle_of_a_stage_counts_at_once(tmp_path: Path) -> None:
    run = Run(tmp_path, steps=40)
    assert run.train(trainer=Stopped) == 75
    sources = tuple(
        s.model_copy(update={"weight": 0.0 if s.name == "image" else 1.0}) for s in run.config.data.sources
    )
    data = run.config.data.model_copy(update={"sources": sources})
    with pytest.raises(ConfigError, match=r"data\.sources\.1\.weight: 1\.0 -> 0\.0"):
        run.train(data=data)
    assert run.train(data=data, change=True) == 0
    events = read_events(run.path / "metrics.jsonl")
    [said] = [e["what"] for e in events if e["event"] == "warning"]
    assert "weights: {'image': 0.5, 'text': 0.5} -> {'image': 0.0, 'text': 1.0}" in said
    late = [e["tokens_by_source"].get("image", 0) for e in events if e["event"] == "step" and e["step"] > 30]
    assert late
    assert not any(late), "what was drawn before the change is trained on first, then only text"


@pytest.mark.slow
def test_the_wait_for_data_is_measured(tmp_path: Path, monkeypatch) -> None:
    """A source that takes 0.2 s a batch is waited for; one that is ready is not."""
    run = Run(tmp_path)
    document = SyntheticCorpus.document

    def slow(self, piece):
        time.sleep(0.1)
        return document(self, piece)

    monkeypatch.setattr(SyntheticCorpus, "document", slow)
    run.train()
    steps = [e for e in read_events(run.path / "metrics.jsonl") if e["event"] == "step"]
    assert all(0.0 <= e["data_wait"] <= 1.0 for e in steps)
    assert sum(e["data_wait"] for e in steps) / len(steps) > 0.3
    assert all(e["seconds"]["data"] >= e["data_wait"] * e["seconds"]["step"] * 0.99 for e in steps)
