"""Mixtures of experts: numbers of public implementations, losses and loads, and the balance bias."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from x_transformers.feedforward.experts import Experts
from x_transformers.routing.base import Routing
from x_transformers.routing.losses import LossWeights, record_routing
from x_transformers.routing.routers import Router, softmax

FOLDER = Path(__file__).with_name("golden") / "experts"
CLOSE = 2e-5
Case = dict[str, Tensor]


def read(name: str) -> Case:
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        keys = file.keys()
        return {key: file.get_tensor(key) for key in keys}


def agree(mine: Tensor, theirs: Tensor, close: float = CLOSE) -> None:
    assert mine.shape == theirs.shape
    assert (mine - theirs).abs().max() <= close * (1 + theirs.abs().max())


def swapped(stack: Tensor) -> Tensor:
    """Exchange the halves of the rows: the gate comes first there, and last here."""
    return torch.cat(stack.chunk(2, dim=-2)[::-1], dim=-2)


GATED = {"glu": True, "swish": True, "no_bias": True}
ROUTED = {"router.weight": "gate.weight", "up": "experts.gate_up_proj", "down": "experts.down_proj"}
GRANITE = {
    "router.weight": "moe.router.weight",
    "up": "moe.experts.gate_up_proj",
    "down": "moe.experts.down_proj",
    "shared.up.weight": "shared.input_linear.weight",
    "shared.down.weight": "shared.output_linear.weight",
}


def shared(prefix: str) -> dict[str, Any]:
    """Name the weights of a shared network whose gate is a map of its own."""
    return {
        "shared.up.weight": (f"{prefix}.up_proj.weight", f"{prefix}.gate_proj.weight"),
        "shared.down.weight": f"{prefix}.down_proj.weight",
    }


BLOCKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mixtral-block": ({"experts": 4, "mult": 1.5}, ROUTED),
    "qwen3moe-block": ({"experts": 8, "experts_topk": 3, "mult": 0.75}, ROUTED),
    "olmoe-block": ({"experts": 8, "mult": 0.75, "router_normalize": False}, ROUTED),
    "qwen2moe-block": (
        {"experts": 6, "mult": 0.75, "router_normalize": False, "shared_mult": 1.25, "shared_gate": True},
        {**ROUTED, **shared("shared_expert"), "shared_gate.weight": "shared_expert_gate.weight"},
    ),
    "granitemoeshared-block": ({"experts": 6, "mult": 0.75, "shared_mult": 1.25}, GRANITE),
    "deepseekv3-block": (
        {
            "experts": 8,
            "experts_topk": 3,
            "mult": 0.75,
            "router": "sigmoid",
            "balance_bias": True,
            "router_groups": 4,
            "router_groups_topk": 2,
            "router_scale": 2.5,
            "shared_mult": 1.5,
        },
        {**ROUTED, **shared("shared_experts"), "router.score_bias": "gate.e_score_correction_bias"},
    ),
}


def ours(case: Case, kind: str, names: dict[str, Any]) -> Case:
    """Return weights, or their gradients, in our layout."""
    found = {}
    for mine, theirs in names.items():
        if isinstance(theirs, tuple):
            found[mine] = torch.cat([case[f"{kind}.{name}"] for name in theirs])
        elif f"{kind}.{theirs}" in case:
            t = case[f"{kind}.{theirs}"]
            found[mine] = swapped(t) if mine == "up" or (mine == "shared.up.weight") else t
    return found


def compare(module: Experts, case: Case, gradients: Case) -> None:
    """Compare output, and the gradients of the weights and of the input."""
    x = case["input.x"].clone().requires_grad_()
    out = module(x)
    assert isinstance(out, Tensor)
    agree(out.detach(), case["output.y"])
    (out * case["probe"]).sum().backward()
    assert x.grad is not None
    agree(x.grad, case["grad.input.x"])
    parameters = dict(module.named_parameters())
    assert gradients
    for name, gradient in gradients.items():
        grad = parameters[name].grad
        assert grad is not None, name
        agree(grad, gradient)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_public_models(name: str) -> None:
    case, (options, names) = read(name), BLOCKS[name]
    module = Experts(16, **GATED, **options)
    module.load_state_dict(ours(case, "state", names))
    tokens = case["input.x"].flatten(0, 1)
    routing = module.route(tokens)
    agree(routing.logits.detach(), case["output.router_logits"])
    assert torch.equal(routing.experts.sort().values, case["output.experts"].sort().values)
    agree(routing.weights.detach().sort().values, case["output.weights"].sort().values)
    compare(module, case, ours(case, "grad", names))


def test_router_with_a_bias() -> None:
    """That of gpt-oss, whose gate has no keyword."""
    case = read("gptoss-block")
    router = Router(16, 4, 2, bias=True)
    router.load_state_dict({"weight": case["state.router.weight"], "bias": case["state.router.bias"]})
    routing = router(case["input.x"].flatten(0, 1))
    agree(routing.logits.detach(), case["output.router_logits"])
    assert torch.equal(routing.experts, case["output.experts"])
    agree(routing.weights.detach(), case["output.weights"])


def test_sigma_moe() -> None:
    case = read("sigma-moe")
    module = Experts(
        16,
        mult=0.5,
        experts=6,
        router="sigmoid",
        router_normalize=False,
        router_entropy_weight=1.0,
        balance_loss_weight=0.0,
        custom_activation=F.relu,
        no_bias=True,
    )
    names = {"router.weight": "expert_sel", "up": "keys", "down": "values"}
    found = [{name: case[f"{kind}.{theirs}"] for name, theirs in names.items()} for kind in ("state", "grad")]
    for each in found:
        each["up"], each["down"] = each["up"].mT, each["down"].mT
    module.load_state_dict(found[0])
    compare(module, case, found[1])
    module.zero_grad()
    routing = module.route(case["input.x"].flatten(0, 1))
    record = record_routing(routing, (2, 7), None, softmax, module.loss_weights, choices=False)
    assert set(record.losses) == {"router_entropy"}
    value, weight = record.losses["router_entropy"]
    agree(value.detach() * weight, case["output.reg"])
    value.backward()
    grad = module.router.weight.grad
    assert isinstance(grad, Tensor)
    agree(grad, case["output.grad_reg_expert_sel"])


def test_losses_of_switch_transformers() -> None:
    case = read("switch-router")
    router = Router(16, 4, 1, normalize=False)
    router.load_state_dict({"weight": case["state.classifier.weight"]})
    routing = router(case["input.x"].flatten(0, 1))
    agree(routing.logits.detach().unflatten(0, (2, 7)), case["output.router_logits"])
    agree(routing.weights.detach().unflatten(0, (2, 7)), case["output.top_prob"])
    losses = record_routing(routing, (2, 7), None, softmax, LossWeights(1.0, True, 1.0), choices=False).losses
    agree(losses["balance"].value.detach(), case["output.balance_loss"])
    agree(losses["router_z"].value.detach(), case["output.z_loss"])


def emergent(case: Case) -> Experts:
    """Return the experts that a dense gated network is cut into."""
    module = Experts(12, mult=0.5, experts=4, router="keys", **GATED)
    up, gate, down = (case[f"state.{name}_proj.weight"] for name in ("up", "gate", "down"))
    cut = torch.cat((up.unflatten(0, (4, 6)), gate.unflatten(0, (4, 6))), dim=1)
    module.load_state_dict({"up": cut, "down": down.unflatten(1, (4, 6)).transpose(0, 1)})
    return module


def test_experts_that_emerge() -> None:
    case = read("emergent-moe-gate")
    up, gate, down = (case[f"grad.{name}_proj.weight"] for name in ("up", "gate", "down"))
    cut = torch.cat((up.unflatten(0, (4, 6)), gate.unflatten(0, (4, 6))), dim=1)
    compare(emergent(case), case, {"up": cut, "down": down.unflatten(1, (4, 6)).transpose(0, 1)})


def test_experts_of_a_choice_by_hand() -> None:
    """Experts that are chosen by the hidden values themselves, which no router does."""
    case = read("emergent-moe-inter-abs")
    module, x = emergent(case), case["input.x"].flatten(0, 1)
    hidden = F.silu(x @ case["state.gate_proj.weight"].T) * (x @ case["state.up_proj.weight"].T)
    logits = hidden.unflatten(-1, (4, 6)).abs().mean(dim=-1)
    chosen = logits.topk(2, dim=-1).indices
    out = module.mix(x, Routing(chosen, torch.ones(chosen.shape), logits))
    agree(out.detach().unflatten(0, (2, 7)), case["output.y"])


def test_every_file_is_read() -> None:
    others = {"gptoss-block", "sigma-moe", "switch-router"}
    emerging = {f"emergent-moe-{form}" for form in ("gate", "inter-abs", "order")}
    assert {path.stem for path in FOLDER.glob("*.safetensors")} == set(BLOCKS) | others | emerging
