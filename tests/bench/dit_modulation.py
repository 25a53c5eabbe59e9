"""Modulation of the diffusion transformer computed once a segment and looked up, against once a token.

The rival is the same block with the same weights whose modulation takes the noise vector of every token, as models do
that carry a level a token; shifts, scales and gates are not looked up there. One forward and backward of one pack
of documents of 64 to 2,048 tokens, on one thread; memory in a fresh process. Losses and gradients of both are the same.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
import _dit as dit
import _harness as bench

from ringweave.kernels.modulation import Runs
from ringweave.pretrain.engine import TorchEngine
from ringweave.pretrain.models.dit_blocks import EPS, BlockContext, DoubleBlock

CLAIM = "modulation of a DiT once a segment takes at least a tenth less time and memory than once a token"


def per_token(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without weights, then the token's own scale and shift."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


def rows_of(runs: Runs) -> Tensor:
    """The row of every token [n]."""
    return torch.cat([torch.full((stop - start,), row) for start, stop, row in runs])


class PerToken(DoubleBlock):
    """The rival: `DoubleBlock` with modulation from each token's own noise vector."""

    def forward(self, text: Tensor, image: Tensor, level: Tensor, ctx: BlockContext) -> tuple[Tensor, Tensor]:
        """As `DoubleBlock.forward`."""
        streams = ctx.streams
        img = self.img_mod["1"](level[rows_of(streams.image_runs)]).chunk(6, dim=-1)
        txt = self.txt_mod["1"](level[rows_of(streams.text_runs)]).chunk(6, dim=-1)
        words, latents = self.attn(per_token(text, txt[0], txt[1]), per_token(image, img[0], img[1]), ctx)
        text, image = text + txt[2] * words, image + img[2] * latents
        words = self.txt_mlp(per_token(text, txt[3], txt[4]))
        latents = self.img_mlp(per_token(image, img[3], img[4]))
        return text + txt[5] * words, image + img[5] * latents


def make_model(size: dit.Size, form: type[nn.Module]) -> nn.Module:
    """Ours with blocks of this form and the same parameters."""
    model = dit.our_model(size)
    for name, block in list(model.transformer_blocks.items()):
        other = form(size.shape().width, size.shape().head_dim, size.shape().mlp)
        other.load_state_dict(block.state_dict(), strict=True)
        model.transformer_blocks[name] = other
    return model


def prepare(size: dit.Size, token: bool) -> Callable[[], Tensor]:
    """Forward and backward of one pack; the step gives the summed loss and leaves gradients where they stood."""
    model = make_model(size, PerToken if token else DoubleBlock)
    batch = dit.make_batch(dit.make_steps(size, 1)[0][:1], size)
    engine = TorchEngine(model, None, micro_batch=1)  # type: ignore[arg-type]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)  # made once in a run, so not part of what a step takes

    def step() -> Tensor:
        return engine.forward_backward(batch)[0]

    return step


def check(size: dit.Size) -> None:
    """Both forms give the same loss and gradients."""
    found = []
    for form in (DoubleBlock, PerToken):
        model = make_model(size, form)
        batch = dit.make_batch(dit.make_steps(size, 1)[0][:1], size)
        sums, _ = TorchEngine(model, None, micro_batch=1).forward_backward(batch)  # type: ignore[arg-type]
        found.append((sums, {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=0.0)
    for name, grad in found[0][1].items():
        if grad is None:  # of what comes after the last attention, on the side of the words
            assert found[1][1][name] is None
            continue
        top = float(grad.abs().max())
        torch.testing.assert_close(found[1][1][name], grad, rtol=0.0, atol=2e-5 * top, msg=name)


def main() -> None:
    """Print the claim's line."""
    options = bench.arguments(__doc__)
    # glibc keeps freed blocks of up to 32 MiB for reuse; given back at once, what is resident is what is in use.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(64 * 1024)
    bench.one_thread()
    size = dit.TINY if options.tiny else dit.Size()
    check(dit.TINY)
    peaks = [lambda token=token: bench.peak_memory(prepare, size, token) for token in (False, True)]
    ours, rival = bench.paired(peaks, runs=min(options.runs, 3), warm_up=0)
    fast, slow = bench.paired([prepare(size, False), prepare(size, True)], runs=options.runs)
    bench.emit(
        CLAIM,
        bench.Part("time", fast, slow, "s", 0.9, "lower"),
        bench.Part("peak memory", ours, rival, "MiB", 0.9, "lower"),
        sizes=asdict(size), parameters=size.shape().parameters,
    )  # fmt: skip


if __name__ == "__main__":
    main()
