"""Packed rows: documents that stand one after the other in one row are what each is alone."""

import inspect
from typing import Any

import pytest
import torch
from catalog import BASE, Case, close, contexts, name_of, one_of_each, other_inputs, perturb, tokens
from torch import Tensor

from x_transformers import (
    Attention,
    ContinuousTransformerWrapper,
    CrossAttender,
    Decoder,
    Encoder,
    PrefixDecoder,
    TransformerWrapper,
    ViTransformerWrapper,
)
from x_transformers.attend import Attend
from x_transformers.attention.backends.base import Request, Situation
from x_transformers.attention.backends.explicit import Explicit
from x_transformers.attention.backends.flex import Flex
from x_transformers.attention.backends.varlen import Varlen
from x_transformers.attention.base import Memo, Needs, Visibility
from x_transformers.errors import ConfigError, InputError, ShapeError
from x_transformers.forward_pass.documents import Documents
from x_transformers.masks.builder import spelled_out
from x_transformers.mixers.catalog import MIXERS
from x_transformers.x_transformers import CoPE

LENGTHS = (4, 1, 6, 3)
CONTEXTS = (2, 5, 1, 3)
PACKED: dict[str, Any] = {"rotary_pos_emb": True, "attn_flash_pack_seq": True}
RECORD = {"return_intermediates": True}
SMALL = {"dim": 16, "depth": 1, "heads": 2, "attn_dim_head": 8, "verbose": False}

WORDS = """
    polar memory_kv zero_kv hybrid qkv_views residual_keywords shift_tokens mv_split_residual context_dropout
    rwkv_channel_mix memory_tokens interspersed_memory_tokens recurrent_memory average_pool class_tokens attention_pool
"""
APART = frozenset(WORDS.split()) | {
    "depth_routing",
    "key_subsampling",
    "mixer",
    "layer_period",
    "mixer_parts",
    *(MIXERS.keys() - {"activator"}),
}
"""Features of which at least the first example is refused together with packing."""


