"""The page of `tokenizer show` as one HTML file: no script, no outside resource, light and dark."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ringweave.launch.data_sheet import SIDE, U8, shrink
from ringweave.launch.tokenizer_clip import GAP
from ringweave.launch.tokenizer_page import Card, Section, Sound
from ringweave.pretrain.report.safe_text import text
from ringweave.tokenizers.sheet import spectrogram

_POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"
_CSS = """
:root{color-scheme:light dark;--bg:#f6f6f4;--card:#fff;--ink:#1b1f24;--soft:#5a626c;--rule:#e0e2e5;--accent:#1c5d99;
--bad:#b3261e;--bad-bg:#fcefee;--c1:#fff;--c2:#d8dbdf;--well:#f1f2f4;--p0:#dbeafc;--p1:#fdebc8;--p2:#dff3e1;
--p3:#f3e2f5;--byte:#e4e6e9}
@media (prefers-color-scheme:dark){:root{--bg:#121518;--card:#1a1e23;--ink:#e7eaed;--soft:#a3abb5;--rule:#2d333a;
--accent:#7db8ee;--bad:#ff8a80;--bad-bg:#2e1a19;--c1:#98a1ac;--c2:#858e99;--well:#14181c;--p0:#1d3a57;--p1:#4d3b15;
--p2:#1f4427;--p3:#452a4b;--byte:#3a414a}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1360px;margin:0 auto;padding:40px 28px 64px}
h1{font-size:25px;letter-spacing:-.015em;margin:0 0 4px}
.sum{color:var(--soft);margin:0 0 14px;overflow-wrap:anywhere}
code{font:12px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
nav{display:flex;flex-wrap:wrap;gap:6px 8px}
nav a{border:1px solid var(--rule);background:var(--card);border-radius:99px;padding:2px 12px;font-size:13.5px;
color:var(--accent);text-decoration:none}
nav a:hover{border-color:var(--accent)}
h2{font-size:19px;margin:40px 0 2px;display:flex;flex-wrap:wrap;gap:0 12px;align-items:baseline;
letter-spacing:-.01em;border-top:1px solid var(--rule);padding-top:20px}
h2 small{font-weight:400;font-size:13.5px;color:var(--soft);letter-spacing:0}
.note{margin:0 0 12px;font-size:13.5px;color:var(--soft)}
.grid{display:grid;gap:16px;grid-template-columns:repeat(auto-fill,minmax(min(100%,var(--w,420px)),1fr));
align-items:start}
article{background:var(--card);border:1px solid var(--rule);border-radius:10px;overflow:hidden;min-width:0}
.well{background:var(--well);padding:14px;display:grid;gap:12px}
.row{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:10px;align-items:end}
.row.wide{grid-template-columns:repeat(auto-fit,minmax(min(100%,240px),1fr))}
figure{margin:0;min-width:0}
figcaption{font-size:12px;color:var(--soft);margin:0 0 3px;line-height:1.35}
img,video{display:block;width:100%;height:auto}
img{border-radius:3px;box-shadow:0 0 0 1px var(--rule)}
img.px{image-rendering:pixelated}
img.check{background:repeating-conic-gradient(var(--c2) 0 25%,var(--c1) 0 50%) 0 0/16px 16px}
.film{border-radius:4px;background:#1c2127;object-fit:contain;object-position:50% 0;box-shadow:0 0 0 1px var(--rule)}
.labels{display:grid;margin-bottom:-8px}
.spec{aspect-ratio:10/3;object-fit:fill}
audio{display:block;width:100%;height:34px;margin-top:7px}
.body{padding:10px 14px 12px}
.cap{margin:0 0 7px;font-size:14px;line-height:1.4;overflow-wrap:anywhere}
dl{display:flex;flex-wrap:wrap;gap:3px 16px;margin:0 0 6px}
dl div{display:flex;gap:5px;align-items:baseline}
dt{font-size:12px;color:var(--soft)}dd{margin:0;font-size:13.5px;font-weight:600}
.foot{font-size:12px;color:var(--soft);overflow-wrap:anywhere;line-height:1.45}
.foot code{color:var(--ink)}
.pieces{margin:0;background:var(--well);padding:14px;white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.75;
font:14px/1.75 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.pieces span{border-radius:3px;padding:1px 0;-webkit-box-decoration-break:clone;box-decoration-break:clone}
.t0{background:var(--p0)}.t1{background:var(--p1)}.t2{background:var(--p2)}.t3{background:var(--p3)}
.pieces .nl{color:var(--soft)}
.pieces .byte{background:var(--byte);font-size:11px;padding:1px 3px;margin:0 1px;border:1px solid var(--rule)}
.bad{border-color:var(--bad)}.why{background:var(--bad-bg);color:var(--bad);padding:10px 14px;font-size:13px;
overflow-wrap:anywhere}
footer{margin-top:44px;font-size:12.5px;color:var(--soft)}
:target{scroll-margin-top:12px}
@media print{article{break-inside:avoid}audio{display:none}}
"""
#: Smallest width of a card.
_WIDTHS = {"text": 420, "image": 400, "rgba": 400, "video": 600, "audio": 900, "score": 900, "latents": 400}
#: Pixels below a film, where players lay their controls.
_CONTROLS = 96
#: Hz; above it FLAC takes round rates only.
_FLAC_RATE = 65_535


def render(sections: Sequence[Section], *, tokenizers: str, data: str, vocabulary: str) -> str:
    """The page. Paths, keys, captions, texts and problems are text and get escaped."""
    cards = [card for section in sections for card in section.cards]
    failed = sum(bool(card.problem) for card in cards)
    links = "".join(f'<a href="#s{n}">{text(section.title)}</a>' for n, section in enumerate(sections))
    state = f", {failed} cannot be read" if failed else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">'
        f"<title>Tokenizers · {text(tokenizers)}</title>\n<style>{_CSS}</style></head>\n<body><main>\n"
        "<h1>Original, decoded, difference</h1>\n"
        f"<p class=sum>{len(cards)} held-out records of <code>{text(data)}</code>{state} · tokenizers "
        f"<code>{text(tokenizers)}</code> · vocabulary <code>{text(vocabulary[:12])}</code></p>\n"
        f"<nav>{links}</nav>\n{''.join(_section(n, section) for n, section in enumerate(sections))}"
        "<footer>Bits are log2 of the codebook's size for each id; ids that end rows, frames and records carry "
        f"none. Pictures are up to {SIDE} px. Made by <code>ringweave tokenizer show</code>.</footer>\n"
        "</main></body></html>\n"
    )


def _section(number: int, section: Section) -> str:
    body = "".join(_card(card, section.source) for card in section.cards)
    return (
        f'<section id="s{number}"><h2>{text(section.title)} <small>{text(section.codec)}</small></h2>'
        f'<p class=note>{text(section.note)}</p><div class="grid" style="--w:{_WIDTHS[section.source]}px">'
        f"{body}</div></section>\n"
    )


def _card(card: Card, source: str) -> str:
    rows = "".join(_row(row, card.key, wide=source == "score") for row in card.rows)
    sounds = "".join(_sound(sound) for sound in card.sounds)
    rows += (f'<div class="row wide">{sounds}</div>' if sounds else "") + (_film(card) if card.clip else "")
    parts = [f'<div class="well">{rows}</div>'] if rows else []
    parts += [_pieces(card.pieces)] if card.pieces else []
    parts += [f'<div class="why">{text(card.problem)}</div>'] if card.problem else []
    caption = f"<p class=cap>{text(card.caption)}</p>" if card.caption else ""
    facts = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in card.facts)
    foot = f'<div class="foot"><code>{text(card.key)}</code> · {text(card.where)}</div>'
    css = ' class="bad"' if card.problem else ""
    listed = f"<dl>{facts}</dl>" if facts else ""
    return f'<article{css}>{"".join(parts)}<div class="body">{caption}{listed}{foot}</div></article>'


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _png(picture: U8) -> str:
    """A picture without loss: what is compared must not be compressed once more."""
    sink = io.BytesIO()
    Image.fromarray(picture).save(sink, "PNG", optimize=True)
    return _uri("image/png", sink.getvalue())


def _row(row: Sequence[tuple[str, U8]], key: str, *, wide: bool) -> str:
    figures = "".join(
        f"<figure><figcaption>{text(label)}</figcaption>{_picture(picture, f'{label} of {key}')}</figure>"
        for label, picture in row
    )
    return f'<div class="row{" wide" * wide}">{figures}</div>'


def _picture(picture: U8, label: str) -> str:
    small = shrink(np.ascontiguousarray(picture), 2 * SIDE if picture.shape[1] > SIDE else SIDE)
    css = " ".join(["px"] * (max(small.shape[:2]) <= SIDE) + ["check"] * (picture.shape[2] == 4))
    size = f'width="{small.shape[1]}" height="{small.shape[0]}"'
    return f'<img class="{css}" {size} alt="{text(label)}" src="{_png(small)}">'


def _film(card: Card) -> str:
    assert card.clip is not None
    clip = card.clip
    columns = f"grid-template-columns:repeat({len(card.labels)},1fr);gap:{100 * GAP / clip.width:.2f}%"
    labels = "".join(f"<figcaption>{text(label)}</figcaption>" for label in card.labels)
    size = f'width="{clip.width}" height="{clip.height}"'
    source = _uri(clip.mime, clip.data)
    name = text(f"{', '.join(card.labels)} of {card.key}")
    film = (
        f'<video class="film" controls loop muted playsinline preload="auto" {size} aria-label="{name}" '
        f'style="aspect-ratio:{clip.width}/{clip.height + _CONTROLS}" src="{source}"></video>'
        if clip.mime.startswith("video/")
        else f'<img class="film" {size} alt="{name}" src="{source}">'
    )
    return f'<div class="labels" style="{columns}">{labels}</div>{film}'


def _sound(sound: Sound) -> str:
    import soundfile

    sink = io.BytesIO()
    kind = "FLAC" if sound.rate <= _FLAC_RATE else "WAV"
    soundfile.write(sink, sound.samples, sound.rate, format=kind, subtype="PCM_16")
    label = text(sound.label)
    band = f"0 to {sound.rate / 4000:g} kHz upwards"
    return (
        f'<figure><figcaption>{label} · {band}</figcaption><img class="spec" width="440" height="128" '
        f'alt="spectrogram, {label}" src="{_png(spectrogram(sound.samples))}">'
        f'<audio controls preload="metadata" src="{_uri(f"audio/{kind.lower()}", sink.getvalue())}"></audio></figure>'
    )


def _pieces(pieces: Sequence[tuple[str, str]]) -> str:
    """Pieces in four tints that follow each other."""
    parts = []
    for n, (words, kind) in enumerate(pieces):
        if kind == "line":
            parts.append(f'<span class="nl t{n % 4}">↵</span>\n')
        elif kind == "more":
            parts.append(f" {text(words)}")
        else:
            css = "byte" if kind == "byte" else f"t{n % 4}"
            parts.append(f'<span class="{css}">{text(words)}</span>')
    return f'<p class="pieces">{"".join(parts)}</p>'
