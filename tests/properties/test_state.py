"""Saving: state dicts, files, configs, deep copies and pickles all restore the same model."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from catalog import BASE, Case, call, cases, close, name_of, one_of_each, perturb, tokens
from safetensors.torch import load_file, save_file

from x_transformers import TransformerWrapper
from x_transformers.errors import ConfigError, StateDictError

EVERY = pytest.mark.parametrize(("stack", "case"), cases("decoder", "encoder", "cross", exempt="state"), ids=name_of)
DECODERS = pytest.mark.parametrize(("stack", "case"), one_of_each("decoder", exempt="state"), ids=name_of)


@EVERY
@torch.no_grad()
def test_config_and_state_dict_rebuild_the_model(stack: str, case: Case, tmp_path: Path) -> None:
    model = case.build(stack)
    ids = tokens(2, 6)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = json.loads(json.dumps(model.config))
    written = json.dumps(config)
    # objects are asked for by name
    objects = {name: value for name, value in case.keywords.items() if f'{{"$object": "{name}"}}' in written}
    again = TransformerWrapper.from_config(config, **objects).eval()
    assert again.config == model.config
    missing = again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert not missing.missing_keys
    assert not missing.unexpected_keys
    assert torch.equal(call(again, ids), call(model, ids))


@DECODERS
@torch.no_grad()
def test_copies_and_pickles_are_independent(stack: str, case: Case) -> None:
    model = case.build(stack)
    ids = tokens(2, 6)
    wanted = call(model, ids)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(call(twin, ids), wanted)
        perturb(twin)
        assert not torch.allclose(call(twin, ids), wanted)
        assert torch.equal(call(model, ids), wanted)


@DECODERS
def test_names_are_unique_and_every_tensor_is_saved_once(stack: str, case: Case) -> None:
    model = case.build(stack)
    tensors = list(model.state_dict().values())
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)
    assert {name for name, _ in model.named_parameters()} <= model.state_dict().keys()


@DECODERS
@torch.no_grad()
def test_a_mismatched_state_changes_nothing(stack: str, case: Case) -> None:
    model = case.build(stack)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = perturb(copy.deepcopy(model)).state_dict()
    names = [name for name, _ in model.named_parameters()]
    lost, bent = names[0], names[-1]
    del state[lost]
    state[bent] = torch.zeros(*state[bent].shape, 2)
    state["no.such.weight"] = torch.zeros(1)
    with pytest.raises(StateDictError) as error:
        model.load_state_dict(state)
    for words in (f"missing: {lost}", "unexpected: no.such.weight", f"wrong shape: {bent}"):
        assert words in str(error.value)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@torch.no_grad()
def test_loading_without_strictness_takes_matching_tensors() -> None:
    model = BASE.build()
    state = {name: torch.ones_like(t) for name, t in model.state_dict().items() if "pos_emb" not in name}
    result = model.load_state_dict({**state, "no.such.weight": torch.zeros(1)}, strict=False)
    assert result.missing_keys == ["pos_emb.emb.weight"]
    assert result.unexpected_keys == ["no.such.weight"]
    assert all((p == 1).all() for name, p in model.named_parameters() if "pos_emb" not in name)


@DECODERS
@torch.no_grad()
def test_moving_and_casting_round_trips(stack: str, case: Case) -> None:
    """Halving and back loses bits of weights, and nothing of frequencies, slopes or positions."""
    model = case.build(stack)
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16().float())
    ids = tokens(2, 6)
    wanted = call(model, ids)
    close(call(model.bfloat16().float(), ids), wanted, 1e-6)


def test_a_config_of_another_class_is_refused() -> None:
    with pytest.raises(ConfigError, match="describes a Decoder, not a TransformerWrapper"):
        TransformerWrapper.from_config(BASE.build().attn_layers.config)
