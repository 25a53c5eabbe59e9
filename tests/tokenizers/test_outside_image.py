"""Image codecs from outside in diffusers' own layout: ids of its class, whatever the batch and threads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizer_samples import picture

from ringweave.tokenizers.errors import DataError, VocabularyError
from ringweave.tokenizers.outside_image import OutsideImage, refuse_legacy

diffusers = pytest.importorskip("diffusers")

GROUPS = 4
WIDTH, MULT, LAYERS, LATENT, DIM, CODES = 8, (1, 2, 2), 1, 6, 4, 64
PATCH = 4


def pictures(count: int = 3) -> np.ndarray[Any, Any]:
    return np.stack([picture(seed) for seed in range(count)])


def as_input(images: np.ndarray[Any, Any]) -> torch.Tensor:
    """float32 [N, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images).float().movedim(-1, 1) / 127.5 - 1


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def vqmodel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random `VQModel` with codes spread over what its encoder gives."""
    torch.manual_seed(0)
    model = diffusers.VQModel(
        block_out_channels=[WIDTH * m for m in MULT],
        down_block_types=["DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        up_block_types=["AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"],
        layers_per_block=LAYERS, latent_channels=LATENT, vq_embed_dim=DIM, num_vq_embeddings=CODES,
        norm_num_groups=GROUPS,
    ).eval()  # fmt: skip
    with torch.no_grad():
        latents = model.encode(as_input(pictures(8))).latents.movedim(1, -1).reshape(-1, DIM)
        model.quantize.embedding.weight.copy_(latents[torch.randperm(len(latents))[:CODES]] * 1.1)
    folder = tmp_path_factory.mktemp("vqmodel")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def codec(vqmodel: Path) -> OutsideImage:
    return OutsideImage.load(vqmodel)


def direct_ids(folder: Path, images: np.ndarray[Any, Any], **how: Any) -> np.ndarray[Any, Any]:
    """Codes by the library's class alone, one picture at a time."""
    model = diffusers.VQModel.from_pretrained(folder, **how).eval()
    out = []
    with torch.no_grad():
        for image in as_input(images).to(model.dtype):
            latents = model.encode(image[None]).latents
            out.append(model.quantize(latents)[2][2].reshape(latents.shape[-2:]).numpy())
    return np.stack(out)


def test_ids_are_those_of_the_class(vqmodel: Path, codec: OutsideImage) -> None:
    images = pictures(8)
    ids = codec.encode(images)
    assert ids.dtype == np.int32
    assert (codec.kind, codec.codes, codec.patch) == ("image.vqmodel", CODES, PATCH)
    assert len(np.unique(ids)) > CODES // 2
    assert np.array_equal(ids, direct_ids(vqmodel, images))
    model = diffusers.VQModel.from_pretrained(vqmodel).eval()
    with torch.no_grad():
        points = model.quantize.get_codebook_entry(
            torch.from_numpy(ids[0].reshape(-1)).long(), (1, *ids[0].shape, DIM)
        )
        wanted = (model.decode(points, force_not_quantize=True).sample[0].movedim(0, -1) + 1) * 127.5
    assert np.abs(codec.decode(ids)[0] - wanted.clamp(0, 255).numpy()).max() <= 0.501


@pytest.mark.parametrize("batch", [1, 3])
def test_batch_and_threads_change_no_id(codec: OutsideImage, batch: int) -> None:
    images = np.tile(pictures(6), (1, 2, 2, 1))
    torch.set_num_threads(1)
    whole = codec.encode(images)
    torch.set_num_threads(2)
    parts = [codec.encode(images[k : k + batch]) for k in range(0, len(images), batch)]
    assert torch.get_num_threads() == 2
    assert np.array_equal(whole, np.concatenate(parts))
    assert np.array_equal(
        whole.reshape(2, 3, *whole.shape[1:]), codec.encode(images.reshape(2, 3, *images.shape[1:]))
    )
    assert np.array_equal(codec.decode(whole)[4], codec.decode(whole[4]))


def test_half_precision_moves_ids_and_is_kept_out(vqmodel: Path, codec: OutsideImage) -> None:
    images = pictures(8)
    ids = codec.encode(images)
    assert (direct_ids(vqmodel, images, torch_dtype=torch.bfloat16) != ids).mean() > 0.01  # the trap
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert np.array_equal(codec.encode(images), ids)
        pixels = codec.decode(ids)
    assert np.array_equal(pixels, codec.decode(ids))


