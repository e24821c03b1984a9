"""Token mixers in stacks: which layers they are, what is refused, promises of the contract, and how kernels run."""

from typing import Any

import pytest
import torch
from catalog import close, perturbed
from loguru import logger

from x_transformers import Decoder, Encoder, PrefixDecoder, TransformerWrapper
from x_transformers.errors import ConfigError, InputError, ShapeError
from x_transformers.mixers.base import Mixer
from x_transformers.mixers.catalog import MIXERS, class_of, keywords_of
from x_transformers.mixers.parts import MixerGain

SIZES: dict[str, dict[str, Any]] = {
    "mamba2": {"mixer_head": 8, "mixer_state": 4},
    "mamba": {"mixer_state": 4},
    "delta": {"mixer_chunk": 4},
    "gated_delta": {"mixer_chunk": 4},
    "rwkv7": {"mixer_head": 8, "mixer_rank": 3, "mixer_chunk": 4},
    "titans": {"mixer_chunk": 4},
    "sparse_state": {"mixer_rank": 3, "mixer_chunk": 4},
    "log_linear": {"mixer_head": 8, "mixer_state": 4, "mixer_len": 8, "mixer_chunk": 4},
    "atlas": {"mixer_chunk": 4, "mixer_omega_window": 6},
    "hyena": {"mixer_filter_len": 48, "mixer_filter_dim": 8, "mixer_filter_bands": 3},
    "h3": {"mixer_state": 4, "mixer_shift": 3},
    "mossformer": {"mixer_group": 3, "mixer_dim_key": 4, "mixer_conv": 3},
    "fsmn": {"mixer_taps": 3, "mixer_conv": 3},
    "shallow": {"mixer_len": 48, "mixer_hidden": 6},
    "random": {"mixer_len": 48},
    "lmu": {"mixer_state": 5, "mixer_window": 8, "mixer_channels": 2},
}
"""Keywords that tiny models need, and small chunks where a state goes through several."""

LONG: dict[str, dict[str, Any]] = {"hyena": {"mixer_filter_len": 4096}, "random": {"mixer_len": 4096}}
"""Keywords that long rows need."""

FORMS: dict[str, dict[str, Any]] = {
    "decays of features": {"mixer": "gated_delta", "mixer_vector_decay": True, "mixer_dim_key": 4, "mixer_rank": 3},
}
"""Forms of mixers that compute something else than their defaults."""

NEAR = ("identity", "activator", "pooling", "conv", "fsmn")
"""Mixers that read no other tokens than neighbors."""

CAUSAL = [name for name in MIXERS if class_of(name).has_causal_form]
EACH = pytest.mark.parametrize("name", [*CAUSAL, *FORMS])
LAYERNORM = {"mixer_norm": "layernorm"}
LIVE = torch.tensor([[1] * 12, [0, 0, 0] + [1] * 9, [1] * 7 + [0] * 5, [0, 1, 1, 0] * 3, [0] * 12], dtype=torch.bool)
"""All tokens, left padding, right padding, holes, and a row of which nothing is live."""


def built(name: str, **more: Any) -> Mixer:
    keywords = {"dim": 16, "depth": 1, "heads": 4, "only_attn": True, "mixer": name, **SIZES.get(name, {})}
    keywords |= {**FORMS.get(name, {}), **more}
    return perturbed(Decoder(**keywords).double()).layers[0].mixer


# the contract


@EACH
@torch.no_grad()
def test_rows_are_read_as_if_nothing_else_were_there(name: str) -> None:
    """Whole and in pieces of any length: outputs and states are those of the live tokens by themselves."""
    mixer, x = built(name), torch.randn(len(LIVE), 12, 16, dtype=torch.float64)
    alone = [mixer(x[row : row + 1, LIVE[row]]) for row in range(len(LIVE))]
    for cuts in ((12,), (1,) * 12, (5, 1, 6), (2, 7, 3)):
        state: Any = None
        parts = []
        for piece, live in zip(x.split(cuts, dim=1), LIVE.split(cuts, dim=1), strict=True):
            out, state = mixer(piece, live, state)
            assert out.isfinite().all()
            assert not out[~live].any()
            parts.append(out)
        whole = torch.cat(parts, dim=1)
        for row, (out, left) in enumerate(alone):
            torch.testing.assert_close(whole[row, LIVE[row]], out[0], rtol=1e-9, atol=1e-9)
            for key, value in left.items():
                torch.testing.assert_close(state[key][row], value[0], rtol=1e-9, atol=1e-9)


