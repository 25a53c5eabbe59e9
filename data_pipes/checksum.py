"""crc32, as tar indexes, caches and lengths store it: zlib's polynomial, computed by Intel's ISA-L.

Every byte that is read is checked, so its speed is that of reading: 3 times zlib's, whatever the size
(`tests/bench/data_reading.py` shows what is left of it).
"""

from __future__ import annotations

from isal.isal_zlib import crc32

__all__ = ["crc32"]
