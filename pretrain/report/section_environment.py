"""Section "Environment and configuration": machine, versions, end, configuration, inputs."""

from __future__ import annotations

from typing import Any

from ringweave.pretrain.report.history import layout_name
from ringweave.pretrain.report.inputs import Inputs
from ringweave.pretrain.report.markup import details, missing, table
from ringweave.pretrain.report.safe_text import text
from ringweave.pretrain.report.values import flat, metric_words
from ringweave.pretrain.report.words import plural


def environment_section(inputs: Inputs) -> tuple[str, str]:
    h = inputs.history
    start: dict[str, Any] = next((a.start for a in reversed(h.attempts) if a.start), {})
    pairs = [(k, start.get(k)) for k in ("world", "config_hash") if start.get(k) is not None]
    pairs += [(k.replace("_", " "), v) for k, v in flat(start.get("host") or {}) if k]
    pairs += [("layout at start", layout_name(start.get("layout")))] if start.get("layout") else []
    versions = [(k, v) for k, v in flat(start.get("versions") or {}) if k]
    exit_rows = [(k, v) for k, v in flat(inputs.get("exit.json")) if k and v not in (None, "")]
    body = ""
    for title, rows in (("Machine", pairs), ("Versions", versions), ("End (exit.json)", exit_rows)):
        cells = [(metric_words(k), text(v)) for k, v in rows]
        body += (
            f"<div><h3 class='sub'>{title}</h3>"
            + (table(("", ""), cells, left=(0, 1), css="plain") if cells else missing(title.lower()))
            + "</div>"
        )
    body = f'<div class="cols">{body}</div>'
    if inputs.config:
        shown = inputs.config[:60_000] + (
            "\n… (cut at 60,000 characters)" if len(inputs.config) > 60_000 else ""
        )
        body += details(
            "Effective configuration (config.yaml, credentials redacted)", f"<pre>{text(shown)}</pre>"
        )
    else:
        body += missing("configuration", "config.yaml is absent.")
    notes = [(text(name), text(told)) for name, told in inputs.notes]
    notes += [(f"metrics.jsonl, line {n}", text(why)) for n, why in h.bad_lines[:50]]
    told = f"What this page was made from ({plural(len(h.bad_lines), 'bad line')} in metrics.jsonl)"
    return "", body + details(told, table(("File", "State"), notes, left=(0, 1)), opened=bool(h.bad_lines))
