"""Configs that are right: units, derived numbers, overrides, resume differences, and no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ringweave.data_pipes.layer_tasks import TASKS
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
from ringweave.pretrain.errors import ConfigError
from ringweave.pretrain.source_weights import stage_shares
from ringweave.tokenizers.segment import MODALITIES as SEGMENT_MODALITIES

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "launch" / "recipes" / "demo.yaml"


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
    raw = yaml.safe_load(base.read_text())
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
    assert {source.name for source in config.data.sources} == set(SOURCES) - {"scenes"}, (
        "those are a diffusion model's"
    )
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


def test_config_is_immutable(base: Path) -> None:
    config = load_config(base)
    with pytest.raises(ValueError, match="frozen"):
        config.run.seed = 3  # type: ignore[misc]


# --- resume, imports ---------------------------------------------------------------------------------------


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
    assert PLAN_ITEMS[-2:] == ("latents", "embeddings"), (
        "which stand beside words alone, and beside latents alone"
    )
    items = ", ".join(f"{item}, '{item}?'" for item in PLAN_ITEMS[:-2])
    found = load_config(base, [f"data.sources.0.plan=[{items}]"]).data.sources[0].plan
    assert len(found) == 2 * len(PLAN_ITEMS) - 4
    views = ("caption", "text?", "latents:layers", "latents:layer3?", "latents:seg.png?")
    quoted = ", ".join(f"'{view}'" for view in views)
    assert load_config(base, [f"data.sources.0.plan=[{quoted}]"]).data.sources[0].plan == views


# --- tasks ------------------------------------------------------------------------------------------------

SCENES = "data.sources.1={name: scenes, shards: scenes.tar, heldout: held.tar, weight: 3, tasks: %s}"


def test_a_source_with_tasks_is_a_source_for_each(base: Path) -> None:
    config = load_config(base, [SCENES % "{matting: 2, removal_with_mask: 1}"])
    text, first, second = config.data.sources
    assert [source.name for source in (text, first, second)] == [
        "text", "scenes/matting", "scenes/removal_with_mask",
    ]  # fmt: skip
    assert (first.plan, second.plan) == (TASKS["matting"], TASKS["removal_with_mask"])
    assert (text.weight, first.weight, second.weight) == (2, 2, 1)
    assert {source.shards for source in (first, second)} == {"scenes.tar"}
    assert {source.heldout for source in (first, second)} == {"held.tar"}
    assert config.stage_weights(0) == {name: share / 5 for name, share in zip(
        ("text", "scenes/matting", "scenes/removal_with_mask"), (2, 2, 1)
    )}  # fmt: skip
    assert config == load_config(base, [SCENES % "{matting: 20.0, removal_with_mask: 1e1}"])
    listed = load_config(base, [SCENES % "[removal, matting]"]).data.sources[1:]
    assert [(s.name, s.weight) for s in listed] == [("scenes/removal", 1.5), ("scenes/matting", 1.5)]


def test_all_tasks_in_the_place_of_their_source(base: Path) -> None:
    base.write_text(
        base.read_text().replace("    - {name: image", f"    - {(SCENES % 'all')[15:]}\n    - {{name: image")
    )
    sources = load_config(base).data.sources
    assert [s.name for s in sources] == ["text", *(f"scenes/{task}" for task in TASKS), "image"]
    assert sum(s.weight for s in sources[1:-1]) == pytest.approx(3)
    base.write_text(base.read_text().replace('"image-0000.tar"', '"image-0000.tar", wieght: 1'))
    with pytest.raises(ConfigError, match=r"data\.sources\.2\.wieght"):
        load_config(base)


def test_an_effective_config_with_tasks_reads_back(base: Path, tmp_path: Path) -> None:
    config = load_config(base, [SCENES % "{matting: 1, removal: 1, recomposition: 1}"])
    again = tmp_path / "effective.yaml"
    again.write_text(config.to_yaml())
    assert "tasks" not in again.read_text()
    assert load_config(again) == config and load_config(again).hash() == config.hash()
    assert config_from_dict(json.loads(json.dumps(config.to_dict())), source="json") == config
    assert resume_differences(config.to_dict(), config) == []
    changed = resume_differences(config.to_dict(), load_config(base, [SCENES % "[matting, removal]"]))
    assert {kind for key, _, _, kind in changed if key.endswith("name")} == {"impossible"}


def test_no_tasks_no_new_key(base: Path) -> None:
    assert "tasks" not in load_config(base).to_yaml()
    assert load_config(base, ["data.sources.1.tasks=null"]) == load_config(base)


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        ("[mating]", "there is no task 'mating'; did you mean matting?"),
        ("{removal_with_masks: 1}", "did you mean removal_with_mask?"),
        ("[zzzz]", "there is no task 'zzzz', got"),
        ("[matting, matting]", "'matting' is named twice"),
        ("[]", "at least one task"),
        ("{}", "at least one task"),
        ("matting", "`all`, a list of tasks"),
        ("3", "`all`, a list of tasks"),
        ("[3]", "there is no task '3'"),
        ("{matting: 0}", "a number above 0"),
        ("{matting: lots}", "a number, got 'lots'"),
    ],
)
def test_tasks_that_are_none(base: Path, tasks: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(base, [SCENES % tasks])
    [problem] = caught.value.problems
    assert problem.key.startswith("data.sources.1.tasks") and said in problem.message, problem


def test_plan_and_tasks_exclude_each_other(base: Path) -> None:
    for change, key, said in (
        ("tasks=[matting]", "data.sources.1", "`plan` or `tasks`, not both"),
        ("plan=null", "data.sources.1.plan", "a list"),
        ("plan=['latents:composite?']", "data.sources.1.plan", "no latents to train on"),
        ("plan=['latents:layers', image]", "data.sources.1.plan", "'image' cannot stand beside latents"),
        ("plan=['latents:layer']", "data.sources.1.plan", "did you mean `latents:layers`?"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(base, [f"data.sources.1.{change}"])
        [problem] = caught.value.problems
        assert problem.key == key and said in problem.message, problem
    with pytest.raises(ConfigError, match=r"missing key data\.sources\.1\.plan"):
        load_config(base, ["data.sources.1={name: a, shards: a.tar}"])
    twice = [SCENES % "all", "data.sources.0.name=scenes"]
    with pytest.raises(ConfigError, match="'scenes' is used twice"):
        load_config(base, twice)


def test_a_stage_may_name_one_task_or_the_whole(base: Path) -> None:
    tasks = "{matting: 2, removal: 1, recomposition: 1}"
    sources = load_config(base, [SCENES % tasks]).data.sources
    names = ["text", "scenes/matting", "scenes/removal", "scenes/recomposition"]
    for weights, wanted in (
        ({"text": 1.0, "scenes/removal": 2.0}, [1, 0, 2, 0]),
        ({"scenes": 4.0}, [0, 2, 1, 1]),
        ({"scenes": 4.0, "scenes/matting": 7.0}, [0, 7, 2, 2]),
        ({"scenes/matting": 0.0, "scenes": 4.0}, [0, 0, 2, 2]),
    ):
        assert stage_shares(sources, weights) == dict(zip(names, wanted)), weights
    with pytest.raises(ValueError, match="name an unknown source 'scene'"):
        stage_shares(sources, {"scene": 1.0})
    idle = load_config(base, [SCENES % tasks, "data.sources.1.weight=0"]).data.sources
    with pytest.raises(ValueError, match="'scenes', whose tasks have weight 0"):
        stage_shares(idle, {"scenes": 1.0})
    assert stage_shares(idle, {"scenes/matting": 1.0})["scenes/matting"] == 1
    config = load_config(base, [SCENES % tasks, "stages.1.weights={scenes/matting: 1}"])
    assert config.stage_weights(1) == dict(zip(names, [0, 1, 0, 0]))


def test_the_json_schema_takes_a_plan_or_tasks() -> None:
    source = RunConfig.model_json_schema()["$defs"]["Source"]
    assert source["required"] == ["name", "shards"]
    assert source["oneOf"] == [{"required": ["plan"]}, {"required": ["tasks"]}]
    assert {"const": "all"} in source["properties"]["tasks"]["anyOf"]
    assert "data.sources.N.tasks" in dotted_keys(RunConfig)


def test_a_stage_may_weigh_a_source_as_a_whole(base: Path) -> None:
    """All its tasks share the weight by their own; one that is named itself has its own."""
    tasks = SCENES % "{matting: 2, removal: 1}"
    whole = load_config(base, [tasks, "stages.1.weights={text: 1, scenes: 3}"])
    assert whole.stage_weights(1) == {"text": 0.25, "scenes/matting": 0.5, "scenes/removal": 0.25}
    mixed = load_config(base, [tasks, "stages.1.weights={scenes: 1, scenes/removal: 3}"])
    assert mixed.stage_weights(1) == {"text": 0.0, "scenes/matting": 0.25, "scenes/removal": 0.75}
    with pytest.raises(ConfigError, match="weights of stage 1"):
        load_config(base, [tasks, "stages.1.weights={scene: 1}"])
