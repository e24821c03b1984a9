"""Hostile values for what `fuzz.py` leaves: parts under the names that scripts import, and further methods of models.

`python tests/fuzz_parts.py` tries everything; `python tests/fuzz_parts.py WORD` only what has the word in its name.
"""

from __future__ import annotations

import sys
from typing import Any

import fuzz
import torch
from fuzz import MASK, STACK, Build, Call, decoder, deep_cache, encoder, features, ids, net, numbers, vectors
from torch import nn

from x_transformers import (
    Attention,
    AutoregressiveWrapper,
    BeliefStateWrapper,
    ContinuousAutoregressiveWrapper,
    CrossAttender,
    Encoder,
    FeedForward,
    NonAutoregressiveWrapper,
    SpeechTransformer,
    TransformerBlock,
    TransformerWrapper,
    XLAutoregressiveWrapper,
    XTransformer,
    XValAutoregressiveWrapper,
    ensemble,
)
from x_transformers import x_transformers as names
from x_transformers.continuous_autoencoder import (
    ContinuousTransformerAutoencoder,
    DeterministicLatentBottleneck,
    VariationalLatentBottleneck,
)
from x_transformers.neo_mlp import RandomFourierEmbed
from x_transformers.training.optimizers import Muon

X = features(2, 6, 16)


def normed() -> TransformerWrapper:
    return net(lambda: decoder(use_prepbn=True)).train()


def routed() -> TransformerWrapper:
    return net(lambda: decoder(ff_experts=4, ff_balance_bias=True)).eval()


def autoencoder() -> ContinuousTransformerAutoencoder:
    return ContinuousTransformerAutoencoder(dim=16, enc_depth=1, dec_depth=1, max_seq_len=8, dim_input=6)


STREAMS: dict[str, Any] = {"dim": 16, "layer_index": 0, "num_residual_streams": 2}

