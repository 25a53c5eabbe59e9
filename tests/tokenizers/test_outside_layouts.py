"""VQGAN weights in taming's, LlamaGen's and LWM's names, against the architecture written out again here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizer_samples import picture

from ringweave.tokenizers.errors import VocabularyError
from ringweave.tokenizers.outside_image import OutsideImage

pytest.importorskip("diffusers")

GROUPS = 4
WIDTH, MULT, LAYERS, LATENT, DIM, CODES = 8, (1, 2, 2), 1, 6, 4, 64
PATCH = 4


def pictures(count: int) -> np.ndarray[Any, Any]:
    return np.stack([picture(seed) for seed in range(count)])


def as_input(images: np.ndarray[Any, Any]) -> torch.Tensor:
    """float32 [N, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images).float().movedim(-1, 1) / 127.5 - 1


RES = {
    "taming": ("norm1", "conv1", "norm2", "conv2", "nin_shortcut"),
    "llamagen": ("norm1", "conv1", "norm2", "conv2", "nin_shortcut"),
    "lwm": ("GroupNorm_0", "Conv_0", "GroupNorm_1", "Conv_1", "Conv_2"),
}
ATTN = {
    "taming": ("norm", "q", "k", "v", "proj_out"),
    "llamagen": ("norm", "q", "k", "v", "proj_out"),
    "lwm": ("GroupNorm_0", "Conv_0", "Conv_1", "Conv_2", "Conv_3"),
}


