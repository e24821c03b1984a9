"""Activations that are learned quotients of polynomials: numbers of the public implementation, first values, scales."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from x_transformers import Decoder, FeedForward, TransformerWrapper, to_crmsnorm, to_rmsnorm
from x_transformers.errors import ConfigError, StateDictError
from x_transformers.feedforward.experts import Experts
from x_transformers.feedforward.rational import STARTS, GroupRational, Rational, rational
from x_transformers.models.to_experts import to_experts

FOLDER = Path(__file__).with_name("golden") / "experts"
CLOSE = 2e-5


@pytest.mark.parametrize(("name", "init"), [("rational-gelu", "gelu"), ("rational-swish", "silu")])
def test_numbers(name: str, init: str) -> None:
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        case = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    network = FeedForward(16, mult=1, rational=True, rational_groups=4, rational_init=init)
    activation = network.activation
    assert isinstance(activation, GroupRational)
    with torch.no_grad():
        activation.numerator.copy_(case["state.weight_numerator"][0])
        activation.denominator.copy_(case["state.weight_denominator"])
        for linear in (network.up, network.down):
            linear.weight.copy_(torch.eye(16))
            linear.bias.zero_()
        network.input_activation.denominator.zero_()
    # everything else is the identity now
    out = network(case["input.x"])
    assert (out - case["output.y"]).abs().max() <= CLOSE * (1 + case["output.y"].abs().max())
    (out * case["probe"]).sum().backward()
    for mine, theirs in (
        (activation.numerator.grad, case["grad.weight_numerator"][0]),
        (activation.denominator.grad, case["grad.weight_denominator"]),
    ):
        assert (mine - theirs).abs().max() <= CLOSE * (1 + theirs.abs().max())


@pytest.mark.parametrize(
    ("init", "imitated", "most"), [("silu", F.silu, 7e-6), ("gelu", F.gelu, 3.2e-3), ("identity", lambda x: x, 0.0121)]
)
def test_first_values(init: Any, imitated: Any, most: float) -> None:
    x = torch.linspace(-3, 3, 601, dtype=torch.float64).unsqueeze(-1).expand(-1, 4)
    activation = GroupRational(4, 2, init).double()
    error = (activation(x) - imitated(x)).abs().max()
    assert 0.4 * most < error <= most
    z = torch.randn(400_000, 2, generator=torch.Generator().manual_seed(0))
    gain = 1 / GroupRational(2, 1, init)(z).square().mean()
    assert gain.item() == pytest.approx(STARTS[init].gain, rel=0.02)


def test_the_denominator_of_the_identity_learns() -> None:
    activation = GroupRational(4, 2, "identity")
    activation(torch.randn(8, 4)).square().sum().backward()
    assert (activation.denominator.grad != 0).all()


@pytest.mark.parametrize("gated", [False, True])
def test_maps_keep_the_scale(gated: bool) -> None:
    network = FeedForward(256, mult=4, rational=True, glu=gated)
    x = torch.randn(256, 256)
    assert network.up(network.input_activation(x)).var().item() == pytest.approx(1, rel=0.1)
    assert network(x).var().item() == pytest.approx(1, rel=0.15)
    experts = Experts(64, experts=4, rational=True, glu=gated)
    assert experts.up.var().item() * 64 == pytest.approx(STARTS["identity"].gain, rel=0.1)
    assert experts.down.var().item() * 256 == pytest.approx(STARTS["silu"].gain, rel=0.1)


def test_other_first_weights_win() -> None:
    assert not FeedForward(16, rational=True, zero_init_output=True).down.weight.any()
    deep = FeedForward(64, rational=True, output_proj_depth=8).down.weight
    assert deep.std().item() == pytest.approx((2 * 256 * 8) ** -0.5, rel=0.1)


def test_the_backward_pass_is_that_of_the_formula() -> None:
    activation = GroupRational(6, 3, "gelu").double()
    inputs = [torch.randn(2, 5, 6, dtype=torch.float64), *(p.detach() for p in activation.parameters())]
    inputs = [(t + 0.1 * torch.randn_like(t)).requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(Rational.apply, inputs)
    assert torch.autograd.gradgradcheck(Rational.apply, inputs)
    probe = torch.randn(2, 5, 6, dtype=torch.float64)
    mine = torch.autograd.grad((Rational.apply(*inputs) * probe).sum(), inputs)
    theirs = torch.autograd.grad((rational(*inputs) * probe).sum(), inputs)
    for one, two in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, two)


def test_the_input_is_all_that_is_kept() -> None:
    kept = []
    activation = GroupRational(16, 4)
    x = torch.randn(8, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        activation(x)
    assert sum(kept) == x.numel() + 6 + 16


def test_half_precision_is_computed_in_float32() -> None:
    activation = GroupRational(4, 2).bfloat16()
    x = torch.randn(64, 4).bfloat16()
    torch.testing.assert_close(activation(x), activation.float()(x.float()).bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"rational": True, "rational_groups": 5}, "`rational_groups` is 5, which does not divide a width of 16"),
        ({"rational": True, "rational_groups": 0}, "`rational_groups` is 0; it must be a whole number"),
        ({"rational": True, "rational_init": "tanh"}, "`rational_init` is 'tanh'"),
        ({"rational": True, "swish": True}, "are alternatives of one choice"),
        ({"rational": True, "glu": True, "glu_softclamp": True}, "GroupRational"),
    ],
)
def test_refusals(keywords: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        FeedForward(16, **keywords)
    with pytest.raises(ConfigError, match=words.split("`")[0] or "ff_rational"):
        Decoder(dim=16, depth=1, heads=2, **{f"ff_{name}": value for name, value in keywords.items()})


def test_what_cannot_be_converted() -> None:
    stack = Decoder(dim=16, depth=1, heads=2, ff_rational=True)
    with pytest.raises(ConfigError, match="`ff_rational` has an activation for each group"):
        to_experts(stack, 4, 2)
    with pytest.raises(StateDictError, match="rational activations"):
        stack.export_reference_state_dict()


def test_gains_of_norms_cannot_be_multiplied_into_maps() -> None:
    layers = Decoder(dim=16, depth=1, heads=2, ff_rational=True, ff_rational_groups=1)
    model = TransformerWrapper(num_tokens=20, max_seq_len=8, attn_layers=layers)
    with pytest.raises(ConfigError, match="`ff_rational` applies activations to the features of the stream"):
        to_crmsnorm(model)
    ids = torch.randint(0, 20, (2, 6))
    torch.testing.assert_close(to_rmsnorm(model)(ids), model(ids), atol=1e-5, rtol=1e-5)


def test_the_parts_in_the_order_of_the_reference_compute_the_same() -> None:
    network = FeedForward(16, rational=True, glu=True, post_act_ln=True)
    x = torch.randn(3, 16)
    torch.testing.assert_close(network.ff(x), network(x))
