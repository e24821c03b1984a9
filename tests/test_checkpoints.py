"""Checkpoints: they run no code, are loaded as a whole or not at all, survive kills; what is saved can be loaded."""

import copy
import errno
import json
import os
import pickle
import resource
import shutil
import signal
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
from x_transformers.checkpoints import folder as folders
from x_transformers.checkpoints.plain_data import read_sealed, write_sealed
from x_transformers.checkpoints.training import (
    LATEST,
    TRAINING,
    WEIGHTS,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from x_transformers.errors import CheckpointError, InputError
from x_transformers.training.optimizers import Muon, split_parameters

STATES = "states-00000.safetensors"
Optimizers = dict[str, torch.optim.Optimizer]


def net(seed: int = 0) -> TransformerWrapper:
    torch.manual_seed(seed)
    layers = Decoder(dim=8, depth=1, heads=1, verbose=False)
    return TransformerWrapper(num_tokens=9, max_seq_len=8, attn_layers=layers)


def build(seed: int = 0, model: nn.Module | None = None) -> tuple[nn.Module, Optimizers]:
    """A model and its optimizers after one step."""
    model = net(seed) if model is None else model
    split = split_parameters(model)
    made: Optimizers = {
        "adamw": torch.optim.AdamW([{"params": split.embeddings, "lr": 0.1}, {"params": split.others}]),
        "muon": Muon(split.matrices, lr=0.02),
    }
    step(model, made)
    return model, made


def step(model: nn.Module, made: Optimizers) -> float:
    loss = model(torch.randint(0, 9, (2, 5))).square().mean()
    loss.backward()
    for optimizer in made.values():
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def everything(model: nn.Module, made: Optimizers) -> Any:
    """Everything that a load may change."""
    return copy.deepcopy(
        (dict(model.state_dict()), {name: one.state_dict() for name, one in made.items()}, torch.get_rng_state())
    )


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple) and type(one) is type(other):
        return len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and one == other


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, made = build()
    progress = {"step": 1, "losses": [0.5, float("inf")], "mean": torch.ones(2)}
    return save_checkpoint(tmp_path_factory.mktemp("run"), step=1, model=model, optimizers=made, progress=progress)


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / saved.name)


def refused(checkpoint: Path, *words: str, **others: Any) -> None:
    """A load is refused, and nothing changes."""
    model, made = build(seed=1)
    given = {"model": model, "optimizers": made, **others}
    before = everything(given["model"], given["optimizers"])
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(checkpoint, **given)
    for word in (str(checkpoint), *words):
        assert word in str(error.value)
    assert equal(everything(given["model"], given["optimizers"]), before), error.value


def test_a_run_goes_on_to_the_same_bits(saved: Path) -> None:
    whole, made = build()
    wanted = [step(whole, made) for _ in range(3)]
    model, again = build(seed=1)
    progress = load_checkpoint(saved, model=model, optimizers=again)
    assert equal(progress, {"step": 1, "losses": [0.5, float("inf")], "mean": torch.ones(2)})
    assert [step(model, again) for _ in range(3)] == wanted
    assert equal(everything(model, again), everything(whole, made))


