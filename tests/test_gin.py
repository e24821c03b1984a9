"""Graph-aware attention: numbers of the public implementation, hidden keys, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from catalog import perturbed
from safetensors import safe_open
from torch import Tensor

from x_transformers import Attention, Encoder
from x_transformers.attention.qk.rotary import RotaryEmbedding
from x_transformers.errors import ConfigError

FOLDER = Path(__file__).with_name("golden") / "experts"
SMALL = {"dim": 16, "dim_head": 4, "heads": 4, "gin": True}
THRESHOLDS = ("silu", "relu", "sharp_softplus", "sigmoid_elementwise")
NAMES = {
    "projections.q.weight": "q_proj.weight",
    "projections.k.weight": "k_proj.weight",
    "out.weight": "o_proj.weight",
    "qk_norms.gin.alpha": "sharpening_parameters.0",
    "rows.gin.theta": "threshold.0",
}


def read(name: str) -> dict[str, Tensor]:
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        keys = file.keys()
        return {key: file.get_tensor(key) for key in keys}


def ours(golden: dict[str, Tensor], kind: str, threshold: str | None) -> dict[str, Tensor]:
    """Return weights or their gradients under our names, those of both heads as one."""
    state = {own: golden[f"{kind}.{name}"] for own, name in NAMES.items() if f"{kind}.{name}" in golden}
    if threshold is None:
        state.pop("rows.gin.theta", None)
    for name in ("projections.q.weight", "projections.k.weight"):
        state[name] = adjacent(state[name])

    def of_heads(name: str) -> list[Tensor]:
        return [golden[f"{kind}.gin_layers.{head}.{name}"] for head in range(2)]

    return state | {
        "values.gin.epsilon": torch.stack(of_heads("epsilon")),
        "values.gin.up": torch.cat([weight.T for weight in of_heads("mlp.0.weight")]),
        "values.gin.up_bias": torch.stack(of_heads("mlp.0.bias")),
        "values.gin.gain": torch.stack(of_heads("normlayer.weight")),
        "values.gin.down": torch.cat([weight.T for weight in of_heads("mlp.4.weight")]),
        "values.gin.down_bias": torch.stack(of_heads("mlp.4.bias")),
    }


def adjacent(rows: Tensor) -> Tensor:
    """Reorder the rows of two heads: the features k and k + 4 of a head, which rotate together, become neighbors."""
    return rows.unflatten(0, (2, 2, 4)).transpose(1, 2).flatten(0, 2)


@pytest.mark.parametrize("threshold", [None, *THRESHOLDS])
def test_numbers_of_the_public_implementation(threshold: str | None) -> None:
    golden = read(f"gin-attention-{(threshold or 'none').replace('_', '-')}")
    module = Attention(16, dim_head=8, heads=2, causal=True, gin=True, gin_threshold=threshold)
    module.load_state_dict(ours(golden, "state", threshold))
    x = golden["input.x"].clone().requires_grad_()
    out = module(x, rotary_pos_emb=RotaryEmbedding(8)(torch.arange(7)))
    agree(out, golden["output.y"])
    (out * golden["probe"]).sum().backward()
    agree(x.grad, golden["grad.input.x"])
    gradients = ours(golden, "grad", threshold)
    assert set(gradients) == {name for name, _ in module.named_parameters()}
    for name, gradient in gradients.items():
        agree(module.get_parameter(name).grad, gradient)


def agree(mine: Tensor | None, theirs: Tensor) -> None:
    assert mine is not None
    assert mine.shape == theirs.shape
    assert (mine - theirs).abs().max() <= 2e-5 * (1 + theirs.abs().max())


# hidden keys


def scores(module: Attention, x: Tensor, **given: Any) -> Tensor:
    _, record = module(x, return_intermediates=True, **given)
    return record.post_softmax_attn


@pytest.mark.parametrize("threshold", THRESHOLDS)
@torch.no_grad()
def test_hidden_keys_have_no_weight(threshold: str) -> None:
    """Those of the future, of padding, outside of a window, and of a caller's mask; a threshold of 0 is none."""
    x, mask, pairs = torch.randn(2, 6, 16), torch.ones(2, 6, dtype=torch.bool), torch.rand(6, 6) < 0.7
    mask[1, 4:] = False
    module = perturbed(Attention(**SMALL, causal=True, gin_threshold=threshold, max_attend_past=2))
    weights = scores(module, x, mask=mask, attn_mask=pairs)
    i, j = torch.arange(6)[:, None], torch.arange(6)
    visible = (j <= i) & (i - j <= 2) & pairs & mask[:, None, None]
    assert (weights.masked_select(~visible.expand_as(weights)) == 0).all()
    if threshold != "relu":
        assert (weights.masked_select((visible & mask[:, None, :, None]).expand_as(weights)) != 0).all()


@torch.no_grad()
def test_values_and_cached_values_are_slices_of_the_input() -> None:
    module, x = perturbed(Attention(**SMALL, causal=True)), torch.randn(2, 6, 16)
    _, record = module(x, return_intermediates=True)
    assert torch.equal(record.cached_kv[1], x.unflatten(-1, (4, 4)).transpose(1, 2))
    assert not any("projections.v" in name for name in module.state_dict())


@torch.no_grad()
def test_a_query_without_keys_has_no_output() -> None:
    module, x = perturbed(Attention(**SMALL)), torch.randn(2, 6, 16)
    context, mask = torch.randn(2, 3, 16), torch.tensor([[True] * 3, [False] * 3])
    out = module(x, context=context, context_mask=mask)
    assert (out[1] == 0).all()
    assert (out[0] != 0).any()


# refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_heads": 2}, "`gin` has a slice of the input for each of the 4 heads, and `kv_heads` is 2; drop"),
        ({"one_kv_head": True}, "drop `kv_heads` and `one_kv_head`"),
        ({"dim_head": 8}, "4 \\* 8 is 32, and `dim` is 16: set `dim_head` or `value_dim_head` to 4"),
        ({"heads": 3}, "3 \\* 4 is 12, and `dim` is 16: choose other `heads`"),
        ({"dim_context": 12}, "`dim_context` must be `dim`; they are 12 and 16"),
        ({"gin_mult": 0}, "`gin_mult` is 0.0; it must be positive"),
        ({"gin_mult": 0.1}, "the inner width is 0"),
        ({"gin_threshold": "none"}, "`gin_threshold` is 'none'"),
        ({"use_latent_kv": True, "dim_latent_kv": 6}, "`use_latent_kv` caches a latent"),
        ({"laser": True, "gin_threshold": "silu"}, '`gin_threshold = "silu"` makes weights negative'),
        ({"laser": True, "gin_threshold": "relu"}, "makes weights negative, or all of them 0"),
        ({"flash": True, "gin_threshold": "relu"}, "`flash = True` demands a fused kernel"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refusals(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Attention(**{**SMALL, **options})


def test_refusals_of_a_stack_name_its_keywords() -> None:
    with pytest.raises(ConfigError, match=r"`attn_gin` cuts the input .* set `attn_dim_head` or `attn_value_dim_head`"):
        Encoder(dim=16, depth=1, heads=4, attn_gin=True)


def test_without_a_threshold_fused_kernels_run() -> None:
    x = torch.randn(2, 6, 16)
    plain = perturbed(Attention(**SMALL, causal=True, flash=False))
    fused = Attention(**SMALL, causal=True, flash=True).eval()
    fused.load_state_dict(plain.state_dict())
    torch.testing.assert_close(fused(x), plain(x))
