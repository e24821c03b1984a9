"""Hostile values for every constructor and every call: what they are given to, and which of them must be refused.

`python tests/fuzz.py` tries everything and prints what ended in an exception of another library; `python tests/fuzz.py
WORD` only what has the word in its name.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import checkout  # noqa: F401
import numpy as np
import torch
from loguru import logger
from torch import Tensor, nn

from x_transformers import (
    DPO,
    AdaptiveRMSNorm,
    Attention,
    AttentionPool,
    AutoregressiveWrapper,
    BeliefStateWrapper,
    ContinuousAutoregressiveWrapper,
    ContinuousTransformerWrapper,
    CrossAttender,
    Decoder,
    Encoder,
    EntropyBasedTokenizer,
    FeedForward,
    MultiInputTransformerWrapper,
    NeoMLP,
    NextLatentWrapper,
    NonAutoregressiveWrapper,
    PrefixDecoder,
    RMSNorm,
    SpeechTransformer,
    TransformerBlock,
    TransformerWrapper,
    ViTransformerWrapper,
    XLAutoregressiveWrapper,
    XTransformer,
    XValAutoregressiveWrapper,
    XValTransformerWrapper,
    grow_param_tokens_,
    layer_schedule,
    to_crmsnorm,
    to_experts,
    to_recursive,
    to_rmsnorm,
)
from x_transformers.attend import Attend
from x_transformers.errors import ConfigError, InputError
from x_transformers.feedforward.experts import Experts

STACK: dict[str, Any] = {"dim": 16, "depth": 1, "heads": 2, "attn_dim_head": 8, "verbose": False}
VOCABULARY, LENGTH = 9, 8
MODEL: dict[str, Any] = {"num_tokens": VOCABULARY, "max_seq_len": LENGTH}


def decoder(**more: Any) -> Decoder:
    return Decoder(**STACK, **more)


def encoder(**more: Any) -> Encoder:
    return Encoder(**STACK, **more)


def net(stack: Callable[..., Any] = decoder, **more: Any) -> TransformerWrapper:
    return TransformerWrapper(**MODEL, **more, attn_layers=stack())


def vectors() -> ContinuousTransformerWrapper:
    return ContinuousTransformerWrapper(dim_in=6, dim_out=6, max_seq_len=LENGTH, attn_layers=decoder())


def numbers() -> XValTransformerWrapper:
    return XValTransformerWrapper(**MODEL, numerical_token_id=3, attn_layers=decoder())


# constructors

Build = tuple[Callable[..., Any], Callable[[], dict[str, Any]]]

CONSTRUCTORS: dict[str, Build] = {
    "Decoder": (Decoder, lambda: dict(STACK)),
    "cross-attending Decoder": (Decoder, lambda: {**STACK, "cross_attend": True}),
    "Encoder": (Encoder, lambda: dict(STACK)),
    "PrefixDecoder": (PrefixDecoder, lambda: dict(STACK)),
    "CrossAttender": (CrossAttender, lambda: dict(STACK)),
    "TransformerBlock": (TransformerBlock, lambda: dict(STACK)),
    "Attention": (Attention, lambda: {"dim": 16, "heads": 2, "dim_head": 8}),
    "FeedForward": (FeedForward, lambda: {"dim": 16}),
    "Attend": (Attend, dict),
    "RMSNorm": (RMSNorm, lambda: {"dim": 16}),
    "AdaptiveRMSNorm": (AdaptiveRMSNorm, lambda: {"dim": 16}),
    "AttentionPool": (AttentionPool, lambda: {"dim": 16, "heads": 2}),
    "TransformerWrapper": (TransformerWrapper, lambda: {**MODEL, "attn_layers": decoder()}),
    "TransformerWrapper of an Encoder": (TransformerWrapper, lambda: {**MODEL, "attn_layers": encoder()}),
    "ViTransformerWrapper": (
        ViTransformerWrapper,
        lambda: {"image_size": 8, "patch_size": 4, "num_classes": 3, "attn_layers": encoder()},
    ),
    "ContinuousTransformerWrapper": (
        ContinuousTransformerWrapper,
        lambda: {"dim_in": 6, "dim_out": 6, "max_seq_len": LENGTH, "attn_layers": decoder()},
    ),
    "XValTransformerWrapper": (
        XValTransformerWrapper,
        lambda: {**MODEL, "numerical_token_id": 3, "attn_layers": decoder()},
    ),
    "MultiInputTransformerWrapper": (
        MultiInputTransformerWrapper,
        lambda: {"num_tokens": {"a": 9, "b": 5}, "max_seq_len": LENGTH, "attn_layers": decoder()},
    ),
    "NeoMLP": (NeoMLP, lambda: {"dim_in": 3, "dim_hidden": 4, "dim_out": 2, "dim_model": 16, "depth": 1}),
    "SpeechTransformer": (
        SpeechTransformer,
        lambda: {
            "num_mels": 5,
            "encoder": ContinuousTransformerWrapper(max_seq_len=LENGTH, attn_layers=encoder()),
            "decoder": TransformerWrapper(
                **MODEL, attn_layers=Decoder(dim=16, depth=1, heads=2, cross_attend=True, verbose=False)
            ),
        },
    ),
    "XTransformer": (
        XTransformer,
        lambda: {
            "dim": 16,
            **{f"{side}_{name}": value for side in ("enc", "dec") for name, value in MODEL.items()},
            **{f"{side}_{name}": value for side in ("enc", "dec") for name, value in (("depth", 1), ("heads", 2))},
        },
    ),
    "AutoregressiveWrapper": (AutoregressiveWrapper, lambda: {"net": net()}),
    "XLAutoregressiveWrapper": (XLAutoregressiveWrapper, lambda: {"net": net(max_mem_len=8)}),
    "NonAutoregressiveWrapper": (NonAutoregressiveWrapper, lambda: {"net": net(encoder), "mask_id": 8}),
    "NextLatentWrapper": (NextLatentWrapper, lambda: {"net": net(), "dim": 16}),
    "BeliefStateWrapper": (BeliefStateWrapper, lambda: {"forward_decoder": net()}),
    "DPO": (DPO, lambda: {"model": net()}),
    "ContinuousAutoregressiveWrapper": (ContinuousAutoregressiveWrapper, lambda: {"net": vectors()}),
    "XValAutoregressiveWrapper": (XValAutoregressiveWrapper, lambda: {"net": numbers()}),
    "EntropyBasedTokenizer": (EntropyBasedTokenizer, lambda: {"decoder": net(), "entropy_threshold": 1.0}),
    "Experts": (Experts, lambda: {"dim": 16, "experts": 4}),
    "to_experts": (to_experts, lambda: {"model": net(), "experts": 4, "topk": 2}),
    "grow_param_tokens_": (grow_param_tokens_, lambda: {"model": net(), "tokens": 4}),
    "to_recursive": (to_recursive, lambda: {"model": net(), "blocks": 1, "rank": 2}),
    "to_rmsnorm": (to_rmsnorm, lambda: {"model": net()}),
    "to_crmsnorm": (to_crmsnorm, lambda: {"model": net()}),
    "layer_schedule": (layer_schedule, lambda: {"start": 0.0, "end": 1.0, "depth": 3}),
}

WORDS = ("no", "x", b"x")
CONTAINERS = ((), (1, 2), [3], {}, {"a": 1}, {1: 2})
NUMBERS = (-1, 0, 1, 3, -0.5, 0.5, 1.5, 1e30, math.inf, -math.inf, math.nan, 10**30, 2 + 1j)
OF_NUMPY = (np.int64(3), np.float32(0.5), np.bool_(True))
OBJECTS = (None, True, False, object(), nn.Linear(3, 3), len)
ARRAYS = (torch.tensor([1.0, 2.0]), torch.tensor(3), np.array([1, 2]))
OPTION_VALUES = (*NUMBERS, *WORDS, *CONTAINERS, *OF_NUMPY, *OBJECTS, *ARRAYS)
WRONG_NAMES = ("zzz", "attention_mask", "labels", "position_ids", "use_cache", "max_new_tokens")
"""Names that no call has."""
NEVER_OPTIONS = (*ARRAYS, math.nan, math.inf, 2 + 1j, b"x")
"""What no constructor takes for any argument."""


def parameters(function: Callable[..., Any]) -> list[str]:
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [name for name, entry in inspect.signature(function).parameters.items() if entry.kind not in kinds]


# calls


@dataclass(frozen=True, eq=False)
class Call:
    """One public call.

    Attributes:
        make: returns the function to call.
        arguments: a valid set of arguments, all of which may be replaced.
        further: other arguments that it takes.
    """

    make: Callable[[], Callable[..., Any]]
    arguments: Callable[[], dict[str, Any]]
    further: tuple[str, ...] = ()


def ids(rows: int = 2, length: int = 6) -> Tensor:
    return torch.arange(rows * length).reshape(rows, length) % VOCABULARY


def features(*shape: int) -> Tensor:
    return torch.linspace(-1, 1, math.prod(shape)).reshape(shape)


MASK = torch.ones(2, 6, dtype=torch.bool)
CONTEXT = {"context": features(2, 5, 16), "context_mask": torch.ones(2, 5, dtype=torch.bool)}


def of_method(make: Callable[[], Any], name: str) -> Callable[[], Callable[..., Any]]:
    return lambda: getattr(make().eval(), name)


def stack_arguments() -> dict[str, Any]:
    return {
        "x": features(2, 6, 16),
        "mask": MASK,
        "self_attn_kv_mask": MASK,
        "attn_mask": torch.ones(6, 6, dtype=torch.bool),
        "attn_bias": features(6, 6),
        "seq_start_pos": torch.tensor([0, 1]),
        "mems": [features(2, 3, 16)],
        "mem_masks": [torch.ones(2, 3, dtype=torch.bool)],
        "self_attn_additional_kv": [(features(2, 2, 3, 8), features(2, 2, 3, 8))],
        "additional_kv_mask": torch.ones(2, 3, dtype=torch.bool),
        "in_attn_cond": features(2, 16),
        "deep_embeds_and_ids": (features(9, 1, 16), ids()),
        "self_attn_kv_residuals": features(2, 6, 16),
        "causal": True,
        "return_hiddens": False,
    }


def model_arguments() -> dict[str, Any]:
    return {
        "x": ids(),
        "mask": MASK,
        "self_attn_kv_mask": MASK,
        "attn_mask": torch.ones(6, 6, dtype=torch.bool),
        "attn_bias": features(6, 6),
        "pos": torch.arange(6),
        "prepend_embeds": features(2, 1, 16),
        "prepend_mask": torch.ones(2, 1, dtype=torch.bool),
        "sum_embeds": features(2, 6, 16),
        "mems": [features(2, 3, 16)],
        "mem_masks": [torch.ones(2, 3, dtype=torch.bool)],
    }


def deep_cache() -> Any:
    _, record = net()(ids()[:, :4], return_intermediates=True)
    return record


OPTIONS_OF_PASSES = (
    "return_embeddings return_intermediates return_mems return_attn recycle_steps excise_prepend_embeds embed_ids "
    "transform_token_embeds cache input_not_include_cache cache_age token_emb_kwargs to_logits_kwargs capture "
    "logits_to_keep seq_start_pos context condition in_attn_cond seq_pos_offset"
)

CALLS: dict[str, Call] = {
    "stack": Call(
        of_method(decoder, "forward"),
        stack_arguments,
        tuple(parameters(Decoder.forward)[2:-4]),  # without the last ones, which are for wrappers
    ),
    "cross-attending stack": Call(
        of_method(lambda: decoder(cross_attend=True, rotary_pos_emb=True), "forward"),
        lambda: {
            "x": features(2, 6, 16),
            **CONTEXT,
            "context_pos": torch.arange(5),
            "cross_attn_kv_residuals": features(2, 5, 16),
        },
    ),
    "PrefixDecoder": Call(
        of_method(lambda: PrefixDecoder(**STACK), "forward"), lambda: {"x": features(2, 6, 16), "prefix_attn_len": 2}
    ),
    "conditioned stack": Call(
        of_method(lambda: decoder(use_adaptive_rmsnorm=True), "forward"),
        lambda: {"x": features(2, 6, 16), "condition": features(2, 16)},
    ),
    "TransformerWrapper": Call(of_method(net, "forward"), model_arguments, tuple(OPTIONS_OF_PASSES.split())),
    "TransformerWrapper with memory tokens": Call(
        of_method(lambda: net(num_memory_tokens=2, embed_num_tokens={"a": 5}), "forward"),
        lambda: {**model_arguments(), "embed_ids": {"a": ids() % 5}},
    ),
    "cached pass": Call(
        of_method(net, "forward"),
        lambda: {"x": ids()[:, 4:], "cache": deep_cache(), "input_not_include_cache": True},
        ("mask", "self_attn_kv_mask", "pos", "cache_age", "sum_embeds"),
    ),
    "ViTransformerWrapper": Call(
        of_method(
            lambda: ViTransformerWrapper(image_size=8, patch_size=4, num_classes=3, attn_layers=encoder()), "forward"
        ),
        lambda: {"img": features(2, 3, 8, 8)},
    ),
    "ContinuousTransformerWrapper": Call(
        of_method(vectors, "forward"),
        lambda: {"x": features(2, 6, 6), "mask": MASK, "pos": torch.arange(6), "sum_embeds": features(2, 6, 16)},
        ("lens", "prepend_embeds", "seq_start_pos", "mems", "cache"),
    ),
    "XValTransformerWrapper": Call(
        of_method(numbers, "forward"), lambda: {"x": ids(), "x_num": features(2, 6), "mask": MASK}
    ),
    "MultiInputTransformerWrapper": Call(
        of_method(
            lambda: MultiInputTransformerWrapper(num_tokens={"a": 9}, max_seq_len=LENGTH, attn_layers=decoder()),
            "forward",
        ),
        lambda: {"x": {"a": ids()}, "mask": MASK},
    ),
    "NeoMLP": Call(
        of_method(lambda: NeoMLP(dim_in=3, dim_hidden=4, dim_out=2, dim_model=16, depth=1), "forward"),
        lambda: {"x": features(2, 3)},
    ),
    "Attention": Call(
        of_method(lambda: Attention(dim=16, heads=2, dim_head=8), "forward"),
        lambda: {
            "x": features(2, 6, 16),
            "mask": MASK,
            "attn_mask": torch.ones(6, 6, dtype=torch.bool),
            "attn_bias": features(6, 6),
            "mem": features(2, 3, 16),
            "mem_mask": torch.ones(2, 3, dtype=torch.bool),
        },
        ("context", "context_mask", "pos", "prev_attn", "value_residual", "cache", "kv_input_residual", "causal"),
    ),
    "Attend": Call(
        of_method(Attend, "forward"),
        lambda: {"q": features(2, 2, 6, 8), "k": features(2, 2, 6, 8), "v": features(2, 2, 6, 8), "mask": MASK},
        ("attn_bias", "row_mask", "causal"),
    ),
    "FeedForward": Call(of_method(lambda: FeedForward(dim=16), "forward"), lambda: {"x": features(2, 6, 16)}),
    "AttentionPool": Call(
        of_method(lambda: AttentionPool(dim=16, heads=2), "forward"),
        lambda: {"context": features(2, 6, 16), "mask": MASK, "queries": features(2, 1, 16)},
    ),
    "AutoregressiveWrapper": Call(
        of_method(lambda: AutoregressiveWrapper(net()), "forward"),
        lambda: {"x": ids(), "lens": torch.tensor([6, 4]), "mask": MASK},
        ("return_outputs", "prepend_embeds"),
    ),
    "generate": Call(
        of_method(lambda: AutoregressiveWrapper(net()), "generate"),
        lambda: {"prompts": ids()[:, :3], "seq_len": 2},
        tuple(parameters(AutoregressiveWrapper.generate)[3:]),
    ),
    "beam_search": Call(
        of_method(lambda: AutoregressiveWrapper(net()), "beam_search"),
        lambda: {"prompts": ids()[:, :3], "seq_len": 2},
        tuple(parameters(AutoregressiveWrapper.beam_search)[3:]),
    ),
    "XLAutoregressiveWrapper": Call(
        of_method(lambda: XLAutoregressiveWrapper(net(max_mem_len=8)), "forward"), lambda: {"x": ids()}, ("mems",)
    ),
    "NonAutoregressiveWrapper": Call(
        of_method(lambda: NonAutoregressiveWrapper(net(encoder), mask_id=8), "forward"),
        lambda: {"x": ids(2, 8) % 8},
        ("only_train_generator", "only_train_critic", "generator_sample_temperature"),
    ),
    "ContinuousAutoregressiveWrapper": Call(
        of_method(lambda: ContinuousAutoregressiveWrapper(vectors()), "forward"),
        lambda: {"x": features(2, 6, 6), "rollout_steps": 1},
        ("lens", "mask"),
    ),
    "generate vectors": Call(
        of_method(lambda: ContinuousAutoregressiveWrapper(vectors()), "generate"),
        lambda: {"start_tokens": features(2, 3, 6), "seq_len": 2, "temperature": 1.0, "cache_kv": True},
        ("prompt_lens", "restrict_to_max_seq_len"),
    ),
    "XValAutoregressiveWrapper": Call(
        of_method(lambda: XValAutoregressiveWrapper(numbers()), "forward"),
        lambda: {"x": ids(), "x_num": features(2, 6)},
        ("return_loss_breakdown", "mask"),
    ),
    "BeliefStateWrapper": Call(
        of_method(lambda: BeliefStateWrapper(net()), "forward"), lambda: {"seq": ids(2, 5)}, ("lens",)
    ),
    "DPO": Call(
        of_method(lambda: DPO(net()), "forward"),
        lambda: {"preferred_seq": ids(), "unpreferred_seq": ids(), "prompt_mask": MASK},
        ("preferred_seq_mask", "unpreferred_seq_mask"),
    ),
    "EntropyBasedTokenizer": Call(
        of_method(lambda: EntropyBasedTokenizer(net(), entropy_threshold=1.0), "forward"),
        lambda: {"seq": ids(), "lens": torch.tensor([6, 4]), "return_segmented_seq": False},
    ),
    "SpeechTransformer": Call(
        of_method(lambda: SpeechTransformer(**CONSTRUCTORS["SpeechTransformer"][1]()), "forward"),
        lambda: {"audio": features(2, 5, 7), "tgt": ids(), "lens": torch.tensor([7, 4])},
    ),
    "SpeechTransformer.encode": Call(
        of_method(lambda: SpeechTransformer(**CONSTRUCTORS["SpeechTransformer"][1]()), "encode"),
        lambda: {"audio": features(2, 5, 7), "lens": torch.tensor([7, 4])},
    ),
    "XTransformer": Call(
        of_method(lambda: XTransformer(**CONSTRUCTORS["XTransformer"][1]()), "forward"),
        lambda: {"src": ids(), "tgt": ids(), "mask": MASK},
        ("attn_mask", "src_prepend_embeds"),
    ),
    "KVCache.crop": Call(lambda: deep_cache().cache.crop, lambda: {"most": 2}),
    "KVCache.rollback": Call(lambda: deep_cache().cache.rollback, lambda: {"count": 1}),
    "KVCache.repeat": Call(lambda: deep_cache().cache.repeat, lambda: {"times": 2}),
    "KVCache.reorder": Call(lambda: deep_cache().cache.reorder, lambda: {"rows": torch.tensor([1, 0])}),
    "shallow": Call(lambda: net(lambda: Decoder(**{**STACK, "depth": 2})).shallow, lambda: {"exit_layer": 1}),
    "static_cache": Call(lambda: net().static_cache, lambda: {"batch": 2, "max_len": 8}, ("prepended", "step")),
}


@functools.cache
def function_of(name: str) -> Callable[..., Any]:
    """Return the function to call; models are shared, caches are not."""
    return CALLS[name].make()


def damaged(value: Any) -> Iterator[tuple[str, Any, bool]]:
    """Yield hostile forms of a valid argument: a name, the value, and True if it must be refused."""
    for other in ("x", object(), 1.5, -1, 10**30, [[1.0]], {"a": 1}, len, math.nan):
        yield f"{other!r:.20}", other, isinstance(value, Tensor)
    if isinstance(value, list | tuple) and value:
        for name, each, refused in damaged(value[0]):
            yield f"[{name}]", type(value)((each, *value[1:])), refused
    if not isinstance(value, Tensor):
        return
    yield "a further axis", value.unsqueeze(0).unsqueeze(0).unsqueeze(0), False
    yield "no axis", value.reshape(-1)[0], True
    if value.ndim > 1:
        yield "no rows", value[:0], False
        yield "other rows", value[:1].repeat(3, *(1,) * (value.ndim - 1)), False
        yield "no tokens", value[:, :0], False
        yield "one token more", torch.cat((value, value[:, :1]), dim=1), False
        yield "another width", value[..., :-1], False
    yield "complex", value.to(torch.complex64), True
    yield "float64", value.double(), False
    yield "bfloat16", value.bfloat16(), False
    yield "whole", value.long(), False
    yield "bytes", value.byte(), False
    yield "bool", value.bool(), False
    if not value.is_floating_point() and value.dtype is not torch.bool:
        yield "negative", value - 100, False
        yield "large", value + 100, False


def hostile_calls(name: str) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Yield a name, arguments, and True if they must be refused, for every hostile form of every argument."""
    call = CALLS[name]
    valid = call.arguments()
    # what is no module is called by Python itself
    if not name.startswith("KVCache") and name != "static_cache":
        for wrong in WRONG_NAMES:
            yield f"{name}({wrong})", {**valid, wrong: None}, True
    for argument, value in valid.items():
        for form, other, refused in damaged(value):
            # one number may be added to all embeddings
            number = argument == "sum_embeds" and ("no axis" in form or not isinstance(other, Tensor))
            yield f"{name}({argument} = {form})", {**valid, argument: other}, refused and not number
    samples = {"tensor": features(2, 6, 16), "ids": ids(), "list": [features(2, 3, 16)], "pair": (ids(), ids())}
    for argument in call.further:
        for form, other in {
            **{f"{each!r:.20}": each for each in (*WORDS, *NUMBERS, *CONTAINERS, *OF_NUMPY)},
            **samples,
        }.items():
            # `compile` takes minutes to try
            if argument not in valid and argument not in ("compile", "progress"):
                yield f"{name}({argument} = {form})", {**valid, argument: other}, False


