"""Options of optimizers in a checkpoint: a load refuses those with which no step can be taken, and takes the others."""

import copy
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoints import equal, everything, failure, net, put
from torch import nn

from x_transformers.checkpoints.plain_data import read_sealed, write_sealed
from x_transformers.checkpoints.training import TRAINING, load_checkpoint, save_checkpoint
from x_transformers.training.optimizers import Muon

Optimizers = dict[str, torch.optim.Optimizer]

KINDS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "Adam": {},
    "AdamW": {"amsgrad": True},
    "Adagrad": {},
    "Adadelta": {},
    "Adamax": {},
    "NAdam": {},
    "RAdam": {},
    "ASGD": {},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Rprop": {},
    "LBFGS": {"lr": 0.1, "line_search_fn": "strong_wolfe"},
    "Adafactor": {},
    "Muon": {},
}
HOSTILE = (-1, 2, 1e30, math.nan)


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.ndim == 2 and min(parameter.shape) > 1]


def build(kind: str, seed: int = 0) -> tuple[nn.Module, Optimizers]:
    """A model and an optimizer of two groups, where it can have two."""
    model = net(seed)
    own = Muon if kind == "Muon" else getattr(torch.optim, kind)
    parameters = matrices(model) if kind == "Muon" else list(model.parameters())
    parts = [parameters] if kind == "LBFGS" else [parameters[:2], parameters[2:]]
    return model, {"one": own([{"params": part} for part in parts], **KINDS[kind])}


def train(model: nn.Module, made: Optimizers) -> None:
    x = torch.arange(5).view(1, 5)

    def closure() -> float:
        model.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss.item()

    made["one"].step(closure)


def places(groups: list[dict[str, Any]]) -> Iterator[tuple[Any, ...]]:
    """Yield the places of all numbers among the options of the last group."""
    last = len(groups) - 1
    for name, value in groups[last]["options"].items():
        inner = value.get("$tuple") if isinstance(value, dict) else None
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield (last, "options", name)
        for i in range(len(inner or ())):
            yield (last, "options", name, "$tuple", i)


@pytest.mark.parametrize("kind", KINDS)
def test_values_that_no_step_can_use(kind: str, tmp_path: Path) -> None:
    """Every number of a group is replaced by others, under a checksum that fits."""
    model, made = build(kind)
    train(model, made)
    path = save_checkpoint(tmp_path, step=1, model=model, optimizers=made, progress={})
    data, refused = read_sealed(path / TRAINING), set()
    model, made = build(kind, seed=1)
    fresh = copy.deepcopy(made["one"].state_dict()), copy.deepcopy(model.state_dict())
    before = everything(model, made)
    numbers = list(places(data["optimizers"]["one"]["groups"]))
    for place in numbers:
        for value in HOSTILE:
            write_sealed(path / TRAINING, put(data, ("optimizers", "one", "groups", *place), value))
            error = failure(path, model, made)
            if error is None:
                train(model, made)
                assert math.isfinite(value)
                made["one"].load_state_dict(fresh[0])
                model.load_state_dict(fresh[1])
                before = everything(model, made)
            else:
                refused.add(place[2])
                assert f"group {place[0]} of the optimizer `one` ({TRAINING})" in str(error)
                assert f"`{place[2]}`" in str(error)
                assert str(path) in str(error)
                assert equal(everything(model, made), before), (place, value)
    assert "lr" in refused
    assert len(numbers) >= 2


def test_the_machine_of_the_run_chooses_the_implementation(tmp_path: Path) -> None:
    """A checkpoint of a run on a GPU, with implementations that a CPU lacks."""
    model, made = build("AdamW")
    train(model, made)
    path = save_checkpoint(tmp_path, step=1, model=model, optimizers=made, progress={})
    data = read_sealed(path / TRAINING)
    for i, name in ((0, "capturable"), (1, "foreach"), (1, "fused")):
        data = put(data, ("optimizers", "one", "groups", i, "options", name), True)
    write_sealed(path / TRAINING, data)
    other, again = build("AdamW", seed=1)
    load_checkpoint(path, model=other, optimizers=again)
    for group, own in zip(again["one"].param_groups, made["one"].param_groups, strict=True):
        assert all(group[name] == own[name] for name in ("capturable", "foreach", "fused"))
    train(other, again)


def test_options_that_a_schedule_added_or_changed(tmp_path: Path) -> None:
    """Among them a learning rate that is a tensor in one of two runs."""
    for ours, theirs in ((0.3, torch.tensor(0.1)), (torch.tensor(0.3), 0.1), (0.3, 0.1)):
        model, made = build("SGD")
        train(model, made)
        for group in made["one"].param_groups:
            group["lr"], group["initial_lr"] = ours, 0.5
        path = save_checkpoint(tmp_path, step=1, model=model, optimizers=made, progress={})
        other, again = build("SGD", seed=1)
        for group in again["one"].param_groups:
            group["lr"] = theirs
        load_checkpoint(path, model=other, optimizers=again)
        for group in again["one"].param_groups:
            assert type(group["lr"]) is type(theirs)
            assert float(group["lr"]) == pytest.approx(0.3)
            assert group["initial_lr"] == 0.5
        train(other, again)


@pytest.mark.parametrize("value", [-1.0, 1.5, math.nan, math.inf])
def test_numbers_of_steps(value: float, tmp_path: Path) -> None:
    model, made = build("AdamW")
    train(model, made)
    next(iter(made["one"].state.values()))["step"].fill_(value)
    path = save_checkpoint(tmp_path, step=1, model=model, optimizers=made, progress={})
    model, made = build("AdamW", seed=1)
    before = everything(model, made)
    assert "no number of steps" in str(failure(shutil.copytree(path, tmp_path / "copy"), model, made))
    assert equal(everything(model, made), before)


class OwnOptimizer(torch.optim.Optimizer):
    """A user's optimizer, whose step finds out what its constructor does not."""

    def __init__(self, params: Any, rate: float = 0.1, power: float = 1.0) -> None:
        super().__init__(params, {"rate": rate, "power": power})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data -= group["rate"] / group["power"] * parameter.grad


def test_optimizers_of_users(tmp_path: Path) -> None:
    model = net()
    made: Optimizers = {"one": OwnOptimizer(model.parameters())}
    train(model, made)
    made["one"].param_groups[0]["power"] = 0.0
    path = save_checkpoint(tmp_path, step=1, model=model, optimizers=made, progress={})
    made["one"].param_groups[0]["power"] = 1.0
    error = str(failure(path, model, made))
    assert "`power` in group 0 of the optimizer `one`" in error
    assert "ZeroDivisionError" in error
