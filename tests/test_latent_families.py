"""DeepSeek and gpt-oss: numbers of transformers, what is refused, and what follows from their keywords."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_experts import agree, compare, read
from torch import Tensor

from x_transformers import Decoder, FeedForward, TransformerWrapper, load_pretrained
from x_transformers.errors import ConfigError, StateDictError
from x_transformers.feedforward.experts import Experts
from x_transformers.feedforward.glu import GLU
from x_transformers.feedforward.softclamp import ClampedSwiGLU
from x_transformers.pretrained.families.gpt_oss import NAMES

V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}


def write(folder: Path, entries: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(entries))
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    return folder


def files_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a model as they are in files: each expert by itself."""
    found = {}
    for name, t in state.items():
        before, stacked, kind = name.partition("experts.")
        if stacked and "shared" not in before:
            maps = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
            for number, each in enumerate(t):
                for part, rows in zip(maps, each.chunk(len(maps)), strict=True):
                    found[f"{before}experts.{number}.{part}.weight"] = rows
        else:
            found[name] = t
    return found


def golden() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    case = read("deepseekv3-model")
    return case, {name.removeprefix("state."): t for name, t in case.items() if name.startswith("state.")}


@torch.no_grad()
def test_a_model_with_a_shared_rotated_key(tmp_path: Path) -> None:
    """That of DeepSeek-V3, without a latent of queries; also written back."""
    case, state = golden()
    files = files_of(state)
    model = load_pretrained(write(tmp_path / "a", V3, files))
    assert isinstance(model, TransformerWrapper)
    logits, record = model(case["input.ids"], return_intermediates=True)
    agree(logits, case["output.logits"])
    # the inputs of attentions and feedforwards, and the result
    for block in (0, 1):
        agree(record.layer_hiddens[2 * block], case[f"output.hidden.{block}"])
    assert model.attn_layers.layers[3].feedforward.router.score_bias.any()
    model.save_pretrained(tmp_path / "b", format="hf")
    written = load_file(tmp_path / "b" / "model.safetensors")
    assert written.keys() == files.keys()
    assert all(torch.equal(t, files[name]) for name, t in written.items())


