"""Legal layouts near one that cannot work. Pure functions without torch, over the rules of `config_checks.py`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ringweave.pretrain.config_checks import LOOPED, Finding, layout_problems

if TYPE_CHECKING:
    from ringweave.pretrain.config_schema import Layout, RunConfig, Stage

AXES = ("dp", "pp", "tp", "sp")
#: What doubling or halving an axis costs: dp is what people change first, the others are there for a reason.
_COST = {"dp": 1.0, "pp": 1.2, "tp": 1.2, "sp": 1.2}
#: What it costs to use an axis (other than dp) that was not asked for, and to change another key of the layout.
_NEW_AXIS, _OTHER_KEY = 0.5, 0.25
#: How far from the asked number of processes another is proposed, as a factor.
_FAR = 4


def nearest_layouts(config: RunConfig, stage: int, world: int, limit: int = 3) -> list[Layout]:
    """The legal layouts of stage `stage` (0-based) on `world` processes closest to the one it asks for.

    Closest: the smallest sum of |log2(size / asked size)| over the axes, with the weights above. Keys that depend on
    the axes (split, ulysses, replicate, virtual) are kept where they fit and moved to the nearest value that fits
    where not. Nothing else of the config is changed, so there may be none; `limit` 0 means all.
    """
    asked = config.stages[stage].layout
    found: list[Any] = []
    for sizes in _factors(world, len(AXES)):
        layout = _fitted(config, asked.model_copy(update=dict(zip(AXES, sizes, strict=True))))
        if not any(layout_problems(_with_layout(config, stage, layout), stage)):
            cost = distance(asked, layout)
            found.append((cost, *(-n for n in sizes), layout))
    found.sort(key=lambda item: item[:-1])
    layouts = [item[-1] for item in found]
    return layouts[:limit] if limit else layouts


def distance(asked: Layout, layout: Layout) -> float:
    """How far `layout` is from `asked`; 0 for the same."""
    total = 0.0
    for axis in AXES:
        old, new = getattr(asked, axis), getattr(layout, axis)
        total += _COST[axis] * abs(math.log2(new / old))
        total += _NEW_AXIS if old == 1 < new and axis != "dp" else 0.0
    return round(total + _OTHER_KEY * len(_changed(asked, layout)), 9)


def show_layout(asked: Layout, layout: Layout) -> str:
    """`dp2·sp4`, with what else differs from `asked`: `dp2·sp4 (ulysses: 2)`."""
    axes = "·".join(f"{a}{getattr(layout, a)}" for a in AXES if getattr(layout, a) > 1) or "dp1"
    changed = _changed(asked, layout)
    also = ", ".join(f"{key}: {'null' if value is None else value}" for key, value in changed.items())
    return f"{axes} ({also})" if also else axes


def suggestion(config: RunConfig, stage: int, world: int | None, limit: int = 3) -> str:
    """`legal layouts for 8 processes: dp4·tp2, dp2·pp2·tp2`; for the nearest other number when none fits; or "".

    world: None when the number of processes follows from the layouts; then a nearer layout on another number of
    processes, which all other stages have too, is named as well.
    """
    asked = config.stages[stage].layout
    number = world or config.stages[0].layout.world
    layouts = nearest_layouts(config, stage, number, limit)
    head = "" if layouts else f"no layout fits {_processes(number)}; "
    elsewhere = [] if layouts and world else _elsewhere(config, stage, number, fixed=world is not None)
    if layouts and elsewhere and distance(asked, elsewhere[0]) >= distance(asked, layouts[0]):
        elsewhere = []
    lists = [
        f"for {_processes(some[0].world)}: {', '.join(show_layout(asked, layout) for layout in some)}"
        for some in (layouts, elsewhere[:1] if layouts else elsewhere[:limit])
        if some
    ]
    return f"{head}legal layouts {'; '.join(lists)}" if lists else ""


def _elsewhere(config: RunConfig, stage: int, world: int, *, fixed: bool) -> list[Layout]:
    """Legal layouts on the number of processes, other than `world`, that comes closest to what was asked for.

    fixed: whether the number is given from outside; the closest number counts then, else the closest layout, and
    other stages must have the same number already.
    """
    asked = config.stages[stage].layout
    others = {s.layout.world for i, s in enumerate(config.stages) if i != stage}
    best: list[Layout] = []
    for number in _near_worlds(world):
        if not fixed and not others <= {number}:
            continue
        layouts = nearest_layouts(config, stage, number)
        if layouts and fixed:
            return layouts
        if layouts and (not best or distance(asked, layouts[0]) < distance(asked, best[0])):
            best = layouts
    return best


def with_suggestions(config: RunConfig, findings: Sequence[Finding], world: int | None) -> list[Finding]:
    """`findings` with the nearest legal layouts in the hint of each stage's first finding about its layout.

    world: number of processes, or None when it follows from the layouts themselves.
    """
    out, done = [], set()
    for path, text, hint in findings:
        if len(path) > 2 and path[0] == "stages" and path[2] in _LAYOUT_KEYS and path[1] not in done:
            stage = int(path[1])
            done.add(stage)
            nearest = suggestion(config, stage, world)
            hint = f"{hint}; {nearest}" if nearest else hint
        out.append((path, text, hint))
    return out


_LAYOUT_KEYS = ("layout", "batch", "micro_batch")


def _processes(number: int) -> str:
    return f"{number} process{'es' if number > 1 else ''}"


def _factors(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Every way to write `number` as an ordered product of `parts` whole numbers."""
    if parts == 1:
        yield (number,)
        return
    for first in _divisors(number):
        for rest in _factors(number // first, parts - 1):
            yield (first, *rest)


def _divisors(number: int) -> list[int]:
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return [*low, *(number // n for n in reversed(low) if n * n != number)]


def _near_worlds(world: int) -> list[int]:
    """Other numbers of processes, from the nearest on; further away only powers of two."""
    near = range(max(1, world - 8), world + 9)
    powers = [2**k for k in range(world.bit_length() + 3) if world / _FAR <= 2**k <= world * _FAR]
    return sorted({*near, *powers} - {world}, key=lambda n: (abs(math.log2(n / world)), n))


def _with_layout(config: RunConfig, stage: int, layout: Layout) -> RunConfig:
    stages: list[Stage] = list(config.stages)
    stages[stage] = stages[stage].model_copy(update={"layout": layout})
    return config.model_copy(update={"stages": tuple(stages)})


def _fitted(config: RunConfig, layout: Layout) -> Layout:
    """`layout` with the keys that depend on its axes moved to the nearest values that fit them."""
    model = config.model
    change: dict[str, Any] = {}
    looped = layout.schedule in LOOPED
    if (looped and layout.virtual < 2) or layout.schedule == "zbv":
        change["virtual"] = 2
    elif not looped:
        change["virtual"] = 1
    parts = layout.pp * change.get("virtual", layout.virtual)
    if layout.split is not None and (len(layout.split) != parts or sum(layout.split) != model.layers):
        change["split"] = None
    change["ulysses"] = _nearest(
        layout.ulysses,
        (
            u
            for u in _divisors(layout.sp)
            if u == 1 or not (model.heads % (layout.tp * u) or model.kv_heads % (layout.tp * u))
        ),
    )
    shards = 1 if config.engine.kind == "deepspeed" else layout.dp * layout.sp
    change["replicate"] = _nearest(layout.replicate, _divisors(shards))
    return layout.model_copy(update=change)


def _nearest(value: int, allowed: Iterator[int] | Sequence[int]) -> int:
    return min(allowed, key=lambda n: (abs(math.log2(n / value)), n))


def _changed(asked: Layout, layout: Layout) -> dict[str, object]:
    """The keys other than the axes in which `layout` differs from `asked`."""
    keys = [key for key in type(layout).model_fields if key not in AXES]
    return {key: getattr(layout, key) for key in keys if getattr(layout, key) != getattr(asked, key)}
