"""Identities of the wrappers that run or change a stack from outside, over every stack of the catalog."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from catalog import Case, call, close, name_of, one_of_each, other_inputs, tokens

from x_transformers.cache import KVCache
from x_transformers.errors import ConfigError
from x_transformers.full_bandwidth import FullBandwidth
from x_transformers.recirculation import Recirculation

EVERY_DECODER = pytest.mark.parametrize(("stack", "case"), one_of_each("decoder", exempt="decoding"), ids=name_of)
N = 6


def built(case: Case, stack: str, **more: Any) -> Any:
    """Build the model, or skip the case if it refuses what the wrapper needs."""
    try:
        return case.build(stack, **more)
    except (ConfigError, TypeError) as error:
        pytest.skip(f"refused: {error}")


@EVERY_DECODER
@torch.no_grad()
def test_recirculation_without_mixing_is_the_model(stack: str, case: Case) -> None:
    model, x = case.build(stack), tokens(2, N)
    attentions = model.attn_layers.sequence.count("a", model.attn_layers.sequence.order)
    if attentions < 2 or model.attn_layers.num_residual_streams > 1 or not model.can_cache_kv:
        with pytest.raises(ConfigError):
            Recirculation(model, 1, 0)
        return
    close(Recirculation(model, 1, 0, alpha=0.0)(x, **other_inputs(model, x)), call(model, x))


@EVERY_DECODER
@torch.no_grad()
def test_the_first_decoded_token_of_a_looped_model_is_that_of_a_whole_pass(stack: str, case: Case) -> None:
    """Later ones read the keys of the last loop in every loop, which is part of the method."""
    model, x = built(case, stack, looped=True, pre_and_post_norm=True), tokens(2, N)
    other = other_inputs(model, x)
    given = {"looped_steps": 3, "return_intermediates": True, **other}
    _, record = call(model, x[:, :-1], cache=KVCache(), **given)
    newest, _ = call(model, x[:, -1:], cache=record, input_not_include_cache=True, **given)
    close(newest, call(model, x, looped_steps=3, **other)[:, -1:])


@EVERY_DECODER
@torch.no_grad()
def test_feedback_that_changes_nothing(stack: str, case: Case) -> None:
    more = {"depth_scale_residual": True, "tie_embedding": True, "post_emb_norm": True}
    model, x = built(case, stack, **more), tokens(2, N)
    try:
        wrapper = FullBandwidth(model, 3, "dense", jitter_noise_delta=0.0)
    except ConfigError as error:
        pytest.skip(f"refused: {error}")
    other = other_inputs(model, x)
    plain = call(model, x)
    close(wrapper(x, return_loss=False, transition=lambda latents, stream: stream, **other), plain)
