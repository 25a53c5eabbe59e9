"""Rotary positions against transformers' Llama."""

from __future__ import annotations

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from ringweave.kernels.rotary import apply_rotary, rotary_table


def test_equals_transformers() -> None:
    order = torch.tensor([0, 1, 2, 0, 1, 511])
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 1e5}
    )
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), order[None])
    q, k = torch.randn(1, 4, 6, 16), torch.randn(1, 2, 6, 16)
    want_q, want_k = apply_rotary_pos_emb(q, k, cos, sin)
    ours = rotary_table(order, dim=16, theta=1e5)
    assert (apply_rotary(q[0].transpose(0, 1), *ours).transpose(0, 1) - want_q[0]).abs().max() < 1e-5
    assert (apply_rotary(k[0].transpose(0, 1), *ours).transpose(0, 1) - want_k[0]).abs().max() < 1e-5


def test_keeps_bf16_inputs_bf16_but_turns_them_in_fp32() -> None:
    x = torch.randn(3, 2, 8, dtype=torch.bfloat16)
    cos, sin = rotary_table(torch.tensor([0, 5, 100_000]), dim=8, theta=1e6)
    out = apply_rotary(x, cos, sin)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, apply_rotary(x.float(), cos, sin).bfloat16())
