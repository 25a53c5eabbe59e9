"""JSONL files, one record a line: read by lines with their offsets, checked, and made into shards.

A JSONL becomes a shard (`folder.build_from_jsonl`) and is not read in place: each line is kept byte for byte
as the json member of a sample named after its number, so nothing is lost, the shard's index holds the offset
and crc32 of every line, and reading, checking, caching, quarantine and resume are those of any other shard
instead of a second set of each. The cost is 1 KB of tar a line.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringweave.data_pipes.formats import MAX_JSON, field_value, load_json, record_fields
from ringweave.data_pipes.plan_items import parse_fields
from ringweave.tokenizers.errors import DataError


@dataclass(frozen=True, slots=True)
class Line:
    """One line: number from 1, offset of its first byte in the file, its bytes without the line's end.

    `whole` is False for a line over the limit, of which `data` is only the start.
    """

    number: int
    offset: int
    data: bytes
    whole: bool = True

    def key(self, name: str) -> str:
        """Name of its sample."""
        return f"{name}-{self.number:09d}"

    def where(self, path: Path) -> str:
        """`file line N @offset`, the way messages name it."""
        return f"{path} line {self.number} @{self.offset}"


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of a file that hold anything. Raises DataError when it cannot be read."""
    try:
        with open(path, "rb") as file:
            number = offset = 0
            while data := file.readline(MAX_JSON + 2):
                number, start, size, whole = number + 1, offset, len(data), True
                while not data.endswith(b"\n") and size > MAX_JSON:  # over the limit: find the line's end
                    whole, more = False, file.readline(1 << 20)
                    size += len(more)
                    if not more or more.endswith(b"\n"):
                        break
                offset += size
                data = data.rstrip(b"\r\n") if whole else data[:64]
                if data.strip():
                    yield Line(number, start, data, whole)
    except OSError as error:
        raise DataError("cannot read the JSONL file", where=str(path), why=str(error)) from None


def check_line(line: Line, path: Path, fields: str, *, key: str) -> Any:
    """The record of a line. Raises DataError naming line, field and offset for one that cannot be used.

    `fields`: a list of fields that every record must have, of the right types; "" takes the record's own
    `fields` if it has one, and is content with any JSON object otherwise.
    """
    where = line.where(path)
    if not line.whole:
        raise DataError("a line over the limit", where=where, why=f"more than {MAX_JSON} bytes")
    record = load_json(line.data, where=where)
    if not isinstance(record, dict):
        raise DataError("the record is no JSON object", where=where)
    if fields:
        try:
            parse_fields(fields)
        except ValueError as error:
            raise DataError(f"malformed list of fields {fields!r}", why=str(error)) from None
    if fields or "fields" in record:
        for field, _ in record_fields(record, fields, key=key, where=where):
            field_value(record, field, where=where)
    return record
