"""Configs: units, every kind of mistake with its message, resume differences, and no torch."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ringweave.pretrain import units
from ringweave.pretrain.config import (
    MODALITIES,
    PLAN_ITEMS,
    RunConfig,
    config_from_dict,
    default_ffn,
    load_config,
    resume_differences,
)
from ringweave.pretrain.config_suggest import ALIASES, dotted_keys
from ringweave.pretrain.errors import MAX_PROBLEMS, ConfigError, redact
from ringweave.tokenizers.errors import EXIT_CONFIG
from ringweave.tokenizers.segment import MODALITIES as SEGMENT_MODALITIES

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "launch" / "recipes" / "demo.yaml"

BASE = """\
run: {name: base, dir: runs/base}
tokenizers: {dir: runs/base/tokenizers}
data:
  dir: data
  sources:
    - {name: text, shards: "text-{0000..0003}.tar", plan: [text], weight: 2}
    - {name: image, shards: "image-0000.tar", plan: ["caption?", image]}
model: {layers: 4, width: 64, heads: 4, kv_heads: 2}
optimizer: {lr: 3e-4, warmup: 2}
stages:
  - {context: 1K, tokens: 100K, batch: 8, micro_batch: 2, layout: {dp: 2, tp: 2}}
  - context: 4K
    tokens: 1M
    batch: 8
    layout: {pp: 2, sp: 2}
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(BASE)
    return path


def fail(path: Path, *overrides: str, world: int | None = None) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, world=world)
    assert caught.value.exit_code == EXIT_CONFIG
    return caught.value


# --- what is right -----------------------------------------------------------------------------------------


def test_units_defaults_and_derived_numbers(base: Path) -> None:
    config = load_config(base, world=4)
    first, second = config.stages
    assert (first.context, first.tokens, second.context, second.tokens) == (1024, 100_000, 4096, 1_000_000)
    assert first.steps == 100_000 // (1024 * 8) and second.steps == 1_000_000 // (4096 * 8)
    assert config.total_steps == first.steps + second.steps and config.world == 4
    assert first.micro_batches == 2 and second.micro_batches == 8
    assert config.optimizer.lr == 3e-4 and config.model.ffn == 192 and config.model.head_dim == 16
    assert config.checkpoint.every_seconds == 300 and config.checkpoint.every_steps is None
    assert config.stage_weights(0) == {"text": 2 / 3, "image": 1 / 3}
    assert set(config.objective.modality_weights) == set(MODALITIES)


def test_a_budget_below_one_step_still_makes_one(base: Path) -> None:
    assert load_config(base, ["stages.0.tokens=1"]).stages[0].steps == 1


def test_effective_config_reads_back_equal(base: Path, tmp_path: Path) -> None:
    config = load_config(
        base, ["checkpoint.every=20 steps", "timeout.collective=1.5min", "stages.1.weights={text: 1}"]
    )
    again = tmp_path / "effective.yaml"
    again.write_text(config.to_yaml())
    assert load_config(again) == config and load_config(again).hash() == config.hash()
    assert config_from_dict(json.loads(json.dumps(config.to_dict())), source="json") == config
    assert config.checkpoint.every_steps == 20 and config.timeout.collective == 90
    assert config.stage_weights(1) == {"text": 1.0, "image": 0.0}


