"""Small HTML builders and the page shell.

Everything that comes from data passes through `safe_text.text`. Builders take ready HTML in parameters named
`*_html` and plain text everywhere else.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

from ringweave.pretrain.report.safe_text import text
from ringweave.pretrain.report.style import COLOURS, CSS, OTHER_COLOUR

STATES: dict[str, str] = {"good": "holds", "warn": "partly", "bad": "fails", "none": "not measured"}

_ICONS = {
    "good": '<path d="M4.5 8.4l2.4 2.4 4.6-5.2"/>',
    "warn": '<path d="M8 4.4v4.4M8 11.1v.5"/>',
    "bad": '<path d="M5.3 5.3l5.4 5.4M10.7 5.3l-5.4 5.4"/>',
    "none": '<path d="M5 8h6"/>',
}

# The policy is a second lock behind the escaping: nothing may load or run, whatever the data says.
_POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"


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
