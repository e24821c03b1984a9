"""Folders of models: what is saved is loaded, and what is damaged is refused by the names of file and tensor."""

import ast
import inspect
import json
import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model_files import WRAPPERS, _no_room, net, same, tied
from torch import Tensor, nn
from wrapper_table import KINDS, Kind

import x_transformers
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper, load_pretrained
from x_transformers.errors import CheckpointError, ConfigError, InputError, StateDictError
from x_transformers.folders import hub
from x_transformers.folders.saved import SavesFolders
from x_transformers.options.configured import Configured

FILE = "model.safetensors"
PARTS = {"Attention", "FeedForward"}
"""Classes with a configuration that are parts of a stack, and are saved with it."""


def test_every_public_model_is_saved() -> None:
    classes = [each for each in vars(x_transformers).values() if inspect.isclass(each) and issubclass(each, Configured)]
    assert len(classes) > 20
    assert {each.__name__ for each in classes if not issubclass(each, SavesFolders)} == PARTS


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_model_is_read_back(kind: Kind, tmp_path: Path) -> None:
    model = kind.build()
    if not isinstance(model, Configured):
        pytest.skip("has no configuration")
    noise = torch.get_rng_state()
    for size in ("1GB", 3000):
        assert model.save_pretrained(tmp_path, max_shard_size=size) == tmp_path
        again = type(model).from_pretrained(tmp_path)
        assert same(model, again)
        assert again.config == model.config
        assert not again.training
        assert not [each for each in (*again.parameters(), *again.buffers()) if each.is_meta]
    assert same(model, load_pretrained(tmp_path))
    assert torch.equal(torch.get_rng_state(), noise)


