"""Benchmarks compare models that compute the same, run at any size, and their README shows what was recorded."""

import dataclasses
import importlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

needs_contestants = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="contestants come from the extra `hf`"
)

ROOT = Path(__file__).resolve().parents[1]
MODULES = (
    "agreement bare_llama contestants features gpu lengths limits measure memory plot "
    "report results_file run settings weights"
)
SECTIONS = ("training", "prefill", "decoding", "lengths", "features", "memory", "limits", "kernels")
MOST = 60_000  # bytes of a picture


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The modules of the folder, which is not installed."""
    monkeypatch.syspath_prepend(ROOT)
    modules = {name: importlib.import_module(f"benchmarks.{name}") for name in ("bare", *MODULES.split())}
    return SimpleNamespace(**modules)


@pytest.fixture
def shape(benchmarks: SimpleNamespace) -> Any:
    return benchmarks.bare.Shape(vocab=50, context=32, layers=2, heads=2, dim=64)


@pytest.fixture
def tiny(benchmarks: SimpleNamespace, shape: Any) -> Any:
    """Settings that take a moment."""
    return benchmarks.settings.Settings(
        shape=dataclasses.replace(shape, layers=1),
        rows=2,
        rounds=1,
        batches=(1, 2),
        prompt=8,
        new=8,
        lengths=(16, 32),
        short=1,
        features=32,
        memory=(32,),
        vocabulary=64,
    )


@pytest.fixture
def in_here(benchmarks: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Peaks of memory are taken in this process, and what was asked for is listed."""
    asked = []

    def peak(module: str, *arguments: str) -> int:
        asked.append(arguments[0])
        printed = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("builtins.print", printed.append)
            importlib.import_module(module).main(list(arguments))
        return printed[-1]

    monkeypatch.setattr(benchmarks.measure, "in_process", peak)
    return asked


