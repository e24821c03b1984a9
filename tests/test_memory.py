"""Memory: what is fused, and what nobody reads, has no tensor with a number for every pair of tokens."""

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from catalog import BASE, close, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from x_transformers import Decoder

N, HEADS = 1024, 2


class Largest(TorchDispatchMode):
    """Notes the largest tensor that an operation returns."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, Tensor):
                # a view of few numbers, such as an expanded one, needs no memory
                self.numbers = max(self.numbers, t.untyped_storage().nbytes() // t.element_size())
        return out


def fused() -> Iterator[dict[str, Any]]:
    yield {}
    yield {"attn_value_dim_head": 16}
    yield {"polar_pos_emb": True}
    yield {"attn_l2_distance": True}
    yield {"attn_use_rel_proj_pos_bias": True, "attn_rel_proj_max_dist": 64}
    yield {"attn_data_dependent_alibi": True, "attn_data_dependent_alibi_per_row": True}
    yield {"attn_data_dependent_alibi": True}
    yield {"alibi_pos_bias": True}
    yield {"attn_softclamp_logits": True}


@pytest.mark.parametrize("options", list(fused()), ids=lambda options: list(options)[-1] if options else "plain")
def test_what_is_called_fused_has_no_score_of_every_pair(options: dict[str, Any]) -> None:
    layers = Decoder(dim=16, depth=1, heads=HEADS, attn_dim_head=8, verbose=False, **options)
    assert "explicit" not in str(layers.explain(seq_len=N)).split("feedforward")[0]
    with Largest() as largest:
        layers(torch.randn(1, N, 16)).sum().backward()
    assert largest.numbers < HEADS * N * N // 2


@torch.no_grad()
def test_scores_that_nobody_reads_are_not_computed() -> None:
    model = BASE.build(depth=1, max_seq_len=N)
    with Largest() as largest:
        _, record = model(tokens(1, N), return_intermediates=True)
    assert largest.numbers < N * N
    assert record.attn_intermediates[0].post_softmax_attn.shape == (1, 4, N, N)


@pytest.mark.parametrize("training", [False, True])
def test_scores_are_those_of_the_explicit_backend(training: bool) -> None:
    """Read at once, from copies and from files, with gradients, and after other passes."""
    ids, options = tokens(2, 7), {"depth": 1, "alibi_pos_bias": True, "attn_dropout": 0.2 if training else 0.0}
    plain, lazy = BASE.build(**options, attn_flash=False), BASE.build(**options)
    lazy.load_state_dict(plain.state_dict())
    records = []
    for model in (plain.train(training), lazy.train(training)):
        _, record = model(ids, mask=torch.ones(2, 7, dtype=torch.bool).tril(4), return_intermediates=True)
        records.append(record.attn_intermediates[0])
    wanted, record = records
    lazy(tokens(2, 5))
    before = torch.get_rng_state()
    for copied in (copy.copy(record), record):
        for one, two in zip(copied.to_tuple(), wanted.to_tuple(), strict=True):
            close(one, two)
    assert torch.equal(torch.get_rng_state(), before)
    gradients = [
        torch.autograd.grad(each.pre_softmax_attn.clamp(min=-9).square().sum(), model.token_emb.emb.weight)[0]
        for each, model in ((wanted, plain), (record, lazy))
    ]
    close(*gradients, 1e-3)


@torch.no_grad()
def test_records_can_be_saved() -> None:
    _, record = BASE.build(depth=1)(tokens(1, 5), return_intermediates=True)
    first = record.attn_intermediates[0]
    again = pickle.loads(pickle.dumps(first))
    close(again.post_softmax_attn, first.post_softmax_attn)
    assert copy.deepcopy(first).post_softmax_attn is not None
    with pytest.raises(AttributeError, match="no attribute 'weights'"):
        _ = first.weights
