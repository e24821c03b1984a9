"""Keywords that pretrained models need, against the formulas of their norms, scales and activations."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from catalog import close, perturbed
from torch import nn

from x_transformers import Attention, Decoder, Encoder, TransformerWrapper, ViTransformerWrapper
from x_transformers.errors import ConfigError, InputError, ShapeError, StateDictError
from x_transformers.feedforward.feedforward import FeedForward
from x_transformers.models.chunked_loss import linear_head
from x_transformers.models.embeddings import TokenEmbedding
from x_transformers.pretrained.layouts import (
    BIAS_OF_ZEROS,
    FIRST_AXIS,
    KEYS_WITHOUT_BIAS,
    ROW,
    STACKED,
    by_group,
    pixels,
)

STACK: dict[str, Any] = {"dim": 16, "depth": 1, "heads": 2, "attn_dim_head": 8, "verbose": False}
MODEL: dict[str, Any] = {"num_tokens": 11, "max_seq_len": 0}


def stack(**keywords: Any) -> Any:
    return perturbed(Decoder(**STACK, **keywords), 0.3)


@torch.no_grad()
def test_layer_norm_with_bias_and_epsilon() -> None:
    norm, x = stack(norm_bias=True, norm_eps=0.1).final_norm, torch.randn(3, 16)
    close(norm(x), F.layer_norm(x, (16,), norm.gamma + 1, norm.bias, 0.1))
    assert not torch.allclose(norm.bias, torch.zeros(16))


@torch.no_grad()
@pytest.mark.parametrize("name", ["use_rmsnorm", "use_simple_rmsnorm", "use_scalenorm", "use_adaptive_rmsnorm"])
def test_epsilon_of_rms_norms(name: str) -> None:
    norm, x = Decoder(**STACK, **{name: True}, norm_eps=0.1).final_norm, torch.randn(2, 3, 16)
    assert norm is not None
    condition = torch.randn(2, 16) if norm.adaptive else None
    close(norm(x, condition), x / (x.square().mean(dim=-1, keepdim=True) + 0.1).sqrt())


@torch.no_grad()
def test_epsilon_of_adaptive_layer_norm() -> None:
    norm, x = Decoder(**STACK, use_adaptive_layernorm=True, norm_eps=0.1).final_norm, torch.randn(2, 3, 16)
    assert norm is not None
    close(norm(x, torch.randn(2, 16)), F.layer_norm(x, (16,), eps=0.1))


@torch.no_grad()
def test_norm_on_the_branch_only() -> None:
    """`x + norm(f(x))` for both sublayers, and a norm after the last layer."""
    layers, x = stack(branch_norm=True, use_rmsnorm=True), torch.randn(2, 5, 16)
    one, two = layers.sublayers
    wanted = x + one.output_norm(one.attention(x)[0] if isinstance(one.attention(x), tuple) else one.attention(x))
    wanted = wanted + two.output_norm(two.feedforward(wanted))
    close(layers(x), layers.final_norm(wanted))
    assert one.norm is None


@torch.no_grad()
@pytest.mark.parametrize("more", [{}, {"attn_qk_rmsnorm": True}, {"attn_kv_heads": 1}, {"attn_flash": False}])
def test_bounded_queries_keys_and_values(more: dict[str, Any]) -> None:
    """`softmax(clip(q) clip(k)^T / sqrt(d)) clip(v)`; norms of queries and keys come after the bound."""
    bounded, plain = (stack(attn_qkv_clip=clip, **more).sublayers[0].attention for clip in (0.3, None))
    plain.load_state_dict(bounded.state_dict())
    x = torch.randn(2, 5, 16)
    q, k, v = (to(x).clamp(-0.3, 0.3) for to in (bounded.to_q, bounded.to_k, bounded.to_v))
    assert (q.abs() == 0.3).any()
    assert not torch.allclose(bounded(x), plain(x), atol=1e-3)
    q, k, v = (t.unflatten(-1, (-1, 8)).transpose(1, 2) for t in (q, k, v))
    for norm in bounded.qk_norms:
        q, k = norm.normalize_q(q), norm.normalize_k(k)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=bounded.scale, enable_gqa=True)
    close(bounded(x), bounded.to_out(out.transpose(1, 2).flatten(2)))


@torch.no_grad()
def test_no_norm_before_the_first_sublayer() -> None:
    """`x + f_1(x)`, and norms before all other sublayers and after the last one."""
    layers, x = stack(pre_norm_has_first_norm=False), torch.randn(2, 5, 16)
    one, two = layers.sublayers
    wanted = x + one.attention(x)
    wanted = wanted + two.feedforward(two.norm(wanted))
    close(layers(x), layers.final_norm(wanted))
    with pytest.raises(StateDictError, match="the reference has a norm before every sublayer"):
        layers.export_reference_state_dict()
    for more, words in (
        ({"pre_norm": False}, "leaves out the first of the norms before sublayers, and there are none"),
        ({"branch_norm": True}, "leaves out the first of the norms before sublayers, and there are none"),
        ({"resi_dual": True}, "`resi_dual` places norms by itself; drop .* `pre_norm_has_first_norm`"),
        ({"gated_multi_residual": True, "num_residual_streams": 2}, "drop .* `pre_norm_has_first_norm`"),
        ({"parallel_block": True, "parallel_block_one_norm": True}, "drop `pre_norm_has_first_norm`"),
    ):
        with pytest.raises(ConfigError, match=words):
            stack(pre_norm_has_first_norm=False, **more)


@torch.no_grad()
@pytest.mark.parametrize("macaron", [False, True])
def test_parallel_blocks(macaron: bool) -> None:
    """`x + f_1(norm_1(x)) + f_2(norm_2(x)) + ...` for each block."""
    layers = perturbed(Decoder(**{**STACK, "depth": 2}, parallel_block=True, macaron=macaron), 0.3)
    x = wanted = torch.randn(2, 5, 16)
    size = 3 if macaron else 2
    for block in (layers.sublayers[:size], layers.sublayers[size:]):
        outputs = [branch.output_scale * branch.fn(branch.norm(wanted)) for branch in block]
        wanted = wanted + sum(outputs)
    close(layers(x), layers.final_norm(wanted))


@torch.no_grad()
@pytest.mark.parametrize("keywords", [{}, {"use_rmsnorm": True}, {"macaron": True}])
def test_one_norm_of_parallel_blocks(keywords: dict[str, Any]) -> None:
    """`x + f_1(norm(x)) + f_2(norm(x))`: the first sublayer of a block has the only norm before them."""
    given = {**STACK, "depth": 2, "parallel_block": True, **keywords}
    one, two = perturbed(Decoder(**given, parallel_block_one_norm=True), 0.3), Decoder(**given)
    size = len(one.layers) // 2
    state = one.state_dict()
    first = {f"layers.{index}.": f"layers.{index - index % size}." for index in range(2 * size)}
    missing = [name for name in two.state_dict() if name not in state]
    assert missing == [f"layers.{index}.norm.gamma" for index in range(2 * size) if index % size]
    for name in missing:
        own = next(path for path in first if name.startswith(path))
        state[name] = state[name.replace(own, first[own])]
    two.load_state_dict(state)
    x = torch.randn(2, 5, 16)
    close(one(x), two(x))
    one.layers[0].norm = nn.Identity()
    assert not torch.allclose(one(x), two(x))


@torch.no_grad()
def test_norm_of_queries_and_keys_across_heads() -> None:
    """One mean square for the features of all heads, as OLMo 2 normalizes before it splits them."""
    given = {"qk_rmsnorm": True, "qk_rmsnorm_eps": 0.1}
    for across in (False, True):
        attention = perturbed(
            Attention(dim=16, heads=4, dim_head=4, kv_heads=2, **given, qk_rmsnorm_across_heads=across)
        )
        norms, flat = attention.qk_norms["qk_rmsnorm"], torch.randn(2, 5, 8)
        wide = flat if across else flat.unflatten(-1, (2, 4))
        gain = (norms.k_norm.gamma + 1).flatten() if across else (norms.k_norm.gamma + 1).squeeze(1)
        wanted = wide / (wide.square().mean(dim=-1, keepdim=True) + 0.1).sqrt() * gain
        close(
            norms.normalize_k(flat.unflatten(-1, (2, 4)).transpose(1, 2)).transpose(1, 2).flatten(2), wanted.flatten(2)
        )


@torch.no_grad()
@pytest.mark.parametrize("flash", [None, False])
def test_scale_of_the_scores(flash: bool | None) -> None:
    scaled, x = Attention(dim=16, heads=2, dim_head=8, scale=0.7, flash=flash).eval(), torch.randn(2, 5, 16)
    q, k, v = (each(x).unflatten(-1, (2, 8)).transpose(1, 2) for each in (scaled.to_q, scaled.to_k, scaled.to_v))
    out = ((0.7 * q @ k.mT).softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
    close(scaled(x), scaled.to_out(out))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("gelu", F.gelu),
        ("gelu_tanh", lambda x: 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())),
        ("quick_gelu", lambda x: x * (1.702 * x).sigmoid()),
        ("relu", lambda x: x.clamp(min=0)),
        ("silu", lambda x: x * x.sigmoid()),
    ],
)
@pytest.mark.parametrize("glu", [False, True])
def test_activations_by_name(name: str, formula: Any, glu: bool) -> None:
    feedforward, x = perturbed(FeedForward(16, activation=name, glu=glu)), torch.randn(3, 16)
    hidden = feedforward.up(x)
    if glu:
        value, gate = hidden.chunk(2, dim=-1)
        hidden = value * formula(gate)
    else:
        hidden = formula(hidden)
    close(feedforward(x), feedforward.down(hidden))


def test_a_gated_feedforward_without_biases() -> None:
    feedforward = FeedForward(16, glu=True, glu_no_bias=True, no_bias=True)
    assert [name for name, _ in feedforward.named_parameters()] == ["up.weight", "down.weight"]


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_scales_of_embeddings_and_logits(tied: bool) -> None:
    given = {"emb_scale": 3.0, "logits_scale": 0.5, "logits_softcap": 2.0, "tie_embedding": tied}
    model = perturbed(TransformerWrapper(**MODEL, **given, attn_layers=Decoder(**STACK)), 0.3)
    ids = torch.randint(0, 11, (2, 5))
    table = model.token_emb.emb.weight
    features = model.attn_layers(3 * table[ids])
    close(model(ids, return_embeddings=True), features)
    logits = features @ (table.T / 4 if tied else model.to_logits.weight.T)
    close(model(ids), 2 * (0.5 * logits / 2).tanh())
    close(model.logits_of(features), model(ids))


def model_of(stack: Any = Decoder, **keywords: Any) -> Any:
    given = {**MODEL, "max_seq_len": 8, **keywords}
    return perturbed(TransformerWrapper(**given, attn_layers=stack(**STACK)), 0.3)


@torch.no_grad()
def test_norm_of_embeddings_with_bias_and_epsilon() -> None:
    norm, x = (
        model_of(post_emb_norm=True, post_emb_norm_bias=True, post_emb_norm_eps=0.1).post_emb_norm,
        torch.randn(3, 16),
    )
    close(norm(x), F.layer_norm(x, (16,), norm.gamma, norm.bias, 0.1))


@torch.no_grad()
def test_positions_begin_at_a_row_of_the_table() -> None:
    positions, x = model_of(abs_pos_emb_offset=2, abs_pos_emb_scale=1.0).pos_emb, torch.zeros(2, 8, 16)
    table = positions.emb.weight
    assert table.shape == (10, 16)
    close(positions(x), table[2:])
    close(positions(x[:, :3], offset=4), table[6:9])
    close(positions(x[:, :3], seq_start_pos=torch.tensor([0, 2])), table[torch.tensor([[2, 3, 4], [2, 2, 2]])])
    with pytest.raises(ShapeError, match="9 tokens were given"):
        positions(torch.zeros(2, 9, 16))


@torch.no_grad()
def test_bias_of_logits() -> None:
    ids = torch.randint(0, 11, (2, 5))
    for keywords in ({}, {"tie_embedding": True}):
        model = model_of(logits_bias=True, **keywords)
        table = model.token_emb.emb.weight / 4 if keywords else model.to_logits.weight
        close(model(ids), model(ids, return_embeddings=True) @ table.T + model.to_logits.bias)
    model = model_of(logits_bias=True, num_output_heads=2)
    for head, logits in zip(model.to_logits, model(ids), strict=True):
        close(logits, model(ids, return_embeddings=True) @ head.weight.T + head.bias)


@torch.no_grad()
def test_map_before_the_head() -> None:
    model, ids = (
        model_of(logits_transform=True, logits_transform_eps=0.1, tie_embedding=True, emb_dim=6),
        torch.randint(0, 11, (2, 5)),
    )
    dense, norm = model.logit_changes.transform.dense, model.logit_changes.transform.norm
    read = F.gelu(model(ids, return_embeddings=True) @ dense.weight.T + dense.bias)
    read = F.layer_norm(read, (6,), norm.gamma, norm.bias, 0.1)
    close(model(ids), read @ model.token_emb.emb.weight.T / 4)


@torch.no_grad()
def test_tokens_without_further_ids_have_the_default() -> None:
    model = model_of(embed_num_tokens={"kind": 3, "place": 4}, embed_default_id=2)
    ids, kinds = torch.randint(0, 11, (2, 5)), torch.randint(0, 3, (2, 5))
    close(model(ids), model(ids, embed_ids={name: torch.full((2, 5), 2) for name in ("kind", "place")}))
    wanted = model(ids, embed_ids={"kind": kinds, "place": torch.full((2, 5), 2)})
    close(model(ids, embed_ids={"kind": kinds}), wanted)
    with pytest.raises(InputError, match=r"`embed_ids` names \['colour'\]"):
        model(ids, embed_ids={"colour": kinds})


@torch.no_grad()
def test_pool_of_the_first_token() -> None:
    model, ids = model_of(Encoder, first_token_pool=True, return_only_embed=True), torch.randint(0, 11, (2, 5))
    dense, features = model.attn_pool.dense, model(ids, return_embeddings=True)
    close(model(ids), (features[:, 0] @ dense.weight.T + dense.bias).tanh())
    start = torch.tensor([0, 2])
    features = model(ids, seq_start_pos=start, return_embeddings=True)
    close(model(ids, seq_start_pos=start), (features[torch.arange(2), start] @ dense.weight.T + dense.bias).tanh())
    pooled = model_of(Encoder, first_token_pool=True)
    _, record = pooled(ids, return_intermediates=True)
    close(record.logits, pooled.logits_of(pooled(ids, return_embeddings=True)))


@torch.no_grad()
def test_factor_of_the_bias_by_distance() -> None:
    given = {"rel_pos_bias": True, "rel_pos_num_buckets": 6, "rel_pos_max_distance": 8}
    plain, own = Decoder(**STACK, **given), Decoder(**STACK, **given, rel_pos_scale=3.0)
    own.load_state_dict(plain.state_dict())
    assert plain.rel_pos is not None
    assert own.rel_pos is not None
    close(own.rel_pos(4, 4), plain.rel_pos(4, 4) * 3 / 8**0.5)


@torch.no_grad()
@pytest.mark.parametrize("classes", [1, 2])
def test_class_tokens_of_images(classes: int) -> None:
    given: dict[str, Any] = {"image_size": 8, "patch_size": 4, "patch_norm": False, "use_cls_token": True}
    model = perturbed(ViTransformerWrapper(**given, num_cls_tokens=classes, attn_layers=Encoder(**STACK)), 0.3)
    images = torch.randn(2, 3, 8, 8)
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).reshape(2, 4, 48)
    linear = model.patch_to_embedding[1]
    x = torch.cat((model.cls_token.expand(2, -1, -1), patches @ linear.weight.T + linear.bias), dim=1)
    out = model.attn_layers(x + model.pos_embedding)
    close(model(images), out[:, 0] if classes == 1 else out[:, :2])
    close(model(images, return_embeddings=True), out[:, classes:])
    pooled = ViTransformerWrapper(**given, first_token_pool=True, num_classes=3, attn_layers=Encoder(**STACK))
    assert pooled(images).shape == (2, 3)
    with pytest.raises(StateDictError, match="`use_cls_token` of images"):
        pooled.export_reference_state_dict()


def test_a_pool_of_the_first_token_needs_a_class_token() -> None:
    with pytest.raises(ConfigError, match="set `use_cls_token`, or drop it"):
        ViTransformerWrapper(image_size=8, patch_size=4, first_token_pool=True, attn_layers=Encoder(**STACK))


LAYOUTS = {
    "groups": (by_group(4, 2), [(4 + 2 * 2, 3, 5)]),
    "pixels": (pixels(3, 4), [(16, 3, 4, 4)]),
    "stacked": (STACKED, [(1, 1, 6), (1, 1, 6)]),
    "one row": (ROW, [(1, 6)]),
    "first axis": (FIRST_AXIS, [(5, 6)]),
    "bias of zeros": (BIAS_OF_ZEROS, [(5, 6)]),
    "keys without bias": (KEYS_WITHOUT_BIAS, [(5, 6)]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_undo_themselves(name: str) -> None:
    layout, shapes = LAYOUTS[name]
    theirs = [torch.randn(shape) for shape in shapes]
    if name == "groups":
        theirs = [theirs[0].flatten(0, 1)]
    again = layout.write(*layout.read(*theirs))
    assert all(torch.equal(one, two) for one, two in zip(again, theirs, strict=True))


@pytest.mark.parametrize(
    ("keywords", "linear"),
    [
        ({}, True),
        ({"logits_bias": True}, True),
        ({"tie_embedding": True}, True),
        ({"tie_embedding": True, "logits_bias": True}, False),
        ({"tie_embedding": True, "logits_bias": True, "tie_embedding_scale": 1.0}, True),
        ({"logits_scale": 0.5}, False),
        ({"logits_softcap": 2.0}, False),
        ({"logits_transform": True}, False),
        ({"sigsoftmax_logits": True}, True),
    ],
)
def test_heads_that_one_operator_computes(keywords: dict[str, Any], linear: bool) -> None:
    """A graph computes chunked losses by an operator that knows linear maps and the sigmoid only."""
    assert (linear_head(model_of(**keywords)) is not None) == linear


@torch.no_grad()
def test_logits_are_bounded_before_they_are_mixed() -> None:
    """The mixture of softmaxes is one of probabilities, so that it begins with the changed logits."""
    given = {"mixture_of_softmax": True, "mixture_of_softmax_k": 2, "logits_softcap": 0.1}
    model = perturbed(TransformerWrapper(**MODEL, **given, attn_layers=Decoder(**STACK)), 0.3)
    out = model(torch.randint(0, 11, (2, 5)))
    close(out.exp().sum(dim=-1), torch.ones(2, 5))
    assert (out.amax(dim=-1) - out.amin(dim=-1)).max() < 0.2 + 1e-5


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"norm_eps": 0.0}, "`norm_eps` is 0.0; it must be positive"),
        ({"norm_bias": True, "use_rmsnorm": True}, "`norm_bias` is a bias of LayerNorm"),
        ({"norm_eps": 0.1, "use_derf": True}, "`norm_eps` has no effect"),
        ({"parallel_block": True, "only_attn": True}, "`parallel_block` needs blocks of several sublayers"),
        ({"parallel_block": True, "pre_norm": False}, "which norms between them would change"),
        ({"parallel_block": True, "num_residual_streams": 2}, "and so does `num_residual_streams`; drop one"),
        ({"branch_norm": True, "sandwich_norm": True}, "`branch_norm` moves the norm"),
        ({"branch_norm": True, "pre_norm": False}, "`branch_norm` moves the norm"),
        ({"branch_norm": True, "resi_dual": True}, "`resi_dual` places norms by itself"),
        ({"branch_norm": True, "use_dynamic_tanh": True}, "`use_dynamic_tanh` works only before sublayers"),
        ({"attn_scale": 0.0}, "`attn_scale` is 0.0; it must be positive"),
        ({"attn_qkv_clip": -1.0}, "`attn_qkv_clip` is -1.0; it must be positive"),
        ({"attn_scale": 0.1, "attn_qk_norm": True}, "`attn_scale` and `attn_qk_norm_scale` are the same factor"),
        ({"attn_qk_rmsnorm": True, "attn_qk_rmsnorm_eps": -1.0}, "`attn_qk_rmsnorm_eps` is -1.0"),
        ({"parallel_block": True, "parallel_block_one_norm": True, "branch_norm": True}, "which `branch_norm` moves"),
        ({"rel_pos_bias": True, "rel_pos_scale": 0.0}, "`rel_pos_scale` is 0.0; it must be positive"),
        ({"ff_activation": "gelu_new"}, "`ff_activation` is 'gelu_new'; it must be"),
        ({"ff_glu": True, "ff_glu_softclamp": True, "ff_activation": "gelu_tanh"}, "the exact GELU or of SiLU"),
    ],
)
def test_refusals_of_a_stack(keywords: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Decoder(**STACK, **keywords)


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"emb_scale": 0.0}, "`emb_scale` is 0.0; it must be positive"),
        ({"emb_scale": 2.0, "token_emb": TokenEmbedding(16, 11)}, "`emb_scale` is a factor of a new `TokenEmbedding`"),
        ({"emb_scale": 2.0, "token_emb": nn.Embedding(11, 16)}, "`emb_scale` is a factor of a new `TokenEmbedding`"),
        ({"logits_softcap": -1.0}, "`logits_softcap` is -1.0; it must be positive"),
        ({"logits_scale": 0.0}, "`logits_scale` is 0.0; it must be positive"),
        ({"logits_bias": True, "to_logits": nn.Linear(16, 11)}, "`to_logits` is one already; drop one of them"),
        ({"logits_transform": True, "logits_transform_eps": 0.0}, "`logits_transform_eps` is 0.0; it must be positive"),
        ({"post_emb_norm": True, "post_emb_norm_eps": 0.0}, "`post_emb_norm_eps` is 0.0; it must be positive"),
        ({"abs_pos_emb_offset": -1}, "`abs_pos_emb_offset` is -1; it must be"),
        ({"abs_pos_emb_offset": 2, "scaled_sinu_pos_emb": True}, "`abs_pos_emb_offset` is about the learned table"),
        ({"embed_num_tokens": {"kind": 3}, "embed_default_id": 3}, "but 'kind' has the ids 0 to 2; lower it"),
        ({"first_token_pool": True}, "sees no other in a causal stack; use an Encoder"),
        ({"first_token_pool": True, "attn_pool": True}, "alternatives of one choice"),
    ],
)
def test_refusals_of_a_model(keywords: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TransformerWrapper(**MODEL, **keywords, attn_layers=Decoder(**STACK))
