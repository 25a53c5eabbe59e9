"""Where shards may live: one protocol, `ByteSource`, for local files, web servers and object stores.

`open_source` takes a path, `file://`, `http(s)://`, `s3://` or `gs://`; `open_pipe` the output of a command. Every read
gives exactly the bytes that were asked for, of the version that the first answer named, or a `DataError`.

storage_base.py   the protocol, options, local files, `redact`
storage_net.py    connections: which addresses may be reached, redirects, time limits
storage_http.py   range reads over them: checks, retries, resuming
storage_cloud.py  s3:// and gs:// as requests of storage_http.py, signed by botocore and google-auth
storage_cache.py  the byte-capped cache on disk; cache_dir.py its folder: lock, count, eviction
storage_pipe.py   commands
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from ringweave.data_pipes.compression import Caps, Codec, decompress
from ringweave.data_pipes.storage_base import ByteSource, LocalFile, StorageOptions, redact, scheme_of
from ringweave.data_pipes.storage_cache import ByteCache, CachedSource
from ringweave.data_pipes.storage_cloud import GsLocator, S3Locator
from ringweave.data_pipes.storage_http import Locator, PlainLocator, RemoteFile
from ringweave.data_pipes.storage_pipe import open_pipe
from ringweave.tokenizers.errors import DataError

__all__ = [
    "ByteCache",
    "ByteSource",
    "LocalFile",
    "StorageOptions",
    "open_pipe",
    "open_source",
    "redact",
    "unpacked",
]
#: A packed shard is read in pieces of this many bytes.
_PIECE = 8 << 20

SCHEMES = ("file", "http", "https", "s3", "gs")


def open_source(
    url: str | Path, *, options: StorageOptions | None = None, cache: ByteCache | None = None
) -> ByteSource:
    """The bytes behind a path or URL. Nothing is opened or asked before the first call of the result.

    options: limits of remote reads; cache: for remote ones (local files are read where they are).
    Raises DataError for an unknown scheme, for `pipe:`, and for a URL without a host, bucket or key.
    """
    options = StorageOptions() if options is None else options
    if isinstance(url, Path):
        return LocalFile(url)
    if url.lower().startswith("pipe:"):
        raise DataError(
            "a command is not an address",
            where=redact(url),
            why="`pipe:` strings are run by no part of ringweave: whoever writes a list of shards could run anything",
            fix="give the command as a list (`pipe: [curl, -sf, ...]`) and `allow_pipe: true` in your own config",
        )
    scheme = scheme_of(url)
    if not scheme:
        return LocalFile(url)
    parts = urlsplit(url)
    if scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise _refused(url, f"file:// reaches no other host ({parts.netloc!r})")
        return LocalFile(unquote(parts.path))
    if scheme not in SCHEMES:
        raise _refused(url, f"no reader for {scheme}://; there are {', '.join(SCHEMES)}")
    if not parts.hostname:
        raise _refused(url, "it names no host or bucket")
    if scheme in ("s3", "gs") and not parts.path.strip("/"):
        raise _refused(url, "it names a bucket, but no object in it")
    kinds: dict[str, type[Locator]] = {"s3": S3Locator, "gs": GsLocator}
    remote = RemoteFile(url, kinds.get(scheme, PlainLocator)(url, options), options=options)
    return remote if cache is None else CachedSource(remote, cache)


def unpacked(source: ByteSource, codec: Codec, *, cache: ByteCache, caps: Caps | None = None) -> LocalFile:
    """A gzip or zstd shard as a plain file in the cache, made once for each version of it; see `decompress`.

    Raises DataError for a damaged or over-large stream, and when the cache cannot hold it.
    """
    step, total = _PIECE, source.size()
    pieces = (source.read(at, min(step, total - at)) for at in range(0, total, step))
    plain = decompress(pieces, codec, where=str(source), caps=caps or Caps(), what="shard")
    return cache.materialise(f"{codec} {source.url}", source.version(), plain)


def _refused(url: str, why: str) -> DataError:
    return DataError("unusable address", where=redact(url), why=why, fix="correct the address in the config")
