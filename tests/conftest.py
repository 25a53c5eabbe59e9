"""Without a CUDA device, Triton kernels are tested in Triton's interpreter.

Triton decides that where a kernel is decorated, so it has to be said before anything imports Triton.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