def gpt_oss_in_our_layout(case: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Return the weights of the block, or their gradients."""
    found = {f"router.{name}": case[f"{kind}.router.{name}"] for name in ("weight", "bias")}
    for mine, theirs, layout in zip(("up", "down"), NAMES.maps, NAMES.layouts, strict=True):
        (found[mine],) = layout.read(case[f"{kind}.experts.{theirs}"])
    (found["up_bias"],) = NAMES.bias_layout.read(case[f"{kind}.experts.gate_up_proj_bias"])
    return found | {"down_bias": case[f"{kind}.experts.down_proj_bias"]}


def test_a_block_with_clamped_gates() -> None:
    """That of gpt-oss: experts with biases, a bias of the router, and the clamp of both halves at 0.8."""
    case = read("gptoss-block")
    gate: dict[str, Any] = {"glu": True, "activation": "clamped_swiglu", "activation_limit": 0.8}
    module = Experts(16, mult=0.75, experts=4, experts_topk=2, router_bias=True, **gate)
    module.load_state_dict(gpt_oss_in_our_layout(case, "state"))
    routing = module.route(case["input.x"].flatten(0, 1))
    agree(routing.logits.detach(), case["output.router_logits"])
    assert torch.equal(routing.experts, case["output.experts"])
    agree(routing.weights.detach(), case["output.weights"])
    compare(module, case, gpt_oss_in_our_layout(case, "grad"))


def clamped(projected: Tensor, limit: float) -> Tensor:
    up, gate = projected.chunk(2, dim=-1)
    gate = gate.clamp(max=limit)
    return (up.clamp(-limit, limit) + 1) * gate * (1.702 * gate).sigmoid()


@pytest.mark.parametrize("grad", [False, True])
def test_the_clamped_gate_of_a_plain_feedforward(grad: bool) -> None:
    x = 9 * torch.randn(2, 3, 8)
    module = FeedForward(8, glu=True, activation="clamped_swiglu", activation_limit=1.5, glu_mult_bias=True)
    with torch.set_grad_enabled(grad), torch.no_grad() if not grad else torch.enable_grad():
        wanted = module.down(clamped(module.up(x), 1.5) * module.gate_scale)
        torch.testing.assert_close(module(x), wanted)
        torch.testing.assert_close(module.ff(x), wanted)
        glu = GLU(8, 5, ClampedSwiGLU(7.0))
        torch.testing.assert_close(glu(x), clamped(glu.proj(x), 7.0))
    # a module of the caller's with this activation is used as a whole, too
    own = FeedForward(8, glu=True, custom_activation=ClampedSwiGLU(1.5))
    torch.testing.assert_close(own(x), own.down(clamped(own.up(x), 1.5)))


STACK: dict[str, Any] = {"dim": 16, "depth": 1, "heads": 2, "verbose": False}
CLAMPED: dict[str, Any] = {"ff_activation": "clamped_swiglu"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (CLAMPED, "'clamped_swiglu' changes both halves of a gated feedforward; set `ff_glu = True`"),
        ({**CLAMPED, "ff_experts": 4}, "changes both halves of a gated feedforward"),
        (
            {**CLAMPED, "ff_glu": True, "ff_glu_softclamp": True},
            "bounds the linear factor of the exact GELU or of SiLU",
        ),
        ({**CLAMPED, "ff_glu": True, "ff_activation_limit": 0.0}, "`ff_activation_limit` is 0.0; it must be positive"),
        ({"ff_activation": "clamped"}, "`ff_activation` is 'clamped'"),
    ],
)
def test_refused_gates(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Decoder(**STACK, **options)


V2 = {name: value for name, value in V3.items() if name not in ("n_group", "topk_group")} | {
    "model_type": "deepseek_v2",
    "architectures": ["DeepseekV2ForCausalLM"],
}
OSS = {
    "model_type": "gpt_oss",
    "architectures": ["GptOssForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 4,
}


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({**V3, "quantization_config": {"quant_method": "fp8"}}, "weights of this deepseek_v3 are quantized .*'fp8'"),
        ({**OSS, "quantization_config": {"quant_method": "mxfp4"}}, "weights of this gpt_oss are quantized .*'mxfp4'"),
        ({**V3, "attention_bias": True}, "`attention_bias` = True"),
        ({**V3, "num_key_value_heads": 1}, "`num_key_value_heads` = 1"),
        ({**V3, "topk_method": "greedy"}, "`topk_method` = 'greedy'"),
        ({**V3, "scoring_func": "softmax"}, "`scoring_func` = 'softmax'"),
        ({**V3, "moe_layer_freq": 2}, "`moe_layer_freq` = 2"),
        ({**V2, "topk_method": "group_limited_greedy", "n_group": 2}, "`topk_method` = 'group_limited_greedy'"),
        ({**V2, "norm_topk_prob": True}, "`norm_topk_prob` = True"),
        ({**OSS, "swiglu_alpha": 1.5}, "`swiglu_alpha` = 1.5"),
        ({**OSS, "hidden_act": "gelu"}, "`hidden_act` = 'gelu'"),
        ({**OSS, "mlp_bias": True}, "`mlp_bias` = True"),
    ],
)
def test_configurations_that_are_refused(entries: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        load_pretrained(write(tmp_path, entries, {"x": torch.zeros(1)}))


def test_quantized_tensors_under_a_plain_configuration(tmp_path: Path) -> None:
    with pytest.raises(StateDictError, match=r"files contain `.*gate_up_proj_blocks`"):
        load_pretrained(write(tmp_path, OSS, {"model.layers.0.mlp.experts.gate_up_proj_blocks": torch.zeros(1)}))


@torch.no_grad()
def test_further_blocks_and_half_precision(tmp_path: Path) -> None:
    """Blocks that predict later tokens are left out; the bias of the choice of experts stays in float32."""
    case, state = golden()
    further = {
        "model.layers.2.eh_proj.weight": torch.zeros(16, 32),
        "model.layers.2.embed_tokens.weight": torch.zeros(4),
    }
    folder = write(tmp_path, {**V3, "num_nextn_predict_layers": 1}, files_of(state) | further)
    agree(load_pretrained(folder)(case["input.ids"]), case["output.logits"])
    half = load_pretrained(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    bias = half.attn_layers.layers[3].feedforward.router.score_bias
    assert torch.equal(bias, state["model.layers.1.mlp.gate.e_score_correction_bias"])


def test_yarn_changes_the_factor_of_the_scores(tmp_path: Path) -> None:
    """`(0.1 m ln(factor) + 1) ** 2` with `m = mscale_all_dim`, and rotations have the quotient of two such factors."""
    yarn = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 0.5}
    model = load_pretrained(write(tmp_path, {**V3, "rope_scaling": yarn}, files_of(golden()[1])))
    stack, logarithm = model.attn_layers, torch.tensor(40.0).log().item()
    assert stack.attentions()[0].scale == pytest.approx(8**-0.5 * (0.05 * logarithm + 1) ** 2)
    assert stack.rotary_pos_emb.factor == pytest.approx((0.1 * logarithm + 1) / (0.05 * logarithm + 1))
