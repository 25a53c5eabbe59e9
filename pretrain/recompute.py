"""Activation checkpointing: what a layer keeps for its backward, and what it computes again.

none keeps everything. selective computes the feed-forward half again (norm, gate, up and their product) and keeps
attention. full keeps a layer's input, and of its inside only what cost communication or a ring pass: attention
outputs with their LSE, and what collectives gave. So neither replays a collective, and gradients are bit-equal to
those of none. Built on torch's selective checkpoint contexts (Chen et al. 2016 for the idea).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ringweave.pretrain.models.dit import DiT
from ringweave.pretrain.models.lwm import LWM

#: Op namespaces whose results are kept: our attention and collectives, torch's collectives.
KEPT = ("ringweave", "c10d", "_c10d_functional")


def recompute_activations(model: LWM | DiT, how: str) -> None:
    """Make every layer of `model` keep less: how is "none", "selective" or "full". Raises ValueError for others.

    Applied before FSDP2 wraps the layers, whose hooks then stay outside of what is computed again.
    """
    if how not in ("none", "selective", "full"):
        raise ValueError(f"recompute is none, selective or full, got {how!r}")
    if how == "none":
        return
    part = "forward" if how == "full" else "feed_forward"
    for layer in model.recomputable():
        setattr(layer, part, _again(getattr(layer, part)))


def _again(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` that keeps its inputs and what `_policy` says. No random numbers are drawn in a layer."""
    return partial(
        checkpoint,
        forward,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=partial(create_selective_checkpoint_contexts, _policy),
    )


def _policy(ctx: Any, op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    # Waiting for a collective that is kept costs nothing.
    kept = op.namespace in KEPT and op is not torch.ops._c10d_functional.wait_tensor.default
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