@EACH
@torch.no_grad()
def test_states_are_complete_from_the_first_token_on(name: str) -> None:
    """One shape and dtype after any pass, float32 also in half precision, and the length does not change it."""
    half = built(name).bfloat16()
    shapes = []
    for n in (1, 3, 40):
        _, state = half(torch.randn(2, n, 16, dtype=torch.bfloat16))
        shapes.append({key: (tuple(value.shape), value.dtype) for key, value in state.items()})
    assert shapes[0] == shapes[1] == shapes[2]
    assert shapes[0] == {key: ((2, *shape), torch.float32) for key, shape in half.state_shapes.items()}


@EACH
@torch.no_grad()
def test_large_inputs_of_long_rows_stay_finite(name: str) -> None:
    mixer = built(name, **LONG.get(name, {})).float()
    # each token of a causal `shallow` is a pass over the whole row
    x = 30 * torch.randn(1, 48 if name == "shallow" else 4096, 16).sign()
    out, state = mixer.bfloat16()(x.bfloat16())
    assert out.isfinite().all()
    assert all(value.isfinite().all() for value in state.values())
    mixer.float()
    with torch.autocast("cpu", torch.bfloat16):
        out, state = mixer(x)
    assert out.isfinite().all()
    assert all(value.isfinite().all() for value in state.values())


@pytest.mark.parametrize("name", [name for name in CAUSAL if built(name).state_shapes])
def test_states_of_another_shape_are_refused(name: str) -> None:
    mixer, x = built(name), torch.randn(2, 3, 16, dtype=torch.float64)
    _, state = mixer(x)
    for wrong in ({key: value[:1] for key, value in state.items()}, {}):
        with pytest.raises(ShapeError, match=rf"of `{name}` .*as an earlier pass of this model left it"):
            mixer(x, state=wrong)


@pytest.mark.parametrize("name", CAUSAL)
def test_states_have_names_of_their_own(name: str) -> None:
    """Within a sublayer those of its mixer, of the token shift, and of the residual connection differ."""
    common = {"dim": 16, "depth": 1, "heads": 4, "mixer": name, "shift_tokens": 1, **SIZES.get(name, {})}
    for residual in ({}, {"num_residual_streams": 2}, {"gate_residual": True}, {"resi_dual": True}):
        branch = Decoder(**common, **residual).layers[0]
        assert len(set(branch.running)) == len(branch.running)
    with torch.no_grad():
        model, x = perturbed(Decoder(**common)), torch.randn(2, 5, 16)
        whole, (_, record) = model(x), model(x[:, :3], return_hiddens=True)
        close(model(x[:, 3:], cache=record, input_not_include_cache=True), whole[:, 3:])


