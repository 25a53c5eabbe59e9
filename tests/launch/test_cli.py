"""The command line: help, exit codes, messages, `--json`, and nothing heavy imported before it is needed."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from ringweave.launch.cli import run
from ringweave.launch.commands_data import records_by_source, source_of
from ringweave.launch.commands_run import started_world
from ringweave.launch.console import Progress, print_json, report_crash
from ringweave.launch.plan import memory_estimate, parameter_count
from ringweave.launch.slurm import job_script
from ringweave.pretrain.config import load_config
from ringweave.pretrain.errors import ConfigError, HangError, NonFiniteError, StorageError
from ringweave.tokenizers.errors import DataError, VocabularyError

ROOT = Path(__file__).resolve().parents[2]
DEMO = str(ROOT / "launch" / "recipes" / "demo.yaml")

COMMANDS = [
    ["demo"],
    ["data", "build"],
    ["data", "index"],
    ["data", "check"],
    ["data", "show"],
    ["tokenizer", "train"],
    ["tokenizer", "encode"],
    ["tokenizer", "decode"],
    ["tokenizer", "show"],
    ["tokenizer", "eval"],
    ["tokenizer", "encode-shards"],
    ["config", "show"],
    ["config", "schema"],
    ["train"],
    ["launch"],
    ["verify"],
    ["eval"],
    ["eval", "rgba"],
    ["export"],
    ["sample"],
    ["report"],
    ["doctor"],
    ["plan"],
]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests may themselves run under a launcher."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def write_shard(path: Path, count: int = 3) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(count):
            for ext, data in (("json", b'{"piece": "p"}'), ("txt", f"text {i}".encode())):
                info = tarfile.TarInfo(f"k{i}.{ext}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def last_json(capsys: pytest.CaptureFixture[str]) -> dict:
    out = capsys.readouterr().out
    value = json.loads(out.splitlines()[-1])
    assert isinstance(value, dict)
    return value


# --- help and usage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_has_an_example_and_json(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*command, "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"Example: ringweave {' '.join(command)}" in out
    assert "--json" in out


def test_main_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(command[0] in out for command in COMMANDS)
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("ringweave ")


def test_mistyped_command_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["trian"]) == 2
    assert "Did you mean 'train'" in capsys.readouterr().err
    assert run(["plan", DEMO, "--vocabulary", "3", "--json"]) == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["exit_code"] == 2
    assert "ringweave plan --help" in captured.err
    assert run(["verify", "--world", "0"]) == 2


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["config", "show", DEMO],
        ["plan", DEMO],
        ["train", DEMO, "--set", "model.lr=1"],
        ["report", "none"],
    ],
    ids=["help", "config", "plan", "train with a mistake", "report of nothing"],
)
def test_torch_is_not_imported(argv: list[str]) -> None:
    program = (
        "import sys; from ringweave.launch.cli import run; code = run(sys.argv[1:])\n"
        "print(code, *(m for m in ('torch', 'transformers', 'deepspeed') if m in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *argv], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert len(done.stdout.splitlines()[-1].split()) == 1, done.stdout


# --- failures ----------------------------------------------------------------------------------------------

FAILURES = [
    (ConfigError("w", where="here", why="because", fix="do"), 2),
    (DataError("w", where="here"), 3),
    (VocabularyError("w"), 3),
    (NonFiniteError("w"), 4),
    (HangError("w"), 5),
    (StorageError("w"), 6),
]


@pytest.mark.parametrize(("error", "code"), FAILURES, ids=[type(e).__name__ for e, _ in FAILURES])
def test_every_failure_has_its_exit_code_in_text_and_json(
    error: Exception,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    (tmp_path / "metrics.jsonl").touch()
    monkeypatch.setattr("ringweave.pretrain.report.write_report", fail)
    assert run(["report", str(tmp_path), "--json"]) == code
    captured = capsys.readouterr()
    payload = json.loads(captured.out)
    assert payload["error"] == type(error).__name__ and payload["exit_code"] == code
    assert captured.err.startswith("error: w")


def test_message_says_what_where_why_next(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    assert run(["train", str(missing)]) == 2
    assert capsys.readouterr().err == (
        f"error: cannot read the config\n  where: {missing}\n"
        "  why:   No such file or directory\n  next:  check the path\n"
    )


def test_unexpected_failure_leaves_its_traceback_in_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def crash(*_: object, **__: object) -> None:
        raise ZeroDivisionError("https://u:hunter2@host")

    (tmp_path / "metrics.jsonl").touch()
    monkeypatch.setattr("ringweave.pretrain.report.write_report", crash)
    assert run(["report", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    [written] = (tmp_path / "logs").glob("crash-rank-0-*.txt")
    assert str(written) in said and "Traceback" not in said
    text = written.read_text()
    assert "ZeroDivisionError" in text and "hunter2" not in text + said
    report_crash(ValueError("x"), run_dir=None, as_json=True)
    assert json.loads(capsys.readouterr().out)["exit_code"] == 1


def test_only_rank_0_speaks_of_the_config(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(["train", DEMO]) == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    assert run(["train", DEMO]) == 2
    assert "dp·pp·tp·sp = 4, world = 2" in capsys.readouterr().err


@pytest.mark.parametrize("env", [{"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}])
def test_nonsense_from_a_launcher_is_a_config_error(env: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="makes no sense"):
        started_world(env)
    assert started_world({"WORLD_SIZE": "2"}) is None
    assert started_world({"RANK": "1", "WORLD_SIZE": "2"}) == 2


def test_folders_that_are_no_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("eval", "export", "sample", "report"):
        assert run([command, str(tmp_path / "none")]) == 2
        assert "no such run folder" in capsys.readouterr().err
        assert run([command, str(tmp_path)]) == 2
        assert "not a run folder" in capsys.readouterr().err


def test_closed_pipe_ends_quietly() -> None:
    program = f"{sys.executable} -m ringweave.launch.cli config schema | true"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


# --- commands ----------------------------------------------------------------------------------------------


def test_config_show_and_schema(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["config", "show", DEMO, "--set", "run.seed=99", "--world", "4"]) == 0
    text = capsys.readouterr().out
    assert "seed: 99" in text and "K = 1024 for context, K = 1000 for tokens" in text
    (tmp_path / "shown.yaml").write_text(text)
    assert load_config(tmp_path / "shown.yaml") == load_config(DEMO, ["run.seed=99"])
    assert run(["config", "show", DEMO, "--json"]) == 0
    assert last_json(capsys)["hash"] == load_config(DEMO).hash()
    assert run(["config", "schema"]) == 0
    assert "stages.N.layout.ring" in capsys.readouterr().out
    assert run(["config", "schema", "--json"]) == 0
    assert "properties" in last_json(capsys)


def test_plan_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", DEMO, "--vocab", "8192", "--json"]) == 0
    captured = capsys.readouterr()
    assert "estimate" in captured.err
    shown, config = json.loads(captured.out), load_config(DEMO)
    assert shown["total_steps"] == config.total_steps and shown["world"] == 4
    assert [s["layout"] for s in shown["stages"]] == ["dp2·tp2", "pp2·sp2", "sp4"]
    assert shown["parameters"] == parameter_count(config.model, vocab=8192)["total"]


def test_memory_estimate_moves_the_right_way() -> None:
    config = load_config(DEMO)
    stage = config.stages[0]

    def total(**layout: int) -> float:
        changed = stage.model_copy(
            update={"layout": stage.layout.model_copy(update={"dp": 1, "tp": 1, **layout})}
        )
        return memory_estimate(config, changed, vocab=8192)["total_gib"]

    assert total(dp=2) < total() and total(tp=2) < total() and total(sp=2) < total()
    longer = stage.model_copy(update={"context": 4 * stage.context})
    parts, more = memory_estimate(config, stage, vocab=8192), memory_estimate(config, longer, vocab=8192)
    assert (
        more["activations_gib"] == 4 * parts["activations_gib"] and more["states_gib"] == parts["states_gib"]
    )


def test_parameter_count_is_that_of_the_model() -> None:
    torch = pytest.importorskip("torch")
    from ringweave.pretrain.models.lwm import LWM, LWMShape

    model = load_config(DEMO).model
    shape = LWMShape(
        vocab=1024,
        layers=model.layers,
        width=model.width,
        heads=model.heads,
        kv_heads=model.kv_heads,
        ffn=model.ffn,
    )
    with torch.device("meta"):
        built = LWM(shape)
    assert sum(p.numel() for p in built.parameters()) == parameter_count(model, vocab=1024)["total"]


def test_data_index_check_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("text-train-0000.tar", "text-heldout-0000.tar"):
        write_shard(tmp_path / name)
    assert run(["data", "check", str(tmp_path)]) == 3
    assert "ringweave data index" in capsys.readouterr().out
    assert run(["data", "index", str(tmp_path), "--json"]) == 0
    assert len(last_json(capsys)["indexed"]) == 2
    assert run(["data", "check", str(tmp_path), "--json"]) == 0
    checked = last_json(capsys)
    assert (checked["shards"], checked["problems"], checked["ok"]) == (2, [], True)
    assert [(row["source"], row["samples"], row["damaged"]) for row in checked["sources"]] == [("text", 6, 0)]
    assert run(["data", "show", str(tmp_path), "--sample", "text-train-0000.tar#2", "--json"]) == 0
    shown = last_json(capsys)
    assert [row["records"] for row in shown["shards"]] == [3, 3]
    assert shown["sample"]["members"][1] == {"ext": "txt", "bytes": 6, "start": "text 2"}
    for wrong in ("text-train-0000.tar#3", "none.tar#0", "text-train-0000.tar"):
        assert run(["data", "show", str(tmp_path), "--sample", wrong]) == 2


def test_damage_is_found_and_exits_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = tmp_path / "text-train-0000.tar"
    write_shard(shard)
    assert run(["data", "index", str(tmp_path)]) == 0
    data = bytearray(shard.read_bytes())
    data[data.index(b"text 1") + 5] ^= 1
    shard.write_bytes(data)
    capsys.readouterr()
    assert run(["data", "check", str(tmp_path), "--json"]) == 3
    payload = last_json(capsys)
    assert not payload["ok"] and "k1" in json.dumps(payload["problems"])


def test_data_folders_that_hold_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["data", "check", str(tmp_path)]) == 3
    assert run(["data", "check", str(tmp_path / "none")]) == 2
    assert run(["tokenizer", "train", "--data", str(tmp_path), "--out", str(tmp_path / "t")]) == 3
    assert run(["tokenizer", "decode", "x.json", "-t", str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
    capsys.readouterr()


def test_records_by_source_can_be_read_again(tmp_path: Path) -> None:
    for name in (
        "text-train-0000.tar",
        "text-train-0001.tar",
        "text-heldout-0000.tar",
        "audio-train-0000.tar",
    ):
        write_shard(tmp_path / name, count=2)
    assert run(["data", "index", str(tmp_path)]) == 0
    groups = records_by_source(tmp_path, "train")
    assert list(groups) == ["audio", "text"] and len(groups["text"]) == 4
    first, second = list(groups["text"]), list(groups["text"])
    assert first == second and first[1]["txt"] == b"text 1"
    with pytest.raises(DataError, match="no test shards"):
        records_by_source(tmp_path, "test")


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("image-train-0000.tar", "image"),
        ("a-b-heldout-0003.tar", "a-b"),
        ("books-0001.tar", "books"),
        ("x.tar", "x"),
    ],
)
def test_source_of_a_shard_name(name: str, source: str) -> None:
    assert source_of(Path(name)) == source


def test_doctor_passes_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--json"]) == 0
    checks = {check["name"]: check for check in last_json(capsys)["checks"]}
    assert checks["gloo"]["ok"] and checks["tokenizers"]["ok"] and checks["python"]["ok"]


def test_slurm_script_is_valid_bash_and_holds_what_it_must(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "job.sh"
    argv = ["launch", DEMO, "--to", "slurm", "--nodes", "2", "--script", str(script), "--set", "run.name=a b"]
    assert run(argv) == 0
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    for part in (
        "set -uo pipefail",
        "--requeue",
        "--nproc-per-node=2",
        "--nnodes=2",
        "--rdzv-id",
        "'run.name=a b'",
    ):
        assert part in text
    assert "set -x" not in text.replace("`set -x`", "")
    assert run(["launch", DEMO, "--to", "slurm", "--nodes", "3"]) == 2
    assert run(["launch", DEMO, "--to", "pbs"]) == 2
    with pytest.raises(ConfigError, match="no secret"):
        job_script(
            load_config(DEMO), ["train", "x", "--set", "data.dir=s3://b?sig=hunter2"], nodes=1, minutes=9
        )
    capsys.readouterr()


def test_progress_and_json_helpers(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress:
        progress("a", 1, 3)
        progress("a", 2, 3)
        progress("a", 3, 3)
    assert capsys.readouterr().err.splitlines() == ["a 1/3", "a 3/3"]
    print_json({"x": float("nan"), "y": [float("inf"), 1.5], 3: Path("p")})
    assert json.loads(capsys.readouterr().out) == {"x": None, "y": [None, 1.5], "3": "p"}


def test_module_and_console_script_agree() -> None:
    script = Path(sys.executable).with_name("ringweave")
    if not os.access(script, os.X_OK):
        pytest.skip("not installed as a script")
    for command in ([str(script)], [sys.executable, "-m", "ringweave.launch.cli"]):
        done = subprocess.run([*command, "train", "none.yaml"], capture_output=True, text=True, check=False)
        assert done.returncode == 2 and done.stderr.startswith("error: cannot read the config")


@pytest.mark.parametrize("streams", ["double", "single"])
@pytest.mark.parametrize("words_loss", [0.0, 0.5])
def test_parameter_count_of_a_dit_is_that_of_the_model(streams: str, words_loss: float) -> None:
    from ringweave.launch.plan import make_plan
    from ringweave.pretrain.backbone import shape_of

    recipe = str(ROOT / "launch" / "recipes" / "demo_dit.yaml")
    sets = [f"model.streams={streams}", f"stages.0.words_loss={words_loss}", "tokenizers.dir=nowhere"]
    config = load_config(recipe, sets)
    shape = shape_of(config, vocab=512, channels=64)
    assert make_plan(config, vocab=512)["parameters"] == shape.parameters
