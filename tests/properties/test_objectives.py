"""Properties of the losses and the generation of every wrapper, beyond those of its stack."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from catalog import close
from torch import Tensor
from wrapper_table import KINDS, Kind, N, given, run, scalar

LOSSES = [kind for kind in KINDS if kind.name not in ("multi_input", "vision", "neo_mlp", "tensor products")]
LOSSES = [kind for kind in LOSSES if kind.name != "entropy tokenizer"]
"""Those that return a loss."""
GRAPHS = [kind for kind in KINDS if kind.name != "entropy tokenizer" and "graph" not in kind.exempt]
"""Those whose passes are one graph; the tokenizer returns lengths that depend on values."""


@pytest.fixture
def same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let draws have values that do not depend on their shape."""
    monkeypatch.setattr(torch, "rand_like", lambda t, **_: torch.full_like(t, 0.4))
    monkeypatch.setattr(torch, "randn_like", lambda t, **_: torch.full_like(t, 0.2))
    monkeypatch.setattr(torch, "randn", lambda *size, **more: torch.full(_size(size), 0.3, **_no_generator(more)))


def _size(size: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size


def _no_generator(more: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in more.items() if name != "generator"}


def test_every_exemption_is_needed() -> None:
    known = {"padding", "rows", "ragged", "graph"}
    for kind in KINDS:
        assert set(kind.exempt) <= known, kind
        assert (kind.padded is None) == ("padding" in kind.exempt), kind
        if kind.generate is not None:
            assert (kind.ragged is None) == ("ragged" in kind.exempt), kind


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.padded is not None], ids=str)
@torch.no_grad()
def test_padding_does_not_matter(kind: Kind, same_draws: None) -> None:
    """Nor do tokens after the last label: the loss of each label reads what is before it."""
    assert kind.padded is not None
    model, arguments = kind.ready(), kind.draw(2)
    padded, more = kind.padded(*arguments)
    wanted = scalar(run(kind, model, arguments))
    random.seed(1)
    torch.manual_seed(1)
    found = scalar(model(*padded, **{**given(kind), **more}))
    assert found.isfinite()
    close(found, wanted)


@pytest.mark.parametrize("kind", [kind for kind in LOSSES if "rows" not in kind.exempt], ids=str)
@torch.no_grad()
def test_rows_do_not_matter_to_each_other(kind: Kind, same_draws: None) -> None:
    """Two rows of one length have the mean of their losses."""
    model, arguments = kind.ready(), kind.draw(2)
    more = {name: value[:1] for name, value in given(kind).items()}
    alone = []
    for row in range(2):
        random.seed(1)
        torch.manual_seed(1)
        alone.append(scalar(model(*(t[row : row + 1] for t in arguments), **more)))
    close(scalar(run(kind, model, arguments)), torch.stack(alone).mean())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.ragged is not None], ids=str)
def test_ragged_prompts_are_rows_of_their_own(kind: Kind) -> None:
    assert kind.ragged is not None
    model, arguments = kind.ready(), kind.draw(2)
    lengths = (N, N - 3)
    rows = [tuple(t[row : row + 1, :length] for t in arguments) for row, length in enumerate(lengths)]
    together = kind.ragged(model, rows)
    for number, row in enumerate(rows):
        alone = kind.ragged(model, [row])[0]
        close(together[number][: len(alone)], alone[: len(together[number])])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.parts is not None], ids=str)
@torch.no_grad()
def test_parts_make_up_the_loss(kind: Kind) -> None:
    assert kind.parts is not None
    total, parts = kind.parts(kind.ready(), *kind.draw(2))
    close(total, parts)


def moved(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {name: moved(each, dtype) for name, each in value.items()}
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize("kind", LOSSES, ids=str)
def test_other_precisions(kind: Kind, same_draws: None) -> None:
    """Copies follow their own `.to()`, with everything that they keep, and are saved."""
    model, arguments = kind.ready(), kind.draw(2)
    wanted = scalar(run(kind, model, arguments)).item()
    for dtype, near in ((torch.float64, 1e-4), (torch.bfloat16, 0.1)):
        copied = copy.deepcopy(model).to(dtype)
        loss = scalar(run(kind, copied, tuple(moved(each, dtype) for each in arguments)))
        assert loss.isfinite()
        assert abs(loss.item() - wanted) <= near * (1 + abs(wanted)), (dtype, loss, wanted)
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in copied.parameters())
        assert list(copied.state_dict()) == list(model.state_dict())
        assert all(t.dtype is not torch.float32 for t in copied.state_dict().values())
    assert all(t.dtype not in (torch.float64, torch.bfloat16) for t in model.state_dict().values())


@pytest.mark.parametrize("kind", GRAPHS, ids=str)
def test_passes_are_one_graph(kind: Kind, same_draws: None) -> None:
    model, arguments = kind.ready(), kind.draw(2)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    close(scalar(run(kind, compiled, arguments)), scalar(run(kind, model, arguments)))
