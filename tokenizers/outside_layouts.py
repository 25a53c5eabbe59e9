"""State dicts of VQGAN-style codecs in other projects' names, rewritten for diffusers' `VQModel`.

All of them are the convolutional autoencoder of Esser et al. 2021 (taming transformers): the same residual blocks,
attention and resampling under other names. Four layouts are told apart by their names:

- ``vqmodel``: diffusers itself (aMUSEd, Kandinsky's MoVQ, latent diffusion's VQ), nothing to rewrite;
- ``taming``: ``encoder.down.0.block.0…``; levels of the decoder count from the finest;
- ``llamagen``: ``encoder.conv_blocks.0.res.0…`` (Sun et al. 2024); levels of the decoder count from the coarsest;
- ``lwm``: the Flax tree of the Large World Model, flattened with "." or "/"; kernels are [kh, kw, in, out].

Sizes are read off the tensors. What the config says of them has to agree.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ringweave.tokenizers.errors import VocabularyError
from ringweave.tokenizers.outside_files import Weights, refuse_unfit

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]

#: A name every file of the layout has, or the start of one.
MARKS = {
    "vqmodel": "encoder.down_blocks.0.",
    "taming": "encoder.down.0.",
    "llamagen": "encoder.conv_blocks.0.",
    "lwm": "encoder.DownsamplingBlock_0.",
}
#: Only training reads these: discriminator and perceptual loss, usage counters, moving averages of codes.
TRAINING_ONLY = re.compile(r"loss\.|quantize\.(codebook_used|embedding\.(cluster_size|embed_avg))$")
#: Names of the same size in the configs of the three projects -> our name for it.
STATED = {
    "ch": "width", "hidden_channels": "width",
    "ch_mult": "mult", "encoder_ch_mult": "mult", "decoder_ch_mult": "mult", "channel_mult": "mult",
    "num_res_blocks": "layers",
    "z_channels": "latent_channels",
    "n_embed": "num_vq_embeddings", "codebook_size": "num_vq_embeddings", "num_embeddings": "num_vq_embeddings",
    "embed_dim": "vq_embed_dim", "codebook_embed_dim": "vq_embed_dim", "quantized_embed_dim": "vq_embed_dim",
    "in_channels": "in_channels", "out_ch": "out_channels", "num_channels": "in_channels",
}  # fmt: skip

RES = {"nin_shortcut": "conv_shortcut"}
ATTN = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
FLAX_RES = dict(zip(("GroupNorm_0", "Conv_0", "GroupNorm_1", "Conv_1", "Conv_2"),
                    ("norm1", "conv1", "norm2", "conv2", "conv_shortcut")))  # fmt: skip
FLAX_ATTN = dict(zip(("GroupNorm_0", "Conv_0", "Conv_1", "Conv_2", "Conv_3"),
                     ("group_norm", "to_q", "to_k", "to_v", "to_out.0")))  # fmt: skip
FLAX_ENDS = {"Conv_0": "conv_in", "GroupNorm_0": "conv_norm_out", "Conv_1": "conv_out"}
LEAF = {"kernel": "weight", "scale": "weight"}


def layout_of(weights: Weights) -> str:
    """Name of the layout; VocabularyError when it is none of the four, or one whose quantiser we do not read."""
    names = {_plain(name) for name in weights.tensors}
    if any(name.startswith(("quantize.proj.", "quantize.embed.")) for name in names):
        raise VocabularyError(
            "this is a Gumbel-softmax quantiser, which is not read",
            where=weights.where,
            why="its ids come from logits and not from the nearest code",
            fix="use the VQ variant of the same model",
        )
    for layout, mark in MARKS.items():
        if any(name.startswith(mark) for name in names):
            return layout
    raise VocabularyError(
        "the names of these tensors belong to no known image codec",
        where=weights.where,
        why=f"known are {', '.join(MARKS)}; the file starts with {sorted(names)[:2]}",
        fix="save the state dict of the whole codec, encoder and decoder, without a prefix",
    )


def _plain(name: str) -> str:
    return name.replace("/", ".").removeprefix("params.")


def to_vqmodel(weights: Weights, layout: str) -> tuple[Tensors, dict[str, Any]]:
    """(tensors, config) for `VQModel` of weights in `layout`, which is not "vqmodel".

    VocabularyError for a name that has no place, a part that is missing or a size that config and tensors
    dispute.
    """
    found = {_plain(name): tensor for name, tensor in weights.tensors.items()}
    found = {name: tensor for name, tensor in found.items() if not TRAINING_ONLY.match(name)}
    levels = 1 + max(
        (int(m[1]) for name in found if (m := re.match(r"decoder\.up\.(\d+)\.", name))), default=0
    )
    out: Tensors = {}
    lost = []
    for name, tensor in found.items():
        new = _rename(name, layout, levels)
        if new is None or new in out:
            lost.append(name)
        else:
            out[new] = _as_torch(new, tensor, flax=layout == "lwm")
    refuse_unfit((), lost, (), where=weights.where)
    config = _sizes(out, weights)
    _agree(config, weights)
    return out, config


def _rename(name: str, layout: str, levels: int) -> str | None:
    """The name in `VQModel`; None when there is none."""
    if layout == "taming":
        rules = _taming(levels)
    else:
        rules = LLAMAGEN if layout == "llamagen" else FLAX
    for pattern, write in rules:
        if match := re.fullmatch(pattern, name):
            return write(match)
    return None


Rules = list[tuple[str, Callable[[re.Match[str]], str | None]]]
MID = {"block_1": "resnets.0", "attn_1": "attentions.0", "block_2": "resnets.1", "0": "resnets.0",
       "1": "attentions.0", "2": "resnets.1", "ResnetBlock_0": "resnets.0", "AttnBlock_0": "attentions.0",
       "ResnetBlock_1": "resnets.1"}  # fmt: skip
#: conv_in, conv_out, quant_conv, post_quant_conv and the codebook are called the same everywhere but in Flax.
SHARED: Rules = [
    (
        r"(?:encoder|decoder)\.conv_(?:in|out)\.\w+|(?:post_)?quant_conv\.\w+|quantize\.embedding\.weight",
        lambda m: m[0],
    ),
    (r"(encoder|decoder)\.norm_out\.(\w+)", lambda m: f"{m[1]}.conv_norm_out.{m[2]}"),
    (
        r"(encoder|decoder)\.mid\.(block_1|attn_1|block_2|0|1|2)\.(\w+)\.(\w+)",
        lambda m: f"{m[1]}.mid_block.{MID[m[2]]}.{_part(MID[m[2]], m[3])}.{m[4]}",
    ),
]


def _part(block: str, name: str) -> str:
    return (ATTN if block.startswith("attentions") else RES).get(name, name)


def _taming(levels: int) -> Rules:
    def level(side: str, number: str) -> str:
        return f"down_blocks.{number}" if side == "encoder" else f"up_blocks.{levels - 1 - int(number)}"

    return [
        *SHARED,
        (
            r"(encoder|decoder)\.(?:down|up)\.(\d+)\.block\.(\d+)\.(\w+)\.(\w+)",
            lambda m: f"{m[1]}.{level(m[1], m[2])}.resnets.{m[3]}.{RES.get(m[4], m[4])}.{m[5]}",
        ),
        (
            r"(encoder|decoder)\.(?:down|up)\.(\d+)\.attn\.(\d+)\.(\w+)\.(\w+)",
            lambda m: f"{m[1]}.{level(m[1], m[2])}.attentions.{m[3]}.{ATTN.get(m[4], m[4])}.{m[5]}",
        ),
        (
            r"(encoder|decoder)\.(?:down|up)\.(\d+)\.(down|up)sample\.conv\.(\w+)",
            lambda m: f"{m[1]}.{level(m[1], m[2])}.{m[3]}samplers.0.conv.{m[4]}",
        ),
    ]


def _blocks(side: str) -> str:
    return "down_blocks" if side == "encoder" else "up_blocks"


LLAMAGEN: Rules = [
    *SHARED,
    (
        r"(encoder|decoder)\.conv_blocks\.(\d+)\.res\.(\d+)\.(\w+)\.(\w+)",
        lambda m: f"{m[1]}.{_blocks(m[1])}.{m[2]}.resnets.{m[3]}.{RES.get(m[4], m[4])}.{m[5]}",
    ),
    (
        r"(encoder|decoder)\.conv_blocks\.(\d+)\.attn\.(\d+)\.(\w+)\.(\w+)",
        lambda m: f"{m[1]}.{_blocks(m[1])}.{m[2]}.attentions.{m[3]}.{ATTN.get(m[4], m[4])}.{m[5]}",
    ),
    (
        r"(encoder|decoder)\.conv_blocks\.(\d+)\.(down|up)sample\.conv\.(\w+)",
        lambda m: f"{m[1]}.{_blocks(m[1])}.{m[2]}.{m[3]}samplers.0.conv.{m[4]}",
    ),
]


def _flax_block(m: re.Match[str]) -> str | None:
    """`encoder.DownsamplingBlock_1.ResnetBlock_0.Conv_0.kernel`, and the same in the decoder and the middle."""
    side, block, number, kind, index, part, leaf = m.groups()
    names = FLAX_RES if kind == "ResnetBlock" else FLAX_ATTN
    if part not in names:
        return None
    group = "resnets" if kind == "ResnetBlock" else "attentions"
    where = "mid_block" if block == "MidBlock" else f"{_blocks(side)}.{number}"
    return f"{side}.{where}.{group}.{index}.{names[part]}.{LEAF.get(leaf, leaf)}"


FLAX: Rules = [
    (r"quantize\.embeddings", lambda m: "quantize.embedding.weight"),
    (r"((?:post_)?quant_conv)\.(\w+)", lambda m: f"{m[1]}.{LEAF.get(m[2], m[2])}"),
    (
        r"(encoder|decoder)\.(Conv_0|Conv_1|GroupNorm_0)\.(\w+)",
        lambda m: f"{m[1]}.{FLAX_ENDS[m[2]]}.{LEAF.get(m[3], m[3])}",
    ),
    (
        r"(encoder|decoder)\.(DownsamplingBlock|UpsamplingBlock|MidBlock)_(\d+)"
        r"\.(ResnetBlock|AttnBlock)_(\d+)\.(\w+)\.(\w+)",
        _flax_block,
    ),
    (
        r"(encoder|decoder)\.(?:Down|Up)samplingBlock_(\d+)\.(Down|Up)sample_0\.Conv_0\.(\w+)",
        lambda m: f"{m[1]}.{_blocks(m[1])}.{m[2]}.{m[3].lower()}samplers.0.conv.{LEAF.get(m[4], m[4])}",
    ),
]


#: diffusers before 0.17, which published VAEs such as Stable Diffusion's still use -> since then.
OLDER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def modern(tensors: Tensors) -> Tensors:
    """Tensors in diffusers' layout under today's names of the parts of attention; a taken name is left as it is."""
    out: Tensors = {}
    for name, tensor in tensors.items():
        new = re.sub(
            r"(\.attentions\.\d+)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{OLDER[m[2]]}.", name
        )
        out[name if new != name and new in tensors else new] = _as_torch(new, tensor, flax=False)
    return out


def _as_torch(name: str, tensor: torch.Tensor, *, flax: bool) -> torch.Tensor:
    """Convolutions [out, in, kh, kw]; the 1x1 convolutions of attention as matrices, which `VQModel` has."""
    if flax and tensor.ndim == 4:
        tensor = tensor.permute(3, 2, 0, 1)
    if ".attentions." in name and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
        tensor = tensor[:, :, 0, 0]
    return tensor.contiguous()


def _sizes(tensors: Tensors, weights: Weights) -> dict[str, Any]:
    """Config of `VQModel` as the tensors' names and shapes tell it."""

    def width(name: str, axis: int = 0) -> int:
        if name not in tensors or tensors[name].ndim <= axis:
            refuse_unfit([name], (), (), where=weights.where)
        return int(tensors[name].shape[axis])

    def count(pattern: str) -> int:
        return len({m[1] for name in tensors if (m := re.match(pattern, name))})

    levels = range(count(r"encoder\.down_blocks\.(\d+)\."))
    down = [any(n.startswith(f"encoder.down_blocks.{i}.attentions.") for n in tensors) for i in levels]
    up = [any(n.startswith(f"decoder.up_blocks.{i}.attentions.") for n in tensors) for i in levels]
    return {
        "in_channels": width("encoder.conv_in.weight", 1),
        "out_channels": width("decoder.conv_out.weight"),
        "block_out_channels": [width(f"encoder.down_blocks.{i}.resnets.0.conv1.weight") for i in levels],
        "down_block_types": ["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in down],
        "up_block_types": ["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in up],
        "layers_per_block": count(r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "latent_channels": width("encoder.conv_out.weight"),
        "vq_embed_dim": width("quant_conv.weight"),
        "num_vq_embeddings": width("quantize.embedding.weight"),
        "mid_block_add_attention": any(name.startswith("encoder.mid_block.attentions.") for name in tensors),
        "norm_num_groups": weights.config.get("norm_num_groups", 32),
    }


def _agree(config: dict[str, Any], weights: Weights) -> None:
    """VocabularyError when config.json states a size that the tensors do not have."""
    widths = config["block_out_channels"]
    sizes = {**config, "width": _width(weights), "layers": config["layers_per_block"]}
    sizes["mult"] = [w // sizes["width"] for w in widths]
    stated = dict(weights.config)
    for key in ("model", "params", "ddconfig"):  # where taming's YAML keeps them
        for inner in (stated.get(key), weights.config.get(key)):
            if isinstance(inner, dict):
                stated |= inner
    wrong = [
        f"{key} is {stated[key]} in the config and {sizes[ours]} in the tensors"
        for key, ours in STATED.items()
        if key in stated and _listed(stated[key]) != _listed(sizes[ours])
    ]
    if wrong:
        raise VocabularyError("config and weights disagree", where=weights.where, why="; ".join(wrong))


def _width(weights: Weights) -> int:
    """Channels of the first convolution."""
    for name, tensor in weights.tensors.items():
        if _plain(name) in ("encoder.conv_in.bias", "encoder.Conv_0.bias"):
            return max(1, int(tensor.shape[0]))
    return 1


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value
