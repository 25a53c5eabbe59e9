"""Diffusion runs as diffusers folders, each proven by loading it back with the stock classes.

`transformer/` is a `QwenImageTransformer2DModel`, `text_encoder/` a Llama of the model's own words, `vae/` an
`AutoencoderKLQwenImage` of four channels, beside `scheduler/`, `tokenizer/` and model_index.json; a run whose words are
given as vectors has neither text encoder nor tokenizer. ringweave.json holds what these cannot say: how layers are
numbered, how prompts begin, which documents stock code reproduces (`stock_positions.py`). `import_dit.py` reads a
folder back, `layer_pipeline.py` runs one with our positions.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ringweave.pretrain import checkpoint
from ringweave.pretrain.backbone import flow_settings
from ringweave.pretrain.config import RunConfig
from ringweave.pretrain.errors import ConfigError
from ringweave.pretrain.export import load_run, same_vocabulary
from ringweave.pretrain.export_proof import prove
from ringweave.pretrain.flow import FlowSettings
from ringweave.pretrain.import_dit import FORMAT, PRIVATE, llama_config, words_name
from ringweave.pretrain.models.dit import DiT, DiTShape
from ringweave.pretrain.models.dit_positions import Preset
from ringweave.pretrain.models.dit_words import Words
from ringweave.pretrain.run_folder import write_json
from ringweave.pretrain.stock_positions import cannot_say, has_condition, holds_latents, stock_sources
from ringweave.tokenizers.latent_codec import FOLD, LatentCodec
from ringweave.tokenizers.manifest import BOS
from ringweave.tokenizers.outside_files import check_shapes

WEIGHTS = "diffusion_pytorch_model"
SHARD_BYTES = 10 * 2**30


# ---- what the stock class can be ----


def is_layered(preset: Preset, *, sign: int, conditions: bool) -> bool:
    """Whether the stock class needs its layered rope: layer3d, and bil where documents have a condition."""
    return sign == 1 and (preset == "layer3d" or (preset == "bil" and conditions))


def stock_config(shape: DiTShape, *, layered: bool) -> dict[str, Any]:
    """Arguments of `QwenImageTransformer2DModel`."""
    return {
        "patch_size": FOLD,
        "in_channels": shape.channels,
        "out_channels": shape.out // FOLD**2,
        "num_layers": shape.layers,
        "attention_head_dim": shape.head_dim,
        "num_attention_heads": shape.heads,
        "joint_attention_dim": shape.text,
        "guidance_embeds": False,
        "axes_dims_rope": list(shape.axes),
        "zero_cond_t": False,
        "use_additional_t_cond": False,
        "use_layer3d_rope": layered,
    }


def refuse(shape: DiTShape, *, preset: Preset, sign: int) -> None:
    """ConfigError for what no stock class can be."""
    reasons = (
        (
            shape.streams != "double", "model.streams",
            "one set of weights for words and latents has no stock class", "streams: double",
        ),
        (
            len(shape.axes) != 3, "model.axes",
            f"{len(shape.axes)} axes keep layers and frames apart; the stock ropes have three axes", "three axes",
        ),
        (
            sign == -1 and preset != "bil", "model.sign",
            f"preset {preset} with sign -1 counts targets downwards, and the stock ropes count up", "sign: 1",
        ),
        (
            any(axis % 2 for axis in shape.axes), "model.axes",
            f"the stock ropes turn pairs of channels, and axes are {list(shape.axes)}", "even axes",
        ),
        (shape.theta != 1e4, "theta", f"the stock ropes have theta 10000, not {shape.theta:g}", "that theta"),
        (shape.mlp != 4, "mlp", f"the stock MLP has factor 4, not {shape.mlp}", "that factor"),
        (
            shape.channels % FOLD**2 or shape.out % FOLD**2, "latents",
            f"{shape.channels} channels in and {shape.out} out are no {FOLD} x {FOLD} latents of a VAE",
            "a codec of latents that folds them",
        ),
    )  # fmt: skip
    for wrong, where, why, other in reasons:
        if wrong:
            raise ConfigError(
                "the model cannot be exported to diffusers",
                where=where,
                why=why,
                fix=f"train with {other}, or load the checkpoint with ringweave",
            )


# ---- files ----


def write_transformer(model: DiT, out: Path, *, layered: bool, shard_bytes: int = SHARD_BYTES) -> None:
    """config.json, the weights, and their index, which some readers want of a single file too."""
    from diffusers import QwenImageTransformer2DModel

    with torch.device("meta"):
        stock = QwenImageTransformer2DModel(**stock_config(model.shape, layered=layered))
    named = model.named_parameters()
    tensors = {name: p.detach() for name, p in named if not name.startswith("words.")}
    asked = {name: tuple(value.shape) for name, value in stock.state_dict().items()}
    check_shapes(asked, {name: tuple(value.shape) for name, value in tensors.items()}, where="the model")
    out.mkdir(parents=True)
    stock.save_config(out)
    parts = list(_shards(tensors, shard_bytes))
    where: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        mark = f"-{number:05d}-of-{len(parts):05d}" if len(parts) > 1 else ""
        name = f"{WEIGHTS}{mark}.safetensors"
        save_file({key: tensors[key].contiguous() for key in part}, out / name, metadata={"format": "pt"})
        where |= dict.fromkeys(part, name)
    total = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    write_json(out / f"{WEIGHTS}.safetensors.index.json", index)


def _shards(tensors: dict[str, Tensor], most: int) -> Iterator[list[str]]:
    """Names of each shard in order, at most so many bytes together; a larger tensor has one to itself."""
    part: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if part and size + tensor.nbytes > most:
            yield part
            part, size = [], 0
        part.append(name)
        size += tensor.nbytes
    yield part


def write_words(words: Words, out: Path, *, context: int) -> None:
    """A Llama whose last hidden states are the vectors of the words; with the head it is a LlamaForCausalLM."""
    head = words.head is not None
    out.mkdir(parents=True)
    tensors = {words_name(n, head=head): p.detach().contiguous() for n, p in words.named_parameters()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    llama_config(words.shape, head=head, context=context).save_pretrained(out)


def scheduler_settings(flow: FlowSettings) -> dict[str, Any]:
    """Arguments of `FlowMatchEulerDiscreteScheduler` that shift levels as the run did.

    Pipelines make mu of the number of latents, on the line through (base_image_seq_len, base_shift) and
    (max_image_seq_len, max_shift). Where ours is a square root the line meets it at one and sixteen times the base.
    """
    if flow.shift == "none":
        return {"shift": 1.0, "use_dynamic_shifting": False}
    if flow.shift == "linear":
        (low, mu_low), (high, mu_high) = (flow.shift_base, 1.0), (16 * flow.shift_base, 4.0)
    else:
        (low, mu_low), (high, mu_high) = flow.shift_from, flow.shift_to
    return {
        "use_dynamic_shifting": True,
        "time_shift_type": flow.shift,
        "base_image_seq_len": low,
        "base_shift": mu_low,
        "max_image_seq_len": high,
        "max_shift": mu_high,
    }


def _write_index(out: Path, *, layered: bool) -> str:
    """model_index.json over the parts that are there; gives the name of the stock pipeline."""
    import diffusers

    stock = {
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
        "text_encoder": ["transformers", "LlamaModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
    } | ({"processor": ["", ""]} if layered else {})
    name = "QwenImageLayeredPipeline" if layered else "QwenImagePipeline"
    parts = {part: cls if (out / part).is_dir() else [None, None] for part, cls in stock.items()}
    head = {"_class_name": name, "_diffusers_version": diffusers.__version__}
    write_json(out / "model_index.json", head | parts)
    return name


def _stock_cannot(
    shape: DiTShape, preset: Preset, flow: FlowSettings, *, sign: int, layered: bool
) -> list[str]:
    said = cannot_say(preset=preset, sign=sign, layered=layered)
    said.append(
        "prompts of text: there is no text_encoder and no tokenizer, for the run's words were vectors of "
        f"{shape.text} numbers in its records; load the pipeline with text_encoder=None and tokenizer=None, and "
        "give it prompt_embeds by the model that made those, and as negative_prompt_embeds one vector of zeros, the "
        "empty prompt of training"
        if shape.words is None
        else "prompts of text: the stock pipelines put a chat template of Qwen around them and drop its 34 ids; give "
        "them prompt_embeds, which are the last hidden states of text_encoder over bos and the ids of the tokenizer"
    )
    if layered:
        said.append(
            "sampling by QwenImageLayeredPipeline, which makes one target more than asked, drops the first and wants a "
            "captioning processor: use ringweave's LayerPipeline"
        )
    if flow.shift == "linear":
        said.append(
            "the shift sqrt(latents / base): the line in scheduler_config.json meets it at one and sixteen times the "
            "base; pass mu to set_timesteps"
        )
    return said


# ---- the folder ----


def write_diffusers(
    model: DiT,
    out: Path,
    *,
    preset: Preset,
    sign: int = 1,
    flow: FlowSettings | None = None,
    codec: LatentCodec | None = None,
    tokenizers: Path | None = None,
    conditions: bool = True,
    context: int = 4096,
    shard_bytes: int = SHARD_BYTES,
    about: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a model, its VAE (`codec`) and the tokenizer of its words (`tokenizers`: folder of a set) to `out`.

    conditions: whether its documents have grids that are seen and not generated; context: of the tokenizer; about:
    further fields of ringweave.json. The folder appears whole, by a rename, after the stock classes have loaded it and
    agreed. Gives what export.json holds. Raises ConfigError for a model that no stock class can be and for an `out`
    that holds something else, StorageError when the stock classes do not agree.
    """
    refuse(model.shape, preset=preset, sign=sign)
    flow, layered = flow or FlowSettings(), is_layered(preset, sign=sign, conditions=conditions)
    _refuse_other(out)
    making = out.with_name(out.name + ".tmp")
    shutil.rmtree(making, ignore_errors=True)
    try:
        _write_parts(
            model, making, flow, codec, tokenizers, layered, context=context, shard_bytes=shard_bytes
        )
        cannot = _stock_cannot(model.shape, preset, flow, sign=sign, layered=layered)
        private = _private(model, codec, flow, preset=preset, sign=sign) | {"stock_cannot": cannot}
        write_json(making / PRIVATE, private | (about or {}))
        record = {
            "class": "QwenImageTransformer2DModel",
            "pipeline": _write_index(making, layered=layered),
            **prove(model, codec, making),
            "parameters": model.shape.parameters,
            "stock_cannot": cannot,
            **(about or {}),
        }
        write_json(making / "export.json", record)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise
    if out.exists():
        shutil.rmtree(out)
    os.replace(making, out)
    return record


