"""What acts between scores and weights, against its formula: biases, mixes of heads, suppression, and weightings."""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import catalog
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from x_transformers import Attention, CrossAttender, Decoder, Encoder
from x_transformers.attend import (
    create_causal_mask,
    log_prob_from_hard_attend,
    one_hot_straight_through,
    onnx_create_causal_mask,
    selective_attn,
    sparse_topk_attn,
)
from x_transformers.errors import ConfigError, InputError, ShapeError

DIM, HEADS, WIDTH = 12, 2, 4
SMALL = {"dim": DIM, "heads": HEADS, "attn_dim_head": WIDTH, "depth": 2, "verbose": False}
GOLDEN_CLIPPED = ("output.", "grad.", "output.masked_")
close = functools.partial(torch.testing.assert_close, atol=2e-6, rtol=1e-5)
perturbed = functools.partial(catalog.perturbed, noise=0.3)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def attention(causal: bool = True, heads: int = HEADS, **options: Any) -> Attention:
    return perturbed(Attention(DIM, dim_head=WIDTH, heads=heads, causal=causal, **options))


def inputs(n: int = 6, batch: int = 2) -> Tensor:
    return torch.randn(batch, n, DIM)


def scores(module: Attention, x: Tensor, **given: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Similarities, logits, weights."""
    _, record = module(x, return_intermediates=True, **given)
    found = record.to_tuple()
    assert all(t is not None for t in found)
    return found


def is_hidden(logits: Tensor) -> Tensor:
    return logits == -torch.finfo(logits.dtype).max


def decoded(module: Any, x: Tensor, chunks: tuple[int, ...]) -> Tensor:
    """An attention or a stack, chunk by chunk."""
    outputs, state, at = [], None, 0
    for chunk in chunks:
        new = x[:, at : at + chunk]
        if isinstance(module, Attention):
            out, state = module(new, cache=state, return_intermediates=True)
        else:
            out, state = module(new, cache=state, input_not_include_cache=True, return_hiddens=True)
        outputs.append(out)
        at += chunk
    return torch.cat(outputs, dim=1)


class TestSigmoid:
    def test_weights_are_sigmoids_and_hidden_keys_get_nothing(self) -> None:
        _, logits, weights = scores(attention(sigmoid=True), inputs())
        close(weights, logits.sigmoid())
        assert (weights[is_hidden(logits)] == 0).all()

    def test_it_has_no_sink(self) -> None:
        with pytest.raises(ConfigError, match="`head_learned_sink` takes part in a normalization"):
            attention(sigmoid=True, head_learned_sink=True)


class TestClippedSoftmax:
    @pytest.mark.parametrize(("gamma", "eta"), [(-0.03, 1.0), (-0.1, 1.1), (0.0, 1.003)])
    def test_numbers_of_the_paper(self, gamma: float, eta: float, shared: Path) -> None:
        with safe_open(shared / "golden-experts" / "clipped-softmax.safetensors", "pt") as file:
            logits, masked = (file.get_tensor(f"input.{name}") for name in ("logits", "logits_masked"))
            kind = f"eta_{eta}_gamma_{gamma}"
            wanted, gradient, hiding = (file.get_tensor(f"{name}{kind}") for name in GOLDEN_CLIPPED)
        (weighting,) = attention(
            clipped_softmax=True, clipped_softmax_gamma=gamma, clipped_softmax_eta=eta
        ).weighting.values()
        weights = weighting(logits.requires_grad_(), None)
        close(weights, wanted, atol=2e-5, rtol=0)
        weights.square().sum().backward()
        close(logits.grad, gradient, atol=2e-5, rtol=0)
        close(weighting(masked, None), hiding, atol=2e-5, rtol=0)

    def test_hidden_keys_get_nothing_and_a_single_key_everything(self) -> None:
        _, logits, weights = scores(attention(clipped_softmax=True), inputs())
        close(weights, (1.03 * logits.softmax(dim=-1) - 0.03).clamp(0, 1))
        assert (weights[is_hidden(logits)] == 0).all()
        assert (weights[:, :, 0, 0] == 1).all()
        assert (weights.sum(dim=-1)[:, :, 1:] < 1).all()

    def test_a_sink_takes_part_in_the_softmax(self) -> None:
        module = attention(clipped_softmax=True, head_learned_sink=True)
        _, logits, weights = scores(module, inputs())
        sink = module.sink.logits.reshape(-1, 1, 1).expand(2, HEADS, 6, 1)
        own = logits[..., -6:]
        wanted = (1.03 * torch.cat((sink, own), dim=-1).softmax(dim=-1) - 0.03).clamp(0, 1)
        close(weights[..., -6:], wanted[..., 1:])

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"clipped_softmax_gamma": 0.1}, "`clipped_softmax_gamma` is 0.1; it must be at most 0"),
            ({"clipped_softmax_eta": 0.9}, "`clipped_softmax_eta` is 0.9; it must be at least 1"),
            ({"laser": True}, "`clipped_softmax` may set all weights of a query to 0"),
            ({"sigmoid": True}, "`sigmoid` and `clipped_softmax` are alternatives"),
        ],
    )
    def test_refusals(self, options: dict[str, Any], words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            attention(clipped_softmax=True, **options)


class TestTopK:
    LOGITS = torch.tensor([[1.0, 3.0, 2.0, 3.0, -1.0]])

    def test_equals_of_the_kth_are_kept(self) -> None:
        half = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])
        close(sparse_topk_attn(self.LOGITS, 1), half)
        close(sparse_topk_attn(self.LOGITS, 2), half)
        third = sparse_topk_attn(self.LOGITS, 3)
        assert (third > 0).tolist() == [[False, True, True, True, False]]
        close(third.sum(), torch.tensor(1.0))

    def test_a_short_axis_keeps_everything(self) -> None:
        close(sparse_topk_attn(self.LOGITS, 9), self.LOGITS.softmax(dim=-1))
        module = attention(sparse_topk=9)
        plain = attention()
        plain.load_state_dict(module.state_dict())
        x = inputs(3)
        close(module(x), plain(x))

    def test_hidden_entries_never_count(self) -> None:
        hidden = self.LOGITS.masked_fill(torch.tensor([True, True, False, True, False]), -torch.finfo().max)
        close(sparse_topk_attn(hidden, 4)[0, [2, 4]], torch.tensor([2.0, -1.0]).softmax(dim=-1))
        assert (sparse_topk_attn(hidden, 4)[0, [0, 1, 3]] == 0).all()

    @pytest.mark.parametrize("temperature", [1.0, 2.0])
    def test_straight_through_has_the_gradient_of_the_whole_softmax(self, temperature: float) -> None:
        logits, direction = torch.randn(3, 7, requires_grad=True), torch.randn(3, 7)
        out = sparse_topk_attn(logits, 2, temperature, straight_through=True)
        close(out, sparse_topk_attn(logits, 2))
        (got,) = torch.autograd.grad((out * direction).sum(), logits)
        (wanted,) = torch.autograd.grad(((logits / temperature).softmax(dim=-1) * direction).sum(), logits)
        close(got, wanted)

    def test_any_axis(self) -> None:
        logits = torch.randn(2, 5, 3)
        close(sparse_topk_attn(logits, 2, dim=1), sparse_topk_attn(logits.mT, 2).mT)

    def test_refusals(self) -> None:
        with pytest.raises(ConfigError, match="`sparse_topk` is 0; it must be at least 1"):
            attention(sparse_topk=0)
        with pytest.raises(ConfigError, match="`attn_sigmoid` and `attn_sparse_topk` are alternatives"):
            Decoder(**SMALL, attn_sparse_topk=2, attn_sigmoid=True)


class TestHard:
    def test_the_first_of_equals_wins(self) -> None:
        assert one_hot_straight_through(torch.tensor([1.0, 2.0, 2.0])).tolist() == [0.0, 1.0, 0.0]

    @pytest.mark.parametrize("temperature", [1.0, 0.5])
    def test_gradient_is_that_of_the_softmax(self, temperature: float) -> None:
        logits, direction = torch.randn(3, 7, requires_grad=True), torch.randn(3, 7)
        out = one_hot_straight_through(logits, temperature)
        assert set(out.unique().tolist()) == {0.0, 1.0}
        (got,) = torch.autograd.grad((out * direction).sum(), logits)
        (wanted,) = torch.autograd.grad(((logits / temperature).softmax(dim=-1) * direction).sum(), logits)
        close(got, wanted)

    def test_each_query_reads_one_key(self) -> None:
        _, logits, weights = scores(attention(hard=True), inputs())
        assert torch.equal(weights, F.one_hot(logits.argmax(dim=-1), 6).float())

    def test_log_probabilities_of_what_was_read(self) -> None:
        stack = perturbed(Decoder(**SMALL, attn_hard=True))
        _, record = stack(inputs(), return_gumbel_log_probs=True)
        for one in record.attn_intermediates:
            wanted = one.pre_softmax_attn.log_softmax(dim=-1).amax(dim=-1)
            close(one.log_probs, wanted)
            close(log_prob_from_hard_attend(one), wanted)
        _, record = stack(inputs(), return_hiddens=True)
        assert record.attn_intermediates[0].log_probs is None

    def test_log_probabilities_need_scores(self) -> None:
        with pytest.raises(InputError, match="`attn_flash = True` keeps none"):
            Decoder(**SMALL, attn_flash=True)(inputs(), return_gumbel_log_probs=True)
        _, record = Decoder(**SMALL, attn_flash=True)(inputs(), return_hiddens=True)
        with pytest.raises(InputError, match="has no scores"):
            log_prob_from_hard_attend(record.attn_intermediates[0])


class TestGumbel:
    def test_keys_are_drawn_as_often_as_their_softmax_says(self) -> None:
        weighting = attention(gumbel_softmax=True).train().weighting["gumbel_softmax"]
        logits = torch.tensor([0.0, 1.0, 2.0]).expand(1, 1, 20_000, 3)
        often = weighting(logits, None).mean(dim=-2)[0, 0]
        torch.testing.assert_close(often, torch.tensor([0.0, 1.0, 2.0]).softmax(dim=-1), atol=0.02, rtol=0)

    def test_training_draws_from_torchs_generator(self) -> None:
        module, x = attention(gumbel_softmax=True).train(), inputs()
        outputs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            outputs.append(module(x))
        assert torch.equal(outputs[0], outputs[1])
        assert not torch.equal(outputs[0], outputs[2])

    def test_evaluation_draws_nothing(self) -> None:
        _, logits, weights = scores(attention(gumbel_softmax=True, gumbel_softmax_temp=0.7).eval(), inputs())
        assert torch.equal(weights, F.one_hot(logits.argmax(dim=-1), 6).float())
        soft = attention(gumbel_softmax=True, gumbel_softmax_temp=0.7, gumbel_softmax_hard=False).eval()
        _, logits, weights = scores(soft, inputs())
        close(weights, (logits / 0.7).softmax(dim=-1))

    @pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
    @pytest.mark.parametrize("hard", [True, False])
    def test_rows_without_keys_have_finite_gradients(self, hard: bool, train: bool) -> None:
        module = attention(gumbel_softmax=True, gumbel_softmax_temp=0.1, gumbel_softmax_hard=hard).train(train)
        mask = torch.tensor([[False, False, True, True, True, True]] * 2)
        out = module(inputs(), attn_mask=mask[:, None, None])
        assert (out[:, :2] == 0).all()
        out.square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())

    def test_a_low_temperature_keeps_hidden_logits_finite(self) -> None:
        weighting = attention(gumbel_softmax=True, gumbel_softmax_temp=0.1, gumbel_softmax_hard=False).weighting
        hidden = torch.full((1, 1, 1, 3), -torch.finfo().max)
        assert weighting["gumbel_softmax"](hidden, torch.zeros(3, dtype=torch.bool)).isfinite().all()

    def test_temperature_is_positive(self) -> None:
        with pytest.raises(ConfigError, match=r"`gumbel_softmax_temp` is 0\.0; it must be positive"):
            attention(gumbel_softmax=True, gumbel_softmax_temp=0.0)


class TestCustom:
    def test_a_softmax_of_ones_own_is_the_softmax(self) -> None:
        module = attention(custom_attn_fn=functools.partial(torch.softmax, dim=-1))
        plain = attention()
        plain.load_state_dict(module.state_dict())
        x = inputs()
        close(module(x), plain(x))

    def test_the_mask_comes_to_whom_asks_for_it(self) -> None:
        seen: list[Any] = []

        def counted(logits: Tensor, mask: Tensor | None) -> Tensor:
            seen.append(mask)
            assert mask is not None
            return mask.to(logits.dtype) / mask.sum(dim=-1, keepdim=True)

        _, _, weights = scores(attention(custom_attn_fn=counted), inputs(3))
        close(weights, (torch.ones(3, 3).tril() / torch.arange(1, 4)[:, None]).expand_as(weights))
        assert len(seen) == 1

    def test_hidden_keys_get_nothing_whatever_the_function_says(self) -> None:
        _, logits, weights = scores(attention(custom_attn_fn=torch.ones_like), inputs())
        assert torch.equal(weights, (~is_hidden(logits)).float())

    def test_modules_learn(self) -> None:
        class Tempered(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.heat = nn.Parameter(torch.ones(()))

            def forward(self, logits: Tensor) -> Tensor:
                return (logits / self.heat).softmax(dim=-1)

        module = attention(custom_attn_fn=Tempered())
        module(inputs()).square().sum().backward()
        grads = {name: p.grad for name, p in module.named_parameters() if name.endswith("heat")}
        assert all(grad is not None and grad != 0 for grad in grads.values())
        assert len(grads) == 1


class TestInverted:
    def build(self, **options: Any) -> Attention:
        return attention(causal=False, inverted_attention=True, **options)

    def test_queries_compete_then_keys_share(self) -> None:
        context, keys = inputs(5), torch.tensor([[True] * 5, [True, False, True, True, False]])
        _, logits, weights = scores(self.build(), inputs(3), context=context, context_mask=keys)
        wanted = logits.softmax(dim=-2).masked_fill(~keys[:, None, None], 0.0)
        close(weights, wanted / wanted.sum(dim=-1, keepdim=True))

    def test_hidden_queries_do_not_compete(self) -> None:
        module, x, context = self.build(), inputs(4), inputs(5)
        mask = torch.tensor([[True, True, True, False]] * 2)
        out = module(x, context=context, mask=mask)
        close(out[:, :3], module(x[:, :3], context=context))
        assert (out[:, 3] == 0).all()

    def test_pairs_are_hidden_behind_the_competition(self) -> None:
        """A pairwise mask takes weights away; it does not change who competes."""
        x, pairs = inputs(4), torch.rand(4, 4) > 0.4
        pairs |= torch.eye(4, dtype=torch.bool)
        module = self.build()
        weights = scores(module, x, attn_mask=pairs)[2]
        free = scores(module, x)[1].softmax(dim=-2) * pairs
        close(weights, free / free.sum(dim=-1, keepdim=True))

    def test_refusals(self) -> None:
        with pytest.raises(ConfigError, match="it cannot be causal"):
            attention(inverted_attention=True)
        with pytest.raises(ConfigError, match="write `cross_attn_inverted_attention`"):
            Encoder(**SMALL, attn_inverted_attention=True)
        for stack in (Decoder, functools.partial(CrossAttender, causal=True)):
            more = {"cross_attend": True} if stack is Decoder else {}
            with pytest.raises(ConfigError, match="`cross_attn_inverted_attention` normalizes over the queries"):
                stack(**SMALL, **more, cross_attn_inverted_attention=True)
        with pytest.raises(ConfigError, match="`head_learned_sink` competes with keys"):
            self.build(head_learned_sink=True)
        stack = CrossAttender(**SMALL, cross_attn_inverted_attention=True)
        with pytest.raises(InputError, match="neither causal nor cached"):
            stack(inputs(), context=inputs(), causal=True)
        with pytest.raises(ConfigError, match="a tuple of 1 values, but there are 2 cross-attention layers"):
            CrossAttender(**SMALL, cross_attn_inverted_attention=(True,))


class TestTalkingHeads:
    def test_formulas(self) -> None:
        module = attention(
            pre_talking_heads=True, post_talking_heads=True, pre_scale_post_talking_heads=True, head_learned_sink=True
        )
        x = inputs()
        similar, logits, weights = scores(module, x)
        seen = torch.ones(6, 6, dtype=torch.bool).tril()

        def mix(name: str, t: Tensor) -> Tensor:
            part = module.rows[name] if name in module.rows else module.weights[name]
            return torch.einsum("oh,bhij->boij", part.weight[..., 0, 0], t)

        close(logits[..., 1:][..., seen], (similar + mix("pre_talking_heads", similar))[..., seen])
        close(weights, logits.softmax(dim=-1))
        used = mix("post_talking_heads", weights[..., 1:]) * mix("pre_scale_post_talking_heads", similar)
        values = module.projections.keys_values(x, x)[1]
        close(module(x), module.out((used @ values).transpose(1, 2).flatten(2)))

    def test_logits_start_doubled(self) -> None:
        module = Attention(DIM, dim_head=WIDTH, heads=HEADS, pre_talking_heads=True)
        similar, logits, _ = scores(module, inputs())
        close(logits, 2 * similar)

    def test_a_head_that_sees_nothing_says_nothing_to_others(self) -> None:
        """Its softmax would be uniform over all keys, later ones included."""
        module, x = attention(post_talking_heads=True), inputs()
        pairs = torch.ones(HEADS, 6, 6, dtype=torch.bool)
        pairs[0] = False
        changed = x.clone()
        changed[:, 4:] = torch.randn(2, 2, DIM)
        close(module(changed, attn_mask=pairs)[:, :4], module(x, attn_mask=pairs)[:, :4])

    def test_masked_scores_of_an_earlier_layer_do_not_overflow(self) -> None:
        stack = perturbed(Decoder(**SMALL, attn_pre_scale_post_talking_heads=True, residual_attn=True))
        out = stack(inputs())
        out.square().sum().backward()
        assert out.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in stack.parameters())


class TestCog:
    def test_weights_keep_the_sign(self) -> None:
        module = attention(cog_signed=True, head_learned_sink=True)
        with torch.no_grad():
            module.sink.logits.copy_(torch.tensor([-1.0, 2.0]))
        similar, logits, weights = scores(module, inputs())
        seen = torch.ones(6, 6, dtype=torch.bool).tril()
        size = similar.abs().masked_fill(~seen, -torch.finfo().max)
        sink = torch.tensor([1.0, 2.0])[None, :, None, None].expand(2, -1, 6, 1)
        close(logits, torch.cat((sink, size), dim=-1))
        close(weights[..., 1:], torch.cat((sink, size), dim=-1).softmax(dim=-1)[..., 1:] * similar.sign())
        assert (weights[..., 1:] < 0).any()


class TestCope:
    def expected(self, module: Attention, x: Tensor, similar: Tensor, seen: Tensor) -> Tensor:
        part = module.rows["cope"]
        q = module.projections.queries(x)
        mixed = similar if part.mix is None else torch.einsum("oh,bhij->boij", part.mix[..., 0, 0], similar)
        gates = torch.where(seen, mixed.sigmoid(), 0.0)
        last = len(part.embeddings) - 1
        out = similar.clone()
        for i in range(similar.shape[-2]):
            for j in range(similar.shape[-1]):
                place = gates[:, :, i, j:].sum(dim=-1).clamp(max=last)
                by = q[:, :, i] @ part.embeddings.T
                if part.soft_onehot:
                    near = (-(place[..., None] - torch.arange(last + 1)).abs() / 0.05).softmax(dim=-1)
                    out[:, :, i, j] += (near * by).sum(dim=-1)
                    continue
                low, high = place.floor(), place.ceil()
                share = place - low
                at_low, at_high = (by.gather(-1, t.long()[..., None])[..., 0] for t in (low, high))
                out[:, :, i, j] += (1 - share) * at_low + share * at_high
        return out

    @pytest.mark.parametrize("options", [{}, {"cope_soft_onehot_pos": True}, {"cope_talking_heads": True}], ids=str)
    def test_formula(self, options: dict[str, Any]) -> None:
        """Also with a key hidden in the middle, which no mix of heads may make count."""
        module, x = attention(use_cope=True, cope_max_pos=3, **options), inputs()
        mask = torch.tensor([[True] * 6, [True, True, False, True, True, True]])
        similar, logits, _ = scores(module, x, mask=mask)
        seen = (torch.ones(6, 6).tril().bool() & mask[:, None]).unsqueeze(1)
        wanted = self.expected(module, x, similar, seen)
        close(logits[seen.expand_as(logits)], wanted[seen.expand_as(logits)], atol=1e-5)

    def test_refusals(self) -> None:
        with pytest.raises(ConfigError, match="`attn_use_cope` counts the keys up to the query"):
            Encoder(**SMALL, attn_use_cope=True)
        with pytest.raises(ConfigError, match="`cope_max_pos` is 0"):
            attention(use_cope=True, cope_max_pos=0)
        with pytest.raises(InputError, match="`use_cope` was built for causal"):
            attention(use_cope=True)(inputs(), causal=False)

    def test_cross_attention_does_not_inherit_it(self) -> None:
        stack = Decoder(**SMALL, cross_attend=True, attn_use_cope=True, attn_selective=True)
        assert all("cope" not in b.attention.rows and len(b.attention.rows) == 0 for b in stack.branches("c"))


class TestSelective:
    def test_literal(self) -> None:
        sim = torch.tensor([[9.0, -9, -9], [5.0, 9, -9], [5.0, 2, 9]])[None, None]
        # token 1 may not suppress the first token or itself, token 2 comes too late for anybody
        close(selective_attn(sim), sim)
        wanted = sim.clone()
        wanted[0, 0, 2, 0] -= 5
        close(selective_attn(sim, no_mask_sos=False), wanted)
        four = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [1, 3, 1, 0], [1, 7, 7, 1]])[None, None]
        wanted = four.clone()
        wanted[0, 0, 3, 1] -= 3
        close(selective_attn(four), wanted)

    def test_every_head_is_suppressed_by_the_gate(self) -> None:
        sim, gate = torch.randn(1, 3, 4, 4), torch.randn(1, 4, 4).abs().tril()
        fall = sim - selective_attn(sim, gate)
        close(fall, fall[:, :1].expand_as(fall))
        close(fall[0, 0, 3], torch.tensor([0.0, gate[0, 2, 1], 0.0, 0.0]))

    def test_the_part_is_the_helper(self) -> None:
        module, x = attention(selective=True), inputs()
        similar, logits, _ = scores(module, x)
        seen = torch.ones(6, 6, dtype=torch.bool).tril()
        wanted = selective_attn(similar.masked_fill(~seen, -torch.finfo().max))
        close(logits[..., seen], wanted[..., seen])

    @pytest.mark.parametrize("chunks", [(1,) * 7, (3, 2, 2)])
    def test_suppression_is_cached(self, chunks: tuple[int, ...]) -> None:
        module, x = attention(selective=True), inputs(7)
        close(decoded(module, x, chunks), module(x))

    @torch.no_grad()
    def test_suppression_in_fixed_buffers(self) -> None:
        stack, x = perturbed(Decoder(**SMALL, attn_selective=True)), inputs(7)
        state, outputs = stack.static_cache(2, 9), []
        for start, end in ((0, 3), (3, 5), (5, 6), (6, 7)):
            given = {"cache": state, "input_not_include_cache": True, "return_hiddens": True}
            out, record = stack(x[:, start:end], **given)
            outputs.append(out)
            state = record.cache
        close(torch.cat(outputs, dim=1), stack(x))

    def test_a_static_cache_may_be_wider_than_the_model(self) -> None:
        stack = Decoder(**SMALL, attn_selective=True, attn_data_dependent_alibi=True).bfloat16()
        streams = stack.static_cache(1, 4).entries[0].grown
        assert {name: stream.dtype for name, stream in streams.items()} == {
            "k": torch.bfloat16,
            "v": torch.bfloat16,
            "forget": torch.float32,
            "suppression": torch.float32,
        }

    @torch.no_grad()
    def test_cropping_takes_the_suppression_along(self) -> None:
        stack = perturbed(Decoder(**{**SMALL, "depth": 1}, attn_selective=True, attn_max_attend_past=2))
        x, state = inputs(9), None
        wanted = stack(x)
        for at in range(9):
            out, state = stack(x[:, at : at + 1], cache=state, input_not_include_cache=True, return_hiddens=True)
            close(out[:, 0], wanted[:, at])
            state.cache.crop(2)
            assert state.cache.entries[0].grown["suppression"].shape[-2] <= 2

    def test_hidden_tokens_suppress_nothing(self) -> None:
        module, x = attention(selective=True), inputs()
        mask = torch.tensor([[True, True, True, False, True, True]] * 2)
        changed = x.clone()
        changed[:, 3] = torch.randn(2, DIM) * 5
        for name in ("mask", "context_mask"):
            close(module(changed, **{name: mask})[:, 4:], module(x, **{name: mask})[:, 4:])

    def test_refusals(self) -> None:
        with pytest.raises(ConfigError, match="`attn_selective` lets tokens suppress"):
            Encoder(**SMALL, attn_selective=True)
        with pytest.raises(InputError, match="`selective` was built for causal attention"):
            Decoder(**SMALL, attn_selective=True)(inputs(), causal=False)


class TestForgetting:
    def bias(self, module: Attention, x: Tensor, **given: Any) -> Tensor:
        similar, logits, _ = scores(module, x, **given)
        return torch.where(is_hidden(logits), 0.0, logits - similar)

    def test_one_direction(self) -> None:
        module, x = attention(data_dependent_alibi=True, data_dependent_alibi_kwargs={"post_log_scale": 0.5}), inputs()
        gates = 0.5 * F.logsigmoid(module.scores["forgetting"].to_gates(x)).transpose(1, 2)
        got = self.bias(module, x)
        for i in range(6):
            for j in range(i + 1):
                close(got[:, :, i, j], gates[:, :, j + 1 : i + 1].sum(dim=-1))

    def test_both_directions(self) -> None:
        module, x = attention(causal=False, data_dependent_alibi=True), inputs()
        gates = F.logsigmoid(module.scores["forgetting"].to_gates(x)).transpose(1, 2)
        past, future = gates.split(HEADS, dim=1)
        got = self.bias(module, x)
        for i in range(6):
            for j in range(6):
                between = past[:, :, j + 1 : i + 1] if j <= i else future[:, :, i + 1 : j + 1]
                close(got[:, :, i, j], between.sum(dim=-1))

    def test_gates_of_query_and_key(self) -> None:
        module, x = attention(data_dependent_alibi=True, data_dependent_alibi_per_row=True), inputs()
        u, w = module.scores["forgetting"].to_uw(x).unflatten(-1, (2, HEADS, 8)).unbind(2)
        gates = F.logsigmoid(torch.einsum("bihd,bjhd->bhij", u, w) / math.sqrt(8))
        got = self.bias(module, x)
        for i in range(6):
            for j in range(i + 1):
                close(got[:, :, i, j], gates[:, :, i, j:i].sum(dim=-1))

    def test_gates_start_open(self) -> None:
        start = Attention(DIM, causal=True, data_dependent_alibi=True).scores["forgetting"].to_gates.bias
        assert (start == 5).all()
        given = Attention(DIM, causal=True, data_dependent_alibi=True, data_dependent_alibi_kwargs={"bias_init": 2.0})
        assert (given.scores["forgetting"].to_gates.bias == 2).all()

    @pytest.mark.parametrize("per_row", [False, True])
    @pytest.mark.parametrize("chunks", [(1,) * 7, (3, 2, 2)])
    def test_a_cache_remembers_the_gates(self, per_row: bool, chunks: tuple[int, ...]) -> None:
        module = attention(data_dependent_alibi=True, data_dependent_alibi_per_row=per_row)
        x, memory = inputs(7), inputs(3)
        close(decoded(module, x, chunks), module(x))
        whole = module(torch.cat((memory, x), dim=1))[:, 3:]
        close(module(x, mem=memory), whole)
        out, state = module(x[:, :4], mem=memory, return_intermediates=True)
        close(torch.cat((out, module(x[:, 4:], mem=memory, cache=state)), dim=1), whole)

    @pytest.mark.parametrize("per_row", [False, True])
    def test_other_biases_add_up(self, per_row: bool) -> None:
        module, x = attention(data_dependent_alibi=True, data_dependent_alibi_per_row=per_row), inputs()
        more = torch.randn(HEADS, 6, 6)
        seen = torch.ones(6, 6, dtype=torch.bool).tril()
        close(self.bias(module, x, attn_bias=more), self.bias(module, x) + more * seen, atol=1e-5)
        Decoder(**SMALL, attn_data_dependent_alibi=True, dynamic_pos_bias=True)

    @pytest.mark.parametrize("per_row", [False, True])
    def test_hidden_tokens_make_nobody_forget(self, per_row: bool) -> None:
        module = attention(data_dependent_alibi=True, data_dependent_alibi_per_row=per_row)
        x, mask = inputs(), torch.tensor([[True, True, True, False, True, True]] * 2)
        changed = x.clone()
        changed[:, 3] = torch.randn(2, DIM) * 5
        for name in ("mask", "context_mask"):
            close(module(changed, **{name: mask})[:, 4:], module(x, **{name: mask})[:, 4:])

    def test_sums_do_not_lose_digits_in_half_precision(self) -> None:
        """A thousand tokens later the last gates still count as they do alone."""
        module = attention(data_dependent_alibi=True, data_dependent_alibi_kwargs={"bias_init": -1.0}).bfloat16()
        x = torch.cat((torch.randn(1, 1000, DIM), inputs(4, 1)), dim=1).bfloat16()
        layer = self.bias(module, x)[..., -4:, -4:]
        torch.testing.assert_close(layer, self.bias(module, x[:, -4:]), atol=0.05, rtol=0.05)

    def test_refusals(self) -> None:
        on = {"attn_data_dependent_alibi": True}
        for keyword in ("alibi_pos_bias", "rel_pos_bias"):
            with pytest.raises(ConfigError, match="like `alibi_pos_bias` and `rel_pos_bias`"):
                Decoder(**SMALL, **on, **{keyword: True})
        with pytest.raises(ConfigError, match="`cross_attn_data_dependent_alibi` has no meaning"):
            Decoder(**SMALL, cross_attend=True, cross_attn_data_dependent_alibi=True)
        with pytest.raises(ConfigError, match="`attn_data_dependent_alibi_per_row` looks back"):
            Encoder(**SMALL, **on, attn_data_dependent_alibi_per_row=True)
        with pytest.raises(ConfigError, match=r"kwargs` contains \['bias_init'\]; it takes \['post_log_scale'\] here"):
            attention(
                data_dependent_alibi=True,
                data_dependent_alibi_per_row=True,
                data_dependent_alibi_kwargs={"bias_init": 2.0},
            )
        with pytest.raises(InputError, match="`data_dependent_alibi` was built for causal"):
            attention(data_dependent_alibi=True)(inputs(), causal=False)
        with pytest.raises(InputError, match="it takes no `context`"):
            attention(causal=False, data_dependent_alibi=True)(inputs(), context=inputs(3))


class TestRelativeProjection:
    @pytest.mark.parametrize("causal", [True, False])
    def test_formula(self, causal: bool) -> None:
        module = attention(causal, use_rel_proj_pos_bias=True, rel_proj_num_distance_basis=3, rel_proj_max_dist=4)
        part, x = module.scores["relative_projection"], inputs()
        similar, logits, _ = scores(module, x)
        mix = part.to_weights(x).unflatten(-1, (HEADS, 3))
        for i in range(6):
            for j in range(i + 1 if causal else 6):
                wanted = mix[:, i] @ part.bank[:, i - j] if 0 <= i - j < 4 else torch.zeros(2, HEADS)
                close((logits - similar)[:, :, i, j], wanted)

    def test_learned_memory_has_no_distance(self) -> None:
        module, x = attention(use_rel_proj_pos_bias=True, num_mem_kv=2), inputs()
        similar, logits, _ = scores(module, x)
        close(logits[..., :2], similar[..., :2])
        bare = attention(use_rel_proj_pos_bias=True)
        bare.load_state_dict(module.state_dict(), strict=False)
        one, two, _ = scores(bare, x)
        seen = torch.ones(6, 6, dtype=torch.bool).tril()
        close((logits - similar)[..., 2:][..., seen], (two - one)[..., seen], atol=1e-5)


class TestResidualScores:
    def logits(self, stack: Any, x: Tensor, kind: str = "a", **given: Any) -> list[tuple[Tensor, Tensor]]:
        _, record = stack(x, return_hiddens=True, **given)
        records = [r for r in record.attn_intermediates if r.layer_type == kind]
        return [(r.qk_similarities, r.pre_softmax_attn) for r in records]

    def own(self, stack: Any, index: int, x: Tensor, **given: Any) -> Tensor:
        """The scores that the layer would have without those of the one before it."""
        _, record = stack(x, return_hiddens=True, **given)
        branch = stack.branches("a")[index]
        normed = branch.norm(record.layer_hiddens[[i for i, k in enumerate(stack.layer_types) if k == "a"][index]])
        q, k = branch.attention.projections.queries(normed), branch.attention.projections.keys_values(normed, normed)[0]
        return q @ k.mT * branch.attention.scale

    def test_scores_begin_with_the_logits_before(self) -> None:
        """Biases add up, hidden keys add nothing, and the record shows the sum."""
        stack, x = perturbed(Decoder(**SMALL, residual_attn=True, alibi_pos_bias=True)), inputs()
        (_, before), (similar, _) = self.logits(stack, x)
        seen = torch.ones(6, 6, dtype=torch.bool).tril()
        close(similar, self.own(stack, 1, x) + torch.where(seen, before, 0.0), atol=1e-5)

    def test_a_sink_is_not_handed_on(self) -> None:
        stack, x = perturbed(Decoder(**SMALL, residual_attn=True, attn_head_learned_sink=True)), inputs()
        (_, before), (similar, _) = self.logits(stack, x)
        seen = torch.ones(6, 6, dtype=torch.bool).tril()
        close(similar, self.own(stack, 1, x) + torch.where(seen, before[..., 1:], 0.0), atol=1e-5)

    def test_keys_that_only_one_layer_has(self) -> None:
        stack, x = perturbed(Decoder(**SMALL, residual_attn=True, attn_num_mem_kv=(3, 1))), inputs()
        (_, before), (similar, _) = self.logits(stack, x)
        seen = torch.ones(6, 6, dtype=torch.bool).tril()
        close(similar[..., 1:], self.own(stack, 1, x) + torch.where(seen, before[..., 3:], 0.0), atol=1e-5)

    def test_cross_attentions_share_what_dropout_left_of_the_context(self) -> None:
        keywords = {**SMALL, "cross_attend": True, "cross_attn_tokens_dropout": 0.5}
        context = inputs(8)
        shared = Decoder(**keywords, cross_residual_attn=True)
        apart = Decoder(**keywords)
        for stack, alike in ((shared, True), (apart, False)):
            seen: list[Tensor] = []
            for branch in stack.branches("c"):
                run = branch.attention.run

                def watched(x: Tensor, layer: Any, run: Any = run, seen: list[Tensor] = seen) -> Any:
                    seen.append(layer.context)
                    return run(x, layer)

                branch.attention.run = watched
            out = stack.train()(inputs(), context=context)
            assert torch.equal(*seen) is alike
            assert out.isfinite().all()

    def test_outside_of_a_stack(self) -> None:
        module, x = attention(head_learned_sink=True), inputs()
        free, given, _ = scores(module, x)
        close(scores(module, x, prev_attn=given)[0], free + torch.where(is_hidden(given), 0.0, given)[..., 1:])
        with pytest.raises(ShapeError, match=r"`prev_attn` has shape \(2, 2, 6, 3\)"):
            module(x, prev_attn=given[..., :3])

    def test_fused_kernels_hand_on_nothing(self) -> None:
        for flash, residual in (("attn_flash", "residual_attn"), ("cross_attn_flash", "cross_residual_attn")):
            with pytest.raises(
                ConfigError, match=f"`{flash} = True` demands a fused kernel, which does not return its scores"
            ):
                Decoder(**SMALL, cross_attend=True, **{flash: True, residual: True})
        Decoder(**SMALL, cross_attend=True, attn_flash=True, cross_attn_flash=False, cross_residual_attn=True)

    def test_cross_attention_is_needed(self) -> None:
        with pytest.raises(ConfigError, match="`cross_residual_attn` connects cross-attentions"):
            Decoder(**SMALL, cross_residual_attn=True)


def tiled(tensor: Tensor, kv_heads: int, heads: int) -> Tensor:
    """Rows of kv heads repeated as the reference reads them: query head q reads kv head q % g."""
    return tensor.unflatten(0, (kv_heads, -1)).repeat(heads // kv_heads, 1, 1).flatten(0, 1)


GROUPED: dict[str, dict[str, Any]] = {
    "talking": {"pre_talking_heads": True, "post_talking_heads": True, "pre_scale_post_talking_heads": True},
    "cope": {"use_cope": True, "cope_talking_heads": True},
    "selective": {"selective": True},
    "forgetting": {"data_dependent_alibi": True},
    "forgetting both ways": {"data_dependent_alibi": True, "causal": False},
    "forgetting rows": {"data_dependent_alibi": True, "data_dependent_alibi_per_row": True},
    "relative projection": {"use_rel_proj_pos_bias": True},
}
ENTRIES: dict[str, tuple[str, ...]] = {
    "attend.pre_softmax_talking_heads.weight": ("rows.pre_talking_heads.weight",),
    "attend.post_softmax_talking_heads.weight": ("weights.post_talking_heads.weight",),
    "attend.pre_scale_post_talking_heads.weight": ("rows.pre_scale_post_talking_heads.weight",),
    "attend.cope.pos_emb": ("rows.cope.embeddings",),
    "attend.cope.talking_heads.weight": ("rows.cope.mix",),
    "data_dependent_alibi.to_forget_gates.0.weight": (
        "scores.forgetting.to_gates.weight",
        "scores.forgetting.to_uw.weight",
    ),
    "data_dependent_alibi.to_forget_gates.0.bias": ("scores.forgetting.to_gates.bias",),
    "rel_proj_pos_bias.to_distance_weights.0.weight": ("scores.relative_projection.to_weights.weight",),
    "rel_proj_pos_bias.to_distance_weights.0.bias": ("scores.relative_projection.to_weights.bias",),
    "rel_proj_pos_bias.distance_bank": ("scores.relative_projection.bank",),
    "to_q.weight": ("projections.q.weight",),
    "to_k.weight": ("projections.k.weight",),
    "to_v.weight": ("projections.v.weight",),
    "to_out.weight": ("out.weight",),
}


@pytest.mark.parametrize("name", GROUPED)
def test_checkpoints_whose_heads_are_tiled(name: str) -> None:
    """A file of the reference means the same with shared heads and with copies of them, whose orders agree."""
    options = {"causal": True, **GROUPED[name]}
    full, grouped = attention(heads=4, **options), attention(heads=4, kv_heads=2, **options)
    state = {old: full.state_dict()[new] for old, news in ENTRIES.items() for new in news if new in full.state_dict()}
    if "attend.cope.pos_emb" in state:
        state["attend.cope.positions"] = torch.arange(16.0)
    shared = {**state, **{key: torch.randn(2 * WIDTH, DIM) for key in ("to_k.weight", "to_v.weight")}}
    copied = {**state, **{key: tiled(shared[key], 2, 4) for key in ("to_k.weight", "to_v.weight")}}
    full.load_state_dict(copied)
    grouped.load_state_dict(shared)
    x = inputs()
    close(grouped(x), full(x), atol=1e-5)


@pytest.mark.parametrize("make", [create_causal_mask, onnx_create_causal_mask])
def test_causal_masks_say_what_is_hidden(make: Callable[..., Tensor]) -> None:
    assert make(2, 3, torch.device("cpu")).tolist() == [[False, False, True], [False, False, False]]
