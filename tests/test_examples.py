"""The small examples, for a few steps at small size."""

import importlib.util
import itertools
import json
import math
import re
import shutil
import sys
import threading
import zlib
from pathlib import Path
from types import ModuleType
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
import torch

from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
from x_transformers.checkpoints.files import save_model

ROOT = Path(__file__).resolve().parents[1]

# name, sizes to run at, what is printed, what is drawn or written
RUNS: list[tuple[str, dict[str, object], str, str]] = [
    ("copy_task", {"BATCH": 4, "TESTED": 8}, r"exact copies: \d+\.\d% of 8 strings", "attention.png"),
    ("vit_digits", {"BATCH": 4}, r"held-out accuracy: \d+\.\d% \(\d+ of 359 digits wrong\)", "digits.png"),
    (
        "length_extrapolation",
        {"BATCH": 2, "WINDOWS": 4, "TIMES": (1, 2)},
        r"ALiBi +\d\.\d{3} +\d\.\d{3}\n",
        "extrapolation.png",
    ),
    (
        "xl_long_text",
        {"SEGMENT": 8, "MEMORY": 16, "BATCH": 2, "TESTED": 4},
        r"with memories: \d\.\d{3} held-out bits",
        "bits.png",
    ),
    ("numbers_xval", {"BATCH": 4, "TESTED": 8}, r"named correctly: \d+%", "continued.png"),
    ("continuous_series", {"BATCH": 4, "TESTED": 8, "ROLL_OUTS": 4}, r"1 to 12 +\d\.\d{3}", "forecasts.png"),
    ("masked_text", {"LENGTH": 16, "BATCH": 2, "TESTED": 32}, r"pseudo-likelihood of held-out text: \d", "text.txt"),
    (
        "test_time_training",
        {"LETTERS": 4, "SEGMENTS": 3, "BATCH": 2, "TESTED": 4},
        r"adapted weights: \d+\.\d%, \d+\.\d%, \d+\.\d% of the ciphers correct",
        "correct.png",
    ),
    (
        "recall_hybrid",
        {"SHOWN": 8, "PAIRS": (2, 4), "BATCH": 2, "TESTED": 4},
        r"Mamba-2, one attention in four: \d+\.\d%, \d+\.\d% recalled out of \(2, 4\) pairs",
        "recalled.png",
    ),
    ("gpt_vae_styles", {"BATCH": 4, "TESTED": 8, "GRID": (2, 2)}, r"written \d+\.\d letters away", "styles.png"),
    ("dpo_preferences", {"SAMPLES": 64, "BATCH": 4}, r"after DPO: \d+%", "preferred.png"),
]


