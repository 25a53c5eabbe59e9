"""The fast crc32 is zlib's, for every kind of bytes that is given to it."""

from __future__ import annotations

import os
import zlib

import numpy as np

from ringweave.data_pipes.checksum import crc32


def test_the_fast_crc32_is_that_of_zlib() -> None:
    data = os.urandom(100_003)
    for size in (*range(300), 4095, 4096, 4097, 100_003):
        for start in (0, 1, 7):
            piece = data[start : start + size]
            assert crc32(piece) == crc32(memoryview(data)[start : start + size]) == zlib.crc32(piece)
            assert crc32(piece, 0xDEADBEEF) == zlib.crc32(piece, 0xDEADBEEF)
    assert crc32(np.arange(1000, dtype="<i8")) == zlib.crc32(np.arange(1000, dtype="<i8").tobytes())
    assert crc32(bytearray(data)) == zlib.crc32(data)
