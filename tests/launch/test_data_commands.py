"""`ringweave data build|index|check|stats` on sets that are not the demo's."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from ringweave.launch.cli import run
from ringweave.launch.data_check import decode_member
from ringweave.launch.data_records import records_by_modality
from ringweave.launch.data_stats import histogram
from ringweave.pretrain.config import load_config
from ringweave.pretrain.stage_plan import cost_model
from ringweave.tokenizers.errors import DataError, printable
from ringweave.tokenizers.set import TokenizerSet
from ringweave.tokenizers.text import TextCodec


def png(value: int = 0, size: int = 8) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), value, np.uint8)).save(out, "png")
    return out.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def call(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict, str]:
    """(exit code, the JSON object, what people see)."""
    capsys.readouterr()
    code = run([*argv, "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out.splitlines()[-1]), captured.err


# --- build -------------------------------------------------------------------------------------------------


def test_a_folder_becomes_shards_and_the_printed_config_reads_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = tmp_path / "my cats"
    pictures.mkdir()
    for i in range(30):
        (pictures / f"{i}.png").write_bytes(png(i))
        (pictures / f"{i}.txt").write_text(f"cat {i}")
    (pictures / "link.png").symlink_to("/etc/passwd")
    (pictures / ".DS_Store").touch()
    argv = [
        "data",
        "build",
        str(tmp_path / "out"),
        "--folder",
        str(pictures),
        "--shard-size",
        "20KB",
        "--heldout",
        "0.1",
    ]
    code, made, said = call(capsys, *argv)
    assert code == 0 and made["name"] == "my-cats" and made["plan"] == ["caption", "image"]
    assert made["samples"] + made["heldout"] == 30 and made["hidden"] == 1
    assert made["skipped"] == [{"file": "link.png", "reason": "a symbolic link"}]
    assert "link.png: a symbolic link" in said and "hidden files left out: 1" in said
    data = yaml.safe_load(made["config"])["data"]
    [source] = data["sources"]
    assert data["dir"] == str(tmp_path / "out") and source["shards"].startswith("my-cats-train-{0000..00")
    assert source["heldout"] == "my-cats-heldout-0000.tar"
    code, checked, _ = call(capsys, "data", "check", f"{tmp_path}/out/{source['shards']}", "--decode")
    assert code == 0 and checked["sources"][0]["samples"] == made["samples"]
    assert run(argv) == 3, "nothing is overwritten"


def test_jsonl_becomes_shards_and_is_checked_line_by_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "talk.jsonl"
    source.write_text('{"q": "a", "a": "b"}\n' * 40 + '{"q": "a"}\n' + '{"q": "a", "a": "b"}\n' * 9)
    code, checked, said = call(capsys, "data", "check", str(source), "--fields", "[q],a")
    assert code == 3 and len(checked["problems"]) == 1
    assert f"{source} line 41 @{40 * 21}" in said and "no field 'a'" in said
    assert call(capsys, "data", "check", str(source))[0] == 0, "without --fields any object will do"
    build = ["data", "build", str(tmp_path / "out"), "--jsonl", str(source), "--fields", "[q],a"]
    code, made, said = call(capsys, *build)
    assert code == 0 and made["samples"] == 49 and made["plan"] == ["fields:[q],a"]
    assert made["skipped"][0]["line"] == 41 and "line 41 @840" in said
    assert yaml.safe_load(made["config"])["data"]["sources"][0]["plan"] == ["fields:[q],a"]
    assert run([*build[:2], str(tmp_path / "two"), *build[3:], "--max-skips", "0"]) == 3


@pytest.mark.parametrize(
    ("more", "code"),
    [
        (["--folder", "none"], 3),
        (["--jsonl", "none"], 3),
        (["--folder", ".", "--jsonl", "x"], 2),
        (["--folder", ".", "--shard-size", "big"], 2),
        (["--folder", ".", "--heldout", "1.5"], 2),
        (["--folder", ".", "--name", "a/b"], 3),
    ],
)
def test_mistakes_of_build(
    more: list[str], code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["data", "build", str(tmp_path / "out"), *more]) == code
    assert "next:" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))


# --- index and check ---------------------------------------------------------------------------------------


def test_check_goes_on_after_damage_and_counts_by_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for source in ("cats", "dogs", "sound"):
        members = [
            (f"{source}{i}.{ext}", f"{ext} {i}".encode() * 9) for i in range(4) for ext in ("txt", "cls")
        ]
        write_tar(tmp_path / f"{source}-train-0000.tar", members)
    assert run(["data", "index", str(tmp_path)]) == 0
    for source, word in (("cats", b"txt 1txt 1"), ("cats", b"cls 3cls 3"), ("sound", b"txt 0txt 0")):
        path = tmp_path / f"{source}-train-0000.tar"
        data = bytearray(path.read_bytes())
        data[data.index(word)] ^= 1
        path.write_bytes(data)
    code, checked, said = call(capsys, "data", "check", str(tmp_path))
    assert code == 3 and checked["shards"] == 3
    damaged = {row["source"]: row["damaged"] for row in checked["sources"]}
    assert damaged["dogs"] == 0 and damaged["cats"] >= 2 and damaged["sound"] >= 1
    places = " ".join(problem["where"] for problem in checked["problems"])
    for place in ("cats1/txt", "cats3/cls", "sound0/txt"):
        assert place in places
    assert "dogs" in said and "damaged" in said


def test_check_decode_reports_what_no_decoder_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = [
        ("a.png", png()), ("a.txt", b"fine"), ("b.png", png()[:60]), ("b.txt", b"\xff"),
        ("c.json", b'{"a": 1,\n "a": 2}'), ("d.flac", b"fLaC"), ("e.mp4", b"\0\0\0\x18ftypisom"),
        ("f.bin", b"\0\1"), ("g.json", b'{"a":\n tru}'),
    ]  # fmt: skip
    write_tar(tmp_path / "mix-0000.tar", members)
    assert run(["data", "index", str(tmp_path)]) == 0
    assert call(capsys, "data", "check", str(tmp_path))[0] == 0, "the bytes are those that were indexed"
    code, checked, said = call(capsys, "data", "check", str(tmp_path), "--decode")
    assert code == 3 and checked["sources"][0]["undecodable"] == 6 and checked["sources"][0]["damaged"] == 0
    places = [problem["where"] for problem in checked["problems"]]
    assert [place.rpartition("#")[2] for place in places] == [
        "b:png",
        "b:txt",
        "c:json",
        "d:flac",
        "e:mp4",
        "g:json",
    ]
    assert "line 2, column 2" in said, "json names line and column"


def test_index_follows_the_policy_it_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = [("a.txt", b"1"), ("._b.txt", b"2"), ("c.txt", b"3"), ("a.cls", b"4")]
    write_tar(tmp_path / "x-0000.tar", members)
    assert run(["data", "index", str(tmp_path)]) == 3
    assert run(["data", "index", str(tmp_path), "--hidden", "skip"]) == 3
    assert run(["data", "index", str(tmp_path), "--hidden", "maybe"]) == 2
    assert run(["data", "index", str(tmp_path), "--hidden", "skip", "--interleaved", "regroup"]) == 0
    code, checked, _ = call(capsys, "data", "check", str(tmp_path))
    assert code == 0 and checked["sources"][0]["samples"] == 2


def test_messages_carry_no_terminal_escapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = b'{"\\u001b]0;owned\\u0007": 1, "\\u001b]0;owned\\u0007": 2}'
    write_tar(tmp_path / "x-0000.tar", [("a.json", record), ("a.txt", b"\x1b[31mred\x1b]0;t\x07")])
    assert run(["data", "index", str(tmp_path)]) == 0
    assert run(["data", "check", str(tmp_path), "--decode"]) == 3
    assert run(["data", "show", str(tmp_path), "--sample", "x-0000.tar#0"]) == 0
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err and "\x07" not in captured.out + captured.err
    assert printable("a\x1b[1m\u202eb\x9b\tc\n") == "a\ufffd[1m\ufffdb\ufffd\tc\n"


def test_decode_member_leaves_unknown_endings_alone() -> None:
    """Pickles and arrays are bytes to us, whatever they are called."""
    for ending in ("pkl", "pyd", "pth", "npy", "pickle", "bin", "yaml"):
        assert decode_member(ending, b"\x80\x04.", where="w") is None
    assert decode_member("json", b"[1]", where="w") == [1]
    with pytest.raises(DataError, match="UTF-8"):
        decode_member("txt", b"\xff", where="w")


def test_tokenizers_are_fitted_to_a_config_by_its_plans(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sources of any name, captions in json or as classes: what the plan reads is what is fitted to."""
    data = tmp_path / "data"
    members = [(f"p{i}.{e}", d) for i in range(12) for e, d in (
        ("cls", b"1" if i else b"9"), ("jpg", b"not this one"), ("seg.png", png(i, 16)),
        ("json", json.dumps({"t": {"en": f"picture {i}"}}).encode()),
    )]  # fmt: skip
    write_tar(data / "mine-train-0000.tar", members)
    lines = [(f"q{i}.json", b'{"q": "who", "a": "me", "fields": "[q],a"}') for i in range(5)]
    write_tar(data / "talk-train-0000.tar", lines)
    (data / "names.txt").write_text("cat\ndog\n")
    assert run(["data", "index", str(data)]) == 0
    plan = ["caption:cls@names.txt", "caption:json.t.en", "image:seg.png"]
    values = yaml.safe_load(stats_job(tmp_path)[1].read_text())
    values["data"] = {"dir": str(data), "sources": [
        {"name": "mine", "shards": "mine-train-0000.tar", "plan": plan},
        {"name": "talk", "shards": "talk-train-0000.tar", "plan": ["fields"]},
    ]}  # fmt: skip
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(values))
    records = {name: list(group) for name, group in records_by_modality(config).items()}
    assert list(records) == ["image", "text"]
    assert records["image"][0] == {}, "a class outside the list is a record that is skipped"
    assert records["image"][3] == {"txt": b"dog\npicture 3", "png": png(3, 16)}
    assert [record["txt"] for record in records["text"]] == [b"who\nme"] * 5
    code, made, _ = call(
        capsys, "tokenizer", "train", "--config", str(config), "--out", str(tmp_path / "fitted"),
        "--learn", "image", "--steps", "2",
    )  # fmt: skip
    assert code == 0 and set(made["fitted"]["seconds"]) == {"text", "image"} and made["heldout"] == {}
    assert made["fitted"]["skipped"] == {"image": 1}
    assert made["learned"]["image"]["steps"] == 2
    assert TokenizerSet.load(tmp_path / "fitted").codecs["image"].kind == "image.conv"
    learning = ["tokenizer", "train", "--config", str(config), "--out", str(tmp_path / "f2"), "--learn"]
    assert run([*learning, "text"]) == 2
    assert run(["tokenizer", "train", "--out", str(tmp_path / "x")]) == 2
    assert run(["tokenizer", "train", "--out", "x", "--data", str(data), "--config", str(config)]) == 2


