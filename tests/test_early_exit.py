"""Exits by confidence: the rule, its measures, what is saved, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from catalog import BASE, close, static_cache, tokens
from torch import Tensor

from x_transformers import AutoregressiveWrapper, Decoder, EarlyExit, TransformerWrapper
from x_transformers.decoding import generation
from x_transformers.errors import InputError
from x_transformers.forward_pass.call import Capture

DEPTH = 4
CONFIDENCES = (0.5, 0.8, 0.95, 1.0)


def sure_model(stack: str = "decoder", **options: Any) -> TransformerWrapper:
    """Build a model whose probabilities and streams are as varied as those of a trained one."""
    torch.manual_seed(3)
    model = BASE.build(stack, **{"depth": DEPTH, "rotary_pos_emb": True, **options})
    with torch.no_grad():
        model.to_logits.weight *= 12
        for name, weight in model.attn_layers.named_parameters():
            if "feedforward" in name and weight.ndim == 2:
                weight *= 2
    return model


def rule_by_hand(model: TransformerWrapper, ids: Tensor, rule: EarlyExit, blocks: tuple[int, ...]) -> Any:
    """Return the logits, and the block after which each token leaves, from the streams of single blocks."""
    stack, norm = model.attn_layers, model.attn_layers.final_norm
    stack.final_norm, stream = None, model.token_emb(ids) if model.pos_emb is None else None
    assert stream is not None
    size = stack.sequence.block
    left = torch.full(ids.shape, DEPTH)
    for number in range(1, DEPTH + 1):
        order = tuple(range((number - 1) * size, number * size))
        after = stack(stream, layers_execute_order=order)
        before, stream = stream, torch.where((left < number)[..., None], stream, after)
        if number in blocks:
            best = (model.to_logits(norm(stream)).softmax(-1)).topk(2, dim=-1).values
            measure = {
                "softmax": best[..., 0],
                "margin": best[..., 0] - best[..., 1],
                "similarity": F.cosine_similarity(before, stream, dim=-1),
            }[rule.measure]
            left[(left == DEPTH) & (measure > rule.confidence)] = number
    stack.final_norm = norm
    return model.to_logits(norm(stream)), left


@pytest.mark.parametrize("measure", ["softmax", "margin", "similarity"])
@torch.no_grad()
def test_the_rule(measure: str) -> None:
    model, ids, seen = sure_model(use_abs_pos_emb=False), tokens(4, 12), set()
    for confidence in (0.3, *CONFIDENCES):
        for layers in (None, (1, 3), (2, 4)):
            rule = EarlyExit(confidence, measure, layers)
            wanted, left = rule_by_hand(model, ids, rule, layers or (1, 2, 3))
            out, record = model(ids, early_exit=rule, return_intermediates=True)
            close(out, wanted)
            assert torch.equal(record.exit_blocks, left)
            close(model(ids, early_exit=rule), wanted)
            seen |= set(left.flatten().tolist())
    assert seen == {1, 2, 3, 4}


@pytest.mark.parametrize("confidence", CONFIDENCES)
@pytest.mark.parametrize("measure", ["softmax", "margin", "similarity"])
@torch.no_grad()
def test_decoding_equals_the_parallel_rule(measure: str, confidence: float) -> None:
    """Tokens, logits and exits are those of a pass over the whole text, for rows of different lengths too."""
    model = sure_model(exit_layers=(1, 3))
    wrapper, prompts = AutoregressiveWrapper(model), [tokens(1, n)[0] for n in (6, 4, 2)]
    given = {"exit_confidence": confidence, "exit_measure": measure}
    rule = EarlyExit(confidence, measure)
    wanted = []
    for prompt in prompts:
        text = prompt[None]
        for _ in range(8):
            text = torch.cat((text, model(text, early_exit=rule)[:, -1:].argmax(dim=-1)), dim=1)
        wanted.append(text[0, len(prompt) :])
    for how in ({}, {"cache": "static"}, {"cache_kv": False}, {"draft_layers": 1, "draft_tokens": 3}):
        new = wrapper.generate(prompts, 8, temperature=0.0, **given, **how)
        assert torch.equal(new, torch.stack(wanted)), how
        new = wrapper.generate(prompts[0], 8, temperature=0.0, **given, **how)
        assert torch.equal(new, wanted[0]), how
    streamed = torch.stack(list(wrapper.stream(prompts, 8, temperature=0.0, **given)), dim=-1)
    assert torch.equal(streamed, torch.stack(wanted))
    assert torch.equal(wrapper.beam_search(prompts, 8, beams=1, **given), torch.stack(wanted))


@torch.no_grad()
def test_at_one_it_is_the_plain_model() -> None:
    model, ids = sure_model(), tokens(2, 9)
    for measure in ("softmax", "margin", "similarity"):
        assert torch.equal(model(ids, early_exit=EarlyExit(1, measure)), model(ids))


SKIPPING = (
    {},
    {"macaron": True},
    {"cross_attend": True},
    {"parallel_block": True},
    {"shift_tokens": 1},
    {"attn_max_attend_past": 3},
    {"attn_use_latent_kv": True, "attn_dim_latent_kv": 8},
    {"add_value_residual": True},
    {"residual_attn": True},
    {"attn_data_dependent_alibi": True},
    {"layer_period": "ma", "mixer": "retention"},
    {"pre_norm": False},
    {"num_residual_streams": 2},
    {"custom_layers": ("a", "f", "a", "f"), "depth": None},
    {"attn_switch_experts": 2},
    {"use_prepbn": True},
    {"path_scales": True},
    {"depth_routing": "threshold", "depth_routing_every": 1},
    {"parallel_blocks": 2},
)


@pytest.mark.parametrize("options", SKIPPING, ids=str)
@torch.no_grad()
def test_blocks_that_are_left_out_change_nothing(options: dict[str, Any]) -> None:
    """A step that only needs the cache equals one that records everything, which runs all sublayers."""
    model = sure_model(**options)
    rows = {"context": torch.randn(1, 5, 16)} if options.get("cross_attend") else {}
    ids, rule = tokens(1, 9), EarlyExit(0.35, layers=(1, 2) if "parallel_blocks" not in options else (2,))
    for first in (None, static_cache(model, 1, 9)):
        caches: list[Any] = [first, None if first is None else static_cache(model, 1, 9)]
        resting = 0
        for start, end in ((0, 4), *((n, n + 1) for n in range(4, 9))):
            outs = []
            for way, capture in enumerate((Capture(), Capture(hiddens=True))):
                out, record = model(
                    ids[:, start:end],
                    cache=caches[way],
                    input_not_include_cache=True,
                    return_intermediates=True,
                    capture=capture,
                    early_exit=rule,
                    **rows,
                )
                caches[way] = record.cache
                outs.append((out, record))
            (out, record), (whole, full) = outs
            close(out, whole)
            assert torch.equal(record.exit_blocks, full.exit_blocks)
            resting += int(end - start == 1 and bool((record.exit_blocks < 4).all()))
            assert len(record.attn_intermediates) == len(full.attn_intermediates)
        assert resting > 0
        for one, two in zip(caches[0].entries, caches[1].entries, strict=True):
            assert one.grown.keys() == two.grown.keys()
            for name, stream in one.grown.items():
                close(stream, two.grown[name])


def test_one_row_runs_fewer_sublayers() -> None:
    model = sure_model()
    ran: list[int] = []
    for index, branch in enumerate(model.attn_layers.sublayers):
        if branch.kind.is_feedforward:
            branch.feedforward.register_forward_hook(lambda *_, index=index: ran.append(index))
    wrapper, prompt = AutoregressiveWrapper(model), tokens(1, 4)
    wrapper.generate(prompt, 6, temperature=0.0)
    plain, ran[:] = len(ran), []
    wrapper.generate(prompt, 6, temperature=0.0, exit_confidence=0.0)
    # the prompt, and each later token, runs the first block
    assert (plain, len(ran)) == (6 * DEPTH, 6)


def test_graphs_run_all_blocks_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(generation, "warn", said.append)
    generation.say_that_all_blocks_run.cache_clear()
    wrapper, prompt = AutoregressiveWrapper(sure_model()), tokens(2, 5)
    for confidence in (0.5, 0.3):
        given = {"temperature": 0.0, "exit_confidence": confidence}
        compiled = wrapper.generate(prompt, 5, **given, compile={"backend": "eager"})
        assert torch.equal(compiled, wrapper.generate(prompt, 5, **given))
    assert len(said) == 1
    assert "nothing is saved" in said[0]


@pytest.mark.parametrize(
    "options",
    [{"num_memory_tokens": 2}, {"num_memory_tokens": 2, "memory_tokens_interspersed_every": 3}, {"exit_norms": True}],
    ids=str,
)
@torch.no_grad()
def test_what_is_around_the_tokens(options: dict[str, Any]) -> None:
    """The record is of tokens only; an exit with a norm of its own reads that."""
    model, ids = sure_model(exit_layers=(1, 2), **options), tokens(2, 9)
    rule = EarlyExit(0.93)
    out, record = model(ids, early_exit=rule, return_intermediates=True)
    assert record.exit_blocks.shape == (2, 9)
    assert set(record.exit_blocks.flatten().tolist()) == {1, 2, 4}
    if "exit_norms" in options:
        # whatever leaves after the first block does not depend on the later ones
        exits = model(ids, return_exits=True)[1]
        left = record.exit_blocks == 1
        close(out[left], exits[1][left])
    text = None
    got = []
    for n in range(9):
        step, text = model(
            ids[:, n : n + 1], early_exit=rule, cache=text, input_not_include_cache=True, return_intermediates=True
        )
        got.append(step)
    close(torch.cat(got, dim=1), out)
    _, exits = model(ids, early_exit=rule, return_exits=(2,))
    left = record.exit_blocks == 2
    close(exits[2][left], out[left])


@torch.no_grad()
def test_encoders_and_padding() -> None:
    """A padded row is what it is by itself; streams of encoders need no head."""
    model, ids = sure_model("encoder"), tokens(2, 9)
    mask = torch.arange(9) < torch.tensor([[9], [6]])
    rule = EarlyExit(0.85, "similarity")
    out, record = model(ids, mask=mask, early_exit=rule, return_intermediates=True)
    alone = model(ids[1:, :6], early_exit=rule)
    close(out[1:, :6], alone)
    assert len(set(record.exit_blocks.flatten().tolist())) > 1
    features = model.attn_layers(torch.randn(2, 5, 16), early_exit=rule)
    assert features.shape == (2, 5, 16)


def test_gradients_and_checkpointing() -> None:
    ids, rule, grads = tokens(2, 9), EarlyExit(0.4), []
    for every in (None, 1):
        model = sure_model(checkpoint_every=every).train()
        model(ids, early_exit=rule).logsumexp(dim=-1).mean().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"confidence": 1.5}, "confidence of exits is 1.5; it must be a number between 0 and 1"),
        ({"confidence": True}, "confidence of exits is True"),
        ({"confidence": 0.5, "measure": "entropy"}, 'it must be one of "softmax", "margin", "similarity"'),
        ({"confidence": 0.5, "layers": (2, 1)}, "in ascending order"),
        ({"confidence": 0.5, "layers": ()}, "in ascending order"),
        ({"confidence": 0.5, "layers": 2}, "in ascending order"),
        ({"confidence": 0.5, "head": 3}, "it must be a function of features"),
        ({"confidence": 0.5, "norms": [torch.nn.Identity()]}, "they must be a mapping of blocks to norms"),
    ],
    ids=str,
)
def test_rules_that_are_none(given: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        EarlyExit(**given)


@pytest.mark.parametrize(
    ("options", "rule", "words"),
    [
        ({}, EarlyExit(0.5, layers=(1, 5)), "leave after block 5, but this pass runs 4 blocks"),
        ({"integrate_layers": True}, EarlyExit(0.5), "later blocks read the inputs of all earlier ones"),
        (
            {"attn_aggregated_residuals": True, "attn_aggregated_residual_kwargs": {"lora_rank": 4}},
            EarlyExit(0.5),
            "later blocks read the inputs of all earlier ones",
        ),
        ({"return_only_embed": True}, EarlyExit(0.5), "there is no head; use the measure"),
        ({"num_output_heads": 2}, EarlyExit(0.5), "the logits of one distribution"),
        ({"recycling": True}, EarlyExit(0.5), "runs it several times"),
        ({"average_pool_embed": True}, EarlyExit(0.5, "margin"), "predicts for whole rows"),
    ],
    ids=str,
)
def test_models_that_cannot_follow(options: dict[str, Any], rule: EarlyExit, words: str) -> None:
    model = BASE.build(depth=DEPTH, **options)
    with pytest.raises(InputError, match=words):
        model(tokens(1, 4), early_exit=rule)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"exit_confidence": -0.1}, "between 0 and 1"),
        ({"exit_measure": "margin"}, "`exit_measure` says when tokens leave by `exit_confidence`, which is None"),
        ({"exit_layers": (1,)}, "`exit_layers` says when tokens leave"),
        ({"exit_confidence": 0.5, "exit_layers": (3, 2)}, "in ascending order"),
        ({"exit_confidence": 0.5, "exit_layers": (9,)}, "leave after block 9"),
        ({"early_exit": EarlyExit(0.5)}, "give `exit_confidence`"),
    ],
    ids=str,
)
def test_generations_that_are_refused(given: dict[str, Any], words: str) -> None:
    wrapper = AutoregressiveWrapper(BASE.build(depth=DEPTH))
    with pytest.raises(InputError, match=words):
        wrapper.generate(tokens(1, 4), 2, **given)


def test_a_stack_by_itself_has_no_head() -> None:
    layers, x = Decoder(dim=16, depth=2, heads=2), torch.randn(1, 4, 16)
    with pytest.raises(InputError, match="there is no head"):
        layers(x, early_exit=EarlyExit(0.5))
    head = torch.nn.Linear(16, 7)
    assert layers(x, early_exit=EarlyExit(0.5, head=head)).shape == x.shape