def test_hash_follows_values_not_layout_of_the_file(base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    raw = yaml.safe_load(BASE)
    other.write_text(yaml.safe_dump({key: raw[key] for key in reversed(raw)}))
    assert load_config(other).hash() == load_config(base).hash()
    assert load_config(base, ["run.seed=1"]).hash() != load_config(base).hash()


def test_overrides_take_precedence_and_make_missing_sections(base: Path) -> None:
    overrides = ["optimizer.lr=1e-3", "optimizer.lr=2e-3", "log.every=3", "stages.1.layout.ring=contiguous"]
    config = load_config(base, overrides)
    assert (
        config.optimizer.lr == 2e-3 and config.log.every == 3 and config.stages[1].layout.ring == "contiguous"
    )
    assert load_config(base, ["log.tensorboard=false"]).log.tensorboard is False


def test_demo_recipe_reads_every_shard_the_demo_data_has() -> None:
    from ringweave.data_pipes.demo.build import SOURCES

    config = load_config(DEMO)
    for source in config.data.sources:
        last = SOURCES[source.name] - 1
        assert source.shards == f"{source.name}-train-{{0000..{last:04d}}}.tar"
        assert source.heldout == f"{source.name}-heldout-0000.tar"
    assert {source.name for source in config.data.sources} == set(SOURCES)
    assert {stage.layout.world for stage in config.stages} == {4}


def test_names_repeated_from_the_tokenizers_agree() -> None:
    assert MODALITIES == SEGMENT_MODALITIES
    assert set(ALIASES.values()) <= set(dotted_keys(RunConfig))


@given(st.integers(1, 10**9), st.sampled_from(["", "K", "k", "M"]))
def test_units_scale_exactly(number: int, unit: str) -> None:
    power = {"": 0, "k": 1, "m": 2}[unit.lower()]
    assert units.parse_tokens(f"{number}{unit}") == number * 1000**power
    assert units.parse_context(f"{number}{unit}") == number * 1024**power


@given(st.floats(0.001, 1e7))
def test_durations_read_back(seconds: float) -> None:
    shown = units.show_seconds(seconds)
    assert units.parse_seconds(shown) == pytest.approx(seconds, rel=1e-11)
    assert units.show_seconds(units.parse_seconds(shown)) == shown


@given(
    st.one_of(
        st.text(max_size=12), st.booleans(), st.floats(), st.none(), st.lists(st.integers(), max_size=2)
    )
)
def test_units_answer_or_refuse_with_a_reason(value: object) -> None:
    for parse in (units.parse_tokens, units.parse_context, units.parse_seconds, units.parse_interval):
        try:
            assert parse(value)
        except ValueError as error:
            assert "expected" in str(error)


@pytest.mark.parametrize("width", [1, 64, 192, 256, 768, 4096, 5120])
def test_default_ffn_is_the_nearest_multiple_of_64(width: int) -> None:
    ffn = default_ffn(width)
    assert ffn % 64 == 0 and (abs(ffn - 8 * width / 3) <= 32 or ffn == 64)


# --- what is wrong -----------------------------------------------------------------------------------------

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
    base.write_text(
        BASE.replace("batch: 8\n    layout", "bacth: 8\n    layout").replace("warmup: 2", "warmup: soon")
    )
    error = fail(base)
    lines = {problem.key: problem.where.rpartition(":")[2] for problem in error.problems}
    assert lines["stages.1.bacth"] == "14" and lines["optimizer.warmup"] == "9"
    assert lines["stages.1.batch"] == "12", "a missing key is reported where its section starts"
    assert "did you mean stages.1.batch" in error.render()


def test_duplicate_keys_name_both_lines(base: Path) -> None:
    base.write_text(BASE + "optimizer: {lr: 1}\n")
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


def test_config_is_immutable(base: Path) -> None:
    config = load_config(base)
    with pytest.raises(ValueError, match="frozen"):
        config.run.seed = 3  # type: ignore[misc]


# --- secrets, resume, imports ------------------------------------------------------------------------------

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


def test_resume_differences(base: Path) -> None:
    saved = load_config(base).to_dict()
    assert resume_differences(saved, load_config(base)) == []
    cases = {
        "run.dir=elsewhere": "harmless",
        "log.every=1": "harmless",
        "checkpoint.keep=9": "harmless",
        "timeout.collective=9s": "harmless",
        "stages.0.layout={dp: 4}": "harmless",
        "stages.0.micro_batch=1": "harmless",
        "optimizer.lr=1e-5": "needs --allow-change",
        "stages.0.tokens=200K": "needs --allow-change",
        "stages.0.batch=16": "needs --allow-change",
        "stages.1.weights={text: 1}": "needs --allow-change",
        "precision=bf16": "needs --allow-change",
        "model.layers=6": "impossible",
        "model.width=128": "impossible",
        "data.sources.0.plan=[caption]": "impossible",
    }
    for override, kind in cases.items():
        found = resume_differences(saved, load_config(base, [override]))
        worst = {k for _, _, _, k in found}
        assert kind in worst, (override, found)
        assert kind == "impossible" or "impossible" not in worst
        if kind == "harmless":
            assert worst == {"harmless"}
    [(key, old, new, _)] = resume_differences(saved, load_config(base, ["optimizer.lr=1e-5"]))
    assert (key, old, new) == ("optimizer.lr", 3e-4, 1e-5)


def test_an_added_stage_needs_allow_change(base: Path) -> None:
    saved = load_config(base).to_dict()
    longer = dict(saved, stages=[*saved["stages"], saved["stages"][1]])
    kinds = {k for _, _, _, k in resume_differences(saved, config_from_dict(longer, source="longer"))}
    assert "needs --allow-change" in kinds and "impossible" not in kinds


def test_a_saved_config_of_an_older_version_counts_with_defaults(base: Path) -> None:
    saved = load_config(base).to_dict()
    del saved["timeout"], saved["model"]["head_chunk"]
    assert resume_differences(saved, load_config(base)) == []


def test_reading_a_config_imports_no_torch_and_is_quick(base: Path) -> None:
    program = (
        "import sys, time; t = time.perf_counter()\n"
        "from ringweave.pretrain.config import load_config\n"
        "load_config(sys.argv[1])\n"
        "print(time.perf_counter() - t, *(m for m in ('torch', 'numpy', 'transformers') if m in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(base)], capture_output=True, text=True, check=True
    )
    seconds, *heavy = done.stdout.split()
    assert heavy == []
    assert float(seconds) < 3, "measured: 0.25 s on an idle core"


def test_every_plan_item_is_accepted(base: Path) -> None:
    items = ", ".join(f"{item}, '{item}?'" for item in PLAN_ITEMS)
    assert len(load_config(base, [f"data.sources.0.plan=[{items}]"]).data.sources[0].plan) == 2 * len(
        PLAN_ITEMS
    )
