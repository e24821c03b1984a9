"""Bases, pairings and scalings of rotary positions, and positions that differ between layers."""

from typing import Any

import pytest
import torch
from catalog import close, perturbed

from x_transformers import Decoder
from x_transformers.attention.qk.frequencies import SCALINGS, attention_factor, frequencies
from x_transformers.attention.qk.rotary import RotaryEmbedding
from x_transformers.errors import ConfigError, InputError

STACK: dict[str, Any] = {"dim": 16, "depth": 2, "heads": 2, "attn_dim_head": 8, "rotary_emb_dim": 8, "verbose": False}
ROTARY = {"rotary_pos_emb": True}
TRAINED = {"original_max_position_embeddings": 64}
SETTINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0, "length": 200, **TRAINED},
    "yarn": {"factor": 8.0, "beta_fast": 8.0, **TRAINED},
    "longrope": {
        "factor": 4.0,
        "length": 200,
        "short_factor": [1.0, 1.1, 1.2, 1.5],
        "long_factor": [1.0, 2.0, 3.0, 4.0],
        **TRAINED,
    },
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **TRAINED},
}


def scaling(name: str, **more: Any) -> dict[str, Any]:
    return {"rope_type": name, **SETTINGS[name], **more}


def test_every_scaling_is_tested() -> None:
    assert SETTINGS.keys() == SCALINGS.keys()


@pytest.mark.parametrize(
    ("name", "wanted", "factor"),
    [
        # base 1000, 8 features; numbers of transformers 5.24
        ("linear", [0.25, 0.044456985, 0.0079056947, 0.0014058534], 1.0),
        ("dynamic", [1.0, 0.083963811, 0.0070499214, 0.00059193821], 1.0),
        ("yarn", [1.0, 0.10002822, 0.0039528473, 0.00070292666], 1.2079441541679836),
        ("longrope", [1.0, 0.08891397, 0.010540925, 0.0014058534], 1.1547005383792517),
        ("llama3", [1.0, 0.064309873, 0.0039528473, 0.00070292663], 1.0),
    ],
)
def test_frequencies(name: str, wanted: list[float], factor: float) -> None:
    torch.testing.assert_close(frequencies(1000.0, 8, scaling(name)), torch.tensor(wanted), rtol=1e-6, atol=0)
    assert attention_factor(scaling(name)) == pytest.approx(factor, rel=1e-9)


def test_frequencies_up_to_the_length_of_the_training() -> None:
    plain, short = frequencies(1000.0, 8), torch.tensor(SETTINGS["longrope"]["short_factor"])
    torch.testing.assert_close(frequencies(1000.0, 8, scaling("dynamic", length=64)), plain)
    torch.testing.assert_close(frequencies(1000.0, 8, scaling("longrope", length=64)), plain / short)


def test_a_factor_that_is_given_replaces_the_computed_one() -> None:
    assert attention_factor(scaling("yarn", attention_factor=0.5)) == 0.5
    assert attention_factor(scaling("yarn", mscale=1.0, mscale_all_dim=0.5)) == pytest.approx(
        1.2079441541679836 / 1.1039720770839918
    )


@torch.no_grad()
@pytest.mark.parametrize("width", [4, 8])
def test_half_split_pairs_are_adjacent_pairs_of_permuted_features(width: int) -> None:
    rotary, halves = RotaryEmbedding(width), RotaryEmbedding(width, interleaved=False)
    t, pos = torch.randn(2, 3, 5, 8), torch.arange(5)[None]
    # the features (0, w / 2, 1, w / 2 + 1, ...), and the others after them
    order = torch.cat((torch.arange(width).view(2, -1).T.flatten(), torch.arange(width, 8)))
    turned = halves._rotate_heads(t, halves._table(pos))[..., order]
    close(turned, rotary._rotate_heads(t[..., order], rotary._table(pos)), 1e-6)


@torch.no_grad()
def test_halves_as_llama_writes_them() -> None:
    """`x cos + rotate_half(x) sin` with `rotate_half(x) = (-x[r/2:], x[:r/2])`."""
    rotary, t, pos = RotaryEmbedding(8, interleaved=False, base=50.0), torch.randn(1, 2, 5, 8), torch.arange(5)
    angles = (pos[:, None] * 50.0 ** (-torch.arange(0, 8, 2) / 8)).repeat(1, 2)
    turned = torch.cat((-t[..., 4:], t[..., :4]), dim=-1)
    close(rotary._rotate_heads(t, rotary._table(pos[None])), t * angles.cos() + turned * angles.sin(), 1e-6)


