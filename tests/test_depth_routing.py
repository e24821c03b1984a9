"""Depth routing: the rule, its losses and records, what is saved, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from catalog import BASE, close, decode, static_cache, tokens
from torch import Tensor

from x_transformers import AutoregressiveWrapper, Decoder, Encoder, PrefixDecoder, TransformerWrapper
from x_transformers.errors import ConfigError, InputError
from x_transformers.forward_pass.call import Capture
from x_transformers.layers.depth_routing import DepthRouter

THRESHOLD = {"depth_routing": "threshold", "rotary_pos_emb": True, "use_abs_pos_emb": False}


def routed(stack: str = "decoder", **options: Any) -> TransformerWrapper:
    torch.manual_seed(1)
    return BASE.build(stack, **{**THRESHOLD, "depth": 4, **options})


def router_of(model: TransformerWrapper, block: int) -> DepthRouter:
    routers = model.attn_layers.depth_routers
    assert routers is not None
    return routers[str(block)]  # type: ignore[return-value]


def by_hand(
    model: TransformerWrapper, row: Tensor, blocks: tuple[int, ...], choose: Any
) -> tuple[Tensor, list[Tensor]]:
    """Return the logits of one row, of which routed blocks run the chosen tokens and no others, and the choices."""
    plain = copy.deepcopy(model)
    stack, norm, x, choices = plain.attn_layers, plain.attn_layers.final_norm, plain.token_emb(row[None]), []
    stack.final_norm = stack.depth_routers = None
    for block in range(stack.sequence.blocks):
        order = (2 * block, 2 * block + 1)
        if block not in blocks:
            x = stack(x, layers_execute_order=order)
            continue
        router = router_of(model, block)
        scores = (x[0] @ router.weight[0] + router.bias).double()
        chosen = choose(scores)
        choices.append(chosen)
        where = chosen.nonzero()[:, 0]
        if len(where):
            # the chosen tokens by themselves, at their own positions
            ran = stack(x[:, where], pos=where, layers_execute_order=order)
            mixed = x[:, where] + scores[where].sigmoid().float()[:, None] * (ran - x[:, where])
            x = x.index_copy(1, where, mixed)
    return plain.to_logits(norm(x))[0], choices


@pytest.mark.parametrize(("stack", "every"), [("decoder", 2), ("decoder", 1), ("encoder", 2), ("decoder", 3)])
@torch.no_grad()
def test_the_rule(stack: str, every: int) -> None:
    model, ids = routed(stack, depth_routing_every=every), tokens(3, 11)
    blocks = tuple(range(every - 1, 4, every))
    out, record = model(ids, return_intermediates=True)
    wanted = [by_hand(model, row, blocks, lambda scores: scores > 0) for row in ids]
    close(out, torch.stack([logits for logits, _ in wanted]))
    for number, each in enumerate(record.routing):
        chosen = torch.stack([choices[number] for _, choices in wanted])
        assert torch.equal(each.chosen, chosen)
        close(each.load, chosen.float().mean()[None])
        assert 0 < each.load < 1


@pytest.mark.parametrize("share", [0.125, 0.5, 1.0])
@torch.no_grad()
def test_the_best_of_each_row(share: float) -> None:
    """Padded rows choose their share of their own tokens, as they do by themselves."""
    model, ids = routed("encoder", depth_routing="topk", depth_routing_share=share), tokens(3, 12)
    mask = torch.arange(12) < torch.tensor([[12], [7], [1]])
    out, record = model(ids, mask=mask, return_intermediates=True)
    for row, length in enumerate((12, 7, 1)):
        count = -(-round(share * 1000) * length // 1000)

        def best(scores: Tensor, count: int = count) -> Tensor:
            return torch.zeros_like(scores, dtype=torch.bool).scatter(0, scores.topk(count).indices, True)

        wanted, choices = by_hand(model, ids[row, :length], (1, 3), best)
        close(out[row, :length], wanted)
        for each, chosen in zip(record.routing, choices, strict=True):
            assert torch.equal(each.chosen[row, :length], chosen)
            assert not each.chosen[row, length:].any()
        alone = model(ids[row : row + 1, :length])
        close(out[row : row + 1, :length], alone)


@torch.no_grad()
def test_the_best_of_a_row_in_training_only() -> None:
    model, ids = routed(depth_routing="topk_training", depth_routing_share=0.25), tokens(2, 12)
    same = routed()
    same.load_state_dict(model.state_dict())
    close(model(ids), same(ids))
    out, record = model.train()(ids, return_intermediates=True)
    # without a record, the chosen tokens run by themselves
    close(model(ids), out)
    assert all(each.chosen.sum(dim=1).tolist() == [3, 3] for each in record.routing)


def test_the_loss_drives_the_share() -> None:
    torch.manual_seed(0)
    layers = Decoder(dim=16, depth=2, heads=2, depth_routing="threshold", depth_routing_share=0.25)
    x = torch.randn(4, 32, 16)
    assert layers.has_aux_loss
    assert layers.depth_routers is not None
    optimizer = torch.optim.Adam(layers.depth_routers.parameters(), lr=0.05)
    shares = []
    for _ in range(60):
        _, record = layers(x, return_aux_loss=True)
        optimizer.zero_grad()
        record.aux_losses["depth_rate"].backward()
        optimizer.step()
        shares.append(float(record.routing[0].load))
    assert shares[0] > 0.35
    assert abs(shares[-1] - 0.25) < 0.08
    # the stream does not learn from it
    assert all(p.grad is None for p in layers.layers.parameters())


def test_the_loss_by_hand() -> None:
    model, ids = routed(depth_routing_share=0.3, depth_routing_loss_weight=0.5, depth=2), tokens(2, 10)
    _, record = model(ids, return_aux_loss=True, return_intermediates=True)
    (each,) = record.routing
    scores = each.logits[..., 0]
    target = torch.zeros_like(scores).scatter(1, scores.topk(3, dim=1).indices, 1.0)
    wanted = F.binary_cross_entropy_with_logits(scores, target)
    close(record.aux_losses["depth_rate"], wanted)
    close(record.aux_loss, 0.5 * wanted)
    loss = AutoregressiveWrapper(model).train()(ids)
    none = routed(depth_routing_share=0.3, depth_routing_loss_weight=0.0, depth=2)
    assert not none.has_aux_loss
    none.load_state_dict(model.state_dict())
    assert loss > AutoregressiveWrapper(none).train()(ids) + 0.1


@pytest.mark.parametrize("checked", [None, 1])
def test_gradients_reach_the_router(checked: int | None) -> None:
    model, ids = routed(checkpoint_every=checked, depth_routing_loss_weight=0.0), tokens(4, 16)
    model(ids).logsumexp(dim=-1).mean().backward()
    for block in (1, 3):
        assert all(p.grad.abs().sum() > 0 for p in router_of(model, block).parameters())
    if checked is not None:
        plain = routed(depth_routing_loss_weight=0.0)
        plain(ids).logsumexp(dim=-1).mean().backward()
        for one, two in zip(model.parameters(), plain.parameters(), strict=True):
            close(one.grad, two.grad)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attn_max_attend_past": 3},
        {"attn_use_latent_kv": True, "attn_dim_latent_kv": 8},
        {"num_memory_tokens": 2},
        {"cross_attend": True},
        {"macaron": True},
        {"attn_data_dependent_alibi": True},
        {"ff_experts": 2, "ff_mult": 1},
    ],
    ids=str,
)
@torch.no_grad()
def test_a_token_that_passes_by_is_saved(options: dict[str, Any]) -> None:
    """One row, token by token: blocks are skipped, and caches hold what they hold if nothing is skipped."""
    model, ids = routed(**options), tokens(1, 12)
    rows = {"context": torch.randn(1, 5, 16)} if "cross_attend" in options else {}
    ran: list[int] = []
    for index, branch in enumerate(model.attn_layers.sublayers):
        if branch.kind.is_feedforward and index // model.attn_layers.sequence.block == 1:
            branch.feedforward.register_forward_hook(lambda *_, index=index: ran.append(index))
    _, record = model(ids, return_intermediates=True, **rows)
    chosen = int(record.routing[0].chosen.sum()) if "ff_experts" not in options else None
    for static in (False, True):
        caches, outs, ran[:] = [], [], []
        for capture in (Capture(), Capture(hiddens=True)):
            state = static_cache(model, 1, 12) if static else None
            steps = []
            for n in range(12):
                out, state = model(
                    ids[:, n : n + 1],
                    cache=state,
                    input_not_include_cache=True,
                    return_intermediates=True,
                    capture=capture,
                    **rows,
                )
                steps.append(out)
            outs.append(torch.cat(steps, dim=1))
            caches.append(state.cache)
            if not capture.hiddens:
                count = len(ran)
        close(outs[0], outs[1])
        close(outs[0], model(ids, **rows))
        per_token = 2 if "macaron" in options else 1
        # the feedforward before a macaron's attention makes the input of its keys
        assert count < 12 * per_token
        if chosen is not None and options in ({}, {"attn_max_attend_past": 3}, {"cross_attend": True}):
            assert count == chosen
        for one, two in zip(*(cache.entries for cache in caches), strict=True):
            for name, stream in one.grown.items():
                close(stream, two.grown[name])


@torch.no_grad()
def test_segments_with_memories() -> None:
    """Memories choose by the scores that they had; those of several segments equal one pass."""
    model, ids = routed(max_mem_len=32, attn_max_attend_past=None), tokens(2, 12)
    whole = model(ids)
    mems, outs = None, []
    for first in (0, 4, 8):
        out, mems = model(ids[:, first : first + 4], mems=mems, return_mems=True)
        outs.append(out)
    close(torch.cat(outs, dim=1)[:, :4], whole[:, :4])
    # the second segment sees its memories as the tokens that they were
    record = model(ids[:, :4], return_mems=True, return_intermediates=True)[1]
    scores = [router_of(model, block)(record.mems[block]) > 0 for block in (1, 3)]
    for each, chosen in zip(record.routing, scores, strict=True):
        assert torch.equal(each.chosen, chosen)


@torch.no_grad()
def test_tied_layers_and_orders() -> None:
    model, ids = routed(weight_tie_layers=True, depth_routing_every=1), tokens(2, 9)
    assert list(model.attn_layers.depth_routers or ()) == ["0"]
    _, record = model(ids, return_intermediates=True)
    assert [each.step for each in record.routing] == [0, 2, 4, 6]
    close(decode(model, ids, (4, 1, 3, 1)), model(ids))
    model = routed()
    again = model(ids, repeat_blocks=(1, 2))
    close(again, model(ids, layers_execute_order=(0, 1, 2, 3, 2, 3, 4, 5, 6, 7)))
    shallow = model.shallow(2)
    assert list(shallow.attn_layers.depth_routers or ()) == ["1"]
    wrapper = AutoregressiveWrapper(model)
    wanted = wrapper.generate(ids, 6, temperature=0.0)
    for how in ({"draft_layers": 1}, {"cache": "static"}, {"compile": {"backend": "eager"}}, {"exit_confidence": 1.0}):
        assert torch.equal(wrapper.generate(ids, 6, temperature=0.0, **how), wanted)


@torch.no_grad()
def test_what_is_hidden_is_not_chosen_for_its_own_sake() -> None:
    """A token that is hidden as a key only is computed, and does not count."""
    model, ids = routed(), tokens(2, 9)
    kept = torch.arange(9) != 4
    _, record = model(ids, self_attn_kv_mask=kept.expand(2, -1), return_intermediates=True)
    each = record.routing[0]
    close(each.load, each.chosen[:, kept].float().mean()[None])


BOTH = "chooses the best tokens of a whole row"


@pytest.mark.parametrize(
    ("build", "options", "words"),
    [
        (Decoder, {"depth_routing": "topk"}, BOTH),
        (PrefixDecoder, {"depth_routing": "topk"}, BOTH),
        (Encoder, {"depth_routing": "topk_training"}, "is for causal stacks"),
        (PrefixDecoder, {"depth_routing": "topk_training"}, "is for causal stacks"),
        (Decoder, {"depth_routing": "random"}, "it must be one of 'threshold', 'topk', 'topk_training'"),
        (Decoder, {"depth_routing_share": 0.0}, "it must be above 0, and at most 1"),
        (Decoder, {"depth_routing_share": 1.5}, "it must be above 0, and at most 1"),
        (Decoder, {"depth_routing_every": 0}, "`depth_routing_every` is 0; it must be at least 1"),
        (Decoder, {"depth_routing_every": 3}, "builds 2 blocks, so that none is routed"),
        (Decoder, {"weight_tie_layers": True}, "builds 1 blocks, so that none is routed"),
        (Decoder, {"depth_routing_loss_weight": -1.0}, "it must not be negative"),
        (Decoder, {"unet_skips": True}, "`unet_skips` would read inputs of blocks that tokens passed by"),
        (Decoder, {"integrate_layers": True}, "`integrate_layers` would read"),
        (
            Decoder,
            {"attn_aggregated_residuals": True, "attn_aggregated_residual_kwargs": {"lora_rank": 4}},
            "`attn_aggregated_residuals` would read",
        ),
        (Decoder, {"num_residual_streams": 2}, "`num_residual_streams` has no such stream"),
        (Decoder, {"resi_dual": True}, "`resi_dual` has no such stream"),
        (Decoder, {"mv_split_residual": True}, "`mv_split_residual` has no such stream"),
        (Decoder, {"path_scales": True}, "`path_scales` has no such stream"),
        (Decoder, {"residual_attn": True}, "add the scores of the attention before"),
        (Decoder, {"shift_tokens": 1}, "would skip them"),
        (Encoder, {"shift_tokens": 1}, "would skip them"),
        (Decoder, {"ff_rwkv": True}, "would skip them"),
        (Decoder, {"mixer": "retention"}, "would skip them"),
        (Decoder, {"attn_hybrid_module": torch.nn.GRU(16, 16, batch_first=True)}, "would skip them"),
        (Decoder, {"attn_flash_pack_seq": True}, "hides keys of single tokens"),
        (Decoder, {"layers_execute_order": (0, 3, 2, 1)}, "are to run as one"),
    ],
    ids=str,
)
def test_stacks_that_are_refused(build: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(**{"dim": 16, "depth": 2, "heads": 2, "attn_dim_head": 8, "depth_routing": "threshold", **options})


def test_mixers_may_be_in_other_blocks() -> None:
    layers = Decoder(dim=16, depth=2, heads=2, mixer="retention", layer_period="ma", depth_routing="threshold")
    assert layers(torch.randn(1, 5, 16)).shape == (1, 5, 16)


def test_passes_that_are_refused() -> None:
    x = torch.randn(1, 6, 16)
    given = {"dim": 16, "depth": 2, "heads": 2, "verbose": False}
    best = Encoder(**given, depth_routing="topk")
    with pytest.raises(InputError, match="a pass with `causal = True` must not know"):
        best(x, causal=True)
    mems = [torch.randn(1, 3, 16)] * 2
    with pytest.raises(InputError, match="do not say which tokens of the segment before"):
        best(x, mems=mems)
    decoder = Decoder(**given, depth_routing="threshold")
    with pytest.raises(InputError, match="choose tokens by the stream"):
        decoder(x, mems=mems, in_attn_cond=torch.randn(1, 16))
    with pytest.raises(InputError, match="are to run as one"):
        decoder(x, layers_execute_order=(0, 3))
    macaron = Decoder(**given, depth_routing="threshold", macaron=True)
    with pytest.raises(InputError, match="choose tokens by the stream"):
        macaron(x, mems=mems)


def test_a_rule_that_differs_in_training_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("x_transformers.layers.layers.warn", said.append)
    Decoder(dim=16, depth=2, heads=2, depth_routing="topk_training")
    assert any("depends on later ones in training" in sentence for sentence in said)
