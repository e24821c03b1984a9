"""Options: every fault of a call in words, in one error; keywords that show, travel, and come back as data."""

import inspect
import json
import pydoc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from loguru import logger
from torch import nn

from x_transformers import (
    Attention,
    AttentionLayers,
    CrossAttender,
    Decoder,
    Encoder,
    FeedForward,
    TransformerWrapper,
    layer_schedule,
)
from x_transformers.cache import KVCache
from x_transformers.errors import ConfigError, InputError, ShapeError, TokenRangeError
from x_transformers.layers.catalog import ATTENTION, FEATURES, FEEDFORWARD, STACK
from x_transformers.options.schema import Feature, Schema, accepts, opt

SMALL = {"dim": 16, "depth": 2, "heads": 4, "attn_dim_head": 8}


def decoder(**more: Any) -> Decoder:
    return Decoder(**{**SMALL, **more})


def wrapper(layers: AttentionLayers | None = None, **more: Any) -> TransformerWrapper:
    return TransformerWrapper(num_tokens=24, max_seq_len=32, attn_layers=layers or decoder(), **more)


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """What the library warns about, in order."""
    heard: list[str] = []
    handler = logger.add(lambda message: heard.append(message.record["message"]), level="WARNING")
    yield heard
    logger.remove(handler)


# unknown, wrong, contradictory

UNKNOWN = {
    "attn_qk_nrom": "attn_qk_norm",
    "rotary_pos_embed": "rotary_pos_emb",
    "ff_gul": "ff_glu",
    "cross_attn_kv_head": "cross_attn_kv_heads",
    "use_rms_norm": "use_rmsnorm",
}