def test_files(tmp_path: Path) -> None:
    """Other libraries read the tensors; earlier files of a model are removed, and those of others are kept."""
    model = net(num_memory_tokens=2)
    (tmp_path / "tokenizer.json").write_text("{}")
    model.save_pretrained(tmp_path, max_shard_size=500)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 3
    for contents in (load_file(tmp_path / name) for name in shards):
        assert len(contents) == 1 or sum(each.nbytes for each in contents.values()) <= 500
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(each.nbytes for each in model.state_dict().values())
    tensors = {name: each for shard in shards for name, each in load_file(tmp_path / shard).items()}
    assert all(torch.equal(each, tensors[name]) for name, each in model.state_dict().items())
    model.save_pretrained(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["config.json", FILE, "tokenizer.json"]
    assert not any(suffix in name for name in os.listdir(tmp_path) for suffix in (".pt", ".bin", ".pkl"))


def test_dtypes(tmp_path: Path) -> None:
    model, ids = net(use_abs_pos_emb=False).eval(), torch.randint(0, 9, (2, 5))
    model.save_pretrained(tmp_path)
    half = TransformerWrapper.from_pretrained(tmp_path, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert {each.dtype for each in half.parameters()} == {torch.bfloat16}
    half.save_pretrained(tmp_path)
    assert {each.dtype for each in TransformerWrapper.from_pretrained(tmp_path).parameters()} == {torch.bfloat16}
    wide = TransformerWrapper.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(wide(ids), model(ids), atol=0.05, rtol=0.05)
    wide.train()(ids).sum().backward()
    with pytest.raises(InputError, match=r"`dtype` is torch.int8; weights need a floating type"):
        TransformerWrapper.from_pretrained(tmp_path, dtype=torch.int8)
    with pytest.raises(InputError, match="'gpu', which is no name of a device"):
        TransformerWrapper.from_pretrained(tmp_path, device="gpu")


def test_weights_that_are_one_stay_one(tmp_path: Path) -> None:
    tied().save_pretrained(tmp_path)
    assert "to_logits.weight" not in load_file(tmp_path / FILE)
    for again in (TransformerWrapper.from_pretrained(tmp_path), load_pretrained(tmp_path, emb_dropout=0.1)):
        assert again.to_logits.weight is again.token_emb.emb.weight
    net().save_pretrained(tmp_path)
    apart = TransformerWrapper.from_pretrained(tmp_path)
    assert apart.to_logits.weight is not apart.token_emb.emb.weight


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_models_are_written_as_what_they_wrap(wrapper: str, tmp_path: Path) -> None:
    model = AutoregressiveWrapper(net())
    wrapped = WRAPPERS[wrapper](model)
    inner = wrapped if wrapper == "compiled" else wrapped.module
    inner.save_pretrained(tmp_path)
    assert same(model, AutoregressiveWrapper.from_pretrained(tmp_path))
    model.net = torch.compile(model.net)  # type: ignore[assignment]
    model.save_pretrained(tmp_path)
    assert all("_orig_mod" not in name for name in load_file(tmp_path / FILE))
    assert same(model.net._orig_mod, AutoregressiveWrapper.from_pretrained(tmp_path).net)  # type: ignore[arg-type]


def test_gathered_weights(tmp_path: Path) -> None:
    one, two = net(), net()
    one.save_pretrained(tmp_path, weights=two.state_dict())
    assert same(two, TransformerWrapper.from_pretrained(tmp_path))


def test_objects_of_the_user(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.PReLU()

    stack = Decoder(dim=8, depth=1, heads=1, verbose=False, ff_custom_activation=make())
    model = TransformerWrapper(num_tokens=9, max_seq_len=8, attn_layers=stack)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="pass ff_custom_activation by name"):
        TransformerWrapper.from_pretrained(tmp_path)
    assert same(model, TransformerWrapper.from_pretrained(tmp_path, ff_custom_activation=make()))
    assert same(model, load_pretrained(tmp_path, ff_custom_activation=make()))


def test_a_write_that_fails_leaves_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    net().save_pretrained(folder)
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    for size, room in (("5GB", len(before[FILE]) // 4), ("1KB", 600)):
        with pytest.raises(CheckpointError, match=str(folder)), _no_room(room):
            net(num_memory_tokens=2).save_pretrained(folder, max_shard_size=size)
    with pytest.raises(CheckpointError, match=r"`attn_layers.layers.0.norm.gamma` is on the meta device"):
        net().to("meta").save_pretrained(folder)
    for size in ("5 gigabytes", "", 0, -1):
        with pytest.raises(InputError, match="`max_shard_size` is"):
            net().save_pretrained(folder, max_shard_size=size)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file cannot be written"):
        net().save_pretrained(tmp_path / "file")


def _flip(folder: Path) -> None:
    data = bytearray((folder / FILE).read_bytes())
    data[-10] ^= 4
    (folder / FILE).write_bytes(data)


def _cut(folder: Path) -> None:
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-10])


def _rewrite(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        tensors = load_file(folder / FILE)
        change(tensors)
        save_file(tensors, folder / FILE)

    return harm


def _entries(**entries: Any) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))

    return harm


def _options(**options: Any) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        path = folder / "config.json"
        found = json.loads(path.read_text())
        found["model"]["options"]["attn_layers"]["options"] |= options
        path.write_text(json.dumps(found))

    return harm


WIDE = torch.zeros(9, 9)
HARMS: dict[str, tuple[Callable[[Path], Any], type, str]] = {
    "no configuration": (lambda folder: (folder / "config.json").unlink(), CheckpointError, "config.json cannot be"),
    "no weights": (lambda folder: (folder / FILE).unlink(), CheckpointError, "neither model.safetensors nor"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), CheckpointError, "config.json cannot be read"),
    "another library": (_entries(library_name=""), ConfigError, "config.json is not that of a model of this library"),
    "another family": (_entries(model_type="gpt2"), ConfigError, "but of a gpt2; use `load_pretrained`"),
    "a later release": (_entries(format=99), CheckpointError, "has format 99, written by release .* Update"),
    "no format": (_entries(format="1"), CheckpointError, "config.json is damaged: its `format` is '1'"),
    "no model": (_entries(model=3), CheckpointError, "config.json is damaged: it has no configuration"),
    "no class": (_entries(model={"class": "Fridge", "options": {}}), CheckpointError, "describes a Fridge"),
    "no names": (_entries(shared=[3]), CheckpointError, "config.json is damaged: its `shared` is no list"),
    "other names": (_entries(shared=[["a", "b"]]), CheckpointError, r"names weights as shared that are not: \['a'"),
    "unknown keyword": (_options(rotarypos=True), CheckpointError, "of which no model can be built: .*rotarypos"),
    "too many layers": (_options(depth=10**9), CheckpointError, "its weights are not of depth = 1000000000"),
    "two layers": (_options(depth=2), StateDictError, "no file in .* contains the tensor `attn_layers.layers.2.norm"),
    "wide": (
        _options(ff_mult=2),
        StateDictError,
        r"model.safetensors: tensor `attn_layers.layers.1.feedforward.up.weight` is \(32, 8\) .* needs \(16, 8\)",
    ),
    "one bit": (_flip, CheckpointError, "model.safetensors is damaged: the numbers of tensor `[a-z_.0-9]+` do not fit"),
    "truncated": (_cut, CheckpointError, "model.safetensors cannot be read as a safetensors file"),
    "a tensor less": (_rewrite(lambda t: t.pop("pos_emb.emb.weight")), StateDictError, "tensor `pos_emb.emb.weight`"),
    "a tensor more": (_rewrite(lambda t: t.update(more=WIDE)), StateDictError, "contains the tensor `more`"),
    "whole numbers": (
        _rewrite(lambda t: t.update({"to_logits.weight": t["to_logits.weight"].int()})),
        StateDictError,
        "tensor `to_logits.weight` is .* of torch.int32, and the model needs",
    ),
}