# --- stats -------------------------------------------------------------------------------------------------


def stats_job(tmp_path: Path) -> tuple[Path, Path]:
    """(data folder, config): two text sources, one of them small and weighted heavily."""
    words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]
    TokenizerSet({"text": TextCodec.fit([" ".join(words)] * 20, size=300)}).save(tmp_path / "tok")
    data = tmp_path / "data"
    for name, count, scale in (("long", 120, 40), ("short", 10, 2)):
        members = [(f"{name}{i}.txt", " ".join(words * (1 + i % scale)).encode()) for i in range(count)]
        write_tar(data / f"{name}-train-0000.tar", members)
    config = tmp_path / "job.yaml"
    sources = [
        {"name": n, "shards": f"{n}-train-0000.tar", "plan": ["text"], "weight": w}
        for n, w in (("long", 3), ("short", 1))
    ]
    config.write_text(
        yaml.safe_dump(
            {
                "run": {"name": "j", "seed": 1, "dir": str(tmp_path / "run")},
                "tokenizers": {"dir": str(tmp_path / "tok")},
                "data": {"dir": str(data), "sources": sources},
                "model": {"layers": 2, "width": 64, "heads": 4, "kv_heads": 2},
                "optimizer": {"lr": 1e-3},
                "stages": [
                    {"context": 128, "batch": 4, "tokens": 40_960, "layout": {"dp": 2}},
                    {"context": 512, "batch": 4, "tokens": 40_960, "layout": {"dp": 2}},
                ],
            }
        )
    )
    return data, config