@pytest.mark.parametrize("given", UNKNOWN)
def test_an_unknown_keyword_names_the_nearest(given: str) -> None:
    with pytest.raises(ConfigError, match=rf"Decoder: unknown keyword `{given}`. Did you mean `{UNKNOWN[given]}`\?"):
        decoder(**{given: True})


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: wrapper(tie_embeding=True), "unknown keyword `tie_embeding`. Did you mean `tie_embedding`"),
        (lambda: Attention(16, dim_haed=8), "unknown keyword `dim_haed`. Did you mean `dim_head`"),
        (lambda: FeedForward(16, multi=8), "unknown keyword `multi`. Did you mean `mult`"),
        (lambda: decoder(zzz=1), "unknown keyword `zzz`.$"),
    ],
    ids=["wrapper", "attention", "feedforward", "nothing near"],
)
def test_every_class_refuses_unknown_keywords(build: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build()


def test_all_faults_in_one_error() -> None:
    with pytest.raises(ConfigError, match="Decoder: 6 faults") as error:
        decoder(
            rotary_pos_embed=True,
            use_rmsnorm=1,
            ff_mult=-1,
            alibi_pos_bias=True,
            rel_pos_bias=True,
            layer_dropout=(0.1, 0.2),
            attn_heads=3,
        )
    faults = str(error.value).split("\n  - ")[1:]
    for words in (
        "`rotary_pos_emb`",
        "`use_rmsnorm` is 1; it must be of type bool",
        "`ff_mult` is -1",
        "alternatives of one choice",
        "`layer_dropout` holds 2 values, but there are 4",
        "`attn_heads` is set by the stack; use `heads`",
    ):
        assert sum(words in fault for fault in faults) == 1, words
    assert isinstance(error.value, ValueError)
    assert isinstance(error.value, AssertionError)


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"dim": 0}, "`dim` is 0; it must be a positive whole number"),
        ({"depth": None}, "`depth` is missing"),
        ({"heads": 0}, "`heads` is 0; it must be at least 1"),
        ({"attn_kv_heads": 3}, "kv_heads` is 3; it must divide the 4 heads"),
        ({"attn_max_attend_past": -1}, "max_attend_past` is -1; it must be at least 0"),
        ({"attn_dropout": 1.0}, r"dropout` is 1.0; it must lie in \[0, 1\)"),
        ({"attn_flash": "yes"}, "`attn_flash` is 'yes'; it must be of type bool"),
        ({"attn_qk_norm": True, "attn_qk_norm_groups": 3}, "qk_norm_groups` is 3; it must divide"),
        ({"attn_logit_softclamp_value": 0.0, "attn_softclamp_logits": True}, "it must be positive"),
        ({"attn_dim_head": (8, 4)}, "positions are shared"),
        ({"attn_dim_context": 8}, "write `cross_attn_dim_context`"),
        ({"only_cross": True}, "it needs `cross_attend = True`"),
        ({"use_rmsnorm": True, "use_scalenorm": True}, "`use_rmsnorm` and `use_scalenorm` are alternatives"),
        ({"sandwich_norm": True, "pre_norm": False}, "it needs `pre_norm = True`"),
        ({"gate_residual": True, "scale_residual_constant": 0.5}, "belongs to the plain residual"),
        ({"rotary_pos_emb": True, "rotary_emb_dim": 7}, "`rotary_emb_dim` is 7"),
        ({"rotary_pos_emb": True, "rotary_emb_dim": 16}, "heads have `attn_dim_head` = 8"),
        ({"rotary_pos_emb": True, "rotary_interpolation_factor": 0.5}, "must be at least 1"),
        ({"rotary_pos_emb": True, "rotate_num_heads": 5}, "between 1 and the 4 heads"),
        ({"rotary_xpos": True, "attn_num_mem_kv": 2}, "have no position"),
        ({"alibi_pos_bias": True, "alibi_num_heads": 5}, "between 1 and the 4 heads"),
        ({"alibi_pos_bias": True, "rel_pos_kwargs": {"slopes": [1.0]}}, "`slopes` contains 1 numbers"),
        ({"alibi_pos_bias": True, "rel_pos_kwargs": {"slopez": [1.0]}}, "Did you mean `slopes`"),
        ({"rel_pos_bias": True, "rel_pos_kwargs": {"slopes": [1.0]}}, "RelativePositionBias takes nothing there"),
        ({"rel_pos_kwargs": {"slopes": [1.0]}}, "add one, or drop them"),
        ({"rel_pos_bias": True, "rel_pos_num_buckets": 200}, "`rel_pos_num_buckets` is 200"),
        ({"dynamic_pos_bias": True, "dynamic_pos_bias_mlp_depth": 0}, "at least 1 hidden layer"),
        ({"attn_attend_sdp_kwargs": {"enable_flush": True}}, "enable_flush"),
        ({"layer_dropout": 1.5}, r"it must lie in \[0, 1\)"),
    ],
    ids=str,
)
def test_values_are_refused_with_the_bound(keywords: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        decoder(**keywords)


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"num_tokens": 0}, "`num_tokens` is 0; it must be a whole number, at least 1"),
        ({"max_seq_len": -1}, "`max_seq_len` is -1"),
        ({"attn_layers": 3}, "`attn_layers` is a int"),
        ({"emb_dropout": 1.0}, r"it must lie in \[0, 1\)"),
        ({"emb_frac_gradient": 0.0}, r"it must lie in \(0, 1\]"),
        ({"memory_tokens_interspersed_every": 2}, "needs `num_memory_tokens`"),
        ({"tie_embedding": True, "emb_dim": 8}, "`tie_embedding` needs embeddings of the stack's width 16"),
        ({"tie_embedding": True, "logits_dim": 8}, "drop `logits_dim`, or untie"),
        ({"scaled_sinu_pos_emb": True, "emb_dim": 9}, "even width"),
    ],
    ids=str,
)
def test_the_wrapper_refuses_in_words(keywords: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TransformerWrapper(**{"num_tokens": 24, "max_seq_len": 32, "attn_layers": decoder(), **keywords})


@pytest.mark.parametrize("stack", [Encoder, Decoder])
def test_direction_is_the_class(stack: type[AttentionLayers]) -> None:
    with pytest.raises(ConfigError, match="drop `causal`"):
        stack(**SMALL, causal=True)
    with pytest.raises(ConfigError, match="`dim` is missing"):
        stack(depth=2)
    with pytest.raises(ConfigError, match="`depth` is missing"):
        stack(dim=16)
    with pytest.raises(ConfigError, match="`cross_attend` is always True"):
        CrossAttender(**SMALL, cross_attend=False)


# values for each layer, and for cross-attention


def test_a_tuple_gives_each_layer_its_own() -> None:
    layers = decoder(
        attn_kv_heads=(1, 2), ff_mult=[2, 4], attn_max_attend_past=(3, None), layer_dropout=(0, 0.1, 0.2, 0.3)
    )
    one, two = layers.branches("a")
    assert (one.attention.kv_heads, two.attention.kv_heads) == (1, 2)
    assert (one.attention.max_attend_past, two.attention.max_attend_past) == (3, None)
    assert [branch.feedforward.up.out_features for branch in layers.branches("f")] == [32, 64]
    assert [branch.dropout for branch in layers.layers] == [0, 0.1, 0.2, 0.3]


def test_a_schedule_is_a_tuple() -> None:
    assert layer_schedule(0.0, 1.0, 3, "linear") == (0.0, 0.5, 1.0)
    assert layer_schedule(0.0, 1.0, 3) == pytest.approx((0.0, 0.5, 1.0))
    assert layer_schedule(0.0, 1.0, 5)[1] == pytest.approx(0.146447, abs=1e-6)
    assert layer_schedule(2.0, 4.0, 2, lambda start, end, t: start + (end - start) * t**2) == (2.0, 4.0)
    layers = decoder(attn_dropout=layer_schedule(0.0, 0.5, 2))
    assert [branch.attention.dropout for branch in layers.branches("a")] == [0.0, 0.5]
    with pytest.raises(ConfigError, match="at least 2"):
        layer_schedule(0.0, 1.0, 1)
    with pytest.raises(ConfigError, match="'cosine', 'exp2', 'linear'"):
        layer_schedule(0.0, 1.0, 3, "wave")


@pytest.mark.parametrize("more", [{}, {"cross_attend": True}], ids=["alone", "with cross-attention"])
def test_a_tuple_of_another_length_is_one_fault(more: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        decoder(attn_kv_heads=(1, 2, 4), **more)
    assert str(error.value) == (
        "Decoder: `attn_kv_heads` is a tuple of 3 values, but there are 2 self-attention layers; "
        "pass one value, or 2 values."
    )
    with pytest.raises(ConfigError, match=r"`ff_glu` is a tuple of 1 values, but there are 2 feedforward layers"):
        decoder(ff_glu=(True,))


def test_cross_attention_inherits_and_overrides() -> None:
    layers = decoder(
        cross_attend=True,
        attn_kv_heads=2,
        attn_qk_norm=True,
        attn_max_attend_past=3,
        cross_attn_qk_norm=False,
        cross_attn_dim_context=10,
    )
    for branch in layers.branches("c"):
        assert branch.attention.kv_heads == 2
        assert branch.attention.max_attend_past is None
        assert len(branch.attention.qk_norms) == 0
        assert branch.attention.to_k.in_features == 10
    assert all(len(branch.attention.qk_norms) == 1 for branch in layers.branches("a"))
    layers = decoder(cross_attend=True, attn_kv_heads=(1, 2), cross_attn_kv_heads=(2, 4))
    assert [branch.attention.kv_heads for branch in layers.branches("a")] == [1, 2]
    assert [branch.attention.kv_heads for branch in layers.branches("c")] == [2, 4]


def test_values_for_each_self_attention_are_theirs_alone() -> None:
    layers = decoder(cross_attend=True, attn_kv_heads=(1, 2))
    assert [branch.attention.kv_heads for branch in layers.branches("c")] == [4, 4]
    layers = CrossAttender(**SMALL, attn_kv_heads=(1, 2))
    assert [branch.attention.kv_heads for branch in layers.branches("c")] == [1, 2]


# warnings


def test_keywords_without_effect_are_named(warnings: list[str]) -> None:
    keywords = {"alibi_num_heads": 2, "attn_qk_norm_scale": 3.0, "ff_glu_mult_bias": True, "rotary_xpos_scale_base": 8}
    decoder(**keywords)
    assert len(warnings) == len(keywords)
    for name in keywords:
        assert sum(f"`{name}` has no effect" in sentence for sentence in warnings) == 1
    warnings.clear()
    decoder(**keywords, verbose=False)
    decoder(alibi_num_heads=None, attn_qk_norm_scale=10, ff_glu=True, ff_glu_mult_bias=True)
    assert warnings == []


def test_keywords_that_others_silence_are_named(warnings: list[str]) -> None:
    decoder(attn_qk_norm=True, attn_qk_norm_dim_scale=True, attn_qk_norm_scale=3.0)
    decoder(ff_relu_squared=True, ff_swish=True)
    assert len(warnings) == 2
    assert all("has no effect with the other options" in sentence for sentence in warnings)


def test_unwise_values_are_named(warnings: list[str]) -> None:
    decoder(rotary_pos_emb=True)
    assert len(warnings) == 1
    assert "below 32, distant positions are hard to tell apart" in warnings[0]


def test_nothing_is_said_about_the_defaults(warnings: list[str]) -> None:
    for stack in (Encoder, Decoder, CrossAttender):
        stack(**SMALL)
    assert warnings == []


# what users see


@pytest.mark.parametrize("stack", [AttentionLayers, Encoder, Decoder, CrossAttender])
def test_help_lists_every_keyword(stack: type[AttentionLayers]) -> None:
    names = set(inspect.signature(stack).parameters)
    text, described = pydoc.render_doc(stack), stack.describe()
    every = [(STACK, ""), (ATTENTION, "attn_"), (ATTENTION, "cross_attn_"), (FEEDFORWARD, "ff_")]
    for schema, prefix in every:
        for keyword in schema.owner:
            assert prefix + keyword in names
            assert f" {prefix}{keyword} = " in described
            assert prefix.removeprefix("cross_") + keyword in text
    assert "with `cross_attn_` instead of `attn_`: the same" in text
    assert {"dim", "depth", "heads"} <= names


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
def test_every_keyword_says_what_it_does(feature: Feature) -> None:
    assert feature.summary
    for keyword, entry in feature.options.__dataclass_fields__.items():
        assert entry.metadata.get("doc"), keyword


def test_a_keyword_has_one_owner() -> None:
    one = next(feature for feature in FEATURES if feature.name == "alibi")
    with pytest.raises(TypeError, match="belongs to alibi and to twin"):
        Schema([one, Feature(name="twin", group="stack", slot="score", options=one.options, summary="the same")])
    with pytest.raises(TypeError, match="frozen dataclass"):
        Schema(
            [
                Feature(
                    name="loose", group="stack", slot="score", options=type("Loose", (), {"x": opt(1, "")}), summary=""
                )
            ]
        )


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (bool, (True, False), (1, None, "yes")),
        (int, (1, -3), (True, 1.5, None)),
        (float, (1, 1.5), (True, "1", None)),
        (int | None, (1, None), (1.5, False)),
        (bool | float, (True, 1, 0.5), ("a", None)),
        (float | tuple[float, ...], (1, (1, 2.5)), ((1, "a"), "a")),
        (dict, ({},), ([], None)),
    ],
    ids=str,
)
def test_types(hint: Any, good: tuple[Any, ...], bad: tuple[Any, ...]) -> None:
    assert all(accepts(hint, value) for value in good)
    assert not any(accepts(hint, value) for value in bad)


