"""Files of models: what is saved can be loaded, and what the library never wrote is refused by name of the file."""

import copy
import json
import math
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from wrapper_table import KINDS, Kind

from x_transformers import AutoregressiveWrapper, Decoder, Encoder, TransformerWrapper, load_pretrained
from x_transformers.checkpoints.files import load_model, read_model_file, save_model
from x_transformers.errors import CheckpointError, ConfigError, InputError, StateDictError
from x_transformers.options.configured import Configured

SMALL: dict[str, Any] = {"dim": 8, "depth": 1, "heads": 1, "verbose": False}


def net(**options: Any) -> TransformerWrapper:
    return TransformerWrapper(num_tokens=9, max_seq_len=8, attn_layers=Decoder(**SMALL), **options)


def same(one: nn.Module, other: nn.Module) -> bool:
    state, theirs = one.state_dict(), other.state_dict()
    return state.keys() == theirs.keys() and all(torch.equal(t, theirs[name]) for name, t in state.items())


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_model_is_read_back(kind: Kind, tmp_path: Path) -> None:
    model = kind.build()
    if not isinstance(model, Configured):
        pytest.skip("has no configuration")
    noise = torch.get_rng_state()
    again = load_model(save_model(model, tmp_path / "model.safetensors"))
    assert same(model, again)
    assert again.config == model.config
    assert torch.equal(torch.get_rng_state(), noise)


def tied() -> TransformerWrapper:
    model = net()
    model.to_logits.weight = model.token_emb.emb.weight
    return model


def test_each_loader_reads_the_other_kind_or_names_its_own(tmp_path: Path) -> None:
    model = net().eval()
    file = save_model(model, tmp_path / "model.safetensors")
    model.save_pretrained(tmp_path / "folder")
    assert same(load_pretrained(file), model)
    assert next(load_pretrained(file, dtype=torch.bfloat16).parameters()).dtype is torch.bfloat16
    with pytest.raises(ConfigError, match=r"is a file of `save_model` or a run, .* without `attn_dropout`"):
        load_pretrained(file, attn_dropout=0.1)
    with pytest.raises(CheckpointError, match="read it with `load_pretrained`"):
        load_model(tmp_path / "folder")


