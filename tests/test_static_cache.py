"""A static cache: what eager and compiled passes read of it, and where it ends."""

import pytest
import torch
from catalog import close, tokens
from torch import Tensor

from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
from x_transformers.cache import KVCache, StaticCache
from x_transformers.decoding.plain_kernels import PlainKernels, plain_kernels_serve
from x_transformers.errors import InputError


def model(**keywords: object) -> TransformerWrapper:
    torch.manual_seed(0)
    layers = Decoder(dim=24, depth=2, heads=2, attn_dim_head=12, verbose=False, **keywords)
    return TransformerWrapper(num_tokens=32, max_seq_len=24, attn_layers=layers).eval()


def read(net: TransformerWrapper, ids: Tensor, cache: KVCache, **arguments: object) -> tuple[Tensor, StaticCache]:
    logits, record = net(ids, cache=cache, input_not_include_cache=True, return_intermediates=True, **arguments)
    assert isinstance(record.cache, StaticCache)
    return logits, record.cache


@torch.no_grad()
def test_eager_passes_read_filled_places_alone() -> None:
    net, ids = model(), tokens(2, 12)
    logits, cache = read(net, ids[:, :8], net.attn_layers.static_cache(2, 20))
    assert (cache.shown, int(cache.filled)) == (8, 8)
    for place in range(8, 12):
        # whatever lies in the empty places is not looked at
        for entry in cache.entries:
            for buffer in entry.grown.values():
                buffer[..., place:, :] = torch.nan
        step, cache = read(net, ids[:, place : place + 1], cache)
        logits = torch.cat((logits, step), dim=1)
    assert cache.shown == 12
    close(logits, net(ids))


@torch.no_grad()
def test_passes_of_fixed_shape_read_every_place() -> None:
    net, ids = model(), tokens(2, 12)
    _, cache = read(net, ids[:, :8], net.attn_layers.static_cache(2, 20))
    cache.shown = None
    logits, cache = read(net, ids[:, 8:], cache)
    assert cache.shown is None
    assert len(cache.key_index(ids.device)) == 20
    close(logits, net(ids)[:, 8:])


@torch.no_grad()
def test_a_bias_covers_every_place() -> None:
    net, ids = model(), tokens(2, 12)
    bias = torch.randn(12, 20)
    _, cache = read(net, ids[:, :8], net.attn_layers.static_cache(2, 20), attn_bias=bias[:8, :8])
    logits, _ = read(net, ids[:, 8:], cache, attn_bias=bias[8:])
    close(logits, net(ids, attn_bias=bias[:, :12])[:, 8:])


@torch.no_grad()
def test_a_full_cache_says_so() -> None:
    net, ids = model(), tokens(1, 12)
    _, cache = read(net, ids[:, :8], net.attn_layers.static_cache(1, 10))
    with pytest.raises(InputError, match="static cache of 10 that holds 8; make it larger"):
        read(net, ids[:, 8:], cache)


@torch.no_grad()
def test_reset_starts_anew() -> None:
    net, ids = model(), tokens(1, 6)
    _, cache = read(net, tokens(1, 8), net.attn_layers.static_cache(1, 10))
    logits, cache = read(net, ids, cache.reset())
    assert cache.shown == 6
    close(logits, net(ids))


def test_few_tokens_use_plain_kernels() -> None:
    assert plain_kernels_serve(model())
    assert not plain_kernels_serve(model().bfloat16())
    before = torch.backends.mkldnn.enabled
    with PlainKernels():
        assert not torch.backends.mkldnn.enabled
    assert torch.backends.mkldnn.enabled == before


def test_plain_kernels_end_with_the_last_that_uses_them() -> None:
    """Two threads may overlap in any order."""
    before, (first, second) = torch.backends.mkldnn.enabled, (PlainKernels(), PlainKernels())
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not torch.backends.mkldnn.enabled
    second.__exit__(None, None, None)
    assert torch.backends.mkldnn.enabled == before


@pytest.mark.parametrize("found", [True, False])
def test_an_abandoned_or_failing_stream_leaves_kernels_as_they_were(found: bool) -> None:
    before, net = torch.backends.mkldnn.enabled, model()
    try:
        torch.backends.mkldnn.enabled = found
        seen = []
        handle = net.register_forward_pre_hook(lambda *_: seen.append(torch.backends.mkldnn.enabled))
        stream = AutoregressiveWrapper(net).stream(tokens(1, 4), 5)
        next(stream), next(stream)
        assert seen == [False, False], "otherwise nothing is tested"
        assert torch.backends.mkldnn.enabled == found
        stream.close()
        handle.remove()

        def fails(*_: object) -> None:
            assert not torch.backends.mkldnn.enabled
            raise RuntimeError("in the middle")

        net.register_forward_pre_hook(fails)
        with pytest.raises(RuntimeError, match="in the middle"):
            AutoregressiveWrapper(net).generate(tokens(1, 4), 3)
        assert torch.backends.mkldnn.enabled == found
    finally:
        torch.backends.mkldnn.enabled = before


def test_generation_leaves_kernels_as_they_were() -> None:
    before = torch.backends.mkldnn.enabled
    AutoregressiveWrapper(model()).generate(tokens(1, 4), 3, cache="static")
    assert torch.backends.mkldnn.enabled == before
