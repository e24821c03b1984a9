"""Attention of the best tokens of a row: numbers of a public implementation, encodings, and refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from catalog import close, perturbed
from safetensors import safe_open
from torch import Tensor, nn

from x_transformers import Attention, CrossAttender, Decoder, Encoder, PrefixDecoder
from x_transformers.errors import ConfigError, InputError, StateDictError

GOLDEN = Path(__file__).with_name("golden") / "experts" / "colt5-attention-heavy.safetensors"
CLOSE = 2e-5
D = 16
STACK = {"dim": D, "depth": 1, "heads": 2, "attn_dim_head": 8, "verbose": False}
HEAVY = {"attn_heavy_queries": 3, "attn_heavy_keys": 4}


def agree(mine: Tensor | None, theirs: Tensor) -> None:
    assert mine is not None
    assert mine.shape == theirs.shape
    assert (mine - theirs).abs().max() <= CLOSE * (1 + theirs.abs().max())


def function_of(stack: Any, letter: str = "a") -> Any:
    """Return the first attention of a kind."""
    return stack.branches(letter)[0].attention


def attention(**keywords: Any) -> Any:
    """Return the attention of an encoder with these keywords."""
    return function_of(Encoder(**STACK, **keywords))


def test_a_public_implementation() -> None:
    """It has a norm before its maps, and none before its routers; here the norm of the branch is before all."""
    with safe_open(GOLDEN, "pt") as file:
        case = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    module = attention(**HEAVY, attn_heavy_heads=2, attn_heavy_dim_head=4, attn_heavy_null=True)
    nn.init.zeros_(module.out.weight)
    heavy = module.heavy
    inner = heavy.attention
    # of each head the rows of keys, then those of values
    of_k, of_v = case["state.heavy_attn.to_kv.weight"].view(2, 2, 4, D).unbind(1)
    null = case["state.heavy_attn.null_kv"]
    weights = {
        inner.projections.q.weight: "heavy_attn.to_q.weight",
        inner.out.weight: "heavy_attn.to_out.weight",
        heavy.null: "null_q_token",
    }
    with torch.no_grad():
        for mine, theirs in weights.items():
            mine.copy_(case[f"state.{theirs}"])
        inner.projections.k.weight.copy_(of_k.flatten(0, 1))
        inner.projections.v.weight.copy_(of_v.flatten(0, 1))
        (memory,) = inner.keys
        memory.keys.copy_(null[0].unsqueeze(1))
        memory.values.copy_(null[1].unsqueeze(1))
        heavy.queries.weight.copy_(case["state.q_router.routing_token"][0])
        heavy.keys.weight.copy_(case["state.kv_router.routing_token"][0])
    gamma = case["state.heavy_attn.norm.gamma"].clone().requires_grad_()
    for each in ("q", "k", "v"):
        inner.projections.get_submodule(each).register_forward_pre_hook(
            lambda _, args: (F.normalize(args[0], dim=-1) * D**0.5 * gamma,)
        )
    x = case["input.x"].clone().requires_grad_()
    assert torch.equal(heavy.queries(x).places.sort().values, case["output.indices_q"].sort().values)
    assert torch.equal(heavy.keys(x).places.sort().values, case["output.indices_kv"].sort().values)
    out = module(x)
    agree(out, case["output.y"])
    (out * case["probe"]).sum().backward()
    agree(x.grad, case["grad.input.x"])
    agree(gamma.grad, case["grad.heavy_attn.norm.gamma"])
    for mine, theirs in weights.items():
        agree(mine.grad, case[f"grad.{theirs}"])
    of_kv = [inner.projections.get_submodule(each).weight.grad.view(2, 4, D) for each in ("k", "v")]
    agree(torch.stack(of_kv, dim=1).flatten(0, 2), case["grad.heavy_attn.to_kv.weight"])
    agree(torch.stack((memory.keys.grad, memory.values.grad)).squeeze(2), case["grad.heavy_attn.null_kv"])
    agree(heavy.queries.weight.grad, case["grad.q_router.routing_token"][0])
    agree(heavy.keys.weight.grad, case["grad.kv_router.routing_token"][0])


POSITIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "rotary": {"rotary_pos_emb": True},
    "some heads": {"rotary_pos_emb": True, "rotate_num_heads": 1},
    "alibi": {"alibi_pos_bias": True},
    "t5": {"rel_pos_bias": True, "rel_pos_num_buckets": 8, "rel_pos_max_distance": 8},
    "dynamic": {"dynamic_pos_bias": True},
    "norms": {"attn_qk_norm": True, "attn_qkv_bias": True, "attn_out_bias": True, "attn_softclamp_logits": True},
    "streams": {"num_residual_streams": 2, "qkv_receive_diff_residuals": True},
}


def twins(keywords: dict[str, Any], **heavy: Any) -> tuple[Encoder, Encoder]:
    """Return a stack whose first attention adds nothing, and one with the second attention as its first."""
    stack = {**STACK, "only_attn": True, **keywords}
    one = perturbed(Encoder(**stack, **heavy)).double()
    other = Encoder(**stack, attn_num_mem_kv=1).eval().double()
    mine, theirs = function_of(one), function_of(other)
    state = {name: t for name, t in one.state_dict().items() if ".attention." not in name}
    other.load_state_dict(state, strict=False)
    theirs.load_state_dict(mine.heavy.attention.state_dict())
    for parameter in mine.out.parameters():
        nn.init.zeros_(parameter)
    return one, other


@pytest.mark.parametrize("name", POSITIONS)
@torch.no_grad()
def test_it_is_an_attention_with_hidden_queries_and_keys(name: str) -> None:
    """At the chosen queries; the others get nothing. Positions and biases are those of the tokens."""
    one, other = twins(POSITIONS[name], **HEAVY)
    fn, plain = function_of(one), function_of(other)
    chosen: dict[str, Tensor] = {}
    for which in ("queries", "keys"):
        fn.heavy.get_submodule(which).register_forward_hook(
            lambda _, args, choice, which=which: chosen.__setitem__(which, choice.chosen(args[0].shape[1]))
        )
    outputs: list[Tensor] = []
    for each in (fn, plain):
        each.register_forward_hook(lambda _, args, output: outputs.append(output.out))
    x, mems = torch.randn(1, 9, D, dtype=torch.float64), [torch.randn(1, 2, D, dtype=torch.float64)]
    for given in ({}, {"pos": torch.arange(9) * 3 - 4}, {"mems": mems}):
        outputs.clear()
        one(x, **given)
        given.pop("mems", None)
        other(x, attn_mask=chosen["keys"][:, None, None, :].expand(1, 1, 9, 9), **given)
        seen = chosen["queries"].unsqueeze(-1)
        assert (seen.sum(), chosen["keys"].sum()) == (3, 4)
        close(outputs[0], torch.where(seen, outputs[1], 0.0), 1e-9)


@torch.no_grad()
def test_biases_of_a_caller() -> None:
    one, other = twins({}, attn_heavy_queries=1.0)
    x, bias = torch.randn(2, 6, D, dtype=torch.float64), torch.randn(2, 2, 6, 6, dtype=torch.float64)
    close(one(x, attn_bias=bias), other(x, attn_bias=bias), 1e-9)
    model = Encoder(**STACK, **HEAVY, attn_heavy_heads=4)
    with pytest.raises(InputError, match=r"biases of the scores are for the 2 heads .* `heavy_heads` = 4; leave it at"):
        model(x.float(), attn_bias=bias.float())


@torch.no_grad()
def test_padding_and_memories() -> None:
    model = perturbed(Encoder(**STACK, **HEAVY, rotary_pos_emb=True, attn_heavy_null=True)).double()
    x = torch.randn(4, 9, D, dtype=torch.float64)
    mask = torch.arange(9) < torch.tensor([[9], [5], [2], [0]])
    out = model(x, mask=mask)
    assert out.isfinite().all()
    for row, length in enumerate((9, 5, 2)):
        close(out[row, :length], model(x[row : row + 1, :length])[0], 1e-9)
    mems = [torch.randn(4, 3, D, dtype=torch.float64)]
    assert model(x, mems=mems).isfinite().all()


def test_the_null_vector_is_for_tokens_that_are_not_chosen() -> None:
    with_null, without = attention(**HEAVY, attn_heavy_null=True), attention(**HEAVY)
    without.load_state_dict({k: t for k, t in with_null.state_dict().items() if k != "heavy.null"})
    x = torch.randn(2, 9, D)
    chosen = with_null.heavy.queries(x).chosen(9).unsqueeze(-1)
    close(with_null(x) - without(x), torch.where(chosen, 0.0, with_null.heavy.null), 1e-5)
    mask = torch.arange(9) < torch.tensor([[4], [2]])
    assert not with_null(x, mask=mask)[~mask].any()


@pytest.mark.parametrize(
    ("keywords", "sentence"),
    [
        ({"attn_heavy_queries": 0}, "`attn_heavy_queries` is 0; it must be a whole number, at least 1"),
        ({"attn_heavy_queries": 1.5}, r"`attn_heavy_queries` is 1.5; a share must lie in \(0, 1\], a number must be"),
        ({**HEAVY, "attn_heavy_keys": 0.0}, "`attn_heavy_keys` is 0.0"),
        ({**HEAVY, "attn_heavy_heads": 0}, "`attn_heavy_heads` is 0"),
        ({**HEAVY, "attn_heavy_dim_head": 0}, "`attn_heavy_dim_head` is 0"),
        ({**HEAVY, "attn_heavy_temperature": 0.0}, "`attn_heavy_temperature` is 0.0; it must be positive"),
        ({**HEAVY, "attn_heavy_ratio": 0.5}, "`attn_heavy_ratio` is 0.5; it must be at least 1"),
        (
            {**HEAVY, "attn_heavy_heads": 4, "alibi_pos_bias": True},
            "`alibi_pos_bias` has a bias for each of the `heads`; leave `attn_heavy_heads` at None",
        ),
        ({**HEAVY, "attn_heavy_heads": 4, "rel_pos_bias": True}, "`rel_pos_bias` has a bias for each"),
        ({**HEAVY, "attn_heavy_heads": 4, "dynamic_pos_bias": True}, "`dynamic_pos_bias` has a bias for each"),
        ({**HEAVY, "polar_pos_emb": True}, "but the learned key of `attn_heavy_queries` has no position"),
        ({**HEAVY, "attn_heavy_dim_head": 4, "rotary_pos_emb": True}, "those of `attn_heavy_dim_head` are narrower"),
        (
            {**HEAVY, "attn_heavy_heads": 1, "rotary_pos_emb": True, "rotate_num_heads": 1},
            "the number of rotated heads is that of the first attention; leave `attn_heavy_heads` at None",
        ),
        (
            {**HEAVY, "attn_flash_pack_seq": True, "rotary_pos_emb": True},
            "keeps the documents of a row apart, but `attn_heavy_queries` chooses among all tokens of a row; drop one",
        ),
        (
            {"cross_attend": True, "cross_attn_heavy_queries": 2},
            "in cross-attention keys are in another; drop it there",
        ),
    ],
)
def test_refused_keywords(keywords: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Encoder(**STACK, **keywords)


def test_causality_and_contexts() -> None:
    sentence = "chooses the best tokens of a whole row, which a causal stack does not know yet"
    for stack in (Decoder, PrefixDecoder, lambda **kw: Encoder(**kw, attn_causal=True)):
        with pytest.raises(ConfigError, match=sentence if stack in (Decoder, PrefixDecoder) else "attn_causal"):
            stack(**STACK, **HEAVY)
    with pytest.raises(ConfigError, match=sentence):
        Attention(D, heads=2, causal=True, heavy_queries=2)
    x = torch.randn(2, 6, D)
    model = Encoder(**STACK, **HEAVY)
    with pytest.raises(InputError, match=sentence):
        model(x, causal=True)
    with pytest.raises(InputError, match="`attn_mask` hides single pairs of tokens, and `heavy_queries` chooses"):
        model(x, attn_mask=torch.ones(6, 6, dtype=torch.bool).tril())
    module = Attention(D, heads=2, dim_head=8, heavy_queries=2)
    with pytest.raises(InputError, match="chooses keys among the queries' own tokens; drop `context`"):
        module(x, context=x)
    with pytest.raises(InputError, match=r"which a causal stack does not know yet\. Drop `causal`"):
        module(x, causal=True)
    with pytest.raises(StateDictError, match="no heavy attention"):
        model.export_reference_state_dict()
    # a decoder's cross-attention does not inherit it
    assert function_of(Encoder(**STACK, **HEAVY, cross_attend=True), "c").heavy is None
    assert function_of(CrossAttender(**STACK), "c").heavy is None


def test_modules_by_themselves() -> None:
    module = Attention(D, heads=2, dim_head=8, heavy_queries=0.5, heavy_heads=4, dim_out=6, heavy_null=True)
    x = torch.randn(2, 6, D)
    again = Attention.from_config(module.config)
    again.load_state_dict(module.state_dict())
    close(again(x), module(x), 0)
    assert module(x).shape == (2, 6, 6)
    assert not attention(**HEAVY, attn_zero_init_output=True)(x).any()
    matrices = attention(**HEAVY).muon_parameters()
    assert len(matrices) == 4


def test_costs() -> None:
    """Chosen tokens only are mapped and compared; a token of a long row costs what it costs without them."""
    plain, heavy = (
        Encoder(**STACK, **more).explain(seq_len=12).rows[0] for more in ({}, {**HEAVY, "attn_heavy_dim_head": 4})
    )
    width = 2 * 4
    maps = 2 * (2 * width * D * 3 + 2 * width * D * 4)
    pairs = 2 * 2 * 3 * 5 * width
    assert heavy.flops == plain.flops + (maps + pairs) // 12 + 2 * 2 * D