def test_stats_predict_fill_balance_and_epochs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, config = stats_job(tmp_path)
    argv = ["data", "stats", str(data), "--config", str(config)]
    assert run(argv) == 3, "lengths are not there yet"
    assert "ringweave data index" in capsys.readouterr().err
    assert (
        run(
            [
                "data",
                "index",
                str(data),
                "-t",
                str(tmp_path / "tok"),
                "--config",
                str(config),
                "--lengths-only",
            ]
        )
        == 0
    )
    assert not list(data.glob("*.tokens-*"))
    code, facts, said = call(capsys, *argv)
    assert code == 0
    long, short = facts["sources"]
    assert (long["documents"], short["documents"]) == (120, 10)
    assert sum(entry["count"] for entry in long["histogram"]) == 120
    assert long["shortest"] <= long["median"] <= long["p95"] <= long["longest"]
    for stage in facts["stages"]:
        assert 0.9 < stage["fill"] <= 1 and 1 <= stage["balance_mean"] <= stage["balance_worst"] < 2
        assert abs(stage["share"]["long"] - 0.75) < 0.05
        slots = stage["steps"] * 4 * stage["context"] * stage["fill"]
        assert stage["epochs"]["short"] == pytest.approx(0.25 * slots / short["tokens"], rel=1e-2)
    total = sum(stage["epochs"]["short"] for stage in facts["stages"])
    assert facts["epochs"]["short"] == pytest.approx(total, rel=1e-3) and total > 4
    text = "\n".join(facts["warnings"])
    assert f"short: read {total:.1f} times" in text and "long: of 120 documents some are longer" in text
    assert f"short: {total:.1f} epochs" in said and "█" in said