def test_stored_half_equals_its_float32(
    vqmodel: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = load_file(vqmodel / "diffusion_pytorch_model.safetensors")
    codecs = []
    for dtype in (torch.bfloat16, torch.float32):
        folder = tmp_path / str(dtype)
        folder.mkdir()
        (folder / "config.json").write_bytes((vqmodel / "config.json").read_bytes())
        half = {name: tensor.bfloat16().to(dtype) for name, tensor in weights.items()}
        save_file(half, folder / "model.safetensors")
        codecs += [OutsideImage.load(folder), OutsideImage.load(folder)]
    said = [record for record in caplog.records if "bfloat16 weights are used as float32" in record.message]
    assert len(said) == 1
    assert np.array_equal(codecs[0].encode(pictures()), codecs[2].encode(pictures()))
    assert next(codecs[0].model.parameters()).dtype == torch.float32


def test_odd_sizes_are_edge_padded(codec: OutsideImage) -> None:
    image = picture(3)[:45, :37]
    ids = codec.encode(image)
    assert ids.shape == (12, 10)
    padded = np.pad(image, ((0, 3), (0, 3), (0, 0)), mode="edge")
    assert np.array_equal(ids, codec.encode(padded))
    assert codec.decode(ids).shape == (48, 40, 3)
    assert codec.encode(image[:1, :1]).shape == (1, 1)


def test_amused_sees_pixels_from_zero_to_one(vqmodel: Path, codec: OutsideImage, tmp_path: Path) -> None:
    config = json.loads((vqmodel / "config.json").read_text()) | {"lookup_from_codebook": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(
        (vqmodel / "diffusion_pytorch_model.safetensors").read_bytes()
    )
    amused = OutsideImage.load(tmp_path)
    image = picture(1)
    with torch.no_grad():
        latents = codec.model.encode(torch.tensor(image).float().movedim(-1, 0)[None] / 255).latents
        wanted = codec.model.quantize(latents)[2][2].reshape(latents.shape[-2:]).numpy()
    assert amused.pixels == "unit"
    assert np.array_equal(amused.encode(image), wanted)
    assert not np.array_equal(codec.encode(image), wanted)
    signed = OutsideImage.load(tmp_path, pixels="signed")
    assert np.array_equal(signed.encode(image), codec.encode(image))
    assert signed.sha256 != amused.sha256
    assert (
        np.abs(
            amused.decode(wanted).astype(int) - (signed.decode(wanted).astype(int) * 2 - 255).clip(0)
        ).max()
        <= 2
    )


def test_commitment_weight_is_on_the_commitment_term(codec: OutsideImage) -> None:
    """Gradients of the quantiser's loss: beta on the encoder's side, one on the codes' side."""
    model = codec.trainable()
    points = torch.randn(1, DIM, 3, 3, requires_grad=True)
    quantizer = model.quantize
    codes, loss, _ = quantizer(points)
    loss.backward()
    step = 2 * (points - codes).detach() / points.numel()
    assert torch.allclose(points.grad, quantizer.beta * step, atol=1e-7)
    assert torch.allclose(quantizer.embedding.weight.grad.sum(0), -step.sum((0, 2, 3)), atol=1e-6)
    assert not any(p.requires_grad for p in codec.model.parameters())
    with pytest.raises(VocabularyError, match=r"quantize .*legacy"):
        refuse_legacy(diffusers.VQModel(norm_num_groups=GROUPS, block_out_channels=[GROUPS]), where="here")


def test_wrong_arrays_and_codes_are_named(codec: OutsideImage) -> None:
    for bad in (
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
        np.zeros((8, 8, 3), np.float32),
    ):
        with pytest.raises(DataError, match="uint8"):
            codec.encode(bad)
    for codes in (
        np.zeros((2, 2), np.float32),
        np.array([[CODES]]),
        np.array([[-2]]),
        np.zeros((0, 2), np.int32),
    ):
        with pytest.raises(DataError, match="codes"):
            codec.decode(codes)
    assert codec.decode(np.full((1, 1), -1)).shape == (PATCH, PATCH, 3)
