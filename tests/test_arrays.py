"""Ids may be lists or arrays of numpy, wherever tokens are given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fuzz import CONSTRUCTORS, VOCABULARY, encoder, features, net, numbers, vectors

from x_transformers import (
    DPO,
    AutoregressiveWrapper,
    BeliefStateWrapper,
    ContinuousAutoregressiveWrapper,
    EntropyBasedTokenizer,
    MultiInputTransformerWrapper,
    NonAutoregressiveWrapper,
    XLAutoregressiveWrapper,
    XTransformer,
    XValAutoregressiveWrapper,
)
from x_transformers.errors import InputError

IDS = [[3, 1, 4, 1, 5], [2, 7, 1, 8, 2]]
TENSOR = torch.tensor(IDS)
READ_ONLY = np.array(IDS, dtype=np.uint16)
READ_ONLY.flags.writeable = False
FORMS: dict[str, Any] = {
    "lists": IDS,
    "tuples": tuple(map(tuple, IDS)),
    "array": np.array(IDS),
    "read-only array of 16 bits": READ_ONLY,
    "reversed array": np.array(IDS)[:, ::-1][:, ::-1],
    "big-endian array": np.array(IDS, dtype=">i4"),
    "array of whole fractions": np.array(IDS, dtype=np.float64),
    "list of arrays": [np.array(row) for row in IDS],
    "list of tensors": [torch.tensor(row) for row in IDS],
    "lists of numbers of numpy": [[np.int32(each) for each in row] for row in IDS],
}


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    torch.manual_seed(0)
    made = {
        "model": net(),
        "wrapper": AutoregressiveWrapper(net()),
        "segments": XLAutoregressiveWrapper(net(max_mem_len=8)),
        "numbers": XValAutoregressiveWrapper(numbers()),
        "states": BeliefStateWrapper(net()),
        "translation": XTransformer(**CONSTRUCTORS["XTransformer"][1]()),
        "tokenizer": EntropyBasedTokenizer(net(), entropy_threshold=1.0),
        "preference": DPO(net()),
        "vectors": ContinuousAutoregressiveWrapper(vectors()),
    }
    return {name: model.eval() for name, model in made.items()}


def calls(models: dict[str, Any], x: Any) -> dict[str, Any]:
    """What every call over tokens returns for ids in some form."""
    greedy = {"temperature": 0.0}
    torch.manual_seed(1)
    return {
        "pass": models["model"](x),
        "loss": models["wrapper"](x),
        "generate": models["wrapper"].generate(x, 3, **greedy),
        "stream": torch.stack(list(models["wrapper"].stream(x, 3, **greedy)), dim=-1),
        "beams": models["wrapper"].beam_search(x, 3, beams=2),
        "segments": models["segments"](x),
        "in segments": models["segments"].generate(x, 3, **greedy),
        "numbers": models["numbers"](x, features(2, 5)),
        "states": models["states"](x),
        "suffix": models["states"].generate_with_suffix_cond(x, 2, **greedy),
        "backwards": models["states"].generate_with_suffix_cond(x, 2, decode_backwards=True, **greedy),
        "translation": models["translation"](x, x),
        "translate": models["translation"].generate(x, x, 3, **greedy),
        "tokenizer": models["tokenizer"](x),
        "preference": models["preference"](x, x, prompt_mask=torch.tensor([[True, False, False, False, False]] * 2)),
    }


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_tensor(models: dict[str, Any], form: str) -> None:
    expected = calls(models, TENSOR)
    for name, found in calls(models, FORMS[form]).items():
        torch.testing.assert_close(found, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_prompts_of_different_lengths(models: dict[str, Any]) -> None:
    wrapper, prompts = models["wrapper"], [[3, 1, 4], [2]]
    expected = wrapper.generate([torch.tensor(each) for each in prompts], 3, temperature=0.0)
    assert torch.equal(wrapper.generate(prompts, 3, temperature=0.0), expected)
    assert torch.equal(wrapper.generate([np.array(each) for each in prompts], 3, temperature=0.0), expected)
    assert torch.equal(wrapper.generate(prompts[0], 3, temperature=0.0), expected[0])
    single = wrapper.generate(np.array(prompts[0]), 3, temperature=0.0)
    assert torch.equal(single, expected[0])
    assert torch.equal(
        wrapper.generate(np.array([IDS]), 2, temperature=0.0)[0], wrapper.generate(IDS, 2, temperature=0.0)
    )


def test_vectors_and_numbers_of_prompts(models: dict[str, Any]) -> None:
    x = torch.randn(2, 3, 6)
    expected = models["vectors"].generate(x, 2)
    for other in (x.tolist(), x.numpy(), x.double().numpy()):
        torch.testing.assert_close(models["vectors"].generate(other, 2), expected)
    model, values = models["numbers"], features(2, 5)
    wanted = model.generate(TENSOR, values, 2, temperature=0.0)
    for tokens, given in ((IDS, values.tolist()), (np.array(IDS), values.numpy()), (IDS, values.numpy())):
        found = model.generate(tokens, list(given) if tokens is IDS else given, 2, temperature=0.0)
        assert torch.equal(found.sampled_token_ids, wanted.sampled_token_ids)
    with pytest.raises(InputError, match="`start_numbers`"):
        model.generate(IDS, [["x"] * 5] * 2, 2)


def test_streams_and_masked_tokens() -> None:
    model = MultiInputTransformerWrapper(num_tokens={"a": 9}, max_seq_len=8, attn_layers=encoder()).eval()
    torch.testing.assert_close(model({"a": IDS}), model({"a": TENSOR}))
    masked = NonAutoregressiveWrapper(net(encoder), mask_id=8).eval()
    losses = []
    for form in (torch.arange(16).reshape(2, 8) % 8, np.arange(16).reshape(2, 8) % 8):
        torch.manual_seed(0)
        losses.append(masked(form).loss)
    assert torch.equal(*losses)


REFUSED: dict[str, Any] = {
    "fractions": [[1.0, 2.0]],
    "words": [["a"]],
    "bools": [[True, False]],
    "ragged": [[1, 2], [3]],
    "mapping": {"a": 1},
    "nothing": None,
    "array of fractions": np.array([[0.5, 1.0]]),
    "array of objects": np.array([[object()]]),
    "array of bools": np.array([[True]]),
    "too large": [[10**30]],
    "text": "abc",
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_is_no_ids_is_refused(models: dict[str, Any], form: str) -> None:
    x = REFUSED[form]
    with pytest.raises(InputError):
        models["model"](x)
    with pytest.raises(InputError):
        models["wrapper"](x)
    if form != "ragged":
        with pytest.raises(InputError):
            models["wrapper"].generate(x, 2)


def test_ids_beyond_the_vocabulary(models: dict[str, Any]) -> None:
    with pytest.raises(IndexError, match=f"0 to {VOCABULARY - 1}"):
        models["wrapper"].generate([1, VOCABULARY], 2)
