"""Mixers that read whole rows only: what they promise, and what is refused."""

from typing import Any

import pytest
import torch
from catalog import close, perturbed
from torch import Tensor

from x_transformers import Decoder, Encoder
from x_transformers.errors import ConfigError, InputError
from x_transformers.mixers.catalog import MIXERS, class_of

NAMES = [name for name in MIXERS if not class_of(name).has_causal_form]
EACH = pytest.mark.parametrize("name", NAMES)
GRID = (3, 4)


def built(name: str, **more: Any) -> Encoder:
    keywords = {"dim": 16, "depth": 2, "heads": 4, "mixer": name, "mixer_grid": GRID, "verbose": False, **more}
    return perturbed(Encoder(**keywords))


@EACH
def test_every_token_reads_all_others_of_its_row(name: str) -> None:
    model, x = built(name).double(), torch.randn(2, 12, 16, dtype=torch.float64)
    out = model(x)
    for row in range(2):
        close(out[row], model(x[row : row + 1])[0])
    for place in (0, 7, 11):
        changed = x.clone()
        changed[0, place] += torch.randn(16)
        moved = (model(changed) - out).abs().amax(dim=-1)
        assert moved[0].min() > 1e-9
        assert not moved[1].any()


@EACH
def test_every_parameter_has_a_gradient(name: str) -> None:
    model = built(name)
    model(torch.randn(2, 12, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@EACH
@torch.no_grad()
def test_half_precision_and_empty_batches(name: str) -> None:
    model, x = built(name), 30 * torch.randn(2, 12, 16).sign()
    half = built(name).bfloat16()(x.bfloat16())
    assert half.dtype is torch.bfloat16
    assert half.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).isfinite().all()
    assert model(x[:0]).shape == (0, 12, 16)


@EACH
@torch.no_grad()
def test_configurations_and_state_dicts(name: str) -> None:
    model, x = built(name), torch.randn(2, 12, 16)
    again = Encoder.from_config(model.config)
    again.load_state_dict(model.state_dict())
    close(again.eval()(x), model(x), 0)


@EACH
@torch.no_grad()
def test_one_graph(name: str) -> None:
    def backend(graph: Any, inputs: list[Tensor]) -> Any:
        return graph.forward

    torch._dynamo.reset()
    model = built(name, only_attn=True, depth=1)
    run = torch.compile(model, backend=backend, fullgraph=True)
    for b in (2, 3):
        x = torch.randn(b, 12, 16)
        close(run(x), model(x))


@EACH
def test_refusals(name: str) -> None:
    for grid in (None, GRID):
        with pytest.raises(
            ConfigError, match=rf'`mixer = "{name}"` reads the whole row at once, so that a token would'
        ):
            Decoder(dim=16, depth=1, mixer=name, mixer_grid=grid)
    with pytest.raises(ConfigError, match=rf'`mixer = "{name}"` needs `mixer_grid`, the height and width of the image'):
        Encoder(dim=16, depth=1, mixer=name)
    with pytest.raises(ConfigError, match=r"looks both ways by itself; drop `mixer_bidirectional`"):
        Encoder(dim=16, depth=1, mixer=name, mixer_grid=GRID, mixer_bidirectional=True)
    model, x = built(name), torch.randn(2, 12, 16)
    with pytest.raises(InputError, match=r"was made for a grid of 3 x 4 = 12 tokens; this row has 11"):
        model(x[:, 1:])
    with pytest.raises(InputError, match="tokens of a grid cannot be left out; drop `mask`, or take a mixer without"):
        model(x, mask=torch.arange(12).expand(2, 12) < 9)
    with pytest.raises(InputError, match="reads the whole row at once, so that a token would see the future"):
        model.layers[0].mixer(x)


def test_a_row_of_tokens_is_a_grid_of_one_line() -> None:
    assert Encoder(dim=16, depth=1, mixer="spectral", mixer_grid=(1, 9))(torch.randn(2, 9, 16)).shape == (2, 9, 16)


@EACH
def test_operations_are_counted(name: str) -> None:
    """Those of maps, and those between tokens, which are more for more tokens only in the logarithm."""
    small, large = (
        Encoder(dim=16, depth=1, only_attn=True, mixer=name, mixer_grid=grid, verbose=False).explain(seq_len=64).rows[0]
        for grid in ((2, 2), (8, 8))
    )
    maps = 4 * 2 * 16 * 16 if name == "slab" else 0
    assert maps < small.flops <= large.flops < 4 * small.flops