CONSTRUCTORS: dict[str, Build] = {
    "GLU": (names.GLU, lambda: {"dim_in": 16, "dim_out": 8, "activation": nn.SiLU()}),
    "AbsolutePositionalEmbedding": (names.AbsolutePositionalEmbedding, lambda: {"dim": 16, "max_seq_len": 8}),
    "ScaledSinusoidalEmbedding": (names.ScaledSinusoidalEmbedding, lambda: {"dim": 16}),
    "AdaptiveLayerNorm": (names.AdaptiveLayerNorm, lambda: {"dim": 16}),
    "AdaptiveLayerScale": (names.AdaptiveLayerScale, lambda: {"fn": nn.Linear(16, 16), "dim": 16}),
    "AlibiPositionalBias": (names.AlibiPositionalBias, lambda: {"heads": 2}),
    "RelativePositionBias": (names.RelativePositionBias, lambda: {"scale": 1.0}),
    "DynamicPositionBias": (names.DynamicPositionBias, lambda: {"dim": 16, "heads": 2, "depth": 1}),
    "AttentionResidual": (names.AttentionResidual, lambda: {"dim": 16}),
    "DynamicLIMe": (names.DynamicLIMe, lambda: {"dim": 16, "num_layers": 2}),
    "ConcatCombine": (names.ConcatCombine, lambda: {"dim": 16, "prev_layer_ind": 0}),
    "CoPE": (names.CoPE, lambda: {"dim": 8, "heads": 2, "max_pos": 4}),
    "DataDependentAlibi": (names.DataDependentAlibi, lambda: {"dim": 16, "heads": 2}),
    "PerRowDataDependentAlibi": (names.PerRowDataDependentAlibi, lambda: {"dim": 16, "heads": 2}),
    "RelativeProjPositionalBias": (names.RelativeProjPositionalBias, lambda: {"dim": 8, "heads": 2}),
    "LayerNorm": (names.LayerNorm, lambda: {"dim": 16}),
    "SimpleRMSNorm": (names.SimpleRMSNorm, lambda: {"dim": 16}),
    "ScaleNorm": (names.ScaleNorm, lambda: {"dim": 16}),
    "DynamicTanh": (names.DynamicTanh, lambda: {"dim": 16}),
    "Derf": (names.Derf, lambda: {"dim": 16}),
    "MultiheadRMSNorm": (names.MultiheadRMSNorm, lambda: {"dim": 8, "heads": 2}),
    "Residual": (names.Residual, lambda: {"dim": 16}),
    "GRUGating": (names.GRUGating, lambda: {"dim": 16}),
    "OrthogonalResidualUpdate": (names.OrthogonalResidualUpdate, lambda: {"dim": 16}),
    "MVSplitResidualUpdate": (names.MVSplitResidualUpdate, lambda: {"dim": 16}),
    "GatedMultiResidual": (names.GatedMultiResidual, lambda: {**STREAMS, "read_gate_rank": 2}),
    "HyperConnection": (names.HyperConnection, lambda: dict(STREAMS)),
    "Scale": (names.Scale, lambda: {"scale": 2.0, "fn": nn.Linear(16, 16)}),
    "LayerScale": (names.LayerScale, lambda: {"fn": nn.Linear(16, 16), "dim": 16}),
    "ShiftTokens": (names.ShiftTokens, lambda: {"shifts": (0, 1), "fn": nn.Linear(16, 16)}),
    "FoldAxially": (names.FoldAxially, lambda: {"axial_dim": 3, "fn": nn.Linear(16, 16)}),
    "LoRALinear": (names.LoRALinear, lambda: {"dim_in": 16, "dim_out": 8}),
    "LinearNoBias": (names.LinearNoBias, lambda: {"dim_in": 16, "dim_out": 8}),
    "PolarEmbedding": (names.PolarEmbedding, lambda: {"dim": 8, "heads": 2}),
    "RotaryEmbedding": (names.RotaryEmbedding, lambda: {"dim": 8}),
    "TokenEmbedding": (names.TokenEmbedding, lambda: {"dim": 16, "num_tokens": 9}),
    "SoLU": (names.SoLU, lambda: {"dim": 16}),
    "RandomFourierEmbed": (RandomFourierEmbed, lambda: {"dim": 8}),
    "DeterministicLatentBottleneck": (DeterministicLatentBottleneck, lambda: {"dim": 16, "dim_latent": 4}),
    "VariationalLatentBottleneck": (VariationalLatentBottleneck, lambda: {"dim": 16, "dim_latent": 4}),
    "ContinuousTransformerAutoencoder": (
        ContinuousTransformerAutoencoder,
        lambda: {"dim": 16, "enc_depth": 1, "dec_depth": 1, "max_seq_len": 8, "dim_input": 6},
    ),
    "Muon": (Muon, lambda: {"params": [nn.Parameter(torch.ones(3, 3))]}),
}