# no code


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_no_file_of_a_checkpoint_is_unpickled(saved: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    assert sorted(path.name for path in saved.iterdir()) == sorted([WEIGHTS, TRAINING, STATES])
    for name in (WEIGHTS, TRAINING, STATES, "training.pt", "optimizers", ".metadata", "__0_0.distcp"):
        for write in (pickle.dump, torch.save):
            checkpoint = shutil.copytree(saved, tmp_path / f"{name}-{write.__module__}")
            with open(checkpoint / name, "wb") as file:
                write(Code(mark), file)
            model, made = build(seed=1)
            try:
                load_checkpoint(checkpoint, model=model, optimizers=made)
            except CheckpointError:
                assert (saved / name).exists()
            assert not mark.exists(), name


def test_code_in_a_run_is_not_saved(tmp_path: Path) -> None:
    model, made = build()
    made["adamw"].param_groups[0]["lr"] = Code(tmp_path / "ran")
    with pytest.raises(CheckpointError, match=r"adamw\.groups\.0\.lr` is a Code"):
        save_checkpoint(tmp_path, step=1, model=model, optimizers=made, progress={})
    assert latest_checkpoint(tmp_path) is None
    assert not list(tmp_path.glob(".draft*"))


# damage


def test_each_file_is_needed_and_belongs_to_its_checkpoint(saved: Path, copied: Path, tmp_path: Path) -> None:
    other, made = build(seed=2)
    theirs = save_checkpoint(tmp_path / "other", step=1, model=other, optimizers=made, progress={})
    for name in (WEIGHTS, TRAINING, STATES):
        (copied / name).unlink()
        refused(copied)
        (copied / name).mkdir()
        refused(copied)
        (copied / name).rmdir()
        for content in (b"", b"{}", b"null", (saved / name).read_bytes()[:-7]):
            (copied / name).write_bytes(content)
            refused(copied)
        shutil.copy(theirs / name, copied / name)
        if name != TRAINING:
            refused(copied, name)
        shutil.copy(saved / name, copied / name)
    refused(tmp_path / "nothing")


def test_any_damage_is_noticed(saved: Path, copied: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    wanted, same = build()
    load_checkpoint(saved, model=wanted, optimizers=same)
    whole_run = everything(wanted, same)
    model, made = build(seed=1)
    before = everything(model, made)
    for i in range(int(os.environ.get("FUZZ_ROUNDS", "60"))):
        name = (WEIGHTS, TRAINING, STATES)[i % 3]
        whole = (saved / name).read_bytes()
        place, bit = (int(torch.randint(n, (), generator=generator)) for n in (len(whole), 8))
        damaged = whole[:place] + (b"" if i % 4 == 0 else bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :])
        (copied / name).write_bytes(damaged)
        error = failure(copied, model, made)
        if error is None:  # white space may change
            assert equal(everything(model, made), whole_run)
            model, made = build(seed=1)
        else:
            assert str(copied) in str(error)
        assert equal(everything(model, made), before)
        (copied / name).write_bytes(whole)


def failure(checkpoint: Path, model: nn.Module, made: Optimizers) -> CheckpointError | None:
    """Load a checkpoint, and return why it was refused."""
    try:
        load_checkpoint(checkpoint, model=model, optimizers=made)
    except CheckpointError as error:
        return error
    return None


def swaps(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield places in JSON data, and values of other types for them."""
    for value in (None, 5, -1, 10**20, 1.5, "x", [], {}, [1], {"$tensor": "x"}, {"$nope": 1}, {"$tensor": ["x"]}, True):
        if type(value) is not type(data):
            yield path, value
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in inner:
        yield from swaps(value, (*path, key))


def put(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of data with another value at a place; without it if the value is `...`."""
    if not path:
        return value
    changed = copy.copy(data)
    if value is ... and len(path) == 1:
        del changed[path[0]]
    else:
        changed[path[0]] = put(data[path[0]], path[1:], value)
    return changed


def test_hostile_data_with_a_right_checksum(saved: Path, copied: Path) -> None:
    """Types of JSON are swapped and entries removed, with a checksum that fits. Nothing is read by half."""
    data = read_sealed(copied / TRAINING)
    places = [place for place in swaps(data) if place[0] and place[0][0] != "progress"]
    places += [(path, ...) for path in dict.fromkeys(path for path, _ in places)]
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(places), generator=generator)[: int(os.environ.get("FUZZ_ROUNDS", "80"))]
    model, made = build(seed=1)
    before = everything(model, made)
    for path, value in [places[i] for i in order.tolist()] + [(("progress",), ["x"]), (("progress",), None)]:
        write_sealed(copied / TRAINING, put(data, path, value))
        error = failure(copied, model, made)
        if error is None:  # an option has another value of the same kind
            model, made = build(seed=1)
            before = everything(model, made)
        else:
            assert str(copied) in str(error)
        assert equal(everything(model, made), before), (path, value)


def test_hostile_states_with_a_right_checksum(saved: Path, copied: Path) -> None:
    """Tensors of other shapes and dtypes, and states that an optimizer of another kind has."""
    from x_transformers.checkpoints.tensor_files import write_tensors

    data, tensors = read_sealed(copied / TRAINING), load_file(copied / STATES)
    name = "adamw.to_logits.weight.exp_avg"
    for changed in (torch.zeros(8, 9), torch.zeros(9, 8, dtype=torch.int64), torch.zeros(9), torch.zeros(2, 9, 8)):
        index = {**data["tensors"][name], "shape": list(changed.shape), "parts": [[0, [0] * changed.ndim]]}
        index["dtype"] = str(changed.dtype).removeprefix("torch.")
        checksum = write_tensors(copied / STATES, {**tensors, name: changed})
        content = put(data, ("tensors", name), index)
        write_sealed(copied / TRAINING, put(content, ("checksums", STATES), checksum))
        refused(copied, "exp_avg", "to_logits.weight", "adamw")
    index = {**data["tensors"][name], "shape": [10**12, 10**6]}
    write_sealed(copied / TRAINING, put(data, ("tensors", name), index))
    shutil.copy(saved / STATES, copied / STATES)
    refused(copied, name)


def test_random_states_that_are_none(copied: Path) -> None:
    from x_transformers.checkpoints.tensor_files import write_tensors

    data, tensors = read_sealed(copied / TRAINING), load_file(copied / STATES)
    for state in (torch.zeros(3, dtype=torch.uint8), torch.zeros(5056)):
        checksum = write_tensors(copied / STATES, {**tensors, "random.0.cpu": state})
        index = {"dtype": str(state.dtype).removeprefix("torch."), "shape": list(state.shape)}
        content = put(data, ("tensors", "random.0.cpu"), {**index, "sharded": False, "parts": [[0, [0]]]})
        write_sealed(copied / TRAINING, put(content, ("checksums", STATES), checksum))
        refused(copied, "random state")


def test_other_weights(copied: Path) -> None:
    weights = load_file(copied / WEIGHTS)
    for changed in (torch.zeros(10, 8), torch.zeros(9, 8, dtype=torch.int32)):
        save_file({**weights, "to_logits.weight": changed}, copied / WEIGHTS)
        refused(copied, WEIGHTS, "to_logits.weight")


# other runs


def test_other_optimizers(saved: Path) -> None:
    model, made = build(seed=1)
    refused(saved, "muon", model=model, optimizers={"adamw": made["adamw"]})
    sgd = torch.optim.SGD(made["adamw"].param_groups[0]["params"], lr=0.1, momentum=0.9)
    refused(saved, "groups", model=model, optimizers={**made, "adamw": sgd})
    groups = [{"params": group["params"]} for group in made["adamw"].param_groups]
    refused(saved, model=model, optimizers={**made, "adamw": torch.optim.Adagrad(groups)})
    fewer = torch.optim.AdamW([{"params": groups[0]["params"]}, {"params": groups[1]["params"][:-1]}])
    refused(saved, "group 1", model=model, optimizers={**made, "adamw": fewer})
    elsewhere = torch.optim.AdamW([{"params": group["params"]} for group in build()[1]["adamw"].param_groups])
    refused(saved, "not in the model", model=model, optimizers={**made, "adamw": elsewhere})


def test_an_optimizer_that_refuses_changes_nothing(saved: Path) -> None:
    """Even if the others have been loaded before."""
    model, made = build(seed=1)

    def refuse(*_: Any) -> None:
        raise ValueError("not this one")

    made["muon"].register_load_state_dict_post_hook(refuse)
    before = everything(model, made)
    with pytest.raises(CheckpointError, match="not this one"):
        load_checkpoint(saved, model=model, optimizers=made)
    assert equal(everything(model, made), before)


def test_optimizers_without_a_state_stay_so(tmp_path: Path) -> None:
    """Saving and loading takes no step, unlike PyTorch's functions for distributed checkpoints."""
    model = net()
    made: Optimizers = {"adamw": torch.optim.AdamW(model.parameters())}
    path = save_checkpoint(tmp_path, step=0, model=model, optimizers=made, progress={})
    assert not made["adamw"].state
    load_checkpoint(path, model=model, optimizers=made)
    assert not made["adamw"].state


def test_states_keep_their_precision(tmp_path: Path) -> None:
    """PyTorch casts states to the dtype of the parameters."""
    model = net().bfloat16()
    made: Optimizers = {"adamw": torch.optim.AdamW(model.parameters())}
    step(model, made)
    for state in made["adamw"].state.values():
        state["exp_avg"] = torch.randn_like(state["exp_avg"], dtype=torch.float32)
    wanted = copy.deepcopy(made["adamw"].state_dict())
    path = save_checkpoint(tmp_path, step=0, model=model, optimizers=made, progress={})
    again: Optimizers = {"adamw": torch.optim.AdamW(model.parameters())}
    load_checkpoint(path, model=model, optimizers=again)
    assert equal(again["adamw"].state_dict(), wanted)


@pytest.mark.parametrize(
    "kind", ["SGD", "Adam", "Adagrad", "RMSprop", "Adadelta", "NAdam", "ASGD", "Rprop", "LBFGS", "Adafactor"]
)
def test_optimizers_of_pytorch(kind: str, tmp_path: Path) -> None:
    def made(model: nn.Module) -> Optimizers:
        return {"one": getattr(torch.optim, kind)(model.parameters(), lr=0.01)}

    def act(model: nn.Module, optimizers: Optimizers) -> None:
        def closure() -> Tensor:
            optimizers["one"].zero_grad()
            (loss := model(x).square().mean()).backward()
            return loss

        optimizers["one"].step(closure)

    x = torch.randint(0, 9, (2, 5))
    model, other = net(), net(seed=1)
    optimizers, others = made(model), made(other)
    act(model, optimizers)
    path = save_checkpoint(tmp_path, step=1, model=model, optimizers=optimizers, progress={})
    load_checkpoint(path, model=other, optimizers=others)
    for _ in range(2):
        act(model, optimizers)
        act(other, others)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


# what is saved can be loaded


PROGRESS: dict[str, Any] = {
    "numbers": [1, -(2**80), 0.1, float("-inf"), True, None, "text\n\ud800"],
    "containers": ((1, (2, [3])), deque([1, (2,)], maxlen=5), deque(), {}, [], ()),
    "keys": {1: "a", (2, 3): "b", None: {"c": 4}, "$tensor": 5, 2.5: 6},
    "paths": Path("/some/where"),
    "types": torch.bfloat16,
    "tensors": [torch.arange(3), torch.tensor(1.5), torch.zeros(0, 2), torch.ones(2, 3).T.bool()],
    "a": {"b": torch.zeros(1)},
    "a.b": torch.ones(1),
    "ordered": OrderedDict(x=1),
}


def test_progress_is_read_back(tmp_path: Path) -> None:
    model, made = build()
    path = save_checkpoint(tmp_path, step=1, model=model, optimizers=made, progress=PROGRESS)
    found = load_checkpoint(path, model=model, optimizers=made)
    assert equal(found.pop("ordered"), {"x": 1})
    assert found["containers"][1].maxlen == 5
    assert equal(found, {name: value for name, value in PROGRESS.items() if name != "ordered"})


def test_numbers_of_numpy(tmp_path: Path) -> None:
    model, made = build()
    numbers = [numpy.mean([2.0, 3.0]), numpy.float32(0.1), numpy.int64(3), numpy.bool_(True), numpy.str_("x")]
    progress = {"numbers": numbers, "array": numpy.arange(6).reshape(2, 3)}
    path = save_checkpoint(tmp_path, step=1, model=model, optimizers=made, progress=progress)
    found = load_checkpoint(path, model=model, optimizers=made)
    assert equal(found["numbers"], [2.5, float(numpy.float32(0.1)), 3, True, "x"])
    assert numpy.array_equal(found["array"], progress["array"])


def endless() -> list[Any]:
    items: list[Any] = []
    items.append(items)
    return items


UNREADABLE = {
    "object": object(),
    "set": {1, 2},
    "bytes": b"bytes",
    "function": lambda: 1,
    "complex number": 1j,
    "huge number": 10**5000,
    "endless list": endless(),
    "array of objects": numpy.array([None]),
    "module": nn.Linear(1, 1),
}


class Counting(torch.optim.SGD):
    """An optimizer of a user's that keeps more than states of parameters."""

    count = 0

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]
        super().load_state_dict({name: state_dict[name] for name in ("state", "param_groups")})