def outcome(run: Callable[[], Any], *ours: type[BaseException]) -> str | None:
    """Return None if a call works or is refused in words of ours, otherwise the foreign exception."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run()
    except ours as error:
        return None if str(error) else "an empty message"
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
    return "taken"


def try_call(name: str, arguments: Mapping[str, Any]) -> str | None:
    function = CALLS[name].make() if name.startswith("KVCache") else function_of(name)
    return outcome(lambda: function(**arguments), InputError)


def build(name: str, keywords: Mapping[str, Any]) -> str | None:
    make, valid = CONSTRUCTORS[name]
    return outcome(lambda: make(**{**valid(), **keywords}), ConfigError)


def main(words: list[str]) -> None:
    logger.remove()
    torch.manual_seed(0)
    for name, (make, _) in CONSTRUCTORS.items():
        if words and not any(word in name for word in words):
            continue
        for keyword in parameters(make):
            for value in OPTION_VALUES:
                found = build(name, {keyword: value})
                never = any(value is each for each in NEVER_OPTIONS)
                if found not in (None, "taken") or (found == "taken" and never):
                    print(f"{name}({keyword} = {value!r:.40}): {found}")
    for name in CALLS:
        if words and not any(word in name for word in words):
            continue
        for what, arguments, refused in hostile_calls(name):
            found = try_call(name, arguments)
            if found not in (None, "taken") or (found == "taken" and refused):
                print(f"{what}: {found}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