def _refuse_other(out: Path) -> None:
    """What an earlier export left is replaced, nothing else is."""
    if out.is_dir() and (not any(out.iterdir()) or (out / PRIVATE).is_file()):
        return
    if out.exists():
        raise ConfigError(
            "the folder to export to holds something else",
            where=str(out),
            why=f"there is no {PRIVATE} in it, so no export wrote it",
            fix="name another: ringweave export RUN --out DIR",
        )


def _write_parts(
    model: DiT, making: Path, flow: FlowSettings, codec: LatentCodec | None, tokenizers: Path | None, layered: bool,
    *, context: int, shard_bytes: int,
) -> None:  # fmt: skip
    from diffusers import FlowMatchEulerDiscreteScheduler

    from ringweave.pretrain.hf_tokenizer import write_fast_tokenizer
    from ringweave.tokenizers.set import TokenizerSet

    making.mkdir(parents=True)
    write_transformer(model, making / "transformer", layered=layered, shard_bytes=shard_bytes)
    FlowMatchEulerDiscreteScheduler(**scheduler_settings(flow)).save_pretrained(making / "scheduler")
    if model.words is not None:
        write_words(model.words, making / "text_encoder", context=context)
    if codec is not None:
        if codec.channels != model.shape.channels:
            raise ConfigError(
                f"the codec gives {codec.channels} channels a latent, the model reads {model.shape.channels}",
                where=codec.where,
                fix="put the tokenizers the run was trained with back into tokenizers.dir",
            )
        codec.save_diffusers(making / "vae")
    if tokenizers is not None and model.words is not None:
        loaded = TokenizerSet.load(tokenizers)
        if "text" in loaded.codecs:
            (making / "tokenizer").mkdir()
            write_fast_tokenizer(loaded, making / "tokenizer", context=context)


