"""What the proofs of the learned codecs share: training by one core's seconds, law 4, and flipped weights."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ringweave.tokenizers.errors import VocabularyError
from ringweave.tokenizers.learn import Schedule, Training
from ringweave.tokenizers.learn_start import Start
from ringweave.tokenizers.set import TokenizerSet

#: Seconds of one core that a training may take, its closed form included.
SECONDS = 600
#: Encodes an array with a stored set in a process of its own; prints the digest of the ids.
_ALONE = """
import sys, hashlib, numpy as np
from ringweave.tokenizers.set import TokenizerSet
codec = TokenizerSet.load(sys.argv[1]).codecs[sys.argv[2]]
found = hashlib.sha256()
for name, value in np.load(sys.argv[3]).items():
    found.update(codec.encode(value).tobytes())
print(found.hexdigest())
"""


def learned(make: Callable[[], Start], *, steps: int, batch: int = 24) -> tuple[Any, Any, int]:
    """The codec of the closed form, the trained one, and the seconds of one core that both took."""
    import torch

    torch.set_num_threads(1)
    began = time.process_time()
    start = make()
    schedule = Schedule(steps=steps, batch=batch)
    schedule = replace(schedule, commit=start.commit, decoder_only=start.decoder_only)
    training = Training(start.config, start.tensors, start.crops, schedule)
    training.run()
    return start.codec(start.tensors), start.codec(training.tensors()), round(time.process_time() - began)


def ids_by_batch(codec: Any, stack: np.ndarray) -> int:
    """Ids of equal records [n, ...] that differ in batches of 1, 3 and 8 from the whole stack."""
    whole = codec.encode(stack)
    differ = 0
    for size in (1, 3, 8):
        parts = [codec.encode(stack[k : k + size]) for k in range(0, len(stack), size)]
        differ += int((np.concatenate(parts) != whole).sum())
    return differ


def threads_differ(codec: Any, name: str, records: list[np.ndarray]) -> bool:
    """Whether a process with one thread and one with two give other ids."""
    with tempfile.TemporaryDirectory() as folder:
        TokenizerSet({name: codec}).save(Path(folder) / "set")
        np.savez(Path(folder) / "records.npz", *records)
        command = [sys.executable, "-c", _ALONE, f"{folder}/set", name, f"{folder}/records.npz"]
        digests = [
            subprocess.run(
                command,
                env=os.environ | {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads},
                capture_output=True, text=True, check=True,
            ).stdout.strip()
            for threads in ("1", "2")
        ]  # fmt: skip
    here = hashlib.sha256()
    for value in records:
        here.update(codec.encode(value).tobytes())
    return {here.hexdigest()} != set(digests)


def flips_that_pass(codec: Any, name: str, *, flips: int) -> int:
    """Of single flipped bits anywhere in the weights, those with which the set loads, or fails without the name."""
    rng, passed = np.random.default_rng(11), 0
    with tempfile.TemporaryDirectory() as folder:
        TokenizerSet({name: codec}).save(Path(folder))
        path = Path(folder) / f"{name}.safetensors"
        whole = path.read_bytes()
        weights = 8 + int.from_bytes(whole[:8], "little")
        for at in rng.integers(weights, len(whole), flips):
            broken = bytearray(whole)
            broken[at] ^= 1 << int(rng.integers(0, 8))
            path.write_bytes(broken)
            try:
                TokenizerSet.load(Path(folder))
                passed += 1
            except VocabularyError as error:
                passed += f"the {name} codec" not in str(error)
    return passed
