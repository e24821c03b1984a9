"""Channel mixing of RWKV: numbers of transformers, rows with gaps, pieces of rows, and what is refused."""

from typing import Any

import pytest
import torch
from catalog import close, perturbed
from test_mixer_goldens import agree, read
from torch import nn

from x_transformers import Decoder, Encoder, TransformerWrapper
from x_transformers.errors import ConfigError, StateDictError
from x_transformers.feedforward.channel_mix import ChannelMix

LIVE = torch.tensor([[1] * 9, [0, 0, 0] + [1] * 6, [1] * 5 + [0] * 4, [0, 1, 1, 0, 1, 0, 0, 1, 0]], dtype=torch.bool)
"""All tokens, left padding, right padding, and gaps."""


def test_golden() -> None:
    case, _ = read("layer-rwkv4-channel")
    wide, narrow = case["state.to_hidden.weight"].shape
    layer = Decoder(dim=narrow, depth=1, heads=2, ff_rwkv=True, ff_mult=wide / narrow).layers[1].feedforward
    layer.load_state_dict({key.removeprefix("state."): t for key, t in case.items() if key.startswith("state.")})
    agree(layer(case["input.x"]), case["output"])


@pytest.mark.parametrize("stack", [Decoder, Encoder])
def test_rows_are_read_as_if_nothing_else_were_there(stack: type) -> None:
    layer = perturbed(stack(dim=16, depth=1, heads=2, ff_rwkv=True).double()).layers[1].feedforward
    x = torch.randn(len(LIVE), 9, 16, dtype=torch.float64)
    whole = layer(x, LIVE)
    for row, live in enumerate(LIVE):
        close(whole[row, live], layer(x[row : row + 1, live])[0])


def test_pieces_equal_the_whole() -> None:
    """After any cut, and also where a piece of a row has no token at all; in half precision the state is float32."""
    layer = perturbed(ChannelMix(16).double())
    x = torch.randn(len(LIVE), 9, 16, dtype=torch.float64)
    whole = layer(x, LIVE)
    for cuts in ((1,) * 9, (3, 6), (4, 1, 4)):
        state, parts = None, []
        for piece, live in zip(x.split(cuts, dim=1), LIVE.split(cuts, dim=1), strict=True):
            out, state = layer.mix(piece, live, state)
            parts.append(out)
        close(torch.cat(parts, dim=1)[LIVE], whole[LIVE])
    _, state = layer.bfloat16().mix(x.bfloat16(), None, None)
    assert state.dtype is torch.float32


def test_first_mixes_depend_on_the_layer() -> None:
    layers = Decoder(dim=8, depth=4, heads=2, ff_rwkv=True).layers
    feature = torch.arange(8) / 8
    close(layers[1].feedforward.mix_k, feature)
    close(layers[7].feedforward.mix_r, feature**0.25)


@pytest.mark.parametrize("shift", [0, 1])
def test_states_of_one_sublayer_do_not_meet(shift: int) -> None:
    """Tokens that the stack shifts and those that a function shifts by itself are states of their own."""
    model = TransformerWrapper(
        num_tokens=16,
        max_seq_len=32,
        attn_layers=Decoder(dim=16, depth=2, heads=2, mixer="rwkv4", ff_rwkv=True, shift_tokens=shift),
    )
    model = perturbed(model)
    ids = torch.randint(0, 16, (2, 12))
    start = torch.tensor([0, 4])
    with torch.no_grad():
        whole = model(ids, seq_start_pos=start)
        for cache in (None, model.static_cache(2, 16)):
            parts = []
            for piece in ids.split((5, 1, 1, 5), dim=1):
                out, record = model(
                    piece, seq_start_pos=start, cache=cache, input_not_include_cache=True, return_intermediates=True
                )
                cache = record.cache
                parts.append(out)
            steps = torch.cat(parts, dim=1)
            close(steps[0], whole[0])
            close(steps[1, 4:], whole[1, 4:])


class Wrapped(nn.Module):
    """A user's module around a part, which passes all arguments on."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("place", [0, 1])
def test_functions_with_states_may_be_wrapped(place: int) -> None:
    stack = perturbed(Decoder(dim=16, depth=1, heads=2, mixer="rwkv4", ff_rwkv=True))
    x = torch.randn(2, 9, 16)
    whole = stack(x, mask=LIVE[:2])
    stack.layers[place][1] = Wrapped(stack.layers[place][1])
    first, cache = stack(x[:, :5], mask=LIVE[:2, :5], return_hiddens=True)
    second = stack(x[:, 5:], mask=LIVE[:2], cache=cache, input_not_include_cache=True)
    close(torch.cat((first, second), dim=1)[LIVE[:2]], whole[LIVE[:2]])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ff_glu": True, "ff_no_bias": True}, "a gate and no biases; drop `ff_glu` and `ff_no_bias`, or `ff_rwkv`."),
        ({"ff_relu_squared": True}, "drop the other activation, or `ff_rwkv`."),
        (
            {"attn_flash_pack_seq": True, "rotary_pos_emb": True},
            "but `ff_rwkv` would move features from one document into the next; drop one of them.",
        ),
    ],
)
def test_refusals(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        Decoder(dim=16, depth=1, heads=2, ff_rwkv=True, **options)
    assert words in str(error.value)


def test_the_reference_has_none() -> None:
    model = TransformerWrapper(num_tokens=8, max_seq_len=8, attn_layers=Decoder(dim=16, depth=1, ff_rwkv=True))
    with pytest.raises(StateDictError, match="a model with `ff_rwkv` cannot be exported"):
        model.export_reference_state_dict()
