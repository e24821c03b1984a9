"""What is worked out beforehand while a text is generated: the same numbers, nothing left, nothing for gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
from x_transformers.attention.projections import Projections
from x_transformers.errors import ShapeError
from x_transformers.models.embeddings import AbsolutePositionalEmbedding
from x_transformers.modules.inference import COPIED_BYTES, PreparesForInference, plain_map, prepared
from x_transformers.modules.norms import GainNorm

OPTIONS = [
    {},
    {"attn_kv_heads": 2},
    {"attn_one_kv_head": True, "attn_qk_rmsnorm": True},
    {"attn_value_dim_head": 12},
    {"attn_num_mem_kv": 2, "rotary_pos_emb": True, "use_rmsnorm": True},
    {"attn_use_latent_kv": True, "attn_dim_latent_kv": 6},
    {"attn_use_latent_q": True, "attn_dim_latent_q": 6},
    {"num_residual_streams": 2, "qkv_receive_diff_residuals": True},
    {"norm_add_unit_offset": False},
]


def build(**options) -> TransformerWrapper:
    torch.manual_seed(0)
    stack = Decoder(dim=24, depth=2, heads=4, attn_dim_head=8, verbose=False, **options)
    net = TransformerWrapper(num_tokens=20, max_seq_len=16, attn_layers=stack).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def projections(net: nn.Module) -> list[Projections]:
    return [part for part in net.modules() if isinstance(part, Projections)]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
@torch.no_grad()
def test_the_same_numbers(options):
    net, x = build(**options), torch.randint(0, 20, (2, 9))
    expected = net(x)
    with prepared(net):
        torch.testing.assert_close(net(x), expected)
        _, record = net(x[:, :8], return_intermediates=True)
        torch.testing.assert_close(net(x, cache=record)[:, -1], expected[:, -1], atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_the_packed_matrix_is_what_is_read():
    net, x = build(), torch.randint(0, 20, (1, 5))
    with prepared(net):
        before = net(x)
        for part in projections(net):
            part.ready.zero_()
        assert not torch.allclose(net(x), before)


def test_gradients_reach_the_weights():
    net, x = build(), torch.randint(0, 20, (2, 6))
    net(x).square().mean().backward()
    expected = {name: parameter.grad.clone() for name, parameter in net.named_parameters()}
    net.zero_grad()
    with prepared(net):
        net(x).square().mean().backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_nothing_is_left_behind():
    net = build()
    names = set(net.state_dict())

    def fail():
        with prepared(net):
            assert set(net.state_dict()) == names
            assert all(part.ready is not None for part in net.modules() if isinstance(part, GainNorm))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert all(part.ready is None for part in net.modules() if isinstance(part, PreparesForInference))


def test_children_are_ordinary_attributes_meanwhile():
    net, x = build(), torch.randint(0, 20, (1, 3))
    stack, old = net.attn_layers, net.to_logits
    with prepared(net), torch.no_grad():
        assert net.__dict__["attn_layers"] is stack
        # who exchanges a child finds the new one, and who takes one away finds none
        net.to_logits = nn.Linear(24, 7)
        del stack.final_norm
        stack.final_norm = None
        assert net(x).shape[-1] == 7
        assert set(net.state_dict()) == {name for name, _ in net.named_parameters()}
    assert net.to_logits is not old
    assert stack.final_norm is None
    assert not any(name in part.__dict__ for part in net.modules() for name, _ in part.named_children())


@pytest.mark.parametrize("l2norm_embed", [False, True])
@torch.no_grad()
def test_tables_of_positions(l2norm_embed):
    table, x = AbsolutePositionalEmbedding(8, 12, l2norm_embed), torch.zeros(3, 5, 8)
    for given in ({}, {"offset": 7}, {"seq_start_pos": torch.tensor([0, 2, 4])}, {"pos": torch.arange(5).flip(0)}):
        expected = table(x, **given)
        with prepared(table):
            torch.testing.assert_close(table(x, **given), expected)
    with prepared(table), pytest.raises(ShapeError, match="max_seq_len"):
        table(x, offset=8)
    table.emb = nn.Embedding(12, 8, max_norm=0.1)
    assert table.prepare() is None
    assert AbsolutePositionalEmbedding(1024, COPIED_BYTES // 4096 + 1).prepare() is None


def test_changed_weights_are_read_by_the_next_text():
    model, x = AutoregressiveWrapper(build()), torch.randint(0, 20, (1, 4))
    for cache in ("dynamic", "static"):
        model.generate(x, 4, temperature=0.0, cache=cache)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        whole = torch.cat((x, model.generate(x, 4, temperature=0.0, cache=cache)), dim=-1)
        assert torch.equal(model.net(whole)[:, 3:-1].argmax(dim=-1), whole[:, 4:])


def test_maps_that_are_hooked_or_replaced_are_called():
    net = build()
    first, second = projections(net)
    seen = []
    first.q.register_forward_hook(lambda *_: seen.append("hooked"))
    second.v = nn.Sequential(second.v)
    with prepared(net), torch.no_grad():
        assert first.ready is None
        assert second.ready is None
        net(torch.randint(0, 20, (1, 3)))
    assert seen == ["hooked"]


class Counted(torch.Tensor):
    """Another kind of tensor, as quantised weights are."""


def hook(module: nn.Linear) -> None:
    module.register_forward_hook(lambda *_: None)


def hook_before(module: nn.Linear) -> None:
    module.register_forward_pre_hook(lambda *_: None)


def replace_forward(module: nn.Linear) -> None:
    module.forward = lambda x: nn.functional.linear(x, module.weight, module.bias)


def replace_weight(module: nn.Linear) -> None:
    module.weight = nn.Parameter(module.weight.detach().as_subclass(Counted))


def derive(module: nn.Linear) -> None:
    torch.nn.utils.parametrizations.weight_norm(module)


@pytest.mark.parametrize("change", [hook, hook_before, replace_forward, replace_weight, derive])
def test_only_plain_maps_are_read_without_a_call(change):
    module = nn.Linear(4, 6)
    found = plain_map(module)
    assert found is not None
    assert found.weight is module.weight
    assert found.bias is module.bias
    change(module)
    assert plain_map(module) is None


@pytest.mark.parametrize(
    "part",
    [
        "pos_emb.emb",
        "attn_layers.layers.0.attention.out",
        "attn_layers.layers.1.feedforward.up",
        "attn_layers.layers.1.feedforward.down",
    ],
)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_hooks_see_every_token(part, cache):
    model, seen = AutoregressiveWrapper(build()), []
    model.net.get_submodule(part).register_forward_hook(lambda _, __, out: seen.append(out.shape[1]))
    model.generate(torch.randint(0, 20, (1, 4)), 3, cache=cache)
    assert seen == [4, 1, 1]


def test_large_matrices_are_not_copied():
    wide = 8 * -(-int((COPIED_BYTES / 4 / 3) ** 0.5) // 8) + 8
    part = Projections(
        dim=wide, dim_context=wide, heads=8, kv_heads=8, key_heads=8, dim_head=wide // 8, value_dim_head=wide // 8
    )
    assert part.prepare() is None
