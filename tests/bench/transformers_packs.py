"""Claim 5: tokens per second of a 20M-parameter Llama against a plain transformers + accelerate loop.

On one process and on dp2 (one thread a process, fp32, AdamW, clipping): at least the rival's speed on the same
packs, and 1.5 x its speed on the same documents padded to the longest of each batch.

The rival at its best and right: `LlamaForCausalLM` with `use_cache=False`, no attention mask and `position_ids`
that restart with each document. By default (with a cache, or any attention mask) transformers 5.24 lets documents
of a pack see each other, without a word; flash-attn, its faster way, has no CPU, and FlexAttention has no backward
there. "sdpa" was faster than "eager". Each of the first steps must give the loss of ours, so no side does less.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import _harness as bench
import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from ringweave.data_pipes.pack import Pack, Piece, packs_for_rank
from ringweave.data_pipes.planner import PackPlanner
from ringweave.data_pipes.stream import PackStream
from ringweave.parallel.grad_norm import world_sum
from ringweave.parallel.mesh import Mesh
from ringweave.pretrain.batch import Batch, collate
from ringweave.pretrain.engine import TorchEngine, make_adamw, world_loss
from ringweave.pretrain.export import llama_name
from ringweave.pretrain.models.lwm import LWMShape
from ringweave.pretrain.parallelize import build_parts
from ringweave.tokenizers.segment import Document, Segment

CLAIM = "5: tokens/s of a 20M Llama against transformers + accelerate"
ADAMW: dict[str, Any] = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
CLIP, THETA = 1.0, 1e4


@dataclass(frozen=True, slots=True)
class Size:
    """Model and work of a step. batch: packs over all ranks; micro_batch: packs in one forward pass."""

    vocab: int = 8192
    layers: int = 9
    width: int = 384
    heads: int = 6
    kv_heads: int = 2
    ffn: int = 1024
    context: int = 1024
    batch: int = 4
    micro_batch: int = 2

    def shape(self) -> LWMShape:
        """As our model wants it."""
        names = ("vocab", "layers", "width", "heads", "kv_heads", "ffn")
        return LWMShape(**{name: getattr(self, name) for name in names})


TINY = Size(vocab=256, layers=2, width=64, heads=4, kv_heads=2, ffn=128, context=128, batch=4, micro_batch=2)


class LogNormalDocuments:
    """Random ids in documents of log-normal length, as texts from the web are: median context/5, sigma 1."""

    digest = "log-normal"

    def __init__(self, vocab: int, context: int, count: int = 4000) -> None:
        draws = np.random.RandomState(0).lognormal(np.log(context / 5), 1.0, size=count)
        self.lengths = {"text": np.clip(draws, 8, context).astype(np.int64)}
        self.vocab = vocab

    def document(self, piece: Piece) -> Document:
        """The document a piece is cut from."""
        length = int(self.lengths["text"][piece.sample])
        ids = np.random.RandomState(piece.sample).randint(0, self.vocab, size=length).astype(np.int32)
        return Document(
            key=str(piece.sample), segments=(Segment(ids, "text", np.zeros((length, 4), np.int32)),)
        )


def our_step(batches: Sequence[Batch], size: Size, world: int) -> Callable[[], float]:
    """A training step of ours, as the trainer makes it; gives the loss."""
    mesh = Mesh.build({"dp": world}, replicate=world)  # whole copies, as the rival's DDP keeps
    parts = build_parts(size.shape(), mesh, seed=0, rope_theta=THETA)
    engine = TorchEngine(parts, mesh, micro_batch=size.micro_batch, optimizer=make_adamw(parts, **ADAMW))
    calls = iter(range(10**9))

    def step() -> float:
        sums, counts = engine.forward_backward(batches[next(calls) % len(batches)])
        shared = world_sum(torch.cat([sums, engine.grad_squares()[None]]))
        engine.clip(float(shared[-1]) ** 0.5, CLIP)
        engine.step(ADAMW["lr"])
        return world_loss(shared[:-1], counts, {}, normalize="modality")

    return step


def rival_step(batches: Sequence[list[dict[str, Any]]], size: Size, world: int) -> Callable[[], float]:
    """A training step of the rival's; gives the loss.

    batches: of each step the micro-batches' inputs, targets (-100: none) under "labels", and "num_items_in_batch".
    """
    from accelerate import Accelerator

    rank = dist.get_rank()
    if world > 1:  # else it must not wrap the model at all
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    accelerator = Accelerator(cpu=True)
    if accelerator.num_processes != world or torch.get_num_threads() != 1:
        seen = f"{accelerator.num_processes} processes, {torch.get_num_threads()} threads"
        raise RuntimeError(f"accelerate made it {seen}, not {world} of one thread")
    llama = make_llama(size)
    matrices = [p for p in llama.parameters() if p.ndim > 1]
    vectors = [p for p in llama.parameters() if p.ndim <= 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    model, optimizer = accelerator.prepare(llama, torch.optim.AdamW(groups, **ADAMW))
    calls = iter(range(10**9))

    def step() -> float:
        total = torch.zeros(())
        micro = batches[next(calls) % len(batches)]
        for i, inputs in enumerate(micro):
            last = i == len(micro) - 1
            with accelerator.no_sync(model) if not last else torch.enable_grad():
                loss = model(**inputs, shift_labels=inputs["labels"], use_cache=False).loss
                accelerator.backward(loss)
            total += loss.detach() / world  # num_items_in_batch is a rank's share, as DDP averages
        accelerator.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return float(world_sum(total))

    return step


def make_llama(size: Size) -> torch.nn.Module:
    """transformers' model with the very parameters of ours."""
    from transformers import LlamaConfig, LlamaForCausalLM

    s = size.shape()
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=s.vocab, hidden_size=s.width, intermediate_size=s.ffn, num_hidden_layers=s.layers,
            num_attention_heads=s.heads, num_key_value_heads=s.kv_heads, rms_norm_eps=s.norm_eps,
            max_position_embeddings=size.context, tie_word_embeddings=False, attn_implementation="sdpa",
            rope_parameters={"rope_type": "default", "rope_theta": THETA}, use_cache=False,
        )
    )  # fmt: skip
    (ours,) = build_parts(s, None, seed=0, rope_theta=THETA)
    llama.load_state_dict({llama_name(name): p.detach() for name, p in ours.named_parameters()}, strict=True)
    return llama.train()


