"""Diffusers folders read back: ours, those of diffusers, damaged and hostile ones."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from safetensors.torch import load_file, save_file

from ringweave.pretrain.export_dit import write_diffusers
from ringweave.pretrain.export_proof import document_velocity
from ringweave.pretrain.import_dit import PRIVATE, read_diffusers
from ringweave.pretrain.layer_pipeline import LayerPipeline
from ringweave.pretrain.models.dit import DiT
from ringweave.tokenizers.errors import VocabularyError

# Test modules are imported one by one (import mode "importlib"), so shared helpers need a path of their own.
sys.path.append(str(Path(__file__).parent))

from dit_exports import SEEN, SHAPE, close, latents_of, random

# ---- back ----


def test_an_export_comes_back_bit_for_bit(model: DiT, layered: Path, tmp_path: Path) -> None:
    write_diffusers(random(replace(SHAPE, zero_init=False, head=False)), tmp_path / "b", preset="msrope")
    for folder, was in (
        (layered, model),
        (tmp_path / "b", random(replace(SHAPE, zero_init=False, head=False))),
    ):
        back = read_diffusers(folder)
        assert back.shape == was.shape
        found = dict(back.named_parameters())
        assert found.keys() == dict(was.named_parameters()).keys()
        assert all(torch.equal(found[name], value) for name, value in was.named_parameters())


@pytest.mark.parametrize("shards", ["10GB", "500KB"])
def test_what_diffusers_wrote_is_read(shards: str, tmp_path: Path) -> None:
    theirs = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=24, axes_dims_rope=(8, 12, 12),
    ).eval()  # fmt: skip
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(0, 0.2)
    theirs.save_pretrained(tmp_path / "pipeline" / "transformer", max_shard_size=shards)
    files = len(list((tmp_path / "pipeline" / "transformer").glob("*.safetensors")))
    assert files == 1 if shards == "10GB" else files > 5
    for folder in (tmp_path / "pipeline", tmp_path / "pipeline" / "transformer"):
        ours = read_diffusers(folder)
        assert ours.shape == replace(SHAPE, words=None, head=False)
        words, cells = torch.randn(5, 24), latents_of(SEEN)
        with torch.no_grad():
            wanted = theirs(
                cells[None], words[None], timestep=torch.tensor([0.4]), return_dict=False,
                img_shapes=[[(1, g.height, g.width) for g in SEEN]],
            )[0][0]  # fmt: skip
        assert close(document_velocity(ours, SEEN, words, cells, 0.4, preset="msrope"), wanted)
        write_diffusers(ours, tmp_path / "again", preset="msrope")
        again = QwenImageTransformer2DModel.from_pretrained(tmp_path / "again" / "transformer").state_dict()
        assert all(torch.equal(again[name], value) for name, value in theirs.state_dict().items())


def test_half_precision_is_widened_and_defaults_are_those_of_the_class(tmp_path: Path) -> None:
    theirs = QwenImageTransformer2DModel(
        in_channels=16, out_channels=None, num_layers=1, num_attention_heads=1, joint_attention_dim=24
    ).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("axes_dims_rope", "attention_head_dim", "use_additional_t_cond", "patch_size"):
        del config[name]  # as older versions wrote it
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = read_diffusers(tmp_path)
    assert (ours.shape.axes, ours.shape.out, ours.shape.head_dim) == ((16, 56, 56), 64, 128)
    found = dict(ours.named_parameters())
    assert all(torch.equal(found[name], value.float()) for name, value in theirs.state_dict().items())


# ---- hostile and damaged folders ----


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def spoil_outside(folder: Path) -> None:
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    shutil.copy(folder / "transformer" / "diffusion_pytorch_model.safetensors", folder / "other.safetensors")
    change(index, weight_map={"proj_out.bias": "../other.safetensors"})


def spoil_pickle(folder: Path) -> None:
    for path in (folder / "transformer").glob("*safetensors*"):
        path.unlink()
    (folder / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")


def spoil_pickle_of_an_index(folder: Path) -> None:
    (folder / "transformer" / "weights.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    change(
        folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json",
        weight_map={"proj_out.bias": "weights.bin"},
    )


def spoil_missing(folder: Path) -> None:
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()


def spoil_tensor(folder: Path) -> None:
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(path) | {"pos_embed.freqs": torch.zeros(3)}, path)


def spoil_less(folder: Path) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path)


def spoil_nan(folder: Path) -> None:
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(path) | {"proj_out.bias": torch.full((16,), float("inf"))}, path)


def set_config(**values: Any) -> Any:
    return lambda folder: change(folder / "transformer" / "config.json", **values)


def set_private(**values: Any) -> Any:
    return lambda folder: change(folder / PRIVATE, **values)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_outside, "names a file outside its folder"),
        (spoil_pickle, "not safetensors"),
        (spoil_pickle_of_an_index, "read from .safetensors only"),
        (spoil_missing, "a file of the index is missing: diffusion_pytorch_model.safetensors"),
        (spoil_tensor, "not expected: pos_embed.freqs"),
        (spoil_less, "missing: .*norm.weight"),
        (spoil_nan, "proj_out.bias holds numbers that are not finite"),
        (set_config(_class_name="FluxTransformer2DModel"), "is of FluxTransformer2DModel, not of QwenImage"),
        (set_config(window_size=4), "does not know: window_size"),
        (set_config(num_layers=10**6), "num_layers is 1000000, and the weights are of 2 blocks"),
        (set_config(in_channels=-4), "in_channels is -4"),
        (set_config(in_channels=20), "other shape: img_in.weight is"),
        (set_config(axes_dims_rope=[8, 12, 14]), "add up to the head size 32"),
        (set_config(axes_dims_rope="long"), "axes_dims_rope is 'long'"),
        (set_config(zero_cond_t=True), "has zero_cond_t"),
        (set_config(use_layer3d_rope="yes"), "use_layer3d_rope is 'yes'"),
        (set_private(format=2), "not of format 1"),
        (set_private(preset="spiral"), "preset is 'spiral'"),
        (set_private(sign=True), "sign True"),
        (set_private(words={"vocab": 60}), "sizes of the words' model are damaged"),
        (set_private(words=None), "has no sizes of it"),
        (set_private(head=False), "not expected: .*lm_head"),
        (lambda folder: (folder / PRIVATE).write_text("{"), "no readable ringweave.json"),
    ],
)
def test_spoilt_folders_end_in_named_errors(spoil: Any, said: str, copy: Path) -> None:
    spoil(copy)
    with pytest.raises(VocabularyError, match=said) as caught:
        read_diffusers(copy)
    assert str(copy) in caught.value.where or str(copy) in str(caught.value)
    if "lm_head" not in said:  # the pipeline takes no notice of the head
        with pytest.raises(VocabularyError, match=said):
            LayerPipeline.load(copy)
