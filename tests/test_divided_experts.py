"""Experts that processes divide among them train as those of one process do."""

import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import divided
import pytest
import torch
from catalog import BASE, close, tokens
from safetensors.torch import load_file
from torch import Tensor

from x_transformers import AutoregressiveWrapper, TransformerWrapper
from x_transformers.checkpoints.training import latest_checkpoint, load_checkpoint, save_checkpoint
from x_transformers.errors import ConfigError, InputError
from x_transformers.feedforward.experts import Experts
from x_transformers.training import expert_parallel, processes
from x_transformers.training.expert_parallel import shard_experts
from x_transformers.training.processes import Processes, gathered, shard
from x_transformers.training.run import Run

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
EXPERTS = {"ff_experts": 4, "ff_mult": 1, "depth": 1}


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Losses, norms, gradients, and runs that go on in another number of processes, from two to one and back."""
    alone = Processes()
    numbers: dict[str, list[float]] = {}
    gradients: dict[str, dict[str, Tensor]] = {}
    for name in divided.RUN:
        model = divided.build(name, seed=0)
        made = divided.optimizers(model)
        found = divided.train(model, made, alone)
        if name == "biased":
            path = save_checkpoint(
                tmp_path, step=divided.STEPS, model=model, optimizers=made, progress={"name": "alone"}
            )
            path.rename(tmp_path / "alone")
        numbers[name] = [*found.numbers, *divided.train(model, made, alone, divided.STEPS).numbers]
        gradients[name] = found.gradients

    (tmp_path / "text.txt").write_text(
        "".join(f"{number} is a number, and so is {2 * number}.\n" for number in range(99))
    )
    if divided.ON_CPU:
        numbers["run"] = divided.results(Run(divided.settings(tmp_path / "one"), alone))
        assert any(numbers["run"][1:])

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, divided.__file__, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    for name, wanted in numbers.items():
        assert found[name] == pytest.approx(wanted, abs=1e-4), name
    for name in divided.RUN:
        theirs = load_file(tmp_path / f"{name}.safetensors")
        assert theirs.keys() == gradients[name].keys()
        for key, gradient in gradients[name].items():
            torch.testing.assert_close(theirs[key], gradient, atol=1e-5, rtol=1e-4, msg=f"{name}: {key}")
    second = 2 * divided.STEPS
    assert found["resumed"] == pytest.approx(numbers["biased"][second:], abs=1e-4)

    for name in divided.RUN:
        model = divided.build(name, seed=1)
        made = divided.optimizers(model)
        checkpoint = latest_checkpoint(tmp_path / name)
        assert checkpoint is not None
        assert load_checkpoint(checkpoint, model=model, optimizers=made) == {"name": name}
        again = divided.train(model, made, alone, divided.STEPS)
        assert again.numbers == pytest.approx(numbers[name][second:], abs=1e-4)


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """A group of one process, which has all experts."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Mesh:
    """Numbers of processes along the axes of a mesh that nobody has joined."""

    mesh_dim_names = None

    def __init__(self, *sizes: int, device_type: str = "cpu") -> None:
        self.sizes, self.ndim, self.device_type = sizes, len(sizes), device_type

    def size(self, axis: int | None = None) -> int:
        return math.prod(self.sizes) if axis is None else self.sizes[axis]


def model_of(**options: Any) -> TransformerWrapper:
    torch.manual_seed(0)
    return BASE.build(**{**EXPERTS, **options})


@pytest.mark.parametrize("router", ["softmax", "keys"])
def test_one_process_has_all_experts(router: str, group: None) -> None:
    model, ids = model_of(ff_router=router), tokens(2, 8)
    wanted = AutoregressiveWrapper(model).generate(ids, 3, temperature=0.0)
    out = model(ids)
    assert shard_experts(model) is model
    close(model(ids), out)
    assert torch.equal(AutoregressiveWrapper(model).generate(ids, 3, temperature=0.0), wanted)
    assert "4 experts of 16, 2 used" in str(model.explain())
    copied = copy.deepcopy(model)
    close(copied(ids), out)
    assert {name: whole.shape for name, whole in gathered(model).items()} == {
        name: tensor.shape for name, tensor in model_of(ff_router=router).state_dict().items()
    }


def test_graphs_end_where_rows_travel(group: None) -> None:
    """Lengths that depend on choices are in no graph, and everything around them is."""
    model, ids = model_of(), tokens(2, 8)
    wanted = model(ids)
    shard_experts(model)
    model.attn_layers.compile_blocks(backend="eager")
    close(model(ids), wanted)


@pytest.mark.parametrize(
    ("options", "mesh", "words"),
    [
        ({"ff_experts": None}, None, "without experts; build it with `ff_experts`"),
        ({}, Mesh(3), r"`attn_layers\.\S+` has 4 experts, .* among 3 processes"),
        ({}, Mesh(4, 3), "4 experts, .* among 3 processes; choose a mesh"),
        ({}, Mesh(2, 1, 2), "`mesh` has 3 axes; it must have one"),
        ({}, Mesh(2, device_type="cuda"), "one of cuda devices, and the model is on cpu"),
    ],
)
def test_what_cannot_be_divided_is_refused(options: dict[str, Any], mesh: Any, words: str, group: None) -> None:
    model = model_of(**options)
    with pytest.raises(ConfigError, match=words):
        shard_experts(model, mesh)
    assert all(type(parameter) is torch.nn.Parameter for parameter in model.parameters())


def test_the_order_is_experts_first(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    with pytest.raises(ConfigError, match="once, and before `shard`"):
        shard_experts(shard_experts(model))
    if not processes.ON_CPU:
        return
    with pytest.raises(ConfigError, match=r"divided among 1 processes, and `mesh` has 2; .* a mesh of two axes"):
        shard(model, Mesh(2))
    with pytest.raises(ConfigError, match="2 axes without names; it must have one, or two with names"):
        shard(model, Mesh(1, 1))
    monkeypatch.setattr(processes, "LEAVES_OUT", False)
    with pytest.raises(ConfigError, match=r"`shard` needs PyTorch 2\.7 .* divided experts"):
        shard(model)


def test_a_single_process_divides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_parallel, "joins", lambda: False)
    with pytest.raises(ConfigError, match="`shard_experts` needs joined processes; start them with `torchrun`"):
        shard_experts(model_of())


def test_divided_experts_do_not_generate(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shard_experts(model_of())
    for module in model.modules():
        if isinstance(module, Experts) and module.exchange is not None:
            monkeypatch.setattr(module.exchange, "size", 2)
    with pytest.raises(InputError, match="divided among 2 processes; load what `gathered` returns"):
        AutoregressiveWrapper(model).generate(tokens(1, 4), 2)
