"""Codecs of notes without pixels or samples: MusicXML as LMX, MIDI as events. Nothing is fitted.

Their files hold what the words are (a digest over all of them), so that a set made with other words is refused by
name instead of being read wrongly.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ringweave.tokenizers import lmx, midi_events
from ringweave.tokenizers.codec import pack_codec, unpack_codec
from ringweave.tokenizers.errors import VocabularyError


def _pack(kind: str, config: dict[str, int], digest: str) -> bytes:
    return pack_codec(kind, config, {"words": np.frombuffer(bytes.fromhex(digest), np.uint8)})


def _unpack(data: bytes, kind: str, *, where: str) -> tuple[dict[str, int], str]:
    config, tensors = unpack_codec(data, kind, where=where)
    return config, tensors["words"].tobytes().hex()


def _same_words(found: str, ours: str, *, what: str, where: str) -> None:
    if found != ours:
        raise VocabularyError(
            f"the words of {what} are not those of this version",
            where=where,
            why=f"the file has {found[:12]}, this version {ours[:12]}",
            fix="install the version that wrote it",
        )


class SymbolicCodec:
    """MusicXML (.musicxml, .mxl) <-> local ids int32 [n] of LMX words. size: number of words."""

    kind = "symbolic.lmx"

    def __init__(self) -> None:
        self.size = lmx.SIZE

    def encode(self, xml: bytes, *, where: str) -> NDArray[np.int32]:
        """DataError for what cannot be read or said."""
        return lmx.encode(xml, where=where)

    def decode(self, ids: NDArray[np.int32]) -> tuple[str, bool]:
        """(MusicXML, whether every id had its place); never raises."""
        return lmx.decode(ids)

    def times(self, ids: NDArray[np.int32], *, unit_ms: int) -> NDArray[np.int32]:
        """Place in time of each id: its number, as for text, since a score has no milliseconds."""
        return np.arange(len(ids), dtype=np.int32)

    def to_bytes(self) -> bytes:
        """The codec file."""
        return _pack(self.kind, {"size": self.size}, lmx.digest())

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str) -> SymbolicCodec:
        """Load `to_bytes`; VocabularyError for other words."""
        _, found = _unpack(data, cls.kind, where=where)
        _same_words(found, lmx.digest(), what="LMX", where=where)
        return cls()


class MidiCodec:
    """Standard MIDI Files <-> local ids int32 [n] of events. size: number of ids; velocity_bins: 1 to 127."""

    kind = "midi.events"

    def __init__(self, *, velocity_bins: int = midi_events.VELOCITY_BINS) -> None:
        self.velocity_bins, self.size = velocity_bins, midi_events.size(velocity_bins)

    def encode(self, data: bytes, *, where: str) -> NDArray[np.int32]:
        """DataError for what is no MIDI file."""
        return midi_events.encode(data, where=where, velocity_bins=self.velocity_bins)

    def decode(self, ids: NDArray[np.int32]) -> tuple[bytes, bool]:
        """(MIDI file, whether every id had its place); never raises."""
        return midi_events.decode(ids, velocity_bins=self.velocity_bins)

    def times(self, ids: NDArray[np.int32], *, unit_ms: int) -> NDArray[np.int32]:
        """Time of each id in units of `unit_ms` from the start of the song, so that events align with sound."""
        return (midi_events.milliseconds(ids) // unit_ms).astype(np.int32)

    def to_bytes(self) -> bytes:
        """The codec file."""
        config = {"velocity_bins": self.velocity_bins}
        return _pack(self.kind, config, midi_events.digest(self.velocity_bins))

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str) -> MidiCodec:
        """Load `to_bytes`; VocabularyError for other words."""
        config, found = _unpack(data, cls.kind, where=where)
        codec = cls(velocity_bins=config["velocity_bins"])
        _same_words(found, midi_events.digest(codec.velocity_bins), what="MIDI events", where=where)
        return codec