def test_optimizers_of_users(tmp_path: Path) -> None:
    """With entries of their own, states under names, and a learning rate that is a tensor."""
    model = net()
    made: Optimizers = {"one": Counting(model.parameters(), lr=torch.tensor(0.1), momentum=0.9)}
    step(model, made)
    made["one"].state["all"] = {"seen": 3}  # type: ignore[index]
    made["one"].count = 5
    wanted = copy.deepcopy(made["one"].state_dict())
    path = save_checkpoint(tmp_path, step=1, model=model, optimizers=made, progress={})
    again: Optimizers = {"one": Counting(model.parameters(), lr=torch.tensor(0.2), momentum=0.9)}
    load_checkpoint(path, model=model, optimizers=again)
    assert equal(again["one"].state_dict(), wanted)
    assert wanted["count"] == 5


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_could_not_be_read_is_not_saved(kind: str, tmp_path: Path) -> None:
    model, made = build()
    with pytest.raises(CheckpointError):
        save_checkpoint(tmp_path, step=1, model=model, optimizers=made, progress={"deep": {"value": UNREADABLE[kind]}})
    assert latest_checkpoint(tmp_path) is None


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "plain": lambda model: model,
    "compiled": torch.compile,
    "parallel": nn.DataParallel,
}


@pytest.mark.parametrize("then", WRAPPERS)
@pytest.mark.parametrize("first", WRAPPERS)
def test_wrapped_models_in_both_directions(first: str, then: str, tmp_path: Path) -> None:
    model, other = AutoregressiveWrapper(net()), AutoregressiveWrapper(net(seed=1))
    other.net.attn_layers.layers[0] = torch.compile(other.net.attn_layers.layers[0])  # type: ignore[index]
    made, others = ({"one": torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9)} for one in (model, other))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    made["one"].step()
    for source, target in (((model, made), (other, others)), ((other, others), (model, made))):
        path = save_checkpoint(
            tmp_path / type(source[0].net.attn_layers.layers[0]).__name__,  # type: ignore[index]
            step=1,
            model=WRAPPERS[first](source[0]),
            optimizers=source[1],
            progress={},
        )
        load_checkpoint(path, model=WRAPPERS[then](target[0]), optimizers=target[1])
        assert all(map(torch.equal, model.parameters(), other.parameters()))
        assert equal(made["one"].state_dict(), others["one"].state_dict())


