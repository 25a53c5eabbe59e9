"""RGBA autoencoders: four channels from three, and losses against sampling and hand-computed values."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from ringweave.tokenizers.errors import VocabularyError
from ringweave.tokenizers.picture_vae import PictureVae
from ringweave.tokenizers.rgba_vae import (
    BACKGROUND,
    BACKGROUND_SQUARED,
    VaeLoss,
    composite_errors,
    composite_mse,
    divergence,
    from_rgb,
    opaque_some,
)

CONFIG: dict[str, Any] = {
    "base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 4], "num_res_blocks": 1, "temperal_downsample": [False, True],
    "latents_mean": [0.1] * 4, "latents_std": [2.0] * 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    """An RGB VAE with random weights, large enough to saturate some pixels, and the RGBA one made of it."""
    torch.manual_seed(0)
    rgb = diffusers.AutoencoderKLQwenImage(**CONFIG).eval()
    with torch.no_grad():
        rgb.decoder.conv_out.weight.mul_(3)
    return rgb, from_rgb(rgb)


def test_opaque_pictures_pass_as_through_the_rgb_model(pair: tuple[Any, Any]) -> None:
    rgb, rgba = pair
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(2, 3, 1, 32, 40, generator=generator) * 2 - 1
    opaque = torch.cat([pixels, torch.ones(2, 1, 1, 32, 40)], 1)
    with torch.no_grad():
        wanted, found = rgb.encode(pixels).latent_dist, rgba.encode(opaque).latent_dist
        assert torch.equal(found.mean, wanted.mean) and torch.equal(found.logvar, wanted.logvar)
        colour, whole = rgb.decode(wanted.mode()).sample, rgba.decode(found.mode()).sample
    assert whole.shape[1] == 4 and (whole[:, 3] == 1).all()
    assert (whole[:, :3] - colour).abs().max() <= 1.1e-6
    assert colour.std() > 0.05


def test_the_rgba_model_is_a_copy_with_the_same_config(pair: tuple[Any, Any]) -> None:
    rgb, rgba = pair
    mine, theirs = ({k: v for k, v in m.config.items() if k[0] != "_"} for m in (rgba, rgb))
    assert mine == theirs | {"input_channels": 4}
    before, after = rgb.state_dict(), rgba.state_dict()
    grown = {"encoder.conv_in.weight", "decoder.conv_out.weight", "decoder.conv_out.bias"}
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - grown)
    assert not after["encoder.conv_in.weight"][:, 3].any() and not after["decoder.conv_out.weight"][3].any()
    assert after["decoder.conv_out.bias"][3] == 1
    with torch.no_grad():
        rgba.quant_conv.bias.add_(1)
    assert not torch.equal(rgb.quant_conv.bias, rgba.quant_conv.bias)
    rgba.quant_conv.bias.data.sub_(1)
    assert all(parameter.requires_grad for parameter in rgba.parameters())


def test_alpha_can_be_learned_from_there(pair: tuple[Any, Any]) -> None:
    """What was set to nothing has a gradient before the class clips, on a picture that is not opaque."""
    torch.manual_seed(2)
    pixels = torch.rand(1, 4, 16, 16) * 2 - 1
    flat = PictureVae(pair[1].config).from_stock(pair[1].state_dict())
    mean, logvar = flat.encode(pixels)
    VaeLoss()(flat.decode(mean), pixels, mean, logvar).sum().backward()
    assert flat.decoder.conv_out.weight.grad[3].abs().max() > 0
    assert flat.decoder.conv_out.bias.grad[3].abs() > 0
    assert flat.encoder.conv_in.weight.grad[:, 3].abs().max() > 0


def test_only_a_model_of_three_channels_is_taken(pair: tuple[Any, Any]) -> None:
    with pytest.raises(VocabularyError, match="takes 4"):
        from_rgb(pair[1])


# ---- losses ----


def test_the_composite_error_by_hand() -> None:
    """White, half clear, for black, opaque: d = 1 * 0.5 - (-1) * 1 = 1.5, e = -0.5; E = 2.25 + 1.5 b + 0.25 b2."""
    wanted = torch.tensor([1.0, 1.0, 1.0, 0.0]).reshape(1, 4, 1, 1)
    found = torch.tensor([-1.0, -1.0, -1.0, 1.0]).reshape(1, 4, 1, 1)
    d, e = composite_errors(found, wanted)
    assert d.flatten().tolist() == [1.5] * 3 and e.flatten().tolist() == [-0.5]
    by_hand = [2.25 + 1.5 * b + 0.25 * b2 for b, b2 in zip(BACKGROUND, BACKGROUND_SQUARED)]
    assert composite_mse(d, e).flatten().tolist() == pytest.approx(by_hand, rel=1e-6)
    # A background of exactly b: the square of the difference of two composites.
    exact = composite_mse(d, e, mean=(0.5, -1.0, 0.0), square=(0.25, 1.0, 0.0)).flatten().tolist()
    composites = [(0.5 + 0.5 * b) - (-1.0) for b in (0.5, -1.0, 0.0)]
    assert exact == pytest.approx([c**2 for c in composites], rel=1e-6)


def test_the_composite_error_is_the_mean_over_backgrounds() -> None:
    """400,000 backgrounds with the moments given, by sampling; colour and alpha at random."""
    rng = np.random.default_rng(0)
    found, wanted = (rng.uniform(-1, 1, (1, 4, 2, 3)) for _ in range(2))
    spread = np.sqrt(np.array(BACKGROUND_SQUARED) - np.square(BACKGROUND))
    grounds = np.array(BACKGROUND) + spread * rng.standard_normal((400_000, 3))
    d, e = composite_errors(torch.tensor(found), torch.tensor(wanted))
    exact = composite_mse(d, e)[0].numpy()
    for y, x in np.ndindex(2, 3):
        flat = []
        for picture in (found, wanted):
            alpha = (picture[0, 3, y, x] + 1) / 2
            flat.append(picture[0, :3, y, x] * alpha + grounds * (1 - alpha))
        sampled = np.square(flat[0] - flat[1])
        error = sampled.std(0) / np.sqrt(len(grounds))
        assert (np.abs(sampled.mean(0) - exact[:, y, x]) < 4.5 * error + 1e-9).all()


def test_colour_that_does_not_show_costs_nothing() -> None:
    wanted = torch.tensor([0.3, -0.2, 0.9, -1.0]).reshape(1, 4, 1, 1)
    found = torch.tensor([-1.0, 1.0, 0.0, -1.0]).reshape(1, 4, 1, 1)
    assert not composite_mse(*composite_errors(found, wanted)).any()
    assert not any(part.any() for part in composite_errors(wanted, wanted))


def test_terms_are_weighed_per_sample() -> None:
    torch.manual_seed(3)
    found, wanted = torch.rand(2, 4, 6, 5) * 2 - 1, torch.rand(2, 4, 6, 5) * 2 - 1
    mean, logvar = torch.randn(2, 4, 3, 2), torch.randn(2, 4, 3, 2)
    kl = DiagonalGaussianDistribution(torch.cat([mean, logvar], 1)).kl()
    assert torch.allclose(divergence(mean, logvar).sum((1, 2, 3)), kl, rtol=1e-5)
    d, e = composite_errors(found, wanted)
    plain = composite_mse(d, e).mean((1, 2, 3))
    pixels = 3 * 6 * 5
    found_loss = VaeLoss(absolute=0.5, alpha=0.25, kl=0.125)(found, wanted, mean, logvar)
    by_hand = plain + 0.5 * d.abs().mean((1, 2, 3)) + (0.25 * e.abs().sum((1, 2, 3)) + 0.125 * kl) / pixels
    assert torch.allclose(found_loss, by_hand, rtol=1e-5)
    assert torch.allclose(VaeLoss(kl=0)(found, wanted, mean, logvar), plain, rtol=1e-6)


def test_some_pictures_become_their_opaque_composites() -> None:
    rng = np.random.default_rng(4)
    pixels = rng.integers(0, 256, (2000, 2, 2, 4)).astype(np.float64)
    pixels[..., 3] = np.where(rng.random((2000, 2, 2)) < 0.5, pixels[..., 3], 0)
    out = opaque_some(pixels, 0.3, rng)
    changed = (out != pixels).any((1, 2, 3))
    assert abs(changed.mean() - 0.3) < 3 * np.sqrt(0.3 * 0.7 / 2000)
    assert (out[changed][..., 3] == 255).all()
    grounds = set()
    for before, after in zip(pixels[changed], out[changed]):
        alpha = before[..., 3:] / 255
        shown = alpha[..., 0] < 1
        ground = (after[..., :3] - before[..., :3] * alpha)[shown] / (1 - alpha[shown])
        assert np.ptp(ground, axis=0).max() < 1e-6  # one colour a picture
        grounds |= {round(float(level), 3) for level in ground[0]}
    assert grounds == {0.0, 127.5, 255.0}
    assert np.array_equal(opaque_some(pixels, 0.0, rng), pixels)
    assert (opaque_some(pixels, 1.0, rng)[..., 3] == 255).all()
