"""Mixtures of experts: numbers of public implementations, losses and loads, and the balance bias."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from catalog import perturb
from safetensors import safe_open
from torch import Tensor

from x_transformers import Decoder, TransformerWrapper, to_experts
from x_transformers.errors import ConfigError, InputError, ShapeError, StateDictError
from x_transformers.feedforward.experts import Experts
from x_transformers.forward_pass.call import Capture
from x_transformers.forward_pass.intermediates import LayerIntermediates
from x_transformers.layers.plan import make_plan
from x_transformers.models.to_experts import cluster_rows, order_by_cluster
from x_transformers.routing import products
from x_transformers.routing.base import Routing, RoutingRecord
from x_transformers.routing.losses import LossWeights, record_routing
from x_transformers.routing.products import grouped_product, naive_product
from x_transformers.routing.routers import Router, softmax
from x_transformers.training.optimizers import Muon, split_parameters

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


def mixtral(case: Case) -> TransformerWrapper:
    """Return the model of two blocks."""
    layers = Decoder(
        dim=16,
        depth=2,
        heads=4,
        attn_dim_head=4,
        attn_kv_heads=2,
        rotary_pos_emb=True,
        rotary_interleaved=False,
        rotary_emb_dim=4,
        rotary_base=1e6,
        use_rmsnorm=True,
        norm_eps=1e-5,
        norm_add_unit_offset=False,
        ff_experts=4,
        ff_mult=1.5,
        verbose=False,
        **{f"ff_{name}": value for name, value in GATED.items()},
    )
    model = TransformerWrapper(num_tokens=32, max_seq_len=16, use_abs_pos_emb=False, attn_layers=layers)
    names = {"token_emb.emb.weight": "embed_tokens", "attn_layers.final_norm.gamma": "norm"}
    state = {ours: case[f"state.model.{theirs}.weight"] for ours, theirs in names.items()}
    state["to_logits.weight"] = case["state.lm_head.weight"]
    for block in range(2):
        theirs, mixing, routed = f"state.model.layers.{block}.", 2 * block, 2 * block + 1
        each = {f"{mixing}.attention.projections.{name}": f"self_attn.{name}_proj" for name in "qkv"}
        each |= {f"{mixing}.attention.out": "self_attn.o_proj", f"{routed}.feedforward.router": "mlp.gate"}
        state |= {f"attn_layers.layers.{ours}.weight": case[f"{theirs}{name}.weight"] for ours, name in each.items()}
        for sublayer, name in ((mixing, "input_layernorm"), (routed, "post_attention_layernorm")):
            state[f"attn_layers.layers.{sublayer}.norm.gamma"] = case[f"{theirs}{name}.weight"]
        stacks = f"attn_layers.layers.{routed}.feedforward."
        state[f"{stacks}up"] = swapped(case[f"{theirs}mlp.experts.gate_up_proj"])
        state[f"{stacks}down"] = case[f"{theirs}mlp.experts.down_proj"]
    model.load_state_dict(state)
    return model


def test_a_model_and_its_losses() -> None:
    """Their loss has no factor 1 / k, and pools the tokens of both layers; ours has one product for each layer."""
    case = read("mixtral-model")
    model, ids, mask = mixtral(case), case["input.ids"], case["input.mask"].bool()
    agree(model(ids).detach(), case["output.logits_without_mask"])
    logits, record = model(ids, mask=mask, return_aux_loss=True)
    agree(logits.detach()[mask], case["output.logits"][mask])
    theirs = []
    for block, routing in enumerate(record.routing):
        given = case[f"output.router_logits.{block}"][mask.flatten()].softmax(dim=-1)
        shares = torch.zeros_like(given).scatter(1, given.topk(2).indices, 1.0)
        theirs.append((shares, given))
        agree(2 * routing.losses["balance"].value.detach(), 4 * (shares.mean(dim=0) * given.mean(dim=0)).sum())
    shares, given = (torch.cat(each) for each in zip(*theirs, strict=True))
    agree(4 * (shares.mean(dim=0) * given.mean(dim=0)).sum(), case["output.aux_loss"])


ELSEWHERE = {
    "crms-norm": "tests/test_norm_conversions.py",
    "pre-rmsnorm-models": "tests/test_norm_conversions.py",
    "early-exit-llama": "tests/test_exits.py",
    "layerskip-schedules": "tests/test_exits.py",
    "gptoss-block": "tests/test_latent_families.py",
    "deepseekv3-model": "tests/test_latent_families.py",
    "pattention-gelu-l2-norm": "tests/test_param_tokens.py",
    "pattention-grown": "tests/test_param_tokens.py",
    "pattention-l2-norm-gelu": "tests/test_param_tokens.py",
    "pattention-softmax": "tests/test_param_tokens.py",
    "rational-gelu": "tests/test_rational.py",
    "rational-swish": "tests/test_rational.py",
    "switchhead": "tests/test_switch_head.py",
    "switchhead-all": "tests/test_switch_head.py",
    "switchhead-shared-selection": "tests/test_switch_head.py",
    "gated-attention-all-features": "tests/test_switch_head.py",
    "gated-attention-clipped": "tests/test_switch_head.py",
    "colt5-router": "tests/test_soft_topk.py",
    "colt5-feedforward": "tests/test_whole_row_feedforwards.py",
    "colt5-feedforward-soft": "tests/test_whole_row_feedforwards.py",
    "colt5-attention-heavy": "tests/test_heavy_attention.py",
    "soft-moe": "tests/test_whole_row_feedforwards.py",
    "gin-attention-none": "tests/test_gin.py",
    "gin-attention-relu": "tests/test_gin.py",
    "gin-attention-sharp-softplus": "tests/test_gin.py",
    "gin-attention-sigmoid-elementwise": "tests/test_gin.py",
    "gin-attention-silu": "tests/test_gin.py",
}
"""Files of the folder that other tests read; `test_list_of_expert_goldens.py` checks it."""


def dense_model(**options: Any) -> TransformerWrapper:
    layers = Decoder(**{"dim": 16, "depth": 2, "heads": 2, "attn_dim_head": 8, "verbose": False, **options})
    return perturb(TransformerWrapper(num_tokens=24, max_seq_len=16, attn_layers=layers))


DENSE: tuple[dict[str, Any], ...] = (
    {},
    {"ff_glu": True, "ff_swish": True, "ff_mult": 1.5},
    {"ff_glu": True, "ff_no_bias": True},
    {"ff_no_bias": True},
    {"ff_glu": True, "ff_glu_no_bias": True, "ff_no_bias": True},
    {"ff_glu": True, "ff_glu_mult_bias": True, "ff_mult": (2, 0.5)},
)


@pytest.mark.parametrize("options", DENSE, ids=lambda options: "-".join(options) or "plain")
def test_all_experts_of_a_dense_model_are_the_dense_model(options: dict[str, Any]) -> None:
    model = dense_model(**options).double()
    cut = to_experts(model, 4, 4)
    ids = torch.randint(0, 24, (2, 9))
    torch.testing.assert_close(cut(ids), model(ids), atol=1e-10, rtol=0)
    again = type(cut).from_config(cut.config).double()
    again.load_state_dict(cut.state_dict())
    assert torch.equal(again(ids), cut(ids))
    # the choice matters, and a bias is added once
    few = to_experts(model, 4, 2)
    assert not torch.allclose(few(ids), model(ids))
    with torch.no_grad():
        for model_ in (model, few):
            for name, p in model_.named_parameters():
                if "feedforward" in name and not name.endswith(("down.bias", "down_bias")):
                    p.zero_()
    torch.testing.assert_close(few(ids), model(ids), atol=1e-10, rtol=0)


def test_a_stack_is_cut_too() -> None:
    stack = dense_model().attn_layers.double()
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    torch.testing.assert_close(to_experts(stack, 2, 2)(x), stack(x), atol=1e-10, rtol=0)


def test_units_are_sorted_by_cluster() -> None:
    case = read("emergent-moe-order")
    order = order_by_cluster(case["input.cluster"])
    assert torch.equal(case["input.up"][order], case["output.up"])


def test_clusters_are_equal_and_contain_similar_rows() -> None:
    centers = torch.eye(4, 12)
    rows = (centers.repeat_interleave(6, dim=0) + 0.1 * torch.randn(24, 12)) * torch.rand(24, 1).add(0.5)
    shuffled = torch.randperm(24)
    cluster = cluster_rows(rows[shuffled], 4)
    assert cluster.bincount().tolist() == [6] * 4
    assert all(len(cluster[shuffled // 6 == each].unique()) == 1 for each in range(4))


@pytest.mark.parametrize(
    ("options", "numbers", "words"),
    [
        ({}, (5, 2), "does not divide the inner width 64"),
        ({}, (4, 5), "between 1 and the `experts` = 4"),
        ({"ff_post_act_ln": True}, (4, 2), "normalize over all hidden units"),
        ({"ff_solu": True}, (4, 2), "normalize over all hidden units"),
        ({"ff_experts": 4}, (4, 2), "runs Experts; only a FeedForward"),
        ({"only_attn": True}, (4, 2), "no feedforward"),
    ],
)
def test_what_cannot_be_cut_is_refused(options: dict[str, Any], numbers: tuple[int, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        to_experts(dense_model(**options), *numbers)


REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"ff_experts": 8, "ff_experts_topk": 9}, "`ff_experts_topk` is 9; .* the `ff_experts` = 8"),
    ({"ff_experts": 0}, "`ff_experts` is 0"),
    ({"ff_experts": 4, "ff_experts_topk": 1, "ff_router_normalize": True}, "weights the one expert by 1"),
    ({"ff_experts": 8, "ff_router_groups": 3}, "`ff_router_groups` is 3, which does not divide"),
    ({"ff_experts": 8, "ff_router_groups": 8}, "one expert only"),
    ({"ff_experts": 8, "ff_router_groups": 4, "ff_experts_topk": 3}, "hold 2 experts together"),
    ({"ff_experts": 8, "ff_router_groups": 2, "ff_router_groups_topk": 3}, "`ff_router_groups_topk` is 3"),
    ({"ff_experts": 4, "ff_router": "keys", "ff_balance_bias": True}, "`ff_balance_bias` .* nothing to train"),
    ({"ff_experts": 4, "ff_router": "keys", "ff_balance_loss_weight": 0.1}, "nothing to train"),
    ({"ff_experts": 4, "ff_router": "keys", "ff_router_z_loss_weight": 0.1}, "nothing to train"),
    ({"ff_experts": 4, "ff_balance_loss_weight": -0.1}, "must not be negative"),
    ({"ff_experts": 4, "ff_router_entropy_weight": -0.1}, "must not be negative"),
    ({"ff_experts": 4, "ff_router_scale": 0.0}, "`ff_router_scale` is 0.0"),
    ({"ff_experts": 4, "ff_expert_dropout": 1.0}, r"must lie in \[0, 1\)"),
    ({"ff_experts": 4, "ff_shared_mult": -1.0}, "must not be negative"),
    ({"ff_experts": 4, "ff_router": "linear"}, "`ff_router` is 'linear'"),
    ({"ff_experts": 4, "ff_rwkv": True}, "drop `ff_experts`, or `ff_rwkv`"),
)


@pytest.mark.parametrize(("options", "words"), REFUSED, ids=lambda value: None)
def test_what_means_nothing_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        dense_model(**options)


@pytest.mark.parametrize(
    ("options", "idle"),
    [
        ({"ff_router_scale": 2.0}, "`ff_router_scale` has no effect: experts is off"),
        ({"ff_experts": 4, "ff_shared_gate": True}, "`ff_shared_gate` has no effect"),
        ({"ff_experts": 4, "ff_router": "keys", "ff_router_bias": True}, "`ff_router_bias` has no effect"),
        (
            {"ff_experts": 4, "ff_balance_bias": True, "ff_balance_loss_per_row": True},
            "`ff_balance_loss_per_row` has no effect",
        ),
        ({"ff_experts": 4, "ff_experts_topk": 4, "ff_expert_dropout": 0.1}, "`ff_expert_dropout` has no effect"),
    ],
)
def test_keywords_without_effect_are_reported(options: dict[str, Any], idle: str) -> None:
    (sentence,) = make_plan("Decoder", {"depth": 2, **options}).warnings
    assert idle in sentence


def test_keywords_of_some_layers_are_not_reported() -> None:
    assert make_plan("Decoder", {"depth": 2, "ff_experts": (None, 4), "ff_router": "sigmoid"}).warnings == ()


def test_experts_alone() -> None:
    """Outside of a stack: any axes before the last one, and each token by itself."""
    module = Experts(8, mult=2, experts=4, dim_out=6, shared_mult=1.0, sublayer_dropout=0.0)
    x = torch.randn(2, 3, 5, 8)
    out = module(x)
    assert out.shape == (2, 3, 5, 6)
    torch.testing.assert_close(module(x[1, 2, 4]), out[1, 2, 4])
    with pytest.raises(ShapeError, match=r"must be \(..., 8\)"):
        module(x[..., :7])
    with pytest.raises(ConfigError, match="the number of experts"):
        Experts(8)
    with pytest.raises(StateDictError, match="no experts"):
        dense_model(ff_experts=4).export_reference_state_dict()


# products


SIZES = {
    "empty first": (0, 3, 4, 1),
    "empty middle": (2, 0, 0, 6),
    "empty last": (5, 3, 0, 0),
    "all at one": (0, 8, 0, 0),
    "one row": (0, 0, 1, 0),
    "none": (0, 0, 0, 0),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("widths", [(8, 12), (5, 7)], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_three_ways_to_compute_products(
    sizes: str, widths: tuple[int, int], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel, the loop and the naive one agree, outputs, gradients and gradients of gradients."""
    ends = torch.tensor(SIZES[sizes]).cumsum(0).int()
    x, weight = torch.randn(int(ends[-1]), widths[0]), torch.randn(4, widths[1], widths[0])
    inputs = [x, weight, torch.randn(4, widths[1])] if bias else [x, weight]
    inputs = [t.requires_grad_() for t in inputs]
    probe = torch.randn(x.shape[0], widths[1])

    def found(product: Any) -> list[Tensor]:
        out = product(inputs[0], inputs[1], inputs[2] if bias else None, ends)
        first = torch.autograd.grad((out * probe).square().sum(), inputs, create_graph=True)
        # PyTorch's own derivatives of an embedding of no rows fail
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs) if len(x) else ()
        return [out, *first, *second]

    wanted = found(naive_product)
    many = 0 if products.KERNEL is not None else 16
    for most in (16, many):
        monkeypatch.setattr(products, "MANY", most)
        for one, two in zip(found(grouped_product), wanted, strict=True):
            torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


