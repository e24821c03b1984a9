"""Parts of a training run: text of every kind, tokens in files, the order of the data, schedules, budget, metrics."""

import itertools
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from x_transformers.errors import ConfigError, InputError
from x_transformers.training import speed
from x_transformers.training.batches import Batches, spaced_windows
from x_transformers.training.budget import FINAL, LOOK, Budget
from x_transformers.training.gradients import clip_gradients
from x_transformers.training.packages import needed
from x_transformers.training.presets import PRESETS, build_model, read_setting
from x_transformers.training.records import Records, read_metrics
from x_transformers.training.schedules import SCHEDULES, rate_factor
from x_transformers.training.texts import Texts
from x_transformers.training.token_files import TokenFiles
from x_transformers.training.tokenizer import Bpe, Bytes, tokenizer_at

WORDS = [f"def f{number}(x): return x + {number}\n" * 5 for number in range(60)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of text files and JSONL."""
    place = tmp_path / "text"
    (place / "below").mkdir(parents=True)
    for number, text in enumerate(WORDS[:30]):
        (place / "below" / f"{number}.txt").write_text(text)
    lines = "".join(json.dumps({"text": text, "other": 1}) + "\n\n" for text in WORDS[30:])
    (place / "more.jsonl").write_text(lines)
    return place


class Hub(ModuleType):
    """The package `datasets`, without a network."""

    asked: tuple[Any, ...] = ()

    def load_dataset(self, *names: str | None, split: str, streaming: bool) -> Iterator[dict[str, str]]:
        self.asked = (*names, split, streaming)
        return iter([{"text": text} for text in WORDS])


def test_documents_of_folders_and_lines(folder: Path) -> None:
    found = list(Texts(str(folder)))
    assert sorted(text.decode() for text, _ in found) == sorted(WORDS)
    held_out = [text for text, held in found if held]
    assert 0 < len(held_out) < 15
    assert list(Texts(str(folder))) == found, "the same documents are held out every time"
    assert len(list(Texts(str(folder), most=7))) == 7


@pytest.mark.parametrize("count", range(1, 30))
def test_something_is_held_out_of_a_few_documents(count: int, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in WORDS[:count]))
    found = list(Texts(str(tmp_path / "a.jsonl")))
    assert "".join(text.decode() for text, _ in found) == "".join(WORDS[:count]), "in their order"
    assert 1 <= sum(held for _, held in found) <= 4
    assert not all(held for _, held in found)


def test_the_end_of_a_single_file_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("0123456789" * 20)
    train, held_out = Texts(str(tmp_path / "a.txt"))
    assert (len(train[0]), train[1]) == (190, False)
    assert (len(held_out[0]), held_out[1]) == (10, True)


def test_datasets_of_the_hub_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub("datasets")
    hub.__spec__ = pytest.__spec__
    monkeypatch.setitem(sys.modules, "datasets", hub)
    texts = Texts("hf:owner/name/part", split="test", most=10)
    assert [text.decode() for text, _ in texts] == WORDS[:10]
    assert hub.asked == ("owner/name", "part", "test", True)
    with pytest.raises(InputError, match="fields: text"):
        list(Texts("hf:owner/name", field="content"))
    monkeypatch.setattr(hub, "load_dataset", lambda *_, **__: 1 / 0)
    with pytest.raises(InputError, match="owner/name cannot be read"):
        list(Texts("hf:owner/name"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"text": "a"}\nno json\n', "Line 2"),
        ('{"body": "a"}\n', "body"),
        ("[1]\n", "no text"),
        ('{"text": 3}', "text"),
    ],
)
def test_lines_that_are_no_documents(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(InputError, match=words):
        list(Texts(str(tmp_path / "a.jsonl")))


def test_packages_that_are_not_installed() -> None:
    with pytest.raises(ConfigError, match=r"A thing needs .* `no_such_package`.*x-transformers\[train\]"):
        needed("no_such_package.part", "train", "A thing")


def test_tokens_are_written_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = TokenFiles(tmp_path / "tokens", Texts(str(folder)), "bytes", 256)
    tokens = files.open()
    text = b"".join(text for text, held in Texts(str(folder)) if not held)
    assert bytes(tokens.train) == text
    assert tokens.bytes_per_token == 1.0
    assert isinstance(tokens.train, numpy.memmap)
    with monkeypatch.context() as patch:
        patch.setattr(TokenFiles, "_write", lambda *_: pytest.fail("written again"))
        again = TokenFiles(tmp_path / "tokens", Texts(str(folder)), "bytes", 256).open()
    assert again.checksum == tokens.checksum
    (folder / "below" / "0.txt").write_text("other text, of another length\n" * 9)
    changed = TokenFiles(tmp_path / "tokens", Texts(str(folder)), "bytes", 256).open()
    assert changed.checksum != tokens.checksum
    assert not list((tmp_path / "tokens").glob(".draft*"))


def test_a_tokenizer_is_trained_kept_and_found(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    tokens = TokenFiles(tmp_path / "tokens", Texts(str(folder)), "bpe", 300).open()
    tokenizer = tokens.tokenizer
    assert tokenizer.size == 300
    documents = [text for text, held in Texts(str(folder)) if not held]
    ends = (numpy.asarray(tokens.train) == tokenizer.end).nonzero()[0]
    assert len(ends) == len(documents), "each document ends with one token"
    first = tokens.train[: ends[0]].tolist()
    assert tokenizer.decode(first).encode() == documents[0]
    assert tokens.bytes_per_token > 1.5
    for text in ("naïve ☃ text\n", "", "\ttabs  and   spaces"):
        assert tokenizer.decode(tokenizer.encode([text.encode()])[0]) == text

    (run := tmp_path / "run" / "checkpoints" / "step").mkdir(parents=True)
    tokenizer.save(tmp_path / "run")
    found = tokenizer_at(run, 300)
    assert isinstance(found, Bpe)
    assert found.size == 300
    with pytest.raises(ConfigError, match="300 tokens, and the model 299"):
        tokenizer_at(run, 299)
    loaded = TokenFiles(tmp_path / "tokens", Texts(str(folder)), str(tmp_path / "run" / "tokenizer.json"), 0).open()
    assert loaded.checksum == tokens.checksum
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(InputError, match=r"broken\.json cannot be read"):
        Bpe.loaded(tmp_path / "broken.json")


def test_models_over_bytes_need_no_tokenizer(tmp_path: Path) -> None:
    assert isinstance(tokenizer_at(tmp_path, 256), Bytes)
    with pytest.raises(ConfigError, match="has 300 tokens"):
        tokenizer_at(tmp_path, 300)


# the order of the data


def test_each_window_occurs_once_in_an_epoch() -> None:
    ids = numpy.arange(1000, dtype="uint16")
    batches = Batches(ids, rows=3, length=10, seed=5)
    assert batches.windows == 99
    epochs = [torch.cat([batches.at(epoch * 33 + step) for step in range(33)]) for epoch in range(2)]
    for windows in epochs:
        assert torch.equal(windows - windows[:, :1], torch.arange(10).expand(99, 10))
        assert len(windows[:, 0].unique()) == 99
        assert len((windows[:, 0] % 10).unique()) == 1
    assert not torch.equal(epochs[0], epochs[1])


def test_batches_depend_on_seed_and_step_only() -> None:
    ids = numpy.arange(500, dtype="uint16")
    one, other = (Batches(ids, rows=4, length=16, seed=1) for _ in range(2))
    wanted = [one.at(step) for step in range(30)]
    for step in (29, 3, 17, 3, 0):
        assert torch.equal(other.at(step), wanted[step])
    assert not torch.equal(Batches(ids, rows=4, length=16, seed=2).at(0), wanted[0])


@pytest.mark.parametrize("count", [18, 19, 33, 40])
def test_short_texts_have_windows_too(count: int) -> None:
    ids = numpy.arange(count, dtype="uint8")
    starts = {int(Batches(ids, rows=1, length=16, seed=seed).at(seed % 3)[0, 0]) for seed in range(40)}
    assert min(starts) >= 0
    assert max(starts) <= count - 16


def test_held_out_windows_are_spread_and_predict_each_token_once() -> None:
    windows = spaced_windows(numpy.arange(101, dtype="uint8"), context=10, most=100)
    assert windows[:, 1:].flatten().tolist() == list(range(1, 101))
    few = spaced_windows(numpy.arange(101, dtype="uint8"), context=10, most=3)
    assert few[:, 0].tolist() == [0, 40, 80]


# schedules, budget, clipping


@pytest.mark.parametrize("kind", SCHEDULES)
def test_rates_rise_and_fall(kind: str) -> None:
    factors = [rate_factor(kind, done / 100, warmup=0.1, decay=0.2, least=0.05) for done in range(101)]
    assert factors[0] == 0
    assert factors[5] == pytest.approx(0.5)
    assert factors[10] == pytest.approx(1)
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(factors[10:]))
    assert factors[-1] == pytest.approx(1 if kind == "constant" else 0.05)
    wanted = {"cosine": 0.05 + 0.95 * 0.5, "linear": 0.05 + 0.95 * 0.5, "wsd": 1, "constant": 1}
    assert factors[55] == pytest.approx(wanted[kind])
    assert rate_factor(kind, 0.0) == 1


def test_a_budget_of_minutes_holds_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    budget = Budget(None, minutes=1.0, held_out=10**9)
    budget.go_on_from(20.0)
    now[0] += 10
    budget.seconds = budget.measure()
    assert budget.seconds == 30
    assert budget.done(0) == pytest.approx(30 / 59)
    budget.expect_evaluation(4 / FINAL)
    assert budget.done(0) == pytest.approx(30 / 55)
    assert budget.shown(0) == 0.5
    now[0] += 25
    budget.seconds = budget.measure()
    assert budget.done(0) == 1
    assert budget.last_evaluation() == FINAL
    budget.expect_evaluation(1000 / FINAL)  # a busy machine: a part of the held-out text has to do
    assert budget.reserve == pytest.approx(0.15 * 60 + 1)
    assert budget.last_evaluation() == LOOK
    budget.expect_evaluation(8 / FINAL)
    assert budget.last_evaluation() == pytest.approx(FINAL / 2, rel=1e-3)
    assert Budget(10, 1.0).done(4) == 0.4
    assert Budget(10, 1.0).last_evaluation() == FINAL


@pytest.mark.parametrize("most", [0.1, 100.0])
def test_gradients_are_clipped_as_by_pytorch(most: float) -> None:
    one, other = (nn.Linear(4, 3), nn.Linear(4, 3))
    other.load_state_dict(one.state_dict())
    for model in (one, other):
        model(torch.arange(8.0).view(2, 4)).pow(2).sum().backward()
    norm = clip_gradients(one.parameters(), most)
    assert norm == pytest.approx(float(nn.utils.clip_grad_norm_(other.parameters(), most)))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


# threads


@pytest.mark.parametrize(("fastest", "most"), [(1, 2), (2, 2), (4, 6)])
def test_the_fastest_number_of_threads_is_taken(fastest: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    current = [most]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: current[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: current.__setitem__(0, count))
    monkeypatch.setattr(speed, "TRIAL", 0.1)
    assert speed.choose_threads(lambda: time.sleep(0.002 if current[0] == fastest else 0.01)) == fastest
    assert current == [fastest]
    current[0] = most
    monkeypatch.setenv("OMP_NUM_THREADS", str(most))
    assert speed.choose_threads(lambda: pytest.fail("the user has chosen")) == most


def test_operations_of_a_token_are_those_of_the_matrices() -> None:
    net = build_model("bytes", 256, 128).net
    matrices = sum(p.numel() for name, p in net.named_parameters() if p.ndim == 2 and "token_emb" not in name)
    attention = 4 * (2 * 2 * 128 * 128) // 2  # causality leaves half
    assert speed.flops_per_token(net, 128) == 3 * (2 * matrices + attention)


# metrics


def test_metrics_go_on_from_a_step(tmp_path: Path) -> None:
    records = Records(tmp_path, 0)
    for step in range(1, 6):
        records.add(step, loss=1.0 / step)
    records.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # the process was killed here
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 5
    again = Records(tmp_path, 3)
    again.add(4, loss=9.0)
    again.close()
    assert [(each["step"], each["loss"]) for each in read_metrics(tmp_path / "metrics.jsonl")] == [
        (1, 1.0),
        (2, 0.5),
        (3, 1 / 3),
        (4, 9.0),
    ]


def test_metrics_for_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    records = Records(tmp_path, 0, tensorboard=True)
    records.add(1, loss=2.0)
    records.close()
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_metrics_for_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = ModuleType("wandb")
    service.__spec__ = pytest.__spec__
    sent: list[Any] = []
    run = type(
        "Run", (), {"log": lambda _, *what, **more: sent.append((*what, more)), "finish": lambda _: sent.append(0)}
    )
    started: dict[str, Any] = {}
    monkeypatch.setattr(service, "init", lambda **given: started.update(given) or run(), raising=False)
    monkeypatch.setitem(sys.modules, "wandb", service)
    records = Records(tmp_path, 0, wandb="project", settings={"rows": 3})
    records.add(1, loss=2.0)
    records.close()
    assert (started["project"], started["config"]) == ("project", {"rows": 3})
    assert sent == [({"loss": 2.0}, {"step": 1}), 0]


# presets


@pytest.mark.parametrize(
    ("preset", "millions"), [("bytes", 0.85), ("tiny", 0.99), ("10m", 10), ("124m", 124), ("350m", 354), ("1b", 1242)]
)
def test_presets_have_the_size_of_their_names(preset: str, millions: float) -> None:
    chosen = PRESETS[preset]
    with torch.device("meta"):
        model = build_model(preset, chosen.vocabulary, chosen.context)
    found = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert found == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize("preset", ["bytes", "tiny"])
def test_all_tokens_are_equally_likely_at_first(preset: str) -> None:
    model = build_model(preset, 300, 32)
    loss = model(torch.randint(300, (4, 32)))
    assert float(loss.detach()) == pytest.approx(math.log(300), rel=0.01)


def test_any_keyword_may_be_set() -> None:
    given = dict(
        map(read_setting, ("depth=1", "dim=32", "heads=2", "attn_kv_heads=1", "l2norm_embed=true", "ff_mult=2"))
    )
    net = build_model("tiny", 300, 32, given).net
    assert len(net.attn_layers.layers) == 2
    assert net.config["options"]["l2norm_embed"] is True
    assert read_setting("layers_execute_order=[0,1,0,1]")[1] == (0, 1, 0, 1)
    assert read_setting("x=None") == ("x", None)


@pytest.mark.parametrize(
    ("option", "words"),
    [({"dpeth": 1}, "depth"), ({"num_tokens": 3}, "--vocabulary"), ({"heads": 0}, "heads"), ({"dim": "wide"}, "dim")],
)
def test_settings_that_fit_no_model(option: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_model("tiny", 300, 32, option)