class Plain:
    """A VQGAN whose weights live only in a foreign state dict; it grows the random dict as it first runs."""

    def __init__(self, layout: str, *, attention: bool) -> None:
        self.layout, self.attention = layout, attention
        self.state: dict[str, torch.Tensor] = {}
        self.random = torch.Generator().manual_seed(1)

    def _get(self, name: str, leaf: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor in torch's own order of axes."""
        flax = self.layout == "lwm"
        if flax:
            name = name.replace(".", "/")
            leaf = {"weight": "scale" if len(shape) == 1 else "kernel", "bias": "bias"}[leaf]
        key = name + ("/" if flax else ".") + leaf
        if key not in self.state:
            fan = int(np.prod(shape[1:])) if len(shape) > 1 else 1
            value = torch.randn(shape, generator=self.random) / fan**0.5 * (0.3 if len(shape) == 1 else 1.0)
            self.state[key] = (value.permute(2, 3, 1, 0) if flax and len(shape) == 4 else value).contiguous()
        value = self.state[key]
        return value.permute(3, 2, 0, 1) if flax and len(shape) == 4 else value

    def _conv(self, x: torch.Tensor, name: str, out: int, size: int = 3, stride: int = 1) -> torch.Tensor:
        weight = self._get(name, "weight", (out, x.shape[1], size, size))
        padding = size // 2 if stride == 1 else 0
        return F.conv2d(x, weight, self._get(name, "bias", (out,)), stride, padding)

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        grouped = x.reshape(1, GROUPS, -1)
        normal = (grouped - grouped.mean(-1, keepdim=True)) / (
            grouped.var(-1, False, keepdim=True) + 1e-6
        ).sqrt()
        scale, shift = (self._get(name, leaf, (x.shape[1],)) for leaf in ("weight", "bias"))
        return normal.reshape(x.shape) * scale[:, None, None] + shift[:, None, None]

    def _res(self, x: torch.Tensor, name: str, out: int) -> torch.Tensor:
        norm1, conv1, norm2, conv2, short = (f"{name}.{part}" for part in RES[self.layout])
        h = self._conv(F.silu(self._norm(x, norm1)), conv1, out)
        h = self._conv(F.silu(self._norm(h, norm2)), conv2, out)
        return h + (x if x.shape[1] == out else self._conv(x, short, out, 1))

    def _attend(self, x: torch.Tensor, name: str) -> torch.Tensor:
        norm, *three, last = (f"{name}.{part}" for part in ATTN[self.layout])
        h, channels = self._norm(x, norm), x.shape[1]
        q, k, v = (self._conv(h, part, channels, 1).reshape(channels, -1) for part in three)
        mixed = v @ torch.softmax(q.T @ k / channels**0.5, -1).T
        return x + self._conv(mixed.reshape(x.shape), last, channels, 1)

    def _level(self, side: str, level: int, what: str, index: int) -> str:
        order = level if side == "encoder" else len(MULT) - 1 - level
        if self.layout == "taming":
            names = {
                "res": f"block.{index}",
                "attn": f"attn.{index}",
                "down": "downsample.conv",
                "up": "upsample.conv",
            }
            return f"{side}.{'down' if side == 'encoder' else 'up'}.{level}.{names[what]}"
        if self.layout == "llamagen":
            names = {
                "res": f"res.{index}",
                "attn": f"attn.{index}",
                "down": "downsample.conv",
                "up": "upsample.conv",
            }
            return f"{side}.conv_blocks.{order}.{names[what]}"
        names = {"res": f"ResnetBlock_{index}", "attn": f"AttnBlock_{index}", "down": "Downsample_0.Conv_0",
                 "up": "Upsample_0.Conv_0"}  # fmt: skip
        return f"{side}.{'Down' if side == 'encoder' else 'Up'}samplingBlock_{order}.{names[what]}"

    def _middle(self, x: torch.Tensor, side: str) -> torch.Tensor:
        first, attn, second = {
            "taming": ("mid.block_1", "mid.attn_1", "mid.block_2"),
            "llamagen": ("mid.0", "mid.1", "mid.2"),
            "lwm": ("MidBlock_0.ResnetBlock_0", "MidBlock_0.AttnBlock_0", "MidBlock_0.ResnetBlock_1"),
        }[self.layout]
        x = self._res(x, f"{side}.{first}", x.shape[1])
        if self.attention:
            x = self._attend(x, f"{side}.{attn}")
        return self._res(x, f"{side}.{second}", x.shape[1])

    def _end(self, side: str) -> tuple[str, str, str]:
        names = (
            ("Conv_0", "GroupNorm_0", "Conv_1")
            if self.layout == "lwm"
            else ("conv_in", "norm_out", "conv_out")
        )
        first, norm, last = (f"{side}.{name}" for name in names)
        return first, norm, last

    def _stack(self, x: torch.Tensor, side: str, level: int, count: int) -> torch.Tensor:
        for index in range(count):
            x = self._res(x, self._level(side, level, "res", index), WIDTH * MULT[level])
            if self.attention and level == len(MULT) - 1:
                x = self._attend(x, self._level(side, level, "attn", index))
        return x

    def latents(self, x: torch.Tensor) -> torch.Tensor:
        """[1, 3, H, W] -> [1, D, h, w]."""
        first, norm, last = self._end("encoder")
        x = self._conv(x, first, WIDTH)
        for level in range(len(MULT)):
            x = self._stack(x, "encoder", level, LAYERS)
            if level < len(MULT) - 1:
                x = self._conv(
                    F.pad(x, (0, 1, 0, 1)), self._level("encoder", level, "down", 0), x.shape[1], 3, 2
                )
        x = self._conv(F.silu(self._norm(self._middle(x, "encoder"), norm)), last, LATENT)
        return self._conv(x, "quant_conv", DIM, 1)

    def decoded(self, points: torch.Tensor) -> torch.Tensor:
        """[1, D, h, w] -> [1, 3, H, W]."""
        first, norm, last = self._end("decoder")
        x = self._conv(self._conv(points, "post_quant_conv", LATENT, 1), first, WIDTH * MULT[-1])
        x = self._middle(x, "decoder")
        for level in reversed(range(len(MULT))):
            x = self._stack(x, "decoder", level, LAYERS + 1)
            if level:
                x = self._conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3),
                               self._level("decoder", level, "up", 0), x.shape[1])  # fmt: skip
        return self._conv(F.silu(self._norm(x, norm)), last, 3)


CONFIGS: dict[str, dict[str, Any]] = {
    "taming": {
        "norm_num_groups": GROUPS,
        "params": {"n_embed": CODES, "embed_dim": DIM,
                   "ddconfig": {"ch": WIDTH, "ch_mult": list(MULT), "num_res_blocks": LAYERS, "z_channels": LATENT}},
    },
    "llamagen": {"norm_num_groups": GROUPS, "codebook_size": CODES, "codebook_embed_dim": DIM, "z_channels": LATENT},
    "lwm": {"norm_num_groups": GROUPS, "hidden_channels": WIDTH, "channel_mult": list(MULT), "num_embeddings": CODES},
}  # fmt: skip


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Plain, torch.Tensor, Path]]:
    """(architecture, codebook, folder) of a layout, written in that layout's names."""
    made: dict[str, tuple[Plain, torch.Tensor, Path]] = {}

    def make(layout: str) -> tuple[Plain, torch.Tensor, Path]:
        if layout not in made:
            plain = Plain(layout, attention=layout != "lwm")
            points = torch.cat([plain.latents(as_input(pictures(4))[k : k + 1]) for k in range(4)])
            points = points.movedim(1, -1).reshape(-1, DIM)
            book = points[torch.randperm(len(points), generator=plain.random)[:CODES]] * 1.2
            plain.decoded(points[:4].T.reshape(1, DIM, 2, 2))
            state = dict(plain.state)
            if layout == "lwm":
                state = {f"params/{name}": tensor for name, tensor in state.items()}
                state["params/quantize/embeddings"] = book
            else:
                state["quantize.embedding.weight"] = book
            if layout == "llamagen":
                state["quantize.codebook_used"] = torch.zeros(16)
            if layout == "taming":
                state["loss.discriminator.main.0.weight"] = torch.zeros(2, 2)
            folder = tmp_path_factory.mktemp(layout)
            save_file(state, folder / "model.safetensors")
            (folder / "config.json").write_text(json.dumps(CONFIGS[layout]))
            made[layout] = (plain, book, folder)
        return made[layout]

    return make


