"""The diffusion transformer against stock diffusers, document by document; positions against its ropes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedLayer3DRope, QwenEmbedRope

from ringweave.kernels.rotary import apply_interleaved, axes_table
from ringweave.pretrain.models.dit import LATENT, WORD, DiT, DiTShape
from ringweave.pretrain.models.dit_positions import (
    Grid,
    coordinates,
    document_positions,
    layers_of,
    text_start,
)

SHAPE = DiTShape(layers=3, heads=4, axes=(8, 12, 12), channels=16, out=16, text=24)


def stock(*, layered: bool = False) -> QwenImageTransformer2DModel:
    """Random weights of std 0.2, so that no path is hidden by a small initialisation."""
    model = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=3, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=24, axes_dims_rope=(8, 12, 12), use_layer3d_rope=layered,
    ).eval()  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    return model


def ours(theirs: QwenImageTransformer2DModel) -> DiT:
    model = DiT(SHAPE)
    model.load_state_dict(theirs.state_dict())  # the same names and shapes: strict
    return model.eval()


class Case:
    """A document: its grids, words, noise level and values."""

    def __init__(self, seed: int, grids: list[Grid], words: int, sigma: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.grids, self.words, self.sigma = grids, words, sigma
        self.latents = torch.randn(sum(g.cells for g in grids), 16, generator=generator)
        self.text = torch.randn(words, 24, generator=generator) * 3

    def alone(self, theirs: QwenImageTransformer2DModel) -> torch.Tensor:
        """What the stock class makes of it, in a batch of its own."""
        with torch.no_grad():
            return theirs(
                self.latents[None], self.text[None], timestep=torch.tensor([self.sigma]),
                img_shapes=[[(g.frames, g.height, g.width) for g in self.grids]], return_dict=False,
            )[0][0]  # fmt: skip


def packed(model: DiT, cases: list[Case], preset: Any, *, padding: int = 5) -> list[torch.Tensor]:
    """All documents in one pack with some padding; the velocity of each."""
    size = sum(c.words + len(c.latents) for c in cases) + padding
    kind, doc = torch.zeros(size, dtype=torch.int64), torch.full((size,), -1, dtype=torch.int32)
    places = torch.zeros(size, 3, dtype=torch.int64)
    latents, embeddings = torch.zeros(size, 16), torch.zeros(size, 24)
    at = 0
    for number, case in enumerate(cases):
        words, grids = document_positions(case.grids, case.words, preset)
        text, image = slice(at, at + case.words), slice(at + case.words, at + case.words + len(grids))
        kind[text], kind[image] = WORD, LATENT
        places[text], places[image] = torch.from_numpy(words).long(), torch.from_numpy(grids).long()
        latents[image], embeddings[text] = case.latents, case.text
        doc[text], doc[image] = number, number
        at = image.stop
    with torch.no_grad():
        out = model(
            kind[None], kind=kind[None], places=places[None], segment=doc.clamp(min=0).long()[None],
            sigma=torch.tensor([[c.sigma for c in cases]]), documents=doc[None], words=(kind == WORD)[None],
            latents=latents[None], embeddings=embeddings[None],
        )[0]  # fmt: skip
    assert not out[kind != LATENT].any()
    return list(out[kind == LATENT].split([len(c.latents) for c in cases]))


PLAIN = [
    Case(0, [Grid(4, 6)], 7, 0.3),
    Case(1, [Grid(5, 3)], 1, 0.9),  # odd sides
    Case(2, [Grid(2, 2), Grid(4, 4), Grid(3, 7)], 12, 0.05),  # several pictures
    Case(3, [Grid(3, 4, frames=5)], 4, 1.0),
]
LAYERED = [
    Case(4, [Grid(4, 4), Grid(4, 4), Grid(4, 4, condition=True)], 6, 0.5),
    Case(
        5, [Grid(3, 5)] * 6 + [Grid(3, 5, condition=True)], 3, 0.7
    ),  # more layers than rows: text begins later
]


@pytest.mark.parametrize(("layered", "cases"), [(False, PLAIN), (True, LAYERED)])
def test_a_pack_of_documents_equals_stock_diffusers_one_by_one(layered: bool, cases: list[Case]) -> None:
    theirs = stock(layered=layered)
    model = ours(theirs)
    for preset in ("layer3d", "bil") if layered else ("msrope", "bil"):
        for case, mine in zip(cases, packed(model, cases, preset)):
            wanted = case.alone(theirs)
            assert (mine - wanted).abs().max() <= 5e-5 * wanted.abs().max(), (preset, case.grids)


def test_documents_leave_each_other_bit_identical() -> None:
    """Another noise level, text or latent of one document changes no bit of the others."""
    model = ours(stock())
    before = packed(model, PLAIN, "bil")
    for change in ("sigma", "text", "latents"):
        changed = Case(1, [Grid(5, 3)], 1, 0.9)
        setattr(changed, change, getattr(changed, change) * 0.5)
        after = packed(model, [PLAIN[0], changed, *PLAIN[2:]], "bil")
        assert not torch.equal(before[1], after[1])
        for place in (0, 2, 3):
            assert torch.equal(before[place], after[place]), change


def table(places: np.ndarray[Any, Any]) -> torch.Tensor:
    cos, sin = axes_table(torch.from_numpy(places), dims=(8, 12, 12), theta=1e4)
    return torch.complex(cos, sin)


@pytest.mark.parametrize("sizes", [[(4, 6)], [(5, 3)], [(2, 2), (5, 7), (1, 1)], [(1, 1)] * 9])
def test_places_are_those_of_the_stock_ropes(sizes: list[tuple[int, int]]) -> None:
    shapes = [(1, h, w) for h, w in sizes]
    grids = [Grid(h, w) for h, w in sizes]
    for rope, preset in ((QwenEmbedRope, "msrope"), (QwenEmbedLayer3DRope, "layer3d")):
        image, text = rope(theta=10000, axes_dim=[8, 12, 12], scale_rope=True)([shapes], max_txt_seq_len=9)
        words, latents = document_positions(grids, 9, preset)  # type: ignore[arg-type]
        assert (table(latents) - image).abs().max() < 1e-6
        assert (table(words) - text).abs().max() < 1e-6


def test_two_way_layers_are_the_stock_forms_where_those_exist() -> None:
    """One condition, last: layer3d, bit for bit. No condition: msrope."""
    grids = [Grid(4, 4), Grid(4, 4), Grid(2, 6, condition=True)]
    for mine, layered in zip(document_positions(grids, 30, "bil"), document_positions(grids, 30, "layer3d")):
        assert (mine == layered).all()
    targets = [Grid(4, 4), Grid(3, 5)]
    for mine, plain in zip(document_positions(targets, 30, "bil"), document_positions(targets, 30, "msrope")):
        assert (mine == plain).all()
    mixed = [Grid(2, 2, condition=True), Grid(2, 2), Grid(2, 2, condition=True), Grid(2, 2)]
    assert layers_of(mixed, "bil") == [-1, 0, -2, 1]
    assert layers_of(mixed, "bil", sign=-1) == [1, 0, 2, -1]


def test_long_text_has_places_of_its_own() -> None:
    """The stock table ends at 4,096 places and cuts what is longer without a word."""
    words, _ = document_positions([Grid(4, 4)], 5000, "bil")
    assert words[:, 0].tolist() == list(range(2, 5002))
    turned = table(words)
    assert len(torch.unique(torch.view_as_real(turned).flatten(1), dim=0)) == 5000


def test_clips_as_layers_do_not_meet() -> None:
    """Two clips and a condition of several frames: no two cells share a place, on three axes or four."""
    grids = [
        Grid(2, 2, frames=3),
        Grid(2, 2, frames=4),
        Grid(2, 2, frames=2, condition=True),
        Grid(2, 2, condition=True),
    ]
    for axes in (3, 4):
        _, latents = document_positions(grids, 0, "bil", axes=axes)
        assert len(np.unique(latents, axis=0)) == sum(grid.cells for grid in grids)
    _, three = document_positions(grids, 0, "bil")
    assert sorted(set(three[:, 0].tolist())) == [-3, -2, -1, 0, 1, 2, 3, 4, 5, 6]
    assert coordinates(grids, "bil")[12 * 1 + 2, 0] == 1


def test_text_begins_beyond_layers_where_they_have_signs() -> None:
    layers = [Grid(2, 2)] * 9
    assert text_start(layers, "msrope") == 1
    assert text_start(layers, "bil") == 1
    assert text_start([*layers, Grid(2, 2, condition=True)], "bil") == 9
    assert text_start(layers, "layer3d") == 8
    with pytest.raises(ValueError, match="msrope, layer3d, bil"):
        layers_of(layers, "ring")  # type: ignore[arg-type]


def test_turning_keeps_lengths_and_depends_on_distance_alone() -> None:
    """fp64: <R(a) q, R(b) k> is a function of a - b on each axis."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 32, dtype=torch.float64, generator=generator) for _ in range(2))

    def score(a: list[int], b: list[int]) -> float:
        tables = [
            axes_table(torch.tensor([p]), dims=(8, 12, 12), theta=1e4, dtype=torch.float64) for p in (a, b)
        ]
        return float((apply_interleaved(q, *tables[0]) * apply_interleaved(k, *tables[1])).sum())

    assert abs(score([3, -4, 7], [1, 2, -5]) - score([13, 96, 0], [11, 102, -12])) < 1e-12
    assert abs(score([3, -4, 7], [1, 2, -5]) - score([3, -4, 7], [1, 2, -4])) > 1e-3
    cos, sin = axes_table(torch.tensor([[5, 6, 7]]), dims=(8, 12, 12), theta=1e4, dtype=torch.float64)
    assert torch.allclose(apply_interleaved(q, cos, sin).norm(), q.norm())
