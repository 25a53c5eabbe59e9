"""Damaged input through the command line: the documented exit code, one clear message, nothing lost."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import tarfile
from pathlib import Path

import hostile_server as bad
import pytest
import torch.distributed as dist
from hostile_server import HostileServer

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
    (job.data / "audio-train-0000.tar.idx").unlink()
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
    (job.data / f"{shard.name}.idx").unlink()
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


@pytest.mark.slow
def test_tokens_made_by_workers_while_training_give_the_same_run(job, made: Path, tmp_path: Path) -> None:
    """Workers, lengths out of media headers, tokens on the way: step for step the run that had all tokens before."""
    job.values["data"]["epochs"] = 1
    assert _run("train", job.config())[0] == 0
    place = tmp_path / "other"
    place.mkdir()
    other = type(job)(made, place)
    other.values["data"] |= {"epochs": 1, "workers": {"count": 1}}
    code, said = _run("train", other.config())
    assert code == 0, said
    assert list(other.data.glob("*.tar.len-*"))
    before, on_the_way = (
        {
            e["step"]: (e["loss"], e["tokens"])
            for e in read_events(j.run / "metrics.jsonl")
            if e["event"] == "step"
        }
        for j in (job, other)
    )
    assert before == on_the_way
    made_now = {p.name.partition("-train")[0] for p in other.data.glob("*-train-*.part-*")}
    assert made_now, "the tokens of media were kept as parts of their shard"


@pytest.mark.slow
def test_a_run_over_a_web_server_that_cuts_answers_is_the_run_over_files(
    job, made: Path, tmp_path: Path, server: HostileServer
) -> None:
    assert _run("train", job.config())[0] == 0
    place = tmp_path / "other"
    place.mkdir()
    other = type(job)(made, place)
    draw = random.Random(3)
    for path in sorted(other.data.iterdir()):
        if path.name.endswith((".tar", ".tar.idx")):
            server.put(f"/d/{path.name}", path.read_bytes())
            server.things[f"/d/{path.name}"].next = [bad.cut(draw.randrange(400)) for _ in range(2)]
    other.values["data"] |= {
        "dir": f"{server.base}/d?sig=SECRET", "cache": {"dir": str(place / "cache")},
        "remote": {"allow_private": True}, "workers": {"count": 1},
    }  # fmt: skip
    for path in list(server.things):
        server.things[f"{path}?sig=SECRET"] = server.things[path]
    code, said = _run("train", other.config())
    assert code == 0, said
    assert any(not thing.next for thing in server.things.values()), "answers were cut"
    before, over_http = (
        [e["loss"] for e in read_events(j.run / "metrics.jsonl") if e["event"] == "step"]
        for j in (job, other)
    )
    assert before == over_http
    assert "SECRET" not in said
    for path in other.run.rglob("*"):
        if path.is_file() and path.name != "config.yaml":
            assert b"SECRET" not in path.read_bytes(), path