def test_weights_that_are_one_stay_one(tmp_path: Path) -> None:
    again = load_model(save_model(tied(), tmp_path / "model.safetensors"))
    assert again.to_logits.weight is again.token_emb.emb.weight
    assert set(load_file(tmp_path / "model.safetensors")) == set(tied().state_dict())
    apart = load_model(save_model(net(), tmp_path / "model.safetensors"))
    assert apart.to_logits.weight is not apart.token_emb.emb.weight


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "compiled": torch.compile,
    "parallel": nn.DataParallel,
    "both": lambda model: nn.DataParallel(torch.compile(model)),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_models_are_written_as_what_they_wrap(wrapper: str, tmp_path: Path) -> None:
    model = AutoregressiveWrapper(net())
    again = load_model(save_model(WRAPPERS[wrapper](model), tmp_path / "model.safetensors"))
    assert same(model, again)
    inside = AutoregressiveWrapper(net())
    inside.net = torch.compile(inside.net)  # type: ignore[assignment]
    assert all("_orig_mod" not in name for name in load_file(save_model(inside, tmp_path / "model.safetensors")))
    assert same(load_model(tmp_path / "model.safetensors").net, inside.net._orig_mod)  # type: ignore[union-attr]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = save_model(net(), tmp_path / "model.safetensors")
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=str(path)), _no_room(len(before) // 2):
        save_model(net(), path)
    with pytest.raises(CheckpointError, match="absent"):
        save_model(net(), tmp_path / "absent" / "model.safetensors")
    with pytest.raises(CheckpointError, match="meta device"):
        save_model(net().to("meta"), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


class _no_room:  # noqa: N801
    """Files of at most this size can be written, as if the disk were full."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __enter__(self) -> None:
        import signal

        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *_: object) -> None:
        import signal

        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)
        signal.signal(signal.SIGXFSZ, self.handler)


# configurations that the library never wrote


def hostile(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield texts in the place of a configuration, with a name each."""
    stack = config["options"]["attn_layers"]

    def put(**options: Any) -> str:
        return json.dumps({"class": "TransformerWrapper", "options": {**config["options"], **options}})

    def layers(**options: Any) -> str:
        return put(attn_layers={**stack, "options": {**stack["options"], **options}})

    texts = ["{", "", "[]", "5", '"Decoder"', "true", "{}", '{"class": "TransformerWrapper"}', "[" * 100_000, "NaN"]
    for text in texts:
        yield text[:30], text
    for kind in (None, 5, [1], {}, "Nope", "os.system", "Module", "__main__.Decoder", "Encoder "):
        yield f"class {kind!r}", json.dumps({**config, "class": kind})
        yield f"class inside {kind!r}", put(attn_layers={**stack, "class": kind})
    for options in (None, 5, [], "x", {"attn_layers": stack}):
        yield f"options {options!r}"[:40], json.dumps({**config, "options": options})
    for value in (["x"], 5, None, {"$object": "x"}, ""):
        yield f"object {value!r}", put(to_logits={"$object": value})
    for name in ("self", "args", "__class__", "no_such_keyword", ""):
        yield f"keyword {name!r}", layers(**{name: 1})
    sizes = (10**6, 10**12, 10**15, 10**30, -(10**15), 0, -1, 1.5, 1e300, math.inf, math.nan, "8", [8], {})
    for number in sizes:
        for name in ("dim", "depth", "heads", "attn_dim_head"):
            yield f"{name} {number!r}", layers(**{name: number})
        yield f"num_tokens {number!r}", put(num_tokens=number)
        yield f"max_seq_len {number!r}", put(max_seq_len=number)
    deep: Any = stack
    for _ in range(200):
        deep = {"class": "Decoder", "options": {"dim": deep}}
    yield "deep", put(attn_layers=deep)
    yield "deep lists", '{"class": "TransformerWrapper", "options": {"num_tokens": ' + "[" * 900 + "]" * 900 + "}}"


def outcome(path: Path) -> tuple[Any, Exception | None]:
    """Return the model in a file, or the reason why there is none."""
    try:
        return load_model(path), None
    except (CheckpointError, StateDictError) as error:
        return None, error


MODEL = net()
HOSTILE = dict(hostile(MODEL.config))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    path = save_model(MODEL, tmp_path_factory.mktemp("models") / "model.safetensors")
    return path, load_file(path)


def test_hostile_configurations_are_refused(written: tuple[Path, dict[str, Tensor]]) -> None:
    path, weights = written
    noise, peak = torch.get_rng_state(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for what, text in HOSTILE.items():
        hit = path.with_name("hostile.safetensors")
        save_file(weights, hit, metadata={"config": text})
        _, error = outcome(hit)
        assert str(hit) in str(error), what
    assert torch.equal(torch.get_rng_state(), noise)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 300_000, "in KiB"


@pytest.mark.parametrize("missing", ["to_logits.weight", "token_emb.emb.weight"])
def test_other_weights_than_the_configuration_needs(missing: str, written: tuple[Path, dict[str, Tensor]]) -> None:
    path, weights = written
    hit = path.with_name("weights.safetensors")
    for change in (None, weights[missing][:-1], weights[missing].int(), weights[missing].bool()):
        theirs = {name: t for name, t in weights.items() if name != missing}
        theirs |= {} if change is None else {missing: change}
        save_file(theirs, hit, metadata={"config": json.dumps(MODEL.config)})
        with pytest.raises(StateDictError, match=missing) as error:
            load_model(hit)
        assert str(hit) in str(error.value)


def test_files_without_a_configuration(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"x": torch.ones(2)}, path, metadata={"format": "pt", "note": "any text"})
    assert read_model_file(path)[0] is None
    with pytest.raises(CheckpointError, match="without a configuration"):
        load_model(path)
    for text in ("[]", "nonsense", '{"a": 1}'):
        save_file({"x": torch.ones(2)}, path, metadata={"config": text})
        with pytest.raises(CheckpointError, match=str(path)):
            load_model(path)


def test_shared_weights_that_are_not(written: tuple[Path, dict[str, Tensor]]) -> None:
    path, weights = written
    hit = path.with_name("shared.safetensors")
    for shared in (5, [5], [["x", "y"]], [[]], [["to_logits.weight", "token_emb.emb.weight"]], {"a": 1}):
        save_file(weights, hit, metadata={"config": json.dumps(MODEL.config), "shared": json.dumps(shared)})
        with pytest.raises(CheckpointError, match=str(hit)):
            load_model(hit)


def test_any_change_of_a_file_is_noticed(written: tuple[Path, dict[str, Tensor]]) -> None:
    """Bits flip, and files are cut, filled up or mixed; a few hundred places of each."""
    path, _ = written
    whole, hit = path.read_bytes(), path.with_name("damaged.safetensors")
    generator = torch.Generator().manual_seed(0)
    rounds = int(os.environ.get("FUZZ_ROUNDS", "150"))

    def damage(i: int) -> bytes:
        place, bit = (int(torch.randint(n, (), generator=generator)) for n in (len(whole), 8))
        if i % 5 == 0:
            return whole[:place]
        if i % 5 == 1:
            return whole[:place] + bytes(7) + whole[place:]
        place = place % 2000 if i % 5 == 2 else place  # the header
        return whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :]

    for i in range(rounds):
        hit.write_bytes(damage(i))
        again, error = outcome(hit)
        # spaces in the header may change, and nothing else
        assert str(hit) in str(error) if error is not None else same(again, MODEL)
    for content in (b"", b"\0" * 100, b"\xff" * 100, json.dumps(MODEL.config).encode()):
        hit.write_bytes(content)
        with pytest.raises(CheckpointError, match=str(hit)):
            load_model(hit)
    with pytest.raises(InputError, match="`device` is 'foo'"):
        load_model(path, device="foo")
    for other in (path.parent, path.with_name("nothing")):
        with pytest.raises(CheckpointError, match=str(other)):
            load_model(other)


# which classes and objects a configuration names


def make_decoder() -> type:
    class Decoder(Encoder):
        """A class of a user's that has the name of one of the library."""

    return Decoder


def test_a_class_of_the_same_name_is_another_class() -> None:
    theirs = make_decoder()
    model = TransformerWrapper(num_tokens=9, max_seq_len=8, attn_layers=theirs(**SMALL))
    assert isinstance(TransformerWrapper.from_config(model.config).attn_layers, theirs)
    assert type(TransformerWrapper.from_config(net().config).attn_layers) is Decoder
    assert type(Configured.from_config(net().attn_layers.config)) is Decoder
    with pytest.raises(ConfigError, match="describes a Decoder"):
        theirs.from_config(net().attn_layers.config)


class Own(TransformerWrapper):
    """A class of a user's."""


def test_classes_of_users_are_found_also_by_the_names_of_earlier_versions(tmp_path: Path) -> None:
    model = Own(num_tokens=9, max_seq_len=8, attn_layers=Decoder(**SMALL))
    assert isinstance(load_model(save_model(model, tmp_path / "own.safetensors")), Own)
    assert model.config["class"] == f"{__name__}.Own"
    assert isinstance(Configured.from_config({**model.config, "class": "Own"}), Own)


def test_objects_of_one_name_stay_several(tmp_path: Path) -> None:
    heads = nn.Linear(8, 3), nn.Linear(8, 4)
    model = Pair(*(net(to_logits=head) for head in heads))
    config = json.loads(json.dumps(model.config))
    with pytest.raises(ConfigError, match=r"pass first\.to_logits, second\.to_logits by"):
        Pair.from_config(config, to_logits=heads[0])
    places = {"first.to_logits": heads[0], "second.to_logits": heads[1]}
    again = Pair.from_config(config, **places)
    assert again.first.to_logits is heads[0]
    assert again.second.to_logits is heads[1]
    loaded = load_model(save_model(model, tmp_path / "pair.safetensors"), **copy.deepcopy(places))
    assert same(loaded, model)
    assert json.loads(json.dumps(loaded.config)) == config


class Pair(Configured, nn.Module):
    """Two models of a user's."""

    def __init__(self, first: TransformerWrapper, second: TransformerWrapper, notes: Any = None) -> None:
        super().__init__()
        self.first, self.second = first, second


def test_options_that_look_like_configurations_stay_what_they_are() -> None:
    for notes in ({"class": "Decoder", "options": SMALL}, {"$object": "x"}, [{"$object": "x"}]):
        pair = Pair(net(), net(), notes)
        assert pair.config["options"]["notes"] == {"$object": "notes"}
    pair = Pair(net(), net(), {"some": [net(), numpy.int64(3)], "n": numpy.float32(0.5)})
    assert json.loads(json.dumps(pair.config))["options"]["notes"]["n"] == 0.5
    again = Pair.from_config(pair.config)
    assert again.config == pair.config