@pytest.mark.parametrize("given", [{"step": -1}, {"step": 1.5}, {"step": "1"}, {"keep": 0}, {"keep": -1}])
def test_steps_and_counts_out_of_range(given: dict[str, Any], tmp_path: Path) -> None:
    model, made = build()
    with pytest.raises(InputError, match=next(iter(given))):
        save_checkpoint(tmp_path, **{"step": 1, **given}, model=model, optimizers=made, progress={})


# checkpoints of the first layout


def test_checkpoints_of_the_first_layout(copied: Path, tmp_path: Path) -> None:
    (copied / TRAINING).unlink()
    (copied / STATES).unlink()
    torch.save({"optimizers": ["adamw", "muon"], "progress": {"step": 7}}, copied / "training.pt")
    (copied / "optimizers").mkdir()
    (copied / "optimizers/.metadata").write_bytes(pickle.dumps(Code(tmp_path / "ran")))
    (copied.parent / LATEST).write_text(copied.name)
    assert latest_checkpoint(copied.parent) == copied
    refused(copied, "earlier version", "optimizers = {}")
    model = net(seed=1)
    assert load_checkpoint(copied, model=model, optimizers={}) == {"step": 7}
    assert equal(dict(model.state_dict()), dict(load_file(copied / WEIGHTS)))
    for content in (None, [1], {}, {"progress": 5}):
        torch.save(content, copied / "training.pt")
        refused(copied, optimizers={})
    torch.save({"progress": Code(tmp_path / "ran")}, copied / "training.pt")
    refused(copied, optimizers={})
    assert not (tmp_path / "ran").exists()


