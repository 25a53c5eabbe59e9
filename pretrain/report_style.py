"""How the report looks and how text gets into it: CSS, the page shell, and small HTML builders.

Everything that comes from data passes through `text()`: secrets redacted, control characters replaced, HTML
escaped. Builders take ready HTML in parameters named `*_html` and plain text everywhere else.
"""

from __future__ import annotations

import html
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

#: Modality -> CSS variable. Okabe-Ito hues, darkened for white paper and lightened for the dark page.
COLOURS: dict[str, str] = {
    m: f"var(--m-{m})" for m in ("text", "image", "rgba", "video", "audio", "score", "control")
}
OTHER_COLOUR = "var(--m-other)"
STATES: dict[str, str] = {"good": "holds", "warn": "partly", "bad": "fails", "none": "not measured"}

_ICONS = {
    "good": '<path d="M4.5 8.4l2.4 2.4 4.6-5.2"/>',
    "warn": '<path d="M8 4.4v4.4M8 11.1v.5"/>',
    "bad": '<path d="M5.3 5.3l5.4 5.4M10.7 5.3l-5.4 5.4"/>',
    "none": '<path d="M5 8h6"/>',
}

# --- text from data ---------------------------------------------------------------------------------------

_HIDDEN = "[redacted]"
_USERINFO = re.compile(r"(?<=://)[^/?#\s@\"'<>]+@(?=[^\s/])")
_QUERY = re.compile(
    r"(?i)([?&;](?:x-amz-[\w-]+|x-goog-[\w-]+|awsaccesskeyid|sig|signature|(?:[\w-]*_)?token|se|sp|skoid|"
    r"api[_-]?key|key|secret|password)=)[^&;\s\"'<>]+"
)
_NAMED = re.compile(
    r"(?i)(?<![\w.-])([\w.-]{0,80}?(?:password|passwd|secret|credentials?|api[_-]?key|access[_-]?key(?:[_-]?id)?"
    r"|private[_-]?key|token|authorization)[\"']?\s*[:=]\s*)((?:bearer\s+)?(?:\"[^\"]*\"|'[^']*'|[^\s,}\]]+))"
)
_PLAIN_TOKEN = re.compile(
    r"(?i)(?:next|bos|eos|pad|unk|mask|image|audio)_token|token[\"']?\s*[:=]\s*[\d.]{1,8}[km]?$"
)
_KNOWN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|gh[opusr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|AKIA[0-9A-Z]{16}"
    r"|xox[abp]-[\w-]{10,}|sk-[\w-]{20,})"
)
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


def redact(value: str) -> str:
    """Hide credentials: userinfo and signed query parameters of URLs, values of secret-looking keys, known
    key shapes. Special tokens (`bos_token: <s>`), `next_token: 1.0`, booleans and nulls stay."""
    value = _USERINFO.sub(_HIDDEN + "@", value)
    value = _QUERY.sub(r"\1" + _HIDDEN, value)
    value = "\n".join(_NAMED.sub(_hide, line) for line in value.split("\n"))
    return _KNOWN.sub(_HIDDEN, value)


def _hide(match: re.Match[str]) -> str:
    plain = (
        match[2].lower() in ("null", "none", "~", "true", "false", "|", ">", '""', "''")
        or match[2][0] in "{["
    )
    return match[0] if plain or _PLAIN_TOKEN.search(match[0]) else match[1] + _HIDDEN


def text(value: Any) -> str:
    """Any value as safe HTML text: redacted, escaped, control and text-direction characters as U+FFFD."""
    plain = str(value).replace("\r\n", "\n")
    return html.escape(_CONTROL.sub("\ufffd", redact(plain)), quote=True)