def test_the_reason_for_a_product_is_told() -> None:
    cpu, gpu, half = torch.device("cpu"), torch.device("cuda"), torch.bfloat16
    if products.KERNEL is None:
        pytest.skip("PyTorch has no grouped_mm")
    assert products.choose_product(gpu, half, 8, (64, 32)).name == "grouped_mm"
    assert products.choose_product(cpu, torch.float32, 64, (64, 32)).name == "grouped_mm"
    for given, words in (
        ((gpu, half, 8, (64, 20)), "the width 20 is no multiple of 8"),
        ((gpu, torch.float32, 8, (64, 32)), "for bfloat16"),
        ((cpu, torch.float64, 64, (64, 32)), "no kernel for torch.float64"),
        ((cpu, torch.float32, 8, (64, 32)), "a loop over 8 experts"),
    ):
        product = products.choose_product(*given)
        assert product.name == "looped"
        assert words in product.why
    compiled = products.choose_product(cpu, torch.float32, 64, (64, 32), compiled=True)
    assert "the compiler knows" in compiled.why


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prefill_and_steps_are_graphs(dtype: torch.dtype) -> None:
    """Of the whole layer, forward and backward, with the loop as one operator."""
    module = Experts(16, mult=1, experts=4, glu=True, shared_mult=0.5).to(dtype)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for n in (6, 1):
        x = torch.randn(2, n, 16, dtype=dtype)
        found, wanted = compiled(x), module(x)
        torch.testing.assert_close(found, wanted)
        each = [torch.autograd.grad(out.square().sum(), list(module.parameters())) for out in (found, wanted)]
        for one, two in zip(*each, strict=True):
            torch.testing.assert_close(one, two)


