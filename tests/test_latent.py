"""Latent attention: the latent is what is cached, and only the heads that come from the input rotate."""

import pytest
import torch
from catalog import decode, perturbed
from torch import Tensor

from x_transformers import Attention, Decoder, TransformerWrapper
from x_transformers.errors import ConfigError
from x_transformers.ops import expand_kv_heads

STACK = {"dim": 16, "depth": 2, "heads": 4, "attn_dim_head": 8, "verbose": False}
LATENT = {"attn_use_latent_kv": True, "attn_dim_latent_kv": 6}


def model(**options: object) -> TransformerWrapper:
    made = TransformerWrapper(
        num_tokens=24, max_seq_len=32, use_abs_pos_emb=False, attn_layers=Decoder(**{**STACK, **options})
    )
    return perturbed(made)


def decoded(made: TransformerWrapper, ids: Tensor, *, static: bool, **given: object) -> Tensor:
    cache = made.static_cache(len(ids), ids.shape[1] + 2) if static else None
    return decode(made, ids, (4, 1, 2, 1), cache=cache, **given)


def test_the_formula() -> None:
    x = torch.randn(2, 5, 8)
    attention = Attention(
        dim=8,
        dim_head=4,
        heads=2,
        use_latent_q=True,
        dim_latent_q=3,
        use_latent_kv=True,
        dim_latent_kv=5,
        latent_rope_subheads=1,
    )
    q = attention.to_q(attention.latent_q(x)).unflatten(-1, (2, -1)).transpose(1, 2)
    latent = attention.latent_kv.project(x)
    k = torch.stack((attention.to_k(latent), attention.latent_kv.sub_keys(x)), dim=1)
    v = attention.to_v(latent).unflatten(-1, (2, -1)).transpose(1, 2)
    out = (q @ k.transpose(-1, -2) / 2).softmax(dim=-1) @ v
    torch.testing.assert_close(attention(x), attention.to_out(out.transpose(1, 2).flatten(2)))


def test_the_formula_with_a_shared_key_and_norms() -> None:
    """The first features of all keys are one key from the input; latents have a mean square of 1 before their gains."""
    x = torch.randn(2, 5, 8)
    attention = Attention(
        dim=8,
        dim_head=4,
        value_dim_head=3,
        heads=2,
        use_latent_q=True,
        dim_latent_q=3,
        use_latent_kv=True,
        dim_latent_kv=5,
        latent_rope_dim=2,
        latent_norm=True,
        latent_norm_eps=0.1,
    )
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter += 0.3 * torch.randn_like(parameter)

    def normalized(latent: Tensor, gain: Tensor) -> Tensor:
        return latent / (latent.square().mean(dim=-1, keepdim=True) + 0.1).sqrt() * gain

    def by_head(t: Tensor) -> Tensor:
        return t.unflatten(-1, (2, -1)).transpose(1, 2)

    assert attention.latent_q is not None
    assert attention.latent_kv is not None
    q = by_head(attention.to_q(normalized(attention.latent_q(x), attention.latent_q_norm.gamma)))
    latent = normalized(attention.latent_kv.project(x), attention.latent_kv.norm.gamma)
    shared = attention.latent_kv.sub_keys(x).unsqueeze(1).expand(-1, 2, -1, -1)
    k, v = torch.cat((shared, by_head(attention.to_k(latent))), dim=-1), by_head(attention.to_v(latent))
    out = (q @ k.transpose(-1, -2) / 2).softmax(dim=-1) @ v
    torch.testing.assert_close(attention(x), attention.to_out(out.transpose(1, 2).flatten(2)))


@torch.no_grad()
def test_what_is_cached_with_a_shared_key() -> None:
    made = model(**LATENT, attn_latent_rope_dim=4, attn_latent_norm=True, rotary_pos_emb=True)
    _, state = made(torch.randint(0, 24, (2, 5)), return_intermediates=True)
    shapes = {name: tuple(t.shape) for name, t in state.cache.entries[0].grown.items()}
    assert shapes == {"latent": (2, 1, 5, 6), "sub_keys": (2, 1, 5, 4)}
    assert made.attn_layers.rotary_pos_emb.dim == 4


@torch.no_grad()
def test_features_from_the_latent_do_not_rotate() -> None:
    """With other positions, only the part of the scores changes that the shared key has."""
    stack = Decoder(**{**STACK, "depth": 1}, **LATENT, attn_latent_rope_dim=4, rotary_pos_emb=True)
    x = torch.randn(1, 6, 16)
    attention = stack.attentions()[0]
    near, far = torch.arange(6), 3 * torch.arange(6)

    def scores(pos: Tensor) -> Tensor:
        return stack(x, pos=pos, return_hiddens=True)[1].attn_intermediates[0].qk_similarities.tril()

    assert (scores(near) - scores(far)).abs().max() > 1e-3
    attention.latent_kv.sub_keys.weight.zero_()
    torch.testing.assert_close(scores(near), scores(far))