# --- numbers ----------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 3) -> str:
    """A measured number: fixed point in the ordinary range, `3.1e-8` when tiny, "–" when absent."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e7:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:,.{digits}f}"


def count(value: float | None) -> str:
    """A whole number with thousands separated: 1,234,567."""
    return "–" if value is None else f"{value:,.0f}"


def short(value: float | None) -> str:
    """A large quantity in three figures: 412 K, 1.23 M (decimal thousands)."""
    if value is None:
        return "–"
    for limit, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " K")):
        if abs(value) >= limit * 0.9995:
            scaled = value / limit
            return f"{scaled:.3g}{unit}" if scaled < 999.5 else f"{scaled:.0f}{unit}"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def context_name(value: int | None) -> str:
    """A context length as configs write it (binary thousands): 512, 4K, 1M."""
    if value is None:
        return "?"
    for bits, unit in ((20, "M"), (10, "K")):
        if value >= 1 << bits and value % (1 << bits) == 0:
            return f"{value >> bits}{unit}"
    return str(value)


def percent(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def duration(seconds: float | None) -> str:
    """3.2 s, 4 min 05 s, 2 h 07 min, 3 d 4 h."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def plural(n: int, word: str, words: str = "") -> str:
    return f"{n:,} {word if n == 1 else words or word + 's'}"


# --- builders ---------------------------------------------------------------------------------------------


def icon(state: str) -> str:
    shape = f'<circle cx="8" cy="8" r="7"/>{_ICONS[state]}'
    return f'<svg class="icon {state}" viewBox="0 0 16 16" aria-hidden="true">{shape}</svg>'


def _code(html_text: str) -> str:
    """`x` in already safe text as code."""
    return re.sub(r"`([^`<>]+)`", r"<code>\1</code>", html_text)


def tile(*, state: str, claim: str, figure: str, detail: str) -> str:
    """One claim of the verdict row. The state is told by icon shape, word and colour."""
    unbroken = re.sub(r"[\d.]+e-\d+", r'<span class="nb">\g<0></span>', _code(text(detail)))
    return (
        f'<article class="tile {state}"><div class="tile-top">{icon(state)}<span class="state">'
        f"{STATES[state]}</span></div><h3>{text(claim)}</h3>"
        f'<div class="big">{text(figure)}</div><p>{unbroken}</p></article>'
    )


def swatch(name: str) -> str:
    return f'<i class="sw" style="background:{COLOURS.get(name, OTHER_COLOUR)}"></i>'


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    cells = "".join(f"<div><dt>{text(k)}</dt><dd>{text(v)}</dd></div>" for k, v in pairs)
    return f'<dl class="facts">{cells}</dl>'


def table(
    head: Sequence[str], rows_html: Iterable[Sequence[str]], *, left: Collection[int] = (0,), css: str = ""
) -> str:
    """`head` is text, cells are ready HTML. Columns in `left` are words, the others right-aligned numbers."""
    side = lambda i: ' class="l"' if i in left else ""  # noqa: E731
    top = "".join(f"<th{side(i)}>{text(h)}</th>" for i, h in enumerate(head)) if any(head) else ""
    body = "".join(
        "<tr>" + "".join(f"<td{side(i)}>{c}</td>" for i, c in enumerate(row)) + "</tr>" for row in rows_html
    )
    first = f"<thead><tr>{top}</tr></thead>" if top else ""
    return f'<div class="scroll"><table class="{css}">{first}<tbody>{body}</tbody></table></div>'


def figure(content_html: str, caption: str = "", *, title: str = "") -> str:
    head = f'<div class="fig-title">{text(title)}</div>' if title else ""
    foot = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    return f"<figure>{head}{content_html}{foot}</figure>"


def missing(what: str, how: str = "") -> str:
    """Said wherever an input is absent."""
    more = f" {_code(text(how))}" if how else ""
    return f'<p class="missing"><b>Not measured:</b> {text(what)}.{more}</p>'


def section(number_: int, slug: str, title: str, lede: str, body_html: str) -> str:
    intro = f'<p class="lede">{text(lede)}</p>' if lede else ""
    head = f'<h2><span class="no">{number_}</span>{text(title)}</h2>'
    return f'<section id="{slug}">{head}{intro}{body_html}</section>'


