"""Tensor parallelism of the backbones: which matrices are split over tp, and the collectives around them.

The parts are those of `parallel/tensor.py`; the models know nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from ringweave.parallel.mesh import Mesh
from ringweave.parallel.tensor import (
    ColumnLinear,
    HiddenStates,
    RowLinear,
    TensorGroup,
    VocabEmbedding,
    sum_gradients,
)
from ringweave.parallel.vocab import VocabParallelCrossEntropy
from ringweave.pretrain.models.dit import DiT
from ringweave.pretrain.models.dit_words import Words
from ringweave.pretrain.models.lwm import LWM

Split = Callable[[nn.Parameter, int], nn.Parameter]


def tensor_parallel(model: LWM | DiT, mesh: Mesh, norms: str = "replicated") -> None:
    """Split matrices, embedding and head over tp, and put the collectives of `parallel/tensor.py` around them.

    norms: "sequence" keeps a shard of the tokens between blocks, "replicated" all of them; a DiT keeps all of them,
    because its modulation looks tokens up by segment.
    """
    if mesh.sizes["tp"] == 1:
        return
    tp = TensorGroup(mesh.group("tp"))

    def split(weight: nn.Parameter, dim: int) -> nn.Parameter:
        return nn.Parameter(
            distribute_tensor(weight, mesh.device_mesh["tp"], [Shard(dim)], src_data_rank=None)
        )

    if isinstance(model, DiT):
        shard_dit(model, HiddenStates(tp, sharded=False), split, mesh)
        return
    states = HiddenStates(tp, sharded=norms == "sequence")
    shard_decoder(model, states, split, mesh)
    if states.sharded:
        model.hidden_shape = states.shape
        model.after_backward = lambda: sum_gradients(  # by name: FSDP puts other parameters in place of these
            (p for name, p in model.named_parameters() if name.endswith("norm.weight")), tp
        )


def shard_decoder(model: LWM | Words, states: HiddenStates, split: Split, mesh: Mesh) -> None:
    """Layers, embedding and head of a decoder."""
    for layer in model.layers.values():
        for block, columns, rows in (
            (layer.attention, ("wq", "wk", "wv"), "wo"),
            (layer.mlp, ("gate", "up"), "down"),
        ):
            for name in columns:
                setattr(block, name, ColumnLinear(split(getattr(block, name).weight, 0)))
            setattr(block, rows, RowLinear(split(getattr(block, rows).weight, 1), states.leave))
        # Attention needs exactly the tokens of its rotary table; the feed-forward does not mind padding.
        layer.attention.register_forward_pre_hook(
            lambda module, args: (states.enter(args[0], args[1].cos.shape[0]), *args[1:])
        )
        layer.mlp.register_forward_pre_hook(lambda module, args: (states.enter(args[0]), *args[1:]))
    if model.embed is not None:
        model.embed = VocabEmbedding(split(model.embed.weight, 0), states.tp, states.leave)  # type: ignore[assignment]
    if model.head is not None:
        model.head.weight = split(model.head.weight, 0)
        model.head.cross_entropy = VocabParallelCrossEntropy(mesh.group("tp"))
        model.head.register_forward_pre_hook(
            lambda module, args: (states.whole(args[0], args[1].numel()), *args[1:])
        )


#: Linears of attention that read the modulated streams, and those that write into the residual streams.
_READ = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


def shard_dit(model: DiT, states: HiddenStates, split: Split, mesh: Mesh) -> None:
    """Attention by heads, MLPs by their inner width, and modulation, a third of the parameters, by its outputs."""

    def columns(holder: nn.Module, name: str) -> None:
        linear = getattr(holder, name)
        holder._modules[name] = ColumnLinear(split(linear.weight, 0), split(linear.bias, 0))

    def rows(holder: nn.Module, name: str) -> None:
        linear = getattr(holder, name)
        holder._modules[name] = RowLinear(split(linear.weight, 1), states.leave, linear.bias)

    def table(holder: nn.Module, name: str) -> None:
        columns(holder, name)
        getattr(holder, name).register_forward_hook(lambda module, args, out: states.tp.gather_columns(out))

    for block in model.transformer_blocks.values():
        attention = block.attn
        for name in _READ:
            if hasattr(attention, name):
                columns(attention, name)
        rows(attention.to_out, "0")
        if hasattr(attention, "to_add_out"):
            rows(attention, "to_add_out")
        attention.register_forward_pre_hook(
            lambda module, args: (states.enter(args[0]), states.enter(args[1]), *args[2:])
        )
        for name, child in block.named_children():
            if name.endswith("mlp"):
                columns(child.net["0"], "proj")
                rows(child.net, "2")
                child.register_forward_pre_hook(lambda module, args: (states.enter(args[0]), *args[1:]))
            elif name.endswith("mod"):
                table(child, "1")
    if model.norm_out is not None:
        table(model.norm_out, "linear")
    if model.words is not None:
        shard_decoder(model.words, states, split, mesh)
    # All modulation of a part reads one vector: its gradients are added up over tp once.
    model.enter_level = states.enter
    # A rank's norms of queries and keys saw its heads alone.
    model.after_backward = lambda: sum_gradients(
        (p for name, p in model.named_parameters() if ".attn.norm_" in name), states.tp
    )
