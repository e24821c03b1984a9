"""Feedforwards that read whole rows, soft experts and heavy paths: numbers of public implementations, and refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from catalog import close, perturbed
from safetensors import safe_open
from torch import Tensor, nn

from x_transformers import (
    AutoregressiveWrapper,
    CrossAttender,
    Decoder,
    Encoder,
    FeedForward,
    PrefixDecoder,
    TransformerWrapper,
)
from x_transformers.errors import ConfigError, InputError, ShapeError, StateDictError
from x_transformers.feedforward.heavy import HeavyFeedForward
from x_transformers.feedforward.soft_experts import SoftExperts
from x_transformers.layers.plan import make_plan

FOLDER = Path(__file__).with_name("golden") / "experts"
CLOSE = 2e-5
D = 16
STACK = {"dim": D, "depth": 1, "heads": 2, "attn_dim_head": 8, "verbose": False}
SOFT = {"ff_soft_experts": 3, "ff_soft_slots": 2, "ff_mult": 1}
HEAVY = {"ff_heavy_tokens": 3, "ff_heavy_mult": 2, "ff_mult": 0.5}
BOTH = pytest.mark.parametrize("keywords", [SOFT, HEAVY], ids=["soft", "heavy"])
Case = dict[str, Tensor]


def read(name: str) -> Case:
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def agree(mine: Tensor | None, theirs: Tensor) -> None:
    assert mine is not None
    assert mine.shape == theirs.shape
    assert (mine - theirs).abs().max() <= CLOSE * (1 + theirs.abs().max())


def bare(**keywords: Any) -> Any:
    """Return the feedforward of an encoder with these keywords."""
    return Encoder(**STACK, **keywords).branches("f")[0].feedforward


def load(module: nn.Module, case: Case, names: dict[str, Any]) -> dict[str, nn.Parameter]:
    """Copy the weights of a case, and return the parameters by our names."""
    mine = dict(module.named_parameters())
    assert set(mine) == set(names)
    with torch.no_grad():
        for name, theirs in names.items():
            mine[name].copy_(theirs_of(case, "state", theirs))
    return mine


def theirs_of(case: Case, kind: str, names: str | tuple[str, ...]) -> Tensor:
    found = [case[f"{kind}.{name}"] for name in ((names,) if isinstance(names, str) else names)]
    return found[0] if isinstance(names, str) else torch.stack(found)


def of_experts(path: str) -> tuple[str, ...]:
    return tuple(f"experts.experts.{e}.{path}" for e in range(3))


SOFT_NAMES: dict[str, Any] = {
    "token_gain": "norm.gamma",
    "slot_gain": "slot_norm.gamma",
    "slots": "slot_embeds",
    "up": of_experts("0.weight"),
    "up_bias": of_experts("0.bias"),
    "down": of_experts("3.weight"),
    "down_bias": of_experts("3.bias"),
}
HEAVY_NAMES = {
    "router.weight": "router.routing_token",
    "light.up.weight": "light_ff.1.weight",
    "light.up.bias": "light_ff.1.bias",
    "light.down.weight": "light_ff.3.weight",
    "light.down.bias": "light_ff.3.bias",
    "heavy.up.weight": "heavy_ff.1.weight",
    "heavy.up.bias": "heavy_ff.1.bias",
    "heavy.down.weight": "heavy_ff.3.weight",
    "heavy.down.bias": "heavy_ff.3.bias",
}


def test_soft_experts_of_a_public_implementation() -> None:
    case = read("soft-moe")
    module = bare(**{**SOFT, "ff_mult": 2})
    mine = load(module, case, SOFT_NAMES)
    x = case["input.x"].clone().requires_grad_()
    out = module(x)
    agree(out, case["output.y"])
    (out * case["probe"]).sum().backward()
    agree(x.grad, case["grad.input.x"])
    for name, theirs in SOFT_NAMES.items():
        agree(mine[name].grad, theirs_of(case, "grad", theirs))
    # hidden tokens get the mean of all slots there, and nothing here
    mask = case["input.mask"]
    assert not mask.all()
    masked = module(case["input.x"], mask)
    agree(masked[mask], case["output.y_masked"][mask])
    assert not masked[~mask].any()


@pytest.mark.parametrize(("name", "straight"), [("colt5-feedforward", True), ("colt5-feedforward-soft", False)])
def test_heavy_feedforwards_of_a_public_implementation(name: str, straight: bool) -> None:
    """It has a norm in each path, and none before its router; here the norm of the branch is before all three."""
    module = bare(**HEAVY, ff_heavy_straight=straight)
    case = {key: t[0] if key.endswith("routing_token") else t for key, t in read(name).items()}
    mine = load(module, case, HEAVY_NAMES)
    norms = {}
    for path in ("light", "heavy"):
        norms[path] = gamma = case[f"state.{path}_ff.0.gamma"].clone().requires_grad_()

        def normalize(module: nn.Module, args: tuple[Tensor, ...], gamma: Tensor = gamma) -> tuple[Tensor, ...]:
            return (F.normalize(args[0], dim=-1) * D**0.5 * gamma, *args[1:])

        module.get_submodule(path).register_forward_pre_hook(normalize)
    x = case["input.x"].clone().requires_grad_()
    choice = module.router(x)
    assert torch.equal(choice.places.sort().values, case["output.indices"].sort().values)
    out = module(x)
    agree(out, case["output.y"])
    (out * case["probe"]).sum().backward()
    agree(x.grad, case["grad.input.x"])
    for path, gamma in norms.items():
        agree(gamma.grad, case[f"grad.{path}_ff.0.gamma"])
    for mine_, theirs in HEAVY_NAMES.items():
        agree(mine[mine_].grad, case[f"grad.{theirs}"])


@BOTH
def test_rows_by_themselves(keywords: dict[str, Any]) -> None:
    """Whatever padding contains, and also with fewer tokens than are chosen, or none."""
    module = perturbed(bare(**keywords)).double()
    x = torch.randn(4, 9, D, dtype=torch.float64)
    mask = torch.arange(9) < torch.tensor([[9], [5], [2], [0]])
    out = module(x, mask)
    assert out.isfinite().all()
    other = torch.where(mask.unsqueeze(-1), x, 100.0)
    close(module(other, mask)[mask], out[mask], 0)
    for row, length in enumerate((9, 5, 2)):
        close(out[row, :length], module(x[row : row + 1, :length])[0], 1e-9)
        left = torch.cat((x[row, length:], x[row, :length]))[None]
        close(module(left, mask[row : row + 1].flip(-1))[0, 9 - length :], out[row, :length], 1e-9)


def test_the_heavy_network_computes_the_chosen_tokens_only() -> None:
    module, seen = perturbed(bare(**HEAVY)), []
    module.heavy.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    x = torch.randn(2, 9, D)
    out, index = module(x), module.router(x).places
    assert seen == [(2, 3, D)]
    light, heavy = module.light(x), module.heavy(x)
    chosen = torch.zeros(2, 9, dtype=torch.bool).scatter(1, index, True).unsqueeze(-1)
    close(out, light + torch.where(chosen, heavy, 0.0), 1e-6)


def test_all_tokens_chosen_is_the_sum_of_both_networks() -> None:
    module, x = perturbed(bare(ff_heavy_share=1.0, ff_glu=True, ff_no_bias=True)), torch.randn(2, 5, D)
    close(module(x), module.light(x) + module.heavy(x), 1e-6)


def test_noise_of_soft_experts_in_training_only() -> None:
    noisy, plain = bare(**SOFT, ff_soft_noise=0.5), bare(**SOFT)
    noisy.load_state_dict(plain.state_dict())
    x = torch.randn(2, 7, D)
    assert torch.equal(noisy.eval()(x), plain(x))
    noisy.train()
    assert not torch.allclose(noisy(x), noisy(x))
    logits = torch.zeros(1, 20000, D)
    with torch.no_grad():
        # Gumbel noise makes slot s the largest as often as the softmax of its logit
        plain.slots.copy_(torch.randn(3, 2, D))
        noisy.load_state_dict(plain.state_dict())
        noisy.noise = 1.0
        logits += torch.randn(D) / 4
        share = plain.mixing_weights(logits, None)[2][0, 0]
        drawn = noisy.mixing_weights(logits, None)[2][0].argmax(dim=-1)
        counts = torch.zeros(6).scatter_add(0, drawn, torch.ones(20000)) / 20000
    assert (counts - share).abs().max() < 0.02


STACKS: dict[str, Any] = {
    "Decoder": Decoder,
    "PrefixDecoder": PrefixDecoder,
    "CrossAttender, causal": lambda **kw: CrossAttender(**kw, causal=True),
}


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize(
    ("keywords", "sentence"),
    [
        (SOFT, "`ff_soft_experts` mixes all tokens of a row, so that a token would see later ones; use an Encoder"),
        (
            HEAVY,
            "`ff_heavy_tokens` chooses the best tokens of a whole row, which a causal stack does not know yet; use",
        ),
        ({"ff_heavy_share": 0.5}, "`ff_heavy_share` chooses the best tokens of a whole row"),
        ({"ff_soft_experts": (3,)}, "`ff_soft_experts` mixes all tokens of a row"),
    ],
)
def test_stacks_that_hide_the_future(stack: str, keywords: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        STACKS[stack](**STACK, **keywords)


@pytest.mark.parametrize(
    ("keywords", "sentence"),
    [
        ({"ff_soft_experts": 0}, "`ff_soft_experts` is 0; it must be a whole number, at least 1"),
        ({"ff_soft_experts": 2, "ff_soft_slots": 0}, "`ff_soft_slots` is 0"),
        ({"ff_soft_experts": 2, "ff_soft_noise": -1.0}, "`ff_soft_noise` is -1.0; it must not be negative"),
        ({"ff_soft_experts": 2, "ff_experts": 2}, r"alternatives of one choice \(network of experts\)"),
        ({"ff_soft_experts": 2, "ff_heavy_tokens": 2}, r"alternatives of one choice \(network of experts\)"),
        ({"ff_soft_experts": 2, "ff_rwkv": True}, "drop `ff_soft_experts`, or `ff_rwkv`"),
        ({"ff_heavy_tokens": 2, "ff_rwkv": True}, "drop the heavy feedforward, or `ff_rwkv`"),
        ({"ff_soft_experts": 2, "ff_mult": 0.01}, "the inner width is 0"),
        ({"ff_heavy_tokens": 0}, "`ff_heavy_tokens` is 0; it must be a whole number, at least 1"),
        ({"ff_heavy_tokens": 2, "ff_heavy_share": 0.5}, "both say how many tokens are chosen; keep one"),
        ({"ff_heavy_share": 0.0}, r"`ff_heavy_share` is 0.0; it must lie in \(0, 1\]"),
        ({"ff_heavy_share": 1.5}, "`ff_heavy_share` is 1.5"),
        ({"ff_heavy_tokens": 2, "ff_heavy_mult": 0}, "`ff_heavy_mult` is 0.0; it must be positive"),
        ({"ff_heavy_tokens": 2, "ff_heavy_mult": 0.01}, "the inner width is 0"),
        ({"ff_heavy_tokens": 2, "ff_heavy_temperature": 0.0}, "`ff_heavy_temperature` is 0.0; it must be positive"),
        ({"ff_heavy_tokens": 2, "ff_heavy_ratio": 0.9}, "`ff_heavy_ratio` is 0.9; it must be at least 1"),
        (
            {**SOFT, "attn_flash_pack_seq": True, "rotary_pos_emb": True},
            "keeps the documents of a row apart, but `ff_soft_experts` mixes all tokens of a row; drop one",
        ),
        (
            {**HEAVY, "attn_flash_pack_seq": True, "rotary_pos_emb": True},
            "but `ff_heavy_tokens` and `ff_heavy_share` choose among all tokens of a row; drop one",
        ),
    ],
)
def test_refused_keywords(keywords: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Encoder(**STACK, **keywords)


def test_keywords_without_effect() -> None:
    for keywords in ({"ff_soft_slots": 2}, {"ff_soft_noise": 0.1}, {"ff_heavy_mult": 2}, {"ff_heavy_straight": False}):
        (sentence,) = make_plan("Encoder", {"depth": 1, **keywords}).warnings
        assert "has no effect" in sentence
    assert make_plan("Encoder", {"depth": 2, "ff_soft_experts": (None, 4), "ff_soft_slots": 2}).warnings == ()


@BOTH
def test_refused_passes(keywords: dict[str, Any]) -> None:
    stack, x = Encoder(**STACK, **keywords), torch.randn(2, 6, D)
    (name,) = [name for name in keywords if name in ("ff_soft_experts", "ff_heavy_tokens")]
    with pytest.raises(InputError, match=f"`attn_mask` hides single pairs of tokens, and `{name}`"):
        stack(x, attn_mask=torch.ones(6, 6, dtype=torch.bool).tril())
    with pytest.raises(InputError, match=f"`{name}` .* drop `causal`"):
        stack(x, causal=True)
    with pytest.raises(InputError, match="only a causal stack can use a cache"):
        stack(x, cache=Decoder(**STACK)(x, return_hiddens=True)[1])
    model = TransformerWrapper(num_tokens=8, max_seq_len=8, attn_layers=stack)
    with pytest.raises(InputError, match="whose tokens see the ones that they should predict"):
        AutoregressiveWrapper(model)(torch.randint(0, 8, (2, 6)))
    with pytest.raises(StateDictError, match="the reference has no"):
        model.export_reference_state_dict()
    module: Any = stack.branches("f")[0].feedforward
    for given, error in (
        (x[0], ShapeError),
        (x[..., 1:], ShapeError),
        (x.long(), InputError),
    ):
        with pytest.raises(error):
            module(given)
    with pytest.raises(ShapeError, match=r"`mask` has shape \(2, 5\); it must be \(2, 6\)"):
        module(x, torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(InputError, match="`mask` is"):
        module(x, torch.ones(2, 6))


@BOTH
def test_stacks_without_attention_see_the_future(keywords: dict[str, Any]) -> None:
    """Also next to cross-attention only."""
    for stack in (
        CrossAttender(**STACK, **keywords),
        Encoder(**{**STACK, "depth": None}, custom_layers=("f",), **keywords),
    ):
        assert stack.sees_future
    assert not CrossAttender(**STACK).sees_future


@BOTH
def test_costs(keywords: dict[str, Any]) -> None:
    """More tokens cost as much by the slot, and less by the token; and only chosen tokens are in the wide network."""
    row = Encoder(**STACK, **keywords).explain(seq_len=12).rows[1]
    if "ff_soft_experts" in keywords:
        maps = 2 * (D * D + D * D) * 6
        assert row.flops == 3 * 2 * 6 * D + maps // 12
    else:
        light, heavy = 2 * 2 * D * D // 2, 2 * 2 * D * 2 * D
        assert row.flops == light + heavy * 3 // 12 + 2 * D


@BOTH
def test_first_weights_of_outputs(keywords: dict[str, Any]) -> None:
    x = torch.randn(2, 6, D)
    module = bare(**keywords, ff_zero_init_output=True)
    assert not module(x).any()
    module = bare(
        **{**keywords, "ff_mult": 8, "ff_heavy_mult": 8} if keywords is HEAVY else {**keywords, "ff_mult": 8},
        ff_output_proj_depth=2,
    )
    downs = [module.down] if keywords is SOFT else [module.light.down.weight, module.heavy.down.weight]
    for down in downs:
        assert 0.8 < down.std() * (2 * 8 * D * 2) ** 0.5 < 1.2


def test_modules_by_themselves() -> None:
    soft = SoftExperts(D, 6, mult=1, soft_experts=2)
    heavy = HeavyFeedForward(D, 6, heavy_share=0.5)
    x = torch.randn(2, 5, D)
    assert soft(x).shape == heavy(x).shape == (2, 5, 6)
    for module in (soft, heavy):
        again = type(module).from_config(module.config)
        again.load_state_dict(module.state_dict())
        close(again(x), module(x), 0)
        assert "soft_experts" in type(module).describe() or "heavy_tokens" in type(module).describe()
    with pytest.raises(ConfigError, match="it must be the number of experts, or use a FeedForward"):
        SoftExperts(D)
    with pytest.raises(ConfigError, match="give one of them, or use a FeedForward"):
        HeavyFeedForward(D)
    with pytest.raises(ConfigError, match="soft_experts"):
        FeedForward(D, soft_experts=2)
