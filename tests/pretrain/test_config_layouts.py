"""Layouts that cannot work: the rule with its numbers, and the nearest legal layouts, all before torch is there."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ringweave.pretrain.config import Layout, RunConfig, config_from_dict, load_config
from ringweave.pretrain.config_layouts import AXES, distance, nearest_layouts, show_layout, suggestion
from ringweave.pretrain.errors import ConfigError

VALUES: dict[str, Any] = {
    "run": {"name": "base", "dir": "runs/base"},
    "tokenizers": {"dir": "none"},
    "data": {"dir": "none", "sources": [{"name": "text", "shards": "text.tar", "plan": ["text"]}]},
    "model": {"layers": 4, "width": 64, "heads": 4, "kv_heads": 2},
    "optimizer": {"lr": 1e-3},
}


def with_stage(layout: dict[str, Any], **stage: Any) -> dict[str, Any]:
    """Plain values of a config with one stage."""
    return {
        **VALUES,
        "stages": [{"context": 1024, "tokens": 10**5, "batch": 16, **stage, "layout": layout}],
    }


def unchecked(values: dict[str, Any]) -> RunConfig:
    """The config with a legal layout in place of the asked one, and then the asked one put in unchecked."""
    asked = values["stages"][0]["layout"]
    safe = {**values, "stages": [{**values["stages"][0], "layout": {}}]}
    config = config_from_dict(safe, source="test")
    stage = config.stages[0].model_copy(update={"layout": Layout(**asked)})
    return config.model_copy(update={"stages": (stage,)})


def refused(values: dict[str, Any], world: int | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        config_from_dict(values, source="test", world=world)
    assert caught.value.exit_code == 2
    return caught.value.render()


CASES = [
    ("product", {"dp": 2, "tp": 2}, {}, 8, "dp·pp·tp·sp = 4, world = 8", "dp4·tp2, dp2·pp2·tp2, dp2·tp2·sp2"),
    ("heads", {"tp": 4}, {}, 4, "model.kv_heads = 2 is not divisible by tp = 4", "dp2·tp2, pp2·tp2, tp2·sp2"),
    ("layers", {"pp": 8}, {}, 8, "model.layers = 4 is less than pp = 8", "dp2·pp4, pp4·tp2, pp4·sp2"),
    (
        "layers in parts", {"pp": 4, "schedule": "interleaved"}, {}, 4,
        "model.layers = 4 is less than pp · virtual = 8 = 8", "dp2·pp2, pp2·tp2, pp2·sp2",
    ),
    ("batch", {"dp": 3}, {}, 3, "batch = 16 is not divisible by dp = 3", "pp3, sp3"),
    (
        "micro-batches", {"pp": 4, "dp": 2}, {"batch": 4}, 8,
        "micro-batches per rank = batch / dp / micro_batch = 2 is less than pp = 4",
        "pp4·tp2, pp4·sp2",
    ),
    ("context", {"sp": 4}, {"context": 6}, 4, "context = 6 is less than 2·sp = 8", "dp2·sp2, pp2·sp2, tp2·sp2"),
    (
        "split", {"pp": 2, "split": [1, 2]}, {}, 2,
        "split has 2 parts of 3 layers, pp·virtual = 2 parts of 4 layers are needed", "pp2 (split: null)",
    ),
    ("ulysses over sp", {"sp": 4, "ulysses": 3}, {}, 4, "sp = 4 is not divisible by ulysses = 3", "sp4 (ulysses: 2)"),
    (
        "ulysses over heads", {"sp": 4, "ulysses": 4}, {}, 4,
        "model.kv_heads = 2 is not divisible by tp · ulysses = 4", "sp4 (ulysses: 2)",
    ),
    (
        "replicate", {"dp": 2, "sp": 2, "replicate": 3}, {}, 4, "dp · sp = 4 is not divisible by replicate = 3",
        "dp2·sp2 (replicate: 4)",
    ),
    (
        "parts of a schedule", {"pp": 2, "schedule": "zbv", "virtual": 1}, {}, 2,
        "schedule zbv needs 2 parts a rank, virtual = 1", "pp2 (virtual: 2)",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "stage", "world", "rule", "nearest"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_a_broken_rule_shows_its_numbers_and_the_nearest_legal_layouts(
    layout: dict[str, Any], stage: dict[str, Any], world: int, rule: str, nearest: str
) -> None:
    text = refused(with_stage(layout, **stage), world=world)
    assert rule in text
    assert f"legal layouts for {world} processes: {nearest}" in text, text
    assert text.count("legal layouts") == 1


def test_deepspeed_gets_layouts_without_a_pipeline() -> None:
    values = {**with_stage({"dp": 2, "pp": 2, "replicate": 1}), "engine": {"kind": "deepspeed"}}
    assert "legal layouts for 4 processes: dp4, dp2·tp2, dp2·sp2" in refused(values)


def test_where_no_layout_fits_the_processes_the_nearest_number_is_named() -> None:
    values = with_stage({"dp": 13}, context=8)
    assert "no layout fits 13 processes; legal layouts for 12 processes: " in refused(values, world=13)
    # Nothing but another micro_batch can help here, so nothing else is proposed.
    assert "legal layouts" not in refused(with_stage({"dp": 2}, micro_batch=3), world=2)


def test_a_number_of_processes_that_only_follows_from_the_layout_may_change_too() -> None:
    text = refused(with_stage({"tp": 3}))
    assert "legal layouts for 3 processes: pp3, sp3; for 2 processes: tp2" in text


def test_every_stage_gets_its_own() -> None:
    values = with_stage({"dp": 2})
    values["stages"].append({**values["stages"][0], "layout": {"sp": 3}})
    values["stages"].append({**values["stages"][0], "layout": {"pp": 8}})
    text = refused(values, world=2)
    assert text.count("legal layouts for 2 processes") == 2


@st.composite
def asked(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A config, legal but for its layout, and a number of processes."""
    heads = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    kv_heads = draw(st.sampled_from([k for k in (1, 2, 3, 4, 8) if heads % k == 0]))
    schedule = draw(st.sampled_from(["1f1b", "gpipe", "interleaved", "zero_bubble", "zbv"]))
    layout: dict[str, Any] = {axis: draw(st.integers(1, 6)) for axis in AXES}
    layout |= {
        "ulysses": draw(st.integers(1, 4)), "replicate": draw(st.integers(1, 6)), "schedule": schedule,
        "virtual": draw(st.integers(1, 3)),
        "split": draw(st.none() | st.lists(st.integers(1, 3), min_size=1, max_size=4)),
    }  # fmt: skip
    batch = draw(st.integers(1, 24))
    micro = draw(st.sampled_from([m for m in (1, 2, 3) if batch % m == 0]))
    values = with_stage(layout, batch=batch, micro_batch=micro, context=draw(st.integers(2, 40)))
    layers = draw(st.integers(2, 8))
    values["model"] = {
        "layers": layers, "width": 16 * heads, "heads": heads, "kv_heads": kv_heads,
        "ffn": draw(st.sampled_from([48, 64])),
    }  # fmt: skip
    values["engine"] = {"kind": draw(st.sampled_from(["torch", "torch", "deepspeed"]))}
    return values, draw(st.sampled_from([1, 2, 3, 4, 5, 6, 8, 12, 16, 24]))


