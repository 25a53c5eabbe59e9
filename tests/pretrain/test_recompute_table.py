"""The table that `recompute: auto` decides by: bytes against independent counts, the rule by hand, runs that use it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ringweave.launch.cli import run as command
from ringweave.parallel.spawn import run_ranks
from ringweave.pretrain import recompute_table, verify
from ringweave.pretrain.config import config_from_dict, load_config
from ringweave.pretrain.errors import ConfigError
from ringweave.pretrain.memory import cgroup_left, layers_alive, memory_estimate
from ringweave.pretrain.models.dit import DiTShape
from ringweave.pretrain.models.lwm import LWMShape
from ringweave.pretrain.recompute_table import Row, choose, living, measure, stage_table
from ringweave.pretrain.run_folder import read_events

ROOT = Path(__file__).resolve().parents[2]
DEMO = str(ROOT / "launch" / "recipes" / "demo.yaml")
LWM = LWMShape(vocab=64, layers=6, width=64, heads=4, kv_heads=2, ffn=192)
DIT = DiTShape(layers=4, heads=4, axes=(8, 12, 12), channels=16, out=16, text=24)
SLOTS = 192


# --- bytes -----------------------------------------------------------------------------------------------


def _saved(shape: Any, layers: int, tp: int, norms: str) -> int:
    """What autograd saves of layers without recomputation, by its own hooks, each storage once; and the output."""
    model, states = recompute_table._layers(
        shape, layers, "none", tp=tp, norms=norms, precision="fp32", device="cpu"
    )
    x, inputs = recompute_table._inputs(model, states, SLOTS)
    found: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        keep(model(x, **inputs))
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), x, *inputs.values())}
    return sum(storage.nbytes() for at, storage in found.items() if at not in own)


@pytest.mark.parametrize(
    ("shape", "tp", "norms"),
    [(LWM, 1, "sequence"), (LWM, 2, "sequence"), (LWM, 2, "replicated"), (DIT, 1, "sequence")],
)
def test_bytes_without_recomputation_are_what_autograd_saves(shape: Any, tp: int, norms: str) -> None:
    kept = measure(shape, SLOTS, tp=tp, norms=norms).kept["none"]
    expected = _saved(shape, 2, tp, norms) - _saved(shape, 1, tp, norms)
    assert kept == pytest.approx(expected, rel=1e-3)


def test_bytes_of_a_causal_layer_by_hand() -> None:
    """In units of slots x width x 4 bytes: full keeps its input (the output of the layer before), attention's output
    and LSE; selective also the first norm, q, k, v and the middle."""
    kept = {how: size / (SLOTS * LWM.width * 4) for how, size in measure(LWM, SLOTS).kept.items()}
    assert kept["full"] == 2 + LWM.heads / LWM.width
    assert kept["selective"] == pytest.approx(1 + 1 + 1 + (1 + 0.5 + 0.5) + 1 + 1, abs=0.1)
    assert kept["none"] == pytest.approx(
        kept["selective"] + 2 + 4 * 3, abs=0.05
    )  # norm twice; gate, up, silu, product


def test_what_checkpointing_stashes_is_counted() -> None:
    """relu(x a) b: the graph holds the relu's output, or nothing, or what a policy keeps."""
    a, b = (torch.randn(8, 8, requires_grad=True) for _ in range(2))
    x, size = torch.randn(16, 8, requires_grad=True), 16 * 8 * 4

    def forward() -> Tensor:
        return F.relu(x @ a) @ b

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = op is torch.ops.aten.mm.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    known = [a, b, x]
    assert living(forward, known) == 2 * size
    assert living(lambda: checkpoint(forward, use_reentrant=False), known) == size
    stashed = living(lambda: checkpoint(forward, use_reentrant=False, context_fn=contexts), known)
    assert stashed == 2 * size  # both products, the second of which is the output


@pytest.mark.parametrize("shape", [LWM, DIT])
def test_none_keeps_most_and_full_least(shape: Any) -> None:
    found = measure(shape, SLOTS, precision="bf16")
    assert found.kept["none"] > found.kept["selective"] > found.kept["full"] > 0
    assert all(0 < seconds < 10 for seconds in found.seconds.values())


def test_a_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    measure(LWM, 64)
    assert torch.equal(before, torch.get_rng_state())


# --- totals and the choice -------------------------------------------------------------------------------


def test_totals_are_the_stated_sum() -> None:
    config = load_config(DEMO)
    stage = config.stages[1]  # pp2·sp2, 2 micro-batches in flight
    shape = LWMShape(vocab=512, layers=4, width=64, heads=4, kv_heads=2, ffn=192)
    found = stage_table(config, 1, shape, limit=2**40)
    slots = stage.context // 2 * stage.micro_batch
    rows = {row.recompute: row for row in found.rows}
    fixed = memory_estimate(config, stage, vocab=512)
    for how, row in rows.items():
        per, none = found.kept_bytes_per_slot[how], found.kept_bytes_per_slot["none"]
        expected = slots * (2 * 2 * per + none - per) / 2**30
        assert row.activations_gib == pytest.approx(expected, abs=1e-6)
        assert row.total_gib - row.activations_gib == pytest.approx(
            fixed["total_gib"] - fixed["activations_gib"], abs=2e-6
        )
    assert rows["none"].step_time_ratio == 1.0
    assert (found.fits, found.limit_from) == (True, "as asked")


