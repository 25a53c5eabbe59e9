"""What the data commands are pointed at: a folder, a shard or a pattern; and sources by the names of shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ringweave.launch.console import existing_folder
from ringweave.tokenizers.errors import DataError

if TYPE_CHECKING:
    from ringweave.data_pipes.shard_names import Shard
    from ringweave.data_pipes.store import Store


CacheOption = Annotated[
    Path | None,
    typer.Option(
        "--cache", metavar="DIR",
        help="Folder of the cache that packed shards are unpacked into, and indexes of remote ones kept in; "
        "else data.cache.dir of --config.",
    ),
]  # fmt: skip


def shards_in(folder: Path) -> list[Path]:
    """The shards of a folder, by name. ConfigError for no folder, DataError for one without shards."""
    from ringweave.data_pipes.index import shard_files

    existing_folder(folder, what="data folder", fix="`ringweave data build DIR` makes the demo data")
    shards = shard_files(folder)
    if not shards:
        raise DataError(
            "no shards", where=str(folder), why="no *.tar, *.tar.gz, *.tgz or *.tar.zst in it",
            fix="give the folder that holds the shards",
        )  # fmt: skip
    return shards


def find_shards(target: str, store: Store) -> list[Shard]:
    """The shards of DIR, of one path or URL, or of a pattern such as `DIR/a-{0000..0003}.tar`."""
    from ringweave.data_pipes.compression import codec_of_shard
    from ringweave.data_pipes.reader import expand_shards

    one = "{" in target or target.endswith(".tar") or codec_of_shard(target) is not None or "://" in target
    return [
        store.resolve(shard) for shard in (expand_shards(target, Path()) if one else shards_in(Path(target)))
    ]


def store_for(config: Path | None, cache: Path | None) -> Store:
    """How a command opens shards: as the config says, with the cache that is asked for."""
    from ringweave.data_pipes.store import Store

    store = Store()
    if config is not None:
        from ringweave.pretrain.config import load_config
        from ringweave.pretrain.data_store import store_of

        store = store_of(load_config(config))
    return store if cache is None else Store(store.options, cache, store.cache_bytes)


def name_of(shard: Shard) -> str:
    """The file name of a shard, also of a URL."""
    from ringweave.data_pipes.shard_names import shard_name

    return shard_name(shard)


def source_of(shard: Shard) -> str:
    """`image` of `image-train-0000.tar`; the whole stem when the name has no split in it."""
    from ringweave.data_pipes.shard_names import stem_of

    stem = stem_of(name_of(shard))
    for split in ("-train-", "-heldout-"):
        if split in stem:
            return stem.partition(split)[0]
    return stem.rpartition("-")[0] or stem


def brief(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def load_tokenizers(folder: Path) -> Any:
    """The tokenizer set in `folder`; ConfigError when there is no such folder."""
    existing_folder(
        folder, what="tokenizer folder", fix="`ringweave tokenizer train --data DIR --out OUT` makes one"
    )
    from ringweave.tokenizers.set import TokenizerSet

    return TokenizerSet.load(folder)
