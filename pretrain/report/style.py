"""How the report looks: colours of modalities and the CSS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

#: Modality -> CSS variable. Okabe-Ito hues, darkened for white paper and lightened for the dark page.
COLOURS: dict[str, str] = {
    m: f"var(--m-{m})" for m in ("text", "image", "rgba", "video", "audio", "score", "control")
}
OTHER_COLOUR = "var(--m-other)"


def ordered(names: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """Modalities in their fixed order, unknown ones after."""
    return [m for m in COLOURS if m in names] + sorted(n for n in names if n not in COLOURS)


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
.cols{display:grid;grid-template-columns:1fr 1fr;gap:8px 32px}.cols>*{min-width:0}
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
