"""State dicts of wrapped models: names with something in front of them, and names that lack it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fuzz import net
from torch import nn

from x_transformers import AutoregressiveWrapper, Decoder
from x_transformers.errors import StateDictError

PREFIXES = (
    "module.",
    "_orig_mod.",
    "net.",
    "model.",
    "module.net.",
    "model.module.",
    "_orig_mod.module.net.",
    "module._orig_mod.model.net.",
)


def same(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_names_of_wrappers_are_recognized(prefix: str) -> None:
    source, model = net(), net()
    state = {prefix + name: t for name, t in source.state_dict().items()}
    model.load_state_dict(state)
    assert same(model, source)


@pytest.mark.parametrize("prefix", ["", *PREFIXES])
def test_wrappers_load_the_model_in_them(prefix: str) -> None:
    source, wrapper = AutoregressiveWrapper(net()), AutoregressiveWrapper(net())
    wrapper.load_state_dict({prefix + name: t for name, t in source.net.state_dict().items()})
    assert same(wrapper, source)


@pytest.mark.parametrize("prefix", [prefix for prefix in PREFIXES if "net" not in prefix])
def test_names_in_front_of_those_of_a_wrapper(prefix: str) -> None:
    source, wrapper = AutoregressiveWrapper(net()), AutoregressiveWrapper(net())
    wrapper.load_state_dict({prefix + name: t for name, t in source.state_dict().items()})
    assert same(wrapper, source)


def test_versions_go_with_the_names() -> None:
    """`state_dict` notes how residual streams are mixed, by the name of the module."""
    options: dict[str, Any] = {"num_residual_streams": 2, "hyper_conn_reference_mix": True}

    def build(**more: Any) -> Decoder:
        return Decoder(dim=16, depth=1, heads=2, verbose=False, num_residual_streams=2, **more)

    source = build(hyper_conn_reference_mix=True)
    for make in (lambda stack: nn.ModuleDict({"model": stack}), lambda stack: nn.ModuleDict({"net": stack})):
        model = build()
        model.load_state_dict(make(source).state_dict())
        assert model.reference_mix, options


def test_a_name_of_the_model_is_no_wrapper() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

    wrapper = AutoregressiveWrapper(net())
    with pytest.raises(StateDictError, match="missing"):
        wrapper.load_state_dict({f"net.{name}": t for name, t in Own().state_dict().items()})


def test_other_names_in_front_are_named() -> None:
    state = {f"generator.{name}": t for name, t in net().state_dict().items()}
    with pytest.raises(StateDictError, match=r"All names begin with `generator\.`, which is no part of it; remove"):
        net().load_state_dict(state)
    with pytest.raises(StateDictError, match="Build it with the options"):
        net(emb_dim=8).load_state_dict(net().state_dict())


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_checkpoints_are_named(key: str) -> None:
    with pytest.raises(StateDictError, match=f"state dicts under '{key}'; load the one of the model"):
        net().load_state_dict({key: net().state_dict(), "step": 3})
