"""Goldens: numbers that the reference computed, from its own weights, call by call."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import x_transformers
from x_transformers import Decoder, TransformerWrapper
from x_transformers.errors import ConfigError

FOLDER = Path(__file__).with_name("golden")
CLOSE = 2e-5
NOT_YET = r"is not defined|unknown keyword|not available in this version"

# Every golden whose options exist, by name. One more option makes the list longer, or `test_none_is_forgotten` fails.
NAMES = """
    attention-alone attention-pool continuous cross-attend-decoder cross-attend-dim-context cross-attender-inverted
    cross-attender cross-residual-attn decoder-adaptive-layernorm decoder-adaptive-rmsnorm decoder-alibi-half
    decoder-alibi-pos decoder-alibi decoder-ar-loss decoder-attn-mask decoder-cog-signed decoder-cope
    decoder-custom-layers decoder-derf decoder-dynamic-pos-bias-log decoder-dynamic-pos-bias decoder-dynamic-tanh
    decoder-emb-dim decoder-embed-ids decoder-execute-order decoder-ff-deep-embed decoder-ff-glu-mult-bias
    decoder-ff-glu decoder-ff-no-bias decoder-ff-post-act-ln decoder-ff-relu-squared decoder-ff-solu
    decoder-ff-swish-glu decoder-flash decoder-forgetting-rows decoder-forgetting decoder-gate-residual
    decoder-gate-value-heads decoder-gate-values decoder-gates-low-rank decoder-gates decoder-hard
    decoder-head-scale decoder-kv-heads decoder-l2-distance decoder-l2norm-embed decoder-laser decoder-layerscale
    decoder-learned-sink decoder-lime decoder-macaron decoder-mem-kv decoder-memory-interspersed
    decoder-memory-tokens decoder-mla-rope decoder-mla decoder-mos decoder-no-abs-pos decoder-on-attn
    decoder-one-kv-head decoder-output-heads decoder-par-ratio decoder-polar decoder-pos decoder-post-emb-norm
    decoder-post-norm decoder-pre-and-post-norm decoder-prepend decoder-qk-norm-dim-scale decoder-qk-norm-groups
    decoder-qk-norm decoder-qk-rmsnorm decoder-recycling decoder-reinject-input decoder-rel-pos-bias
    decoder-residual-attn decoder-rmsnorm decoder-rotary-interpolation decoder-rotary decoder-rotate-num-heads
    decoder-sandwich-coef decoder-sandwich-norm decoder-scale-residual decoder-scalenorm decoder-selective
    decoder-seq-start-pos decoder-shift-tokens-2 decoder-shift-tokens decoder-sigmoid decoder-sigsoftmax
    decoder-simple-rmsnorm decoder-sinusoidal decoder-softclamp-ff decoder-softclamp-logits decoder-softclamp-output
    decoder-sparse-topk decoder-sum-embeds decoder-swiglu-values decoder-talking-post decoder-talking-pre
    decoder-tie-embedding decoder-unet-skips decoder-value-dim-head decoder-value-residual-fixed
    decoder-value-residual decoder-value-rmsnorm decoder-weight-tie-layers decoder-window decoder-xl-mems-t5-shift
    decoder-xl-mems decoder-xpos decoder-zero-kv encoder-alibi-pos-bias encoder-attn-flash
    encoder-attn-max-attend-past encoder-attn-num-mem-kv encoder-attn-pool encoder-attn-sparse-topk
    encoder-attn-use-rel-proj-pos-bias encoder-average-pool encoder-cls-2 encoder-cls encoder-dynamic-pos-bias
    encoder-integrate-layers encoder-logits-dim encoder-macaron encoder-mask encoder-memory-tokens encoder-par-ratio
    encoder-polar-pos-emb encoder-rel-pos-bias encoder-residual-attn encoder-return-embeddings
    encoder-rotary-pos-emb encoder-sandwich-coef encoder-unet-skips encoder-use-rmsnorm feedforward-alone
    generate-greedy generate-ragged generate-xtransformer multi-input-logits multi-input neo-mlp prefix-decoder
    transformer-block vit-registers vit xtransformer-loss xtransformer-prepend xval xl-loss
    continuous-probabilistic-loss xval-loss decoder-hyper decoder-hyper-views encoder-num-residual-streams