@pytest.mark.parametrize("layout", list(CONFIGS))
def test_foreign_layouts_give_their_own_ids(foreign: Callable[..., Any], layout: str) -> None:
    plain, book, folder = foreign(layout)
    codec = OutsideImage.load(folder)
    assert (codec.kind, codec.codes, codec.patch) == (f"image.{layout}", CODES, PATCH)
    images = pictures(6)
    ids = codec.encode(images)
    assert len(np.unique(ids)) > CODES // 3
    exact = book.double()
    for image, found in zip(images, ids):
        latents = plain.latents(as_input(image[None]))
        points = latents[0].movedim(0, -1).reshape(-1, DIM).double()
        if layout == "llamagen":  # nearest on the unit sphere is the largest cosine
            wanted = (F.normalize(points, dim=-1) @ F.normalize(exact, dim=-1).T).argmax(1)
        else:
            wanted = ((points[:, None] - exact) ** 2).sum(-1).argmin(1)
        assert np.array_equal(found.reshape(-1), wanted.numpy())
    codes = F.normalize(book, dim=-1) if layout == "llamagen" else book
    pixels = (
        plain.decoded(codes[torch.from_numpy(ids[0]).long()].movedim(-1, 0)[None])[0].movedim(0, -1) + 1
    ) * 127.5
    assert np.abs(codec.decode(ids[0]) - pixels.clamp(0, 255).numpy()).max() <= 0.51


def test_flax_names_may_be_joined_by_dots(foreign: Callable[..., Any], tmp_path: Path) -> None:
    _, _, folder = foreign("lwm")
    state = load_file(folder / "model.safetensors")
    dotted = {name.removeprefix("params/").replace("/", "."): tensor for name, tensor in state.items()}
    save_file(dotted, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["lwm"]))
    image = picture(9)
    assert np.array_equal(OutsideImage.load(tmp_path).encode(image), OutsideImage.load(folder).encode(image))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"codebook_size": 128}, "codebook_size is 128 in the config and 64"),
        ({"encoder_ch_mult": [1, 2, 4]}, "encoder_ch_mult"),
        ({"codebook_size": CODES}, ""),
    ],
)
def test_a_config_that_disputes_the_tensors_is_refused(
    foreign: Callable[..., Any], tmp_path: Path, change: dict[str, Any], match: str
) -> None:
    _, _, folder = foreign("llamagen")
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llamagen"] | change))
    if match:
        with pytest.raises(VocabularyError, match=match):
            OutsideImage.load(tmp_path)
    else:
        assert OutsideImage.load(tmp_path / "model.safetensors").codes == CODES


@pytest.mark.parametrize("layout", list(CONFIGS))
def test_foreign_tensors_that_do_not_fit_are_named(
    foreign: Callable[..., Any], tmp_path: Path, layout: str
) -> None:
    _, _, folder = foreign(layout)
    state = load_file(folder / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[layout]))
    bias = {"taming": "decoder.up.1.block.0.conv2.bias", "llamagen": "decoder.conv_blocks.1.res.0.conv2.bias",
            "lwm": "params/decoder/UpsamplingBlock_1/ResnetBlock_0/Conv_1/bias"}[layout]  # fmt: skip
    for changed, match in (
        ({k: v for k, v in state.items() if k != bias}, "missing: decoder.up_blocks.1.resnets.0.conv2.bias"),
        (state | {"junk.weight": torch.zeros(1)}, "not expected: junk.weight"),
        (
            state | {bias: torch.zeros(3)},
            r"other shape: decoder.up_blocks.1.resnets.0.conv2.bias is \[3\], not \[16\]",
        ),
        (state | {"quantize.proj.weight": torch.zeros(1)}, "Gumbel"),
        ({"some.other.net": torch.zeros(1)}, "no known image codec"),
    ):
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(VocabularyError, match=match):
            OutsideImage.load(tmp_path)
