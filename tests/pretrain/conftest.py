"""A small config of two stages as a file; an export to diffusers."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))  # for helpers that are no tests

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


# --- what the tests of diffusers folders share (test_export_dit, test_import_dit, test_layer_pipeline) ---


# Imported where they are used: most tests of this folder need no torch and no diffusers.


@pytest.fixture(scope="module")
def model() -> Any:
    """A small DiT with random weights."""
    from dit_exports import random

    return random()


@pytest.fixture(scope="module")
def codec() -> Any:
    """A small codec of latents with random weights."""
    from dit_exports import vae_codec

    return vae_codec()


@pytest.fixture(scope="module")
def layered(model: Any, codec: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a model whose documents have conditions."""
    from ringweave.pretrain.export_dit import write_diffusers

    out = tmp_path_factory.mktemp("layered") / "out"
    write_diffusers(model, out, preset="bil", codec=codec)
    return out


@pytest.fixture
def copy(layered: Path, tmp_path: Path) -> Path:
    """A copy of that export, to be damaged."""
    return Path(shutil.copytree(layered, tmp_path / "copy"))