def boundaries(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def packs(lengths: tuple[int, ...], of_keys: tuple[int, ...] | None = None) -> dict[str, Any]:
    of_keys = lengths if of_keys is None else of_keys
    return {
        "cu_seqlens_q": boundaries(*lengths),
        "cu_seqlens_k": boundaries(*of_keys),
        "max_seqlen_q": max(lengths),
        "max_seqlen_k": max(of_keys),
    }


def pair(case: Case, stack: str) -> tuple[TransformerWrapper, TransformerWrapper]:
    """A model that packs, and the like that does not."""
    more = {"cross_attn_flash_pack_seq": True} if stack == "cross" else {}
    packed = case.build(stack, **PACKED, **more)
    plain = case.build(stack, rotary_pos_emb=True)
    plain.load_state_dict(packed.state_dict())
    return packed, plain


@pytest.mark.parametrize(("stack", "case"), one_of_each("cross"), ids=name_of)
@torch.no_grad()
def test_documents_are_what_each_is_alone(stack: str, case: Case) -> None:
    """With every option, or the two are refused in words; towards a context, too."""
    if case.features and case.features[0].name in APART:
        with pytest.raises(ConfigError, match=r"flash_pack_seq|packed rows|alternatives of one choice"):
            case.build(stack, **PACKED, cross_attn_flash_pack_seq=True)
        return
    packed, plain = pair(case, stack)
    ids = tokens(1, sum(LENGTHS))
    width = packed.attn_layers.branches("c")[0].attention.dim_context
    rows = [contexts(width)[r : r + 1, :m] for r, m in enumerate(CONTEXTS)]
    given = {**other_inputs(packed, ids), "context": torch.cat(rows, dim=1)}
    given |= {"flash_pack_seq_kwargs": packs(LENGTHS), "flash_pack_seq_context_kwargs": packs(LENGTHS, CONTEXTS)}
    together = packed(ids, **given)
    for one, two, context in zip(ids.split(LENGTHS, 1), together.split(LENGTHS, 1), rows, strict=True):
        close(two, plain(one, **{**other_inputs(plain, one), "context": context}))


VARIANTS: dict[str, tuple[type, dict[str, Any]]] = {
    "encoder": (Encoder, {}),
    "prefix": (PrefixDecoder, {}),
    "window": (Decoder, {"attn_max_attend_past": 2}),
    "biased": (Encoder, {"alibi_pos_bias": True, "attn_data_dependent_alibi": False}),
    "latent": (Decoder, {"attn_use_latent_kv": True, "attn_dim_latent_kv": 8, "attn_kv_heads": 1}),
    "clamped": (Decoder, {"attn_softclamp_logits": True, "attn_head_learned_sink": True}),
    "positions": (Decoder, {"rotary_xpos": True}),
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("flash", [None, False])
@torch.no_grad()
def test_variants(name: str, flash: bool | None) -> None:
    stack, keywords = VARIANTS[name]
    model = stack(**{**SMALL, **PACKED, **keywords, "attn_flash": flash}).eval()
    x, more = torch.randn(1, sum(LENGTHS), 16), {"prefix_attn_len": 2} if name == "prefix" else {}
    together = model(x, flash_pack_seq_kwargs=packs(LENGTHS), **more)
    for one, two in zip(x.split(LENGTHS, 1), together.split(LENGTHS, 1), strict=True):
        close(two, model(one, flash_pack_seq_kwargs=packs((one.shape[1],)), **more))


def test_gradients_and_scores_stay_within_documents() -> None:
    model, ids = BASE.build(**PACKED), tokens(1, sum(LENGTHS))
    out, record = model(ids, return_intermediates=True, flash_pack_seq_kwargs=packs(LENGTHS))
    assert record.cache is None
    weights = record.attn_intermediates[0].post_softmax_attn
    blocks = torch.block_diag(*(torch.ones(n, n).tril() for n in LENGTHS)).bool()
    assert (weights[..., ~blocks] == 0).all()
    close(weights.sum(dim=-1), torch.ones(1, 4, sum(LENGTHS)))
    x = torch.randn(1, sum(LENGTHS), 16, requires_grad=True)
    out = model.attn_layers(x, flash_pack_seq_kwargs=packs(LENGTHS))
    out[:, 5:11].square().sum().backward()
    assert x.grad is not None
    moved = x.grad[0].abs().amax(dim=-1) > 0
    assert moved.tolist() == [5 <= place < 11 for place in range(sum(LENGTHS))]


@torch.no_grad()
def test_a_cache_holds_one_document_a_row() -> None:
    packed, plain = pair(BASE, "decoder")
    ids = tokens(2, 5)
    out, state = packed(ids[:, :3], cache=packed.static_cache(2, 6), input_not_include_cache=True, **RECORD)
    more, _ = packed(ids[:, 3:], cache=state, input_not_include_cache=True, **RECORD)
    close(torch.cat((out, more), dim=1), plain(ids))
    with pytest.raises(InputError, match="each row of a cache is one document"):
        packed(ids[:1, 3:], cache=state, input_not_include_cache=True, flash_pack_seq_kwargs=packs((2,)))


@torch.no_grad()
def test_other_models() -> None:
    stack = Encoder(**SMALL, **PACKED)
    model = ContinuousTransformerWrapper(attn_layers=stack, max_seq_len=8, dim_in=3, dim_out=2).eval()
    x = torch.randn(1, sum(LENGTHS), 3)
    together = model(x, flash_pack_seq_kwargs=packs(LENGTHS))
    close(together[:, 5:11], model(x[:, 5:11], flash_pack_seq_kwargs=packs((6,))))
    with pytest.raises(ConfigError, match="an image is one document"):
        ViTransformerWrapper(image_size=4, patch_size=2, attn_layers=stack)


# outside of a stack


@torch.no_grad()
def test_a_context_by_documents() -> None:
    """Causality and windows are right-aligned in each; a document without a context leaves nothing."""
    attention = Attention(16, dim_head=8, heads=2, max_attend_past=2, flash_pack_seq=True).eval()
    x, context, of_keys = torch.randn(1, 14, 16), torch.randn(1, 10, 16), (6, 0, 1, 3)
    for causal in (False, True):
        given = {"causal": causal, "return_intermediates": True}
        out, record = attention(x, context, flash_pack_seq_kwargs=packs(LENGTHS, of_keys), **given)
        assert (out[:, 4] == 0).all()
        parts = zip(x.split(LENGTHS, 1), context.split(of_keys, 1), out.split(LENGTHS, 1), strict=True)
        for number, (one, keys, two) in enumerate(parts):
            if number != 1:
                packing = packs((one.shape[1],), (keys.shape[1],))
                close(two, attention(one, keys, causal=causal, flash_pack_seq_kwargs=packing))
        distance = torch.arange(4)[:, None] + 2 - torch.arange(6)
        seen = (distance <= 2) & (distance >= 0) if causal else distance <= 2
        assert torch.equal(record.post_softmax_attn[0, 0, :4, :6] > 0, seen)


@torch.no_grad()
def test_a_context_is_right_aligned() -> None:
    """Without documents, too: the last query stands beside the last key."""
    x = torch.randn(1, 3, 16)
    for length in (5, 2):
        context = torch.randn(1, length, 16)
        distance = torch.arange(3)[:, None] + length - 3 - torch.arange(length)
        windowed = Attention(16, dim_head=8, heads=2, max_attend_past=1)
        for attention, causal, seen in (
            (Attention(16, dim_head=8, heads=2), True, distance >= 0),
            (Attention(16, dim_head=8, heads=2, causal=True), None, distance >= 0),
            (windowed, None, distance <= 1),
            (windowed, True, (distance >= 0) & (distance <= 1)),
        ):
            out, record = attention.eval()(x, context, causal=causal, return_intermediates=True)
            assert torch.equal(record.post_softmax_attn[0, 0] > 0, seen)
            close(attention(x, context, causal=causal), out)
            with pytest.raises(InputError, match="align the last query with the last key"):
                attention(x[:, :1], context[:, :0], causal=causal, cache=record)
        curves = Attention(16, dim_head=8, heads=2, use_rel_proj_pos_bias=True, rel_proj_max_dist=3).eval()
        _, record = curves(x, context, return_intermediates=True)
        bias = record.pre_softmax_attn - record.qk_similarities
        assert torch.equal(bias[0, 0].abs() > 0, (distance >= 0) & (distance < 3))


# the weighing alone

WEIGHINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sink": {"head_learned_sink": True, "softclamp_logits": True},
    "distances": {"l2_distance": True},
    "rows": {"pre_talking_heads": True, "post_talking_heads": True, "cog_signed": True},
    "weights": {"sparse_topk": 2},
    "gates": {"sigmoid": True},
    "selective": {"selective": True},
    "contextual": {"cope": CoPE(8, 4, 4)},
}
OWN = ("selective", "contextual")
"""Only causally, and where queries and keys are the same tokens."""

WAYS = [(name, causal) for name in WEIGHINGS for causal in (False, True) if causal or name not in OWN]


@pytest.mark.parametrize("flash", [False, None])
@pytest.mark.parametrize(("name", "causal"), WAYS)
@torch.no_grad()
def test_weighing_by_documents(name: str, causal: bool, flash: bool | None) -> None:
    """Each is what it is alone, in self-attention and towards other keys; nothing is seen where there are none."""
    packed, plain = (
        perturb(Attend(heads=4, causal=causal, flash=flash, flash_pack_seq=packs_rows, **WEIGHINGS[name])).eval()
        for packs_rows in (True, False)
    )
    plain.load_state_dict(packed.state_dict())
    for of_keys in (LENGTHS,) if name in OWN else (LENGTHS, (6, 0, 6, 4)):
        i, j = sum(LENGTHS), sum(of_keys)
        q, k, v = torch.randn(1, 4, i, 8), torch.randn(1, 2, j, 8), torch.randn(1, 2, j, 5)
        bias = torch.randn(4, i, j)
        more = {} if name == "contextual" else {"attn_bias": bias}
        out, record = packed(q, k, v, flash_pack_seq_kwargs=packs(LENGTHS, of_keys), **more)
        parts = zip(
            q.split(LENGTHS, 2),
            k.split(of_keys, 2),
            v.split(of_keys, 2),
            out.split(LENGTHS, 2),
            _blocks(bias, LENGTHS, of_keys),
            strict=True,
        )
        for query, key, value, got, of_both in parts:
            if key.shape[2] == 0:
                assert (got == 0).all()
                continue
            given = {} if name == "contextual" else {"attn_bias": of_both}
            close(got, plain(query, key, value, **given)[0])
        assert (record.post_softmax_attn is not None) == (flash is False)


def _blocks(t: Tensor, rows: tuple[int, ...], columns: tuple[int, ...]) -> list[Tensor]:
    """Those on the diagonal."""
    split = zip(t.split(rows, -2), range(len(rows)), strict=True)
    return [row.split(columns, -1)[number] for row, number in split]


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_fused_weighing_by_documents(causal: bool) -> None:
    packed = Attend(causal=causal, flash_pack_seq=True)
    q, k, v = (torch.randn(1, 4, sum(LENGTHS), 8) for _ in "qkv")
    packing = packs(LENGTHS)
    wanted = packed(q, k, v, flash_pack_seq_kwargs=packing)[0]
    close(packed.flash_attn(q, k, v, flash_pack_seq_kwargs=packing)[0], wanted)
    fused = Attend(causal=causal, flash=True, flash_pack_seq=True)
    close(fused(q, k, v, flash_pack_seq_kwargs=packing)[0], wanted)
    other = Attend(causal=not causal, flash_pack_seq=True)(q, k, v, flash_pack_seq_kwargs=packing)[0]
    close(packed(q, k, v, flash_pack_seq_kwargs=packing, causal=not causal)[0], other)
    twin = Attend.from_config(packed.config)
    assert torch.equal(twin(q, k, v, flash_pack_seq_kwargs=packing)[0], wanted)
    half = Situation("cuda", torch.bfloat16, True, width=64)
    assert fused.backends.choose(half, Needs.DOCUMENTS)[0].name == "varlen"


def test_gradients_of_weighing_stay_within_documents() -> None:
    packed = Attend(flash=None, flash_pack_seq=True)
    q, k, v = (torch.randn(1, 4, sum(LENGTHS), 8, requires_grad=True) for _ in "qkv")
    packed(q, k, v, flash_pack_seq_kwargs=packs(LENGTHS))[0][:, :, 5:11].square().sum().backward()
    inside = torch.arange(sum(LENGTHS))[5:11]
    for t in (q, k, v):
        moved = t.grad.abs().sum(dim=(0, 1, 3)).nonzero().flatten()
        assert torch.equal(moved, inside)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"mask": torch.ones(1, 5).bool()}, "drop `mask`"),
        ({"row_mask": torch.ones(1, 5).bool()}, "drop `row_mask`"),
        ({"flash_pack_seq_kwargs": packs((3, 3))}, "must rise from 0 to the number of tokens, 5"),
        ({"q": torch.zeros(2, 2, 5, 8), "k": torch.zeros(2, 2, 5, 8), "v": torch.zeros(2, 2, 5, 8)}, "2 rows"),
        ({"options": {"selective": True}, "q": torch.zeros(1, 2, 4, 8)}, "4 queries and 5 keys; `selective`"),
        ({"options": {"cope": CoPE(8, 2, 4)}, "flash_pack_seq_kwargs": packs((3, 2), (2, 3))}, "differently"),
    ],
)
def test_weighing_by_documents_that_is_refused(given: dict[str, Any], words: str) -> None:
    each = {**{name: torch.zeros(1, 2, 5, 8) for name in "qkv"}, "flash_pack_seq_kwargs": packs((3, 2)), **given}
    options = each.pop("options", {})
    with pytest.raises(InputError, match=words):
        Attend(causal=True, flash_pack_seq=True, **options)(**each)


