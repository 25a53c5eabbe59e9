"""Tensor parallelism: both ways to hold hidden states give the numbers of one process, for any number of tokens."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from ringweave.data_pipes.pack import packs_for_rank
from ringweave.parallel.mesh import Mesh
from ringweave.parallel.spawn import run_ranks
from ringweave.parallel.tensor import ColumnLinear, HiddenStates, RowLinear, TensorGroup, VocabEmbedding
from ringweave.pretrain import verify
from ringweave.pretrain.batch import collate
from ringweave.pretrain.engine import TorchEngine
from ringweave.pretrain.parallelize import build_model

pytestmark = pytest.mark.slow  # minutes of several processes

WIDTH, INNER = 4, 9
#: One token, fewer than ranks, as many, primes, a batch of rows.
SIZES = [(1, 1), (1, 2), (1, 3), (1, 7), (1, 61), (3, 11)]


class Counted(TorchDispatchMode):
    """Counts ops of our namespace, in the forward and in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "ringweave":
            self.calls[func._opname] += 1
        return func(*args, **(kwargs or {}))


# --- the pieces, three ranks ---------------------------------------------------------------------------------


def _weights(vocab: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(vocab)
    shapes = {
        "embed": (vocab, WIDTH),
        "norm": (WIDTH,),
        "up": (INNER, WIDTH),
        "down": (WIDTH, INNER),
        "final": (WIDTH,),
    }
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for name, shape in shapes.items()
    }


def _plain(ids: Tensor, w: dict[str, Tensor]) -> Tensor:
    """Embedding, one block with a norm and a residual, a final norm: all a model does around its matrices."""
    x = functional.embedding(ids, w["embed"])
    x = x + functional.silu(functional.rms_norm(x, (WIDTH,), w["norm"], 1e-6) @ w["up"].t()) @ w["down"].t()
    return functional.rms_norm(x, (WIDTH,), w["final"], 1e-6)


