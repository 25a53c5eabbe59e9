"""The words of a diffusion document: a small causal decoder of its own, trained along with the transformer.

The layers are those of `lwm.py`, over the words alone: latents take no part in it. With a head it also learns to tell
the next word, which is the LWM objective beside flow matching.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ringweave.kernels.rotary import rotary_table
from ringweave.parallel.packed import PackedAttention
from ringweave.pretrain.models.lwm import Attention, Layer, LayerContext, LossHead, LWMShape

ROPE_THETA = 1e4


class Words(nn.Module):
    """Ids of words -> one vector a word, and each word's loss where there is a head."""

    def __init__(self, shape: LWMShape, *, head: bool) -> None:
        super().__init__()
        self.shape = shape
        self.attention: Attention = PackedAttention()
        self.embed = nn.Embedding(shape.vocab, shape.width)
        self.layers = nn.ModuleDict({str(i): Layer(shape) for i in range(shape.layers)})
        self.norm = nn.RMSNorm(shape.width, eps=shape.norm_eps)
        self.head = LossHead(shape) if head else None

    def forward(
        self,
        ids: Tensor,
        *,
        order: Tensor,
        documents: Tensor,
        owner: Tensor | None,
        targets: Tensor | None = None,
        expected: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """ids, order, targets, expected [n] of this rank's words; documents, owner [1, N] of all words of the ring.

        Gives hidden states [n, width] and losses [n] in nats (None without a head or targets).
        """
        plan = self.attention.plan(documents, owner, None, None)
        dtype = next(self.parameters()).dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        cos, sin = rotary_table(order, dim=self.shape.head_dim, theta=ROPE_THETA, dtype=wide)
        h = self.embed(ids[None])
        for layer in self.layers.values():
            h = layer(h, LayerContext(cos, sin, partial(self.attention, plan=plan)))
        h = self.norm(h)
        if self.head is None or targets is None:
            return h[0], None
        nll = self.head(h, targets[None], None if expected is None else expected[None])
        return h[0], nll[0]
