"""Left padding that stays the same costs cached steps nothing: no values are compared, which would wait for a GPU."""

from typing import Any

import pytest
import torch
from torch import Tensor

from x_transformers import Decoder, TransformerWrapper
from x_transformers.forward_pass.intermediates import LayerIntermediates

STACKS: dict[str, dict[str, Any]] = {
    "rotary": {"rotary_pos_emb": True},
    "learned": {},
    "alibi": {"alibi_pos_bias": True},
}


def model(kind: str) -> TransformerWrapper:
    stack = Decoder(dim=16, depth=1, heads=2, verbose=False, **STACKS[kind])
    return TransformerWrapper(num_tokens=9, max_seq_len=16, attn_layers=stack).eval()


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kind", STACKS)
def test_steps_compare_no_values(kind: str, static: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    net, ids, start = model(kind), torch.randint(0, 9, (2, 8)), torch.tensor([0, 3])
    cache: Any = LayerIntermediates(cache=net.static_cache(2, 8)) if static else None
    wanted = net(ids, seq_start_pos=start)[:, -1:]
    compared = []
    equal = torch.equal

    def counted(one: Tensor, other: Tensor) -> bool:
        compared.append((one, other))
        return equal(one, other)

    monkeypatch.setattr(torch, "equal", counted)
    given = {"return_intermediates": True, "input_not_include_cache": True}
    for columns in (ids[:, :5], ids[:, 5:6], ids[:, 6:7], ids[:, 7:]):
        # a view of the caller's tensor is another object
        logits, cache = net(columns, cache=cache, seq_start_pos=start[:], **given)
    assert compared == []
    torch.testing.assert_close(logits[:, -1:], wanted, atol=1e-5, rtol=1e-5)


def test_another_tensor_of_the_same_padding() -> None:
    """Its values are compared where positions depend on them, and keys stay where they are."""
    net, ids, start = model("rotary"), torch.randint(0, 9, (2, 6)), torch.tensor([0, 3])
    _, cache = net(ids[:, :5], seq_start_pos=start, return_intermediates=True)
    logits = net(ids, cache=cache, seq_start_pos=start.clone())
    torch.testing.assert_close(logits[:, -1:], net(ids, seq_start_pos=start)[:, -1:], atol=1e-5, rtol=1e-5)