@pytest.mark.parametrize("name", HARMS)
def test_damaged_folders(name: str, tmp_path: Path) -> None:
    harm, error, words = HARMS[name]
    net().save_pretrained(tmp_path)
    harm(tmp_path)
    with pytest.raises(error, match=words):
        TransformerWrapper.from_pretrained(tmp_path)


def test_classes_and_names_that_do_not_fit(tmp_path: Path) -> None:
    net().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="of the class TransformerWrapper, not AutoregressiveWrapper; call"):
        AutoregressiveWrapper.from_pretrained(tmp_path)
    for name in (tmp_path / "absent", str(tmp_path / "absent"), "absent", "a/b/c", str(tmp_path / FILE)):
        with pytest.raises(CheckpointError, match="is no folder"):
            TransformerWrapper.from_pretrained(name)
    with pytest.raises(ConfigError, match="`family` chooses among the families"):
        net().save_pretrained(tmp_path, family="llama")
    with pytest.raises(InputError, match="`format`"):
        net().save_pretrained(tmp_path, format="gguf")


def test_overrides_of_nested_parts(tmp_path: Path) -> None:
    AutoregressiveWrapper(net()).save_pretrained(tmp_path)
    for keyword in ("attn_dropout", "net.attn_layers.attn_dropout"):
        model = load_pretrained(tmp_path, **{keyword: 0.1, "pad_value": 3})
        assert model.pad_value == 3
        assert model.net.attn_layers.config["options"]["attn_dropout"] == 0.1
    with pytest.raises(ConfigError, match=r"unknown keyword `attn_dropuot`. Did you mean `attn_dropout`"):
        load_pretrained(tmp_path, attn_dropuot=0.1)
    with pytest.raises(ConfigError, match=r"`head.depth`: the parts of this model are net, net.attn_layers"):
        load_pretrained(tmp_path, **{"head.depth": 3})
    with pytest.raises(StateDictError, match=r"contains the tensor .* The keywords that were given may need other"):
        load_pretrained(tmp_path, only_attn=True)


# the hub, without a network


def test_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = tmp_path / "hub"
    calls: list[dict[str, Any]] = []

    class HfApi:
        def __init__(self, token: Any) -> None:
            assert token == "secret"

        def create_repo(self, repo_id: str, **options: Any) -> Any:
            calls.append(options)
            return types.SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, folder_path: Path, repo_id: str, commit_message: str) -> Any:
            Path(folder_path).rename(stored)
            Path(folder_path).mkdir()
            return types.SimpleNamespace(commit_url=f"https://hub/{repo_id}")

    def snapshot_download(repo_id: str, **options: Any) -> str:
        calls.append({"repo_id": repo_id, **options})
        if repo_id == "me/absent":
            raise OSError("404")
        return str(stored)

    library = types.SimpleNamespace(HfApi=HfApi, snapshot_download=snapshot_download)
    monkeypatch.setattr(hub.importlib, "import_module", lambda name: library)
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: library)
    model = net()
    assert model.push_to_hub("me/tiny", token="secret", private=True, max_shard_size="1KB") == "https://hub/me/tiny"
    assert calls.pop() == {"private": True, "exist_ok": True}
    assert 'TransformerWrapper.from_pretrained("me/tiny")' in (stored / "README.md").read_text()
    assert same(model, TransformerWrapper.from_pretrained("me/tiny", revision="main", token="secret"))
    assert {"repo_id": "me/tiny", "revision": "main", "token": "secret"}.items() <= calls.pop().items()
    assert same(model, load_pretrained("me/tiny", local_files_only=True))
    assert calls.pop()["local_files_only"]
    with pytest.raises(
        CheckpointError, match=r"me/absent is no folder on this machine, and cannot be read from .*: 404"
    ):
        load_pretrained("me/absent")

    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    for call in (lambda: load_pretrained("me/tiny"), lambda: model.push_to_hub("me/tiny")):
        with pytest.raises(ConfigError, match=r"needs the package `huggingface_hub`, .* 'x-transformers\[hf\]'"):
            call()


def test_nothing_is_unpickled() -> None:
    """Every `torch.load` of the package reads weights only, and there is no other pickle."""
    root = Path(x_transformers.__file__).parent
    loads = 0
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads"):
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("weights_only") == "True", f"{path}:{node.lineno}"
                loads += 1
    assert loads
