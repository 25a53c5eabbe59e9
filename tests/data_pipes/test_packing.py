"""Targets, weights and positions of a pack are those of its documents alone (law 1, on the data's side)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringweave.data_pipes.pack import Pack, PackPlan, Piece
from ringweave.data_pipes.packing import materialise
from ringweave.data_pipes.planner import PackPlanner
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.segment import MODALITY_ID, Document, Role, Segment

#: Segment lengths, modality, role and weight of documents; enough to have conditions, empty segments, mixes.
KINDS: list[list[tuple[int, str, Role, float]]] = [
    [(4, "text", "condition", 0.0), (9, "image", "target", 1.0)],
    [(1, "text", "target", 1.0)],
    [(30, "video", "target", 0.5), (0, "text", "target", 1.0), (3, "text", "target", 2.0)],
    [(7, "audio", "target", 1.0), (5, "score", "condition", 0.7), (6, "text", "target", 1.0)],
    [],
    [(2, "rgba", "target", 0.25)],
]


def document(sample: int) -> Document:
    segments, token = [], 1000 * (sample + 1)
    for length, modality, role, weight in KINDS[sample]:
        ids = np.arange(token, token + length, dtype=np.int32)
        positions = np.stack([ids * 2, ids % 7, ids % 5, np.full(length, sample)], axis=1).astype(np.int32)
        segments.append(Segment(ids, modality, positions, role=role, weight=weight))
        token += length
    return Document(f"k{sample}", tuple(segments))


LENGTHS = {"s": np.asarray([len(document(i)) for i in range(len(KINDS))], np.int64)}


def alone(sample: int) -> dict[str, np.ndarray]:
    """Arrays [n] of a whole document, its shift written token by token."""
    tokens = [
        (
            int(seg.ids[i]),
            seg.positions[i],
            MODALITY_ID[seg.modality],
            seg.weight if seg.role == "target" else 0.0,
        )
        for seg in document(sample).segments
        for i in range(len(seg))
    ]
    following = [*tokens[1:], (-1, None, 0, 0.0)] if tokens else []
    return {
        "ids": np.asarray([t[0] for t in tokens]),
        "positions": np.asarray([t[1] for t in tokens]),
        "modality": np.asarray([t[2] for t in tokens]),
        "targets": np.asarray([t[0] for t in following]),
        "target_modality": np.asarray([t[2] for t in following]),
        "weights": np.asarray([t[3] for t in following], np.float32),
    }


def assert_pack(pack: Pack) -> None:
    at = 0
    for number, piece in enumerate(pack.plan.pieces):
        slots, inside = slice(at, at + len(piece)), slice(piece.start, piece.end)
        for name, whole in alone(piece.sample).items():
            np.testing.assert_array_equal(
                getattr(pack, name)[slots], whole[inside], err_msg=f"{name} of {piece}"
            )
        assert (pack.doc[slots] == number).all()
        assert pack.order[slots].tolist() == list(range(len(piece)))
        at += len(piece)
    for name, blank in [
        ("ids", 0), ("doc", -1), ("order", 0), ("positions", 0), ("modality", 0),
        ("targets", -1), ("target_modality", 0), ("weights", 0),
    ]:  # fmt: skip
        assert (getattr(pack, name)[at:] == blank).all(), f"{name} in the padding"


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), context=st.integers(1, 70), bins=st.integers(1, 4))
def test_packed_arrays_equal_those_of_the_documents_alone(seed: int, context: int, bins: int) -> None:
    planner = PackPlanner(lengths=LENGTHS, weights={"s": 1.0}, seed=seed, context=context, bins=bins)
    for _ in range(12):
        plan = planner.next()
        assert_pack(materialise(plan, lambda piece: document(piece.sample)))


def test_last_slot_of_a_cut_piece_predicts_the_first_token_of_the_next() -> None:
    plan = PackPlan(0, 8, (Piece("s", 0, 2, 0, 5), Piece("s", 0, 2, 29, 31)))
    pack = materialise(plan, lambda piece: document(piece.sample))
    assert pack.targets.tolist() == [3001, 3002, 3003, 3004, 3005, 3030, 3031, -1]
    assert pack.weights.tolist() == [0.5] * 5 + [2.0, 2.0, 0.0]
    assert pack.target_modality[4:7].tolist() == [
        MODALITY_ID["video"],
        MODALITY_ID["text"],
        MODALITY_ID["text"],
    ]
    assert pack.modality[4:8].tolist() == [MODALITY_ID["video"], MODALITY_ID["video"], MODALITY_ID["text"], 0]


def test_shapes_and_types() -> None:
    pack = materialise(PackPlan(0, 10, (Piece("s", 0, 1, 0, 1),)), lambda piece: document(piece.sample))
    expected = {
        "ids": np.int32, "doc": np.int32, "order": np.int32, "modality": np.int8, "targets": np.int32,
        "target_modality": np.int8, "weights": np.float32,
    }  # fmt: skip
    for name, dtype in expected.items():
        assert (getattr(pack, name).dtype, getattr(pack, name).shape) == (dtype, (10,)), name
    assert (pack.positions.dtype, pack.positions.shape) == (np.int32, (10, 4))


def test_pieces_beyond_their_document_or_the_context_are_refused() -> None:
    with pytest.raises(DataError, match="beyond the end"):
        materialise(PackPlan(0, 40, (Piece("s", 0, 0, 0, 14),)), lambda piece: document(piece.sample))
    with pytest.raises(DataError, match="context of 4"):
        materialise(PackPlan(0, 4, (Piece("s", 0, 0, 0, 13),)), lambda piece: document(piece.sample))
