"""Weights of eight bits of torchao: near the model that they come from, and the same tokens with every cache."""

from typing import Any

import pytest
import torch
from catalog import perturbed

from x_transformers import AutoregressiveWrapper, Decoder, Encoder, TransformerWrapper
from x_transformers.errors import CheckpointError

torchao = pytest.importorskip("torchao.quantization", reason="needs the extra `int8`")

STACK: dict[str, Any] = {"dim": 64, "depth": 2, "heads": 4, "attn_dim_head": 16, "rotary_pos_emb": True}
LLAMA: dict[str, Any] = {"use_rmsnorm": True, "attn_kv_heads": 2, "ff_glu": True, "ff_swish": True, "ff_no_bias": True}
MODELS: dict[str, Any] = {
    "llama": lambda: Decoder(**STACK, **LLAMA),
    "biases and norms of queries": lambda: Decoder(
        **STACK, attn_qkv_bias=True, attn_out_bias=True, attn_qk_rmsnorm=True
    ),
    "window": lambda: Decoder(**STACK, attn_max_attend_past=5, attn_gate_values=True),
    "mixer": lambda: Decoder(dim=64, depth=2, heads=4, mixer="gated_delta"),
    "encoder": lambda: Encoder(**STACK),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_agreement(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tied = {"tie_embedding": True} if name == "llama" else {}
    model = TransformerWrapper(num_tokens=97, max_seq_len=64, use_abs_pos_emb=False, attn_layers=MODELS[name](), **tied)
    model, ids = perturbed(model).to(dtype), torch.randint(0, 97, (2, 10))
    wanted = model(ids)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    maps = {each for each in model.modules() if isinstance(each, torch.nn.Linear)}
    assert all(type(each.weight.data) is not torch.Tensor for each in maps)
    assert (model(ids) - wanted).float().norm() <= 0.05 * wanted.float().norm()
    if name == "encoder":
        return
    wrapper, sequence = AutoregressiveWrapper(model), ids
    for _ in range(8):
        sequence = torch.cat((sequence, model(sequence)[:, -1:].argmax(dim=-1)), dim=1)
    if dtype == torch.float32:
        for cache in ("dynamic", "static"):
            assert torch.equal(wrapper.generate(ids, 8, temperature=0.0, cache=cache), sequence[:, 10:])


def test_saving_asks_for_plain_weights(tmp_path: Any) -> None:
    model = TransformerWrapper(num_tokens=97, max_seq_len=64, attn_layers=Decoder(**STACK))
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    with pytest.raises(CheckpointError, match=r"projections.q.weight` is a \w+Tensor, .* dequantize it"):
        model.save_pretrained(tmp_path)
