"""The contact sheet as one HTML file: no script, no outside resource, light and dark."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ringweave.launch.data_sheet import SECONDS, SIDE, U8, Card, envelope, png_or_jpeg, shrink
from ringweave.pretrain.report.safe_text import text

_POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"
_CSS = """
:root{color-scheme:light dark;--bg:#f6f6f4;--card:#fff;--ink:#1b1f24;--soft:#5a626c;--rule:#e0e2e5;--accent:#1c5d99;
--wave:#bd8200;--bad:#b3261e;--bad-bg:#fcefee;--c1:#fff;--c2:#d8dbdf;--well:#f1f2f4}
@media (prefers-color-scheme:dark){:root{--bg:#121518;--card:#1a1e23;--ink:#e7eaed;--soft:#a3abb5;--rule:#2d333a;
--accent:#7db8ee;--wave:#efbf4d;--bad:#ff8a80;--bad-bg:#2e1a19;--c1:#3a414a;--c2:#2a3037;--well:#14181c}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1320px;margin:0 auto;padding:40px 28px 64px}
h1{font-size:24px;letter-spacing:-.015em;margin:0 0 4px;overflow-wrap:anywhere}
.sum{color:var(--soft);margin:0 0 14px}
nav{display:flex;flex-wrap:wrap;gap:6px 8px;margin:0 0 8px}
nav a{border:1px solid var(--rule);background:var(--card);border-radius:99px;padding:2px 12px;font-size:13.5px;
color:var(--accent);text-decoration:none}
nav a:hover{border-color:var(--accent)}
h2{font-size:18px;margin:38px 0 12px;display:flex;gap:10px;align-items:baseline;letter-spacing:-.01em;
border-top:1px solid var(--rule);padding-top:18px}
h2 small{font-weight:400;font-size:13.5px;color:var(--soft);letter-spacing:0}
.grid{display:grid;gap:14px;grid-template-columns:repeat(auto-fill,minmax(var(--w,220px),1fr));align-items:start}
article{background:var(--card);border:1px solid var(--rule);border-radius:8px;overflow:hidden;min-width:0}
.pic{display:flex;flex-wrap:wrap;gap:10px;justify-content:center;background:var(--well);padding:12px}
.pic figure{margin:0;text-align:center;min-width:0}
.pic figcaption{font-size:11.5px;color:var(--soft);margin-top:3px}
img{display:block;max-width:100%;height:auto}
img.px{image-rendering:pixelated}
img.check{background:repeating-conic-gradient(var(--c2) 0 25%,var(--c1) 0 50%) 0 0/16px 16px}
.strip{display:flex;gap:3px;background:var(--well);padding:12px}
.strip img{flex:1 1 0;min-width:0;width:0}
.wave{padding:12px 12px 4px;background:var(--well)}
.wave svg{display:block;width:100%;height:72px}
.wave path{fill:var(--wave)}.wave line{stroke:var(--rule)}
audio{display:block;width:100%;height:36px;margin-top:6px}
.body{padding:10px 13px 11px}
.body p{margin:0 0 6px;white-space:pre-wrap;overflow-wrap:anywhere;font-size:14px;line-height:1.45;
max-height:15.5em;overflow:auto}
.body p b{font-weight:600;color:var(--soft);font-size:12px;margin-right:6px}
.foot{font-size:12px;color:var(--soft);overflow-wrap:anywhere;line-height:1.45}
.foot code{font:11.5px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;color:var(--ink)}
details{margin:0 0 6px;font-size:12.5px;color:var(--soft)}summary{cursor:pointer}
pre{margin:6px 0 0;white-space:pre-wrap;overflow-wrap:anywhere;font:11.5px/1.45 ui-monospace,SFMono-Regular,Menlo,
Consolas,monospace;max-height:20em;overflow:auto}
.bad{border-color:var(--bad)}.bad .why{background:var(--bad-bg);color:var(--bad);padding:10px 13px;font-size:13px;
overflow-wrap:anywhere}
footer{margin-top:44px;font-size:12.5px;color:var(--soft)}
:target{scroll-margin-top:12px}
@media print{article{break-inside:avoid}audio{display:none}}
"""
#: Hz; above it FLAC takes round rates only.
_FLAC_RATE = 65_535
#: Smallest width of a card, by what is on it.
_WIDTHS = {"video": 560, "audio": 300, "layers": 420, "wide": 340, "text": 360, "picture": 210}


def render(title: str, cards: dict[str, list[Card]], totals: dict[str, int], *, seed: int) -> str:
    """The page. title, keys, texts, labels and problems are text and get escaped."""
    shown = sum(map(len, cards.values()))
    failed = sum(bool(card.problems) for row in cards.values() for card in row)
    names = list(cards)
    links = "".join(f'<a href="#s{n}">{text(name)}</a>' for n, name in enumerate(names))
    sections = "".join(_section(n, name, cards[name], totals[name]) for n, name in enumerate(names))
    state = f"{failed} cannot be decoded" if failed else "all decoded"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">'
        f"<title>{text(title)} · samples</title>\n<style>{_CSS}</style></head>\n<body><main>\n"
        f"<h1>{text(title)}</h1>\n<p class=sum>{shown:,} of {sum(totals.values()):,} samples, "
        f"{len(names)} source{'s'[: len(names) != 1]}, {state}</p>\n<nav>{links}</nav>\n{sections}"
        f"<footer>Samples chosen with seed {seed}; pictures up to {SIDE} px, sounds up to {SECONDS} s. Made by "
        "<code>ringweave data show --out</code>.</footer>\n</main></body></html>\n"
    )


def _section(number: int, name: str, row: list[Card], total: int) -> str:
    width = _WIDTHS[_kind(row)]
    body = "".join(_card(card) for card in row)
    head = f"{len(row)} of {total:,}" if row else "no samples"
    return (
        f'<section id="s{number}"><h2>{text(name)} <small>{head}</small></h2>'
        f'<div class="grid" style="--w:{width}px">{body}</div></section>\n'
    )


def _kind(row: list[Card]) -> str:
    if any(card.strip for card in row):
        return "video"
    if any(card.layers for card in row):
        return "layers"
    if any(card.sounds for card in row):
        return "audio"
    pictures = [picture for card in row for _, picture in card.pictures]
    if any(picture.shape[1] > 1.6 * picture.shape[0] for picture in pictures):
        return "wide"
    return "picture" if pictures else "text"


def _card(card: Card) -> str:
    parts = [_strip(card.strip)] if card.strip else []
    parts += [_pictures(card)] if card.pictures else []
    parts += [_sound(label, samples, rate) for label, samples, rate in card.sounds]
    parts += [f'<div class="why">{text(problem)}</div>' for problem in card.problems]
    several = len(card.texts) > 1
    words = "".join(
        f"<p>{f'<b>{text(ext)}</b>' if several else ''}{text(value)}</p>" for ext, value in card.texts
    )
    record = (
        f"<details><summary>json</summary><pre>{text(card.record)}</pre></details>" if card.record else ""
    )
    place = " · ".join(text(fact) for fact in [card.where, *card.facts])
    foot = f'<div class="foot"><code>{text(card.key)}</code><br>{place}</div>'
    css = ' class="bad"' if card.problems else ""
    return f'<article{css}>{"".join(parts)}<div class="body">{words}{record}{foot}</div></article>'


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _image(picture: U8, label: str, *, room: int) -> str:
    """Small pictures are enlarged by a whole factor and kept pixelated."""
    small = shrink(picture, SIDE)
    kind, data = png_or_jpeg(small)
    height, width = small.shape[:2]
    factor = max(1, room // max(width, height))
    css = " ".join(["px"] * (factor > 1) + ["check"] * (picture.shape[2] == 4))
    size = f'width="{width * factor}" height="{height * factor}"'
    return f'<img class="{css}" {size} alt="{text(label)}" src="{_uri(kind, data)}">'


def _pictures(card: Card) -> str:
    room = 104 if card.layers else 192
    labelled = len(card.pictures) > 1
    figures = "".join(
        f"<figure>{_image(picture, f'{label} of {card.key}', room=room)}"
        f"{f'<figcaption>{text(label)}</figcaption>' if labelled else ''}</figure>"
        for label, picture in card.pictures
    )
    return f'<div class="pic">{figures}</div>'


def _strip(frames: Iterable[U8]) -> str:
    pictures = "".join(_image(frame, f"frame {n}", room=128) for n, frame in enumerate(frames))
    return f'<div class="strip">{pictures}</div>'


def _sound(label: str, samples: NDArray[np.int16], rate: int) -> str:
    import soundfile

    columns = 300
    shape = envelope(samples, columns)
    top = [f"{x},{50 - 48 * high:.1f}" for x, (_, high) in enumerate(shape)]
    bottom = [f"{x},{50.6 - 48 * low:.1f}" for x, (low, _) in enumerate(shape)]
    outline = "M" + " ".join(top + bottom[::-1]) + "Z"
    buffer = io.BytesIO()
    kind = "FLAC" if rate <= _FLAC_RATE else "WAV"
    soundfile.write(buffer, samples[: SECONDS * rate], rate, format=kind, subtype="PCM_16")
    return (
        f'<div class="wave"><svg viewBox="0 0 {columns} 100" preserveAspectRatio="none" role="img" '
        f'aria-label="waveform of {text(label)}"><line x1="0" x2="{columns}" y1="50" y2="50"/>'
        f'<path d="{outline}"/></svg>'
        f'<audio controls preload="none" src="{_uri(f"audio/{kind.lower()}", buffer.getvalue())}"></audio></div>'
    )
