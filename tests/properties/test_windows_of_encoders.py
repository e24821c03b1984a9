"""Windows that end before and after a query, with every feature that an encoder can have."""

from typing import Any

import pytest
import torch
from catalog import BASE, Case, call, close, name_of, one_of_each, perturb, tokens
from promises import LENGTH, pads
from test_blocked import twins
from torch import Tensor

from x_transformers import AttentionLayers, Decoder, Encoder, PrefixDecoder, TransformerBlock
from x_transformers.attention.backends import blocked
from x_transformers.errors import ConfigError

WINDOW = {"attn_max_attend_past": 2, "attn_max_attend_future": 1}
FEATURES = [(stack, case) for stack, case in one_of_each("encoder", exempt="padding") if "window" not in case.name]


@pytest.mark.parametrize(("stack", "case"), FEATURES, ids=name_of)
def test_padded_rows(stack: str, case: Case) -> None:
    """A row of a ragged batch is the row by itself; rows are shorter than the windows of two layers, and longer."""
    pads(case.build(stack, **WINDOW), left=False)
    pads(case.build(stack, **WINDOW), left=True)


@pytest.mark.parametrize("keywords", [{}, {"rotary_pos_emb": True}, {"attn_num_mem_kv": 2}, {"alibi_pos_bias": True}])
@pytest.mark.parametrize("window", [WINDOW, {"attn_max_attend_future": 3}, {"attn_max_attend_future": (1, 4)}])
def test_kernels_agree(keywords: dict[str, Any], window: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In passes and gradients, with padding, memories, prepended embeddings and a row without tokens."""
    monkeypatch.setattr(blocked, "TALLEST", 4)
    case = Case("window", keywords={**keywords, **window})
    explicit, by_blocks = twins(case, "encoder")
    fused = case.build("encoder")
    fused.load_state_dict(explicit.state_dict())
    ids, mask = tokens(3, LENGTH), torch.arange(LENGTH) < torch.tensor([[LENGTH], [6], [0]])
    holes = torch.rand(3, LENGTH) > 0.5
    embeds, mems = torch.randn(3, 2, 16), [torch.randn(3, 3, 16)] * 2
    calls: list[dict[str, Any]] = [{}, {"mask": mask}, {"self_attn_kv_mask": holes}, {"prepend_embeds": embeds}]
    for given in (*calls, {"mems": mems, "mask": mask}, {"seq_start_pos": torch.tensor([0, 4, 9])}):
        outputs = []
        for model in (explicit, fused, by_blocks):
            model.zero_grad()
            outputs.append(call(model, ids, **given))
            outputs[-1].square().mean().backward()
        for model, output in zip((fused, by_blocks), outputs[1:], strict=True):
            close(output, outputs[0])
            for one, two in zip(explicit.parameters(), model.parameters(), strict=True):
                torch.testing.assert_close(two.grad, one.grad, atol=2e-5, rtol=5e-4)


@torch.no_grad()
def test_where_windows_end() -> None:
    """A token moves what is as far from it as the windows of all layers reach, in either direction, and no more."""
    depth, n, at = 2, 20, 9
    model = BASE.build("encoder", **WINDOW)
    ids = tokens(1, n)
    changed = ids.clone()
    changed[:, at] = (ids[:, at] + 1) % 24
    moved = (model(changed) - model(ids)).abs().amax(dim=-1)[0] > 1e-6
    assert moved.nonzero().flatten().tolist() == list(range(at - depth * 1, at + depth * 2 + 1))


@torch.no_grad()
def test_in_a_prefix() -> None:
    """A prefix decoder sees forward in its prefix, as far as the window says."""

    def reach(**window: int) -> Tensor:
        torch.default_generator.manual_seed(3)
        stack = perturb(PrefixDecoder(dim=16, depth=1, heads=2, attn_dim_head=8, verbose=False, **window)).eval()
        x = torch.randn(1, 8, 16)
        out = stack(x, prefix_attn_len=6)
        rows = []
        for at in range(8):
            moved = x.clone()
            moved[:, at] += 1
            rows.append((stack(moved, prefix_attn_len=6) - out).abs().amax(dim=-1)[0] > 1e-6)
        return torch.stack(rows, dim=1)

    distance = torch.arange(8)[:, None] - torch.arange(8)
    assert torch.equal(reach(attn_max_attend_future=2), reach() & (distance >= -2))


def test_refusals() -> None:
    for stack in (
        Decoder,
        lambda **kw: AttentionLayers(causal=True, **kw),
        lambda **kw: TransformerBlock(causal=True, **kw),
    ):
        with pytest.raises(
            ConfigError, match=r"`attn_max_attend_future` limits the future .* drop it, or use an Encoder"
        ):
            stack(dim=16, depth=1, heads=2, attn_max_attend_future=3)
    with pytest.raises(ConfigError, match="max_attend_future` is -1; it must be at least 0"):
        Encoder(dim=16, depth=1, heads=2, attn_max_attend_future=-1)
    with pytest.raises(ConfigError, match="`cross_attn_max_attend_future` limit"):
        Encoder(dim=16, depth=1, heads=2, cross_attend=True, cross_attn_max_attend_future=2)
    inherited = Encoder(dim=16, depth=1, heads=2, cross_attend=True, attn_max_attend_future=2)
    (crossing,) = inherited.branches("c")
    assert crossing.attention.max_attend_future is None


def test_costs() -> None:
    """A query of 8 tokens has 3.5 before it on average, and 3.5 after it."""

    def pairs(**options: Any) -> int:
        stack = Encoder(dim=16, depth=1, heads=2, attn_dim_head=8, verbose=False, only_attn=True, **options)
        return stack.explain(seq_len=8).rows[0].flops

    seen = 2 * 2 * (8 + 8)
    whole = pairs()
    assert (whole - pairs(attn_max_attend_past=2)) / seen == 8 - (2 + 1 + 4)
    assert (whole - pairs(attn_max_attend_future=1)) / seen == 8 - (3 + 1 + 1)
    assert (whole - pairs(**WINDOW)) / seen == 8 - (2 + 1 + 1)