# options as data


def test_a_config_is_plain_data() -> None:
    model = wrapper(decoder(ff_mult=(2, 4), attn_kv_heads=2, layer_dropout=[0, 0.1, 0.2, 0.3]), num_memory_tokens=2)
    config = model.config
    assert json.loads(json.dumps(config)) == config
    assert config["class"] == "TransformerWrapper"
    assert config["options"]["attn_layers"]["class"] == "Decoder"
    assert config["options"]["attn_layers"]["options"]["ff_mult"] == [2, 4]
    config["options"]["num_tokens"] = 5
    assert model.config["options"]["num_tokens"] == 24, "a config is a copy"
    again = TransformerWrapper.from_config(json.loads(json.dumps(model.config)))
    assert again.config == model.config
    assert [tuple(p.shape) for p in again.parameters()] == [tuple(p.shape) for p in model.parameters()]


def test_objects_are_asked_for_by_name() -> None:
    embedding, head = nn.Embedding(24, 16), nn.Linear(16, 5)
    model = wrapper(token_emb=embedding, to_logits=head)
    config = json.loads(json.dumps(model.config))
    assert config["options"]["token_emb"] == {"$object": "token_emb"}
    with pytest.raises(ConfigError, match="pass to_logits, token_emb by"):
        TransformerWrapper.from_config(config)
    again = TransformerWrapper.from_config(config, token_emb=embedding, to_logits=head)
    assert again.token_emb is embedding
    assert again.to_logits is head
    assert again.config == model.config