def packed_inputs(packs: Sequence[Pack], items: float) -> dict[str, Any]:
    """One micro-batch of packs as transformers takes it."""
    targets = np.stack([p.targets for p in packs])
    return {
        "input_ids": _long(np.stack([p.ids for p in packs])),
        "position_ids": _long(np.stack([p.order for p in packs])),
        "labels": _long(np.where(targets < 0, -100, targets)),
        "num_items_in_batch": items,
    }


def padded_inputs(packs: Sequence[Pack], items: float) -> dict[str, Any]:
    """The documents of the same packs, a row each, padded on the right to the longest."""
    documents = [
        (p.ids[p.doc == d], p.targets[p.doc == d]) for p in packs for d in range(int(p.doc.max()) + 1)
    ]
    longest = max(len(ids) for ids, _ in documents)
    rows = {
        name: np.full((len(documents), longest), fill)
        for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100))
    }
    for i, (ids, targets) in enumerate(documents):
        rows["input_ids"][i, : len(ids)] = ids
        rows["attention_mask"][i, : len(ids)] = 1
        rows["labels"][i, : len(ids)] = np.where(targets < 0, -100, targets)
    return {**{name: _long(row) for name, row in rows.items()}, "num_items_in_batch": items}


def _long(values: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int64))


def measure(size: Size, runs: int) -> dict[str, list[float]]:
    """On every rank: tokens per second, world over, of each side in each run."""
    warnings.filterwarnings("ignore")
    world, rank = dist.get_world_size(), dist.get_rank()
    corpus = LogNormalDocuments(size.vocab, size.context)
    planner = PackPlanner(lengths=corpus.lengths, weights={"text": 1.0}, seed=0, context=size.context)
    stream = PackStream(corpus, planner)
    steps = [[stream.materialise(plan) for plan in stream.plans(size.batch)] for _ in range(runs + 1)]
    mine = [[packs[i] for i in packs_for_rank(0, size.batch, rank, world)] for packs in steps]

    def micro(make: Callable[..., dict[str, Any]]) -> list[list[dict[str, Any]]]:
        every = size.micro_batch
        return [
            [
                make(own[at : at + every], sum((p.targets >= 0).sum() for p in packs) / world)
                for at in range(0, len(own), every)
            ]
            for own, packs in zip(mine, steps, strict=True)
        ]

    sides = {
        "ours": our_step([collate(own) for own in mine], size, world),
        "packs": rival_step(micro(packed_inputs), size, world),
        "padded": rival_step(micro(padded_inputs), size, world),
    }
    tokens = [float(sum((p.doc >= 0).sum() for p in packs)) for packs in steps]
    losses: dict[str, list[float]] = {name: [] for name in sides}

    def timed(name: str) -> Callable[[], float]:
        def run() -> float:
            dist.barrier()
            started = time.perf_counter()
            losses[name].append(sides[name]())
            dist.barrier()
            return tokens[len(losses[name]) - 1] / (time.perf_counter() - started)

        return run

    speeds = bench.paired([timed(name) for name in sides], runs=runs)
    for name in ("packs", "padded"):
        np.testing.assert_allclose(losses[name][:2], losses["ours"][:2], rtol=2e-5)
    return dict(zip(sides, speeds, strict=True)) | {
        "fill": [sum(tokens) / (len(steps) * size.batch * size.context)]
    }


def main() -> None:
    """Print the claim's line."""
    options = bench.arguments(__doc__)
    reason = bench.missing("transformers", "accelerate")
    if reason:
        return bench.skip(CLAIM, reason)
    size = TINY if options.tiny else Size()
    parts, fill = [], 0.0
    for world, label in ((1, "one process"), (2, "dp2")):
        speeds = bench.pinned_ranks(world, measure, size, options.runs)[0]
        fill = speeds["fill"][0]
        for rival, target in (("packs", 1.0), ("padded", 1.5)):
            parts.append(
                bench.Part(f"{label}, {rival}", speeds["ours"], speeds[rival], "tokens/s", target, "higher")
            )
    return bench.emit(
        CLAIM, *parts, versions=("transformers", "accelerate"), sizes=asdict(size),
        parameters=size.shape().parameters, pack_fill=round(fill, 3),
        rival_is="sdpa, use_cache=False, no attention_mask, position_ids per document; padded: attention_mask",
    )  # fmt: skip


if __name__ == "__main__":
    main()
