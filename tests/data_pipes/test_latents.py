"""Continuous latents from segments through token caches into packs: each at its placeholder, none lost."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent))
from token_fixtures import same, write_shard

from ringweave.data_pipes.pack import PackPlan, Piece
from ringweave.data_pipes.packing import materialise
from ringweave.data_pipes.token_block import BlockWriter, TokenBlock, join_blocks
from ringweave.data_pipes.token_cache import TokenCache, build_cache
from ringweave.pretrain.batch import collate
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.manifest import CONTROL
from ringweave.tokenizers.segment import LATENT, Document, Segment
from ringweave.tokenizers.set import TokenizerSet

NONE = TokenizerSet({})
Z = 4


def words(count: int) -> Segment:
    places = np.zeros((count, 4), np.int32)
    return Segment(np.arange(300, 300 + count, dtype=np.int32), "text", places, "condition", "causal", 0.0)


def grid(seed: int, *shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=(*shape, Z)).astype(np.float32)


def document(seed: int) -> Document:
    """A caption, a layered picture of 2 x (2, 3), a picture of (1, 2), and a caption that is trained on."""
    layers = NONE.latents_segment(grid(seed, 2, 2, 3), modality="rgba", weight=0.5)
    picture = NONE.latents_segment(grid(seed + 50, 1, 1, 2))
    tail = Segment(np.array([301, 302], np.int32), "text", np.zeros((2, 4), np.int32))
    return NONE.document(f"k{seed}", [words(3 + seed % 3), layers, picture, tail])


def test_placeholders_stand_in_rows_of_their_picture() -> None:
    segment = NONE.latents_segment(grid(0, 2, 2, 3), modality="rgba", weight=0.5)
    lat, eol, layer = LATENT, CONTROL["eol"], CONTROL["layer"]
    rows = [lat, lat, lat, eol, lat, lat, lat, eol]
    assert segment.ids.tolist() == [CONTROL["bor"], *rows, layer, *rows, CONTROL["eor"]]
    assert segment.attends == "bidirectional"
    places = segment.positions[segment.ids == LATENT]
    assert places.tolist() == [[0, y, x, z] for z in range(2) for y in range(2) for x in range(3)]
    assert segment.latents is not None
    assert (segment.latents == grid(0, 2, 2, 3).reshape(-1, Z)).all()
    clip = NONE.latents_segment(grid(0, 3, 1, 1), modality="video", times=np.array([1.0, 1.2, 2.0]))
    assert clip.positions[clip.ids == LATENT][:, 0].tolist() == [0, 5, 25]


@pytest.mark.parametrize(
    ("values", "more", "said"),
    [
        (np.zeros((1, 2, 2), np.float32), {}, r"float32 \[T, h, w, Z\]"),
        (np.zeros((1, 2, 2, 4)), {}, "float64"),
        (np.full((1, 2, 2, 4), np.nan, np.float32), {}, "not finite"),
        (np.zeros((2, 2, 2, 4), np.float32), {}, "2 grids of latents are no image"),
        (np.zeros((2, 2, 2, 4), np.float32), {"modality": "video"}, "2 frames of latents need"),
        (np.zeros((1, 2, 2, 4), np.float32), {"modality": "audio"}, "no audio"),
    ],
)
def test_bad_latents_are_named(values: Any, more: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        NONE.latents_segment(values, **more)


def test_a_segment_holds_a_latent_for_each_placeholder() -> None:
    ids, places = np.array([LATENT, 5, LATENT], np.int32), np.zeros((3, 4), np.int32)
    Segment(ids, "image", places, latents=np.zeros((2, Z), np.float32))
    with pytest.raises(ValueError, match=r"float32 \[2, Z\]"):
        Segment(ids, "image", places, latents=np.zeros((3, Z), np.float32))


def plain(key: str) -> Document:
    return NONE.document(key, [words(4)])


def block(*documents: Document) -> TokenBlock:
    writer = BlockWriter()
    for each in documents:
        writer.add(each.key, each)
    return writer.block("test")


def test_blocks_carry_latents_between_processes_and_join() -> None:
    documents = [document(0), plain("p"), document(1)]
    whole = block(*documents)
    back = TokenBlock.from_bytes(whole.to_bytes(), "test")
    joined = join_blocks([block(plain("a")), back, block(document(2))], "test")
    for place, each in enumerate([plain("a"), *documents, document(2)]):
        assert same(joined.document(place), each)
    assert "latents" not in block(plain("a")).tensors()
    wide = NONE.document("w", [NONE.latents_segment(np.zeros((1, 1, 1, Z + 1), np.float32))])
    for mixed in (join_blocks([back, block(wide)], "test"), block(*documents, wide)):
        assert same(mixed.document(1), plain("p"))
        assert same(mixed.document(2), document(1))
        assert same(mixed.document(3), wide)


def test_one_changed_latent_is_found() -> None:
    tensors = dict(block(document(0), document(1)).tensors())
    tensors["latents"] = tensors["latents"].copy()
    tensors["latents"][-1] += 1e-3
    changed = TokenBlock.of(tensors, "test")
    assert same(changed.document(0), document(0))
    with pytest.raises(DataError, match="damaged token cache"):
        changed.document(1)
    for bad in ({"latents": tensors["latents"][:-1]}, {"latent_offsets": tensors["latent_offsets"][:-1]}):
        with pytest.raises(ValueError, match="disagree"):
            TokenBlock.of(tensors | bad, "test")


class Latents:
    """Gives every sample the document of its number."""

    def __init__(self) -> None:
        self.manifest = SimpleNamespace(hash="0" * 64)

    def text_segment(self, text: str, **_: Any) -> Segment:
        return NONE.latents_segment(grid(int(text), 1, 2, 2))

    def document(self, key: str, segments: list[Segment]) -> Document:
        return NONE.document(key, segments)


def test_a_token_cache_gives_back_latents(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "text-0.tar", [{"txt": str(n).encode()} for n in range(5)])
    build_cache(shard, ["text"], Latents())  # type: ignore[arg-type]
    cache = TokenCache.open(shard, ["text"], "0" * 64)
    for n in range(5):
        held = cache.document(n).segments[0].latents
        assert held is not None and (held == grid(n, 1, 2, 2).reshape(-1, Z)).all()


@pytest.mark.parametrize("cut", [None, 7, 12])
def test_packs_hold_each_latent_at_its_slot(cut: int | None) -> None:
    """Also where a document is split between two packs; its loss stands in its own slot, where no id is asked for."""
    first, second = document(0), document(1)
    ids = np.concatenate([s.ids for s in first.segments])
    end = len(ids)
    spans = [(0, end)] if cut is None else [(0, cut), (cut, end)]
    found, weights = [], []
    for start, stop in spans:
        pieces = (Piece("s", 0, 1, 0, len(second)), Piece("s", 0, 0, start, stop))
        plan = PackPlan(0, 80, pieces)
        pack = materialise(plan, lambda piece: second if piece.sample else first)
        assert pack.latents is not None and pack.latent_weights is not None
        mine = slice(len(second), len(second) + stop - start)
        here = ids[start:stop] == LATENT
        assert (pack.latents[mine][~here] == 0).all()
        found.append(pack.latents[mine][here])
        weights.append(pack.latent_weights[mine][here])
        targets = pack.targets[mine]
        assert (targets != LATENT).all()
        after = np.append(ids[start + 1 : stop] == LATENT, False)
        assert (targets[after] == -1).all() and (pack.weights[mine][after] == 0).all()
    wanted = [grid(0, 2, 2, 3).reshape(-1, Z), grid(50, 1, 1, 2).reshape(-1, Z)]
    assert (np.concatenate(found) == np.concatenate(wanted)).all()
    assert np.concatenate(weights).tolist() == [0.5] * 12 + [1.0] * 2


def test_a_model_over_ids_refuses_packs_with_latents() -> None:
    pack = materialise(PackPlan(0, 64, (Piece("s", 0, 0, 0, len(document(0))),)), lambda _: document(0))
    with pytest.raises(DataError, match="continuous latents"):
        collate([pack])