def details(summary: str, body_html: str, *, opened: bool = False) -> str:
    return f"<details{' open' if opened else ''}><summary>{text(summary)}</summary>{body_html}</details>"


# The policy is a second lock behind the escaping: nothing may load or run, whatever the data says.
_POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"


def page(
    *, title: str, nav: Iterable[tuple[str, str]], header_html: str, body_html: str, footer_html: str
) -> str:
    links = "".join(f'<a href="#{slug}">{text(name)}</a>' for slug, name in nav)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">'
        f"<title>{text(title)}</title>\n<style>{CSS}</style></head>\n<body><main>\n"
        f"<header>{header_html}<nav>{links}</nav></header>\n{body_html}\n<footer>{footer_html}</footer>\n"
        f"</main></body></html>\n"
    )


CSS = """
:root{color-scheme:light dark;--bg:#fcfcfb;--panel:#fff;--ink:#1b1f24;--soft:#565e68;--faint:#858d97;
--rule:#e2e4e7;
--band:#f1f3f5;--strip:#e6e9ed;--accent:#1c5d99;--good:#0b7a5c;--warn:#a35c00;--bad:#b3261e;--none:#6b737d;
--good-bg:#eef8f4;
--warn-bg:#fdf5e8;--bad-bg:#fcefee;--none-bg:#f3f4f6;--m-text:#0068a8;--m-image:#d1570a;--m-rgba:#0a8f6a;
--m-video:#b9568f;--m-audio:#bd8200;--m-score:#4c9fd6;--m-control:#6f7781;--m-other:#7a828c;
--p-data:#d1570a;--p-compute:#2f6ea5;
--p-optimizer:#7fb0d8;--p-checkpoint:#b9568f;--p-other:#c9ced4;--on-dark:#fff;--on-light:#1b1f24;
--pad:#d9dde2}
@media (prefers-color-scheme:dark){:root{--bg:#14171a;--panel:#1a1e23;--ink:#e7eaed;--soft:#a8b0ba;
--faint:#7d8691;
--rule:#2d333a;--band:#1e2329;--strip:#2a3037;--accent:#7db8ee;--good:#4fc9a0;--warn:#f0b45c;--bad:#ff8a80;
--none:#9aa3ad;
--good-bg:#15261f;--warn-bg:#2a2114;--bad-bg:#2e1a19;--none-bg:#1f2429;--m-text:#4a9fe0;--m-image:#f28a4b;
--m-rgba:#34c497;--m-video:#e58fc0;--m-audio:#efbf4d;--m-score:#a5d8fb;--m-control:#9aa3ad;
--m-other:#8b949e;--p-data:#f28a4b;
--p-compute:#5b9ed8;--p-optimizer:#2f5f8a;--p-checkpoint:#c878a6;--p-other:#47505a;--on-dark:#14171a;
--on-light:#e7eaed;--pad:#343b43}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--bg);color:var(--ink);
font:15.5px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1000px;margin:0 auto;padding:52px 32px 64px}
h1,h2,h3{line-height:1.25;margin:0;font-weight:650;letter-spacing:-.012em}
.kicker{color:var(--soft);font-size:13px;letter-spacing:.02em;margin:0 0 10px}
.kicker b{color:var(--ink);font-weight:650}
.verdict{font-size:22px;line-height:1.42;font-weight:600;letter-spacing:-.012em;margin:0 0 24px;
max-width:40em;
text-wrap:pretty}
.tiles{display:grid;grid-template-columns:repeat(4,1fr);gap:12px;margin:0 0 22px}
.tile{background:var(--panel);border:1px solid var(--rule);border-top:3px solid var(--c);border-radius:6px;
padding:13px 15px 14px;min-width:0}
.tile h3{font-size:14px;color:var(--soft);font-weight:550;letter-spacing:0;margin:9px 0 1px}
.tile .big{font-size:23px;font-weight:650;letter-spacing:-.02em;line-height:1.25}
.tile p{margin:5px 0 0;font-size:12.8px;line-height:1.45;color:var(--soft)}
.tile-top{display:flex;align-items:center;gap:7px}
.state{font-size:12.5px;font-weight:650;color:var(--c)}
.good{--c:var(--good);--cbg:var(--good-bg)}.warn{--c:var(--warn);--cbg:var(--warn-bg)}
.bad{--c:var(--bad);--cbg:var(--bad-bg)}.none{--c:var(--none);--cbg:var(--none-bg)}
.icon{width:17px;height:17px;flex:none;vertical-align:-3px}
.icon circle{fill:var(--cbg);stroke:var(--c);stroke-width:1.4}
.icon path{fill:none;stroke:var(--c);stroke-width:1.7;stroke-linecap:round;stroke-linejoin:round}
.facts{display:flex;flex-wrap:wrap;justify-content:space-between;gap:8px 26px;margin:0 0 22px;
border-top:1px solid var(--rule);border-bottom:1px solid var(--rule);padding:12px 0}
.facts dt{font-size:12px;color:var(--soft)}.facts dd{margin:0;font-size:15px;font-weight:600}
nav{display:flex;flex-wrap:wrap;gap:3px 16px;font-size:13px}
a{color:var(--accent);text-decoration:none}a:hover{text-decoration:underline}
a:focus-visible,summary:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
section{margin-top:56px}
h2{font-size:20px;display:flex;align-items:baseline;gap:11px}
h2 .no{color:var(--faint);font-weight:500;font-size:15px;min-width:1.1em}
h3.sub{font-size:15px;margin:26px 0 4px}
.lede{margin:7px 0 16px;max-width:46em;color:var(--soft);text-wrap:pretty}
figure{margin:18px 0 0;min-width:0}
figcaption{font-size:12.8px;line-height:1.5;color:var(--soft);margin-top:6px;max-width:62em}
.fig-title{font-size:13.5px;font-weight:600;margin-bottom:4px}
.fig-title small{font-weight:400;color:var(--soft);font-size:12.5px}
.cols{display:grid;grid-template-columns:1fr 1fr;gap:8px 32px}
.multi{display:grid;grid-template-columns:repeat(3,1fr);gap:20px 26px;margin-top:22px}
svg.chart{display:block;width:100%;height:auto;overflow:visible}
.chart text{font-size:11.5px;fill:var(--soft);font-family:inherit}
.chart .strong{fill:var(--ink);font-weight:600}.chart .big{font-size:12.5px}
.chart .on-dark{fill:var(--on-dark);font-weight:600}.chart .on-light{fill:var(--on-light);font-weight:600}
.chart .on-both{fill:#14171a;font-weight:600}.nb{white-space:nowrap}
.chart .grid{stroke:var(--rule);stroke-width:1}.chart .axis{stroke:var(--faint);stroke-width:1}
.chart .band{fill:var(--band)}.chart .strip{fill:var(--strip)}.chart .edge{stroke:var(--faint);
stroke-width:1;stroke-dasharray:1 3}
.chart .raw{fill:none;stroke:var(--c);stroke-width:1;opacity:.28}
.chart .line{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.chart .ref{stroke:var(--c);stroke-width:1.3;stroke-dasharray:5 4;fill:none}
.chart .lead{stroke:var(--c);stroke-width:1;opacity:.6;fill:none}
.chart .dot{fill:var(--c);stroke:var(--bg);stroke-width:1.4}
.chart .mark{stroke:var(--ink);stroke-width:1.1;stroke-dasharray:4 3;opacity:.75}
.chart .flag{fill:var(--bg);stroke:var(--ink);stroke-width:1.1}
.chart .glyph{fill:none;stroke:var(--ink);stroke-width:1.4;stroke-linecap:round;stroke-linejoin:round}
.chart .halo{paint-order:stroke;stroke:var(--bg);stroke-width:4px;stroke-linejoin:round}
code{font:.92em ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}
.chart .cell{stroke:var(--bg);stroke-width:1.5}
.chart .died{stroke:var(--bad);stroke-width:2.2;stroke-linecap:round;fill:none}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:12.8px;color:var(--soft);margin:2px 0 6px}
.sw{display:inline-block;width:10px;height:10px;border-radius:2.5px;margin-right:6px;vertical-align:-.5px}
.scroll{overflow-x:auto;margin-top:14px}
table{border-collapse:collapse;width:100%;font-size:13.6px}
th{font-weight:600;color:var(--soft);font-size:12.5px;text-align:right;padding:5px 0 5px 18px;
vertical-align:bottom;
border-bottom:1px solid var(--faint);white-space:nowrap}
td{text-align:right;padding:6px 0 6px 18px;border-bottom:1px solid var(--rule);vertical-align:top}
th.l,td.l{text-align:left}th:first-child,td:first-child{padding-left:0}
td{overflow-wrap:anywhere}table.narrow{width:auto;min-width:54%}td small{color:var(--soft)}
.missing{background:var(--none-bg);border-left:3px solid var(--none);border-radius:0 4px 4px 0;
padding:9px 14px;
margin:14px 0 0;font-size:14px;color:var(--soft)}.missing b{color:var(--ink);font-weight:600}
.note{font-size:13.5px;color:var(--soft);margin:12px 0 0}
.alert{border-left:3px solid var(--c);background:var(--cbg);padding:9px 14px;margin:14px 0 0;font-size:14px;
border-radius:0 4px 4px 0}
img{max-width:100%;height:auto;display:block;border-radius:3px}
img.px{image-rendering:pixelated}
.pics{columns:2;column-gap:32px;margin-top:16px}.pics>div{break-inside:avoid;margin:0 0 26px}
.pics img+img,.pics pre+pre{margin-top:8px}
.pics h3{font-size:14px;margin-bottom:8px}
.check{background:repeating-conic-gradient(#d7d9dc 0 25%,#f4f5f6 0 50%) 0 0/14px 14px}
audio{width:100%;height:36px;margin-top:6px}
.samples{columns:2;column-gap:20px;margin-top:16px}
.card{background:var(--panel);border:1px solid var(--rule);border-radius:6px;padding:13px 15px;min-width:0;
break-inside:avoid;margin:0 0 20px}
.card .who{font-size:12.5px;color:var(--soft);margin:0 0 7px}.card .who b{color:var(--ink)}
.prompt{color:var(--soft)}
pre,.body{font:12.8px/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace;margin:0;
white-space:pre-wrap;overflow-wrap:anywhere}
.body{max-height:26em;overflow:auto}
details{margin-top:14px;border:1px solid var(--rule);border-radius:6px;background:var(--panel)}
summary{cursor:pointer;padding:9px 14px;font-weight:600;font-size:14px}
details>pre{padding:4px 16px 16px;max-height:44em;overflow:auto}details>.scroll{margin:0;
padding:0 14px 12px}
.cell-ok{white-space:nowrap}
footer{margin-top:60px;padding-top:14px;border-top:1px solid var(--rule);font-size:12.8px;color:var(--soft)}
@media (max-width:860px){main{padding:32px 20px 48px}.tiles{grid-template-columns:1fr 1fr}.multi{
grid-template-columns:1fr 1fr}.verdict{font-size:19px}.cols{grid-template-columns:1fr}
.cols figure{max-width:500px}
.wide-chart{overflow-x:auto}.wide-chart svg{min-width:640px}.wide-chart text{font-size:14px}
.wide-chart text.big{font-size:15px}}
@media (max-width:520px){.tiles,.multi{grid-template-columns:1fr}.samples,.pics{columns:1}}
@media print{body{font-size:11pt}main{max-width:none;padding:0}section{break-inside:auto;margin-top:30px}
figure,.tile,.card,tr{break-inside:avoid}nav{display:none}details>pre{max-height:none}}
"""