def legal(values: dict[str, Any], layout: dict[str, Any], world: int) -> bool:
    try:
        config_from_dict(
            {**values, "stages": [{**values["stages"][0], "layout": layout}]}, source="t", world=world
        )
    except ConfigError:
        return False
    return True


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(asked())
def test_every_suggestion_is_legal_and_none_nearer_is_left_out(case: tuple[dict[str, Any], int]) -> None:
    values, world = case
    config = unchecked(values)
    wanted = config.stages[0].layout
    every = nearest_layouts(config, 0, world, limit=0)
    for layout in every:
        assert math.prod(getattr(layout, axis) for axis in AXES) == world
        assert legal(values, layout.model_dump(mode="json"), world), show_layout(wanted, layout)
    costs = [distance(wanted, layout) for layout in every]
    assert costs == sorted(costs)
    assert nearest_layouts(config, 0, world) == every[:3]
    # What the config itself allows with these axes and the layout's other keys as they are must be among them.
    listed = {tuple(getattr(layout, axis) for axis in AXES) for layout in every}
    for sizes in itertools.product(range(1, world + 1), repeat=4):
        if math.prod(sizes) == world and sizes not in listed:
            axes = dict(zip(AXES, sizes, strict=True))
            assert not legal(values, {**values["stages"][0]["layout"], **axes}, world), axes


@settings(max_examples=60, deadline=None)
@given(asked())
def test_a_legal_layout_is_its_own_nearest(case: tuple[dict[str, Any], int]) -> None:
    values, world = case
    config = unchecked(values)
    layouts = nearest_layouts(config, 0, world, limit=1)
    assume(layouts)
    again = unchecked(
        {**values, "stages": [{**values["stages"][0], "layout": layouts[0].model_dump(mode="json")}]}
    )
    assert nearest_layouts(again, 0, world, limit=1) == layouts
    assert distance(layouts[0], layouts[0]) == 0


def test_thousands_of_processes_are_searched_in_a_moment() -> None:
    config = unchecked(with_stage({"dp": 2, "tp": 2}, batch=10080))
    text = suggestion(config, 0, 10080)  # 72 divisors: as many ways to factor it as numbers of this size have
    assert text.startswith("legal layouts for 10080 processes: ")


def test_train_refuses_an_impossible_layout_before_torch(base: Path) -> None:
    program = (
        "import sys; from ringweave.launch.cli import run\n"
        "code = run(['train', sys.argv[1], '--set', 'stages.0.layout.tp=4', '--set', 'stages.0.layout.dp=1'])\n"
        "print(code, *(m for m in ('torch', 'numpy') if m in sys.modules))"
    )
    env = {**os.environ, "RANK": "0", "WORLD_SIZE": "4"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(base)], capture_output=True, text=True, check=True, env=env
    )
    assert done.stdout.split() == ["2"], done.stdout
    assert "model.kv_heads = 2 is not divisible by tp = 4" in done.stderr
    assert "legal layouts for 4 processes: dp2·tp2" in done.stderr
    assert load_config(base).world == 4