"""
GOLDENS = NAMES.split()

# The reference's mixing of residual streams degenerates to ones, which these weights switch on.
DEGENERATE_MIXING = ["decoder-hyper", "decoder-hyper-views", "encoder-num-residual-streams"]

# These hold a fault of the reference and must not agree: the future leaks; padding leaks into kept rows.
FAULTY = ["decoder-orthog-values", "encoder-shift-tokens"]

# Losses of the reference whose masks are shifted by one, and what is right.
CORRECTED = {"dpo-loss": 0.70846, "continuous-loss": 1.50118}


class Golden:
    """One file: what to build, what to call, weights, inputs, and what came out."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            self.told = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        self.output: Tensor = tensors.pop("output")
        self.inputs = {name.removeprefix("input."): t for name, t in tensors.items() if name.startswith("input.")}
        self.state = {name.removeprefix("state."): t for name, t in tensors.items() if name.startswith("state.")}

    def build(self) -> nn.Module:
        return eval(self.told["build"], {**vars(x_transformers), "torch": torch}).eval()

    @torch.no_grad()
    def call(self, model: nn.Module) -> Tensor:
        return eval(self.told["call"], {**vars(x_transformers), "torch": torch, "model": model, **self.inputs})

    def check(self, model: nn.Module) -> None:
        got = self.call(model)
        if self.output.is_floating_point():
            torch.testing.assert_close(got, self.output, atol=CLOSE, rtol=0)
        else:
            assert torch.equal(got, self.output)


def golden(name: str) -> Golden:
    return Golden(FOLDER / f"{name}.safetensors")


@pytest.mark.parametrize("name", GOLDENS)
def test_numbers(name: str) -> None:
    """Weights in the reference's layout, ours made from them, and a model inside of a user's module: all agree.

    Exported, the weights are those of the file.
    """
    one = golden(name)
    model = one.build()
    model.load_state_dict(one.state)
    one.check(model)
    exported = model.export_reference_state_dict()
    assert exported.keys() == one.state.keys()
    for key, tensor in exported.items():
        torch.testing.assert_close(tensor, one.state[key], atol=0, rtol=1e-6, msg=key)
    again = one.build()
    again.load_state_dict(model.state_dict())
    one.check(again)
    nested = nn.ModuleDict({"inner": nn.ModuleDict({"model": one.build()})})
    nested.load_state_dict({f"inner.model.{key}": tensor for key, tensor in one.state.items()})
    one.check(nested["inner"]["model"])


@pytest.mark.parametrize("name", DEGENERATE_MIXING)
def test_the_keyword_of_the_degenerate_mixing(name: str) -> None:
    """A model that was built with the keyword and one that read such weights have the same configuration."""
    one = golden(name)
    read = one.build()
    read.load_state_dict(one.state)
    one.told["build"] = one.told["build"].replace(
        "num_residual_streams", "hyper_conn_reference_mix = True, num_residual_streams"
    )
    model = one.build()
    model.load_state_dict(one.state)
    one.check(model)
    assert read.config == model.config


@pytest.mark.parametrize("name", FAULTY)
def test_faults_are_not_reproduced(name: str, shared: Path) -> None:
    one = Golden(shared / "golden" / f"{name}.safetensors")
    model = one.build()
    model.load_state_dict(one.state)
    assert (one.call(model) - one.output).abs().max() > 0.1


@pytest.mark.parametrize("name", CORRECTED)
def test_corrected_numbers(name: str, shared: Path) -> None:
    one = Golden(shared / "golden" / f"{name}.safetensors")
    model = one.build()
    model.load_state_dict(one.state)
    assert abs(one.call(model).item() - CORRECTED[name]) < CLOSE
    assert abs(one.output.item() - CORRECTED[name]) > 100 * CLOSE


