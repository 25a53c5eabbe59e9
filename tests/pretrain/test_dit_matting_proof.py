"""tests/prove/dit_matting.py, trimmed: the whole road of the proof on a few scenes, without what takes training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

PROOF = Path(__file__).parents[1] / "prove" / "dit_matting.py"


@pytest.mark.slow
def test_the_proof_of_mattes_goes_its_way_on_a_few_scenes(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(PROOF), "--tiny", "--keep", str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["proof"] == "dit_matting" and found["holds"]
    # The best threshold knows the answers, so it is between a perfect matte and one that is all wrong.
    assert 0 < found["baseline_sad"] < 4.1 and found["sad"] > 0
    assert found["share"] == pytest.approx(found["sad"] / found["baseline_sad"], rel=0.02)
    assert found["levels_where_the_loss_falls"].endswith(" of 8")
    assert found["drawings"] == 2 and 0 <= found["least_alpha"] <= found["most_alpha"] <= 1
    assert Image.open(tmp_path / "matting.png").height > 64
