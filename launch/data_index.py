"""`ringweave data index`: indexes, and on request the token lengths and caches, of shards wherever they lie."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringweave.launch.console import Progress
from ringweave.launch.data_sources import load_tokenizers, name_of, source_of
from ringweave.pretrain.errors import ConfigError, redact
from ringweave.tokenizers.errors import DataError

if TYPE_CHECKING:
    from ringweave.data_pipes.shard_names import Shard
    from ringweave.data_pipes.store import Store
    from ringweave.pretrain.config_data import DataSection


def index_shards(shards: Sequence[Shard], policy: dict[str, Any], progress: Progress) -> list[str]:
    """The indexes written, for shards whose index is missing, malformed or stale.

    Beside local shards; in the cache for packed ones, and for remote ones without an index beside them: without a
    cache these are a DataError.
    """
    from ringweave.data_pipes.index import build_index, load_index, write_index
    from ringweave.data_pipes.shard_names import local_path
    from ringweave.data_pipes.store import stored

    written = []
    for done, shard in enumerate(shards):
        progress(f"indexing {name_of(shard)}", done, len(shards))
        held, path = stored(shard), local_path(shard)
        if held is not None:
            made = held.ensure_index(**policy)
            written += [str(made)] if made is not None else []
            continue
        assert path is not None
        try:
            load_index(path)
        except DataError:
            written.append(str(write_index(path, build_index(path, **policy))))
    progress("indexed", len(shards), len(shards))
    return written


def plans_of(
    shards: Sequence[Shard], target: str, config: Path | None, store: Store
) -> dict[Shard, list[list[str]]]:
    """The plans of each shard: by the config's patterns, else by the source's name. Others are left out."""
    from ringweave.pretrain.config import DEFAULT_PLANS, load_config

    if config is None:
        plans = {
            shard: [list(DEFAULT_PLANS[source_of(shard)])]
            for shard in shards
            if source_of(shard) in DEFAULT_PLANS
        }
        if not plans:
            raise ConfigError(
                "no plan for any shard", where=redact(target),
                why=f"sources are not named {', '.join(DEFAULT_PLANS)}",
                fix="give --config with the plan of each source",
            )  # fmt: skip
        return plans
    from ringweave.data_pipes.formats import resolve_plan
    from ringweave.pretrain.data_store import source_shards

    settings = load_config(config).data
    known = {_identity(shard): shard for shard in shards}
    found: dict[Shard, list[list[str]]] = {}

    def collect(settings: DataSection, *, missing_ok: bool = False) -> None:
        for source in settings.sources:
            plan = list(resolve_plan(source.plan, settings.dir))
            for heldout in (False, True):
                with contextlib.suppress(DataError) if missing_ok else contextlib.nullcontext():
                    for shard in source_shards(settings, source, store, heldout=heldout):
                        plans = found.setdefault(known.get(_identity(shard), shard), [])
                        if plan not in plans:  # sources of one set of shards: the tasks of one
                            plans.append(plan)

    folder = Path(target).is_dir()
    collect(settings, missing_ok=folder)  # of a folder, shards of other sources are not asked for
    if folder and not any(shard in found for shard in shards):
        collect(settings.model_copy(update={"dir": target}))  # a copy of the data, by the same config
    return found


def _identity(shard: Shard) -> str:
    from ringweave.data_pipes.shard_names import address_of, local_path

    path = local_path(shard)
    address = address_of(shard)
    return (
        str(path.resolve())
        if path is not None
        else address
        if "://" in address
        else str(Path(address).resolve())
    )


def make_tokens(
    shards: Sequence[Shard],
    tokenizers_dir: Path,
    *,
    plans: dict[Shard, list[list[str]]],
    store_tokens: bool,
    folder: Path | None,
    progress: Progress,
) -> list[str]:
    """Makes lengths of all shards by each of their plans, unless told otherwise token caches too; gives the files.

    folder: where they go if they cannot lie beside the shard.
    """
    from ringweave.data_pipes.make_lengths import make_lengths

    tokenizers = load_tokenizers(tokenizers_dir)
    chosen = [(shard, plan) for shard in shards for plan in plans.get(shard, [])]
    written = []
    for done, (shard, plan) in enumerate(chosen):
        message = f"tokens of {name_of(shard)}"
        progress(message, done, len(chosen))

        def inside(samples: int, count: int, message: str = message, done: int = done) -> None:
            progress(message, done + round(samples / max(1, count), 2), len(chosen))

        path = make_lengths(
            shard, plan, tokenizers, store_tokens=store_tokens, folder=folder, progress=inside
        )
        written.append(str(path))
    progress("tokens", len(chosen), len(chosen))
    return written