def _block(
    ids: Tensor, vocab: int, tp: TensorGroup, sharded: bool, summed: bool
) -> tuple[Tensor, dict[str, Any]]:
    """(output of all tokens, {name: (gradient, dim it is split along or None)}) of `_plain` on this rank."""
    states = HiddenStates(tp, sharded)
    whole = {name: w.detach() for name, w in _weights(vocab).items()}

    def part(name: str, dim: int) -> nn.Parameter:
        pieces = whole[name].chunk(tp.size, dim)
        empty = whole[name].narrow(dim, 0, 0)
        return nn.Parameter((pieces[tp.rank] if tp.rank < len(pieces) else empty).clone())

    embed = VocabEmbedding(part("embed", 0), tp, states.leave)
    embed.start = tp.rank * -(-vocab // tp.size)  # the module was given its rows, not the whole table
    up, down = ColumnLinear(part("up", 0)), RowLinear(part("down", 1), states.leave)
    norm, final = (nn.Parameter(whole[name].clone()) for name in ("norm", "final"))
    x = embed(ids)
    shape = x.shape
    tokens = ids.numel()
    exact = tokens if summed else None  # with and without the slots behind the last token
    x = x + down(functional.silu(up(states.enter(functional.rms_norm(x, (WIDTH,), norm, 1e-6), exact))))
    out = states.whole(functional.rms_norm(x, (WIDTH,), final, 1e-6), tokens)
    out = out.reshape(*ids.shape, WIDTH)
    (out * _wanted(out.shape)).sum().backward()
    grads = {"embed": (embed.weight.grad, 0), "up": (up.weight.grad, 0), "down": (down.weight.grad, 1)}
    grads |= {"norm": (norm.grad, None), "final": (final.grad, None)}
    return out.detach(), {"grads": grads, "shape": tuple(shape)}


def _wanted(shape: torch.Size) -> Tensor:
    return torch.linspace(-1, 1, shape.numel(), dtype=torch.float64).view(shape)


def _pieces_worker() -> list[dict[str, Any]]:
    tp = TensorGroup(dist.group.WORLD)
    rows = []
    for vocab in (97, 4):  # 33 + 33 + 31 rows; 2 + 2 + 0
        for rows_of, length in SIZES:
            ids = torch.randint(vocab, (rows_of, length), generator=torch.Generator().manual_seed(length))
            reference = _weights(vocab)
            truth = _plain(ids, reference)
            (truth * _wanted(truth.shape)).sum().backward()
            for sharded, exchange, exact in ((True, True, True), (True, False, False), (False, True, True)):
                tp.exchange = exchange
                out, seen = _block(ids, vocab, tp, sharded, exact)
                worst = float((out - truth).abs().max())
                for name, (grad, dim) in seen["grads"].items():
                    whole = reference[name].grad
                    assert whole is not None
                    mine = whole
                    if dim is not None:
                        pieces = whole.chunk(tp.size, dim)
                        mine = pieces[tp.rank] if tp.rank < len(pieces) else whole.narrow(dim, 0, 0)
                    elif sharded:  # a rank's share, to be summed by `sum_gradients`
                        grad = grad.clone()
                        dist.all_reduce(grad)
                    assert grad.shape == mine.shape
                    worst = max(worst, float((grad - mine).abs().max()) if mine.numel() else 0.0)
                expected = (1, -(-ids.numel() // tp.size), WIDTH) if sharded else (*ids.shape, WIDTH)
                rows.append(
                    {
                        "case": (vocab, rows_of, length, sharded),
                        "worst": worst,
                        "shape": seen["shape"] == expected,
                    }
                )
    return rows


def test_any_number_of_tokens_and_any_vocabulary_on_three_ranks() -> None:
    for rows in run_ranks(3, _pieces_worker, timeout=200):
        assert len(rows) == 2 * len(SIZES) * 3
        for row in rows:
            assert row["shape"], row
            assert row["worst"] <= 1e-12, row


# --- whole models, four ranks --------------------------------------------------------------------------------

NORMS = ("sequence", "replicated")
LAYOUTS: list[dict[str, Any]] = [
    {**axes, "norms": norms}
    for axes in ({"tp": 4}, {"dp": 2, "tp": 2}, {"pp": 2, "tp": 2}, {"tp": 2, "sp": 2})
    for norms in NORMS
]


def _engine(layout: dict[str, int], norms: str, micro_batch: int = 1) -> tuple[TorchEngine, Any]:
    """An engine with gradients of the first packs, two a pass if asked: 122 tokens."""
    mesh = Mesh.build(layout)
    model = build_model(verify.SHAPE, mesh, seed=1, rope_theta=1e4, norms=norms)
    engine = TorchEngine(model, mesh, micro_batch=micro_batch)
    packs = verify.make_packs()
    mine = packs_for_rank(0, len(packs), mesh.rank_on["dp"], mesh.sizes["dp"])
    return engine, collate([packs[i] for i in mine])


def _norm_gradients(layout: dict[str, int], norms: str) -> tuple[bool, float]:
    """Whether norm gradients have the same bits on all tp ranks, and their largest error against one process."""
    engine, batch = _engine(layout, norms, micro_batch=2)
    engine.forward_backward(batch)
    truth = verify._reference(verify.make_packs(), "fp32")[1]
    same, worst = True, 0.0
    for name, p in engine.model.named_parameters():
        if name.endswith("norm.weight"):
            assert isinstance(p.grad, DTensor)
            mine = p.grad.full_tensor()
            everyone = [torch.empty_like(mine) for _ in range(engine.mesh.sizes["tp"])]
            dist.all_gather(everyone, mine.contiguous(), group=engine.mesh.group("tp"))
            same &= all(torch.equal(mine, other) for other in everyone)
            worst = max(worst, float((mine.double() - truth[name]).norm() / truth[name].norm()))
    return same, worst


def _traffic(norms: str) -> dict[str, Any]:
    """Collectives of one pass forward and backward, and the tokens between blocks."""
    engine, batch = _engine({"tp": 4}, norms)
    between: list[tuple[int, ...]] = []
    for layer in engine.model.layers.values():
        layer.register_forward_hook(lambda module, args, out: between.append(tuple(out.shape)))
    with Counted() as forward:
        nll = engine.model(batch.ids[:1], **batch.inputs(slice(0, 1)))
    with Counted() as backward:
        nll.sum().backward()
    return {"between": between, "forward": dict(forward.calls), "backward": dict(backward.calls)}


def _models_worker() -> dict[str, Any]:
    return {
        "parity": verify._layout_worker(LAYOUTS, "fp32"),
        "exact": verify._layout_worker([{"tp": 4, "norms": "sequence"}], "fp64"),
        "norms": [_norm_gradients(layout, n) for layout in ({"tp": 4}, {"dp": 2, "tp": 2}) for n in NORMS],
        "traffic": {norms: _traffic(norms) for norms in NORMS},
    }


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return run_ranks(4, _models_worker, timeout=400)[0]


def test_both_settings_of_norms_equal_one_process(models: dict[str, Any]) -> None:
    assert len(models["parity"]) == len(LAYOUTS)
    for row in models["parity"]:
        assert row["holds"], row


def test_sequence_parallel_norms_leave_no_room_for_a_wrong_formula(models: dict[str, Any]) -> None:
    (row,) = models["exact"]
    assert row["max_rel_loss_diff"] <= 1e-12, row
    assert row["max_rel_grad_diff"] <= 1e-10, row


def test_norm_gradients_are_identical_on_tensor_parallel_ranks_and_whole(models: dict[str, Any]) -> None:
    """A norm that saw a shard of the tokens has a share of its gradient; every rank must end up with the sum."""
    assert len(models["norms"]) == 4
    for same, worst in models["norms"]:
        assert same
        assert worst <= 1e-5


def test_sequence_parallel_blocks_hold_their_share_and_cost_one_gather_and_one_scatter(
    models: dict[str, Any],
) -> None:
    """61 tokens on 4 ranks: 16 slots each. Two halves a layer, the embedding scatters, the head gathers."""
    seen, layers = models["traffic"]["sequence"], verify.SHAPE.layers
    assert seen["between"] == [(1, 16, verify.SHAPE.width)] * layers
    attention = {"packed_attention": layers}
    assert seen["forward"] == attention | {
        "gather_rows": 2 * layers + 1,
        "reduce_scatter_rows": 2 * layers + 1,
    }
    # The head's gradient is whole on every rank already: its gather costs nothing on the way back.
    assert seen["backward"]["gather_rows"] == 2 * layers + 1
    assert seen["backward"]["reduce_scatter_rows"] == 2 * layers
    assert "sum_over_ranks" not in seen["backward"]


def test_replicated_hidden_states_cost_one_all_reduce_a_half_each_way(models: dict[str, Any]) -> None:
    seen, layers = models["traffic"]["replicated"], verify.SHAPE.layers
    assert seen["between"] == [(1, verify.CONTEXT, verify.SHAPE.width)] * layers
    assert seen["forward"] == {"packed_attention": layers, "sum_over_ranks": 2 * layers + 1}
    assert seen["backward"]["sum_over_ranks"] == 2 * layers
