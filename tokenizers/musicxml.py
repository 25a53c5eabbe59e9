"""MusicXML from bytes nobody vouches for: plain (.musicxml, .xml) or packed (.mxl).

The tree is built straight from expat, which never opens a file here. The DOCTYPE line of the standard is taken for what
it names and nothing is fetched; a DTD inside the document (entities, expansion bombs, external entities) is refused
before it is read, and so is a reference to an entity that is not one of XML's five. Bytes, depth, elements, parts
and, for .mxl, entries and ratio are bounded. Whatever goes wrong is a `DataError` naming `where`.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, NoReturn
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from ringweave.tokenizers.errors import DataError

MAX_BYTES = 1 << 26  # of the XML, unpacked
MAX_ELEMENTS = 1 << 21
MAX_DEPTH = 64  # MusicXML itself needs about 10
MAX_ATTRIBUTES = 64  # of one element
MAX_PARTS = 256
MAX_ENTRIES = 1024  # of an .mxl
MAX_RATIO = 200  # unpacked over packed, judged above 1 MiB; real scores reach about 40
_FREE = 1 << 20
ROOTS = ("score-partwise", "score-timewise")


def refuse(where: str, why: str, fix: str = "") -> DataError:
    """The one error of this module and of the writers of tokens."""
    return DataError(
        "cannot read this score", where=where, why=why, fix=fix or "remove the record, or export it again"
    )


def read(data: bytes, *, where: str, max_bytes: int = MAX_BYTES, max_elements: int = MAX_ELEMENTS) -> Element:
    """The <score-partwise> of `data`, plain or .mxl; a timewise score is turned. At least one part with a measure."""
    if data[:4] == b"PK\x03\x04":
        data = unpack(data, where=where, max_bytes=max_bytes)
    root = parse(data, where=where, max_bytes=max_bytes, max_elements=max_elements)
    if root.tag not in ROOTS:
        raise refuse(where, f"its root is <{root.tag[:40]}>, not {' or '.join(ROOTS)}")
    if root.tag == "score-timewise":
        root = _partwise(root, where)
    parts = root.findall("part")
    if not parts or not any(part.find("measure") is not None for part in parts):
        raise refuse(where, "it has no measure")
    if len(parts) > MAX_PARTS:
        raise refuse(where, f"{len(parts)} parts, limit {MAX_PARTS}")
    return root


def unpack(data: bytes, *, where: str, max_bytes: int = MAX_BYTES) -> bytes:
    """The score of an .mxl: the first root file its META-INF/container.xml names, or else its only XML file."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            if len(entries) > MAX_ENTRIES:
                raise refuse(where, f"{len(entries)} files in the .mxl, limit {MAX_ENTRIES}")
            names = {entry.filename: entry for entry in entries}
            if len(names) < len(entries):
                raise refuse(where, "two files of one name in the .mxl: nothing says which is meant")
            container = names.get("META-INF/container.xml")
            if container is not None:
                name = _root_file(_extract(archive, container, where, max_bytes), where)
            else:
                scores = [n for n in names if n.endswith((".xml", ".musicxml")) and "META-INF" not in n]
                if len(scores) != 1:
                    raise refuse(where, f"no META-INF/container.xml in the .mxl and {len(scores)} XML files")
                name = scores[0]
            if name not in names:
                raise refuse(where, f"the .mxl names {name[:80]!r} as its score and does not hold it")
            return _extract(archive, names[name], where, max_bytes)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, ValueError) as error:
        raise refuse(where, f"damaged .mxl: {error}") from error


def _extract(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, where: str, max_bytes: int) -> bytes:
    """One member, checked against its declared and its true size."""
    name = entry.filename[:80]
    if entry.flag_bits & 1:
        raise refuse(where, f"{name!r} in the .mxl is encrypted")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise refuse(where, f"{name!r} in the .mxl is packed by method {entry.compress_type}")
    allowed = min(max_bytes, max(_FREE, MAX_RATIO * entry.compress_size))
    if entry.file_size <= allowed:
        with archive.open(entry) as file:  # the declared size may lie; the checksum is compared at the end
            content = file.read(allowed + 1)
            if len(content) <= allowed:
                return content
    raise refuse(
        where,
        f"{name!r} in the .mxl unpacks from {entry.compress_size} to {entry.file_size} bytes or more, "
        f"limit {max_bytes} and {MAX_RATIO} times",
    )


