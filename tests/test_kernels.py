"""Kernels and traffic per layer do not grow: `kernels.json` holds an upper bound for each model and each feature.

After a change that lowers them, write the new bounds with `python tests/test_kernels.py --write`.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import pytest
import torch
import torch.nn.functional as F

from x_transformers.attention.qk.rotation import RotationTable, rotate
from x_transformers.layers.catalog import FEATURES

ROOT = Path(__file__).resolve().parents[1]
BOUNDS = Path(__file__).with_name("kernels.json")
MODELS = ("bare", "ours", "bare Llama", "our Llama")
OF_MIXERS = {"mixer", "layer_period"}
FEATURE_NAMES = [
    feature.name
    for feature in FEATURES
    if feature.examples and feature.group != "mixer" and feature.name not in OF_MIXERS
]
"""Mixers replace attention, so that a difference to a model with it says little; see `benchmarks/recurrences.py`."""
ROUNDING = 0.05


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.kernels")


@pytest.fixture(scope="module")
def bounds() -> dict[str, Any]:
    bounds = json.loads(BOUNDS.read_text(encoding="utf-8"))
    if minor_version() != bounds["torch"]:
        pytest.skip(f"the bounds were counted with PyTorch {bounds['torch']}; other versions have other kernels")
    return bounds


def minor_version() -> str:
    return ".".join(torch.__version__.split(".")[:2])


def below(name: str, found: Any, bound: list[float]) -> None:
    assert found.kernels <= bound[0], f"{name}: {found.kernels:g} kernels per layer; the bound is {bound[0]:g}"
    assert found.traffic <= bound[1] + ROUNDING, f"{name}: traffic of {found.traffic:.1f}; the bound is {bound[1]:g}"


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, kernels: Any, bounds: dict[str, Any]) -> None:
    below(name, kernels.count_model(name), bounds["models"][name])


@pytest.mark.parametrize("name", FEATURE_NAMES)
def test_features(name: str, kernels: Any, bounds: dict[str, Any]) -> None:
    assert name in bounds["features"], "a new feature: run `python tests/test_kernels.py --write`"
    below(name, kernels.count_feature(name), bounds["features"][name])


def test_bounds_belong_to_features() -> None:
    bounds = json.loads(BOUNDS.read_text(encoding="utf-8"))
    assert list(bounds["models"]) == list(MODELS)
    assert set(bounds["features"]) <= set(FEATURE_NAMES), "run `python tests/test_kernels.py --write`"


# the counter


def test_views_and_allocations_are_free(kernels: Any) -> None:
    x = torch.randn(6, 4)
    with kernels.Counter() as counter:
        y = torch.empty_like(x).view(4, 6).mT
        x.detach().unsqueeze(0).transpose(1, 2)
        assert (counter.kernels, counter.bytes) == (0, 0)
        torch.add(x, y, out=y)
        y[:2].mul_(2.0)
    assert counter.kernels == 2
    assert counter.bytes == 4 * (4 * 24 + 2 * 8)  # `out` is an argument and the result; in place, likewise


def test_a_layer_counted_by_hand(kernels: Any) -> None:
    """Two linear maps without a bias, without and with GELU between them."""

    def loss(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
        x = torch.zeros(len(ids), kernels.LENGTH, kernels.DIM).requires_grad_()
        return model(x).sum()

    def make(layers: int) -> torch.nn.Module:
        maps = [torch.nn.Linear(kernels.DIM, kernels.DIM, bias=False) for _ in range(2 * layers)]
        return torch.nn.Sequential(*maps)

    def with_gelu(layers: int) -> torch.nn.Module:
        return torch.nn.Sequential(*(each for part in make(layers) for each in (part, torch.nn.GELU())))

    linear, both = kernels.count(make, loss), kernels.count(with_gelu, loss)
    assert linear == (6, 2 * (2 + 2 + 2))  # per map: the output, and gradients of input and weight
    assert both - linear == (4, 2 * (2 + 3))


def test_rms_norm_is_one_kernel_forward_and_one_backward(kernels: Any) -> None:
    x, weight = torch.randn(3, 5, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    up = torch.randn(3, 5, 8)
    wanted = torch.autograd.grad(F.rms_norm(x, (8,), weight, eps=1e-6), (x, weight), up)
    with kernels.Counter() as counter, kernels.FusesRMSNorm(counter):
        out = F.rms_norm(x, (8,), weight, eps=1e-6)
        assert counter.kernels == 1
        assert counter.bytes == 4 * (2 * 120 + 8 + 15)
        found = torch.autograd.grad(out, (x, weight), up)
    assert counter.kernels == 2
    torch.testing.assert_close(found, wanted)
    with kernels.Counter() as counter, kernels.FusesRMSNorm(counter):
        torch.autograd.grad(torch.nn.RMSNorm(8, elementwise_affine=False)(x), x, up)
    assert counter.kernels == 2


def test_bare_models_are_what_is_counted_by_hand(kernels: Any, bounds: dict[str, Any]) -> None:
    """Bare GPT, forward: 2 norms, 4 products, attention, GELU, 2 sums; backward: the same with 2 products each,
    and the gradients of queries, keys and values put together, which takes two.
    """
    assert kernels.count_model("bare").kernels == 10 + 14 + 2


@pytest.mark.parametrize("halves", [False, True], ids=["adjacent", "halves"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rotations(dtype: torch.dtype, halves: bool, kernels: Any) -> None:
    """One kernel each way for adjacent pairs; in half precision neither complex numbers nor a wide copy."""
    angles = torch.randn(1, 1, 5, 4)
    table = RotationTable(angles.cos(), angles.sin(), halves)
    t = torch.randn(2, 3, 5, 8, dtype=dtype, requires_grad=True)
    rotate(t, table).backward(t)  # the numbers that all layers of a pass share
    with kernels.Counter() as counter:
        out = rotate(t, table)
    forward = counter.kernels
    with kernels.Counter() as counter:
        torch.autograd.grad(out, t, t.detach())
    assert (forward, counter.kernels) == ((1, 1) if dtype.itemsize >= 4 and not halves else (3, 3))


def test_command_line(kernels: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "model_names", lambda: ["ours"])
    kernels.main(["rotary", "layerscale"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line] == ["per", "ours", "added", "rotary", "layerscale"]
    assert lines[-1].split()[1].startswith("+")
    with pytest.raises(SystemExit):
        kernels.main(["speed"])
    assert "there is no feature speed" in capsys.readouterr().err


def write() -> None:
    sys.path.insert(0, str(ROOT))
    kernels = importlib.import_module("benchmarks.kernels")
    torch.manual_seed(0)
    counted = {
        "models": {name: kernels.count_model(name) for name in MODELS},
        "features": {name: kernels.count_feature(name) for name in FEATURE_NAMES},
    }
    lines = [f' "torch": "{minor_version()}"']
    for part, each in counted.items():
        rows = ",\n".join(
            f'  "{name}": [{found.kernels:g}, {round(found.traffic, 1) + 0.0:.1f}]' for name, found in each.items()
        )
        lines.append(f' "{part}": {{\n{rows}\n }}')
    BOUNDS.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    write()