@pytest.fixture
def example(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A copy of the example in a folder of its own: each is a single file."""
    copied = shutil.copy(ROOT / "examples" / f"{request.param}.py", tmp_path)
    spec = importlib.util.spec_from_file_location(request.param, copied)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses and named tuples look for their module
    monkeypatch.setitem(sys.modules, request.param, module)
    spec.loader.exec_module(module)
    return module


def run(example: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [f"{example.__name__}.py", *map(str, arguments)])
    example.main()


@pytest.mark.parametrize(
    ("example", "sizes", "printed", "left"), RUNS, indirect=["example"], ids=[name for name, *_ in RUNS]
)
def test_example_prints_and_writes_its_result(
    example: ModuleType,
    sizes: dict[str, object],
    printed: str,
    left: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in sizes.items():
        assert hasattr(example, name)
        monkeypatch.setattr(example, name, value)
    run(example, monkeypatch, "--out", tmp_path / "new", "--steps", 4, "--seed", 1)
    shown = capsys.readouterr().out
    assert re.search(printed, shown), shown
    assert "nan" not in shown
    found = (tmp_path / "new" / left).read_bytes()
    assert len(found) > 100
    assert found.startswith(b"\x89PNG") == left.endswith(".png")


@pytest.mark.parametrize("example", ["copy_task"], indirect=True)
def test_strings_are_framed_and_spelled(example: ModuleType) -> None:
    strings, mask = example.make_strings(50)
    lengths = mask.sum(dim=1).tolist()
    assert min(lengths) >= example.SHORTEST
    assert len(set(lengths)) > 5
    spelt, wanted = example.spell(strings), example.spell(example.framed(strings, mask))
    assert [len(string) for string in spelt] == lengths
    assert wanted == [f"^{string}." for string in spelt]


@pytest.mark.parametrize("example", ["copy_task"], indirect=True)
def test_maps_show_cross_attention_without_padding(example: ModuleType) -> None:
    model = example.build_model().eval()
    strings, mask = example.make_strings(3)
    maps = example.where_it_looks(model, strings, mask)
    assert [tuple(weights.shape) for weights in maps] == [(3, example.LONGEST + 1, example.LONGEST)] * 2
    for weights in maps:
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(3, example.LONGEST + 1))
        assert not weights.masked_select(~mask[:, None]).any()


@pytest.mark.parametrize("example", ["vit_digits"], indirect=True)
def test_digits_are_split_and_shifted_by_a_pixel(example: ModuleType) -> None:
    (images, labels), (held_out, _) = example.read_digits()
    assert len(images) + len(held_out) == 1797
    assert images.shape[1:] == (1, 8, 8)
    assert set(labels.tolist()) == set(range(10))

    dot = torch.zeros(200, 1, 8, 8)
    dot[:, :, 3, 4] = 1.0
    places = {tuple(place.tolist()) for place in example.shifted(dot)[:, 0].nonzero()[:, 1:]}
    assert places == {(row, column) for row in (2, 3, 4) for column in (3, 4, 5)}
    assert example.shifted(torch.ones(200, 1, 8, 8)).mean() < 1, "what moves in is empty"


@pytest.mark.parametrize("example", ["length_extrapolation"], indirect=True)
def test_the_same_bytes_are_scored_at_each_length(example: ModuleType) -> None:
    # without positions, and with layers that start as nothing, only the byte before counts
    model = example.build_model(example.NO_TABLE).eval()
    torch.nn.init.normal_(model.net.to_logits.weight)
    windows = torch.randint(256, (2, 8 * example.CONTEXT + 1))
    short, long = (example.bits_per_byte(model, windows, times * example.CONTEXT) for times in (1, 8))
    assert short == pytest.approx(long, rel=1e-5)
    with torch.no_grad():
        tail = float(model(windows[:, -example.SCORED - 1 :])) / math.log(2)
    assert short == pytest.approx(tail, rel=1e-5)


@pytest.mark.parametrize("example", ["length_extrapolation"], indirect=True)
@torch.no_grad()
def test_each_curve_has_its_own_positions(example: ModuleType) -> None:
    tokens = torch.randint(256, (1, example.CONTEXT))
    outputs = {}
    for name, positions in example.POSITIONS.items():
        model = example.build_model(positions).eval()
        for key, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        outputs[name] = model.net(tokens)
    same = [(a, b) for a, b in itertools.combinations(outputs, 2) if torch.allclose(outputs[a], outputs[b], atol=1e-5)]
    assert not same


@pytest.mark.parametrize("example", ["xl_long_text"], indirect=True)
@pytest.mark.parametrize("memory", [0, 128])
def test_bits_by_position_average_to_the_loss(example: ModuleType, memory: int) -> None:
    torch.manual_seed(0)
    model = example.build_model(memory).eval()
    torch.nn.init.normal_(model.net.to_logits.weight)
    rows = torch.randint(256, (2, 4 * example.SEGMENT + 1))
    with torch.no_grad():
        bits = float(model(rows)) / math.log(2)
    assert float(example.bits_by_place(model, rows).mean()) == pytest.approx(bits, rel=1e-5)


@pytest.mark.parametrize("example", ["recall_hybrid"], indirect=True)
def test_values_to_recall_are_those_of_keys_that_were_there(example: ModuleType) -> None:
    ids, values = example.make_rows(20, 8)
    for row, wanted in zip(ids.unflatten(1, (-1, 2)).tolist(), values.tolist(), strict=True):
        held: dict[int, int] = {}
        for (key, value), each in zip(row, wanted, strict=True):
            assert each == held.get(key, example.NEW)
            held[key] = value - example.KEYS
        assert len(held) == 8


@pytest.mark.parametrize("example", ["dpo_preferences"], indirect=True)
def test_judge_prefers_words_joined_by_an_underscore(example: ModuleType) -> None:
    def ids(name: str) -> list[int]:
        row = [example.END, *map(example.LETTERS.index, name), example.END]
        return row + [example.PAD] * (example.LONGEST + 2 - len(row))

    names = ["read_line", "readline", "_hidden", "a_b", "trailing_"]
    rows = torch.tensor([ids(name) for name in names])
    assert example.spell(rows) == names
    assert example.is_preferred(rows).tolist() == [True, False, False, True, False]


@pytest.mark.parametrize("example", ["copy_task"], indirect=True)
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--help"], 0, ["(default: 600)", "(default: runs/copy_task)", "--device", "(default: 0)"]),
        (["--device", "nosuch"], 2, ["'nosuch' is no device of this machine"]),
        (["--steps", 0], 2, ["'0' is not a whole number of at least 1"]),
        (["--out", __file__], 2, ["cannot be written to", "pass another --out"]),
    ],
    ids=["help", "device", "steps", "folder"],
)
def test_the_command_line(
    example: ModuleType,
    arguments: list[object],
    code: int,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as left:
        run(example, monkeypatch, *arguments)
    assert left.value.code == code
    shown = " ".join("".join(capsys.readouterr()).split())
    for each in words:
        assert each in shown


@pytest.mark.parametrize("example", ["serve"], indirect=True)
def test_a_server_continues_texts_and_refuses_requests_in_words(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example.Handler, "log_message", lambda *_: None)
    decoder = Decoder(dim=16, depth=1, heads=2, rotary_pos_emb=True)
    model = AutoregressiveWrapper(TransformerWrapper(num_tokens=256, max_seq_len=32, attn_layers=decoder)).eval()
    save_model(model, tmp_path / "model.safetensors")
    with example.Server(tmp_path / "model.safetensors", ("127.0.0.1", 0)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"

        def ask(**request: object) -> tuple[int, str]:
            try:
                with urlopen(address, data=json.dumps(request).encode()) as answer:
                    return answer.status, answer.read().decode()
            except HTTPError as error:
                return error.code, error.read().decode()

        greedy = {"length": 6, "temperature": 0.0}
        status, body = ask(prompts=["def ", "x"], **greedy)
        rows = model.generate([list(b"def "), list(b"x")], 6, temperature=0.0)
        assert status == 200
        assert json.loads(body)["texts"] == [bytes(row.tolist()).decode(errors="replace") for row in rows]

        status, body = ask(prompts=["def "], stream=True, **greedy)
        assert (status, body) == (200, bytes(rows[0].tolist()).decode(errors="replace"))

        for refused, words in (
            ({"prompts": []}, "list of texts"),
            ({"prompts": [""], "stream": True}, "list of texts"),
            ({"prompts": ["a"], "length": "x"}, "a whole number"),
            ({"prompts": ["a", "b"], "stream": True}, "2 prompts cannot be one stream"),
            ({"prompts": ["a"], "top_p": 0.9}, "unknown field 'top_p'"),
        ):
            status, body = ask(**refused)
            assert status == 400
            assert words in json.loads(body)["error"]
        server.shutdown()