# the folder of a run


def saves(folder: Path, number: int, given: dict[str, Any]) -> Path:
    return save_checkpoint(folder, step=number, progress={"step": number}, **given)


@pytest.fixture
def given() -> dict[str, Any]:
    model, made = build()
    return {"model": model, "optimizers": made}


def test_the_newest_are_kept(given: dict[str, Any], tmp_path: Path) -> None:
    paths = [saves(tmp_path, number, given) for number in (1, 2, 3)]
    assert [path.exists() for path in paths] == [False, True, True]
    load_checkpoint(paths[1], **given)
    saves(tmp_path, 2, given)  # the run went back, and leaves what came after
    assert latest_checkpoint(tmp_path) == paths[1]
    saves(tmp_path, 4, given)
    assert sorted(path.name for path in tmp_path.glob("*step-*")) == ["step-00000002", "step-00000004"]


@pytest.mark.parametrize(
    "content", [b"", b"step-00000009", b"../step-00000001", b"\xff\xfe", b"/etc/passwd", b"\0", None]
)
def test_a_pointer_to_something_else(content: bytes | None, given: dict[str, Any], tmp_path: Path) -> None:
    for number in (1, 2):
        saves(tmp_path, number, given)
    (tmp_path / LATEST).unlink()
    if content is None:
        (tmp_path / LATEST).mkdir()
    else:
        (tmp_path / LATEST).write_bytes(content)
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000002"
    (tmp_path / "step-00000002" / TRAINING).unlink()
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000001"
    assert latest_checkpoint(tmp_path / "nothing") is None


