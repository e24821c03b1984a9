"""SwitchHead: numbers of a public implementation, the choice of matrices, its records, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from catalog import BASE, close, tokens
from safetensors import safe_open
from torch import Tensor

from x_transformers import (
    Attention,
    AutoregressiveWrapper,
    Decoder,
    Encoder,
    TransformerWrapper,
    to_crmsnorm,
    to_rmsnorm,
)
from x_transformers.attention.head_maps import HeadMaps, HeadOutput, sorts_tokens
from x_transformers.errors import ConfigError, InputError, StateDictError
from x_transformers.forward_pass.call import Capture
from x_transformers.layers.plan import make_plan
from x_transformers.routing.base import Routing
from x_transformers.routing.routers import HeadRouter
from x_transformers.training.optimizers import Muon, split_parameters

FOLDER = Path(__file__).with_name("golden") / "experts"
CLOSE = 2e-5
Case = dict[str, Tensor]


def read(name: str) -> Case:
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in list(file.keys())}


def agree(mine: Tensor, theirs: Tensor) -> None:
    assert mine.shape == theirs.shape
    assert (mine - theirs).abs().max() <= CLOSE * (1 + theirs.abs().max())


# numbers of a public implementation

NAMES = {
    "projections.q.weight": "projections.q",
    "projections.k.weight": "projections.k",
    "projections.v.weight": "projections.v",
    "out.weight": "projections.o",
    "switch.values.weight": "selections.v",
    "switch.outputs.weight": "selections.o",
}
GOLDENS: dict[str, dict[str, Any]] = {
    "switchhead": {},
    "switchhead-all": {"switch_queries_keys": True},
    "switchhead-shared-selection": {"switch_one_selection": True},
}


def switching(dim: int = 16, heads: int = 2, **options: Any) -> Attention:
    return Attention(dim, dim_head=6, heads=heads, causal=True, switch_experts=4, **options)


@pytest.mark.parametrize("name", GOLDENS)
def test_numbers_of_a_public_implementation(name: str) -> None:
    """Outputs, and the gradients of the input and of all weights."""
    case, module = read(name), switching(**GOLDENS[name])
    parameters = dict(module.named_parameters())
    # there the matrices of all heads are one stack, head by head
    state = {mine: case[f"state.{NAMES[mine]}"].view_as(p) for mine, p in parameters.items()}
    module.load_state_dict(state)
    x = case["input.x"].requires_grad_()
    out = module(x)
    agree(out.detach(), case["output.y"])
    (out * case["probe"]).sum().backward()
    assert x.grad is not None
    agree(x.grad, case["grad.input.x"])
    assert len(parameters) == sum(key.startswith("grad.") for key in case) - 1
    for mine, parameter in parameters.items():
        assert parameter.grad is not None
        theirs = case[f"grad.{NAMES[mine]}"]
        agree(parameter.grad.view_as(theirs), theirs)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gated-attention-all-features", {"gate_value_heads": True}),
        ("gated-attention-clipped", {"clipped_softmax": True, "clipped_softmax_gamma": -0.25}),
    ],
)
def test_attention_that_may_do_nothing(name: str, options: dict[str, Any]) -> None:
    """Two forms of a head that ignores all keys (2306.12929): gates that read all features, and a clipped softmax."""
    case = read(name)
    module = Attention(16, dim_head=4, heads=4, qkv_bias=True, project_out=False, **options)
    names = {"projections.q": "query", "projections.k": "key", "projections.v": "value"}
    if "gate_value_heads" in options:
        names["values.gate_value_heads.gate"] = "alpha"
    kinds = {f"{mine}.{kind}": f"{theirs}.{kind}" for mine, theirs in names.items() for kind in ("weight", "bias")}
    module.load_state_dict({mine: case[f"state.{theirs}"] for mine, theirs in kinds.items()})
    x = case["input.x"].requires_grad_()
    out = module(x)
    agree(out.detach(), case["output.y"])
    (out * case["probe"]).sum().backward()
    assert x.grad is not None
    agree(x.grad, case["grad.input.x"])
    for mine, theirs in kinds.items():
        grad = module.get_parameter(mine).grad
        assert grad is not None
        agree(grad, case[f"grad.{theirs}"])


# the choice


def test_routers_choose_for_each_head() -> None:
    router = HeadRouter(8, heads=3, experts=4, topk=2)
    x = torch.randn(5, 8)
    routing = router(x)
    logits = (x @ router.weight.t()).view(5, 3, 4)
    close(routing.logits, logits)
    best = logits.topk(2, dim=-1)
    assert torch.equal(routing.experts, best.indices)
    close(routing.weights, best.values.sigmoid())
    close(router.weight.norm(dim=-1), torch.ones(12))


def test_dropout_leaves_enough_to_choose() -> None:
    router = HeadRouter(8, heads=3, experts=4, topk=2, dropout=0.5)
    x = torch.randn(200, 8)
    torch.manual_seed(0)
    found = router(x)
    kept = (found.experts == found.logits.topk(2, dim=-1).indices).all(dim=-1)
    assert 0.2 < kept.float().mean() < 0.7
    assert (found.experts[..., 0] != found.experts[..., 1]).all()
    assert torch.equal(router.eval()(x).experts, found.logits.topk(2, dim=-1).indices)


def one_by_one(x: Tensor, routing: Routing, to_heads: HeadMaps, from_heads: HeadOutput) -> tuple[Tensor, Tensor]:
    """Compute the outputs of both maps, one after the other, token by token and head by head."""
    heads, _, _, width = to_heads.weight.shape
    of_heads, outputs = [], []
    for experts, weights, token in zip(routing.experts, routing.weights, x.flatten(0, 1), strict=True):
        own, out = [], torch.zeros_like(token)
        for head in range(heads):
            y = sum(w * (token @ to_heads.weight[head, e]) for e, w in zip(experts[head], weights[head], strict=True))
            y = y if to_heads.bias is None else y + to_heads.bias.view(heads, width)[head]
            own.append(y)
            for e, w in zip(experts[head], weights[head], strict=True):
                out = out + w * (y @ from_heads.weight[head, e])
        of_heads.append(torch.cat(own))
        outputs.append(out if from_heads.bias is None else out + from_heads.bias)
    return torch.stack(of_heads).unflatten(0, x.shape[:2]), torch.stack(outputs).unflatten(0, x.shape[:2])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("experts", [3, 8])
@pytest.mark.parametrize("same", [False, True])
def test_maps_are_sums_over_the_chosen_matrices(bias: bool, experts: int, same: bool) -> None:
    """Also in the gradients; of 8 matrices only the chosen are multiplied. All tokens may choose the same."""
    torch.manual_seed(0)
    to_heads = HeadMaps(8, 3, 5, experts, bias).double()
    from_heads = HeadOutput(3, 5, 8, experts, bias).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    found = HeadRouter(8, 3, experts, 2).double()(x.detach().flatten(0, 1))
    chosen = found.experts[:1].expand(6, -1, -1) if same else found.experts
    routing = Routing(chosen, found.weights.detach().requires_grad_(), found.logits.detach())
    assert sorts_tokens(x, to_heads.weight, routing) == (experts == 8)
    heads = to_heads(x, routing)
    out = from_heads(heads, routing)
    wanted_heads, wanted = one_by_one(x, routing, to_heads, from_heads)
    close(heads, wanted_heads)
    close(out, wanted)
    tensors = (x, routing.weights, *to_heads.parameters(), *from_heads.parameters())
    mine, theirs = (torch.autograd.grad(each.square().sum(), tensors) for each in (out, wanted))
    for one, two in zip(mine, theirs, strict=True):
        close(one, two)


@pytest.mark.parametrize("experts", [3, 8])
def test_maps_compute_in_the_dtype_of_autocast(experts: int) -> None:
    torch.manual_seed(0)
    module = Attention(16, heads=2, dim_head=8, switch_experts=experts, out_bias=True, qkv_bias=True)
    x = torch.randn(2, 6, 16)
    wanted = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    close(out.float(), wanted, most=0.05)
    half = module.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16


@torch.no_grad()
def test_single_tokens_are_multiplied_as_several_are() -> None:
    torch.manual_seed(0)
    maps, x = HeadMaps(8, 3, 5, 4), torch.randn(6, 1, 8)
    routing = HeadRouter(8, 3, 4, 2)(x.flatten(0, 1))
    close(maps(x, routing), maps(x.transpose(0, 1), routing).transpose(0, 1))


def test_first_values() -> None:
    torch.manual_seed(0)
    module = switching(256, heads=4)
    assert module.projections.v.weight.shape == (4, 4, 256, 6)
    assert module.out.weight.shape == (4, 4, 6, 256)
    assert module.projections.v.weight.std().item() == pytest.approx(256**-0.5, rel=0.05)
    assert module.out.weight.std().item() == pytest.approx(24**-0.5, rel=0.05)
    assert not switching(zero_init_output=True, out_bias=True).out.weight.any()
    assert switching(256, output_proj_depth=3).out.weight.std().item() == pytest.approx(72**-0.5, rel=0.05)


def test_a_single_head_has_an_output_projection() -> None:
    assert isinstance(Attention(16, dim_head=16, heads=1, switch_experts=2).out, HeadOutput)


# records


def model_of(**options: Any) -> TransformerWrapper:
    return BASE.build(attn_switch_experts=3, **options)


def test_records_have_loads_by_head() -> None:
    model = model_of(attn_kv_heads=2, attn_switch_entropy_weight=0.5)
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False
    capture = Capture(losses=True, routing=True)
    _, record = model(ids, mask=mask, return_intermediates=True, capture=capture)
    depth = len(record.routing) // 2
    assert [each.maps for each in record.routing] == ["values", "outputs"] * depth
    assert [each.layer_index for each in record.routing[:4]] == [0, 0, 2, 2]
    losses = []
    for each in record.routing:
        heads = 2 if each.maps == "values" else 4
        assert each.experts.shape == (2, 9, heads, 2)
        assert each.load.shape == each.prob.shape == (heads, 3)
        chosen = torch.zeros(2, 9, heads, 3).scatter(-1, each.experts, 1.0)[mask]
        close(each.load, chosen.mean(dim=0))
        scores = each.logits.sigmoid()
        close(each.prob, (scores / scores.sum(dim=-1, keepdim=True))[mask].mean(dim=0))
        mean = each.logits.softmax(dim=-1)[mask].mean(dim=0)
        losses.append((mean * mean.log()).sum(dim=-1).mean())
        close(each.losses["router_entropy"].value, losses[-1])
    close(record.aux_loss, 0.5 * torch.stack(losses).mean())
    assert model.has_aux_loss
    assert not model_of().has_aux_loss


def test_one_selection_has_one_record() -> None:
    model = model_of(attn_switch_one_selection=True)
    _, record = model(tokens(2, 5), return_aux_loss=True)
    assert {each.maps for each in record.routing} == {"values and outputs"}
    assert len(record.routing) == len([each for each in record.attn_intermediates if each.layer_type == "a"])


def test_training_losses_contain_the_entropy() -> None:
    found = []
    ids = tokens(2, 9)
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        wrapper = AutoregressiveWrapper(model_of(attn_switch_entropy_weight=weight)).train()
        found.append((wrapper(ids), wrapper.eval()(ids)))
    (plain, plain_evaluated), (loss, evaluated) = found
    assert loss < plain - 0.5
    assert plain_evaluated == evaluated


def test_records_do_not_change_decoding() -> None:
    """A pass with a cache keeps none of them."""
    model = model_of()
    _, record = model(tokens(1, 4), return_intermediates=True, capture=Capture())
    assert record.routing is None
    assert all(each.routing == () for each in record.attn_intermediates)


# memory


@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize("view", [False, True])
def test_recurrent_memory_chooses_as_tokens_do(one: bool, view: bool) -> None:
    """The values of a memory are those of the same tokens before the others."""
    torch.manual_seed(0)
    module = Attention(
        16, dim_head=4, heads=2, switch_experts=4, switch_one_selection=one, qkv_receive_diff_residuals=view
    )
    whole = torch.randn(*((3,) if view else ()), 2, 7, 16)
    memory, x = whole[..., :3, :], whole[..., 3:, :]
    close(module(x, mem=memory), module(whole)[:, 3:])


def test_the_choice_for_values_reads_the_context() -> None:
    """As if the context were the tokens of a self-attention with other queries."""
    torch.manual_seed(0)
    module = Attention(16, dim_head=4, heads=2, switch_experts=4)
    x, context = torch.randn(2, 3, 16), torch.randn(2, 5, 16)
    _, record = module(x, context, return_intermediates=True)
    routing = module.switch.values(context.flatten(0, 1))
    close(record.values, module.projections.v(context, routing).unflatten(-1, (2, 4)).transpose(1, 2))
    close(module(x[:, 1:], context, cache=record), module(x, context)[:, 1:])


# training and costs


def test_active_parameters_and_flops() -> None:
    model = BASE.build(attn_switch_experts=4, attn_switch_topk=1, attn_kv_heads=2, dim=16, heads=4)
    row = model.explain(seq_len=1).rows[0]
    head = model.attn_layers.layers[0].attention.shape.dim_head
    queries, keys = 16 * 4 * head, 16 * 2 * head
    routers, stacks = 4 * 16 * (2 + 4), 16 * head * 4 * (2 + 4)
    assert row.parameters == queries + keys + routers + stacks
    assert row.active == queries + keys + routers + stacks // 4
    assert row.flops == 2 * row.active + 2 * 4 * 2 * head
    assert "4 matrices a head for values and outputs, 1 used" in row.why


def test_single_layers_may_have_one_matrix() -> None:
    model = BASE.build(attn_switch_experts=(None, 8), attn_switch_entropy_weight=0.1)
    plain, mixed = (row for row in model.explain().rows if "attention" in row.name)
    assert plain.active == plain.parameters
    assert mixed.active < mixed.parameters
    _, record = model(tokens(2, 6), return_aux_loss=True)
    assert [(each.maps, each.layer_index, each.step) for each in record.routing] == [
        ("values", 2, 2),
        ("outputs", 2, 2),
    ]


@pytest.mark.parametrize(
    ("options", "runs"), [({"weight_tie_layers": True}, 2), ({"layers_execute_order": (0, 1, 0, 1, 2, 3)}, 3)]
)
def test_attentions_that_run_again_have_records_again(options: dict[str, Any], runs: int) -> None:
    model = model_of(attn_switch_entropy_weight=0.1, checkpoint_every=1, **options).train()
    out, record = model(tokens(2, 6), return_aux_loss=True)
    assert len(record.routing) == 2 * runs
    (out.sum() + record.aux_loss).backward()
    assert len(record.routing) == 2 * runs


def test_muon_takes_the_stacks() -> None:
    model = model_of(attn_switch_queries_keys=True)
    names = {id(p): name for name, p in model.named_parameters()}
    for every, wanted in (
        (True, {"projections.q.weight", "projections.k.weight", "projections.v.weight", "out.weight"}),
        (False, {"projections.v.weight", "out.weight"}),
    ):
        split = split_parameters(model, queries_and_keys=every)
        found = {names[id(p)].split("attention.")[-1] for p in split.matrices if "attention" in names[id(p)]}
        assert found == wanted
        assert any("switch.values" in names[id(p)] for p in split.others)
    stack = torch.nn.Parameter(torch.zeros(2, 3, 4, 6))
    each = [torch.nn.Parameter(torch.zeros(4, 6)) for _ in range(6)]
    stack.grad = torch.randn(2, 3, 4, 6)
    for parameter, own in zip(each, stack.grad.flatten(0, 1), strict=True):
        parameter.grad = own
    Muon([stack]).step()
    Muon(each).step()
    close(stack.data.flatten(0, 1), torch.stack([parameter.data for parameter in each]))


def test_logits_are_clipped_if_queries_and_keys_have_one_matrix() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16)
    module = switching()
    _, record = module(x, return_intermediates=True)
    module.qk_clip_(record, tau=0.1)
    _, record = module(x, return_intermediates=True)
    assert record.pre_softmax_attn[record.pre_softmax_attn > -1e9].max() <= 0.1 + 1e-5
    module = switching(switch_queries_keys=True)
    _, record = module(x, return_intermediates=True)
    with pytest.raises(InputError, match="`attn_switch_queries_keys` tokens choose among several"):
        module.qk_clip_(record)


# what is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"switch_experts": 0}, "`switch_experts` is 0; it must be a whole number, at least 1"),
        ({"switch_topk": 5}, "`switch_topk` is 5; it must lie between 1 and the `switch_experts` = 4"),
        ({"switch_topk": 0}, "`switch_topk` is 0; it must be a whole number, at least 1"),
        ({"switch_expert_dropout": 1.0}, "`switch_expert_dropout` is 1.0; it must lie in"),
        ({"switch_entropy_weight": -1.0}, "`switch_entropy_weight` is -1.0; it must not be negative"),
        ({"use_latent_kv": True, "dim_latent_kv": 8}, "values come from a latent, not from tokens"),
        ({"on_attn": True}, "`on_attn` gates a plain one"),
        ({"project_out": False}, "`project_out = False` leaves it out"),
        ({"switch_one_selection": True, "kv_heads": 1}, "there are 2 heads of outputs but 1 of values"),
    ],
)
def test_refusals(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Attention(16, dim_head=6, heads=2, **{"switch_experts": 4, **options})


def test_one_selection_is_of_self_attention() -> None:
    options = {"attn_switch_experts": 4, "attn_switch_one_selection": True}
    words = "in cross-attention values are of the context; set it to False there"
    with pytest.raises(ConfigError, match=words):
        Decoder(dim=16, depth=1, heads=2, cross_attend=True, **options)
    stack = Decoder(dim=16, depth=1, heads=2, cross_attend=True, cross_attn_switch_one_selection=False, **options)
    assert [layer.fn.switch.values is None for layer in stack.layers if layer.kind.is_attention] == [True, False]
    module = Attention(16, switch_experts=4, switch_one_selection=True)
    with pytest.raises(InputError, match="the values of a `context` are of others"):
        module(torch.randn(1, 2, 16), torch.randn(1, 3, 16))


def test_an_option_without_several_matrices_is_reported() -> None:
    assert "has no effect" in " ".join(warnings_of(attn_switch_topk=1))
    assert "has no effect" in " ".join(warnings_of(attn_switch_experts=2, attn_switch_expert_dropout=0.1))
    assert not warnings_of(attn_switch_experts=3, attn_switch_expert_dropout=0.1)


def warnings_of(**options: Any) -> list[str]:
    return list(make_plan("Decoder", {"depth": 1, **options}).warnings)


def test_the_reference_has_none() -> None:
    with pytest.raises(StateDictError, match=r"choice of matrices by heads \(`attn_switch_experts`\)"):
        model_of().export_reference_state_dict()


def test_outputs_of_heads_can_be_centered() -> None:
    """They write the residual stream, whose mean RMSNorms do not subtract."""
    model = model_of(attn_out_bias=True).double()
    ids = tokens(2, 6)
    close(to_rmsnorm(model)(ids), model(ids))
    with pytest.raises(ConfigError, match="depend on the width of the stream in another way"):
        to_crmsnorm(model)


def test_tokens_that_left_leave_keys_and_values_of_their_matrices() -> None:
    """A block without tokens in it only projects, and does it as the whole block does."""
    model = model_of(attn_switch_queries_keys=True, depth=3)
    prompt = tokens(2, 5)
    given = {"exit_confidence": 0.0, "exit_layers": (1,), "temperature": 0.0}
    wrapper = AutoregressiveWrapper(model)
    assert torch.equal(
        wrapper.generate(prompt, 4, cache_kv=True, **given), wrapper.generate(prompt, 4, cache_kv=False, **given)
    )


def test_encoders_have_it_too() -> None:
    stack = Encoder(dim=16, depth=1, heads=2, attn_switch_experts=3)
    assert stack(torch.randn(2, 4, 16)).shape == (2, 4, 16)
