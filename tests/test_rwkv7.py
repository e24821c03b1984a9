"""RWKV-7 in stacks: numbers of a public implementation, and the values that its first layer leaves for later ones."""

from typing import Any

import pytest
import torch
from catalog import close, perturbed
from test_mixer_goldens import agree, read

from x_transformers import Decoder, Encoder
from x_transformers.mixers.base import Row
from x_transformers.mixers.rwkv7 import RWKV7

SIZES = {"dim": 16, "heads": 2, "only_attn": True, "mixer_head": 8, "mixer_rank": 5}
LIVE = torch.tensor([[1] * 9, [0, 0, 0] + [1] * 6, [1] * 5 + [0] * 4, [0, 1, 1, 0, 1, 0, 0, 1, 0]], dtype=torch.bool)
"""All tokens, left padding, right padding, and gaps."""


@pytest.mark.parametrize("number", [0, 1])
def test_goldens(number: int) -> None:
    case, _ = read(f"layer-rwkv7-{number}")
    mixer = Decoder(**SIZES, depth=2, mixer="rwkv7").layers[number].mixer
    mixer.load_state_dict({key.removeprefix("state."): t for key, t in case.items() if key.startswith("state.")})
    x, first = case["input.x"], case.get("input.first_value")
    out, state, left = mixer.mix_after(x, Row(None, True), None, first)
    agree(out, case["output"])
    agree(state["rwkv"].mT, case["output.state"])
    if number == 0:
        agree(left, case["output.value"])
    else:
        assert left is None


@pytest.mark.parametrize(
    ("mixer", "followers"),
    [("rwkv7", [1, 2]), (("linear", "rwkv7", "rwkv7"), [2]), (("rwkv7", "linear", "rwkv7"), [2])],
)
def test_all_but_the_first_read_values(mixer: Any, followers: list[int]) -> None:
    stack = perturbed(Decoder(**SIZES, depth=3, mixer=mixer))
    assert [number for number, layer in enumerate(stack.layers) if getattr(layer.mixer, "value", None)] == followers
    stack(torch.randn(2, 5, 16)).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in stack.parameters())


def test_the_first_layer_changes_later_ones() -> None:
    """Besides through the residual stream: with its values, a later layer computes something else."""
    later = perturbed(Decoder(**SIZES, depth=2, mixer="rwkv7")).layers[1].mixer
    x = torch.randn(2, 5, 16)
    out, _, left = later.mix_after(x, Row(None, True), None, None)
    mixed = later.mix_after(x, Row(None, True), None, torch.randn_like(left))[0]
    close(later.mix_after(x, Row(None, True), None, left)[0], out)
    assert (mixed - out).abs().max() > 1e-2


@pytest.mark.parametrize("both", [False, True])
def test_values_of_rows_with_gaps(both: bool) -> None:
    """Values are those of the live tokens of each row, in either direction."""
    stack = Encoder(**SIZES, depth=2, mixer="rwkv7", mixer_bidirectional=True) if both else None
    stack = perturbed((stack or Decoder(**SIZES, depth=2, mixer="rwkv7")).double())
    x = torch.randn(len(LIVE), 9, 16, dtype=torch.float64)
    out = stack(x, mask=LIVE)
    for row, live in enumerate(LIVE):
        close(out[row, live], stack(x[row : row + 1, live])[0])


def test_each_direction_has_values_of_its_own() -> None:
    stack = perturbed(Encoder(**SIZES, depth=2, mixer="rwkv7", mixer_bidirectional=True))
    x = torch.randn(2, 7, 16)
    out = stack(x)
    first, later = (layer.mixer for layer in stack.layers)
    stream, left = x, {}
    for layer, mixer in zip(stack.layers, (first, later), strict=True):
        own = layer.norm(stream)
        forth, _, v = mixer.mix_after(own, Row(None, False), None, left.get("forth"))
        back, _, w = mixer.backward.mix_after(own.flip(1), Row(None, False), None, left.get("back"))
        left = left or {"forth": v, "back": w}
        stream = stream + forth + back.flip(1)
    close(out, stack.final_norm(stream))


def test_first_values() -> None:
    """Decays differ more between channels with depth, and mixes less; the output begins at zero."""
    stack = Decoder(**SIZES, depth=4, mixer="rwkv7")
    first, last = (stack.layers[number].mixer for number in (0, 3))
    feature, channel, place = torch.arange(16) / 16, torch.arange(16) / 15, torch.linspace(-1, 1, 8).repeat(2)
    close(first.mix_k.data, 1 - feature**0.7)
    close(last.mix_w.data, 1 - feature ** (0.9 / 4))
    close(first.decay.bias.data, -5.5 + 6 * channel + 2.5 * place * place.abs())
    close(last.decay.bias.data, -5.5 + 6 * channel**2 + 2.5 * place * place.abs())
    assert not first.to_out.weight.any()
    assert RWKV7(2048).decay[0].weight.shape[0] == 128
    assert RWKV7(64).gate[0].weight.shape[0] == 32