CALLS: dict[str, Call] = {
    "CrossAttender": Call(
        lambda: CrossAttender(**STACK).eval().forward,
        lambda: {"x": X, "context": features(2, 5, 16), "context_mask": torch.ones(2, 5, dtype=torch.bool)},
    ),
    "Encoder": Call(
        lambda: Encoder(**STACK).eval().forward,
        lambda: {"x": X, "mask": MASK, "attn_mask": torch.ones(6, 6, dtype=torch.bool)},
        ("cache", "mems", "seq_start_pos", "pos", "capture", "layers_execute_order", "repeat_blocks"),
    ),
    "TransformerBlock": Call(
        lambda: TransformerBlock(dim=16, heads=2, attn_dim_head=8, verbose=False).eval().forward,
        lambda: {"x": X, "mask": MASK},
    ),
    "ContinuousTransformerAutoencoder": Call(
        lambda: autoencoder().eval().forward, lambda: {"seq": features(2, 6, 6), "lens": torch.tensor([6, 4])}
    ),
    "ContinuousTransformerAutoencoder.encode": Call(
        lambda: autoencoder().eval().encode, lambda: {"seq": features(2, 6, 6), "lens": torch.tensor([6, 4])}
    ),
    "XLAutoregressiveWrapper.generate": Call(
        lambda: XLAutoregressiveWrapper(net(max_mem_len=8)).eval().generate,
        lambda: {"start_tokens": ids()[:, :3], "seq_len": 2},
        ("eos_token", "temperature", "filter_logits_fn", "filter_kwargs", "mems", "cache_kv"),
    ),
    "SpeechTransformer.generate": Call(
        lambda: SpeechTransformer(**fuzz.CONSTRUCTORS["SpeechTransformer"][1]()).eval().generate,
        lambda: {"audio": features(2, 5, 7), "seq_out_start": ids()[:, :1], "seq_len": 2, "lens": torch.tensor([7, 4])},
        ("temperature", "eos_token", "filter_logits_fn"),
    ),
    "XTransformer.generate": Call(
        lambda: XTransformer(**fuzz.CONSTRUCTORS["XTransformer"][1]()).eval().generate,
        lambda: {"seq_in": ids(), "seq_out_start": ids()[:, :1], "seq_len": 2, "mask": MASK},
        ("attn_mask", "src_prepend_embeds", "temperature", "eos_token", "filter_logits_fn"),
    ),
    "XValAutoregressiveWrapper.generate": Call(
        lambda: XValAutoregressiveWrapper(numbers()).eval().generate,
        lambda: {"start_tokens": ids()[:, :3], "start_numbers": features(2, 3), "seq_len": 2},
        ("temperature", "filter_logits_fn", "filter_kwargs", "prompt_lens", "cache_kv"),
    ),
    "NonAutoregressiveWrapper.generate": Call(
        lambda: NonAutoregressiveWrapper(net(encoder), mask_id=8, steps=2).eval().generate,
        lambda: {"batch_size": 2},
        ("start_temperature", "filter_thres", "noise_level_scale", "mask"),
    ),
    "BeliefStateWrapper.generate_with_suffix_cond": Call(
        lambda: BeliefStateWrapper(net()).eval().generate_with_suffix_cond,
        lambda: {"prompts": ids()[:, :3], "seq_len": 2, "suffix": ids()[:, :2]},
        ("temperature", "cache_kv", "filter_logits_fn", "filter_kwargs", "decode_backwards"),
    ),
    "ContinuousAutoregressiveWrapper.forward_rollout": Call(
        lambda: ContinuousAutoregressiveWrapper(vectors()).eval().forward_rollout,
        lambda: {"x": features(2, 6, 6), "rollout_steps": 2},
        ("lens", "mask", "seq_start_pos"),
    ),
    "TransformerWrapper.explain": Call(
        lambda: net().eval().explain, lambda: {"seq_len": 8}, ("device", "dtype", "training")
    ),
    "TransformerWrapper.attn_qk_clip_": Call(
        lambda: net().eval().attn_qk_clip_, lambda: {"intermediates": deep_cache(), "tau": 1.0}
    ),
    "TransformerWrapper.balance_experts_": Call(
        lambda: routed().balance_experts_, lambda: {"record": routed()(ids(), return_aux_loss=True)[1], "rate": 0.1}
    ),
    "Decoder.advance_norms": Call(
        lambda: normed().attn_layers.advance_norms, lambda: {"record": normed()(ids(), return_aux_loss=True)[1]}
    ),
    "ensemble": Call(
        lambda: ensemble,
        lambda: {"model": net(lambda: decoder(attn_subsample_keys=0.5)), "ids": ids(), "passes": 2},
    ),
    "AutoregressiveWrapper.stream": Call(
        lambda: lambda **given: list(AutoregressiveWrapper(net()).eval().stream(**given)),
        lambda: {"prompts": ids()[:, :3], "seq_len": 2},
        ("temperature", "eos_token", "filter_logits_fn", "prompt_lens", "cache"),
    ),
    "Attention of values": Call(
        lambda: Attention(dim=16, heads=2, dim_head=8, value_dim_head=4, causal=True).eval().forward,
        lambda: {"x": X, "mask": MASK, "pos": torch.arange(6)},
    ),
    "FeedForward with GLU": Call(lambda: FeedForward(dim=16, glu=True).eval().forward, lambda: {"x": X}),
    "static cache": Call(
        lambda: net().eval().forward,
        lambda: {
            "x": ids()[:, :4],
            "cache": names.LayerIntermediates(cache=net().static_cache(2, 8)),
            "input_not_include_cache": True,
        },
        ("mask", "seq_start_pos", "pos", "attn_bias"),
    ),
}

if __name__ == "__main__":
    fuzz.CONSTRUCTORS, fuzz.CALLS = CONSTRUCTORS, CALLS
    fuzz.main(sys.argv[1:])
else:
    fuzz.CONSTRUCTORS.update(CONSTRUCTORS)
    fuzz.CALLS.update(CALLS)
