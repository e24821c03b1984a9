"""Every public call knows the names of its arguments, and says what to write instead of an unknown one."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fuzz import CONSTRUCTORS, decoder, encoder, features, ids, net, vectors
from torch import Tensor, nn

import x_transformers as package
from x_transformers import (
    Attention,
    AutoregressiveWrapper,
    ContinuousAutoregressiveWrapper,
    Decoder,
    NonAutoregressiveWrapper,
    PrefixDecoder,
    TransformerWrapper,
    XTransformer,
)
from x_transformers.attend import Attend
from x_transformers.errors import ConfigError, UnknownArgumentError, UnknownKeywordError
from x_transformers.forward_pass.names import PASSES_ON
from x_transformers.full_bandwidth import FullBandwidth
from x_transformers.gpt_lejepa import LatentAutoregressive
from x_transformers.gpt_vae import GPTVAE
from x_transformers.next_latent_wrapper import NextLatentWrapper
from x_transformers.options.configured import Configured
from x_transformers.options.suggestions import OTHER_LIBRARIES

CALLED = ("forward", "generate", "stream", "beam_search")
BY_PYTHON = {"RMSNorm", "AdaptiveRMSNorm"}
"""Modules of two arguments, whose unknown ones Python itself refuses where they were written."""
PUBLIC = {name: each for name, each in vars(package).items() if name in package.__all__ and inspect.isclass(each)}
CALLS = [
    (name, method)
    for name, cls in PUBLIC.items()
    if name not in {"AttentionLayers", *BY_PYTHON}
    for method in dir(cls)
    if method.startswith(CALLED) and callable(getattr(cls, method))
]


def wrapper() -> AutoregressiveWrapper:
    return AutoregressiveWrapper(net())


def required(function: Callable[..., Any]) -> list[None]:
    """Nothing for each argument that has no default: names are checked before values."""
    entries = inspect.signature(function).parameters.values()
    return [None for entry in entries if entry.kind is entry.POSITIONAL_OR_KEYWORD and entry.default is entry.empty]


@pytest.mark.parametrize(("name", "method"), CALLS)
def test_every_public_call_refuses_an_unknown_name(name: str, method: str) -> None:
    make, valid = CONSTRUCTORS[name]
    call = getattr(make(**valid()), method)
    with pytest.raises(UnknownArgumentError, match=rf"^{name}[\w.]*: unknown argument `zzz`\.$"):
        call(*required(call), zzz=1)
    with pytest.raises(TypeError, match="`zzz`"):
        call(*required(call), zzz=None)


# two take any keyword, as those of x-transformers do
@pytest.mark.parametrize(
    "name", [name for name in CONSTRUCTORS if name not in ("AlibiPositionalBias", "SimpleRMSNorm")]
)
def test_every_constructor_refuses_an_unknown_name(name: str) -> None:
    make, valid = CONSTRUCTORS[name]
    by_python = ("layer_schedule", "Muon", "grow_param_tokens_")
    with pytest.raises(TypeError if name in by_python else UnknownKeywordError, match="zzz"):
        make(**valid(), zzz=1)


@pytest.mark.parametrize("method", ["forward", "generate", "stream", "beam_search"])
def test_signatures_name_what_is_taken(method: str) -> None:
    """`**unknown` is for messages only."""
    for cls in (Decoder, Attention, Attend, AutoregressiveWrapper):
        if method in dir(cls):
            assert "unknown" not in inspect.signature(getattr(cls, method)).parameters


FILTER = r'`filter_logits_fn = "{0}", filter_kwargs = {{'
SENTENCES: dict[str, tuple[Callable[[], Any], str]] = {
    "mask of a model": (lambda: net()(ids(), attention_mask=None), "TransformerWrapper: .* It is `mask` here"),
    "ids of a model": (lambda: net()(input_ids=ids()), "unknown argument `input_ids`. It is `x` here"),
    "mask of a loss": (lambda: wrapper()(ids(), attention_mask=None), "AutoregressiveWrapper: .* It is `mask` here"),
    "labels": (lambda: wrapper()(ids(), labels=ids()), "`labels`. A training wrapper .* takes its targets from `x`"),
    "typo of a loss": (lambda: wrapper()(ids(), prepend_embed=None), r"Did you mean `prepend_embeds`\?"),
    "option of generation": (lambda: wrapper()(ids(), temperature=1), "belongs to `AutoregressiveWrapper.generate`"),
    "top_p": (lambda: wrapper().generate(ids(), 2, top_p=0.9), FILTER.format("top_p")),
    "top_k of a stream": (lambda: wrapper().stream(ids(), 2, top_k=5), FILTER.format("top_k")),
    "length": (lambda: wrapper().generate(ids(), max_new_tokens=2), "`max_new_tokens`. It is `seq_len` here"),
    "prompts": (lambda: wrapper().generate(input_ids=ids(), seq_len=2), "It is `prompts` here"),
    "end": (lambda: wrapper().generate(ids(), 2, eos_token_id=3), "It is `eos_token` here"),
    "beams of generate": (lambda: wrapper().generate(ids(), 2, beams=3), "`AutoregressiveWrapper.beam_search`"),
    "beams": (lambda: wrapper().beam_search(ids(), 2, num_beams=3), "It is `beams` here"),
    "two": (lambda: wrapper().generate(ids(), 2, zzz=1, top_p=1), "`zzz`. unknown argument `top_p`. Filters"),
    "option of the stack": (lambda: net()(ids(), heads=4), "`heads`. It belongs to the Decoder"),
    "stack": (lambda: decoder()(features(2, 3, 16), embed_ids=None), "belongs to `TransformerWrapper.forward`"),
    "source": (
        lambda: XTransformer(**CONSTRUCTORS["XTransformer"][1]()).generate(ids(), ids(), 2, context=None),
        "XTransformer.generate: unknown argument `context`",
    ),
}


@pytest.mark.parametrize("case", SENTENCES)
def test_calls_say_what_to_write(case: str) -> None:
    run, words = SENTENCES[case]
    with pytest.raises(UnknownArgumentError, match=words):
        run()


KEYWORDS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "everything": (
        lambda: Decoder(d_model=64, n_layers=2, num_heads=4),  # type: ignore[call-arg]
        ("`d_model`. It is `dim` here.", "`n_layers`. It is `depth` here.", "It is `heads` here.", "`dim` is missing"),
    ),
    "key/value heads": (lambda: decoder(kv_heads=1), ("`kv_heads`. It is `attn_kv_heads` here.",)),
    "without prefix": (lambda: decoder(sublayer_dropout=0.1), ("`attn_sublayer_dropout` or `ff_sublayer_dropout`",)),
    "dropout": (lambda: decoder(dropout=0.1), ("`attn_dropout` and `ff_dropout` of the stack",)),
    "keyword of the model": (lambda: decoder(num_tokens=9), ("It belongs to the TransformerWrapper.",)),
    "keyword of the stack": (lambda: net(rotary_pos_emb=True), ("It belongs to the Decoder.",)),
    "almost a keyword of the stack": (lambda: net(rotary_pos_embs=True), ("`rotary_pos_emb` of the Decoder?",)),
    "vocabulary": (
        lambda: TransformerWrapper(vocab_size=9, attn_layers=decoder()),  # type: ignore[call-arg]
        ("`vocab_size`. It is `num_tokens` here.", "missing a required argument"),
    ),
    "no stack": (
        lambda: TransformerWrapper(num_tokens=9, max_seq_len=8, dim=16),  # type: ignore[call-arg]
        ("`dim`. It belongs to the Decoder.", "'attn_layers'"),
    ),
    "model": (lambda: AutoregressiveWrapper(model=net()), ("It is `net` here.",)),  # type: ignore[call-arg]
    "attention": (lambda: Attention(16, n_head=2), ("It is `heads` here.",)),
    "halves": (
        lambda: XTransformer(**CONSTRUCTORS["XTransformer"][1](), pad_id=0),
        ("It is `pad_value` here.", "begin with `enc_` or `dec_`"),
    ),
}


@pytest.mark.parametrize("case", KEYWORDS)
def test_constructors_say_what_to_write(case: str) -> None:
    run, sentences = KEYWORDS[case]
    with pytest.raises(ConfigError) as error:
        run()
    assert isinstance(error.value, UnknownKeywordError)
    for words in sentences:
        assert words in str(error.value)


def test_every_method_says_who_takes_its_keywords() -> None:
    """Also those of modules that the package does not export; PyTorch calls the LSTM."""
    for module in pkgutil.walk_packages(package.__path__, "x_transformers."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for cls in Configured._classes.values():
        for name, method in vars(cls).items():
            if cls.__module__.startswith("x_transformers.") and name.startswith(CALLED) and callable(method):
                takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(method).parameters.values())
                plain = inspect.unwrap(method)
                refuses = plain is not method or "unknown" in plain.__code__.co_varnames
                assert hasattr(method, PASSES_ON) if takes_any else refuses or cls.__name__ == "SyntheticDataGenerator"


def test_translations_name_what_exists() -> None:
    names = {name for cls in PUBLIC.values() for name in inspect.signature(cls).parameters}
    for cls in PUBLIC.values():
        for method in CALLED:
            if method in dir(cls):
                names |= set(inspect.signature(getattr(cls, method)).parameters)
    for theirs, translations in OTHER_LIBRARIES.items():
        assert translations
        for each in translations:
            assert set(each.names) <= names, theirs


# what takes more than this library knows


def test_arguments_of_inner_modules_pass() -> None:
    prefix = net(lambda: PrefixDecoder(**CONSTRUCTORS["PrefixDecoder"][1]()))
    out = prefix(ids(), prefix_attn_len=2)
    assert torch.isfinite(AutoregressiveWrapper(prefix)(ids(), prefix_attn_len=2))
    assert out.shape[-1] == 9
    other = net(lambda: decoder(cross_attend=True))
    context = {"context": features(2, 5, 16), "context_mask": None}
    AutoregressiveWrapper(other).generate(ids(), 1, **context)
    ContinuousAutoregressiveWrapper(vectors())(features(2, 6, 6), lens=torch.tensor([6, 3]))
    NonAutoregressiveWrapper(net(encoder), mask_id=8)(ids(2, 8) % 8, mask=None)


def test_modules_of_users_take_what_they_like() -> None:
    class Net(TransformerWrapper):
        def forward(self, x: Tensor, scale: float = 1.0, **kwargs: Any) -> Any:
            return super().forward(x, **kwargs) * scale

    class Stack(Decoder):
        def forward(self, x: Tensor, extra: float = 0.0, **kwargs: Any) -> Any:
            return super().forward(x + extra, **kwargs)

    class Training(AutoregressiveWrapper):
        def forward(self, x: Tensor, factor: float = 1.0, **kwargs: Any) -> Any:
            return super().forward(x, **kwargs) * factor

    model = Net(num_tokens=9, max_seq_len=8, attn_layers=Stack(dim=16, depth=1, heads=2))
    assert model(ids(), scale=2.0, extra=1.0).isfinite().all()
    assert Training(model)(ids(), factor=2.0, scale=0.5, extra=1.0).isfinite()
    with pytest.raises(UnknownArgumentError, match="Stack: unknown argument `zzz`"):
        Training(model)(ids(), zzz=1)
    replaced = net()
    plain = replaced.forward
    replaced.forward = lambda x, *args, anything=None, **kwargs: plain(x, *args, **kwargs)
    assert AutoregressiveWrapper(replaced)(ids(), anything=3).isfinite()


def test_a_call_that_lacks_an_argument_stays_an_error_of_python() -> None:
    with pytest.raises(TypeError, match="seq_len"):
        wrapper().generate(ids())
    with pytest.raises(TypeError, match="net"):
        AutoregressiveWrapper()  # type: ignore[call-arg]


def test_names_within_a_graph() -> None:
    model = nn.Sequential(decoder())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(features(1, 4, 16)), model(features(1, 4, 16)))


# wrappers that their own modules export


def test_wrappers_outside_of_the_package_root() -> None:
    dims = {"dim": 16, "heads": 2, "attn_dim_head": 8}
    variational = GPTVAE(num_tokens=9, depth=1, enc_depth=1, max_seq_len=8, dim_latent=4, **dims)
    scaled = net(lambda: decoder(depth_scale_residual=True), tie_embedding=True, post_emb_norm=True)
    calls = [
        NextLatentWrapper(net(), dim=16),
        LatentAutoregressive(net(), dim=16),
        (bandwidth := FullBandwidth(scaled)),
        bandwidth.generate,
        variational.generate,
    ]
    for call in calls:
        with pytest.raises(UnknownArgumentError, match=r"unknown argument `attention_mask`\. It is `mask` here"):
            call(*required(call.forward if isinstance(call, nn.Module) else call), attention_mask=None)
