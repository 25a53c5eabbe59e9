"""`AutoencoderKLQwenImage` for single pictures, in two dimensions: what training runs.

A frame alone is preceded by zeros in time, so the stock class multiplies two thirds of each kernel with nothing. Here
are the same blocks without time: 2D kernels stand for the last slice of the stock ones, and names are the same, so
`to_stock` and `from_stock` only move numbers. Convolutions in time have no say on a picture and are zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ringweave.tokenizers.codec import Tensors
from ringweave.tokenizers.latent_codec import vae_shapes

#: Bounds the class puts on the logarithm of a posterior's variance.
LOGVAR = (-30.0, 20.0)
#: Shortest vector that is normalised to full length.
EPS = 1e-12


class _Norm(nn.Module):
    """To length sqrt(C) over the channels of x [B, C, h, w], then a scale of each."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        # Bounded before the root: its gradient at nothing would be infinite.
        inverse = x.square().sum(1, keepdim=True).clamp_min(EPS**2).rsqrt()
        return x * (inverse * len(self.gamma) ** 0.5) * self.gamma


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = _Norm(inputs), _Norm(outputs)
        self.conv1, self.conv2 = _conv(inputs, outputs), _conv(outputs, outputs)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv1(F.silu(self.norm1(x)))
        return self.conv2(F.silu(self.norm2(inner))) + self.conv_shortcut(x)


class _Attention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = _Norm(dim)
        self.to_qkv, self.proj = nn.Conv2d(dim, 3 * dim, 1), nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        cells = self.to_qkv(self.norm(x)).flatten(2).transpose(1, 2)[:, None]  # [B, 1, h*w, 3C]
        q, k, v = cells.chunk(3, -1)
        seen = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.proj(seen)


class _Middle(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([_Residual(dim, dim), _Residual(dim, dim)])
        self.attentions = nn.ModuleList([_Attention(dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class _Resample(nn.Module):
    """Half or twice as many rows and columns; twice as many have half the channels."""

    def __init__(self, dim: int, *, up: bool) -> None:
        super().__init__()
        self.resample = (
            nn.Sequential(nn.Upsample(scale_factor=2.0, mode="nearest-exact"), _conv(dim, dim // 2))
            if up
            else nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.resample(x)


class _Encoder(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        dim = config["base_dim"]
        self.conv_in = _conv(config["input_channels"], dim)
        blocks: list[nn.Module] = []
        for stage, many in enumerate(config["dim_mult"]):
            for _ in range(config["num_res_blocks"]):
                blocks.append(_Residual(dim, config["base_dim"] * many))
                dim = config["base_dim"] * many
            if stage < len(config["dim_mult"]) - 1:
                blocks.append(_Resample(dim, up=False))
        self.down_blocks = nn.ModuleList(blocks)
        self.mid_block = _Middle(dim)
        self.norm_out, self.conv_out = _Norm(dim), _conv(dim, 2 * config["z_dim"])

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(self.mid_block(x))))


class _Up(nn.Module):
    def __init__(self, inputs: int, dim: int, count: int, *, last: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([_Residual(inputs if n == 0 else dim, dim) for n in range(count)])
        self.upsamplers = nn.ModuleList([] if last else [_Resample(dim, up=True)])

    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.resnets, *self.upsamplers):
            x = block(x)
        return x


class _Decoder(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        widths = [config["base_dim"] * many for many in reversed(config["dim_mult"])]
        self.conv_in, self.mid_block = _conv(config["z_dim"], widths[0]), _Middle(widths[0])
        inputs, count = [widths[0], *(width // 2 for width in widths)], config["num_res_blocks"] + 1
        last = len(widths) - 1
        self.up_blocks = nn.ModuleList(
            [_Up(inputs[n], dim, count, last=n == last) for n, dim in enumerate(widths)]
        )
        self.norm_out, self.conv_out = _Norm(widths[-1]), _conv(widths[-1], config["input_channels"])

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class PictureVae(nn.Module):
    """config: arguments of the stock class (`LatentCodec`). Weights are drawn from `seed`."""

    def __init__(self, config: Mapping[str, Any], *, seed: int = 0) -> None:
        super().__init__()
        self.config = dict(config)
        z = config["z_dim"]
        self.encoder, self.decoder = _Encoder(config), _Decoder(config)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * z, 2 * z, 1), nn.Conv2d(z, z, 1)
        self._draw(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def _draw(self, generator: torch.Generator) -> None:
        """Uniform weights of variance 1 / inputs, no bias; what residual blocks and attention add begins at nothing."""
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
            elif parameter.ndim == 4:
                bound = math.sqrt(3 / parameter[0].numel())
                nothing = name.endswith((".conv2.weight", ".proj.weight"))
                parameter.uniform_(-bound, bound, generator=generator).mul_(0.0 if nothing else 1.0)
        # Posteriors begin narrow: at a deviation of 1 the first steps would only see noise.
        z = self.config["z_dim"]
        self.quant_conv.weight[z:] = 0
        self.quant_conv.bias[z:] = -6

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the posterior, [B, Z, h, w], of pictures [B, 4, H, W] in [-1, 1]."""
        mean, logvar = self.quant_conv(self.encoder(pixels)).chunk(2, 1)
        return mean, logvar.clamp(*LOGVAR)

    def decode(self, z: Tensor) -> Tensor:
        """[B, 4, H, W], not yet clipped to [-1, 1] as the class does at the end."""
        return self.decoder(self.post_quant_conv(z))

    def to_stock(self) -> Tensors:
        """Weights of the stock class, float32."""
        mine = {name: value.detach().numpy() for name, value in self.state_dict().items()}
        out: Tensors = {}
        for name, shape in vae_shapes(self.config).items():
            out[name] = np.zeros(shape, np.float32)
            if name not in mine:  # in time
                continue
            if len(shape) == 5:
                out[name][:, :, -1] = mine[name]
            else:
                out[name][:] = mine[name].reshape(shape)
        return out

    def from_stock(self, tensors: Mapping[str, Any]) -> PictureVae:
        """Take over the weights of the stock class, as far as they have a say on a picture. Returns itself."""
        mine = {}
        for name, value in self.state_dict().items():
            given = torch.as_tensor(tensors[name])
            mine[name] = (given[:, :, -1] if given.ndim == 5 else given).reshape(value.shape).clone()
        self.load_state_dict(mine)
        return self


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)