@torch.no_grad()
def test_each_layer_has_its_own_positions() -> None:
    """Each block equals that of a stack in which all layers encode positions as it does."""
    scale = {"rope_type": "linear", "factor": 4.0}
    own = {
        "rotary_base": (10.0, 50.0, 50.0),
        "rotary_layers": (True, False, True),
        "rotary_scaling": (None, None, scale),
    }
    given = {**STACK, "depth": 3}
    mixed = perturbed(Decoder(**given, rotary_pos_emb=True, **own))
    alike: tuple[dict[str, Any], ...] = (
        {**ROTARY, "rotary_base": 10.0},
        {},
        {**ROTARY, "rotary_base": 50.0, "rotary_scaling": scale},
    )
    x, pos = torch.randn(2, 6, 16), torch.randint(0, 40, (2, 6))
    outputs = []
    for block, keywords in enumerate(alike):
        other = Decoder(**given, **keywords).eval()
        other.load_state_dict(mixed.state_dict())
        order = (2 * block, 2 * block + 1)
        outputs.append(mixed(x, pos=pos, layers_execute_order=order))
        close(outputs[-1], other(x, pos=pos, layers_execute_order=order))
        assert torch.allclose(outputs[-1], mixed(x, layers_execute_order=order), atol=1e-3) == (block == 1)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rotary_base": 1.0}, "`rotary_base` is 1.0; it must be greater than 1"),
        (
            {"rotary_base": (10.0, 100.0, 1000.0)},
            "`rotary_base` is a tuple of 3 values, but there are 2 self-attentions",
        ),
        ({"rotary_layers": (False, False)}, "`rotary_layers` rotates no layer"),
        ({"rotary_layers": (True,)}, "`rotary_layers` is a tuple of 1 values"),
        ({"rotary_scaling": {"factor": 2.0}}, "`rope_type` must be one of 'linear', 'dynamic', 'yarn'"),
        ({"rotary_scaling": {"rope_type": "ntk", "factor": 2.0}}, "`rope_type` must be one of"),
        ({"rotary_scaling": {"rope_type": "linear"}}, "of type 'linear' needs 'factor'; add it"),
        ({"rotary_scaling": scaling("linear", beta_fast=1.0)}, "has no 'beta_fast'; its entries are 'factor'"),
        ({"rotary_scaling": scaling("linear", factor=0.5)}, "'factor' = 0.5; it must be a number of at least 1"),
        ({"rotary_scaling": scaling("yarn", factor="8")}, "'factor' = '8'; it must be a number"),
        ({"rotary_scaling": scaling("yarn", truncate=1)}, "'truncate' = 1; it must be True or False"),
        ({"rotary_scaling": scaling("yarn", beta_slow=9.0)}, "'beta_slow' = 9.0 and 'beta_fast' = 8.0; the first must"),
        ({"rotary_scaling": scaling("longrope", short_factor=[1.0])}, "has 1 numbers in 'short_factor'.* have 4 pairs"),
        ({"rotary_scaling": scaling("longrope", long_factor=[1.0, -1.0, 1.0, 1.0])}, "a list of positive numbers"),
        ({"rotary_scaling": scaling("linear"), "rotary_interpolation_factor": 2.0}, "scales the frequencies already"),
        ({"rotary_scaling": scaling("dynamic"), "rotary_emb_dim": 2}, "needs more than 2 rotated features"),
        ({"rotary_xpos": True, "rotary_interleaved": False}, "`rotary_xpos` decays adjacent pairs"),
        ({"rotary_xpos": True, "rotary_base": (10.0, 100.0)}, "`rotary_xpos` decays adjacent pairs"),
    ],
)
def test_refusals(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Decoder(**{**STACK, "rotary_pos_emb": True, **given})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rotary_interleaved": False}, "rotates the halves of heads"),
        ({"rotary_scaling": scaling("yarn")}, "the factor of its `rotary_scaling`"),
        ({"rotary_base": (10.0, 100.0)}, "its layers encode positions differently"),
    ],
)
def test_tables_of_callers_are_refused(given: dict[str, Any], words: str) -> None:
    """Tables rotate adjacent features of all layers by one set of angles."""
    stack, x = Decoder(**STACK, rotary_pos_emb=True, **given), torch.randn(1, 5, 16)
    with pytest.raises(InputError, match=f"`rotary_pos_emb` cannot replace .*{words}"):
        stack(x, rotary_pos_emb=RotaryEmbedding(8).forward_from_seq_len(5))
    if isinstance(stack.rotary_pos_emb, RotaryEmbedding):
        with pytest.raises(InputError, match=words):
            stack.rotary_pos_emb(torch.arange(5))


def test_positions_of_a_context_need_one_rotation() -> None:
    stack = Decoder(**STACK, rotary_pos_emb=True, rotary_base=(10.0, 100.0), cross_attend=True)
    x = torch.randn(1, 5, 16)
    with pytest.raises(InputError, match="`rotary_pos_emb`, the same in all layers"):
        stack(x, context=x, context_pos=torch.arange(5))
