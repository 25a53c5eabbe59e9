"""Whether an MP3 is whole: its frames walked one after the other (ISO 11172-3, 13818-3, layer III).

An MP3 has no length of its own, and decoders take a cut one for a short one. A cut inside a frame shows in
the frame, a cut between frames in the count that encoders store in the first one (Xing or Info).
"""

from __future__ import annotations

_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}  # Hz, by version
_KBITS_1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_KBITS_2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
#: What may stand behind the last frame: tags, or padding.
_TAIL = (b"TAG", b"APETAGEX", b"LYRICSBEGIN", b"3DI", b"\0")


def is_mp3(data: bytes) -> bool:
    """By its first bytes: an ID3v2 tag, or the sync word of a layer III frame."""
    return data[:3] == b"ID3" or _frame_size(data, 0) > 0


def find_cut(data: bytes) -> str:
    """Why these bytes are no whole MP3; "" when they are."""
    at = 0
    if data[:3] == b"ID3" and len(data) >= 10:
        size = 0
        for byte in data[6:10]:
            size = size << 7 | byte & 0x7F
        at = 10 + size + (10 if data[5] & 0x10 else 0)
    declared = _declared(data, at)
    count = 0
    while at < len(data):
        size = _frame_size(data, at)
        if size == 0:
            if data.startswith(_TAIL, at):
                break
            return f"no frame begins at offset {at}"
        if at + size > len(data):
            return f"frame {count} needs {size} bytes, the file ends before"
        at, count = at + size, count + 1
    if not count:
        return "it has no frame"
    if declared is not None and count - 1 < declared:
        return f"it has {count - 1} frames, its first one says {declared}"
    return ""


def _frame_size(data: bytes, at: int) -> int:
    """Bytes of the layer III frame at `at`; 0 when there is none."""
    head = data[at : at + 4]
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE6 != 0xE2:
        return 0
    version, kbits, rate = head[1] >> 3 & 3, head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or kbits in (0, 15) or rate == 3:
        return 0
    table, scale = (_KBITS_1, 144_000) if version == 3 else (_KBITS_2, 72_000)
    return scale * table[kbits] // _RATES[version][rate] + (head[2] >> 1 & 1)


def _declared(data: bytes, at: int) -> int | None:
    """Frames behind the first one as that one says, if it does."""
    first = data[at : at + min(_frame_size(data, at), 64)]
    for mark in (b"Xing", b"Info"):
        place = first.find(mark)
        if place >= 0 and len(first) >= place + 12 and first[place + 7] & 1:
            return int.from_bytes(first[place + 8 : place + 12], "big")
    return None