def test_files_are_the_list() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.safetensors")) == sorted(GOLDENS)


def test_none_is_forgotten(shared: Path) -> None:
    """Goldens that are not in the list ask for something that does not exist."""
    for path in sorted((shared / "golden").glob("*.safetensors")):
        if path.stem not in (*GOLDENS, *FAULTY, *CORRECTED):
            with pytest.raises((NameError, ConfigError), match=NOT_YET):
                Golden(path).build()


# Query heads that share keys stand in another order in the reference: head h reads key head h % g there.

GROUPED = {
    "plain": {},
    "alibi": {"alibi_pos_bias": True},
    "some heads alibi": {"alibi_pos_bias": True, "alibi_num_heads": 3},
    "own slopes": {"alibi_pos_bias": True, "rel_pos_kwargs": {"slopes": [0.9, 0.5, 0.2, 0.1]}},
    "t5": {"rel_pos_bias": True, "disable_abs_pos_emb": False},
    "dynamic": {"dynamic_pos_bias": True},
    "qk_norm": {"attn_qk_norm": True, "attn_qk_norm_dim_scale": True},
    "qk_rmsnorm": {"attn_qk_rmsnorm": True},
    "sink": {"attn_head_learned_sink": True},
    "memory": {"attn_num_mem_kv": 2},
}
HEADS, KV_HEADS, DIM_HEAD, DIM = 4, 2, 8, 16
PER_QUERY_HEAD = {
    "qk_norm": {"qk_norm_q_scale": (HEADS, 1, DIM_HEAD)},
    "qk_rmsnorm": {"q_rmsnorm.gamma": (HEADS, 1, DIM_HEAD)},
    "sink": {"attend.head_attn_sink": (HEADS,)},
}
PER_KEY_HEAD = {
    "qk_norm": {"qk_norm_k_scale": (KV_HEADS, 1, DIM_HEAD)},
    "qk_rmsnorm": {"k_rmsnorm.gamma": (KV_HEADS, 1, DIM_HEAD)},
    "memory": {"mem_k": (KV_HEADS, 2, DIM_HEAD), "mem_v": (KV_HEADS, 2, DIM_HEAD)},
}
OF_THE_STACK = {
    "t5": {"relative_attention_bias.weight": (32, HEADS)},
    "dynamic": {
        "mlp.0.0.weight": (DIM // 4, 1),
        "mlp.0.0.bias": (DIM // 4,),
        "mlp.1.0.weight": (DIM // 4, DIM // 4),
        "mlp.1.0.bias": (DIM // 4,),
        "mlp.2.weight": (HEADS, DIM // 4),
        "mlp.2.bias": (HEADS,),
    },
}


def reference_states(kind: str) -> Iterator[dict[str, Tensor]]:
    """Weights in the reference's layout: with shared key heads, and the same with a key head for each query head."""
    state = dict(golden("decoder-kv-heads").state)
    full = dict(state)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape) * 0.5 + 0.5

    for layer in (0, 2):
        inside = f"attn_layers.layers.{layer}.1."
        for name, shape in PER_QUERY_HEAD.get(kind, {}).items():
            state[inside + name] = full[inside + name] = draw(shape)
        shared = {name: draw(shape) for name, shape in PER_KEY_HEAD.get(kind, {}).items()}
        for name, tensor in shared.items():
            state[inside + name] = tensor
            full[inside + name] = tile(tensor)
        for name in ("to_k.weight", "to_v.weight"):
            full[inside + name] = tile(state[inside + name].unflatten(0, (KV_HEADS, -1))).flatten(0, 1)
    for name, shape in OF_THE_STACK.get(kind, {}).items():
        state[f"attn_layers.rel_pos.{name}"] = full[f"attn_layers.rel_pos.{name}"] = draw(shape)
    yield state
    yield full


def tile(t: Tensor) -> Tensor:
    return torch.cat([t] * (HEADS // KV_HEADS))


def decoder(**more: Any) -> TransformerWrapper:
    layers = Decoder(dim=DIM, depth=2, heads=HEADS, attn_dim_head=DIM_HEAD, verbose=False, **more)
    return TransformerWrapper(num_tokens=24, max_seq_len=32, attn_layers=layers).eval()


@pytest.mark.parametrize("kind", GROUPED)
@pytest.mark.parametrize("nested", [False, True], ids=["alone", "nested"])
@torch.no_grad()
def test_grouped_heads_are_reordered(kind: str, nested: bool) -> None:
    """Whatever belongs to a head moves with it, and a saved copy loads without being moved again."""
    grouped, full = reference_states(kind)
    shared, copied = decoder(**GROUPED[kind], attn_kv_heads=KV_HEADS), decoder(**GROUPED[kind])
    if nested:
        user = nn.ModuleDict({"model": shared})
        user.load_state_dict({f"model.{name}": tensor for name, tensor in grouped.items()})
    else:
        shared.load_state_dict(grouped)
    copied.load_state_dict(full)
    x = golden("decoder-kv-heads").inputs["x"]
    wanted = copied(x)
    torch.testing.assert_close(shared(x), wanted, atol=CLOSE, rtol=0)
    again = decoder(**GROUPED[kind], attn_kv_heads=KV_HEADS)
    again.load_state_dict(shared.state_dict())
    torch.testing.assert_close(again(x), wanted, atol=CLOSE, rtol=0)
    # loading the reference's file once more, over reordered slopes, ends in the same place
    again.load_state_dict(grouped)
    torch.testing.assert_close(again(x), wanted, atol=CLOSE, rtol=0)
    exported = again.export_reference_state_dict()
    assert exported.keys() == grouped.keys()
    assert all(torch.equal(tensor, grouped[key]) for key, tensor in exported.items())


@pytest.mark.parametrize("name", ["decoder-alibi", "decoder-kv-heads", "decoder-rotary", "encoder-rel-pos-bias"])
def test_derived_buffers_of_a_file_may_be_absent_or_there(name: str) -> None:
    one = golden(name)
    model = one.build()
    derived = [key for key in one.state if key.endswith(("inv_freq", "rotary_pos_emb.scale"))]
    model.load_state_dict({key: tensor for key, tensor in one.state.items() if key not in derived})
    one.check(model)
    extra = {"attn_layers.rotary_pos_emb.inv_freq": torch.zeros(4)} if "rotary" in name else {}
    model.load_state_dict({**one.state, **extra})
    one.check(model)


@pytest.mark.parametrize("name", ["decoder-alibi", "decoder-kv-heads", "cross-attend-decoder", "decoder-ff-glu"])
def test_a_reference_file_of_another_model_is_refused(name: str) -> None:
    one = golden(name)
    model = one.build()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state = {key: tensor for key, tensor in one.state.items() if key != "token_emb.emb.weight"}
    state["attn_layers.final_norm.gamma"] = torch.zeros(3)
    state["attn_layers.no_such.weight"] = torch.zeros(1)
    with pytest.raises((ValueError, RuntimeError)) as error:
        model.load_state_dict(state)
    words = str(error.value)
    assert "missing: token_emb.emb.weight" in words
    assert "unexpected: attn_layers.no_such.weight" in words
    assert "wrong shape: attn_layers.final_norm.gamma is (3,), the model has (16,)" in words
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_our_layout_has_names_for_people() -> None:
    names = set(golden("decoder-kv-heads").build().state_dict())
    assert {
        "token_emb.emb.weight",
        "attn_layers.layers.0.norm.gamma",
        "attn_layers.layers.0.attention.projections.q.weight",
        "attn_layers.layers.1.feedforward.up.weight",
        "attn_layers.final_norm.gamma",
        "to_logits.weight",
    } <= names