def test_every_class_has_a_config() -> None:
    for one in (
        Attention(16, heads=2, dim_head=8, qk_norm=True),
        FeedForward(16, glu=True),
        decoder(),
        Encoder(**SMALL),
    ):
        again = type(one).from_config(json.loads(json.dumps(one.config)))
        assert [tuple(p.shape) for p in again.parameters()] == [tuple(p.shape) for p in one.parameters()]
    assert isinstance(AttentionLayers.from_config(decoder().config), Decoder)
    with pytest.raises(ConfigError, match="describes a Decoder, not a Encoder"):
        Encoder.from_config(decoder().config)


def test_a_model_explains_itself() -> None:
    model = wrapper(decoder(alibi_pos_bias=True, attn_qk_norm=True, ff_glu=True))
    text = str(model.explain())
    for word in ("alibi", "qk_norm", "glu", "sdpa", "parameters"):
        assert word in text, word
    assert f"{sum(p.numel() for p in model.parameters()):,}" in text


def test_slow_widths_are_explained() -> None:
    """On a GPU, in half precision; a Llama's 8/3 is the usual case."""
    odd = decoder(dim=128, ff_glu=True, ff_mult=8 / 3)
    (note,) = odd.explain("cuda", torch.bfloat16).notes
    assert note.startswith("feedforward: matrices are 341 and 682 wide, no multiple of 8")
    assert "ff_mult" in note
    assert str(odd.explain("cuda", torch.bfloat16)).endswith(note)
    assert note.split(" (")[0] in odd.explain("cuda", torch.bfloat16)._repr_html_()
    assert not odd.explain("cuda", torch.float32).notes
    assert not odd.explain().notes
    assert not decoder(dim=128).explain("cuda", torch.bfloat16).notes