@pytest.mark.parametrize(
    ("schedule", "virtual", "alive"),
    [("gpipe", 1, 8), ("1f1b", 1, 4), ("interleaved", 2, 11), ("zero_bubble", 2, 8), ("zbv", 2, 8)],
)
def test_layers_alive_are_those_of_docs_parallel(schedule: str, virtual: int, alive: int) -> None:
    stage = load_config(DEMO).stages[0]
    layout = stage.layout.model_copy(
        update={"dp": 1, "pp": 4, "tp": 1, "sp": 1, "schedule": schedule, "virtual": virtual}
    )
    stage = stage.model_copy(update={"layout": layout, "batch": 8, "micro_batch": 1})
    assert layers_alive(stage, layers=24) == alive * 24 // (4 * virtual)


ROWS = (Row("none", 5, 8, 1.0), Row("selective", 3, 6, 1.1), Row("full", 1, 4, 1.3))


@pytest.mark.parametrize(
    ("limit", "chosen", "fits"),
    [(8.0, "none", True), (7.9, "selective", True), (4.0, "full", True), (3.9, "full", False)],
)
def test_the_fastest_that_fits_is_chosen(limit: float, chosen: str, fits: bool) -> None:
    assert choose(ROWS, limit)[:2] == (chosen, fits)


def test_the_choice_says_why() -> None:
    assert choose(ROWS, 3.5)[2] == "none fits; the smallest exceeds the limit by 0.50 GiB"
    assert choose(ROWS, 4.5)[2] == "the only one that fits, leaves 0.50 GiB"
    quick = (ROWS[0], Row("selective", 3, 6, 1.0), ROWS[2])
    assert choose(quick, 9)[0] == "selective"  # as fast, and smaller


def test_what_a_cgroup_leaves(tmp_path: Path) -> None:
    assert cgroup_left(tmp_path) is None
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    for most, left in (("max", None), ("1000", 450), ("600", 50)):
        (tmp_path / "memory.max").write_text(f"{most}\n")
        assert cgroup_left(tmp_path) == left


# --- the config, the command, a run ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["stages.0.recompute_memory=24GiB"], "with recompute: none"),
        (["stages.0.recompute=auto", "stages.0.recompute_memory=much"], "expected a size"),
        (
            ["stages.0.recompute=auto", "engine.kind=deepspeed", "engine.zero=3"],
            "cannot run recompute = auto",
        ),
    ],
)
def test_settings_that_make_no_sense(sets: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(DEMO, sets)


@pytest.mark.slow
def test_plan_prints_the_table(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--set", "model.width=32", "--vocab", "512", "--recompute", "--memory", "7MiB", "--json"]
    assert command(["plan", str(base), *options]) == 0
    printed = capsys.readouterr()
    stages = json.loads(printed.out.splitlines()[-1])["stages"]
    for stage in stages:
        found = stage["recompute"]
        assert [row["recompute"] for row in found["rows"]] == ["none", "selective", "full"]
        assert choose([Row(**row) for row in found["rows"]], 7 / 1024)[0] == found["chosen"]
        assert f"  > {found['chosen']}" in printed.err
        assert found["reason"] in printed.err
    assert command(["plan", DEMO, "--memory", "1GiB"]) == 2
    assert command(["plan", DEMO, "--recompute", "--memory", "lots"]) == 2
    assert "expected a size" in capsys.readouterr().err


def _runs(place: str) -> None:
    asked = {
        "none": {"recompute": "none"}, "full": {"recompute": "full"},
        "tight": {"recompute": "auto", "recompute_memory": "1KiB"}, "wide": {"recompute": "auto"},
    }  # fmt: skip
    for name, stage in asked.items():
        values = verify.tiny_config(Path(place), name, world=2).to_dict()
        values["stages"] = [{**s, **stage} for s in values["stages"]]
        verify._one_run(config_from_dict(values, source="test"))


@pytest.mark.slow
def test_auto_gives_the_bits_of_the_explicit_choice(tmp_path: Path) -> None:
    run_ranks(2, _runs, str(tmp_path), timeout=200)
    states = {
        name: verify.tensor_digests(tmp_path / name / "checkpoints" / "step-00000008")
        for name in ("none", "full", "tight", "wide")
    }
    assert states["tight"] == states["full"] == states["none"] == states["wide"]
    chosen = {}
    for name in states:
        events = read_events(tmp_path / name / "metrics.jsonl")
        chosen[name] = [e["recompute"] for e in events if e["event"] == "stage"]
        tables = [e for e in events if e["event"] == "recompute"]
        assert [t["chosen"] for t in tables] == (chosen[name] if name in ("tight", "wide") else [])
        warned = [e["what"] for e in events if e["event"] == "warning"]
        assert [("exceeds the limit" in what) for what in warned] == ([True, True] if name == "tight" else [])
        saved = json.loads((tmp_path / name / "checkpoints" / "step-00000008" / "manifest.json").read_text())
        assert saved["recompute"] == chosen[name][1]
    assert chosen["none"] == ["none", "none"]
    assert chosen["full"] == chosen["tight"] == ["full", "full"]
