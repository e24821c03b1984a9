"""Properties of every wrapper: losses by hand, independent rows, gradients, files, generation, clear errors."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from catalog import close, perturb
from wrapper_table import KINDS, Kind, run, scalar

from x_transformers.errors import InputError

LEARNS = [kind for kind in KINDS if kind.name != "entropy tokenizer"]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.loss is not None], ids=str)
@torch.no_grad()
def test_losses_are_those_of_the_outputs(kind: Kind) -> None:
    model, arguments = kind.ready(), kind.draw(2)
    if kind.name == "dpo":
        perturb(model.policy_model)
    assert kind.loss is not None
    close(run(kind, model, arguments), kind.loss(model, *arguments))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.loss is not None and kind.name != "dpo"], ids=str)
@torch.no_grad()
def test_rows_do_not_meet(kind: Kind) -> None:
    """The loss of rows of one length is the mean of the rows'."""
    model, arguments = kind.ready(), kind.draw(3)
    alone = [run(kind, model, tuple(t[row : row + 1] for t in arguments)) for row in range(3)]
    close(run(kind, model, arguments), torch.stack(alone).mean())


@pytest.mark.parametrize("kind", LEARNS, ids=str)
def test_every_parameter_learns(kind: Kind) -> None:
    model, arguments = kind.ready(), kind.draw(2)
    scalar(run(kind, model, arguments)).backward()
    for name, parameter in model.named_parameters():
        if any(part in name for part in kind.idle) or not parameter.requires_grad:
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.ne(0).any(), name


@pytest.mark.parametrize("kind", KINDS, ids=str)
@torch.no_grad()
def test_wrappers_are_saved_and_copied(kind: Kind) -> None:
    model, arguments = kind.ready(), kind.draw(2)
    wanted = run(kind, model, arguments)
    copied = kind.ready()
    copied.load_state_dict(model.state_dict())
    for other in (copied, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        got = run(kind, other.eval(), arguments)
        for one, another in zip(*(out if isinstance(out, tuple) else (out,) for out in (got, wanted)), strict=True):
            assert (one is None and another is None) or torch.equal(one, another)
    other = copy.deepcopy(model)
    perturb(other)
    close(scalar(run(kind, model, arguments)), scalar(wanted))  # the copy is apart


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.generate is not None], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generation_needs_no_cache(kind: Kind, temperature: float) -> None:
    assert kind.generate is not None
    model, arguments = kind.ready().train(), kind.draw(2)
    results = []
    for cached in (True, False):
        torch.manual_seed(0)
        results.append(kind.generate(model, *arguments, temperature=temperature, cache_kv=cached))
    close(results[0], results[1])
    assert model.training
    alone = kind.generate(model, *(t[:1] for t in arguments), temperature=0.0)
    close(alone, kind.generate(model, *arguments, temperature=0.0)[:1])


@pytest.mark.parametrize(
    ("kind", "arguments", "more", "words"),
    [
        pytest.param(kind, arguments, more, words, id=f"{kind}-{index}")
        for kind in KINDS
        for index, (arguments, more, words) in enumerate(kind.bad)
    ],
)
def test_bad_input_meets_a_sentence(
    kind: Kind, arguments: Callable[[], tuple[Any, ...]], more: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        kind.build()(*arguments(), **more)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@torch.no_grad()
def test_whole_floats_are_ids(kind: Kind) -> None:
    """Ids of a floating type, which data sets often contain, mean the same as whole numbers."""
    model, arguments = kind.ready(), kind.draw(2)

    def as_floats(t: Any) -> Any:
        if isinstance(t, dict):
            return {name: as_floats(each) for name, each in t.items()}
        return t.double() if t.dtype is torch.long else t

    floating = tuple(as_floats(t) for t in arguments)
    assert torch.equal(scalar(run(kind, model, arguments)), scalar(run(kind, model, floating)))
    if kind.generate is not None:
        made = [kind.generate(model, *each, temperature=0.0) for each in (arguments, floating)]
        assert torch.equal(*(each[0] if isinstance(each, tuple) else each for each in made))
