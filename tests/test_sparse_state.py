"""Sparse state expansion: which partitions change, and the loss that balances them."""

from typing import Any

import pytest
import torch
from catalog import close, perturbed

from x_transformers import AutoregressiveWrapper, Decoder, Encoder, TransformerWrapper
from x_transformers.errors import ConfigError

SIZES: dict[str, Any] = {"dim": 16, "depth": 1, "heads": 2, "mixer": "sparse_state", "mixer_rank": 3, "only_attn": True}
LIVE = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 0]], dtype=torch.bool)


@torch.no_grad()
def test_partitions_that_are_not_chosen_stay() -> None:
    mixer = perturbed(Decoder(**SIZES, mixer_partitions=5, mixer_top=2)).layers[0].mixer
    x = torch.randn(3, 9, 16)
    _, before = mixer(x[:, :8])
    _, after = mixer(x[:, 8:], state=before)
    chosen = mixer.to_route(x[:, 8]).topk(2, dim=-1).indices
    for row in range(3):
        for partition in range(5):
            changed = (before["partitions"][row, partition] != after["partitions"][row, partition]).any()
            assert changed == (partition in chosen[row])
    assert (before["shared"] != after["shared"]).any()


@pytest.mark.parametrize("both", [False, True])
def test_balance(both: bool) -> None:
    """`P / top` times the sum of products of shares and choices, over live tokens; the mean of both directions."""
    more = {**SIZES, "mixer_partitions": 3, "mixer_top": 2, "mixer_balance_loss_weight": 0.5}
    stack = Encoder(**more, mixer_bidirectional=True) if both else Decoder(**more)
    stack = perturbed(stack)
    x = torch.randn(2, 7, 16)
    _, record = stack(x, mask=LIVE, return_aux_loss=True)
    layer = stack.layers[0]
    losses = []
    for mixer in (layer.mixer, layer.mixer.backward)[: 1 + both]:
        logits = mixer.to_route(layer.norm(x))[LIVE]
        chosen = torch.zeros_like(logits).scatter(-1, logits.topk(2, dim=-1).indices, 1.0)
        losses.append(3 / 2 * (logits.softmax(dim=-1).mean(dim=0) * chosen.mean(dim=0)).sum())
    close(record.aux_loss, 0.5 * sum(losses) / len(losses))
    record.aux_loss.backward()
    assert all(mixer.to_route.weight.grad.any() for mixer in (layer.mixer, layer.mixer.backward)[: 1 + both])


def test_training_losses_contain_it() -> None:
    """With other feedforwards that have none; in evaluation and with a weight of 0 there is none."""
    losses = {}
    ids = torch.randint(0, 8, (2, 9))
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        layers = Decoder(**{**SIZES, "only_attn": False}, mixer_balance_loss_weight=weight)
        model = AutoregressiveWrapper(TransformerWrapper(num_tokens=8, max_seq_len=16, attn_layers=layers))
        losses[weight] = model(ids).item(), model.eval()(ids).item()
    assert losses[1.0][0] > losses[0.0][0] + 0.5
    assert losses[1.0][1] == losses[0.0][1] == losses[0.0][0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mixer_partitions": 2, "mixer_top": 3}, "`mixer_top` is 3; it must not exceed the `mixer_partitions` = 2."),
        ({"mixer_balance_loss_weight": -1.0}, "`mixer_balance_loss_weight` is -1.0; it must not be negative."),
    ],
)
def test_refusals(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        Decoder(**SIZES, **options)
    assert words in str(error.value)