@pytest.mark.parametrize("name", [name for name in CAUSAL if not class_of(name).has_whole_form])
def test_the_other_direction(name: str) -> None:
    """A second mixer, of its own weights, reads each row from its last live token to the first."""
    common = {"dim": 16, "heads": 4, "only_attn": True, "mixer": name, "mixer_bidirectional": True, "verbose": False}
    encoder = perturbed(Encoder(depth=1, **common, **SIZES.get(name, {})).double())
    mixer = encoder.layers[0].mixer
    assert {key for key in mixer.state_dict() if key.startswith("backward.")} == {
        f"backward.{key}" for key in mixer.state_dict() if not key.startswith("backward.")
    }
    x = torch.randn(len(LIVE), 12, 16, dtype=torch.float64)
    both, _ = mixer(x, LIVE, causal=False)
    assert both.isfinite().all()
    for row, live in enumerate(LIVE):
        own = x[row : row + 1, live]
        forth, _ = mixer(own)
        back, _ = mixer.backward(own.flip(1))
        close(both[row, live], (forth + back.flip(1))[0])
    both.square().sum().backward()
    without = [key for key, p in mixer.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without


@pytest.mark.parametrize("name", [name for name in CAUSAL if class_of(name).has_whole_form])
@torch.no_grad()
def test_whole_rows(name: str) -> None:
    """In an Encoder rows with padding equal rows by themselves, and tokens read later ones."""
    model = perturbed(Encoder(dim=16, depth=2, heads=4, mixer=name, verbose=False, **SIZES.get(name, {})).double())
    x = torch.randn(len(LIVE), 12, 16, dtype=torch.float64)
    out = model(x, mask=LIVE)
    for row, live in enumerate(LIVE[:-1]):
        close(out[row, live], model(x[row : row + 1, live])[0])
    changed = x.clone()
    changed[:, -1] = torch.randn(16)
    assert (model(changed) - model(x))[:, 0].abs().max() > 1e-6 or name in NEAR


@pytest.mark.parametrize("name", [name for name in CAUSAL if class_of(name).has_gains])
@torch.no_grad()
def test_gains_are_stored_with_or_without_their_offset(name: str) -> None:
    more = {"mamba": {"mixer_inner_norm": True}, "linear": LAYERNORM, "transnormer": LAYERNORM}.get(name, {})
    plain, whole = built(name, **more), built(name, mixer_norm_unit_offset=False, **more)
    state, x = plain.state_dict(), torch.randn(2, 12, 16, dtype=torch.float64)
    gains = [key for key in state if key.endswith("gamma")]
    assert gains
    whole.load_state_dict(state | {key: state[key] + 1 for key in gains})
    close(whole(x)[0], plain(x)[0])
    again = Decoder(dim=16, depth=1, heads=4, mixer=name, mixer_norm_unit_offset=False, **SIZES.get(name, {}), **more)
    assert all((again.layers[0].mixer.state_dict()[key] == 1).all() for key in gains)


@pytest.mark.parametrize("name", CAUSAL)
def test_mixers_that_contain_gains_say_so(name: str) -> None:
    found = any(isinstance(module, MixerGain) for module in built(name).modules())
    assert class_of(name).has_gains or not found


def test_gains_of_norms_that_are_not_there() -> None:
    with pytest.raises(ConfigError, match="`mixer_norm_unit_offset` is of the gains of norms, of which this mamba"):
        built("mamba", mixer_norm_unit_offset=False)


# which layers


@pytest.mark.parametrize(
    ("options", "letters"),
    [
        ({"mixer": "linear", "depth": 2}, "mfmf"),
        ({"mixer": "linear", "depth": 2, "cross_attend": True}, "mcfmcf"),
        ({"mixer": "linear", "depth": 2, "only_attn": True}, "mm"),
        ({"mixer": "linear", "depth": 1, "macaron": True}, "fmf"),
        ({"mixer": "linear", "depth": 5, "layer_period": "mma"}, "mfmfafmfmf"),
        ({"mixer": "linear", "depth": 2, "layer_period": "ma", "cross_attend": True}, "mcfacf"),
        ({"mixer": "linear", "depth": 3, "layer_period": "mac", "cross_attend": True}, "mfafcf"),
        ({"mixer": ("linear", "conv"), "custom_layers": "mfamf"}, "mfamf"),
        ({"depth": 2, "layer_period": "a"}, "afaf"),
    ],
)
def test_lists_of_layers(options: dict[str, Any], letters: str) -> None:
    assert "".join(Decoder(dim=16, heads=2, **options).layer_types) == letters


def test_jamba_attends_in_the_middle_of_each_period() -> None:
    """With a period of 8 and an offset of 4, block `l` attends when `l mod 8 = 4`."""
    types = Decoder(dim=16, depth=16, heads=2, only_attn=True, mixer="conv", layer_period="mmmmammm").layer_types
    assert [number for number, letter in enumerate(types) if letter == "a"] == [4, 12]


def test_tuples_are_dealt_out() -> None:
    stack = Decoder(dim=16, depth=2, heads=4, mixer=("pooling", "conv"), mixer_window=(5, None), mixer_conv=(None, 3))
    pooling, convolution = (stack.layers[number].mixer for number in (0, 2))
    assert (pooling.window, convolution.conv.taps) == (5, 3)


def test_a_keyword_that_no_mixer_reads_has_no_effect() -> None:
    logged: list[str] = []
    sink = logger.add(logged.append, level="WARNING", format="{message}")
    Decoder(dim=16, depth=2, heads=4, mixer=("pooling", "conv"), mixer_window=4, mixer_conv=3, mixer_state=5)
    logger.remove(sink)
    assert [line.strip() for line in logged] == [
        "Decoder: `mixer_state` has no effect: no mixer of this stack reads it."
    ]


def test_keywords_are_arguments() -> None:
    """Every keyword is read by some mixer, and every argument of a mixer is a keyword."""
    owned = set(Decoder(dim=16, depth=1, heads=4, mixer="conv").layers[0].kind.schema.owner)
    assert set().union(*map(keywords_of, MIXERS)) == owned


def test_first_values_depend_on_the_layer() -> None:
    """Those of RWKV-4: with depth, decays differ more between channels, and shifts less between features."""
    stack = Decoder(dim=16, depth=3, heads=2, layer_period="mam", mixer="rwkv4", mixer_dim=24, only_attn=True)
    first, last = (stack.layers[number].mixer for number in (0, 2))
    feature, channel = torch.arange(16) / 16, torch.arange(24) / 23
    torch.testing.assert_close(first.mix_k.data, feature)
    torch.testing.assert_close(first.mix_r.data, feature**0.5)
    torch.testing.assert_close(first.decay_log.data, -5 + 8 * channel**0.7)
    torch.testing.assert_close(last.mix_k.data, feature**0.5)
    torch.testing.assert_close(last.mix_v.data, feature**0.5 + 0.3)
    torch.testing.assert_close(last.decay_log.data, -5 + 8 * channel**2)
    both = Encoder(dim=16, depth=2, mixer="rwkv4", mixer_bidirectional=True, only_attn=True).layers[1].mixer
    torch.testing.assert_close(both.backward.mix_v.data, both.mix_v.data)
    assert both.mix_v[0].item() == pytest.approx(0.3)


def test_decays_of_features() -> None:
    """Each key feature has its own step, and its head's rate."""
    mixer: Any = built("decays of features")
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    step = x @ mixer.to_decay[0].weight.mT @ mixer.to_decay[1].weight.mT + mixer.decay_bias
    for head in range(4):
        own = step[..., 4 * head : 4 * head + 4]
        close(mixer.log_decay(x)[:, head], -mixer.decay_log[head].exp() * torch.nn.functional.softplus(own))


# refusals


@pytest.mark.parametrize(
    ("stack", "options", "words"),
    [
        (
            Encoder,
            {"mixer": "delta"},
            "reads from left to right; set `mixer_bidirectional = True`, which adds a second",
        ),
        (Decoder, {"mixer": "delta", "mixer_bidirectional": True}, "`mixer_bidirectional` would let a token see the"),
        (Encoder, {"mixer": "linear", "mixer_bidirectional": True}, "looks both ways by itself; drop `mixer_bidirect"),
        (PrefixDecoder, {"mixer": "linear"}, "`m` layers see one way or both, and a PrefixDecoder needs both at once"),
        (
            Decoder,
            {"mixer": "linear", "layer_period": "a"},
            "`mixer` is for `m` layers and the list has none; add an m",
        ),
        (Decoder, {"layer_period": "am"}, "the list of layers holds m, but `mixer` does not say what it is."),
        (Decoder, {"mixer": ("linear",) * 3}, "`mixer` names 3 mixers, but there are 2 m layers."),
        (Decoder, {"mixer": "linear", "sandwich_coef": 1}, "`sandwich_coef` counts attentions; write the order as"),
        (Decoder, {"mixer": "linear", "par_ratio": 2}, "`par_ratio` counts attentions; write the order as"),
        (Decoder, {"mixer": "linear", "layer_period": "mx"}, "`layer_period` is 'mx'; it must hold the letters a, c"),
        (Decoder, {"mixer": "linear", "layer_period": "mc"}, "`layer_period` with a c needs `cross_attend = True`."),
        (Decoder, {"mixer": "rwkv99"}, "`mixer` is 'rwkv99'; it must be one of identity, pooling, "),
        (Decoder, {"mixer": "linear", "weight_tie_layers": True, "layer_period": "ma"}, "repeats one block, but"),
        (Decoder, {"mixer": "pooling", "mixer_grid": (2, 2)}, "`mixer_grid` is of images, whose tokens have no order"),
        (Decoder, {"mixer": "gated_delta", "mixer_rank": 3}, "set `mixer_vector_decay = True`, or drop it"),
        (Decoder, {"mixer": "mamba2", "mixer_head": 7}, "is 32, which 7 does not divide; choose a multiple."),
        (Decoder, {"mixer": "retention", "mixer_dim_key": 3}, "pairs of features rotate, so that it must be even"),
        (
            Decoder,
            {"mixer": "linear", "mixer_feature_map": "elu"},
            "may be negative, so that a sum of weights may be 0",
        ),
        (
            Decoder,
            {"mixer": "conv", "layer_period": "ma", "attn_flash_pack_seq": True, "rotary_pos_emb": True},
            "packed rows are not built for `m` layers yet; pass one document a row, with `mask`.",
        ),
    ],
)
def test_refusals(stack: type, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        stack(dim=16, depth=2, heads=4, **options)
    assert words in str(error.value)


@pytest.mark.parametrize("name", ["attn_mask", "attn_bias"])
def test_masks_of_pairs(name: str) -> None:
    given = {name: torch.ones(4, 4, dtype=torch.bool) if name == "attn_mask" else torch.zeros(4, 4)}
    hybrid = Decoder(dim=16, depth=2, heads=4, mixer="conv", layer_period="ma")
    with pytest.raises(InputError, match=rf"`{name}` hides single pairs of tokens, and `conv` layers have no pairs"):
        hybrid(torch.randn(2, 4, 16), **given)
    Decoder(dim=16, depth=2, heads=4, mixer="identity", layer_period="ma")(torch.randn(2, 4, 16), **given)


def test_grids() -> None:
    """A pass over a grid has its tokens, all of them."""
    encoder = Encoder(dim=16, depth=2, mixer=("pooling", "conv"), mixer_grid=(3, 4))
    encoder(torch.randn(2, 12, 16))
    with pytest.raises(InputError, match=r"was made for a grid of 3 x 4 = 12 tokens; this row has 11."):
        encoder(torch.randn(2, 11, 16))
    with pytest.raises(InputError, match="tokens of a grid cannot be left out; drop `mask`"):
        encoder(torch.randn(2, 12, 16), mask=LIVE[1:3])
    with pytest.raises(InputError, match="has a grid, which has no order"):
        encoder(torch.randn(2, 12, 16), causal=True)


def test_directions_of_a_pass() -> None:
    x = torch.randn(2, 5, 16)
    with pytest.raises(InputError, match=r"`delta` reads from left to right; drop `causal = False`."):
        Decoder(dim=16, depth=1, heads=4, mixer="delta")(x, causal=False)
    Decoder(dim=16, depth=1, heads=4, mixer="linear")(x, causal=False)


# kernels


def test_the_kernel_is_named() -> None:
    """With its floating-point operations, which are those of chunks; a step of one token is a loop of one step."""
    stack = Decoder(dim=64, depth=2, heads=4, mixer=("gated_delta", "conv"))
    rows = stack.explain(seq_len=512).rows
    assert [row.backend for row in rows] == ["chunked", "", "", ""]
    assert rows[0].flops > 2 * sum(p.numel() for p in stack.layers[0].mixer.parameters() if p.ndim == 2)
    assert "chunked (the fastest that can run)" in str(stack.explain(seq_len=512))
    assert "naive (one token is one step)" in str(stack.explain(seq_len=1))


def test_a_hybrid_learns_and_generates() -> None:
    """The steps of a static cache equal a pass, with prompts of different lengths."""
    model = TransformerWrapper(
        num_tokens=16,
        max_seq_len=32,
        attn_layers=Decoder(dim=16, depth=2, heads=2, attn_dim_head=8, mixer="gated_delta", layer_period="ma"),
    )
    ids = torch.randint(0, 16, (2, 12))
    start = torch.tensor([0, 4])
    loss = model(ids, seq_start_pos=start).logsumexp(-1).mean()
    loss.backward()
    assert all(p.grad is not None for p in model.attn_layers.parameters())
    with torch.no_grad():
        whole = model(ids, seq_start_pos=start)
        cache = model.static_cache(2, 16)
        parts = []
        for piece in ids.split((5, 1, 1, 5), dim=1):
            out, record = model(
                piece, seq_start_pos=start, cache=cache, input_not_include_cache=True, return_intermediates=True
            )
            cache = record.cache
            parts.append(out)
    steps = torch.cat(parts, dim=1)
    close(steps[0], whole[0])
    close(steps[1, 4:], whole[1, 4:])


@pytest.mark.parametrize("name", ["shallow", "random"])
@torch.no_grad()
def test_a_table_of_tokens_ends(name: str) -> None:
    """Passes that go beyond it are refused; a single step, which nobody looks at, is not a number."""
    mixer, x = built(name, mixer_len=8), torch.randn(2, 9, 16, dtype=torch.float64)
    words = rf'`mixer = "{name}"` was made for 8 tokens \(`mixer_len`\); this row has 9\.'
    with pytest.raises(InputError, match=words):
        mixer(x)
    _, state = mixer(x[:, :6])
    with pytest.raises(InputError, match=words):
        mixer(x[:, 6:], state=state)
    _, state = mixer(x[:, 6:8], state=state)
    assert mixer(x[:, 8:], state=state)[0].isnan().all()
    with pytest.raises(ConfigError, match=f'`mixer = "{name}"` needs `mixer_len`, the most tokens of a row'):
        Decoder(dim=16, depth=1, mixer=name)


def test_random_weights() -> None:
    """A softmax over the tokens so far, or over all, of logits that are saved and stay in float32."""
    mixer: Any = built("random", mixer_len=8)
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    logits = mixer.state_dict()["logits"]
    assert mixer.bfloat16().logits.dtype is torch.float32
    for t in range(6):
        close(mixer(x)[0][:, t], torch.einsum("j,bjd->bd", logits[t, : t + 1].double().softmax(dim=-1), x[:, : t + 1]))
    close(mixer(x, causal=False)[0], logits[:6, :6].double().softmax(dim=-1) @ x)
    assert not torch.equal(built("random", mixer_len=8).state_dict()["logits"], logits)


def test_the_maps_of_shallow_have_one_direction() -> None:
    mixer, x = built("shallow", mixer_len=8), torch.randn(2, 9, 16, dtype=torch.float64)
    with pytest.raises(InputError, match=r"`shallow` reads from left to right; drop `causal = False`."):
        mixer(x[:, :8], causal=False)
    whole = Encoder(dim=16, depth=1, mixer="shallow", mixer_len=8)
    with pytest.raises(InputError, match="`shallow` reads the whole row at once, so that a token would see the future"):
        whole(torch.randn(2, 8, 16), causal=True)
