"""State dicts of the newest wrappers in the reference's names, which users' files have, and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_looped import net as looped_net
from test_up_wrapper import SIZES
from test_up_wrapper import model as small_model
from torch import nn
from wrapper_table import KINDS

from x_transformers.up_wrapper import UniversalPretrainWrapper

LINEAR = "weight bias"
PREDICTOR = ("0.g", "1.weight", "1.bias", "3.weight", "3.bias", "5.weight", "5.bias")
NET = ("token_emb.emb.weight", "to_logits.weight")
PLACES = "pos_emb.emb.weight"


def names(prefix: str, *rest: str) -> set[str]:
    return {f"{prefix}.{each}" for each in rest}


def linear(*prefixes: str) -> set[str]:
    return {f"{prefix}.{each}" for prefix in prefixes for each in LINEAR.split()}


OUTSIDE_OF_STACKS: dict[str, set[str]] = {
    "autoencoder": {
        *names("encoder", PLACES, "project_in.weight"),
        *linear("bottleneck.proj", "from_latent_to_prepend_token.0"),
        *names("decoder", PLACES, "project_in.weight", "project_out.weight"),
    },
    "gpt_vae": {
        *names("encoder", PLACES, "token_emb.emb.weight"),
        *linear("to_latent_mean_log_variance.0", "from_latent_to_prepend_token.0"),
        *names("decoder", PLACES, *NET),
        *names("ar_wrapped_decoder.net", PLACES, *NET),
    },
    "free transformer": {
        *("token_emb.weight", "token_unembed.weight", "query_token_for_latents"),
        *("to_latent_bit_logits.weight", "from_latent_to_condition.weight"),
        *names("encoder", "final_norm.g", "rotary_pos_emb.inv_freq"),
        *names("decoder_tail", "final_norm.g", "rotary_pos_emb.inv_freq"),
        "decoder_head.rotary_pos_emb.inv_freq",
    },
    "next latent": {
        *names("net", *NET),
        "token_emb.emb.weight",
        *linear("dynamics_model.net.0", *(f"dynamics_model.net.1.{i}" for i in (0, 2, 4))),
    },
    "latent autoregressive": {
        *names("net", "token_emb.emb.weight", "to_logits.6.weight"),
        *names("net.to_logits", *PREDICTOR),
        "action_emb.weight",
        *names("to_next_embed_pred", *PREDICTOR),
        *names("to_next_embed_no_action_pred", *PREDICTOR),
    },
    "latent candidates": {*names("net", *NET), *linear("latent_proj")},
    "full bandwidth": {
        *names("net", "token_emb.emb.weight", "post_emb_norm.gamma"),
        *(
            f"transitions.{source}->{to}.{part}"
            for source in (1, 2)
            for to in (1, 2)
            for part in ("to_state.weight", "to_gate.weight", "latent_norm.g", "stream_norm.g", "norm.g")
        ),
    },
    "recirculation": {
        *names("net.net", *NET),
        *linear(*(f"net.learned_mixers.0.{part}" for part in ("input_norm", "mlp.0", "mlp.2", "mlp.4"))),
    },
    "tensor products": names("decoder", *NET),
    "universal pretraining": {
        *("step", "synth_data_buffer"),
        *(name for net in ("model", "ar_wrapped.net") for name in names(net, PLACES, *NET)),
        *names("data_generator", "embed.weight", "to_logits.weight"),
        *(f"data_generator.net.{part}_l0" for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")),
    },
    "looped": {PLACES, *NET, "exit_gate.weight"},
}


def build(name: str) -> nn.Module:
    if name == "universal pretraining":
        return UniversalPretrainWrapper(small_model(), **SIZES)
    if name == "looped":
        return looped_net("absolute")
    return next(kind for kind in KINDS if kind.name == name).ready()


@pytest.mark.parametrize("name", OUTSIDE_OF_STACKS)
def test_names_of_the_reference(name: str) -> None:
    model, other = build(name), build(name)
    theirs: dict[str, Any] = model.export_reference_state_dict()  # type: ignore[operator]
    outside = {each for each in theirs if "attn_layers." not in each and ".layers." not in each}
    assert outside == OUTSIDE_OF_STACKS[name]
    other.load_state_dict(theirs)
    for one, another in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(one, another)
