"""State dicts are loaded as a whole or not at all: also by parts, with hooks, wrappers, versions and odd entries."""

import copy
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from catalog import BASE
from torch import Tensor, nn

import x_transformers
from x_transformers import AttentionPool, AutoregressiveWrapper, Decoder, TransformerWrapper
from x_transformers import x_transformers as names
from x_transformers.errors import StateDictError
from x_transformers.modules.state_dict import LoadsWhole, load_state


def net() -> TransformerWrapper:
    layers = Decoder(dim=16, depth=1, heads=2, verbose=False)
    return TransformerWrapper(num_tokens=9, max_seq_len=8, attn_layers=layers)


def clones(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in module.state_dict().items()}


def unchanged(module: nn.Module, before: dict[str, Tensor]) -> bool:
    after = module.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[name], t) for name, t in before.items())


LAST = "to_logits.weight"
ODD: dict[str, Callable[[Tensor], Any]] = {
    "meta": lambda t: t.to("meta"),
    "numpy": lambda t: t.numpy(),
    "sparse": lambda t: t.to_sparse(),
    "list": lambda t: t.tolist(),
    "None": lambda t: None,
    "integers": lambda t: t.to(torch.int32),
    "booleans": lambda t: t > 0,
    "complex numbers": lambda t: t.to(torch.complex64),
    "another shape": lambda t: t[:-1],
    "more axes": lambda t: t[None],
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("odd", ODD)
def test_an_odd_entry_is_named_and_nothing_changes(odd: str, strict: bool) -> None:
    model = net()
    before = clones(model)
    state = net().state_dict()
    state[LAST] = ODD[odd](state[LAST].detach())
    with pytest.raises(StateDictError, match=LAST):
        model.load_state_dict(state, strict=strict)
    assert unchanged(model, before)


@pytest.mark.parametrize("state", [None, 5, [("a", 1)], {5: torch.zeros(1)}, {None: torch.zeros(1)}])
def test_what_is_no_state_dict(state: Any) -> None:
    model = net()
    before = clones(model)
    with pytest.raises(StateDictError, match="maps names to tensors"):
        model.load_state_dict(state, strict=False)
    assert unchanged(model, before)


def public_modules() -> list[type]:
    for module in pkgutil.walk_packages(x_transformers.__path__, "x_transformers."):
        importlib.import_module(module.name)
    named = {id(value): value for value in vars(names).values() if inspect.isclass(value)}
    ours = (value for value in named.values() if value.__module__.startswith("x_transformers."))
    return [value for value in ours if issubclass(value, nn.Module)]


def test_every_public_module_loads_as_a_whole() -> None:
    assert [one.__name__ for one in public_modules() if not issubclass(one, LoadsWhole)] == []


@pytest.mark.parametrize("build", [lambda: AttentionPool(16, heads=2), lambda: names.LayerNorm(16), net])
def test_parts_used_by_themselves(build: Callable[[], nn.Module]) -> None:
    part, state = build(), build().state_dict()
    before = clones(part)
    last = list(state)[-1]
    state[last] = state[last][..., None]
    with pytest.raises(StateDictError, match=last):
        part.load_state_dict(state)
    assert unchanged(part, before)


def strip(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in [key for key in state if key.startswith("their.")]:
        state[key.removeprefix("their.")] = state.pop(key)


def test_pre_hooks_run_once_and_before_anything_is_checked() -> None:
    model, other, calls = net(), net(), []
    model.register_load_state_dict_pre_hook(strip)
    model.token_emb.register_load_state_dict_pre_hook(lambda module, state, prefix, *_: calls.append(sorted(state)))
    model.load_state_dict({f"their.{key}": value for key, value in other.state_dict().items()})
    assert unchanged(model, other.state_dict())
    assert calls == [["token_emb.emb.weight"]]
    before = clones(model)
    with pytest.raises(StateDictError, match="missing: to_logits"):
        model.load_state_dict({f"their.{key}": value for key, value in net().state_dict().items() if key != LAST})
    assert unchanged(model, before)
    model.load_state_dict({f"their.{key}": value for key, value in other.state_dict().items()})  # hooks are still there


class Versioned(nn.Linear):
    """A head of a user's whose second version halves the weights of the first."""

    _version = 2

    def _load_from_state_dict(self, state: Any, prefix: str, about: Any, *rest: Any) -> None:
        if about.get("version", 1) < 2:
            state[prefix + "weight"] = state[prefix + "weight"] / 2
        super()._load_from_state_dict(state, prefix, about, *rest)  # type: ignore[misc]


def with_head() -> TransformerWrapper:
    layers = Decoder(dim=16, depth=1, heads=2, verbose=False)
    return TransformerWrapper(num_tokens=9, max_seq_len=8, attn_layers=layers, to_logits=Versioned(16, 9, bias=False))


def test_versions_reach_the_modules() -> None:
    model, other = with_head(), with_head()
    state = other.state_dict()
    model.load_state_dict(state)
    assert torch.equal(model.to_logits.weight, other.to_logits.weight)
    model.load_state_dict(dict(state))  # without versions, as from a file
    assert torch.equal(model.to_logits.weight, other.to_logits.weight / 2)


def test_a_module_that_refuses_late_changes_nothing() -> None:
    model = with_head()
    before = clones(model)
    state = with_head().state_dict()
    state[LAST] = torch.zeros(4, 4)  # only the module itself can say what it reads
    for assign in (False, True):
        kept = dict(model.named_parameters())
        with pytest.raises(StateDictError, match=LAST):
            model.load_state_dict(state, assign=assign)
        assert unchanged(model, before)
        assert all(kept[name] is p for name, p in model.named_parameters())


def test_a_post_hook_that_refuses_changes_nothing() -> None:
    model = net()
    before = clones(model)

    def refuse(*_: Any) -> None:
        raise ValueError("not these weights")

    model.register_load_state_dict_post_hook(refuse)
    with pytest.raises(StateDictError, match="not these weights"):
        model.load_state_dict(net().state_dict())
    assert unchanged(model, before)


def compiled_inside() -> AutoregressiveWrapper:
    model = AutoregressiveWrapper(net())
    model.net.attn_layers = torch.compile(model.net.attn_layers)
    return model


WRAPPED: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: AutoregressiveWrapper(net()),
    "compiled": lambda: torch.compile(AutoregressiveWrapper(net())),  # type: ignore[return-value]
    "compiled inside": compiled_inside,
    "compiled twice": lambda: torch.compile(compiled_inside()),  # type: ignore[return-value]
    "parallel": lambda: nn.DataParallel(AutoregressiveWrapper(net())),
    "parallel and compiled": lambda: nn.DataParallel(torch.compile(compiled_inside())),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("source", WRAPPED)
def test_states_of_wrapped_models(source: str) -> None:
    """Of `torch.compile`, and of data parallel training, which names its module as DDP does."""
    one = WRAPPED[source]()
    for other in (WRAPPED["plain"](), WRAPPED["compiled inside"]()):
        other.load_state_dict(one.state_dict())
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q)


def test_any_module_can_be_loaded_as_a_whole() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))
    before = clones(model)
    state = copy.deepcopy(model).state_dict()
    state = {name: t + 1 for name, t in state.items()}
    with pytest.raises(StateDictError, match=r"1\.bias"):
        load_state(model, {**state, "1.bias": torch.zeros(5)})
    assert unchanged(model, before)
    load_state(model, state)
    assert unchanged(model, state)


def test_assigned_tensors_become_the_parameters() -> None:
    model, state = BASE.build(), {name: t.double() for name, t in BASE.build().state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert all(p.dtype == torch.float64 for p in model.parameters())
