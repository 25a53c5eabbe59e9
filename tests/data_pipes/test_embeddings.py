"""Vectors of words from a record through documents, token caches and packs: each at its slot, bad ones named."""

from __future__ import annotations

import io
import json
import pickle
import sys
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

sys.path.append(str(Path(__file__).parent))
from token_fixtures import same, write_shard

from ringweave.data_pipes.documents import encode_sample, parse_plan
from ringweave.data_pipes.embeddings import MOST_VECTORS, read_embeddings
from ringweave.data_pipes.pack import PackPlan, Piece
from ringweave.data_pipes.packing import materialise
from ringweave.data_pipes.sample import Sample
from ringweave.data_pipes.token_block import BlockWriter, TokenBlock, join_blocks
from ringweave.data_pipes.token_cache import TokenCache, build_cache, cache_path
from ringweave.data_pipes.token_files import DamagedTokens, open_tokens, plan_hash, read_metadata, stamp_of
from ringweave.data_pipes.token_probe import probe_length
from ringweave.launch.data_check import decode_member
from ringweave.pretrain.batch import collate
from ringweave.tokenizers import bare
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.segment import LATENT, MODALITY_ID, Document, Segment

E, Z, PLAN = 5, 4, ("embeddings", "latents:layers")


class Pooling:
    """Cells are means of 4 x 4 pixels."""

    def __init__(self) -> None:
        self.manifest = SimpleNamespace(hash="0" * 64)
        self.codecs = {"latents": SimpleNamespace(patch=4)}

    def text_segment(self, text: str, **_: Any) -> Segment:
        return Segment(
            np.arange(40, 40 + len(text), dtype=np.int32), "text", np.zeros((len(text), 4), np.int32)
        )

    def encode_layer(self, layer: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        height, width = layer.shape[0] // 4, layer.shape[1] // 4
        return layer.reshape(height, 4, width, 4, 4).mean((1, 3)).astype(np.float32)


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 12, 4), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def npy(values: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, values, **options)
    return file.getvalue()


def vectors(seed: int, count: int, width: int = E) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def record(data: bytes, name: str = "embeddings.npy") -> Sample:
    return Sample("k7", {"layer0.png": png(0), "layer1.png": png(1), name: data}, "s-0000.tar", 7)


def encoded(data: bytes, *plan: str, name: str = "embeddings.npy") -> Document:
    return encode_sample(record(data, name), plan or PLAN, Pooling())  # type: ignore[arg-type]


# ---- documents ----


@pytest.mark.parametrize("kind", ["float32", "float16", ">f4", "fortran"])
def test_a_document_begins_with_a_placeholder_for_each_vector(kind: str) -> None:
    values = vectors(0, 6)
    stored = np.asfortranarray(values) if kind == "fortran" else values.astype(kind)
    document = encoded(npy(stored))
    words, first, second = document.segments
    assert (words.ids == LATENT).all() and len(words) == 6
    assert (words.modality, words.role, words.attends, words.weight) == ("text", "condition", "causal", 0.0)
    assert words.positions.tolist() == [[n, 0, 0, 0] for n in range(6)]
    assert words.latents is not None and words.latents.dtype == np.float32
    assert np.array_equal(words.latents, stored.astype(np.float32))
    assert [g.positions[0, 3] for g in (first, second)] == [0, 1] and first.role == "target"
    assert bare.shape_of(words) is None and bare.shape_of(first) == (1, 2, 3)
    named = encoded(npy(values), "latents:layer0?", "embeddings:t5.npy?", "latents:layer1", name="t5.npy")
    assert [(len(s), s.role) for s in named.segments] == [(6, "condition"), (6, "target"), (6, "condition")]


class _Trap:
    def __reduce__(self) -> Any:
        raise AssertionError("something was unpickled")


def header(shape: Any, descr: str = "<f4", body: bytes = b"") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue() + body


