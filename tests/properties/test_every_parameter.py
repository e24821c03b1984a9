"""Every loss reaches every parameter that trains, at every step: DistributedDataParallel stops at a missing gradient.

What a step leaves out by chance, or a batch without targets, has a gradient of zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from catalog import MAX_LEN, VOCABULARY, Case, cases, further_ids, name_of, other_inputs, perturb, tokens
from promises import running
from torch import Tensor, nn

from x_transformers import (
    DPO,
    AutoregressiveWrapper,
    BeliefStateWrapper,
    ContinuousAutoregressiveWrapper,
    ContinuousTransformerWrapper,
    Decoder,
    Encoder,
    NonAutoregressiveWrapper,
    TransformerWrapper,
    XLAutoregressiveWrapper,
    XTransformer,
    XValAutoregressiveWrapper,
    XValTransformerWrapper,
)
from x_transformers.errors import ConfigError
from x_transformers.losses import reaching

STEPS = 6
"""Enough for both sides of each coin: the seeds are fixed."""

LABELS = 7
"""Ids that every case has logits for (`logits_dim`)."""


def missing(model: nn.Module, loss: Callable[[], Tensor], resting: set[int] = frozenset()) -> set[str]:  # type: ignore[assignment]
    """Return the names of parameters without a gradient after a step.

    Args:
        model: the objective, in training mode.
        loss: computes the loss of one step.
        resting: ids of parameters that never run, by the order of execution that the user gave.
    """
    model.zero_grad(set_to_none=True)
    loss().backward()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in resting]
    for _, parameter in trained:
        assert parameter.grad is None or parameter.grad.isfinite().all()
    return {name for name, parameter in trained if parameter.grad is None}


def idle(net: TransformerWrapper) -> set[int]:
    return {id(p) for p in net.parameters()} - {id(p) for _, p in running(net)}


@pytest.mark.parametrize(("stack", "case"), cases("decoder", "cross"), ids=name_of)
def test_objectives_of_causal_models(stack: str, case: Case) -> None:
    net = case.build(stack)
    ids = tokens(2, 8) % LABELS
    given = other_inputs(net, ids)
    wrappers: list[Callable[[Any], nn.Module]] = [AutoregressiveWrapper]
    if net.max_seq_len > 0:
        net.max_mem_len = max(net.max_mem_len, 3)
        wrappers.append(XLAutoregressiveWrapper)
    for wrap in wrappers:
        try:
            model = wrap(net).train()
        except ConfigError:  # several heads, or none
            continue
        for step in range(2):
            torch.manual_seed(step)
            assert missing(model, lambda model=model: model(ids, **given), idle(net)) == set()
        ignored = torch.full_like(ids, -100)
        assert missing(model, lambda model=model, x=ignored: model(x, **given), idle(net)) == set()
    if stack == "decoder" and not given:
        objectives_without_further_inputs(net, ids)


def objectives_without_further_inputs(net: TransformerWrapper, ids: Tensor) -> None:
    """Preferences, and belief states of one decoder that reads both ways."""
    losses: list[tuple[Callable[[Any], nn.Module], Callable[[Any], Tensor]]] = [
        (DPO, lambda model: model(ids, ids.flip(1), prompt_mask=torch.arange(8).expand(2, -1) < 2)),
        (BeliefStateWrapper, lambda model: model(ids)),
    ]
    for wrap, loss in losses:
        try:
            model = wrap(net).train()
        except ConfigError:
            continue
        torch.manual_seed(0)
        assert missing(model, lambda model=model, loss=loss: loss(model), idle(net)) == set()


@pytest.mark.parametrize(("stack", "case"), cases("encoder"), ids=name_of)
def test_objectives_of_bidirectional_models(stack: str, case: Case) -> None:
    net = case.build(stack)
    try:
        model = NonAutoregressiveWrapper(net, mask_id=0, self_cond=True, self_token_critic=True).train()
    except ConfigError:
        pytest.skip("this model has no logits for each token")
    ids = tokens(2, MAX_LEN) % LABELS
    given = other_inputs(net, ids)
    assert missing(model, lambda: model(ids, **given).loss, idle(net)) == set()


def decoder(**more: Any) -> TransformerWrapper:
    layers = Decoder(dim=16, depth=1, heads=2, verbose=False)
    return perturb(TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=8, attn_layers=layers, **more))


def encoder(**more: Any) -> TransformerWrapper:
    layers = Encoder(dim=16, depth=1, heads=2, verbose=False)
    return perturb(TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=8, attn_layers=layers, **more))


def masked(**options: Any) -> tuple[nn.Module, Callable[[Any, int], Tensor]]:
    return NonAutoregressiveWrapper(encoder(), mask_id=0, **options), lambda model, n: model(tokens(2, 8)).loss


def belief(**options: Any) -> tuple[nn.Module, Callable[[Any, int], Tensor]]:
    return BeliefStateWrapper(decoder(), decoder(), **options), lambda model, n: model(tokens(2, n))


def vectors(**options: Any) -> tuple[nn.Module, Callable[[Any, int], Tensor]]:
    layers = Decoder(dim=16, depth=1, heads=2, verbose=False)
    net = perturb(ContinuousTransformerWrapper(dim_in=3, dim_out=3, max_seq_len=8, attn_layers=layers, **options))
    return ContinuousAutoregressiveWrapper(net), lambda model, n: model(torch.randn(2, n, 3), rollout_steps=1 + n % 2)


def numbers() -> tuple[nn.Module, Callable[[Any, int], Tensor]]:
    layers = Decoder(dim=16, depth=1, heads=2, verbose=False)
    net = XValTransformerWrapper(num_tokens=VOCABULARY, numerical_token_id=3, max_seq_len=8, attn_layers=layers)
    return XValAutoregressiveWrapper(perturb(net)), lambda model, n: model(tokens(2, n), torch.randn(2, n))


def translation() -> tuple[nn.Module, Callable[[Any, int], Tensor]]:
    half = {"num_tokens": VOCABULARY, "max_seq_len": 8, "depth": 1, "heads": 2, "verbose": False}
    both = {f"{name}_{key}": value for name in ("enc", "dec") for key, value in half.items()}
    model = XTransformer(dim=16, cross_attn_tokens_dropout=0.5, **both)
    return model, lambda model, n: model(tokens(2, 8), tokens(2, n))


OPTIONS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "self-conditioning": (masked, {"self_cond": True}),
    "self-conditioned critic": (masked, {"self_cond": True, "self_token_critic": True}),
    "another critic": (masked, {"token_critic": encoder(logits_dim=1)}),
    "belief": (belief, {}),
    "predicted distance": (belief, {"pred_distance": True}),
    "distance or condition": (belief, {"pred_distance": True, "cond_on_distance": True}),
    "few pairs": (belief, {"train_frac_forward_backward_pairs": 0.1, "cond_on_distance": True}),
    "vectors": (vectors, {}),
    "probabilistic vectors": (vectors, {"probabilistic": True}),
    "numbers": (numbers, {}),
    "translation": (translation, {}),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("n", [8, 3])
def test_each_side_of_each_coin(name: str, n: int) -> None:
    """Also batches that are too short for all that a loss compares."""
    build, options = OPTIONS[name]
    torch.manual_seed(0)
    model, loss = build(**options)
    model.train()
    for step in range(STEPS):
        torch.manual_seed(step)
        assert missing(model, lambda: loss(model, n)) == set(), f"step {step}"


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_a_head_that_the_loss_leaves_out(weight: float) -> None:
    net = decoder(add_continuous_pred_head=True, attn_pool=True)
    for model in (AutoregressiveWrapper(net, next_embed_loss_weight=weight), XLAutoregressiveWrapper(net)):
        assert missing(model.train(), lambda model=model: model(tokens(2, 8))) == set()
        assert missing(model, lambda model=model: model(tokens(2, 2))) == set()


def test_ids_of_further_tables_reach_them() -> None:
    net = decoder(embed_num_tokens={"kind": 5})
    ids = tokens(2, 8)
    given = {name: of(ids) for name, of in further_ids(net).items()}
    assert missing(AutoregressiveWrapper(net), lambda: AutoregressiveWrapper(net)(ids, embed_ids=given)) == set()


def test_a_gradient_of_zero_stays_zero_for_weights_that_are_not_finite() -> None:
    part, x = nn.Linear(2, 2), torch.ones((), requires_grad=True)
    part.weight.data.fill_(float("nan"))
    loss = reaching(x * 2, part, None)
    loss.backward()
    assert loss.item() == 2
    assert all(not parameter.grad.any() for parameter in part.parameters())
    with torch.no_grad():
        assert reaching(x, part) is x
