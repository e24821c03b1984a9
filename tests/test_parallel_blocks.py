"""Groups of blocks that read one stream: the equation, exits at their ends, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from catalog import BASE, close, decode, tokens
from torch import Tensor

from x_transformers import AutoregressiveWrapper, Decoder, EarlyExit, Encoder, TransformerWrapper
from x_transformers.errors import ConfigError, InputError


def grouped(**options: Any) -> TransformerWrapper:
    torch.manual_seed(1)
    given = {"depth": 4, "parallel_blocks": 2, "rotary_pos_emb": True, "use_abs_pos_emb": False, **options}
    return BASE.build(**given)


def by_hand(model: TransformerWrapper, ids: Tensor, groups: int = 2) -> list[Tensor]:
    """Return the streams after each group, from those of single blocks of a stack of the same weights."""
    options = model.attn_layers.config["options"]
    plain = Decoder(**{name: value for name, value in options.items() if name != "parallel_blocks"})
    plain.load_state_dict(model.attn_layers.state_dict())
    plain.eval().final_norm = None
    x, streams, size = model.token_emb(ids), [], plain.sequence.block
    for group in range(groups):
        total = x
        for block in (2 * group, 2 * group + 1):
            total = total + plain(x, layers_execute_order=tuple(range(block * size, (block + 1) * size))) - x
        x = total
        streams.append(x)
    return streams


@pytest.mark.parametrize("options", [{}, {"macaron": True}, {"parallel_block": True}, {"only_attn": True}], ids=str)
@torch.no_grad()
def test_the_equation(options: dict[str, Any]) -> None:
    model, ids = grouped(exit_layers=(2,), **options), tokens(2, 9)
    norm = model.attn_layers.final_norm
    after = by_hand(model, ids)
    out, exits = model(ids, return_exits=True)
    close(out, model.to_logits(norm(after[1])))
    close(exits[2], model.to_logits(norm(after[0])))
    _, record = model(ids, return_intermediates=True)
    close(record.block_hiddens[1], after[0])
    close(decode(model, ids, (4, 1, 3, 1)), out)


def maps_of(network: torch.nn.Module) -> list[torch.nn.Linear]:
    return [module for module in network.modules() if isinstance(module, torch.nn.Linear)]


@torch.no_grad()
def test_feedforwards_of_a_group_are_one_wide_one() -> None:
    """With folded gains of their norms, the maps of several feedforwards are those of a wider one."""
    torch.manual_seed(0)
    given = {"dim": 16, "heads": 2, "verbose": False, "use_simple_rmsnorm": True, "zero_init_branch_output": False}
    narrow = Encoder(**given, depth=2, parallel_blocks=2, ff_mult=2)
    wide = Encoder(**given, depth=1, ff_mult=4)
    # attention that adds nothing
    for stack in (narrow, wide):
        for branch in stack.branches("a"):
            torch.nn.init.zeros_(branch.attention.to_out.weight)
    parts = [branch.feedforward for branch in narrow.branches("f")]
    (whole,) = [branch.feedforward for branch in wide.branches("f")]
    up, down = maps_of(whole)
    ups, downs = zip(*map(maps_of, parts), strict=True)
    up.weight.copy_(torch.cat([each.weight for each in ups]))
    up.bias.copy_(torch.cat([each.bias for each in ups]))
    down.weight.copy_(torch.cat([each.weight for each in downs], dim=1))
    down.bias.copy_(torch.stack([each.bias for each in downs]).sum(dim=0))
    x = torch.randn(2, 5, 16)
    close(narrow(x), wide(x))


@pytest.mark.parametrize("checked", [None, 1, 2])
def test_checkpointing_changes_nothing(checked: int | None) -> None:
    ids, grads = tokens(2, 7), []
    for every in (None, checked):
        model = grouped(checkpoint_every=every)
        model(ids).logsumexp(dim=-1).mean().backward()
        grads.append([p.grad for p in model.parameters()])
    for one, two in zip(*grads, strict=True):
        close(one, two)


@torch.no_grad()
def test_exits_are_at_the_end_of_groups() -> None:
    model, ids = grouped(exit_layers=(2, 4)), tokens(2, 9)
    shallow = model.shallow(2)
    close(shallow(ids), model(ids, return_exits=True)[1][2])
    wrapper = AutoregressiveWrapper(model)
    wanted = wrapper.generate(ids, 5, temperature=0.0)
    for how in ({"draft_layers": 2}, {"cache": "static"}, {"exit_layer": 4}, {"exit_confidence": 1.0}):
        assert torch.equal(wrapper.generate(ids, 5, temperature=0.0, **how), wanted)
    _, record = model(ids, early_exit=EarlyExit(0.0), return_intermediates=True)
    assert (record.exit_blocks == 2).all()
    close(model(ids, early_exit=EarlyExit(0.0)), model(ids, return_exits=True)[1][2])
    only = "a stream only after every 2 blocks"
    for call in (
        lambda: model.shallow(3),
        lambda: wrapper.generate(ids, 2, exit_layer=1),
        lambda: wrapper.generate(ids, 2, draft_layers=3),
        lambda: model.attn_layers(torch.randn(1, 3, 16), exits={1: None}),
    ):
        with pytest.raises(InputError, match=only):
            call()
    with pytest.raises(InputError, match="at the end of groups of `parallel_blocks` = 2"):
        model(ids, early_exit=EarlyExit(0.5, layers=(1,)))
    with pytest.raises(ConfigError, match=only):
        grouped(exit_layers=(1, 2))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"parallel_blocks": 0}, "it is a number of blocks, at least 1"),
        ({"parallel_blocks": 3}, "4 blocks are to run, which is no multiple"),
        ({"custom_layers": ("a", "f"), "depth": None}, "groups equal blocks"),
        ({"sandwich_coef": 1}, "groups equal blocks"),
        ({"par_ratio": 2}, "groups equal blocks"),
        ({"pre_norm": False}, "which norms between them would change"),
        ({"pre_and_post_norm": True}, "which norms between them would change"),
        ({"gate_residual": True}, "so does `gate_residual`"),
        ({"orthog_residual": True}, "so does `orthog_residual`"),
        ({"mv_split_residual": True}, "so does `mv_split_residual`"),
        ({"num_residual_streams": 2}, "so does `num_residual_streams`"),
        ({"path_scales": True}, "so does `path_scales`"),
        ({"resi_dual": True}, "so does `resi_dual`"),
        (
            {"attn_aggregated_residuals": True, "attn_aggregated_residual_kwargs": {"lora_rank": 4}},
            "so does `attn_aggregated_residuals`",
        ),
        ({"integrate_layers": True}, "so does `integrate_layers`"),
        ({"unet_skips": True}, "so does `unet_skips`"),
        ({"layers_execute_order": (0, 1, 2, 3, 0, 1)}, "3 blocks are to run"),
    ],
    ids=str,
)
def test_stacks_that_are_refused(options: dict[str, Any], words: str) -> None:
    given = {"dim": 16, "depth": 4, "heads": 2, "attn_dim_head": 8, "parallel_blocks": 2, **options}
    with pytest.raises(ConfigError, match=words):
        Decoder(**given)


def test_orders_that_are_refused() -> None:
    layers = Decoder(dim=16, depth=4, heads=2, parallel_blocks=2)
    with pytest.raises(InputError, match="5 blocks are to run"):
        layers(torch.randn(1, 3, 16), repeat_blocks=(0, 2))