class Killed(BaseException):
    """What happens at a moment of a save."""


@pytest.mark.parametrize("again", [True, False], ids=["the same step", "the next step"])
@pytest.mark.parametrize("kind", ["killed", "no room", "read-only"])
def test_a_save_that_is_cut_short_at_any_moment(
    kind: str, again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A complete checkpoint is found after each call that changes the disk, and the run goes on from it."""
    calls = ("os.replace", "os.fsync", "os.mkdir", "shutil.rmtree", "os.open")
    real = {name: getattr(os if name.startswith("os") else shutil, name.partition(".")[2]) for name in calls}
    real["os.fsync"] = lambda *_: None
    model, left = nn.Linear(2, 1), 0
    given = {"model": model, "optimizers": {"sgd": torch.optim.SGD(model.parameters())}}
    monkeypatch.setattr("os.fsync", real["os.fsync"])

    def patched(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0 and (kind == "killed" or name != "shutil.rmtree"):
                code = errno.ENOSPC if kind == "no room" else errno.EROFS
                raise Killed if kind == "killed" else OSError(code, os.strerror(code), str(args[0]))
            return real[name](*args, **kwargs)

        return call

    for moment in range(60):
        folder = tmp_path / str(moment)
        saves(folder, 1, given)
        saves(folder, 2, given)
        number, left, error = 2 if again else 3, moment, None
        with monkeypatch.context() as patch:
            for name in calls:
                patch.setattr(name, patched(name))
            try:
                saves(folder, number, given)
                break
            except Killed:
                pass
            except CheckpointError as refusal:
                error = refusal
        assert error is None or str(folder) in str(error)
        found = latest_checkpoint(folder)
        assert found is not None
        assert load_checkpoint(found, **given)["step"] in (2, number)
        saves(folder, 4, given)
        assert load_checkpoint(latest_checkpoint(folder) or found, **given) == {"step": 4}
        assert not list(folder.glob(".draft*"))
    else:
        raise AssertionError("the save never came to its end")
    assert moment > 8


def test_a_disk_without_room(given: dict[str, Any], tmp_path: Path) -> None:
    first = saves(tmp_path, 1, given)
    sizes = sorted(path.stat().st_size for path in first.iterdir())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for size in (0, 10, sizes[0] // 2, sizes[1] // 2, sizes[2] - 100):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
            with pytest.raises(CheckpointError, match=str(tmp_path)):
                saves(tmp_path, 2, given)
            assert latest_checkpoint(tmp_path) == first
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert load_checkpoint(first, **given) == {"step": 1}
    assert not list(tmp_path.glob(".draft*"))
    saves(tmp_path, 2, given)


def test_a_folder_that_vanishes(given: dict[str, Any], tmp_path: Path) -> None:
    saves(tmp_path / "run", 1, given)
    shutil.rmtree(tmp_path / "run")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="run has gone"):
            saves(tmp_path / "run", 2, given)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file cannot be written"):
        saves(tmp_path / "file", 1, given)


def test_two_runs_do_not_share_a_folder(given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saves(tmp_path, 1, given)
    mine = dict(folders._owned)
    monkeypatch.setattr(folders, "_owned", {})  # as in another process
    with pytest.raises(CheckpointError, match="another run"):
        saves(tmp_path, 2, given)
    assert [found.name for found in tmp_path.glob("*step-*")] == [path.name]
    load_checkpoint(path, **given)
    saves(tmp_path, 2, given)
    saves(tmp_path, 3, given)
    monkeypatch.setattr(folders, "_owned", mine)
    with pytest.raises(CheckpointError, match="another process"):
        saves(tmp_path, 2, given)


def test_the_data_of_a_checkpoint_is_json(saved: Path) -> None:
    content = json.loads((saved / TRAINING).read_text())
    groups = content["data"]["optimizers"]["adamw"]["groups"]
    assert sorted(groups[0]["parameters"]) == ["pos_emb.emb.weight", "token_emb.emb.weight"]
    assert content["data"]["optimizers"]["muon"]["groups"][0]["options"]["ns_dtype"] == {"$dtype": "bfloat16"}