@pytest.mark.parametrize("subheads", [None, 1, 2])
def test_what_is_cached(subheads: int | None) -> None:
    made = model(**LATENT, attn_kv_heads=2, attn_latent_rope_subheads=subheads, rotary_pos_emb=subheads is not None)
    _, state = made(torch.randint(0, 24, (2, 5)), return_intermediates=True)
    shapes = {name: tuple(t.shape) for name, t in state.cache.entries[0].grown.items()}
    assert shapes == {"latent": (2, 1, 5, 6)} | ({"sub_keys": (2, subheads, 5, 8)} if subheads else {})
    static = made.static_cache(2, 9).entries[0].grown
    assert {name: tuple(t.shape) for name, t in static.items()} == {
        name: (*shape[:2], 9, shape[3]) for name, shape in shapes.items()
    }


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rotary_pos_emb": True},
        {"rotary_xpos": True},
        {"polar_pos_emb": True},
        {"attn_latent_rope_subheads": 1, "rotary_pos_emb": True, "attn_kv_heads": 2},
        {"attn_latent_rope_dim": 4, "rotary_pos_emb": True, "attn_kv_heads": 2, "attn_latent_norm": True},
        {"attn_latent_rope_dim": 8, "rotary_xpos": True, "attn_max_attend_past": 3},
        {"attn_latent_rope_dim": 6, "polar_pos_emb": True, "attn_qk_norm": True},
        {"attn_latent_rope_subheads": 4, "rotary_pos_emb": True, "attn_qk_rmsnorm": True},
        {"add_value_residual": True, "attn_value_rmsnorm": True},
        {"add_value_residual": True, "attn_kv_heads": 2, "attn_value_dim_head": 12, "attn_num_mem_kv": 2},
        {"attn_orthog_projected_values": True, "attn_l2_distance": True},
    ],
    ids=str,
)
@torch.no_grad()
def test_decoding(options: dict, static: bool) -> None:
    """R10 among them: the learned mix of a cached token is that of its own time."""
    made, ids = model(**LATENT, **options), torch.randint(0, 24, (2, 8))
    torch.testing.assert_close(decoded(made, ids, static=static), made(ids), atol=2e-5, rtol=2e-5)
    start = torch.tensor([0, 2])
    padded = decoded(made, ids, static=static, seq_start_pos=start)
    torch.testing.assert_close(padded[1:, 2:], made(ids[1:, 2:]), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attn_latent_rope_subheads": 2, "rotary_pos_emb": True},
        {"attn_latent_rope_dim": 4, "rotary_pos_emb": True, "attn_latent_norm": True},
    ],
    ids=str,
)
@torch.no_grad()
def test_recurrent_memory_is_not_cached(options: dict) -> None:
    """R9: memory latents stand in front of the cached ones once, in order."""
    made, ids = model(**LATENT, **options, add_value_residual=True), torch.randint(0, 24, (2, 8))
    mems = [torch.randn(2, 3, 16) for _ in range(2)]
    torch.testing.assert_close(decoded(made, ids, static=False, mems=mems), made(ids, mems=mems), atol=2e-5, rtol=2e-5)


def test_sub_heads_rotate_alone() -> None:
    """Of 4 query heads and 2 key heads, the last key head rotates with the two query heads that read it."""
    x = torch.randn(1, 6, 16)
    attention = Attention(
        dim=16, dim_head=4, heads=4, kv_heads=2, use_latent_kv=True, dim_latent_kv=5, latent_rope_subheads=1
    )
    angles = torch.randn(1, 6, 4).repeat_interleave(1, dim=-1)
    _, still = attention(x, return_intermediates=True)
    _, turned = attention(x, return_intermediates=True, rotary_pos_emb=(angles, 1.0))
    moved = (still.qk_similarities - turned.qk_similarities).abs().amax(dim=(0, 2, 3))
    assert (moved[:2] == 0).all()
    assert (moved[2:] > 1e-3).all()


def test_a_context_of_another_width() -> None:
    attention = Attention(
        dim=16, dim_head=4, heads=4, dim_context=10, use_latent_kv=True, dim_latent_kv=5, latent_rope_subheads=2
    )
    assert attention.latent_kv.project.weight.shape == (5, 10)
    assert attention.latent_kv.sub_keys.weight.shape == (8, 10)
    assert attention(torch.randn(1, 3, 16), context=torch.randn(1, 4, 10)).shape == (1, 3, 16)