@pytest.mark.cuda
@pytest.mark.skipif(products.KERNEL is None, reason="this PyTorch has no grouped_mm, and loops wait for the GPU")
def test_nothing_waits_for_a_gpu() -> None:
    """Neither the choice of experts, nor their products with the kernel, nor the gradients."""
    module = Experts(64, mult=1, experts=4, glu=True, balance_bias=True, shared_mult=0.5).to("cuda", torch.bfloat16)
    x = torch.randn(2, 16, 64, device="cuda", dtype=torch.bfloat16)
    assert products.choose_product(x.device, x.dtype, 4, (64, 128)).name == "grouped_mm"
    module(x).sum().backward()  # libraries are loaded at the first call
    torch.cuda.set_sync_debug_mode("error")
    try:
        module(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_other_tokens_change_nothing() -> None:
    """A token has the experts, and the output, that it has by itself."""
    module = Experts(16, mult=1, experts=4, router="sigmoid", router_groups=2, router_groups_topk=1, balance_bias=True)
    x = torch.randn(1, 20, 16)
    out, routing = module(x), module.route(x[0])
    for token in range(20):
        alone = module.route(x[0, token : token + 1])
        assert torch.equal(alone.experts[0], routing.experts[token])
        torch.testing.assert_close(module(x[:, token : token + 1])[0, 0], out[0, token])


def test_router_stays_in_float32() -> None:
    """Whatever the dtype of the model and autocast are."""
    module = Experts(64, mult=0.5, experts=64, experts_topk=8)
    x = torch.randn(2000, 64).bfloat16()
    wanted = module.route(x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = module.route(x)
    assert torch.equal(found.experts, wanted.experts)
    assert found.weights.dtype is torch.float32
    half = module.bfloat16()
    assert half.route(x).logits.dtype is torch.float32
    assert half(x[None]).dtype is torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert half.float()(x[None].float()).dtype is torch.bfloat16


def test_dropped_experts_are_not_chosen() -> None:
    router = Router(8, 6, 2, dropout=0.5)
    x = torch.zeros(4000, 8)
    with torch.no_grad():
        router.weight.copy_(torch.linspace(1, 2, 6).unsqueeze(-1).expand(6, 8))
    x += 1
    best = router.eval()(x).experts
    assert (best.sort().values == torch.tensor([4, 5])).all()
    chosen = torch.zeros(4000, 6).scatter_(1, router.train()(x).experts, 1.0).mean(dim=0)
    # an expert that is not available, or all are if fewer than two are left (7 of 64 cases)
    assert (chosen > 0.01).all()
    assert 0.5 < chosen[5] < 0.65


# the balance bias


def balanced(**options: Any) -> TransformerWrapper:
    return dense_model(**{"ff_experts": 4, "ff_mult": 1, "ff_balance_bias": True, **options})


def biases(model: TransformerWrapper) -> list[Tensor]:
    return [module.score_bias.clone() for module in model.modules() if isinstance(module, Router)]


def test_balance_bias_moves_towards_equal_loads() -> None:
    model, ids = balanced(), torch.randint(0, 24, (2, 9))
    assert not model.has_aux_loss
    model.train()
    before = biases(model)
    _, record = model(ids, return_aux_loss=True)
    _, other = model(ids.flip(0) // 2, return_aux_loss=True)
    assert all(torch.equal(one, two) for one, two in zip(before, biases(model), strict=True))
    model.balance_experts_([record, other], rate=0.5)
    assert record.routing is not None
    assert other.routing is not None
    for bias, one, two in zip(biases(model), record.routing, other.routing, strict=True):
        load = one.load + two.load
        wanted = 0.5 * (load.mean() - load).sign()
        torch.testing.assert_close(bias, wanted - wanted.mean())
    # it changes the choice and not the weights
    _, again = model(ids, return_intermediates=True)
    assert any((a.load != b.load).any() for a, b in zip(record.routing, again.routing, strict=True))
    copied = type(model).from_config(model.config)
    copied.load_state_dict(model.state_dict())
    torch.testing.assert_close(copied(ids), model(ids))


def test_numbers_of_known_loads() -> None:
    """Signs of the differences to the mean load, 0.5, times the rate, and centered."""
    model, load = balanced(depth=1), torch.tensor([0.75, 0.5, 0.5, 0.25])
    record = RoutingRecord(load, load / 2, {}, None, None, None, layer_index=1, step=1)
    model.balance_experts_(LayerIntermediates(routing=[record]), rate=0.5)
    assert biases(model)[0].tolist() == [-0.5, 0.0, 0.0, 0.5]
    model.balance_experts_(LayerIntermediates(routing=[replace(record, load=load.roll(1))]), rate=0.25)
    assert biases(model)[0].tolist() == [-0.25, -0.25, 0.0, 0.5]


def test_passes_of_tied_layers_are_added() -> None:
    model, ids = balanced(weight_tie_layers=True), torch.randint(0, 24, (2, 9))
    _, record = model(ids, return_aux_loss=True)
    assert record.routing is not None
    assert len(record.routing) == 2
    load = record.routing[0].load + record.routing[1].load
    model.balance_experts_(record)
    wanted = 1e-3 * (load.mean() - load).sign()
    torch.testing.assert_close(biases(model)[0], wanted - wanted.mean())


def test_balance_needs_a_bias_and_loads() -> None:
    ids = torch.randint(0, 24, (2, 9))
    model = dense_model(ff_experts=4)
    _, record = model(ids, return_aux_loss=True)
    with pytest.raises(InputError, match="ff_balance_bias = True"):
        model.balance_experts_(record)
    model = balanced()
    _, record = model(ids, return_intermediates=True, capture=Capture())
    with pytest.raises(InputError, match="return_aux_loss = True"):
        model.balance_experts_(record)


def test_training_balances_loads() -> None:
    """With the rule and nothing else, a router that sends most tokens to one expert comes to send as many to each."""
    router = Router(8, 4, 1, "sigmoid", normalize=False, balance_bias=True)
    with torch.no_grad():
        router.weight[0] += 0.5
    x = torch.randn(512, 8) + 0.5
    loads = []
    for _ in range(300):
        load = router(x).experts.flatten().bincount(minlength=4) / 512.0
        loads.append(load.max().item())
        assert router.score_bias is not None
        router.score_bias += 5e-3 * (load.mean() - load).sign()
        router.score_bias -= router.score_bias.mean()
    assert loads[0] > 0.45
    assert max(loads[-20:]) < 0.3


def test_active_parameters_and_flops() -> None:
    model = dense_model(ff_experts=4, ff_mult=1, ff_shared_mult=0.5, ff_no_bias=True)
    row = model.explain().rows[1]
    router, expert, shared = 4 * 16, 2 * 16 * 16, 2 * 16 * 8
    assert row.parameters == router + 4 * expert + shared
    assert row.active == router + 2 * expert + shared
    assert row.flops == 2 * row.active
    assert row.backend == "looped"
    assert "4 experts of 16, 2 used" in row.why
    assert f"({model.explain().active:,} active)" in str(model.explain())
    assert f"({model.explain().active:,} active)" in model.explain()._repr_html_()


def test_muon_takes_stacks_of_matrices() -> None:
    """Each matrix of a stack by itself; the router goes to the other optimizer."""
    model = dense_model(ff_experts=4, ff_mult=1, ff_shared_mult=0.5)
    split = split_parameters(model)
    names = {id(p): name for name, p in model.named_parameters()}
    matrices = {names[id(p)].split("feedforward.")[-1] for p in split.matrices if "feedforward" in names[id(p)]}
    assert matrices == {"up", "down", "shared.up.weight", "shared.down.weight"}
    assert any("router" in names[id(p)] for p in split.others)
    stack = torch.nn.Parameter(torch.zeros(3, 4, 6))
    each = [torch.nn.Parameter(torch.zeros(4, 6)) for _ in range(3)]
    gradient = torch.randn(3, 4, 6)
    stack.grad = gradient
    for parameter, own in zip(each, gradient, strict=True):
        parameter.grad = own
    Muon([stack]).step()
    Muon(each).step()
    torch.testing.assert_close(stack.data, torch.stack([parameter.data for parameter in each]))
    with pytest.raises(ConfigError, match="Muon takes matrices"):
        Muon([torch.nn.Parameter(torch.zeros(4))])
