"""Tied blocks: orders, what they share, relaxed recursion, and the conversion of trained models."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from catalog import perturb
from torch import Tensor, nn

from x_transformers import Decoder, Encoder, TransformerWrapper, ViTransformerWrapper, to_experts, to_recursive
from x_transformers.errors import ConfigError, InputError, StateDictError
from x_transformers.layers.branches.shared_norm import with_what_they_share
from x_transformers.modules.tied_linear import TiedLinear
from x_transformers.training.optimizers import split_parameters

TIED: dict[str, Any] = {"weight_tie_layers": True, "tie_lora_rank": 2}


def stack(kind: Any = Decoder, **options: Any) -> Any:
    return kind(**{"dim": 16, "depth": 4, "heads": 2, "attn_dim_head": 8, "verbose": False, **options})


def model(**options: Any) -> TransformerWrapper:
    return TransformerWrapper(num_tokens=24, max_seq_len=16, attn_layers=stack(**options))


def test_orders() -> None:
    cycle, sequence = stack(tie_blocks=2), stack(tie_blocks=2, tie_order="sequence")
    assert cycle.layers_execute_order == (0, 1, 2, 3, 0, 1, 2, 3)
    assert sequence.layers_execute_order == (0, 1, 0, 1, 2, 3, 2, 3)
    assert len(cycle.layers) == len(sequence.layers) == 4
    assert stack(tie_blocks=1).layers_execute_order == stack(weight_tie_layers=True).layers_execute_order


def test_what_is_shared() -> None:
    def owners(layers: Any, path: str) -> list[Any]:
        return [layers.get_submodule(f"layers.{index}.{path}").owner for index in (0, 2, 4, 6)]

    cycle = stack(tie_blocks=2, tie_lora_rank=3)
    one, two, three, four = owners(cycle, "attention.projections.q")
    assert one is three is cycle.layers[0].attention.projections.q
    assert two is four is cycle.layers[2].attention.projections.q
    sequence = stack(tie_blocks=2, tie_lora_rank=3, tie_order="sequence")
    one, two, three, four = owners(sequence, "attention.out")
    assert one is two
    assert three is four
    assert one is not three
    names = set(sequence.state_dict())
    assert "layers.4.attention.out.weight" in names
    assert not names & {"layers.2.attention.out.weight", "layers.6.attention.out.weight", "layers.2.norm.gamma"}
    assert names >= {f"layers.{k}.attention.out.lora_a.weight" for k in (0, 2, 4, 6)}
    assert names >= {f"layers.{k}.feedforward.up.bias" for k in (1, 3, 5, 7)}
    own = set(stack(weight_tie_layers=True, tie_own_norms=True, sandwich_norm=True).state_dict())
    assert own >= {f"layers.{k}.{norm}.gamma" for k in range(8) for norm in ("norm", "output_norm")}
    assert not any(name.startswith("layers.3.feedforward") or "lora" in name for name in own)


def test_without_their_additions_relaxed_blocks_are_tied_ones() -> None:
    relaxed, tied = stack(tie_blocks=2, tie_lora_rank=3, ff_no_bias=True), stack(tie_blocks=2, ff_no_bias=True)
    # the additions start at zero
    tied.load_state_dict({name: t for name, t in relaxed.state_dict().items() if "lora" not in name})
    x = torch.randn(2, 7, 16)
    torch.testing.assert_close(relaxed(x), tied(x))


def test_ranks_are_at_most_those_of_the_maps() -> None:
    layers = stack(**{**TIED, "tie_lora_rank": 6}, attn_gate_value_heads=True)
    shapes = {name.split(".", 2)[2]: tuple(t.shape) for name, t in layers.named_parameters() if "lora" in name}
    assert shapes["feedforward.up.lora_a.weight"] == (6, 16)
    assert shapes["feedforward.up.lora_b.weight"] == (64, 6)
    gates = [shape for name, shape in shapes.items() if "values" in name]
    assert gates == [(2, 16), (2, 2)]


def test_modules_of_the_user_are_left_as_they_are() -> None:
    mine = nn.Sequential(nn.GELU(), nn.Linear(64, 64))
    layers = stack(**TIED, ff_custom_activation=mine)
    # a container of PyTorch is looked into, a class of the user's is not
    assert isinstance(layers.layers[3].feedforward.activation[1], TiedLinear)

    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.gelu(nn.functional.linear(x, self.map.weight))

    layers = stack(**TIED, ff_custom_activation=Mine())
    assert type(layers.layers[3].feedforward.activation.map) is nn.Linear
    layers(torch.randn(1, 4, 16))


@pytest.mark.parametrize("own_norms", [False, True])
def test_copies_casts_and_devices_keep_ties(own_norms: bool, tmp_path: Path) -> None:
    first = perturb(model(**TIED, tie_own_norms=own_norms)).eval()
    ids = torch.randint(0, 24, (2, 9))
    out = first(ids)
    size = len(list(first.parameters()))
    twin = copy.deepcopy(first)
    assert twin.attn_layers.layers[2].attention.out.owner is twin.attn_layers.layers[0].attention.out
    assert torch.equal(twin(ids), out)
    with torch.device("meta"):
        other = TransformerWrapper.from_config(first.config).eval()
    other.to_empty(device="cpu")
    other.load_state_dict(first.state_dict())
    assert torch.equal(other(ids), out)
    with torch.device("meta"):
        other = TransformerWrapper.from_config(first.config).eval()
    other.load_state_dict(first.state_dict(), assign=True)
    assert torch.equal(other(ids), out)
    read = TransformerWrapper.from_pretrained(first.save_pretrained(tmp_path / "model")).eval()
    assert torch.equal(read(ids), out)
    for each in (twin, other, read):
        assert len(list(each.parameters())) == size
        perturb(each)
        assert not torch.equal(each(ids), out)
    assert first.double()(ids).dtype is torch.float64


def test_gradients_of_a_shared_matrix_are_summed() -> None:
    layers = perturb(stack(**TIED, depth=2))
    x = torch.randn(2, 5, 16)
    layers(x).square().mean().backward()
    shared = layers.layers[1].feedforward.up
    both = shared.weight.grad
    # the same model with matrices of their own
    apart = stack(depth=2, weight_tie_layers=True, tie_lora_rank=2)
    apart.load_state_dict(layers.state_dict())
    second = apart.layers[3].feedforward.up
    second._owner = (copy.deepcopy(second.owner),)
    apart(x).square().mean().backward()
    torch.testing.assert_close(apart.layers[1].feedforward.up.weight.grad + second.owner.weight.grad, both)


def test_exits_after_each_loop() -> None:
    net = perturb(
        TransformerWrapper(num_tokens=24, max_seq_len=16, exit_layers=(1, 2, 3), attn_layers=stack(**TIED))
    ).eval()
    ids = torch.randint(0, 24, (2, 9))
    two = model(**TIED, depth=2).eval()
    # the first two loops are a model of two blocks
    names = two.state_dict()
    two.load_state_dict({name: t for name, t in net.state_dict().items() if name in names})
    torch.testing.assert_close(net.shallow(2)(ids), two(ids))
    assert not torch.allclose(net(ids), two(ids))


def test_costs_and_matrices_are_those_of_all_blocks() -> None:
    layers, plain = stack(**TIED), stack()
    matrices = split_parameters(layers).matrices
    names = {id(p): name for name, p in layers.named_parameters()}
    found = {names[id(p)] for p in matrices}
    assert {"layers.0.attention.out.weight", "layers.1.feedforward.up.weight"} <= found
    assert "layers.3.feedforward.up.lora_a.weight" in found
    for index in (1, 3):
        added = sum(p.numel() for n, p in layers.layers[index].named_parameters() if "lora" in n)
        assert layers.layers[index].fn.explain(None).flops == plain.layers[index].fn.explain(None).flops + 2 * added


def test_what_is_sharded_together() -> None:
    def places(layers: Any) -> list[list[int]]:
        index = {id(branch): number for number, branch in enumerate(layers.layers)}
        return [[index[id(branch)] for branch in group] for group in with_what_they_share(layers.layers)]

    assert places(stack()) == [[k] for k in range(8)]
    assert places(stack(**TIED)) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert places(stack(tie_blocks=2, tie_own_norms=True)) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert places(stack(parallel_block=True, parallel_block_one_norm=True, depth=2)) == [[0, 1], [2, 3]]
    assert places(stack(**TIED, parallel_block=True, parallel_block_one_norm=True)) == [list(range(8))]


# conversion

CONVERTED: dict[str, dict[str, Any]] = {
    "plain": {},
    "gated": {"ff_glu": True, "ff_glu_mult_bias": True, "ff_no_bias": True, "attn_qkv_bias": True},
    "norms": {"use_rmsnorm": True, "sandwich_norm": True, "attn_qk_rmsnorm": True, "ff_post_act_ln": True},
    "heads": {"attn_kv_heads": 1, "rotary_pos_emb": True, "attn_num_mem_kv": 2, "attn_gate_value_heads": True},
    "values": {"add_value_residual": True, "learned_value_residual_mix": True},
    "macaron": {"macaron": True},
    "parameters": {"ff_param_attention": "l2_gelu", "ff_no_bias": True, "attn_param_tokens": 10},
}


@pytest.mark.parametrize("name", CONVERTED)
def test_full_rank_restores_the_model(name: str) -> None:
    dense = perturb(model(**CONVERTED[name]), noise=0.2).double().eval()
    ids = torch.randint(0, 24, (2, 9))
    before = dense(ids)
    ways = [("average", "cycle"), ("lower", "sequence"), ("stepwise", "cycle"), ("stepwise", "sequence")]
    for init, order in ways if name == "plain" else ways[:1]:
        found = to_recursive(dense, 2, 16, init, order)
        assert (found(ids) - before).abs().max() < 1e-10
        assert torch.equal(dense(ids), before)
    again = TransformerWrapper.from_config(found.config).double().eval()
    again.load_state_dict(found.state_dict())
    assert torch.equal(again(ids), found(ids))


@pytest.mark.parametrize("init", ["average", "lower", "stepwise"])
@pytest.mark.parametrize("order", ["cycle", "sequence"])
def test_what_a_rank_leaves_are_the_last_singular_values(init: Any, order: Any) -> None:
    dense = perturb(stack(), noise=0.2).double()
    found = to_recursive(dense, 2, 5, init, order)
    for block in range(4):
        base = block % 2 if order == "cycle" else block // 2
        members = [base, base + 2] if order == "cycle" else [2 * base, 2 * base + 1]
        old = [dense.layers[2 * each + 1].feedforward.up.weight for each in range(4)]
        shared = {"average": sum(old[each] for each in members) / 2, "lower": old[base], "stepwise": old[2 * base]}[
            init
        ]
        new = found.layers[2 * block + 1].feedforward.up
        torch.testing.assert_close(new.owner.weight, shared)
        low = new.lora_b.weight @ new.lora_a.weight
        left = torch.linalg.matrix_norm(old[block] - new.owner.weight - low).square()
        tail = torch.linalg.svdvals(old[block] - shared)[5:].square().sum()
        torch.testing.assert_close(left, tail, atol=1e-12, rtol=1e-9)


def test_conversion_without_a_rank() -> None:
    dense = perturb(stack(Encoder), noise=0.2).eval()
    found = to_recursive(dense, 2, None, "average")
    first, second = dense.layers[1].feedforward, dense.layers[5].feedforward
    torch.testing.assert_close(found.layers[1].feedforward.up.bias, (first.up.bias + second.up.bias) / 2)
    torch.testing.assert_close(found.layers[5].norm.gamma, dense.layers[5].norm.gamma)
    assert not found.training
    assert sum(p.numel() for p in found.parameters()) < 0.6 * sum(p.numel() for p in dense.parameters())
    found(torch.randn(1, 5, 16))


def test_other_models_are_converted() -> None:
    dense = ViTransformerWrapper(image_size=8, patch_size=4, attn_layers=stack(Encoder)).double().eval()
    image = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(to_recursive(dense, 1, 16)(image), dense(image), atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tie_lora_rank": 2}, "set `weight_tie_layers = True` or `tie_blocks`"),
        ({"tie_own_norms": True}, "set `weight_tie_layers = True` or `tie_blocks`"),
        ({**TIED, "tie_lora_rank": 17}, "`tie_lora_rank` is 17.* must lie between 1 and 16"),
        ({**TIED, "tie_lora_rank": 0}, "`tie_lora_rank` is 0"),
        ({"weight_tie_layers": True, "tie_blocks": 2}, "keep one of the two"),
        ({"tie_blocks": 3}, "`tie_blocks` is 3, which does not divide the `depth` 4"),
        ({"tie_blocks": 0}, "`tie_blocks` is 0"),
        ({"tie_blocks": 2, "tie_order": "both"}, "`tie_order` is 'both'"),
        ({**TIED, "ff_experts": 2}, "give fewer layers more experts instead"),
        ({**TIED, "ff_mult": (1, 2, 3, 4)}, "`up`, which is 16 x 16 with a bias in one of them and 32 x 16"),
        ({**TIED, "ff_rwkv": (True, False, True, False)}, "a ChannelMix and a FeedForward are to be tied"),
        ({"tie_blocks": 2, "depth": None, "custom_layers": "afaf"}, "`tie_blocks` repeats blocks"),
        ({"tie_blocks": 2, "unet_skips": True}, "`unet_skips` joins different blocks"),
        ({"tie_blocks": 2, "integrate_layers": True}, "every layer must run once"),
    ],
)
def test_refusals(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        stack(**options)


def test_refusals_of_conversion() -> None:
    for blocks, words in ((3, "does not divide the `depth` 4"), (0, "`tie_blocks` is 0")):
        with pytest.raises(ConfigError, match=words):
            to_recursive(stack(), blocks, 2)
    with pytest.raises(ConfigError, match="`tie_lora_rank` is 40"):
        to_recursive(stack(), 2, 40)
    for options in (TIED, {"weight_tie_layers": True}, {"layers_execute_order": (0, 1, 0, 1, 2, 3, 4, 5, 6, 7)}):
        with pytest.raises(ConfigError, match="run several times already"):
            to_recursive(stack(**options), 2, 2)
    with pytest.raises(ConfigError, match="`custom_layers` specifies another list"):
        to_recursive(stack(custom_layers="afaf", depth=None), 1, 2)
    with pytest.raises(ConfigError, match="more experts instead"):
        to_recursive(stack(ff_experts=2), 2, 2)
    with pytest.raises(ConfigError, match="must be a stack"):
        to_recursive(nn.Linear(2, 2), 2, 2)
    with pytest.raises(ConfigError, match="`init` is 'first'"):
        to_recursive(stack(), 2, 2, "first")


def test_a_borrower_by_itself_keeps_its_owner() -> None:
    layers = stack(**TIED)
    norm, out = layers.layers[2].norm, layers.layers[2].attention.out
    assert copy.deepcopy(norm).owner is norm.owner
    assert copy.deepcopy(out).owner is layers.layers[0].attention.out


def test_what_tied_matrices_refuse() -> None:
    layers = stack(**TIED)
    with pytest.raises(StateDictError):
        layers.export_reference_state_dict()
    with pytest.raises(ConfigError, match="not those of tied blocks"):
        to_experts(layers, 2, 1)
    attention = layers.layers[2].attention
    _, record = attention(torch.randn(1, 4, 16), return_intermediates=True)
    with pytest.raises(InputError, match="cannot be scaled for one of them"):
        attention.qk_clip_(record, tau=1e-3)