def test_heads_without_a_map_from_the_latent() -> None:
    """As many sub-heads as heads: no key comes from the latent, and files that hold an empty map are read."""
    attention = Attention(dim=8, dim_head=4, heads=2, use_latent_kv=True, dim_latent_kv=5, latent_rope_subheads=2)
    assert attention.to_k is None
    theirs = {
        "to_q.weight": torch.zeros(8, 8),
        "to_k.weight": torch.zeros(0, 5),
        "to_v.weight": torch.zeros(8, 5),
        "to_out.weight": torch.zeros(8, 8),
        "to_latent_kv.weight": torch.zeros(5, 8),
        "to_rotateable_k.weight": torch.ones(8, 8),
    }
    attention.load_state_dict(theirs)
    assert (attention.latent_kv.sub_keys.weight == 1).all()


def test_grouped_heads_of_the_reference() -> None:
    """There query head h reads key head h % g; the same weights give the same scores in another order of heads."""
    attention = Attention(dim=8, dim_head=4, heads=4, kv_heads=2, use_latent_kv=True, dim_latent_kv=5)
    w = {name: torch.randn(*shape) for name, shape in (("q", (16, 8)), ("k", (8, 5)), ("v", (8, 5)), ("out", (8, 16)))}
    down, x = torch.randn(5, 8), torch.randn(1, 3, 8)
    attention.load_state_dict({f"to_{name}.weight": t for name, t in w.items()} | {"to_latent_kv.weight": down})
    q = (x @ w["q"].T).unflatten(-1, (4, 4)).transpose(1, 2)
    k, v = (((x @ down.T) @ w[name].T).unflatten(-1, (2, 4)).transpose(1, 2).repeat(1, 2, 1, 1) for name in "kv")
    out = (q @ k.transpose(-1, -2) / 2).softmax(dim=-1) @ v
    torch.testing.assert_close(attention(x), out.transpose(1, 2).flatten(2) @ w["out"].T)
    assert expand_kv_heads(torch.arange(2.0).reshape(1, 2, 1, 1), 4).flatten().tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attn_use_latent_kv": True}, "needs `attn_dim_latent_kv`"),
        ({"attn_use_latent_q": True}, "needs `attn_dim_latent_q`"),
        ({"attn_use_latent_q": True, "attn_dim_latent_q": 0}, "`attn_dim_latent_q` is 0"),
        ({"attn_latent_rope_subheads": 1}, "needs `attn_use_latent_kv = True`"),
        ({**LATENT, "attn_latent_rope_subheads": 3, "attn_kv_heads": 2}, "there are 2 key/value heads"),
        (
            {**LATENT, "attn_latent_rope_subheads": 2, "rotary_pos_emb": True, "rotate_num_heads": 2},
            "both say which heads rotate",
        ),
        ({**LATENT, "attn_latent_rope_subheads": 2, "polar_pos_emb": True}, "doubles the width"),
        ({**LATENT, "num_residual_streams": 2, "qkv_receive_diff_residuals": True}, "inputs of their own"),
        ({**LATENT, "add_value_residual": True, "attn_use_latent_kv": (True, False)}, "differ between layers"),
        ({"attn_latent_norm": True}, "`attn_latent_norm` normalizes latents, and there are none"),
        ({**LATENT, "attn_latent_norm": True, "attn_latent_norm_eps": 0.0}, "`attn_latent_norm_eps` is 0.0"),
        ({"attn_latent_rope_dim": 4}, "needs `attn_use_latent_kv = True`"),
        ({**LATENT, "attn_latent_rope_dim": 0}, "`attn_latent_rope_dim` is 0"),
        ({**LATENT, "attn_latent_rope_dim": 9}, "at most `attn_dim_head` = 8"),
        (
            {**LATENT, "attn_latent_rope_dim": 4, "attn_latent_rope_subheads": 1},
            "both say which keys come from the input",
        ),
        (
            {**LATENT, "attn_latent_rope_dim": 4, "rotary_pos_emb": True, "rotary_emb_dim": 6},
            "`rotary_emb_dim` is 6, but only the `attn_latent_rope_dim` = 4 features",
        ),
        (
            {**LATENT, "attn_latent_rope_dim": (4, 2), "rotary_pos_emb": True},
            "`attn_latent_rope_dim` differs between layers",
        ),
    ],
)
def test_refusals(options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Decoder(**STACK, **options)
