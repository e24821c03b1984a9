"""`MultiInputTransformerWrapper`: several aligned streams of ids, summed; what all kinds of models keep is tested with
them.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from catalog import close, perturb

from x_transformers import AutoregressiveWrapper, Decoder, MultiInputTransformerWrapper
from x_transformers.errors import ConfigError, InputError

SIZES = {"note": 20, "pitch": 8}


def build(layers: dict[str, Any] | None = None, **options: Any) -> MultiInputTransformerWrapper:
    stack = Decoder(dim=16, depth=2, heads=2, attn_dim_head=8, verbose=False, **(layers or {}))
    given = {"num_tokens": SIZES, "max_seq_len": 16, **options}
    return perturb(MultiInputTransformerWrapper(**given, attn_layers=stack)).eval()


def draw(length: int = 8) -> dict[str, torch.Tensor]:
    return {name: torch.randint(0, size, (2, length)) for name, size in SIZES.items()}


@pytest.mark.parametrize("options", [{}, {"emb_dim": 10}, {"post_emb_norm": True, "emb_frac_gradient": 0.5}], ids=str)
@torch.no_grad()
def test_streams_are_summed_and_have_heads_of_their_own(options: dict[str, Any]) -> None:
    model, x = build(**options), draw()
    embeds = sum(model.embeds[f"{name}_embed"](ids) for name, ids in x.items())
    embeds = embeds + model.pos_emb(embeds)
    embeds = model.post_emb_norm(embeds) if "post_emb_norm" in options else embeds
    features = model.attn_layers(embeds if model.project_emb is None else model.project_emb(embeds))
    logits, got = model(x, return_logits_and_embeddings=True)
    close(got, features)
    assert list(logits) == list(SIZES)
    for name, head in model.to_logits.items():
        close(logits[name], F.linear(features, head.weight))
        assert logits[name].shape == (2, 8, SIZES[name])


@torch.no_grad()
def test_no_token_is_lost_behind_a_prefix() -> None:
    model, x = build(num_memory_tokens=2), draw()
    out = model(x, prepend_embeds=torch.randn(2, 3, 16))
    assert {name: tuple(t.shape) for name, t in out.items()} == {"note": (2, 11, 20), "pitch": (2, 11, 8)}


@torch.no_grad()
def test_positions_reach_rotation() -> None:
    model, x = build({"rotary_pos_emb": True}), draw()
    usual = model(x, pos=torch.arange(8))["note"]
    close(usual, model(x)["note"])
    assert not torch.allclose(usual, model(x, pos=torch.arange(8) * 3)["note"], atol=1e-4)


@torch.no_grad()
def test_z_loss_takes_the_weight_of_the_constructor() -> None:
    model, x = build(attn_z_loss_weight=0.5), draw()
    own, other = (
        model(x, return_attn_z_loss=True, **given)[1].attn_z_loss for given in ({}, {"attn_z_loss_weight": 1.0})
    )
    assert own > 0
    close(2 * own, other)


def test_names_are_those_that_were_declared() -> None:
    model, x = build(), draw()
    for given in ({"note": x["note"]}, {**x, "other": x["note"]}, {"notes": x["note"], "pitch": x["pitch"]}):
        with pytest.raises(InputError, match=r"\['note', 'pitch'\]"):
            model(given)
    with pytest.raises(InputError, match=r"shape"):
        model({"note": x["note"], "pitch": x["pitch"][:, 1:]})


def test_bad_options() -> None:
    for given in ({}, {"note": 0}):
        with pytest.raises(ConfigError, match="`num_tokens`"):
            build(num_tokens=given)
    with pytest.raises(ConfigError, match="`net` is a MultiInputTransformerWrapper; it must be a TransformerWrapper"):
        AutoregressiveWrapper(build())  # type: ignore[arg-type]