# what is refused, in words

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no rotation": ({"attn_flash_pack_seq": True}, "`rotary_pos_emb = True`"),
    "some layers": ({"depth": 2, **PACKED, "attn_flash_pack_seq": (True, False)}, "differs between layers"),
    "memory": ({**PACKED, "attn_num_mem_kv": 2}, "`attn_flash_pack_seq`.*`attn_num_mem_kv`"),
    "zero": ({**PACKED, "attn_add_zero_kv": True}, "`attn_add_zero_kv`"),
    "shift": ({**PACKED, "shift_tokens": 1}, "`shift_tokens`"),
    "means": ({**PACKED, "mv_split_residual": True}, "`mv_split_residual`"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_join_documents(name: str) -> None:
    keywords, words = REFUSED[name]
    with pytest.raises(ConfigError, match=words):
        Decoder(**{**SMALL, **keywords})


def test_competing_queries() -> None:
    with pytest.raises(ConfigError, match="queries of all documents compete"):
        CrossAttender(**SMALL, cross_attn_flash_pack_seq=True, cross_attn_inverted_attention=True)


def test_shifts_between_documents_of_queries_alone() -> None:
    """Without self-attention, nothing else would join the documents; with it, the whole row is one sequence."""
    with pytest.raises(ConfigError, match=r"`cross_attn_flash_pack_seq`.*`shift_tokens` would move"):
        CrossAttender(**SMALL, cross_attn_flash_pack_seq=True, shift_tokens=1)
    Decoder(**SMALL, cross_attend=True, cross_attn_flash_pack_seq=True, shift_tokens=1)


MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "memory tokens": ({"num_memory_tokens": 2}, "`num_memory_tokens` belong to no document"),
    "class tokens": ({"use_cls_token": True}, "`use_cls_token`"),
    "mean": ({"average_pool_embed": True}, "`average_pool_embed`"),
    "pool": ({"attn_pool": True}, "`attn_pool`"),
    "recurrent memory": ({"max_mem_len": 4}, "`max_mem_len`"),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_stands_around_tokens(name: str) -> None:
    options, words = MODELS[name]
    with pytest.raises(ConfigError, match=words):
        TransformerWrapper(num_tokens=24, max_seq_len=8, attn_layers=Decoder(**SMALL, **PACKED), **options)


def test_absolute_positions() -> None:
    stack = Decoder(**SMALL, **PACKED, disable_abs_pos_emb=False)
    with pytest.raises(ConfigError, match="absolute positions would not start again"):
        TransformerWrapper(num_tokens=24, max_seq_len=8, attn_layers=stack)
    TransformerWrapper(num_tokens=24, max_seq_len=8, attn_layers=stack, use_abs_pos_emb=False)


def _with(**changed: Any) -> dict[str, Any]:
    return {"flash_pack_seq_kwargs": {**packs((3, 2)), **changed}}


CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "none": ({}, InputError, "pass `flash_pack_seq_kwargs` with `cu_seqlens_q`"),
    "no dict": ({"flash_pack_seq_kwargs": boundaries(5)}, InputError, "must be of type Mapping"),
    "a name too many": (_with(cu_seqlens=1), InputError, "must be a dict of `cu_seqlens_q`"),
    "too few tokens": (
        _with(cu_seqlens_q=boundaries(3, 1)),
        InputError,
        r"is \[0, 3, 4\]; it must rise from 0 to the number of tokens, 5",
    ),
    "falls": (_with(cu_seqlens_q=torch.tensor([0, 6, 5])), InputError, "must rise"),
    "not from 0": (_with(cu_seqlens_k=torch.tensor([1, 3, 5])), InputError, "`cu_seqlens_k`.* must rise"),
    "no numbers": (_with(cu_seqlens_q=torch.tensor([0.0, 5.0])), InputError, "whole numbers"),
    "others": (_with(cu_seqlens_k=boundaries(2, 3)), InputError, "divides queries and keys differently"),
    "more of them": (_with(cu_seqlens_k=boundaries(2, 1, 2)), InputError, "2 documents of queries and 3 of keys"),
    "longer": (_with(max_seqlen_q=2), InputError, "`max_seqlen_q`.* is 2, but the longest document has 3"),
    "no length": (_with(max_seqlen_k="3"), InputError, "`max_seqlen_k`"),
    "a mask": ({**_with(), "mask": torch.ones(1, 5).bool()}, InputError, "drop `mask`"),
    "a mask of keys": ({**_with(), "self_attn_kv_mask": torch.ones(1, 5).bool()}, InputError, "`self_attn_kv_mask`"),
    "pairs": ({**_with(), "attn_mask": torch.ones(5, 5).bool()}, InputError, "`attn_mask`"),
    "padding": ({**_with(), "seq_start_pos": torch.tensor([1])}, InputError, "`seq_start_pos`"),
    "memory": ({**_with(), "mems": [torch.randn(1, 2, 16)]}, InputError, "`mems`"),
    "keys": ({**_with(), "self_attn_additional_kv": [(torch.randn(1, 2, 2, 8),) * 2]}, InputError, "additional_kv"),
    "no context": ({"flash_pack_seq_context_kwargs": packs((5,)), **_with()}, InputError, "cross_attn_flash_pack_seq"),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls(name: str) -> None:
    given, error, words = CALLS[name]
    with pytest.raises(error, match=words):
        Decoder(**SMALL, **PACKED)(torch.randn(1, 5, 16), **given)


def test_more_calls() -> None:
    x = torch.randn(2, 5, 16)
    with pytest.raises(ShapeError, match="x has 2 rows; concatenate them"):
        Decoder(**SMALL, **PACKED)(x, **_with())
    with pytest.raises(InputError, match="build the model with `attn_flash_pack_seq = True`"):
        Decoder(**SMALL)(x, **_with())
    with pytest.raises(InputError, match="build the model with `flash_pack_seq = True`"):
        Attention(16)(x, **_with())
    packed = Attention(16, flash_pack_seq=True)
    with pytest.raises(InputError, match="pass `flash_pack_seq_kwargs`"):
        packed(x)
    with pytest.raises(InputError, match="drop `mask`"):
        packed(x[:1], mask=torch.ones(1, 5).bool(), **_with())
    crossing = CrossAttender(**SMALL, cross_attn_flash_pack_seq=True)
    given = {"context": x[:1], "context_mask": torch.ones(1, 5).bool()}
    with pytest.raises(InputError, match="drop `context_mask`"):
        crossing(x[:1], **given, flash_pack_seq_context_kwargs=packs((3, 2)))


# kernels


def requests(causal: bool, documents: Documents) -> Request:
    i, j = int(documents.starts_q[-1]), int(documents.starts_k[-1])
    q, k, v = torch.randn(1, 4, i, 10), torch.randn(1, 2, j, 10), torch.randn(1, 2, j, 5)
    visible = Visibility(is_causal=causal, fully_masked=documents.fully_masked(i, causal=causal), documents=documents)
    return Request(q, k, v, 0.3, visible, Memo())


def naive(q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, *_: int, **how: Any) -> Tensor:
    """What the variable-length kernel is documented to do, document by document."""
    outs = []
    for t in range(len(starts_q) - 1):
        queries = q[starts_q[t] : starts_q[t + 1]].transpose(0, 1)
        keys, values = (each[starts_k[t] : starts_k[t + 1]].transpose(0, 1) for each in (k, v))
        keys, values = (each.repeat_interleave(q.shape[1] // k.shape[1], 0) for each in (keys, values))
        logits = queries @ keys.transpose(-1, -2) * how["scale"]
        if how["window_size"] == (-1, 0):
            i, j = logits.shape[-2:]
            logits = logits.masked_fill(torch.ones(i, j).triu(j - i + 1).bool(), float("-inf"))
        outs.append((logits.softmax(dim=-1) @ values).nan_to_num().transpose(0, 1))
    return torch.cat(outs)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("of_keys", [LENGTHS, (2, 3, 6, 0)], ids=str)
def test_the_variable_length_kernel(causal: bool, of_keys: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked for what the explicit backend does, in words that it takes."""
    why = "this PyTorch has no variable-length attention"
    kernel = pytest.importorskip("torch.nn.attention.varlen", reason=why)
    signature = inspect.signature(kernel.varlen_attn)

    def taking(*given: Any, **how: Any) -> Tensor:
        signature.bind(*given, **how)
        assert given[0].shape[-1] == given[2].shape[-1] == 16
        return naive(*given, **how)

    monkeypatch.setattr(kernel, "varlen_attn", taking)
    documents = Documents(boundaries(*LENGTHS), boundaries(*of_keys), 6, 6)
    request = requests(causal, documents)
    got = Varlen().attend(request).out
    apart = spelled_out(request.visible, request.q.shape[-2], request.k.shape[-2])
    request = request._replace(visible=apart)
    close(got, Explicit().attend(request).out)


def test_when_the_variable_length_kernel_runs() -> None:
    core = Attention(16, dim_head=8, heads=2, flash_pack_seq=True, max_attend_past=None).attend.backends
    half = Situation("cuda", torch.bfloat16, True, width=64)
    documents = Needs.DOCUMENTS
    assert core.choose(half, documents)[0].name == "varlen"
    for situation, needs, why in (
        (half, Needs.NOTHING, "for packed documents"),
        (half, documents | Needs.BIAS, "varlen cannot host a bias"),
        (half, documents | Needs.DROPOUT, "varlen cannot host dropout"),
        (half._replace(dtype=torch.float32), documents, "no kernel for torch.float32"),
        (half._replace(device="cpu"), documents, "no kernel for cpu"),
        (half._replace(width=512), documents, "at most 256"),
    ):
        backend, reason = core.choose(situation, needs)
        assert backend.name == "sdpa"
        assert why in reason
    without = Attention(16, flash_pack_seq=True, attend_sdp_kwargs={"enable_flash": False}).attend.backends
    assert without.choose(half, documents)[0].name == "sdpa"
    rows = Decoder(**SMALL, **PACKED).explain("cuda", torch.bfloat16).rows
    assert [row.backend for row in rows] == ["varlen", ""]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@torch.no_grad()
def test_flex_keeps_documents_apart() -> None:
    model = Decoder(**SMALL, **PACKED, attn_flash=True).eval()
    x = torch.randn(1, sum(LENGTHS), 16)
    wanted = model(x, flash_pack_seq_kwargs=packs(LENGTHS))
    model.branches("a")[0].attention.attend.backends.fused = (Flex(),)
    close(model(x, flash_pack_seq_kwargs=packs(LENGTHS)), wanted)


@torch.no_grad()
def test_one_graph() -> None:
    """Other boundaries are other data, not another graph."""
    torch.compiler.reset()
    model, graphs = Decoder(**SMALL, **PACKED).eval(), []

    def counting(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled, x = torch.compile(model, fullgraph=True, backend=counting), torch.randn(1, sum(LENGTHS), 16)
    for lengths in (LENGTHS, (6, 4, 1, 3)):
        packing = packs(lengths)
        close(compiled(x, flash_pack_seq_kwargs=packing), model(x, flash_pack_seq_kwargs=packing))
    assert len(graphs) == 1
    torch.compiler.reset()