BROKEN = vectors(3, 4)
BROKEN[2, 1] = np.inf


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (npy(np.array([[{}]], object), allow_pickle=True), "Python objects"),
        (pickle.dumps([1.0]), "no .npy file"),
        (b"", "no .npy file"),
        (npy(vectors(0, 3))[:40], "no .npy file"),
        (b"\x93NUMPY\x01\x00\x10\x00" + b"(" * 16, "no .npy file"),
        (npy(vectors(0, 3).astype(np.float64)), r"float64 \[3, 5\]"),
        (npy(np.zeros((3, E), np.int32)), "int32"),
        (npy(np.zeros(5, np.float32)), r"float32 \[5\]"),
        (npy(np.zeros((1, 3, E), np.float32)), r"float32 \[1, 3, 5\]"),
        (npy(np.zeros((0, E), np.float32)), "0 vectors"),
        (npy(np.zeros((3, 0), np.float32)), "0 numbers"),
        (npy(np.zeros((MOST_VECTORS + 1, 1), np.float16)), "65537 vectors"),
        (header((10**15, E)), "1000000000000000 vectors"),
        (header((60_000, 60_000)), "14400000000 bytes, 0 are there"),  # 14 GB are never asked for
        (npy(vectors(0, 3))[:-1], "60 bytes, 59 are there"),
        (npy(vectors(0, 3)) + b"x", "61 are there"),
        (npy(BROKEN), r"not finite.*(?s:.*)first at \[2, 1\]"),
    ],
)
def test_bad_vectors_are_named_with_their_sample(data: bytes, said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        encoded(data)
    assert "k7" in caught.value.where and caught.value.where.endswith(":embeddings.npy")
    with pytest.raises(DataError, match=said):
        decode_member("embeddings.npy", data, where="x")


def test_nothing_is_unpickled() -> None:
    trap = np.empty((1, 1), object)
    trap[0, 0] = [_Trap]
    with pytest.raises(DataError, match="Python objects"):
        read_embeddings(npy(trap, allow_pickle=True), where="x")


def test_a_record_without_its_member_is_an_error_not_an_empty_prompt() -> None:
    with pytest.raises(DataError, match=r"'embeddings' finds no member embeddings\.npy") as caught:
        encoded(npy(vectors(0, 2)), name="other.npy")
    assert "k7" in caught.value.where and "other.npy" in caught.value.why
    with pytest.raises(DataError, match=r"'embeddings:t5\.npy' finds no member t5\.npy"):
        encoded(npy(vectors(0, 2)), "embeddings:t5.npy", "latents:layers")


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (["caption", "embeddings", "latents:layers"], "'embeddings' and 'caption' in one plan"),
        (["embeddings", "text?", "latents:layers"], "in one plan"),
        (["embeddings", "embeddings:t5.npy", "latents:layers"], "in one plan"),
        (["embeddings", "image"], "stands without latents"),
        (["embeddings?", "text"], "stands without latents"),
        (["embeddings:t5.npz", "latents:layers"], r"ends in \.npy"),
        (["embeddings:", "latents:layers"], "behind the colon"),
        (["embeddings", "latents:layers?"], "no latents to train on"),
    ],
)
def test_plans_that_make_no_document(plan: list[str], said: str) -> None:
    with pytest.raises(DataError, match=said):
        parse_plan(plan)


def test_a_header_tells_the_length() -> None:
    for count in (1, 9):
        sample = record(npy(vectors(0, count)))
        assert probe_length(sample, PLAN, Pooling()) == count + 12 == len(encoded(npy(vectors(0, count))))
    with pytest.raises(DataError, match="Python objects"):
        probe_length(record(npy(np.array([[{}]], object), allow_pickle=True)), PLAN, Pooling())


# ---- blocks and caches: latents of two widths in one document ----


def document(seed: int, count: int = 3, width: int = E, rows: int = 2) -> Document:
    cells = np.random.default_rng(seed).normal(size=(1, rows, 3, Z)).astype(np.float32)
    return bare.document(
        f"k{seed}", bare.embedding_segment(vectors(seed, count, width)), [bare.latent_segment(cells)]
    )


def plain(key: str) -> Document:
    return Document(key, (Segment(np.arange(30, 34, dtype=np.int32), "text", np.zeros((4, 4), np.int32)),))


def block(*documents: Document) -> TokenBlock:
    writer = BlockWriter()
    for each in documents:
        writer.add(each.key, each)
    return writer.block("test")


def test_blocks_hold_latents_of_two_widths() -> None:
    documents = [document(0), plain("p"), document(1, count=1), document(2, width=7)]
    back = TokenBlock.from_bytes(block(*documents).to_bytes(), "test")
    joined = join_blocks([block(plain("a")), back, block(document(4))], "test")
    for n, each in enumerate(documents):
        assert same(back.document(n), each)
        assert same(joined.document(n + 1), each)
    assert same(joined.document(0), plain("a"))
    assert same(joined.document(5), document(4))
    tensors = back.tensors()
    assert tensors["segments"][:, 4].tolist() == [E, Z, 0, E, Z, 7, Z]
    assert tensors["latent_offsets"].tolist() == [0, 39, 39, 68, 113]
    for at in (0, 14, 15, 38):  # of a word's vector and of a cell, from first to last
        changed = {**tensors, "latents": tensors["latents"].copy()}
        changed["latents"][at] += 1e-3
        damaged = TokenBlock.of(changed, "test")
        assert same(damaged.document(2), documents[2])
        with pytest.raises(DataError, match="damaged token cache"):
            damaged.document(0)
    for bad in (
        {"segments": tensors["segments"][:, :4]}, {"latents": tensors["latents"][:-1]},
        {"latents": tensors["latents"].reshape(-1, 1)}, {"segments": -tensors["segments"]},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="disagree"):
            TokenBlock.of({**tensors, **bad}, "test")