# the contestants


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def moved(benchmarks: SimpleNamespace, shape: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both families with weights that are all away from their initial values, then shared."""
    gpts, llamas = benchmarks.contestants.gpts(shape), benchmarks.contestants.llamas(shape)
    bare, bare_llama = gpts["bare"].model, llamas["bare Llama"].model
    with torch.no_grad():
        for parameter in (*bare.parameters(), *bare_llama.parameters()):
            parameter.add_(0.05 * torch.randn_like(parameter))
    benchmarks.weights.share_gpt(bare, gpts["ours"].model.net, gpts["GPT-2"].model)
    benchmarks.weights.share_llama(bare_llama, llamas["our Llama"].model.net, llamas["Llama"].model)
    for each in (*gpts.values(), *llamas.values()):
        each.model.eval()
    return gpts, llamas


@needs_contestants
def test_contestants_have_the_same_parameters(benchmarks: SimpleNamespace, shape: Any) -> None:
    """But for the biases of GPT-2."""
    gpts, llamas = benchmarks.contestants.gpts(shape), benchmarks.contestants.llamas(shape)
    plain = parameters(gpts["bare"].model)
    assert parameters(gpts["ours"].model) == plain
    biases = [p.numel() for name, p in gpts["GPT-2"].model.named_parameters() if name.endswith("bias")]
    assert parameters(gpts["GPT-2"].model) == plain + sum(biases)
    plain = parameters(llamas["bare Llama"].model)
    assert parameters(llamas["our Llama"].model) == parameters(llamas["Llama"].model) == plain


@needs_contestants
def test_contestants_agree(benchmarks: SimpleNamespace, shape: Any) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, shape.vocab, (2, shape.context))
    for family in moved(benchmarks, shape):
        benchmarks.agreement.check(family, tokens)
        first, *others = [each.logits(tokens) for each in family.values()]
        assert first.std() > 0.2
        for other in others:
            torch.testing.assert_close(other, first, atol=1e-4, rtol=0)


@needs_contestants
def test_losses_cover_all_tokens_but_the_first(benchmarks: SimpleNamespace, shape: Any) -> None:
    tokens = torch.randint(0, shape.vocab, (2, 9))
    for family in moved(benchmarks, shape):
        for each in family.values():
            wanted = nn.functional.cross_entropy(each.logits(tokens)[:, :-1].mT, tokens[:, 1:])
            torch.testing.assert_close(each.loss(tokens), wanted, atol=1e-5, rtol=0)


@needs_contestants
@pytest.mark.parametrize(
    ("part", "what"),
    [
        ("attn_layers.layers.1.feedforward.down.weight", "logits of"),
        ("generate", "greedy tokens of"),
        ("loss", "losses of"),
    ],
)
def test_disagreeing_contestants_are_not_measured(
    part: str, what: str, benchmarks: SimpleNamespace, shape: Any
) -> None:
    torch.manual_seed(0)
    gpts, _ = moved(benchmarks, shape)
    ours = gpts["ours"]
    if part == "generate":
        gpts["ours"] = dataclasses.replace(ours, generate=lambda *given: (ours.generate(*given) + 1) % shape.vocab)
    elif part == "loss":
        gpts["ours"] = dataclasses.replace(ours, loss=lambda tokens: ours.loss(tokens[:, 1:]))
    else:
        ours.model.net.get_parameter(part).data[0, 0] += 1
    with pytest.raises(AssertionError, match=rf"{what} ours and bare differ by"):
        benchmarks.agreement.check(gpts, torch.randint(0, shape.vocab, (2, shape.context)))


@needs_contestants
def test_windows_and_padding_agree_where_they_have_no_effect(benchmarks: SimpleNamespace, shape: Any) -> None:
    lengths = benchmarks.lengths
    torch.manual_seed(0)
    tokens = torch.randint(0, shape.vocab, (1, shape.context))
    contestants = lengths.long(shape)
    for each in contestants.values():
        each.model.eval()
    lengths.check_long(contestants, tokens)
    padded = contestants["padding"]
    assert not torch.equal(padded.logits(tokens)[:, -1], contestants["ours"].logits(tokens)[:, -1])
    wrong = {**contestants, "padding": dataclasses.replace(padded, logits=lambda t: padded.logits(t.flip(1)))}
    with pytest.raises(AssertionError, match="logits with padding and of bare without"):
        lengths.check_long(wrong, tokens)


@needs_contestants
def test_windows_limit_attention(benchmarks: SimpleNamespace, shape: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks.lengths, "WINDOW", 4)
    contestants = benchmarks.lengths.long(dataclasses.replace(shape, layers=1))
    tokens = torch.randint(0, shape.vocab, (1, 16))
    changed = torch.cat(((tokens[:, :1] + 1) % shape.vocab, tokens[:, 1:]), dim=1)
    last = {name: [each.logits(x)[:, -1] for x in (tokens, changed)] for name, each in contestants.items()}
    torch.testing.assert_close(*last["window"], atol=0, rtol=0)
    assert not torch.equal(*last["ours"])


# the sections


def figures_of(benchmarks: SimpleNamespace, section: str, settings: Any) -> dict[str, dict[str, float]]:
    return dict(benchmarks.run.SECTIONS[section](settings))


def test_every_section_is_listed(benchmarks: SimpleNamespace) -> None:
    assert tuple(benchmarks.run.SECTIONS) == SECTIONS == tuple(benchmarks.report.TITLES)


ALL = {"bare", "ours", "GPT-2", "bare Llama", "our Llama", "Llama"}


@needs_contestants
@pytest.mark.parametrize(
    ("section", "cases", "contestants"),
    [
        ("training", ["eager"], ALL),
        ("prefill", ["eager"], ALL),
        ("decoding", ["eager, batch 1", "eager, batch 2"], {*ALL, "ours, dynamic cache"}),
        ("lengths", ["16 tokens", "32 tokens"], {"bare", "ours", "GPT-2", "window", "padding"}),
    ],
)
def test_sections_run(
    section: str, cases: list[str], contestants: set[str], benchmarks: SimpleNamespace, tiny: Any
) -> None:
    figures = figures_of(benchmarks, section, tiny)
    assert list(figures) == cases
    assert all(each.keys() == contestants for each in figures.values())
    assert all(0 < rate < 1e9 for each in figures.values() for rate in each.values())


def test_features_run(benchmarks: SimpleNamespace, tiny: Any) -> None:
    ((case, figures),) = figures_of(benchmarks, "features", tiny).items()
    assert case == "32 tokens"
    assert list(figures) == list(benchmarks.features.FEATURES)
    assert next(iter(figures)) == "plain"


@needs_contestants
def test_memory_runs(benchmarks: SimpleNamespace, tiny: Any, in_here: list[str]) -> None:
    figures = figures_of(benchmarks, "memory", tiny)
    assert list(figures) == ["8 rows of 32 tokens", "a vocabulary of 64", "one row of 32 tokens"]
    assert in_here == [name for each in figures.values() for name in each]
    assert {*in_here} == {*benchmarks.lengths.NAMES, *benchmarks.memory.SAVING}


@needs_contestants
def test_limits_run(benchmarks: SimpleNamespace, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(benchmarks.limits.COPIED, "cpu", 2**20)
    monkeypatch.setitem(benchmarks.limits.WIDTHS, "cpu", 64)
    figures = figures_of(benchmarks, "limits", tiny)
    assert list(figures) == ["eager, training", "eager, decoding at batch 1"]
    assert all(list(each) == ["limit", "bare Llama", "our Llama", "Llama"] for each in figures.values())
    assert all(0 < rate < 1e12 for each in figures.values() for rate in each.values())


@needs_contestants
def test_limits_count_operations_and_bytes(benchmarks: SimpleNamespace, shape: Any) -> None:
    """The products of a pass, counted by PyTorch; and the same weights in all models."""
    limits, (bare, ours, other) = benchmarks.limits, benchmarks.contestants.llamas(shape).values()
    assert len({sum(t.numel() for t in limits.maps(each.model)) for each in (bare, ours, other)}) == 1
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        other.model.eval()(torch.zeros(3, shape.context, dtype=torch.long))
    seen = 2 * 2 * shape.layers * shape.dim * shape.context / 2  # half of them: it computes what causality hides, too
    assert counter.get_total_flops() / (3 * shape.context) == limits.products(ours.model, shape) + seen


@needs_contestants
def test_sections_run_in_bfloat16(benchmarks: SimpleNamespace, tiny: Any) -> None:
    settings = dataclasses.replace(tiny, dtype=torch.bfloat16, batches=(2,), lengths=(16,))
    for section in ("training", "prefill", "decoding", "lengths", "limits"):
        assert figures_of(benchmarks, section, settings)


@needs_contestants
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Hugging Face's, within a graph
@pytest.mark.parametrize("section", ["training", "prefill", "decoding"])
def test_compiled_contestants_are_compiled(
    section: str, benchmarks: SimpleNamespace, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them; bare and ours to one graph."""
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        seen.append(contestant[-1])
        return graph.forward

    contestant: list[str] = []
    turns = benchmarks.measure.side_by_side

    def one_by_one(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
        taken = {}
        for name, run in runs.items():
            contestant.append(name)
            taken |= turns({name: run}, rounds)
        return taken

    monkeypatch.setattr(importlib.import_module("benchmarks.speed"), "side_by_side", one_by_one)
    figures = figures_of(benchmarks, section, dataclasses.replace(tiny, backend=backend, batches=(2,)))
    assert [case.split(",")[0] for case in figures] == ["eager", "compiled"]
    assert {*seen} == {*figures[next(reversed(figures))]} == ALL
    assert all(seen.count(name) == 1 for name in ("bare", "ours", "bare Llama", "our Llama"))


def test_feedforwards_have_a_width_that_hardware_likes(benchmarks: SimpleNamespace) -> None:
    widths = {dim: benchmarks.bare_llama.inner_width(dim) for dim in (64, 96, 384, 1024, 2048)}
    assert widths == {64: 256, 96: 256, 384: 1024, 1024: 2816, 2048: 5632}


def test_longer_runs_have_fewer_rounds(benchmarks: SimpleNamespace) -> None:
    settings = benchmarks.settings.Settings(rounds=9)
    assert [settings.fewer(length) for length in (64, 1024, 2048, 16384)] == [9, 9, 4, 3]
    assert benchmarks.settings.Settings(rounds=2).fewer(16384) == 2
    assert benchmarks.settings.quick(settings).rounds == 3


# measuring


def test_peaks_of_memory_are_those_of_the_run(benchmarks: SimpleNamespace) -> None:
    def run() -> None:
        torch.zeros(16 * 2**20).fill_(1.0)

    before = torch.zeros(48 * 2**20).fill_(1.0)
    peak = benchmarks.measure.peak_over(run, "cpu")
    assert 60 * 2**20 < peak < 80 * 2**20
    del before
    assert benchmarks.measure.peak_over(lambda: None, "cpu") < 8 * 2**20


def test_memory_is_measured_in_a_separate_process(benchmarks: SimpleNamespace) -> None:
    """Memory of the parent process does not count."""
    held = torch.zeros(256 * 2**20).fill_(1.0)
    arguments = "--length=32 --rows=1 --layers=1 --dim=64 --heads=1 --vocab=50 --threads=1"
    assert benchmarks.measure.in_process("benchmarks.memory", "ours", *arguments.split()) < held.nbytes / 8


# the record


def test_a_section_replaces_only_itself(
    benchmarks: SimpleNamespace, tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = benchmarks.results_file.record
    path = record("training", {"eager": {"bare": 10.0, "ours": 9.1234567}}, tiny, tmp_path)
    assert record("prefill", {"eager": {"bare": 5.0}}, tiny, tmp_path) == path
    record("training", {"eager": {"bare": 20.0}}, dataclasses.replace(tiny, rounds=4), tmp_path)
    written = json.loads(path.read_text(encoding="utf-8"))
    assert {name: each["figures"] for name, each in written.items()} == {
        "training": {"eager": {"bare": 20.0}},
        "prefill": {"eager": {"bare": 5.0}},
    }
    assert written["training"]["on"]["rounds"] == "4"
    assert written["training"]["on"]["torch"] == torch.__version__
    assert {"processor", "threads", "device", "dtype", "python", "transformers", "date"} <= {*written["prefill"]["on"]}
    other = record("prefill", {"eager": {"bare": 1.0}}, dataclasses.replace(tiny, dtype=torch.bfloat16), tmp_path)
    assert other != path
    assert list(benchmarks.results_file.recorded(tmp_path)) == sorted([path.stem, other.stem])


def test_files_are_named_after_the_machine(benchmarks: SimpleNamespace) -> None:
    on = {"processor": "Intel(R) Xeon(R) Processor", "threads": "2", "device": "cpu", "dtype": "float32"}
    assert benchmarks.results_file.name_of(on) == "intel-xeon-processor-2-threads-float32"
    assert (
        benchmarks.results_file.name_of({**on, "device": "NVIDIA H200", "dtype": "bfloat16"}) == "nvidia-h200-bfloat16"
    )


@needs_contestants
def test_command_line(
    benchmarks: SimpleNamespace,
    tiny: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Sections by name, printed and recorded; what there is not is refused."""
    monkeypatch.setattr(benchmarks.run, "quick", lambda settings: dataclasses.replace(tiny, dtype=settings.dtype))
    threads = str(torch.get_num_threads())
    benchmarks.run.main(["prefill", "training", "--quick", "--threads", threads, "--folder", str(tmp_path)])
    printed = capsys.readouterr().out
    assert re.search(r"^prefill, eager\n  bare +[\d,]+ tokens/s  1\.00\n  ours ", printed, re.M)
    assert re.search(
        r"^  ours / bare \d\.\d\d   ours / GPT-2 \d\.\d\d   "
        r"our Llama / bare Llama \d\.\d\d   our Llama / Llama \d\.\d\d$",
        printed,
        re.M,
    )
    ((_, sections),) = benchmarks.results_file.recorded(tmp_path).items()
    assert list(sections) == ["prefill", "training"]
    for wrong, why in (
        (["speed"], "there is no section speed; there are training, "),
        (["--rounds", "0"], "--rounds is 0; it must be at least 1"),
        (["--processes", "0"], "--processes is 0; it must be at least 1"),
        (["--device", "cuda"], "torch finds no GPU"),
    ):
        if wrong[-1] == "cuda" and torch.cuda.is_available():
            continue
        with pytest.raises(SystemExit):
            benchmarks.run.main(wrong)
        assert why in capsys.readouterr().err


# the README


@needs_contestants
def test_medians_over_processes(
    benchmarks: SimpleNamespace, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> None:
        speeds = [{"bare": 3.0, "ours": 1.0}, {"bare": 1.0, "ours": 9.0}, {"bare": 2.0, "ours": 1.0}]
        here = Path(command[command.index("--folder") + 1])
        benchmarks.results_file.record("prefill", {"eager": speeds[len(commands)]}, tiny, here)
        commands.append(command)

    monkeypatch.setattr(benchmarks.run.subprocess, "run", run)
    threads = str(torch.get_num_threads())
    arguments = ["prefill", "--processes", "3", "--rounds", "5", "--quick", "--threads", threads]
    benchmarks.run.main([*arguments, "--folder", str(tmp_path)])
    (written,) = benchmarks.results_file.recorded(tmp_path).values()
    assert written["prefill"]["figures"] == {"eager": {"bare": 2.0, "ours": 2.0 * 0.5}}
    assert written["prefill"]["on"]["processes"] == "3"
    assert len(commands) == 3
    for command in commands:
        assert command[1:4] == ["-m", "benchmarks.run", "prefill"]
        assert command[command.index("--rounds") + 1] == "5"
        assert "--quick" in command
        assert "--compile" not in command
        assert "--processes" not in command


def test_rendered_tables(benchmarks: SimpleNamespace) -> None:
    report = benchmarks.report
    figures = {"eager": {"bare": 1000.0, "ours": 950.0, "GPT-2": 500.0}, "compiled": {"bare": 2000.0, "ours": 2000.0}}
    assert report.table("training", figures) == (
        "| | bare | ours | GPT-2 | ours / bare | ours / GPT-2 |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: |\n"
        "| eager | 1,000 | 950 | 500 | 0.95 | 1.90 |\n"
        "| compiled | 2,000 | 2,000 | | 1.00 | |"
    )
    assert report.table("memory", {"wide": {"plain": 2.0**21, "lean": 2.0**20}}) == (
        "| wide | MiB | relative |\n| --- | ---: | ---: |\n| plain | 2 | 1.00 |\n| lean | 1 | 0.50 |"
    )


@pytest.fixture
def measured(benchmarks: SimpleNamespace, tiny: Any, tmp_path: Path) -> Path:
    """A folder with the file of a machine that has made up figures of all sections."""
    gpts = {"bare": 1000.0, "ours": 950.0, "GPT-2": 500.0}
    families = {**gpts, "our Llama": 900.0, "Llama": 600.0}
    long = {**gpts, "window": 1200.0, "padding": 940.0}
    made_up = {
        "training": {"eager": families, "compiled": families},
        "prefill": {"eager": families},
        "decoding": {"eager, batch 1": {**families, "ours, dynamic cache": 960.0}, "compiled, batch 1": families},
        "lengths": {"256 tokens": long, "16,384 tokens": {name: rate / 4 for name, rate in long.items()}},
        "features": {"1,024 tokens": {"plain": 800.0, "rotary": 720.0}},
        "memory": {"one row of 2,048 tokens": dict.fromkeys(long, 2.0**30), "wide": {"plain": 2.0**21}},
        "limits": {"eager, training": {"limit": 2000.0, "our Llama": 900.0, "Llama": 600.0}},
        "kernels": {
            "operations": {"bare": 26.0, "ours": 34.0},
            "operations by feature": {"plain": 34.0, "rotary": 48.0},
        },
    }
    for section, figures in made_up.items():
        benchmarks.results_file.record(section, figures, tiny, tmp_path)
    return tmp_path


def test_tables_name_date_and_machine(benchmarks: SimpleNamespace, measured: Path) -> None:
    written = benchmarks.report.figures(measured)
    ((machine, sections),) = benchmarks.results_file.recorded(measured).items()
    for section, title in benchmarks.report.TITLES.items():
        on = sections[section]["on"]
        assert f"**{title.split(':')[0]}: " in written
        assert f"{on['date']}, {on['processor']}, {on['threads']} thread" in written
    assert written.count(f"PyTorch {torch.__version__}, transformers ") == len(SECTIONS)
    assert "prompts of 8 tokens, 8 new ones**" in written
    assert "| compiled, batch 1 | 1,000 | 950 | 500 | 900 | 600 | | 0.95 | | 1.90 | 1.50 |" in written
    assert "| one row of 2,048 tokens | 1,024 | 1,024 | 1,024 | 1,024 | 1,024 | 1.00 | 1.00 |" in written
    for name in ("ratios", "lengths"):
        assert f"]({name}-{machine}.png)" in written


def test_pictures_are_small_and_consistent(benchmarks: SimpleNamespace, measured: Path, tmp_path: Path) -> None:
    ((machine, sections),) = benchmarks.results_file.recorded(measured).items()
    again = tmp_path / "again"
    again.mkdir()
    drawn = benchmarks.plot.draw(machine, sections, tmp_path)
    assert [path.name for path in drawn] == [f"ratios-{machine}.png", f"lengths-{machine}.png"]
    for one, two in zip(drawn, benchmarks.plot.draw(machine, sections, again), strict=True):
        assert one.read_bytes() == two.read_bytes()
        assert one.stat().st_size < MOST
        with Image.open(one) as picture:
            assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
            assert len(picture.getcolors() or ()) > 4
    del sections["lengths"]
    assert len(benchmarks.plot.draw(machine, sections, again)) == 1


def test_the_readme_shows_the_recorded_figures(benchmarks: SimpleNamespace) -> None:
    report = benchmarks.report
    readme = report.README.read_text(encoding="utf-8")
    assert report.written(readme) == readme, "run `python -m benchmarks.table --write`"
    front = report.FRONT.read_text(encoding="utf-8")
    assert report.written_front(front) == front, "run `python -m benchmarks.table --write`"
    assert all({*sections} <= {*SECTIONS} for sections in benchmarks.results_file.recorded().values())


def test_the_readme_names_every_module_with_a_command(benchmarks: SimpleNamespace) -> None:
    readme = benchmarks.report.README.read_text(encoding="utf-8")
    for path in (ROOT / "benchmarks").glob("*.py"):
        if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8"):
            assert f"python -m benchmarks.{path.stem}" in readme


def test_pictures_show_the_record(benchmarks: SimpleNamespace, tmp_path: Path) -> None:
    """The pictures next to the README are these, and the README shows them."""
    stored = {path.name for path in (ROOT / "benchmarks").glob("*.png")}
    drawn = set()
    for machine, sections in benchmarks.results_file.recorded().items():
        for path in benchmarks.plot.draw(machine, sections, tmp_path):
            drawn.add(path.name)
            assert path.read_bytes() == (ROOT / "benchmarks" / path.name).read_bytes(), (
                "run `python -m benchmarks.plot`"
            )
    assert drawn == stored
    shown = re.findall(r"^!\[[^\]]+\]\((\S+\.png)\)$", benchmarks.report.README.read_text(encoding="utf-8"), re.M)
    assert sorted(shown) == sorted(stored)
