"""What generation returns serves training: no tensor of inference mode gets out, whatever the model and the cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from catalog import VOCABULARY, Case, cases, close, further_ids, name_of, one_of_each, other_inputs, perturb, tokens
from torch import Tensor, nn

from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

PROMPT, NEW = 5, 3


def tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor that can be reached from a value, except through modules."""
    if id(value) in seen or isinstance(value, (type, str, int, float, nn.Module)):
        return
    seen.add(id(value))
    held: Any = ()
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        held = value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        held = value
    elif hasattr(value, "__dict__"):
        held = vars(value).values()
    for each in held:
        yield from tensors(each, seen)


def arguments(model: TransformerWrapper, ids: Tensor) -> dict[str, Any]:
    given = other_inputs(model, ids)
    if "embed_ids" in given:
        given["embed_ids"] = further_ids(model)
    return given


@pytest.mark.parametrize(("stack", "case"), cases("decoder", "cross", exempt="generation"), ids=name_of)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_records_serve_a_pass_with_gradients(stack: str, case: Case, cache: str) -> None:
    model = case.build(stack)
    ids = tokens(2, PROMPT)
    new, record = AutoregressiveWrapper(model).generate(
        ids, NEW, temperature=0.0, cache=cache, return_intermediates=True, **arguments(model, ids)
    )
    assert not new.is_inference()
    assert not any(t.is_inference() for t in tensors(record, set()))
    if not model.can_cache_kv:
        assert record is None
        return
    whole = torch.cat((ids, new), dim=1)
    read = PROMPT + NEW - 1
    given = other_inputs(model, whole)
    given["input_not_include_cache"] = True
    if "embed_ids" in given:
        given["embed_ids"] = {name: t[:, read:] for name, t in given["embed_ids"].items()}
    before = {id(t): t.clone() for t in tensors(record.cache, set())}
    out = model(whole[:, read:], cache=record, **given)
    out.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        close(out, model(whole, **other_inputs(model, whole))[:, -1:], 1e-4)
    for t in tensors(record.cache, set()):
        assert id(t) not in before or torch.equal(t, before[id(t)]), "training changed a record"


WAYS: dict[str, dict[str, Any]] = {
    "an amateur": {"amateur_model": "another"},
    "a draft model": {"draft_model": "another"},
    "prompt lookup": {"prompt_lookup": 2},
    "an end": {"eos_token": 3},
    "compiled": {"compile": {"backend": "eager"}},
    "compiled, ragged": {"compile": {"backend": "eager"}, "prompt_lens": [5, 3]},
    "ragged": {"prompt_lens": [5, 3]},
    "a filter": {"temperature": 1.0, "filter_logits_fn": "min_p"},
    "no cache": {"cache_kv": False},
    "no tokens": {"seq_len": 0},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_generate_returns_ordinary_tensors(way: str) -> None:
    torch.manual_seed(0)

    def build() -> TransformerWrapper:
        layers = Decoder(dim=16, depth=1, heads=2, rotary_pos_emb=True, attn_qk_rmsnorm=True, verbose=False)
        return perturb(TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=16, attn_layers=layers))

    options = {"seq_len": NEW, "temperature": 0.0, "return_intermediates": True, **WAYS[way]}
    options |= {name: build() for name, value in options.items() if isinstance(value, str) and value == "another"}
    new, record = AutoregressiveWrapper(build()).generate(tokens(2, PROMPT), **options)
    found = list(tensors((new, record), set()))
    assert not any(t.is_inference() for t in found)
    assert len(found) > 1 or way in ("no cache", "no tokens")


@pytest.mark.parametrize(("stack", "case"), one_of_each("decoder", exempt="generation"), ids=name_of)
def test_a_continued_record_is_ordinary_too(stack: str, case: Case) -> None:
    """A record, given as the cache of the next generation, which returns one again."""
    model = case.build(stack)
    if not model.can_cache_kv:
        pytest.skip("this model has no cache")
    wrapper, ids = AutoregressiveWrapper(model), tokens(2, PROMPT)
    given = arguments(model, ids)
    one, record = wrapper.generate(ids, NEW, temperature=0.0, return_intermediates=True, **given)
    longer = torch.cat((ids, one), dim=1)
    two, again = wrapper.generate(longer, NEW, temperature=0.0, cache=record, return_intermediates=True, **given)
    assert torch.equal(two, wrapper.generate(longer, NEW, temperature=0.0, **given))
    assert not any(t.is_inference() for t in tensors((record, again), set()))