def test_blocks_without_latents_are_as_they_were() -> None:
    writer = BlockWriter()
    for key in "ab":
        writer.add(key, plain(key))
    writer.skip("c", "why")
    tensors = writer.tensors()
    bytes_before = "7979327e07d2388b"  # of the commit before latents of two widths
    assert sha256(TokenBlock.of(tensors, "x").to_bytes()).hexdigest()[:16] == bytes_before
    assert tensors["segments"].shape == (2, 4) and "latents" not in tensors
    assert plan_hash(("caption", "image"), "0" * 64) == "63525331ec91", "caches of ids keep their names"


def test_a_token_cache_gives_back_vectors_and_cells(tmp_path: Path) -> None:
    members = [{"layer0.png": png(n), "embeddings.npy": npy(vectors(n, 2 + n))} for n in range(4)]
    shard = write_shard(tmp_path / "s-0.tar", members)
    tokenizers: Any = Pooling()
    path = build_cache(shard, PLAN, tokenizers)
    cache = TokenCache.open(shard, PLAN, "0" * 64)
    assert cache.lengths.tolist() == [8, 9, 10, 11]
    for n in range(4):
        words, grid = cache.document(n).segments
        assert words.latents is not None and np.array_equal(words.latents, vectors(n, 2 + n))
        assert grid.latents is not None and grid.latents.shape == (6, Z)
    from safetensors import safe_open

    assert read_metadata(safe_open(path, framework="numpy"))["format"] == "ringweave-tokens/2"


def test_caches_of_the_first_form_are_made_anew_and_never_misread(tmp_path: Path) -> None:
    """Their name had no format in it; a file of theirs under the new name is refused."""
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    shard = write_shard(tmp_path / "s-0.tar", [{"layer0.png": png(0), "embeddings.npy": npy(vectors(0, 2))}])
    tokenizers: Any = Pooling()
    path = build_cache(shard, PLAN, tokenizers)
    old = sha256(json.dumps(["0" * 64, list(PLAN)]).encode()).hexdigest()[:12]
    assert old not in path.name and path == cache_path(shard, PLAN, "0" * 64)
    about = read_metadata(safe_open(path, framework="numpy"))
    tensors = load_file(path)
    save_file(tensors, path, metadata={"ringweave": json.dumps({**about, "format": "ringweave-tokens/1"})})
    with pytest.raises(DamagedTokens, match="tokens/1") as caught:
        open_tokens(path, stamp=stamp_of(shard), shard=shard, plan=PLAN, manifest_hash="0" * 64)
    assert "known 'ringweave-tokens/2'" in caught.value.why
    build_cache(shard, PLAN, tokenizers)
    assert len(TokenCache.open(shard, PLAN, "0" * 64).document(0)) == 8


# ---- packs ----


def packed(documents: list[Document], spans: list[tuple[int, int, int]], context: int = 64) -> Any:
    pieces = tuple(Piece("s", 0, n, a, b) for n, a, b in spans)
    return materialise(PackPlan(0, context, pieces), lambda piece: documents[piece.sample])


def test_a_pack_holds_a_vector_for_each_slot_of_a_word() -> None:
    documents = [document(0), plain("p"), document(1, count=6)]
    pack = packed(documents, [(0, 0, 9), (1, 0, 4), (2, 0, 12)])
    at = np.flatnonzero((pack.ids == LATENT) & (pack.modality == MODALITY_ID["text"]))
    assert at.tolist() == [0, 1, 2, *range(13, 19)]
    assert np.array_equal(pack.embeddings, np.concatenate([vectors(0, 3), vectors(1, 6)]))
    assert pack.latents.shape == (64, Z) and not pack.latents[at].any() and not pack.latent_weights[at].any()
    assert not pack.weights[at].any() and (pack.targets[at[:-1]] != LATENT).all()
    assert [(g.at, g.cells, g.doc) for g in pack.grids] == [(3, 6, 0), (19, 6, 2)]
    missing = materialise(pack.plan, lambda piece: None if piece.sample == 0 else documents[piece.sample])
    assert missing.embeddings is not None and np.array_equal(missing.embeddings, vectors(1, 6))
    cut = packed(documents, [(2, 0, 2), (2, 2, 12)])
    assert np.array_equal(cut.embeddings, vectors(1, 6))
    assert packed([plain("p")], [(0, 0, 4)]).embeddings is None
    with pytest.raises(DataError, match="continuous latents"):
        collate([pack])


def test_two_widths_of_vectors_in_a_pack_are_named() -> None:
    with pytest.raises(DataError, match="embeddings of 7 and of 5 numbers") as caught:
        packed([document(0), document(1, width=7)], [(0, 0, 9), (1, 0, 9)])
    assert caught.value.where == "s sample 1"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.zeros((2, E)), "float64"),
        (np.zeros((0, E), np.float32), r"\[0, 5\]"),
        (np.zeros((2, 2, E), np.float32), r"\[2, 2, 5\]"),
        (BROKEN, "not finite"),
    ],
)
def test_segments_of_bad_vectors(values: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        bare.embedding_segment(values)