def _private(
    model: DiT, codec: LatentCodec | None, flow: FlowSettings, *, preset: Preset, sign: int
) -> dict[str, Any]:
    s = model.shape
    latents: dict[str, Any] = {"channels": s.channels, "out": s.out}
    if codec is not None:
        latents |= {
            "patch": codec.patch,
            "mean": list(codec.config["latents_mean"]),
            "std": list(codec.config["latents_std"]),
        }
    begin = "every prompt begins with bos, the empty one is bos alone"
    prompts: dict[str, Any] = {"prompts": {"begin_with": BOS, "empty": [BOS]}}
    if s.words is None:
        begin, prompts = f"words are vectors of {s.text} numbers, the empty prompt is one of zeros", {}
    return {
        "format": FORMAT,
        "preset": preset,
        "sign": sign,
        "axes": list(s.axes),
        "words": None if s.words is None else asdict(s.words),
        "head": s.head,
        "zero_init": s.zero_init,
        "latents": latents,
        "flow": asdict(flow),
        **prompts,
        "documents": f"targets first, conditions behind them; {begin}",
    }


# ---- a run ----


def export_diffusion(run_dir: Path, *, out: Path | None = None, step: int | None = None) -> dict[str, Any]:
    """Export a checkpoint of a run of kind dit to `out` (default RUN/export), with tokenizers where they are there."""
    model, saved, config = load_run(run_dir, step=step)
    if not isinstance(model, DiT):
        raise ConfigError(
            "this needs a run of kind dit",
            where=str(saved.path),
            why=f"its model is of kind {config.model.kind}",
        )
    return export_loaded(model, saved, config, out=out or run_dir / "export")


