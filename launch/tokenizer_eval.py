"""`ringweave tokenizer eval`: rate, quality and speed of a tokenizer set on held-out records, as Markdown tables.

One table a modality: the codec of the set as measured, and below it those that can be brought from outside.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringweave.launch.console import Progress
from ringweave.launch.outside_table import OUTSIDE, outside_of
from ringweave.pretrain.errors import ConfigError

if TYPE_CHECKING:
    from ringweave.tokenizers.members import Members
    from ringweave.tokenizers.set import TokenizerSet

BEGIN, END = "<!-- tokenizer eval -->", "<!-- /tokenizer eval -->"
_TITLES = {
    "text": "Text", "image": "Images", "rgba": "RGBA layers", "video": "Video", "audio": "Audio", "score": "Scores",
    "symbolic": "MusicXML", "midi": "MIDI",
}  # fmt: skip
#: Unit of speed: what is encoded in a second.
_NOUNS = {
    "text": "documents", "image": "images", "rgba": "records", "video": "clips", "audio": "clips", "score": "pages",
    "symbolic": "files", "midi": "files",
}  # fmt: skip
_COLUMNS = ("codec", "rate", "quality", "ids used", "encode, decode a second of one core", "licence")


def evaluate(
    tokenizers: TokenizerSet,
    samples: Mapping[str, Iterable[Members]],
    *,
    latents: Mapping[str, Iterable[Members]] | None = None,
    limit: int,
    progress: Progress,
) -> dict[str, Any]:
    """{"modalities": {name: figures of `measure`, codec, kind, sha256}, "outside": [...], "machine", "vocabulary"}.

    With "latents": the same figures of a codec that has no ids, where the set has one. latents: sources of any names it
    is measured on, else "rgba" of `samples`.

    Raises ConfigError if no source is of a modality the set has.
    """
    from ringweave.tokenizers.brought import Brought
    from ringweave.tokenizers.measure import codec_of, measure

    def report(source: str, done: int) -> None:
        progress(f"measuring {source}", done)

    measured = measure(
        tokenizers,
        _with_notes(tokenizers, samples),
        latents=latents,
        limit=limit,
        speed=True,
        progress=report,
    )
    if not measured:
        raise ConfigError(
            "nothing to measure", why=f"sources: {', '.join(samples) or 'none'}; codecs: "
            f"{', '.join(tokenizers.codecs)}", fix="give held-out shards of a modality that the set has",
        )  # fmt: skip
    continuous = measured.pop("latents", None)
    for source, figures in measured.items():
        codec = codec_of(tokenizers, source)
        block = next(block for block in tokenizers.manifest.blocks if block.codec == codec)
        brought = isinstance(tokenizers.codecs[codec], Brought)
        figures |= {
            "codec": codec,
            "kind": tokenizers.codecs[codec].kind,
            "sha256": block.sha256,
            "brought": brought,
        }
    facts: dict[str, Any] = {}
    if continuous is not None:
        about = tokenizers.manifest.preprocessing["latents"]
        facts["latents"] = continuous | {name: about[name] for name in ("kind", "sha256", "patch")}
    return facts | {
        "modalities": measured,
        "outside": [entry.to_json() for entry in OUTSIDE],
        "vocabulary": str(tokenizers.manifest.hash),
        "machine": _machine(),
    }


def _with_notes(
    tokenizers: TokenizerSet, samples: Mapping[str, Iterable[Members]]
) -> Mapping[str, Iterable[Members]]:
    """Engraved scores often come with their notes: then those are measured as well."""
    more: dict[str, Iterable[Members]] = dict(samples)
    first: Members = next(iter(samples.get("score", ())), {})
    for source, ending in (("symbolic", "musicxml"), ("midi", "mid")):
        if source in tokenizers.codecs and source not in samples and ending in first:
            more[source] = samples["score"]
    return more


def _machine() -> str:
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next((name for name in names if name), platform.machine() or os.name)


def markdown(facts: Mapping[str, Any]) -> str:
    """All tables, and what their figures mean."""
    parts = []
    for source, figures in facts["modalities"].items():
        rows = [_measured_row(source, figures), *_outside_rows(source)]
        skipped = f", {figures['skipped']} skipped" if figures["skipped"] else ""
        head = f"**{_TITLES[source]}** ({figures['records']} held-out records{skipped})"
        parts.append("\n\n".join([head, _table(_COLUMNS, rows)]))
    rest = [source for source in ("image", "video", "audio") if source not in facts["modalities"]]
    for source in rest:
        parts.append(f"**{_TITLES[source]}**\n\n{_table(_COLUMNS, _outside_rows(source))}")
    if "latents" in facts:
        parts.append(_latents_part(facts["latents"]))
    notes = (
        "Rates count all ids of a record in tokens, and log2 of the codebook's size for each id in bits; ids that end "
        "rows, frames and records count as tokens and carry no bits. Speeds are without the decoding of media files, "
        f"in seconds of processor time ({_cell(facts['machine'])}). Codecs from outside were not measured here; their "
        "rates and licences are as noted by others and unverified: read the licence that comes with the weights."
    )
    return "\n\n".join([*parts, notes]) + "\n"


def _latents_part(figures: Mapping[str, Any]) -> str:
    """The codec of continuous latents: it has no ids, so no tokens and no bits."""
    row = [
        f"`{_cell(figures['kind'])}`, file {figures['sha256'][:12]}",
        "–",
        "no record could be read",
        "–",
        "–",
    ]
    if figures["records"]:
        row[1] = f"cells of {figures['patch']} pixels, {figures['numbers_per_pixel']:.2f} numbers a pixel"
        row[2] = f"PSNR {figures['psnr_nine']:.1f} dB over nine grounds; alpha MAE {figures['alpha_mae']:.4f}"
        row[4] = f"{_short(figures['encode_per_s'])}, {_short(figures['decode_per_s'])} records"
    skipped = f", {figures['skipped']} skipped" if figures["skipped"] else ""
    head = f"**Latents of RGBA layers** ({figures['records']} held-out records{skipped})"
    return "\n\n".join([head, _table(_COLUMNS, [[*row, "that of its weights"]])])


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = list(columns)
    lines = [names, ["---"] * len(names), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: str) -> str:
    """Text that cannot leave its cell."""
    return " ".join(value.replace("|", "\\|").replace("<", "&lt;").split())


def _measured_row(source: str, figures: Mapping[str, Any]) -> list[str]:
    plain = figures["kind"] == figures["codec"] and figures["kind"] in ("image", "rgba", "audio", "score")
    kind = f"`{_cell(figures['kind'])}`{' (closed form)' * plain}, file {figures['sha256'][:12]}"
    licence = "that of its weights" if figures["brought"] else "yours"
    licence = "nothing is fitted" if source in ("symbolic", "midi") else licence
    if not figures["records"]:
        return [kind, "–", "no record could be read", "–", "–", licence]
    used = f"{figures['codes_used']:.0%}"
    return [kind, _rate(source, figures), _quality(source, figures), used, _speed(source, figures), licence]


def _outside_rows(source: str) -> list[list[str]]:
    return [
        [f"{entry.name} ({entry.read_from})", entry.rate, "–", "–", "–", entry.licence]
        for entry in outside_of(source)
    ]


def _rate(source: str, figures: Mapping[str, Any]) -> str:
    """Tokens and bits a unit of the modality."""
    mean = f"{figures['tokens_per_record']:,.0f} tokens a"
    if source == "text":
        return f"{figures['bytes_per_token']:.2f} bytes a token, {figures['bits_per_byte']:.2f} bits a byte"
    if source == "audio":
        return f"{figures['tokens_per_s']:,.0f} tokens a second, {figures['bits_per_s'] / 1000:.2f} kbit/s"
    if source in ("symbolic", "midi"):
        return f"{mean} file, {figures['bits_per_record']:,.0f} bits"
    pixel = f"{figures['pixels_per_token']:.1f} pixels a token, {figures['bits_per_pixel']:.3f} bits a pixel"
    if source == "video":
        frame = f"{figures['tokens_per_frame']:,.0f} tokens a frame, {figures['tokens_per_s']:,.0f} a second"
        return f"{frame}, {figures['bits_per_pixel']:.3f} bits a pixel"
    return f"{mean} {({'image': 'picture', 'score': 'page'}).get(source, 'record')}, {pixel}"


def _quality(source: str, figures: Mapping[str, Any]) -> str:
    if source == "text":
        return f"{figures['lossy_documents']} lossy documents"
    if source == "image":
        return f"PSNR {figures['psnr']:.1f} dB; floor at the same rate {figures['floor_psnr']:.1f} dB"
    if source == "rgba":
        grounds = ", ".join(f"{figures[f'psnr_{g}']:.1f} dB on {g}" for g in ("black", "white", "checker"))
        return f"PSNR {grounds}; alpha MAE {figures['alpha_mae']:.3f}"
    if source == "video":
        return f"PSNR {figures['psnr']:.1f} dB, {figures['frames_lost']} frames lost"
    if source == "audio":
        return f"SI-SDR {figures['si_sdr']:.1f} dB"
    if source in ("symbolic", "midi"):
        return f"{figures['lossy_records']} files that come back with other ids"
    return f"ink-F1 {figures['ink_f1']:.3f}"


def _speed(source: str, figures: Mapping[str, Any]) -> str:
    """Records a second, and seconds of sound or film in a second."""
    pair = f"{_short(figures['encode_per_s'])}, {_short(figures['decode_per_s'])} {_NOUNS[source]}"
    if "encode_x_real_time" in figures:
        times = (figures["encode_x_real_time"], figures["decode_x_real_time"])
        pair += f" ({_short(times[0])}x, {_short(times[1])}x real time)"
    if "encode_bytes_per_s" in figures:
        pair += f" ({figures['encode_bytes_per_s'] / 1e6:.1f}, {figures['decode_bytes_per_s'] / 1e6:.1f} MB)"
    return pair


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def update_file(path: Path, text: str) -> None:
    """Puts `text` between the two markers of a document. ConfigError unless it has each once, in order."""
    try:
        whole = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("cannot read the document", where=str(path), why=str(error)) from error
    begin, end = whole.find(BEGIN), whole.find(END)
    if whole.count(BEGIN) != 1 or whole.count(END) != 1 or end < begin:
        raise ConfigError(
            "the document has no place for the tables", where=str(path),
            why=f"it must hold {BEGIN} and, below it, {END}, each once", fix="add the two lines where they go",
        )  # fmt: skip
    made = f"{whole[: begin + len(BEGIN)]}\n\n{text.strip()}\n\n{whole[end:]}"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(made, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError("cannot write the document", where=str(path), why=str(error)) from error
    finally:
        temporary.unlink(missing_ok=True)
