"""What a stage of a config asks of the planner; the same for training, statistics and proofs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ringweave.data_pipes.balance import CostModel
from ringweave.data_pipes.lengths import Arrays, Lengths
from ringweave.data_pipes.pack import PackPlan
from ringweave.data_pipes.planner import PackPlanner
from ringweave.pretrain.config import RunConfig
from ringweave.pretrain.config_schema import ModelSection


def cost_model(model: ModelSection) -> CostModel:
    """Operations of a pack of this model: four projections (fewer with shared keys) and a gated MLP a layer; of a dit
    four projections and a plain MLP, and attention both ways."""
    width, heads = model.width, model.heads
    if model.kind == "dit":
        return CostModel(width=width, ratio=8 + 4 * model.ffn / width, causal=False)
    attention = 4 + 4 * model.kv_heads / heads  # 2 operations a weight: q and o, then k and v
    return CostModel(width=width, ratio=attention + 6 * model.ffn / width, window=model.window)


def stage_settings(config: RunConfig, number: int) -> dict[str, Any]:
    """Arguments of `PackPlanner.switch` for stage `number` (0-based). A window is rounded up to whole steps."""
    data, stage = config.data, config.stages[number]
    window = None if data.window == "auto" else -(-int(data.window) // stage.batch) * stage.batch
    return {
        "context": stage.context,
        "weights": dict(sorted(config.stage_weights(number).items())),
        "batch": stage.batch,
        "window": window,
        "cost": cost_model(config.model),
        "temperature": data.temperature,
    }


def first_planner(config: RunConfig, lengths: Lengths | Arrays, number: int = 0) -> PackPlanner:
    """The planner of a run that begins, in stage `number`."""
    data = config.data
    return PackPlanner(
        lengths=lengths, seed=config.run.seed, lanes=None if data.lanes == "auto" else data.lanes,
        epochs=data.epochs, **stage_settings(config, number),
    )  # fmt: skip


def enter_stage(planner: PackPlanner, config: RunConfig, number: int) -> None:
    """Begins stage `number`: what is drawn and not emitted comes first in it."""
    settings = stage_settings(config, number)
    planner.switch(**{**settings, "window": "auto" if settings["window"] is None else settings["window"]})


def changed_settings(planner: PackPlanner, config: RunConfig, number: int) -> list[str]:
    """In what a planner that stands inside stage `number` differs from the config, as text; [] if in nothing."""
    had = planner.settings()
    return [
        f"{name}: {had[name]} -> {wanted}"
        for name, wanted in stage_settings(config, number).items()
        if had[name] != wanted
    ]


def ideal_plans(config: RunConfig, lengths: Lengths | Arrays) -> Iterator[tuple[int, list[PackPlan]]]:
    """(step, plans) of a whole run that never stops, steps from 1; ends early where finite data does."""
    planner = first_planner(config, lengths)
    step = 0
    for number, stage in enumerate(config.stages):
        if number:
            enter_stage(planner, config, number)
        for _ in range(stage.steps):
            plans = planner.plans(stage.batch)
            if plans is None:
                return
            step += 1
            yield step, plans
