"""`ringweave data stats`: how long the documents are, and what packing them will give at each stage.

Everything follows from token lengths: the same planner that training uses plans some packs of each stage, and
its packs are measured. Nothing is decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ringweave.launch.console import Output
from ringweave.tokenizers.errors import DataError

if TYPE_CHECKING:
    from ringweave.data_pipes.balance import CostModel
    from ringweave.pretrain.config import RunConfig

Report = Callable[[str, int, int], None]
#: A source read more often than this over a whole run is named in the warnings.
_REPEATS = 4
_BARS = " ▏▎▍▌▋▊▉█"


def predict(
    folder: Path | str, config: Path, *, packs: int, progress: Report | None = None
) -> dict[str, Any]:
    """{"sources": [...], "stages": [...], "warnings": [...]}: see `_source` and `_stage` for their fields.

    packs: planned of each stage at most. Raises DataError for shards without token lengths, ConfigError for
    the config.
    """
    from ringweave.data_pipes.token_lengths import open_lengths
    from ringweave.data_pipes.token_vocabulary import naming_blocks
    from ringweave.pretrain.config import load_config
    from ringweave.pretrain.data_store import data_specs, store_of
    from ringweave.tokenizers.manifest import VocabularyManifest

    settings = load_config(config)
    manifest = VocabularyManifest.load(Path(settings.tokenizers.dir) / "tokenizers.json")
    store = store_of(settings)
    specs = data_specs(settings.data, store, base=folder)
    with naming_blocks(manifest):
        lengths = open_lengths(
            [(spec.name, spec.shards, spec.plan) for spec in specs], manifest.hash, folder=store.tokens_dir,
            whole=[spec.name for spec in specs if spec.whole],
        )  # fmt: skip
    sources = {name: _source(name, lengths[name]) for name in lengths.names}
    stages = _stages(settings, lengths, sources, packs, progress)
    return {
        "sources": list(sources.values()),
        "stages": stages,
        "epochs": {name: round(sum(s["epochs"].get(name, 0.0) for s in stages), 3) for name in sources},
        "warnings": _warnings(settings, lengths, sources, stages),
    }


def _source(name: str, lengths: NDArray[np.int64]) -> dict[str, Any]:
    """Counts and quantiles of the lengths of one source, and how many lie in [2^k, 2^(k+1))."""
    used = lengths[lengths > 0]
    if not len(used):
        raise DataError(f"source {name!r} holds no usable document", where=name)
    powers = np.floor(np.log2(used)).astype(int)
    counts = np.bincount(powers)
    first = int(powers.min())
    quantiles = [int(value) for value in np.quantile(used, (0.5, 0.95), method="lower")]
    return {
        "source": name,
        "documents": len(used),
        "unusable": int((lengths == 0).sum()),
        "tokens": int(used.sum()),
        "shortest": int(used.min()),
        "median": quantiles[0],
        "p95": quantiles[1],
        "longest": int(used.max()),
        "histogram": [
            {"from": 2**k, "to": 2 ** (k + 1), "count": int(counts[k])} for k in range(first, len(counts))
        ],
    }


def _stages(
    config: RunConfig,
    lengths: Any,
    sources: Mapping[str, dict[str, Any]],
    packs: int,
    progress: Report | None,
) -> list[dict[str, Any]]:
    from ringweave.data_pipes.planner import EndOfData
    from ringweave.pretrain.stage_plan import cost_model, enter_stage, first_planner

    cost = cost_model(config.model)
    planner = first_planner(config, lengths)
    stages: list[dict[str, Any]] = []
    for i, stage in enumerate(config.stages):
        if i:
            enter_stage(planner, config, i)
        steps = min(stage.steps, max(1, packs // stage.batch))
        measured = _Measured(stage.context, stage.batch, stage.layout.dp, cost)
        try:
            for step in range(steps):
                measured.add([planner.next() for _ in range(stage.batch)])
                if progress is not None and step % 16 == 0:
                    progress(f"planning stage {i}", step, steps)
        except EndOfData:
            measured.ended = True
        shares = planner.shares()
        stages.append(_stage(i, stage, measured, shares, sources))
    return stages


class _Measured:
    """Fill and balance of the steps of a stage."""

    def __init__(self, context: int, batch: int, dp: int, cost: CostModel) -> None:
        self._context, self._dp, self._cost = context, dp, cost
        self._share = batch // dp
        self.packs = self.tokens = self.split = 0
        self.imbalance: list[float] = []
        self.ended = False

    def add(self, plans: list[Any]) -> None:
        """One step: `batch` packs, of which each dp rank takes a run of neighbours."""
        costs = [self._cost.pack([len(piece) for piece in plan.pieces]) for plan in plans]
        ranks = [sum(costs[r * self._share : (r + 1) * self._share]) for r in range(self._dp)]
        self.imbalance.append(max(ranks) * self._dp / sum(ranks))
        self.packs += len(plans)
        self.tokens += sum(plan.tokens for plan in plans)

    @property
    def fill(self) -> float:
        return self.tokens / (self.packs * self._context) if self.packs else 0.0


def _stage(
    number: int,
    stage: Any,
    measured: _Measured,
    shares: Mapping[str, Any],
    sources: Mapping[str, dict[str, Any]],
) -> dict[str, Any]:
    """Fill (share of slots in use), balance (cost of the busiest dp rank / mean, over the steps), and epochs."""
    slots = stage.steps * stage.tokens_per_step
    over = measured.imbalance or [1.0]
    return {
        "stage": number,
        "context": stage.context,
        "steps": stage.steps,
        "packs_planned": measured.packs,
        "fill": round(measured.fill, 5),
        "dp": stage.layout.dp,
        "balance_mean": round(float(np.mean(over)), 4),
        "balance_worst": round(float(np.max(over)), 4),
        "ends_early": measured.ended,
        "share": {name: round(float(drawn), 4) for name, (_, drawn) in shares.items()},
        "epochs": {
            name: round(target * slots * measured.fill / sources[name]["tokens"], 4)
            for name, (target, _) in shares.items()
        },
    }


def _warnings(
    config: RunConfig, lengths: Any, sources: Mapping[str, dict[str, Any]], stages: list[dict[str, Any]]
) -> list[str]:
    said: list[str] = []
    for name, facts in sources.items():
        counts = {s.context: int((lengths[name] > s.context).sum()) for s in config.stages}
        split = [f"{count:,} at a context of {context:,}" for context, count in counts.items() if count]
        if split:
            said.append(
                f"{name}: of {facts['documents']:,} documents some are longer than the context and will be "
                f"split: {', '.join(split)}"
            )
        repeats = sum(stage["epochs"].get(name, 0.0) for stage in stages)
        if repeats > _REPEATS and config.data.epochs is None:
            said.append(
                f"{name}: read {repeats:.1f} times over all stages; beyond {_REPEATS} passes repeated data "
                "teaches little: add data or lower its weight"
            )
        if facts["unusable"]:
            said.append(
                f"{name}: {facts['unusable']:,} samples cannot be used (`data check --decode` says why)"
            )
    said += [
        f"stage {stage['stage']} ends early: every source was read {config.data.epochs} times"
        for stage in stages
        if stage["ends_early"]
    ]
    return said


def print_stats(out: Output, facts: dict[str, Any]) -> None:
    """Tables and bars for people."""
    rows = [
        (
            s["source"], f"{s['documents']:,}", s["unusable"] or "", f"{s['tokens']:,}", f"{s['shortest']:,}",
            f"{s['median']:,}", f"{s['p95']:,}", f"{s['longest']:,}",
        )
        for s in facts["sources"]
    ]  # fmt: skip
    columns = ("source", "documents", "unusable", "tokens", "shortest", "median", "95 %", "longest")
    out.table("Tokens a document", columns, rows)
    out.say(histogram(facts["sources"]))
    names = [s["source"] for s in facts["sources"]]
    stages = [
        (
            s["stage"], f"{s['context']:,}", f"{s['steps']:,}", f"{s['packs_planned']:,}", f"{s['fill']:.2%}",
            f"{s['balance_mean']:.3f} / {s['balance_worst']:.3f} (dp {s['dp']})",
            ", ".join(f"{n} {s['epochs'][n]:.2g}" for n in names if n in s["epochs"]),
        )
        for s in facts["stages"]
    ]  # fmt: skip
    out.table(
        "Stages, as the planner would pack them",
        ("stage", "context", "steps", "packs planned", "fill", "balance mean / worst", "epochs"),
        stages,
    )
    total = ", ".join(f"{name}: {epochs:.1f} epochs" for name, epochs in facts["epochs"].items())
    out.say(f"Whole run: {total}")
    for warning in facts["warnings"]:
        out.say(f"warning: {warning}")


def histogram(sources: list[dict[str, Any]], *, width: int = 24) -> str:
    """Bars of the histograms beside each other: a row for each power of two, a column for each source."""
    low = min(s["histogram"][0]["from"] for s in sources)
    high = max(s["histogram"][-1]["from"] for s in sources)
    width = max(8, min(width, 120 // len(sources)))
    lines = [" " * 12 + "".join(f"{s['source'][: width - 2]:<{width}}" for s in sources)]
    while low <= high:
        cells = ""
        for source in sources:
            counts = {entry["from"]: entry["count"] for entry in source["histogram"]}
            count, most = counts.get(low, 0), max(counts.values())
            cells += f"{_bar(count / most, width - 8):<{width - 7}}{count or '':<7}"
        lines.append(f"{low:>9,}+  {cells}".rstrip())
        low *= 2
    return "\n".join(lines) + "\n"


def _bar(share: float, width: int) -> str:
    eighths = max(round(share * width * 8), 1 if share > 0 else 0)
    return "█" * (eighths // 8) + _BARS[eighths % 8].strip()
