"""The gradient of a near bias, computed after a kernel from its output and log-sum-exp, is that of the plain scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from catalog import close
from test_flex import Reads
from torch import Tensor

from x_transformers.attention.backends import near_gradient
from x_transformers.attention.backends.base import Request, ignores_constants
from x_transformers.attention.backends.flex import _near_table, _score_mod
from x_transformers.attention.backends.near_gradient import NearGradient, NearScores
from x_transformers.attention.base import Memo
from x_transformers.attention.scores.alibi import AlibiPositionalBias
from x_transformers.attention.scores.softclamp import SoftclampLogits
from x_transformers.attention.scores.t5 import RelativePositionBias
from x_transformers.forward_pass.call import Call, Capture, Span
from x_transformers.masks.block_masks import block_mask
from x_transformers.masks.builder import visibility

REACH = 5


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(near_gradient, "HEIGHT", 4)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def bias() -> RelativePositionBias:
    made = RelativePositionBias(2.0, causal=True, num_buckets=4, max_distance=REACH, heads=4)
    torch.nn.init.normal_(made.relative_attention_bias.weight)
    return made


def request(n: int, groups: int, bias: RelativePositionBias, window: int | None, hidden: bool, more: bool) -> Request:
    """Causal attention of 3 rows and 4 heads; the last row is hidden if rows are."""
    index = torch.arange(n)
    token_mask = index >= torch.tensor([[0], [n // 2], [n]]) if hidden else None
    tokens = Span(index, index[None], index[None], token_mask, contiguous=True)
    call = Call(tokens, tokens, True, capture=Capture(), memo=Memo())
    visible = visibility(call, tokens, causal=True, own=True, window=window, prefix=0)
    q, k, v = torch.randn(3, 4, n, 8), torch.randn(3, groups, n, 8), torch.randn(3, groups, n, 6)
    scores = (bias.bind(tokens, tokens), *((AlibiPositionalBias(4).bind(tokens, tokens),) if more else ()))
    return Request(q * 3, k, v, 0.5, visible, Memo(), scores)


def kernel(asked: Request) -> tuple[NearScores, Tensor, Tensor]:
    """What a kernel leaves for the backward pass: settings, output, log-sum-exp."""
    table = _near_table(asked)
    assert table is not None
    score, seen = _score_mod(asked, table), block_mask(asked.visible.hiding, asked.q).mask_mod
    b, h, n, _ = asked.q.shape
    places = torch.meshgrid(*map(torch.arange, (b, h, n, n)), indexing="ij")
    k, v = (t.repeat_interleave(h // t.shape[1], dim=1) for t in (asked.k, asked.v))
    scores = score(asked.q @ k.mT * asked.scale, *places).masked_fill(~seen(*places), float("-inf"))
    return NearScores(asked.scale, score, seen, REACH), scores.softmax(dim=-1).nan_to_num(0) @ v, scores.logsumexp(-1)


def plain(asked: Request) -> Tensor:
    """The output by the whole bias, with a gradient."""
    k, v = (t.repeat_interleave(asked.q.shape[1] // t.shape[1], dim=1) for t in (asked.k, asked.v))
    scores = asked.q @ k.mT * asked.scale
    for score in asked.scores:
        scores = scores + score.dense(asked.memo)
    hidden = ~asked.visible.hiding.mask()
    empty = hidden.all(dim=-1, keepdim=True)
    return scores.masked_fill(hidden, -1e9).softmax(dim=-1).masked_fill(empty, 0.0) @ v


@pytest.mark.parametrize("n", [6, 8, 17])
@pytest.mark.parametrize(("window", "hidden"), [(None, False), (2, False), (9, True), (None, True)])
@pytest.mark.parametrize(("groups", "more"), [(4, False), (2, True)])
def test_gradient(n: int, groups: int, window: int | None, hidden: bool, more: bool) -> None:
    """Of the whole table: the bucket of distant keys gets what the others leave."""
    module = bias()
    asked = request(n, groups, module, window, hidden, more)
    settings, out, lse = kernel(asked)
    close(out, plain(asked))
    direction = torch.randn_like(out)
    (wanted,) = torch.autograd.grad((plain(asked) * direction).sum(), module.relative_attention_bias.weight)
    table = _near_table(asked)
    taken = NearGradient.apply(settings, table, out.requires_grad_(), lse, asked.q, asked.k, asked.v)
    assert torch.equal(taken, out)
    found, passed = torch.autograd.grad((taken * direction).sum(), (module.relative_attention_bias.weight, out))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert torch.equal(passed, direction)


def test_who_needs_a_gradient_of_their_own() -> None:
    module = bias()
    asked = request(8, 2, module, None, False, False)
    assert ignores_constants(asked)
    assert _near_table(asked) is not None
    with torch.no_grad():
        assert _near_table(asked) is None
    module.requires_grad_(False)
    assert _near_table(request(8, 2, module, None, False, False)) is None
    module.requires_grad_(True)
    for changes in ({"sink": torch.zeros(4)}, {"visible": asked.visible._replace(prefix=1)}):
        assert _near_table(asked._replace(**changes)) is None
    tokens = Span(torch.arange(8), torch.arange(8)[None], torch.arange(8)[None], contiguous=True)
    clamp = SoftclampLogits(3.0).bind(tokens, tokens)
    assert _near_table(asked._replace(scores=(*asked.scores, clamp))) is None
    assert _near_table(asked._replace(visible=asked.visible._replace(hiding=None))) is None
    assert asked.scores[0].near is not None
    assert module.bind(tokens, tokens.first(8)).near is None, "distances are numbers of places among own tokens only"


def test_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph for the first length, and one for all others, whatever passes and layers there are."""
    graphs = Reads()
    run: Callable[..., Any] = torch.compile(near_gradient.near_gradient, backend=graphs, fullgraph=True)
    for n in (17, 17, 22, 30, 31):
        asked = request(n, 2, bias(), 9, True, False)
        settings, out, lse = kernel(asked)
        given = settings, torch.randn_like(out), out, lse, asked.q, asked.k, asked.v
        torch.testing.assert_close(run(*given), near_gradient.near_gradient(*given), atol=1e-4, rtol=1e-4)
    assert graphs.graphs == 2
