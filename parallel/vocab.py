"""The head's cross-entropy with the vocabulary sharded over tensor-parallel ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ringweave.kernels.cross_entropy import VocabShard, head_cross_entropy


class VocabParallelCrossEntropy:
    """`head_cross_entropy` for a head whose rows are split over `group` (Megatron-LM, Shoeybi et al. 2019).

    Each rank scores its own rows. One all-gather carries the LSE and the target's logit of all shards: one a
    call, or one a chunk where the forward makes gradients; one all-reduce in the backward adds the gradient of
    the hidden states. Hidden states, targets and `expected` must be the same on every rank of the group.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)

    def __call__(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk: int, expected: Tensor | None = None
    ) -> Tensor:
        """hidden [T, D], targets [T] global ids, expected [T] or None (see head_cross_entropy) -> nll [T].

        weight [V, D]: a DTensor sharded on rows, as evenly as DTensor does; or this rank's rows, which must
        then be as many on every rank.
        """
        if isinstance(weight, DTensor):
            local = weight.to_local()
            start = min(self.rank * -(-weight.shape[0] // self.ranks), weight.shape[0])
        else:
            local, start = weight, self.rank * weight.shape[0]
        shard = VocabShard(start, self._gather, self._add)
        return head_cross_entropy(hidden, local, targets, chunk=chunk, expected=expected, shard=shard)

    def _gather(self, x: Tensor) -> Tensor:
        out = x.new_empty(self.ranks, *x.shape)
        dist.all_gather(list(out.unbind(0)), x.contiguous(), group=self.group)
        return out

    def _add(self, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group)
        return total
