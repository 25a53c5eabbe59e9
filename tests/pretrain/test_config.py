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
    items = ", ".join(f"{item}, '{item}?'" for item in PLAN_ITEMS)
    assert len(load_config(base, [f"data.sources.0.plan=[{items}]"]).data.sources[0].plan) == 2 * len(
        PLAN_ITEMS
    )
