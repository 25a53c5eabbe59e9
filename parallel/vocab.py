"""The head's cross-entropy with the vocabulary sharded over tensor-parallel ranks."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ringweave.kernels.cross_entropy import head_cross_entropy


class VocabParallelCrossEntropy:
    """`head_cross_entropy` for a head whose rows are split evenly over `group` (Megatron-LM, Shoeybi et al. 2019).

    Each rank scores its own rows; the maximum, the sum of exponentials and the target's logit are reduced,
    and so is the gradient of the hidden states.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)

    def __call__(self, hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk: int) -> Tensor:
        """hidden [T, D], weight: DTensor [V, D] sharded on rows, targets [T] global ids -> nll [T]."""
        local = weight.to_local() if isinstance(weight, DTensor) else weight
        return head_cross_entropy(
            hidden,
            local,
            targets,
            chunk=chunk,
            vocab_start=self.rank * local.shape[0],
            reduce_max=lambda x: self._reduce(x, dist.ReduceOp.MAX),
            reduce_sum=lambda x: self._reduce(x, dist.ReduceOp.SUM),
        )

    def _reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        x = x.contiguous()
        dist.all_reduce(x, op=op, group=self.group)
        return x
