"""Vectors of a sample's words that another model made beforehand: a `.npy` member, float16 or float32 [n, E].

Written by `numpy.save`. The header is checked against the member's size before anything is loaded, so a header that
promises more than there is asks for no memory; objects are never unpickled.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringweave.data_pipes.formats import member_of
from ringweave.data_pipes.plan_items import Entry
from ringweave.data_pipes.sample import Sample
from ringweave.tokenizers.errors import DataError

#: The member that `embeddings` reads where the plan names none.
MEMBER = "embeddings.npy"
#: Vectors of one document, and numbers of one vector.
MOST_VECTORS, MOST_NUMBERS = 1 << 16, 1 << 16
#: By version of the format; later ones are for structured types.
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_FIX = "save float16 or float32 [words, numbers] with numpy.save, or leave the record out"


def embeddings_of(sample: Sample, entry: Entry) -> NDArray[np.float32]:
    """float32 [n, E] of the member that an `embeddings` entry names.

    Raises DataError naming sample and member: missing, no `.npy` file, objects, another type or number of dims, no
    vector or too many, cut off, not finite.
    """
    data, where = _member(sample, entry)
    return read_embeddings(data, where=where)


def shape_of_embeddings(sample: Sample, entry: Entry) -> tuple[int, int]:
    """(n, E) of the same, by its header. Raises DataError as `embeddings_of`, but for numbers that are not finite."""
    data, where = _member(sample, entry)
    return _shape(data, where)


def _member(sample: Sample, entry: Entry) -> tuple[bytes, str]:
    name = entry.argument or MEMBER
    return member_of(sample, entry.text, (name,)), f"{sample.where}:{name}"


def read_embeddings(data: bytes, *, where: str) -> NDArray[np.float32]:
    """float32 [n, E] of the bytes of a member. Raises DataError as `embeddings_of`."""
    _shape(data, where)
    vectors: NDArray[Any] = np.load(io.BytesIO(data), allow_pickle=False)
    wrong = np.argwhere(~np.isfinite(vectors))
    if len(wrong):
        raise DataError(
            "embeddings that are not finite",
            where=where,
            why=f"{len(wrong)} of {vectors.size} numbers, the first at {wrong[0].tolist()} of {list(vectors.shape)}",
            fix="make them again, or leave the record out",
        )
    return np.ascontiguousarray(vectors, np.float32)


def _shape(data: bytes, where: str) -> tuple[int, int]:
    """(n, E) by the header, which must be what the rest of the member is."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        if version not in _HEADERS:
            raise ValueError(f"version {version[0]}.{version[1]} of the format")
        shape, _, dtype = _HEADERS[version](file)
    except Exception as error:  # numpy reads headers with Python's parser, whose errors are of many kinds
        why = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise DataError("embeddings are no .npy file", where=where, why=why, fix=_FIX) from None
    if dtype.hasobject:
        raise DataError(
            "embeddings hold Python objects, which are never loaded",
            where=where,
            why=f"type {dtype}",
            fix=_FIX,
        )
    if dtype.kind != "f" or dtype.itemsize not in (2, 4) or len(shape) != 2:
        raise DataError(
            f"embeddings are {dtype} {list(shape)}", where=where, why="a vector a word is needed", fix=_FIX
        )
    count, width = int(shape[0]), int(shape[1])
    if not 0 < count <= MOST_VECTORS or not 0 < width <= MOST_NUMBERS:
        raise DataError(
            f"embeddings are {count} vectors of {width} numbers",
            where=where,
            why=f"1 to {MOST_VECTORS} vectors of 1 to {MOST_NUMBERS} numbers can be the words of a document",
            fix=_FIX,
        )
    held, wanted = len(data) - file.tell(), count * width * dtype.itemsize
    if held != wanted:
        raise DataError(
            "embeddings do not end where their header says",
            where=where,
            why=f"{dtype} [{count}, {width}] takes {wanted} bytes, {held} are there",
            fix=_FIX,
        )
    return count, width
