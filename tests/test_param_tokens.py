"""Attention to parameters: numbers of the public implementation, first weights, and growth."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from catalog import perturb
from safetensors import safe_open
from torch import Tensor, nn

from x_transformers import Attention, Decoder, Encoder, FeedForward, TransformerWrapper, grow_param_tokens_
from x_transformers.errors import ConfigError, StateDictError
from x_transformers.modules.param_attention import ParamAttention

FOLDER = Path(__file__).with_name("golden") / "experts"
CLOSE = 2e-5
KINDS = {"pattention-l2-norm-gelu": "l2_gelu", "pattention-gelu-l2-norm": "gelu_l2", "pattention-softmax": "softmax"}


def read(name: str) -> dict[str, Tensor]:
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def agree(mine: Tensor, theirs: Tensor) -> None:
    assert mine.shape == theirs.shape
    assert (mine - theirs).abs().max() <= CLOSE * (1 + theirs.abs().max())


@torch.no_grad()
def filled(keys: nn.Linear, values: nn.Linear, case: dict[str, Tensor]) -> None:
    keys.weight.copy_(case["state.key_param_tokens"])
    values.weight.copy_(case["state.value_param_tokens"].T)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("place", ["feedforward", "attention"])
def test_numbers(name: str, place: str) -> None:
    case = read(name)
    if place == "feedforward":
        fn: nn.Module = FeedForward(16, 12, mult=1.25, param_attention=KINDS[name], no_bias=True)
        keys, values = fn.up, fn.down
    else:
        attention = Attention(16, heads=2, dim_head=6, param_tokens=20, param_attention=KINDS[name])
        fn = attention.projections.q
        keys, values = fn.keys, fn.values
    filled(keys, values, case)
    x = case["input.x"].requires_grad_()
    out = fn(x)
    agree(out, case["output.y"])
    (out * case["probe"]).sum().backward()
    agree(x.grad, case["grad.input.x"])
    agree(keys.weight.grad, case["grad.key_param_tokens"])
    agree(values.weight.grad.T, case["grad.value_param_tokens"])


def test_numbers_of_growth() -> None:
    case = read("pattention-grown")
    network = FeedForward(16, 12, mult=1.25, param_attention="l2_gelu", no_bias=True)
    filled(network.up, network.down, case)
    agree(network(case["input.x"]), case["output.y"])
    # the factor of the public code grows with the tokens
    wide = FeedForward(16, 12, mult=26 / 16, param_attention="l2_gelu", no_bias=True)
    with torch.no_grad():
        wide.up.weight.zero_()[:20].copy_(case["state.key_param_tokens"])
        wide.down.weight.copy_(case["state.grown_values"].T)
    agree(wide(case["input.x"]), case["output.y_grown"])
    wide.activation.scale = 20**0.5
    agree(wide(case["input.x"]), case["output.y"])


@pytest.mark.parametrize("kind", ["l2_gelu", "gelu_l2"])
def test_nothing_comes_of_nothing(kind: Any) -> None:
    fn = ParamAttention(8, 6, 10, kind)
    x = torch.zeros(2, 8, requires_grad=True)
    out = fn(x)
    assert not out.any()
    out.sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (x, *fn.parameters()))


def test_first_weights() -> None:
    network = FeedForward(64, mult=8, param_attention="l2_gelu", no_bias=True)
    assert network.up.weight.std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert network.down.weight.std().item() == pytest.approx(512**-0.5, rel=0.05)
    weights = network.activation(network.up(torch.randn(64, 64)))
    assert weights.square().mean().item() == pytest.approx(0.43, abs=0.02)
    attention = Attention(16, heads=2, param_tokens=12, zero_init_output=True)
    assert not attention.out.values.weight.any()
    assert attention.out.keys.weight.all()
    gated = Attention(16, heads=2, param_tokens=400, on_attn=True, output_proj_depth=2)
    assert gated.out.projection.values.weight.std().item() == pytest.approx((2 * 400 * 2) ** -0.5, rel=0.1)


def test_qk_clip_scales_values_of_queries_and_keys() -> None:
    attention = perturb(Attention(16, heads=2, dim_head=8, param_tokens=12), noise=0.3)
    x = torch.randn(1, 6, 16)
    _, record = attention(x, return_intermediates=True)
    most = record.pre_softmax_attn.amax().item()
    attention.qk_clip_(record, tau=most / 2)
    _, record = attention(x, return_intermediates=True)
    assert record.pre_softmax_attn.amax().item() <= most / 2 * 1.001


BOTH: dict[str, Any] = {"ff_param_attention": "l2_gelu", "ff_no_bias": True, "attn_param_tokens": 10}
GROWN = {
    "both": BOTH,
    "gelu_l2": {**BOTH, "ff_param_attention": "gelu_l2", "attn_param_attention": "gelu_l2", "attn_kv_heads": 2},
    "some layers": {
        "ff_param_attention": (None, "l2_gelu"),
        "ff_no_bias": True,
        "ff_mult": (2, 1.3),
        "attn_param_tokens": (10, None),
    },
    "feedforwards": {"ff_param_attention": "l2_gelu", "ff_no_bias": True, "ff_param_scale": 3.0},
    "attention": {"attn_param_tokens": 10, "attn_on_attn": True},
    "tied": {**BOTH, "weight_tie_layers": True},
    "cross": {**BOTH, "cross_attend": True, "cross_attn_param_tokens": 6},
}


@pytest.mark.parametrize("name", GROWN)
def test_growth_keeps_the_function(name: str) -> None:
    stack = Decoder(dim=16, depth=2, heads=4, attn_dim_head=8, verbose=False, **GROWN[name])
    model = perturb(TransformerWrapper(num_tokens=20, max_seq_len=12, attn_layers=stack)).double().eval()
    ids, given = torch.randint(0, 20, (2, 9)), {}
    if name == "cross":
        given = {"context": torch.randn(2, 5, 16, dtype=torch.float64)}
    before, size = model(ids, **given), sum(p.numel() for p in model.parameters())
    grow_param_tokens_(model, 6)
    grow_param_tokens_(stack, 3)
    assert sum(p.numel() for p in model.parameters()) > size
    assert all(p.dtype is torch.float64 for p in model.parameters())
    after = model(ids, **given)
    assert (after - before).abs().max() < 1e-10
    # the configuration and the weights are those of the grown model, whose new tokens learn
    again = TransformerWrapper.from_config(model.config).double().eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(ids, **given), after)
    perturb(model)
    after = model(ids, **given)
    assert (after - before).abs().max() > 1e-3
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(ids, **given), after)


def test_a_grown_model_is_saved_and_copied(tmp_path: Path) -> None:
    stack = Encoder(dim=16, depth=1, heads=2, verbose=False, **BOTH)
    model = TransformerWrapper(num_tokens=20, max_seq_len=12, attn_layers=stack).eval()
    grow_param_tokens_(model, 5)
    ids = torch.randint(0, 20, (2, 9))
    again = TransformerWrapper.from_pretrained(model.save_pretrained(tmp_path / "model"))
    assert torch.equal(again(ids), model(ids))
    twin = copy.deepcopy(model)
    grow_param_tokens_(twin, 5)
    assert twin.config["options"]["attn_layers"]["options"]["attn_param_tokens"] == 20
    assert model.config["options"]["attn_layers"]["options"]["attn_param_tokens"] == 15
    # single functions have the configuration of what they are
    fn = model.attn_layers.layers[1].feedforward
    small = FeedForward.from_config(fn.config)
    small.load_state_dict(fn.state_dict())
    x = torch.randn(3, 16)
    assert torch.equal(small.eval()(x), fn(x))


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
def test_states_of_optimizers_grow(make: Any) -> None:
    stack = Decoder(dim=16, depth=1, heads=2, verbose=False, **BOTH)
    optimizer = make(stack.parameters(), lr=1e-3, **({"momentum": 0.9} if make is torch.optim.SGD else {}))

    def step() -> None:
        optimizer.zero_grad()
        stack(torch.randn(2, 5, 16)).square().mean().backward()
        optimizer.step()

    step()
    up = stack.layers[1].feedforward.up
    old = {name: t.clone() for name, t in optimizer.state[up.weight].items() if isinstance(t, Tensor)}
    names = [id(p) for p in stack.parameters()]
    grow_param_tokens_(stack, 4, optimizer)
    assert len(set(names) & {id(p) for p in stack.parameters()}) < len(names)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in stack.parameters()}
    assert set(map(id, optimizer.state)) <= held
    for name, before in old.items() if make is not torch.optim.Adafactor else ():
        now = optimizer.state[up.weight][name]
        if before.ndim:
            assert torch.equal(now[:-4], before)
            assert not now[-4:].any()
        else:
            assert torch.equal(now, before)
    before = up.weight[-4:].clone()
    step()
    assert not torch.equal(up.weight[-4:], before)


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"param_attention": "l2_gelu"}, "no biases; set `no_bias = True`"),
        ({"param_attention": "l2_gelu", "no_bias": True, "glu": True}, "`glu` would multiply"),
        ({"param_attention": "l2_gelu", "no_bias": True, "post_act_ln": True}, "`post_act_ln` would normalize again"),
        ({"param_attention": "l2_gelu", "no_bias": True, "param_scale": 0.0}, "`param_scale` is 0.0"),
        ({"param_attention": "l1", "no_bias": True}, "`param_attention` is 'l1'"),
        ({"param_attention": "softmax", "no_bias": True, "solu": True}, "are alternatives of one choice"),
    ],
)
def test_refusals_of_feedforwards(keywords: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        FeedForward(16, **keywords)


def test_refusals_of_stacks() -> None:
    def build(**keywords: Any) -> Decoder:
        return Decoder(dim=16, depth=1, heads=2, verbose=False, **keywords)

    with pytest.raises(ConfigError, match="each of `ff_experts` would normalize by itself"):
        build(ff_param_attention="l2_gelu", ff_no_bias=True, ff_experts=2)
    with pytest.raises(ConfigError, match="drop `attn_qkv_bias` and `attn_out_bias`"):
        build(attn_param_tokens=4, attn_out_bias=True)
    with pytest.raises(ConfigError, match="`attn_param_tokens` is 0"):
        build(attn_param_tokens=0)
    stack = build(attn_param_tokens=4)
    with pytest.raises(StateDictError, match="attention to parameters"):
        stack.export_reference_state_dict()
    with pytest.raises(StateDictError, match="attention to parameters"):
        build(ff_param_attention="l2_gelu", ff_no_bias=True).export_reference_state_dict()


def test_refusals_of_growth() -> None:
    def build(**keywords: Any) -> Decoder:
        return Decoder(dim=16, depth=1, heads=2, verbose=False, **keywords)

    with pytest.raises(ConfigError, match="attends to no parameters"):
        grow_param_tokens_(build(), 4)
    with pytest.raises(ConfigError, match="take weight from the old ones in the softmax"):
        grow_param_tokens_(build(attn_param_tokens=4, attn_param_attention="softmax"), 4)
    for tokens in (0, -1, 2.5, "4"):
        with pytest.raises(ConfigError, match="`tokens` is"):
            grow_param_tokens_(build(**BOTH), tokens)
    with pytest.raises(ConfigError, match="must be a stack"):
        grow_param_tokens_(nn.Linear(2, 2), 4)
    with pytest.raises(ConfigError, match="`optimizers` contains 3"):
        grow_param_tokens_(build(**BOTH), 4, 3)
    stack = build(**BOTH)
    stack.layers[1].feedforward.down = nn.Sequential(stack.layers[1].feedforward.down)
    with pytest.raises(ConfigError, match="a Sequential is in the place of one"):
        grow_param_tokens_(stack, 4)
