"""What every causal model promises, as checks that tests of one feature, of pairs and of head counts share.

Each check takes a model and raises an `AssertionError` where it breaks the promise.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from catalogue import DIM, VOCABULARY, call, close, decode, static_cache, tokens
from torch import Tensor

from x_transformers import TransformerWrapper

LENGTH = 10
LENGTHS = (10, 7, 3)
CHUNKS = (4, 3, 1, 2)
SEEN = 1e-4
"""What must move moves by more than this."""


def another(ids: Tensor) -> Tensor:
    """Tokens that differ from the given ones everywhere."""
    return (ids + torch.randint_like(ids, 1, VOCABULARY)) % VOCABULARY


def arguments(model: TransformerWrapper, batch: int, n: int, rows: int = 1) -> dict[str, dict[str, Any]]:
    """Ways to call a causal model, by name: the arguments of a pass over `n` tokens.

    Args:
        model: the model.
        batch: rows of the pass; the arguments are the same for each unless `rows` says otherwise.
        n: tokens.
        rows: how many different rows of arguments to draw.
    """
    heads = model.attn_layers.attn_heads

    def draw(*shape: int) -> Tensor:
        return torch.randn(rows, *shape).repeat(batch // rows, *(1 for _ in shape))

    mask, kv_mask = draw(n) > -0.5, draw(n) > -0.5
    mask[:, 0] = kv_mask[:, 0] = True
    pairs = (draw(heads, n, n) > 0) | torch.eye(n, dtype=torch.bool)
    return {
        "plain": {},
        "mask": {"mask": mask},
        "kv_mask": {"self_attn_kv_mask": kv_mask},
        "both_masks": {"mask": mask, "self_attn_kv_mask": kv_mask},
        "left_padding": {"seq_start_pos": torch.full((batch,), 2)},
        "packed": {"pos": torch.arange(n) % 3},
        "attn_mask": {"attn_mask": pairs},
        "attn_bias": {"attn_bias": draw(heads, n, n)},
        "sum_embeds": {"sum_embeds": draw(1, model.emb_dim).expand(-1, n, -1)},
        "prepended": {"prepend_embeds": draw(2, model.emb_dim), "prepend_mask": draw(2) > 0},
        "memories": {"mems": [draw(4, DIM) for _ in model.attn_layers.branches("a")]},
    }


@torch.no_grad()
def keeps_the_past(model: TransformerWrapper, n: int = LENGTH, **given: Any) -> None:
    """Outputs before `t` do not move when tokens from `t` on change; the output at `t` does.

    One pass holds every `t`: row `t` of the batch has other tokens from `t` on.
    """
    ids = tokens(1, n).expand(n, n)
    future = torch.arange(n) >= torch.arange(n)[:, None]
    rows = [0] * n
    extra = 0 if "prepend_embeds" not in given else given["prepend_embeds"].shape[1]
    one = call(model, ids, rows, **given)[:, extra:]
    other = call(model, torch.where(future, another(ids), ids), rows, **given)[:, extra:]
    close(other[~future], one[~future])
    moved = (other - one).flatten(2).abs().amax(dim=-1).diagonal()
    alive = torch.ones(n, dtype=torch.bool)
    if "seq_start_pos" in given:
        alive = torch.arange(n) >= given["seq_start_pos"][0]
    assert (moved[alive] > SEEN).all(), "the token at t moves nothing at t, so this test sees nothing"


@torch.no_grad()
def keeps_its_length(model: TransformerWrapper, n: int = LENGTH) -> None:
    """Outputs do not move when tokens are removed from the end."""
    ids = tokens(2, n)
    whole = call(model, ids)
    for end in (1, 4, n - 1):
        close(call(model, ids[:, :end]), whole[:, :end])


@torch.no_grad()
def decodes(model: TransformerWrapper, *, static: bool, whole: bool = False, chunks: Iterable[int] = CHUNKS) -> None:
    """Cached decoding gives what one pass gives."""
    chunks = list(chunks)
    ids = tokens(2, sum(chunks))
    cache = static_cache(model, 2, ids.shape[1] + 3) if static else None
    close(decode(model, ids, chunks, cache=cache, whole=whole), call(model, ids))


@torch.no_grad()
def pads(model: TransformerWrapper, *, left: bool) -> None:
    """Each row of a ragged batch is what the row alone is, whatever stands in its padding."""
    n = max(LENGTHS)
    ids = tokens(len(LENGTHS), n)
    lengths = torch.tensor(LENGTHS)
    if left:
        given = {"seq_start_pos": n - lengths}
    else:
        given = {"mask": torch.arange(n) < lengths[:, None]}
    together = call(model, ids, **given)
    for row, length in enumerate(LENGTHS):
        own = slice(n - length, n) if left else slice(length)
        close(together[row : row + 1, own], call(model, ids[row : row + 1, own], [row]))


@torch.no_grad()
def decodes_ragged(model: TransformerWrapper, *, static: bool) -> None:
    """A left-padded batch decodes to what each row alone gives."""
    n = max(LENGTHS)
    ids = tokens(len(LENGTHS), n)
    start = n - torch.tensor(LENGTHS)
    cache = static_cache(model, len(LENGTHS), n + 2) if static else None
    together = decode(model, ids, CHUNKS, cache=cache, seq_start_pos=start)
    for row, length in enumerate(LENGTHS):
        close(together[row : row + 1, n - length :], call(model, ids[row : row + 1, n - length :], [row]))


def learns(model: TransformerWrapper, without: Iterable[re.Pattern[str]] = ()) -> None:
    """Every parameter gets a finite gradient that is not zero, except those named, whose gradient is zero.

    In float64, where rounding stays far below any gradient that is one.
    """
    for name, gradient in gradients(model.double()):
        size = gradient.abs().max()
        if any(pattern.search(name) for pattern in without):
            assert size < 1e-9, f"{name} is exempt, but has a gradient"
        else:
            assert size > 1e-9, f"{name} has a gradient of zero"


def gradients(model: TransformerWrapper) -> Iterator[tuple[str, Tensor]]:
    """Names and gradients of all parameters, each of which is used and has a finite one.

    In a combination some may be zero by right: a gain in front of a norm, a bias of all keys beside a softmax.
    """
    out = call(model, tokens(3, LENGTH))
    (out * torch.randn_like(out)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert parameter.grad.isfinite().all(), f"{name} has a gradient that is not finite"
        yield name, parameter.grad
