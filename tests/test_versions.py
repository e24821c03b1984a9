"""What a version of PyTorch cannot do is refused in words, and graphs contain nothing that older compilers refuse."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import versions
from catalog import BASE, tokens
from packaging.requirements import Requirement
from torch import Tensor

from x_transformers.attention.backends import flex, varlen
from x_transformers.attention.backends.base import Situation
from x_transformers.attention.base import Needs
from x_transformers.errors import ConfigError, InputError
from x_transformers.layers import checkpointing
from x_transformers.modules.hand_written import is_exporting
from x_transformers.training import processes

ROOT = Path(__file__).resolve().parents[1]
TRACED = ("attend.py", "attention", "cache", "feedforward", "forward_pass", "layers", "masks", "models", "modules")
"""What forward passes run, and graphs contain."""

BEFORE_A_PASS = {
    "attention/qk/rotary.py",
    "layers/stack.py",
    "models/base.py",
    "models/options/pooling.py",
    "models/options/reading.py",
}
"""Modules that copy dataclasses only while they are imported, or a model is built or explained."""


def modules() -> Iterator[tuple[str, ast.Module]]:
    package = ROOT / "x_transformers"
    for room in TRACED:
        for path in sorted((package / room).rglob("*.py")) or [package / room]:
            yield path.relative_to(package).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def old_compilers_refuse(node: ast.AST) -> str | None:
    """Return what the compiler of PyTorch 2.6 cannot read in a node, or None."""
    match node:
        case ast.ImportFrom(module="dataclasses", names=names) if any(each.name == "replace" for each in names):
            return "`dataclasses.replace`; import it from `forward_pass.changed_copies`"
        case ast.Call(func=ast.Name(id="isinstance"), args=[_, ast.BinOp()]):
            return "`isinstance` of a union; use a tuple"
        case ast.Compare(ops=[ast.In()], comparators=[ast.Call(func=ast.Attribute(attr="values"))]):
            return "`in` the values of a dict; make a list of them"
        case ast.Call(func=ast.Attribute(value=ast.Attribute(attr="__dict__"), attr="items")):
            return "the items of a `__dict__`; name the attributes"
        case ast.Call(func=ast.Name(id="check_kinds"), args=[ast.Attribute(attr="__dict__"), *_]):
            return "the items of a `__dict__`; call `check_attributes`"
        case ast.Compare(
            ops=[ast.Lt() | ast.LtE()], left=ast.Call(func=ast.Name("set")), comparators=[ast.Attribute()]
        ):
            return "a set compared to an attribute; look up each element"
        case ast.Call(func=ast.Attribute(attr="difference")):
            return "a difference of sets; look up each element"
    return None


def test_graphs_contain_what_old_compilers_read() -> None:
    found, known = [], set()
    for name, tree in modules():
        for node in ast.walk(tree):
            why = old_compilers_refuse(node)
            if why is None:
                continue
            if "replace" in why and name in BEFORE_A_PASS:
                known.add(name)
            elif name != "modules/inference.py":  # makes the views of a model, outside of graphs
                found.append(f"{name}:{node.lineno}: {why}")  # type: ignore[attr-defined]
    assert found == []
    assert known == BEFORE_A_PASS


@pytest.mark.parametrize(
    "code",
    [
        "from dataclasses import dataclass, replace",
        "isinstance(x, int | str)",
        "if a in b.values(): pass",
        "x = dict(self.__dict__.items())",
        "if set(given) < self.names: pass",
        "x = sorted(self.names.difference(given))",
    ],
)
def test_the_reader_finds_each(code: str) -> None:
    assert any(old_compilers_refuse(node) is not None for node in ast.walk(ast.parse(code)))


# what versions say about themselves


@pytest.mark.skipif(
    not hasattr(torch.compiler, "_is_exporting_flag"), reason="PyTorch 2.6 does not say that it exports"
)
@pytest.mark.parametrize("strict", [False, True])
def test_exports_and_graphs_differ(strict: bool) -> None:
    """A graph that were taken for an exported program would miss what is fast in graphs only."""

    class Told(torch.nn.Module):
        def forward(self, t: Tensor) -> Tensor:
            return t + 1 if is_exporting(unknown=True) else t - 1

    t = torch.zeros(2)
    assert torch.compile(Told(), backend="eager", fullgraph=True)(t).tolist() == [-1, -1]
    assert torch.export.export(Told(), (t,), strict=strict).module()(t).tolist() == [1, 1]
    assert not is_exporting(unknown=True)


# version gates, with the version patched


def test_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    situation = Situation("cuda", torch.bfloat16, grad=True, width=64, queries=1024)
    assert flex.Flex().refuses(situation, Needs.MASK) is None or not flex.RECENT
    monkeypatch.setattr(flex, "RECENT", False)
    assert flex.Flex().refuses(situation, Needs.MASK) == f"flex needs PyTorch {flex.SINCE}"


def test_varlen(monkeypatch: pytest.MonkeyPatch) -> None:
    situation = Situation("cuda", torch.bfloat16, grad=True, width=64, queries=1024)
    monkeypatch.setattr(torch, "__version__", "2.12.1+cu130")
    assert varlen.Varlen().refuses(situation, Needs.DOCUMENTS) == "varlen needs PyTorch 2.13"


@pytest.mark.parametrize("fullgraph", [True, False])
def test_checkpoints_in_graphs(fullgraph: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpointing, "IN_GRAPHS", False)
    model = BASE.build(checkpoint_every=1, depth=1).train()
    compiled = torch.compile(model, fullgraph=fullgraph, backend="eager")
    with pytest.raises(InputError, match=r"needs PyTorch 2\.\d+.*`compile_blocks\(\)`"):
        compiled(tokens(2, 8))
    torch.compiler.reset()
    with torch.no_grad():
        compiled(tokens(2, 8))  # nothing runs again without gradients


def test_sharding_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "ON_CPU", False)
    monkeypatch.setattr(processes, "joins", lambda: True)
    with pytest.raises(ConfigError, match=r"`shard` on a CPU needs PyTorch 2\.9, and this is .*`torch\.nn\.parallel"):
        processes.shard(BASE.build(depth=1))


# the command


RESULTS = {
    "2.10.0": dict.fromkeys(versions.GROUPS, "9 of 10"),
    "2.9.1": {"goldens": "4 of 4"},
}


def test_table() -> None:
    """Versions in order, as numbers; a dash where nothing ran."""
    rows = versions.table(RESULTS).splitlines()
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| 2.9.1", "| 2.10.0"]
    assert rows[3].count("9 of 10") == len(versions.GROUPS)
    assert rows[2].count("–") == len(versions.GROUPS) - 1
    assert {row.count("|") for row in rows} == {len(versions.GROUPS) + 2}


def test_other_rows_and_columns_stay() -> None:
    page = f"Before.\n{versions.BEGIN}\n{versions.table(RESULTS)}\n{versions.END}\nAfter."
    rows = versions.written_rows(page)
    assert {name: cell for name, cell in rows["2.9.1"].items() if cell != "–"} == RESULTS["2.9.1"]
    assert rows["2.10.0"] == RESULTS["2.10.0"]
    page = versions.with_rows(page, {"2.9.1": {"export": "2 of 3"}, "2.6.0": {}})
    assert page.startswith("Before.\n")
    assert page.endswith("\nAfter.")
    again = versions.written_rows(page)
    assert list(again) == ["2.6.0", "2.9.1", "2.10.0"]
    assert (again["2.9.1"]["goldens"], again["2.9.1"]["export"]) == ("4 of 4", "2 of 3")


def test_the_tests_install_on_the_oldest_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"torch>={versions.OLDEST}" in project["dependencies"]
    for extra in ("test", "examples"):
        assert not [each for each in project["optional-dependencies"][extra] if Requirement(each).name == "torch"]


def test_groups_name_tests() -> None:
    assert list(versions.unknown_tests()) == []


def test_results_belong_to_groups() -> None:
    for name, tests in versions.GROUPS.items():
        for test in tests:
            file, _, function = test.partition("::")
            assert versions.group_of(file, function or "test_any[1]", list(versions.GROUPS)) == name
    file, left_out = "tests/properties/test_recompute.py", "test_gradients_are_the_same[decoder-base]"
    assert versions.group_of(file, left_out, list(versions.GROUPS)) == "checkpointing"


@pytest.mark.parametrize(
    ("inside", "result"), [("", "passed"), ("<failure/>", "failed"), ("<error/>", "failed"), ("<skipped/>", "skipped")]
)
def test_outcomes(inside: str, result: str) -> None:
    assert versions.outcome(ElementTree.fromstring(f"<testcase>{inside}</testcase>")) == result


def test_table_of_the_documentation() -> None:
    page = versions.PAGE.read_text(encoding="utf-8")
    assert page.count(versions.BEGIN) == page.count(versions.END) == 1
    rows = page.split(versions.BEGIN)[1].split(versions.END)[0].strip().splitlines()
    assert rows[:2] == versions.table({}).splitlines()
    assert versions.table(versions.written_rows(page)).splitlines() == rows
