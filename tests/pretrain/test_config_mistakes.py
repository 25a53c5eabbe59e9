"""Configs that are wrong: every kind of mistake ends in one ConfigError that names place, value and remedy."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from ringweave.pretrain.config import load_config
from ringweave.pretrain.errors import MAX_PROBLEMS, ConfigError, redact
from ringweave.tokenizers.errors import EXIT_CONFIG


def fail(path: Path, *overrides: str, world: int | None = None) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, world=world)
    assert caught.value.exit_code == EXIT_CONFIG
    return caught.value


MISTYPED = [
    ("optimizer.lrr", "optimizer.lr"),
    ("optimizer.learning_rate", "optimizer.lr"),
    ("optimizer.weight_deccay", "optimizer.weight_decay"),
    ("optimizer.wd", "optimizer.weight_decay"),
    ("optimizer.warm_up", "optimizer.warmup"),
    ("optimizer.warmup_steps", "optimizer.warmup"),
    ("optimizer.shedule", "optimizer.schedule"),
    ("optimizer.beta", "optimizer.betas"),
    ("optimizer.grad_clip", "optimizer.clip"),
    ("optimizer.layers", "model.layers"),
    ("optimizer.min_lr", "optimizer.min_lr_ratio"),
    ("lr", "optimizer.lr"),
    ("seed", "run.seed"),
    ("warmup", "optimizer.warmup"),
    ("name", "run.name"),
    ("modle", "model"),
    ("optimiser", "optimizer"),
    ("stage", "stages"),
    ("presicion", "precision"),
    ("tokenizer", "tokenizers"),
    ("check_point", "checkpoint"),
    ("dtype", "precision"),
    ("run.sede", "run.seed"),
    ("run.directory", "run.dir"),
    ("run.output_dir", "run.dir"),
    ("model.width_", "model.width"),
    ("model.hidden_size", "model.width"),
    ("model.num_layers", "model.layers"),
    ("model.layer", "model.layers"),
    ("model.n_heads", "model.heads"),
    ("model.kvheads", "model.kv_heads"),
    ("model.num_key_value_heads", "model.kv_heads"),
    ("model.intermediate_size", "model.ffn"),
    ("model.lr", "optimizer.lr"),
    ("model.rope_theta", "stages.N.rope_theta"),
    ("model.tp", "stages.N.layout.tp"),
    ("data.source", "data.sources"),
    ("data.path", "data.dir"),
    ("data.seed", "run.seed"),
    ("data.sources.0.shard", "data.sources.0.shards"),
    ("data.sources.0.weigth", "data.sources.0.weight"),
    ("data.sources.1.held_out", "data.sources.1.heldout"),
    ("objective.next_tokens", "objective.next_token"),
    ("objective.normalise", "objective.normalize"),
    ("objective.modality_weight", "objective.modality_weights"),
    ("stages.0.contxt", "stages.0.context"),
    ("stages.0.seq_len", "stages.0.context"),
    ("stages.0.token", "stages.0.tokens"),
    ("stages.0.batch_size", "stages.0.batch"),
    ("stages.1.microbatch", "stages.1.micro_batch"),
    ("stages.1.theta", "stages.1.rope_theta"),
    ("stages.1.weigths", "stages.1.weights"),
    ("stages.1.tp", "stages.1.layout.tp"),
    ("stages.0.layout.cp", "stages.0.layout.sp"),
    ("stages.0.layout.rings", "stages.0.layout.ring"),
    ("stages.0.layout.DP", "stages.0.layout.dp"),
    ("stages.0.layout.batch", "stages.0.batch"),
    ("checkpoint.evry", "checkpoint.every"),
    ("checkpoint.save_interval", "checkpoint.every"),
    ("checkpoint.keeps", "checkpoint.keep"),
    ("log.tensor_board", "log.tensorboard"),
    ("log.log_interval", "log.every"),
    ("timeout.collectives", "timeout.collective"),
    ("timeout.started", "timeout.start"),
]


@pytest.mark.parametrize(("key", "meant"), MISTYPED)
def test_unknown_key_is_refused_with_the_right_name(base: Path, key: str, meant: str) -> None:
    error = fail(base, f"{key}=1")
    problem = error.problems[0]
    assert problem.key == key and f"unknown key {key}" in problem.message
    assert problem.where == f"--set {key}=1"
    suggested = problem.hint.removeprefix("did you mean ").removesuffix("?").split(" or ")
    assert meant in suggested[:3], problem.hint


WRONG_VALUES = [
    ("model.layers=four", "whole number", "'four'"),
    ("model.layers=true", "whole number", "True"),
    ("model.layers=2.5", "whole number", "2.5"),
    ("model.layers=0", "at least 1", "0"),
    ("model.width=[64]", "whole number", "[64]"),
    ("model.norm_eps=0", "above 0", "0"),
    ("model.kind=llama", "'lwm'", "'llama'"),
    ("optimizer.lr=fast", "a number", "'fast'"),
    ("optimizer.lr=.nan", "a number", "nan"),
    ("optimizer.lr=-1e-3", "above 0", "'-1e-3'"),
    ("optimizer.betas=[0.9]", "at least 2 items", "0.9"),
    ("optimizer.betas=[0.9, 0.95, 0.99]", "at most 2", "0.99"),
    ("optimizer.betas=0.9", "a list", "0.9"),
    ("optimizer.betas=[0.9, 1.0]", "below 1", "1.0"),
    ("optimizer.schedule=cosin", "'cosine' or 'constant'", "did you mean cosine?"),
    ("optimizer.kind=adam", "'adamw'", "did you mean adamw?"),
    ("optimizer.warmup=-1", "at least 0", "-1"),
    ("optimizer.min_lr_ratio=2", "at most 1", "2"),
    ("precision=bfloat16", "'fp32' or 'bf16'", "did you mean bf16?"),
    ("stages.0.context=4X", "context length", "'4X'"),
    ("stages.0.context=1.0001K", "context length", "'1.0001K'"),
    ("stages.0.context=-4K", "context length", "'-4K'"),
    ("stages.0.tokens=lots", "number of tokens", "'lots'"),
    ("stages.0.tokens=0", "number of tokens", "0"),
    ("stages.0.layout.ring=zig-zag", "'zigzag'", "did you mean zigzag?"),
    ("stages.0.layout=4", "a section of keys", "4"),
    ("stages.0.weights=[1]", "a section of name: number", "[1]"),
    ("stages=[]", "at least 1 item", "[]"),
    ("stages=3", "a list", "3"),
    ("run.name=", "text", "''"),
    ("run.name=5", "text", "5"),
    ("run.seed=-1", "at least 0", "-1"),
    ("data.sources.0.plan=[txt]", "plan items", "did you mean text?"),
    ("data.sources.0.plan=[imge]", "plan items", "did you mean image?"),
    ("data.sources.0.plan=[]", "at least 1 item", "[]"),
    ("data.sources.0.weight=-1", "at least 0", "-1"),
    ("objective.modality_weights={vidoe: 1}", "modalities", "did you mean video?"),
    ("objective.normalize=token", "'modality' or 'tokens'", "did you mean tokens?"),
    ("checkpoint.every=often", "a duration such as 5min", "'often'"),
    ("checkpoint.every=0", "a duration such as 5min", "0"),
    ("checkpoint.keep=0", "at least 1", "0"),
    ("timeout.collective=soon", "a duration", "'soon'"),
    ("timeout.collective=-1s", "a duration", "'-1s'"),
    ("log.tensorboard=maybe", "true or false", "'maybe'"),
]


@pytest.mark.parametrize(("override", "expected", "given_or_hint"), WRONG_VALUES)
def test_wrong_value_names_expected_and_given(
    base: Path, override: str, expected: str, given_or_hint: str
) -> None:
    error = fail(base, override)
    assert len(error.problems) == 1
    problem = error.problems[0]
    assert problem.key.startswith(override.partition("=")[0]) and problem.where == f"--set {override}"
    assert expected in problem.message
    assert given_or_hint in problem.message or given_or_hint == problem.hint


IMPOSSIBLE = [
    (["stages.0.layout.tp=4"], 4, "dp·pp·tp·sp = 8, world = 4", "stages.0.layout"),
    (["stages.0.layout.dp=4"], None, "dp·pp·tp·sp = 4, but stage 0 has 8", "stages.1.layout"),
    (
        ["model.heads=3", "model.kv_heads=3", "model.width=66"],
        None,
        "model.heads = 3 is not divisible by tp = 2",
        None,
    ),
    (["model.kv_heads=1"], None, "model.kv_heads = 1 is not divisible by tp = 2", None),
    (["model.ffn=33"], None, "model.ffn = 33 is not divisible by tp = 2", None),
    (["model.layers=1"], None, "model.layers = 1 is less than pp = 2", None),
    (["stages.0.batch=7"], None, "batch = 7 is not divisible by dp = 2", "stages.0.batch"),
    (["stages.0.micro_batch=3"], None, "batch / dp = 8 / 2 = 4 is not divisible by micro_batch = 3", None),
    (
        ["stages.1.batch=1"],
        None,
        "micro-batches per rank = batch / dp / micro_batch = 1 is less than pp = 2",
        None,
    ),
    (["stages.1.context=3"], None, "context = 3 is less than 2·sp = 4", None),
    (["model.width=65"], None, "width 65 is not divisible by heads 4", "model.heads"),
    (["model.width=68"], None, "head size width / heads = 68 / 4 = 17 is odd", "model.heads"),
    (["model.kv_heads=3"], None, "heads 4 is not divisible by kv_heads 3", "model.kv_heads"),
    (["data.sources.1.name=text"], None, "source name 'text' is used 2 times", "data.sources.1.name"),
    (
        ["data.sources.0.weight=0", "data.sources.1.weight=0"],
        None,
        "every source has weight 0",
        "data.sources",
    ),
    (
        ["stages.1.weights={txt: 1}"],
        None,
        "weights of stage 1 name an unknown source 'txt'",
        "stages.1.weights.txt",
    ),
    (["stages.1.weights={text: 0}"], None, "weights of stage 1 leave no source", "stages.1.weights"),
]


@pytest.mark.parametrize(("overrides", "world", "numbers", "key"), IMPOSSIBLE)
def test_impossible_settings_show_their_numbers(
    base: Path, overrides: list[str], world: int | None, numbers: str, key: str | None
) -> None:
    error = fail(base, *overrides, world=world)
    found = [problem for problem in error.problems if numbers in problem.message]
    assert found, error.render()
    assert found[0].hint
    assert key is None or found[0].key == key


def test_line_numbers_point_into_the_file(base: Path) -> None:
    text = base.read_text().replace("batch: 8\n    layout", "bacth: 8\n    layout")
    base.write_text(text.replace("warmup: 2", "warmup: soon"))
    error = fail(base)
    lines = {problem.key: problem.where.rpartition(":")[2] for problem in error.problems}
    assert lines["stages.1.bacth"] == "14" and lines["optimizer.warmup"] == "9"
    assert lines["stages.1.batch"] == "12", "a missing key is reported where its section starts"
    assert "did you mean stages.1.batch" in error.render()


def test_duplicate_keys_name_both_lines(base: Path) -> None:
    base.write_text(base.read_text() + "optimizer: {lr: 1}\n")
    assert "on lines 9 and 16" in fail(base).what


def test_many_problems_are_listed_up_to_ten(base: Path) -> None:
    error = fail(base, *(f"model.wrong{i}=1" for i in range(14)))
    assert len(error.problems) == 14
    text = error.render()
    assert f"  {MAX_PROBLEMS}. " in text and f"  {MAX_PROBLEMS + 1}. " not in text and "and 4 more" in text
    assert len(error.as_dict()["problems"]) == 14


BROKEN = {
    "tab": "run:\n\t- x",
    "unclosed": "run: {name: x",
    "python object": "run: !!python/object/apply:os.system ['true']",
    "unknown tag": "run: !thing 3",
    "list": "- 1\n- 2",
    "scalar": "hello",
    "two documents": "run: {}\n---\nrun: {}",
    "recursive": "run: &a [*a]",
    "bomb": "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
    + "".join(
        f"{c}: &{c} [{', '.join(['*' + p] * 10)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)
    ),
    "merge key": "a: &a {x: 1}\nrun: {<<: *a}",
    "bare question mark": "run: [caption?, image]",
    "list as key": "? [1, 2]\n: 3",
    "control character": "run: \x00",
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN.keys())
def test_broken_files_end_in_a_config_error(base: Path, text: str) -> None:
    base.write_text(text)
    started = time.monotonic()
    error = fail(base)
    assert str(base) in error.where
    assert time.monotonic() - started < 5


def test_unreadable_files(tmp_path: Path) -> None:
    assert "No such file" in fail(tmp_path / "none.yaml").why
    assert fail(tmp_path).what == "cannot read the config"
    (tmp_path / "latin.yaml").write_bytes(b"run: \xff")
    assert "UTF-8" in fail(tmp_path / "latin.yaml").what
    (tmp_path / "big.yaml").write_bytes(b"#" * (1 << 21))
    assert "bytes" in fail(tmp_path / "big.yaml").what


@pytest.mark.parametrize(
    "override",
    [
        "",
        "=1",
        "lr",
        "optimizer..lr=1",
        "stages.9.tokens=1",
        "stages.x.tokens=1",
        "precision.x=1",
        "run.name={",
    ],
)
def test_malformed_overrides(base: Path, override: str) -> None:
    assert fail(base, override).where.startswith("--set")


# --- secrets -----------------------------------------------------------------------------------------------

SECRETS = [
    "https://user:hunter2@host/data/x.tar",
    "s3://bucket/x?X-Amz-Signature=hunter2&X-Amz-Date=3",
    "https://host/x?sv=1&sig=hunter2",
    "https://host/x?a=1&token=hunter2",
    "https://hunter2@host/x",
]


@pytest.mark.parametrize("url", SECRETS)
def test_secrets_are_hidden_wherever_a_config_is_shown(base: Path, url: str) -> None:
    hidden = redact({"a": [url]})["a"][0]
    assert "hunter2" not in hidden
    assert "host" in hidden or "bucket" in hidden, "the rest of the address stays"
    config = load_config(base, [f"data.dir={url}"])
    assert config.data.dir == url
    assert "hunter2" not in config.to_yaml() and "hunter2" not in json.dumps(config.to_dict())
    assert "hunter2" not in fail(base, f"model.layers={url}").render()