def test_a_folder_of_one_source_is_indexed_by_the_config_of_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Patterns lie below data.dir, which is above the folder; shards of other sources need not be there yet."""
    data, config = stats_job(tmp_path)
    for name in ("long", "short"):
        (data / name).mkdir()
    (data / "short-train-0000.tar").rename(data / "short" / "short-train-0000.tar")
    (data / "long-train-0000.tar").unlink()
    config.write_text(
        config.read_text()
        .replace("long-train", "long/long-train")
        .replace("shards: short", "shards: short/short")
    )
    index = ["data", "index", str(data / "short"), "-t", str(tmp_path / "tok"), "--config", str(config)]
    assert call(capsys, *index)[0] == 0
    assert len(list(data.rglob("*.tokens-*"))) == 1
    write_tar(data / "alone" / "other-train-0000.tar", [("a.txt", b"the fox")])
    index[2] = str(data / "alone")
    assert run(index) == 3, "no source of the config has this shard, here or in a copy"


def test_the_cost_model_is_that_of_the_config(tmp_path: Path) -> None:
    """24 operations a token and d² for plain attention and an MLP of 4 d with two matrices."""
    _, config = stats_job(tmp_path)
    model = load_config(config, ["model.kv_heads=4", f"model.ffn={64 * 8 // 3 + 2}"]).model
    assert cost_model(model).ratio == pytest.approx(24, rel=0.02)
    assert cost_model(load_config(config, ["model.kv_heads=1", "model.ffn=64"]).model).ratio == 4 + 1 + 6
    assert cost_model(load_config(config, ["model.window=16"]).model).window == 16


def test_bars_of_the_histogram_are_in_proportion() -> None:
    entries = [
        {"from": 8, "count": 100},
        {"from": 16, "count": 50},
        {"from": 32, "count": 0},
        {"from": 64, "count": 1},
    ]
    lines = histogram([{"source": "s", "histogram": entries}], width=24).splitlines()
    assert [line.count("█") for line in lines[1:]] == [16, 8, 0, 0]
    assert [line.split()[0] for line in lines[1:]] == ["8+", "16+", "32+", "64+"]
    assert "▏" in lines[4] or "▎" in lines[4], "one document still shows"
