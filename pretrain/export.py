"""Checkpoints as Hugging Face Llama folders, each proven by loading it back with transformers."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ringweave.pretrain import checkpoint
from ringweave.pretrain.backbone import shape_from
from ringweave.pretrain.config import RunConfig, config_from_dict
from ringweave.pretrain.errors import ConfigError, StorageError
from ringweave.pretrain.models.dit import DiT
from ringweave.pretrain.models.lwm import LWM
from ringweave.pretrain.parallelize import build_model
from ringweave.pretrain.run_folder import write_json

_RENAMED = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


def load_run(
    run_dir: Path, *, step: int | None = None, average: bool = True
) -> tuple[LWM | DiT, checkpoint.Saved, RunConfig]:
    """The whole model of a run's checkpoint (the newest usable, or that of `step`) in this one process.

    average: take the moving average of the parameters, where the run keeps one (`optimizer.ema`).
    """
    root = run_dir / "checkpoints"
    if step is not None:
        path = root / checkpoint.checkpoint_name(step)
        saved: checkpoint.Saved | None = checkpoint.Saved(path, checkpoint.verify(path))
    else:
        saved = checkpoint.find(root, warn=lambda what: print(f"warning: {what}"))
    if saved is None:
        raise StorageError(
            "the run has no checkpoint", where=str(root), fix="train it first: ringweave train CONFIG"
        )
    config = config_from_dict(saved.manifest["config"], source=str(saved.path))
    model = build_model(
        shape_from(config, saved.manifest["shape"]), None, seed=0,
        rope_theta=float(saved.manifest["rope_theta"]),
    )  # fmt: skip
    prefix = "ema" if average and config.optimizer.ema else "model"
    checkpoint.load(saved, {f"{prefix}.{name}": p.data for name, p in model.named_parameters()})
    return model.eval(), saved, config


def load_decoder(run_dir: Path, *, step: int | None = None) -> tuple[LWM, checkpoint.Saved, RunConfig]:
    """As `load_run`, of a run of kind lwm; ConfigError for another."""
    model, saved, config = load_run(run_dir, step=step)
    if not isinstance(model, LWM):
        raise ConfigError(
            "this needs a run of kind lwm",
            where=str(saved.path),
            why=f"its model is of kind {config.model.kind}",
        )
    return model, saved, config


def llama_name(name: str) -> str:
    """Our parameter name as transformers' Llama has it."""
    if name == "head.weight":
        return "lm_head.weight"
    if name in ("embed.weight", "norm.weight"):
        return "model." + name.replace("embed", "embed_tokens")
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{_RENAMED[rest.removesuffix('.weight')]}.weight"


def write_llama(model: LWM, out: Path, *, context: int = 4096) -> Any:
    """Write `model.safetensors`, `config.json` and `generation_config.json`; gives the config.

    A model with a window in every layer is a Mistral, which is a Llama with one. Raises ConfigError where some layers
    have the window and others not: no stock class of this family can say that.
    """
    from transformers import LlamaConfig, MistralConfig

    from ringweave.tokenizers.manifest import BOS, EOS, PAD

    s = model.shape
    if s.window is not None and s.full_every > 1:
        raise ConfigError(
            "the model cannot be exported",
            where="model.full_every",
            why="a window in some layers only has no stock class with Llama's weights",
            fix="train with full_every: 1, or load the checkpoint with ringweave",
        )
    kind = "Llama" if s.window is None else "Mistral"
    extra: dict[str, Any] = {"attention_bias": False}
    if s.window is not None:
        extra = {"sliding_window": s.window, "head_dim": s.head_dim}
    config = (LlamaConfig if s.window is None else MistralConfig)(
        vocab_size=s.vocab, hidden_size=s.width, intermediate_size=s.ffn, num_hidden_layers=s.layers,
        num_attention_heads=s.heads, num_key_value_heads=s.kv_heads, rms_norm_eps=s.norm_eps,
        max_position_embeddings=context, rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        tie_word_embeddings=False, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, **extra,
        architectures=[f"{kind}ForCausalLM"], dtype="float32",
    )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {llama_name(n): p.detach().contiguous() for n, p in model.named_parameters()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(out)
    return config


@torch.no_grad()
def logit_difference(model: LWM, folder: Path, *, length: int = 128) -> float:
    """Largest |difference| of logits between `model` and what transformers loads from `folder`, over one sequence."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = (torch.arange(length) * 7919 + 13) % model.shape.vocab
    ours = model(
        ids[None], order=torch.arange(length)[None], documents=torch.zeros(1, length, dtype=torch.int32)
    )
    return float((ours - theirs(ids[None], use_cache=False).logits).abs().max())


def export_run(run_dir: Path, *, out: Path | None = None, step: int | None = None) -> dict[str, Any]:
    """Export a run's checkpoint to `out` (default RUN/export): a Llama folder with tokenizers and manifest.

    The folder appears whole, by a rename, after transformers has loaded it and agreed on the logits. A run of kind dit
    becomes a diffusers folder instead: see `export_dit.py`.
    """
    model, saved, config = load_run(run_dir, step=step)
    if isinstance(model, DiT):
        from ringweave.pretrain.export_dit import export_loaded

        return export_loaded(model, saved, config, out=out or run_dir / "export")
    if config.model.attention == "prefix":
        raise ConfigError(
            "the model cannot be exported",
            where="model.attention",
            why="prefix attention over leading conditions has no stock class with Llama's weights",
            fix="train with attention: causal, or load the checkpoint with ringweave",
        )
    out = out or run_dir / "export"
    making = out.with_name(out.name + ".tmp")
    shutil.rmtree(making, ignore_errors=True)
    context = max(stage.context for stage in config.stages)
    write_llama(model, making, context=context)
    tokenizers = Path(config.tokenizers.dir)
    if tokenizers.is_dir():
        same_vocabulary(saved, tokenizers)
        write_tokenizer(tokenizers, making, context=context)
    difference = logit_difference(model, making)
    record = {
        "class": "LlamaForCausalLM" if model.shape.window is None else "MistralForCausalLM",
        "max_abs_logit_diff": difference,
        "step": saved.step,
        "parameters": model.shape.parameters,
        "vocabulary": saved.manifest["vocabulary"],
        "rope_theta": model.rope_theta,
    }
    write_json(making / "export.json", record)
    if out.exists():
        shutil.rmtree(out)
    os.replace(making, out)
    return {**record, "path": str(out)}


def same_vocabulary(saved: checkpoint.Saved, tokenizers: Path) -> None:
    """An export with ids that mean something else would be wrong in silence."""
    from ringweave.pretrain.resume import vocabulary_of
    from ringweave.tokenizers.manifest import VocabularyManifest, require_same

    require_same(
        VocabularyManifest.load(tokenizers / "tokenizers.json"),
        vocabulary_of(saved.manifest, where=str(saved.path)),
        mine_is=f"the set in {tokenizers}",
        theirs_is=f"the checkpoint {saved.path.name}",
        fix="put the tokenizers the run was trained with back into tokenizers.dir",
    )


def write_tokenizer(tokenizers: Path, out: Path, *, context: int) -> None:
    """Copy the codecs and their manifest, and write a transformers tokenizer for the text ids."""
    from ringweave.pretrain.hf_tokenizer import write_fast_tokenizer
    from ringweave.tokenizers.set import TokenizerSet

    loaded = TokenizerSet.load(tokenizers)
    loaded.save(out / "ringweave_tokenizers")
    (out / "vocabulary.json").write_text(json.dumps(json.loads(loaded.manifest.to_json()), indent=1))
    write_fast_tokenizer(loaded, out, context=context)