def export_loaded(model: DiT, saved: checkpoint.Saved, config: RunConfig, *, out: Path) -> dict[str, Any]:
    """See `export_diffusion`; of what `load_run` gave."""
    from ringweave.tokenizers.set import TokenizerSet

    m, folder = config.model, Path(config.tokenizers.dir)
    codec = None
    if folder.is_dir():
        same_vocabulary(saved, folder)
        codec = TokenizerSet.load(folder).codecs.get("latents")
    plans = [(source.name, source.plan) for source in config.data.sources]
    # Plans of other things (data made in memory) tell nothing of conditions.
    conditions = any(has_condition(plan) for _, plan in plans) or not any(holds_latents(p) for _, p in plans)
    about = {
        "step": saved.step,
        "average": config.optimizer.ema,
        "vocabulary": saved.manifest["vocabulary"],
        "stock_sources": stock_sources(
            plans,
            preset=m.preset,
            sign=m.sign,
            layered=is_layered(m.preset, sign=m.sign, conditions=conditions),
        ),
    }
    record = write_diffusers(
        model, out, preset=m.preset, sign=m.sign, flow=flow_settings(config), codec=codec,
        tokenizers=folder if folder.is_dir() else None, conditions=conditions,
        context=max(stage.context for stage in config.stages), about=about,
    )  # fmt: skip
    return {**record, "path": str(out)}
