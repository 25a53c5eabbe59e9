"""Damaged input through the command line: the documented exit code, one clear message, nothing lost."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tarfile
from pathlib import Path

import pytest
import torch.distributed as dist

from ringweave.data_pipes.token_cache import TokenCache
from ringweave.launch.cli import run as cli
from ringweave.pretrain.run_folder import read_events


def _run(*argv: str) -> tuple[int, str]:
    """Exit code and everything printed, in this process (a group of one is made and ended by each training)."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = cli(list(argv))
    if dist.is_initialized():
        dist.destroy_process_group()
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    return code, out.getvalue()


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    path.write_bytes(data)


def _member(shard: Path, suffix: str, number: int = 1) -> tarfile.TarInfo:
    with tarfile.open(shard) as tar:
        return [m for m in tar if m.name.endswith(suffix)][number]


def test_the_small_job_trains_evaluates_exports_and_reports(job) -> None:
    code, said = _run("train", job.config())
    assert code == 0, said
    assert json.loads((job.run / "exit.json").read_text())["exit_code"] == 0
    assert len([e for e in read_events(job.run / "metrics.jsonl") if e["event"] == "step"]) == 4
    code, said = _run("eval", str(job.run), "--json")
    assert code == 0, said
    heldout = json.loads(said.splitlines()[-1])["heldout"]
    assert set(heldout) == {"text", "image", "rgba", "score", "audio", "video"}
    assert all(v["loss"] > 0 and v["unigram_entropy"] > 0 for v in heldout.values())
    code, said = _run("export", str(job.run), "--json")
    assert code == 0, said
    assert json.loads(said.splitlines()[-1])["max_abs_logit_diff"] <= 1e-5
    code, said = _run("sample", str(job.run), "--modality", "image", "--prompt", "a face", "--json")
    assert code == 0, said
    assert (job.run / "samples" / "image-0.png").stat().st_size > 100
    code, said = _run("report", str(job.run))
    assert code == 0, said
    assert (job.run / "report.html").stat().st_size > 10_000


def test_the_exported_tokenizer_gives_our_ids(job) -> None:
    from transformers import AutoTokenizer

    from ringweave.tokenizers.set import TokenizerSet

    _run("train", job.config())
    assert _run("export", str(job.run))[0] == 0
    theirs = AutoTokenizer.from_pretrained(job.run / "export")
    ours = TokenizerSet.load(job.run / "export" / "ringweave_tokenizers")
    for text in ("In the beginning", "two  spaces\n\n\ttab", "\u2581 é \U0001f469", "x" * 3000):
        ids = ours.text_segment(text).ids.tolist()
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.decode(ids) == text


def test_unknown_key_names_the_nearest(job) -> None:
    job.values["optimizer"]["lrr"] = 1
    code, said = _run("train", job.config())
    assert code == 2
    assert "lrr" in said
    assert "optimizer.lr" in said


def test_wrong_type_names_the_key(job) -> None:
    job.values["model"]["layers"] = "many"
    code, said = _run("train", job.config())
    assert code == 2
    assert "model.layers" in said
    assert "many" in said


@pytest.mark.parametrize(
    ("layout", "words"), [({"tp": 4}, ("heads", "tp", "4")), ({"pp": 3}, ("layers", "pp", "3"))]
)
def test_impossible_layout_shows_the_numbers(job, layout, words) -> None:
    job.values["stages"][0]["layout"] = layout
    code, said = _run("train", job.config())
    assert code == 2
    assert all(w in said for w in words), said


def test_layout_that_does_not_fit_the_world(job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    job.values["stages"][0].update(layout={"dp": 2}, batch=4)
    code, said = _run("train", job.config())
    assert code == 2
    assert "world = 4" in said


def test_missing_shard_is_named(job) -> None:
    (job.data / "score-train-0000.tar").unlink()
    code, said = _run("train", job.config())
    assert code == 3
    assert "score-train-0000.tar" in said


def test_record_without_index(job) -> None:
    (job.data / "audio-train-0000.tar.idx.json").unlink()
    code, said = _run("train", job.config())
    assert code == 3
    assert "audio-train-0000.tar" in said
    assert "ringweave data index" in said
    assert _run("data", "index", str(job.data))[0] == 0
    assert _run("train", job.config())[0] == 0


@pytest.mark.parametrize("where", [0.0, 0.3, 0.7, 0.999])
def test_truncated_shard(job, where: float) -> None:
    shard = job.data / "video-train-0000.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[: int(len(data) * where)])
    code, said = _run("train", job.config())
    assert code == 3
    assert "video-train-0000.tar" in said


@pytest.mark.parametrize("what", ["header", "payload"])
def test_flipped_byte_is_named_with_its_record(job, what: str) -> None:
    shard = job.data / "image-train-0000.tar"
    member = _member(shard, ".png")
    _flip(shard, member.offset + 20 if what == "header" else member.offset_data + member.size // 2)
    code, said = _run("train", job.config())
    assert code == 3
    assert "image-train-0000.tar" in said
    assert member.name.split(".")[0] in said
    code, said = _run("data", "check", str(job.data))
    assert code == 3
    assert member.name.split(".")[0] in said


@pytest.mark.parametrize(("source", "suffix"), [("image", ".png"), ("audio", ".flac"), ("video", ".mp4")])
def test_an_undecodable_member_is_skipped_and_journaled(job, source: str, suffix: str) -> None:
    """The shard is whole, one of its members is rubbish: one record less, written down, and the run goes on."""
    shard = job.data / f"{source}-train-0000.tar"
    member = _member(shard, suffix)
    data = bytearray(shard.read_bytes())
    data[member.offset_data : member.offset_data + member.size] = b"\x00rubbish" * (
        member.size // 8
    ) + b"\0" * (member.size % 8)
    shard.write_bytes(data)
    (job.data / f"{shard.name}.idx.json").unlink()
    assert _run("data", "index", str(job.data))[0] == 0
    code, said = _run("train", job.config())
    assert code == 0, said
    from ringweave.tokenizers.manifest import VocabularyManifest

    manifest = VocabularyManifest.load(Path(job.values["tokenizers"]["dir"]) / "tokenizers.json")
    plan = next(tuple(s["plan"]) for s in job.values["data"]["sources"] if s["name"] == source)
    cache = TokenCache.open(shard, plan, manifest.hash)
    assert [s["key"] for s in cache.skipped] == [member.name.split(".")[0]]
    assert int((cache.lengths == 0).sum()) == 1


def test_tokenizers_with_a_flipped_weight_are_refused(job, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "tokenizers"
    shutil.copytree(job.values["tokenizers"]["dir"], copy)
    _flip(copy / "image.safetensors", (copy / "image.safetensors").stat().st_size - 100)
    job.values["tokenizers"]["dir"] = str(copy)
    code, said = _run("train", job.config())
    assert code == 3
    assert "image" in said
