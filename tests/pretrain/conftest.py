"""A small config of two stages, as a file."""

from __future__ import annotations

from pathlib import Path

import pytest

BASE = """\
run: {name: base, dir: runs/base}
tokenizers: {dir: runs/base/tokenizers}
data:
  dir: data
  sources:
    - {name: text, shards: "text-{0000..0003}.tar", plan: [text], weight: 2}
    - {name: image, shards: "image-0000.tar", plan: ["caption?", image]}
model: {layers: 4, width: 64, heads: 4, kv_heads: 2}
optimizer: {lr: 3e-4, warmup: 2}
stages:
  - {context: 1K, tokens: 100K, batch: 8, micro_batch: 2, layout: {dp: 2, tp: 2}}
  - context: 4K
    tokens: 1M
    batch: 8
    layout: {pp: 2, sp: 2}
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(BASE)
    return path