# calls


IDS = torch.zeros(2, 6, dtype=torch.long)
MASK = torch.ones(2, 6, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"x": IDS + 24}, TokenRangeError, "token ids run from 24 to 24; this embedding holds 24, 0 to 23"),
        ({"x": IDS - 1}, TokenRangeError, "token ids run from -1 to -1"),
        ({"x": IDS + 0.5}, InputError, "token ids have dtype torch.float32"),
        ({"x": IDS.bool()}, InputError, "token ids have dtype torch.bool"),
        ({"x": IDS[0]}, ShapeError, r"token ids have shape \(6,\)"),
        ({"x": IDS.new_zeros(1, 33)}, ShapeError, "33 tokens were given, but .* `max_seq_len` = 32"),
        ({"x": IDS, "mask": MASK[:, 1:]}, ShapeError, r"`mask` has shape \(2, 5\); it must be \(2, 6\)"),
        ({"x": IDS, "mask": MASK.repeat(2, 1)}, ShapeError, r"`mask` has shape \(4, 6\)"),
        ({"x": IDS, "mask": MASK[0]}, ShapeError, r"`mask` has shape \(6,\)"),
        ({"x": IDS, "self_attn_kv_mask": MASK[:, 1:]}, ShapeError, "`self_attn_kv_mask` has shape"),
        ({"x": IDS, "attn_mask": MASK[:, :5]}, ShapeError, "`attn_mask` has shape"),
        ({"x": IDS, "attn_bias": torch.zeros(5, 6)}, ShapeError, "`attn_bias` has shape"),
        ({"x": IDS, "attn_bias": torch.zeros(6, 5)}, ShapeError, r"`attn_bias` has shape \(6, 5\)"),
        ({"x": IDS, "attn_bias": torch.zeros(3, 6, 6)}, ShapeError, r"`attn_bias` has shape \(3, 6, 6\)"),
        ({"x": IDS, "attn_bias": torch.zeros(3, 1, 6, 6)}, ShapeError, r"`attn_bias` has shape \(3, 1, 6, 6\)"),
        ({"x": IDS, "attn_mask": MASK[:, None, None].expand(-1, 3, 6, -1)}, ShapeError, "`attn_mask` has shape"),
        ({"x": IDS, "seq_start_pos": torch.zeros(3).long()}, ShapeError, r"`seq_start_pos` has shape \(3,\)"),
        ({"x": IDS, "pos": torch.arange(5)}, ShapeError, "5 tokens was given for 6"),
        ({"x": IDS, "pos": torch.arange(6) + 30}, ShapeError, "position 35 was requested"),
        ({"x": IDS, "context": torch.zeros(2, 3, 16)}, InputError, "does not cross-attend"),
        ({"x": IDS, "embed_ids": {"part": IDS}}, InputError, r"`embed_ids` names \['part'\]; this model embeds \[\]"),
        ({"x": IDS, "mems": [torch.zeros(2, 3, 8)]}, ShapeError, r"a memory has shape \(2, 3, 8\)"),
        ({"x": None}, InputError, "there is nothing to run"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_calls_are_named(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        wrapper()(**arguments)
    assert issubclass(error, ValueError)


@pytest.mark.parametrize(
    ("stack", "arguments", "words"),
    [
        (Encoder(**SMALL), {"cache": KVCache()}, "only a causal stack can use a cache"),
        (Decoder(**SMALL, cross_attend=True), {}, "this stack cross-attends; pass `context`"),
        (Decoder(**SMALL, cross_attend=True), {"context": torch.zeros(3, 16)}, "`context` has shape"),
        (Decoder(**SMALL, rel_pos_bias=True), {"causal": False}, "T5 bias was built for one direction"),
        (Decoder(**SMALL), {"x": torch.zeros(2, 6, 8)}, r"the input has shape \(2, 6, 8\)"),
        (Decoder(**SMALL), {"x": torch.zeros(2, 16)}, r"the input has shape \(2, 16\)"),
        (Decoder(**SMALL), {"x": torch.zeros(2, 6, 16).long()}, "Embed tokens first"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_calls_of_a_stack_are_named(stack: AttentionLayers, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        stack(**{"x": torch.zeros(2, 6, 16), **arguments})


def test_a_model_without_a_head_has_no_logits() -> None:
    model = wrapper(return_only_embed=True)
    assert model(IDS).shape == (2, 6, 16)
    for name in ("return_logits_and_embeddings", "return_logit_entropies"):
        with pytest.raises(InputError, match="no head"):
            model(IDS, **{name: True})


def test_further_embeddings_are_named() -> None:
    model = wrapper(embed_num_tokens={"part": 3})
    assert model(IDS, embed_ids={"part": IDS}).shape == (2, 6, 24)
    for given in (None, {"other": IDS}):
        with pytest.raises(InputError, match=r"this model embeds \['part'\]"):
            model(IDS, embed_ids=given)


def test_scores_are_not_kept_by_fused_kernels() -> None:
    with pytest.raises(InputError, match="`attn_flash = True` keeps none"):
        wrapper(decoder(attn_flash=True))(IDS, return_attn=True)