def _root_file(container: bytes, where: str) -> str:
    root = parse(container, where=f"{where}: META-INF/container.xml", max_bytes=_FREE, max_elements=4096)
    for element in root.iter():
        if element.tag.rpartition("}")[2] == "rootfile" and element.get("full-path"):
            return element.get("full-path", "")
    raise refuse(where, "META-INF/container.xml of the .mxl names no root file")


def parse(
    data: bytes, *, where: str, max_bytes: int = MAX_BYTES, max_elements: int = MAX_ELEMENTS
) -> Element:
    """Any XML under the rules of this module; comments and processing instructions are left out."""
    if len(data) > max_bytes:
        raise refuse(where, f"{len(data)} bytes of XML, limit {max_bytes}")
    if not data:
        raise refuse(where, "it is empty")
    builder = _Builder(where, max_elements)
    parser = expat.ParserCreate()
    parser.buffer_text = True
    builder.listen(parser)
    try:
        parser.Parse(data, True)
        return builder.close()
    except DataError:
        raise
    except expat.ExpatError as error:
        raise refuse(where, f"not well-formed XML: {error}") from error
    except (ValueError, LookupError, AssertionError) as error:  # an encoding expat asks Python for
        raise refuse(where, f"not readable XML: {type(error).__name__}: {error}") from error


class _Builder:
    """expat's events to a tree, counting."""

    def __init__(self, where: str, max_elements: int) -> None:
        self.where, self.left, self.depth = where, max_elements, 0
        self.max_elements = max_elements
        self.tree = TreeBuilder()

    def listen(self, parser: Any) -> None:
        """Sets every handler; those of a DTD and of entities only raise."""
        parser.StartElementHandler = self.start
        parser.EndElementHandler = self.end
        parser.CharacterDataHandler = self.tree.data
        parser.StartDoctypeDeclHandler = self.doctype
        parser.SetParamEntityParsing(expat.XML_PARAM_ENTITY_PARSING_NEVER)
        parser.EntityDeclHandler = self.forbid("it declares an entity")
        parser.UnparsedEntityDeclHandler = self.forbid("it declares an unparsed entity")
        parser.NotationDeclHandler = self.forbid("it declares a notation")
        parser.ElementDeclHandler = self.forbid("it declares an element")
        parser.AttlistDeclHandler = self.forbid("it declares attributes")
        parser.ExternalEntityRefHandler = self.forbid("it refers to an external entity")
        parser.SkippedEntityHandler = self.forbid("it refers to an entity it does not define")

    def forbid(self, why: str) -> Callable[..., NoReturn]:
        """A handler that refuses."""

        def handler(*_: object) -> NoReturn:
            raise refuse(self.where, why, "write it without a document type of its own")

        return handler

    def doctype(self, name: str, system: str | None, public: str | None, internal: int) -> None:
        """The standard's DOCTYPE passes, unread; one with declarations of its own does not."""
        if internal:
            self.forbid("it has a document type with declarations of its own")()

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        """An element opens."""
        self.depth += 1
        self.left -= 1
        if self.depth > MAX_DEPTH:
            raise refuse(self.where, f"elements nested deeper than {MAX_DEPTH}")
        if self.left < 0:
            raise refuse(self.where, f"more than {self.max_elements} elements")
        if len(attributes) > MAX_ATTRIBUTES:
            raise refuse(self.where, f"{len(attributes)} attributes on one element, limit {MAX_ATTRIBUTES}")
        self.tree.start(tag, attributes)

    def end(self, tag: str) -> None:
        """An element closes."""
        self.depth -= 1
        self.tree.end(tag)

    def close(self) -> Element:
        """The root."""
        return self.tree.close()


def _partwise(root: Element, where: str) -> Element:
    """<score-timewise> as <score-partwise>: measures of parts become parts of measures."""
    turned = Element("score-partwise", root.attrib)
    parts: dict[str, Element] = {}
    for child in root:
        if child.tag != "measure":
            turned.append(child)
            continue
        for inner in child.findall("part"):
            name = inner.get("id", "")
            if name not in parts:
                parts[name] = Element("part", {"id": name})
            measure = Element("measure", child.attrib)
            measure.extend(list(inner))
            parts[name].append(measure)
    lengths = {len(part) for part in parts.values()}
    if len(lengths) > 1:
        raise refuse(where, f"a timewise score whose parts have {min(lengths)} to {max(lengths)} measures")
    turned.extend(parts.values())
    return turned
