"""Diffusers folders as our diffusion transformer: those we wrote, and transformers of the stock class.

Nothing of a folder is run: config.json and ringweave.json are JSON, weights are safetensors beside their index, and
both are checked before a model is made of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ringweave.pretrain.export import llama_name
from ringweave.pretrain.models.dit import DiT, DiTShape
from ringweave.pretrain.models.dit_words import ROPE_THETA
from ringweave.pretrain.models.lwm import LWMShape
from ringweave.pretrain.private_fields import MOST, check_against, check_fields, check_words, words_of
from ringweave.tokenizers.errors import VocabularyError
from ringweave.tokenizers.manifest import BOS, EOS, PAD
from ringweave.tokenizers.outside_files import Weights, check_shapes, diffusers_config, read_weights

#: Our own fields, beside the stock files.
PRIVATE, FORMAT = "ringweave.json", 1


def read_diffusers(folder: Path) -> DiT:
    """The model in a folder that `export_dit.py` wrote, or in `transformer/` (or the folder itself) of the stock class.

    Parameters are those of the files, bit for bit; half precision is widened. Only a folder with ringweave.json has
    words of its own. Raises VocabularyError, naming the file, for another class, keys or tensors it does not know, what
    our model cannot be, shards that are missing, damage, and files that could hold pickled objects.
    """
    folder = Path(folder)
    root = folder / "transformer" if (folder / "transformer").is_dir() else folder
    about = read_private(folder) if (folder / PRIVATE).is_file() else None
    weights = read_weights(root)
    shape = stock_shape(stock_arguments(weights))
    tensors = dict(weights.tensors)
    if about is not None:
        shape = _with_words(shape, folder, about)
        if shape.words is not None:
            tensors |= _words(folder / "text_encoder", shape)
    model = _bare(shape, where=str(root))
    asked = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    check_shapes(asked, {name: tuple(value.shape) for name, value in tensors.items()}, where=str(root))
    if about is not None:
        check_against(about, shape, where=str(folder / PRIVATE))
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _bare(shape: DiTShape, *, where: str) -> DiT:
    """The model without memory. VocabularyError for sizes whose products no tensor can have."""
    try:
        with torch.device("meta"):
            return DiT(shape)
    except (RuntimeError, OverflowError, ValueError) as error:
        raise VocabularyError(
            "the sizes do not describe a model", where=where, why=str(error).splitlines()[0][:200]
        ) from error


def stock_shape(config: Mapping[str, Any]) -> DiTShape:
    """Sizes of a `QwenImageTransformer2DModel` by its arguments (`stock_arguments`)."""
    axes = tuple(config["axes_dims_rope"])
    return DiTShape(
        layers=config["num_layers"], heads=config["num_attention_heads"], axes=axes,
        channels=config["in_channels"], out=config["patch_size"] ** 2 * config["out_channels"],
        text=config["joint_attention_dim"],
    )  # fmt: skip


def stock_arguments(weights: Weights) -> dict[str, Any]:
    """Arguments of the stock class by config.json, defaults filled in. VocabularyError unless they make sense."""
    from diffusers import QwenImageTransformer2DModel

    where = f"{weights.where}: config.json"
    given = diffusers_config(weights, QwenImageTransformer2DModel)
    config = {**_DEFAULTS, **given}
    if config["out_channels"] is None:
        config["out_channels"] = config["in_channels"]
    counts = [name for name in _DEFAULTS if type(_DEFAULTS[name]) is int]
    wrong = [name for name in counts if type(config[name]) is not int or not 0 < config[name] <= MOST]
    wrong += [name for name in _DEFAULTS if type(_DEFAULTS[name]) is bool and type(config[name]) is not bool]
    if wrong:
        raise VocabularyError(f"{wrong[0]} is {config[wrong[0]]!r}, which is no size", where=where)
    axes = config["axes_dims_rope"]
    even = isinstance(axes, (list, tuple)) and all(type(n) is int and n > 0 and n % 2 == 0 for n in axes)
    if not even or len(axes) != 3 or sum(axes) != config["attention_head_dim"]:
        raise VocabularyError(
            f"axes_dims_rope is {axes!r}", where=where,
            why=f"three even numbers were expected that add up to the head size {config['attention_head_dim']}",
        )  # fmt: skip
    blocks = {name.split(".")[1] for name in weights.tensors if name.startswith("transformer_blocks.")}
    if len(blocks) != config["num_layers"]:  # before a config makes us build a million blocks
        raise VocabularyError(
            f"num_layers is {config['num_layers']}, and the weights are of {len(blocks)} blocks", where=where
        )
    strange = [name for name in ("zero_cond_t", "use_additional_t_cond", "guidance_embeds") if config[name]]
    if strange:
        raise VocabularyError(
            f"the transformer has {strange[0]}, which ringweave's has not", where=where,
            why="one noise level turns all tokens of a document, and nothing else is told to it",
            fix="take a model without it, such as Qwen-Image",
        )  # fmt: skip
    return config


#: Of diffusers' class, and of configs that leave them out.
_DEFAULTS: dict[str, Any] = {
    "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 60, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 3584, "guidance_embeds": False,
    "axes_dims_rope": [16, 56, 56], "zero_cond_t": False, "use_additional_t_cond": False,
    "use_layer3d_rope": False,
}  # fmt: skip


# ---- our own fields ----


def read_private(folder: Path) -> dict[str, Any]:
    """ringweave.json of a folder. VocabularyError unless it is there, of this format, and says how layers count."""
    path = Path(folder) / PRIVATE
    try:
        about = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise VocabularyError(
            f"no readable {PRIVATE} in the folder", where=str(folder), why=f"{type(error).__name__}: {error}",
            fix="export the run again: ringweave export RUN",
        ) from error  # fmt: skip
    if not isinstance(about, dict) or about.get("format") != FORMAT or type(about["format"]) is not int:
        raise VocabularyError(f"{PRIVATE} is not of format {FORMAT}", where=str(path))
    check_fields(about, where=str(path))
    return about


def _with_words(shape: DiTShape, folder: Path, about: Mapping[str, Any]) -> DiTShape:
    """The shape of the stock class with the words that ringweave.json tells of."""
    head, zero, words = about.get("head", False), about.get("zero_init", True), words_shape(folder, about)
    check_words(words, shape.text, where=str(folder / PRIVATE))
    return replace(shape, words=words, head=head, zero_init=zero)


def words_shape(folder: Path, about: Mapping[str, Any]) -> LWMShape | None:
    """Sizes of the words' model by ringweave.json; None where there is none. VocabularyError unless they make sense."""
    words, where = about.get("words"), str(folder / PRIVATE)
    if words is None and not (folder / "text_encoder").exists():
        return None
    if words is None:
        raise VocabularyError(f"there is a text_encoder, and {PRIVATE} has no sizes of it", where=where)
    return words_of(words, where=where)


def llama_config(shape: LWMShape, *, head: bool = False, context: int = 4096) -> Any:
    """The config of transformers' Llama for the words' model."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.width, intermediate_size=shape.ffn, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, rms_norm_eps=shape.norm_eps,
        max_position_embeddings=context, rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=False, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, attention_bias=False,
        architectures=["LlamaForCausalLM" if head else "LlamaModel"], dtype="float32",
    )  # fmt: skip


def words_name(name: str, *, head: bool) -> str:
    """The name in `text_encoder/` of a parameter of `Words`; without a head the folder is a bare LlamaModel."""
    stock = llama_name(name)
    return stock if head else stock.removeprefix("model.")


def _words(folder: Path, shape: DiTShape) -> dict[str, torch.Tensor]:
    """Parameters under `words.`, of a folder that holds a stock Llama."""
    bare = _bare(shape, where=str(folder))
    names = [n for n, _ in bare.named_parameters() if n.startswith("words.")]
    stock = {words_name(name.removeprefix("words."), head=shape.head): name for name in names}
    found = read_weights(folder).tensors
    return {stock.get(name, f"words.{name}"): value for name, value in found.items()}
