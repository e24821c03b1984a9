"""What Python users expect of a package: a version, a short `dir` and `help`, warnings where they look for them."""

from __future__ import annotations

import importlib
import inspect
import logging
import pydoc
import re
import runpy
import tomllib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from loguru import logger

import x_transformers
from x_transformers import Attention, AutoregressiveWrapper, Decoder, Encoder, TransformerWrapper, notices
from x_transformers.errors import ConfigError, UnknownKeywordError
from x_transformers.notices import VARIABLE, OptionWarning, report_by, warn
from x_transformers.options.configured import Configured

ROOT = Path(__file__).resolve().parents[1]


def test_the_version_is_written_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["hatch"]["version"]["path"] == "x_transformers/__init__.py"
    assert re.fullmatch(r"\d+\.\d+\.\d+", x_transformers.__version__)


def test_dir_lists_what_is_public() -> None:
    listed = [name for name in dir(x_transformers) if not name.startswith("__")]
    assert sorted(listed) == sorted(x_transformers.__all__)
    for name in ("attend", "layers.layers", "autoregressive_wrapper", "options.schema"):
        assert inspect.ismodule(importlib.import_module(f"x_transformers.{name}"))


# help


@pytest.mark.parametrize("cls", [Decoder, Encoder, TransformerWrapper, Attention], ids=lambda cls: cls.__name__)
def test_help_is_short_and_complete(cls: type) -> None:
    text = pydoc.render_doc(cls, renderer=pydoc.plaintext)
    head = next(line for line in text.splitlines() if f"{cls.__name__}(" in line and "class" not in line)
    assert len(head) < 400
    assert "**keywords" in head
    signature = inspect.signature(cls)
    assert len(signature.parameters) > 30
    assert str(signature) in head
    assert signature.format() == str(signature)
    own = cls.__doc__ or ""
    assert len(own.splitlines()) < 420
    for name in signature.parameters:
        assert name.removeprefix("cross_") in own, name


def test_copies_of_a_signature_name_every_keyword() -> None:
    signature = inspect.signature(Decoder)
    fewer = signature.replace(parameters=[entry for entry in signature.parameters.values() if entry.name != "dim"])
    assert len(fewer.parameters) == len(signature.parameters) - 1
    signature.bind(dim=16, depth=1, attn_qk_norm=True)
    with pytest.raises(TypeError, match="zzz"):
        signature.bind(dim=16, zzz=1)


def test_keywords_are_described() -> None:
    everything = Decoder.describe()
    for name in inspect.signature(Decoder).parameters:
        assert name in ("dim", "causal") or f"    {name} = " in everything, name
    one = Decoder.describe("rotary_xpos")
    assert one.startswith("rotary: ")
    assert "2104.09864" in one
    assert "rotary_xpos = False: " in one
    assert "\n    cross_attn_qk_norm = " in Decoder.describe("cross_attn_qk_norm")
    assert TransformerWrapper.describe("tie_embedding").count("tie_embedding = False") == 1
    with pytest.raises(UnknownKeywordError, match=r"`num_heads`\. It is `heads` here"):
        Decoder.describe("num_heads")
    assert TransformerWrapper.describe("num_tokens") == "num_tokens: size of the vocabulary."
    assert "keywords: see below" not in TransformerWrapper.describe()


def test_wrappers_describe_their_arguments() -> None:
    arguments = inspect.signature(AutoregressiveWrapper).parameters
    lines = AutoregressiveWrapper.describe().splitlines()
    assert [line.split()[0].rstrip(":") for line in lines[1:]] == [*arguments]
    assert AutoregressiveWrapper.describe("mask_prob").startswith("mask_prob = 0.0: fraction")
    for name in x_transformers.__all__:
        kind = getattr(x_transformers, name)
        if isinstance(kind, type) and issubclass(kind, Configured):
            assert len(kind.describe().splitlines()) > 2, name
    with pytest.raises(UnknownKeywordError, match="pad_value"):
        AutoregressiveWrapper.describe("pad_valeu")


# warnings

UNWISE = {"dim": 16, "depth": 1, "heads": 2, "rotary_xpos_scale_base": 256}


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    report_by("loguru")


def by_loguru() -> list[tuple[str, str]]:
    heard: list[tuple[str, str]] = []
    sink = logger.add(lambda message: heard.append((message.record["name"], message.record["message"])))
    Decoder(**UNWISE)
    logger.remove(sink)
    return heard


def test_warnings_go_to_loguru_by_default() -> None:
    ((name, message),) = by_loguru()
    assert name == "x_transformers.layers.layers"
    assert "`rotary_xpos_scale_base` has no effect" in message


def test_warnings_of_python() -> None:
    report_by("warnings")
    with pytest.warns(OptionWarning, match="`rotary_xpos_scale_base` has no effect") as caught:
        assert by_loguru() == []
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OptionWarning)
        Decoder(**UNWISE)
    with warnings.catch_warnings():
        warnings.simplefilter("error", OptionWarning)
        with pytest.raises(OptionWarning):
            Decoder(**UNWISE)


def test_records_of_logging() -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("x_transformers").addHandler(handler)
    report_by("logging")
    try:
        assert by_loguru() == []
    finally:
        logging.getLogger("x_transformers").removeHandler(handler)
    (record,) = records
    assert (record.levelname, record.pathname) == ("WARNING", __file__)
    assert "has no effect" in record.getMessage()


def test_messages_are_not_formatted() -> None:
    report_by("warnings")
    with pytest.warns(OptionWarning, match=r"\{a\} %s"):
        warn("{a} %s")


def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "warnings")
    assert runpy.run_path(notices.__file__)["_destination"] == "warnings"
    monkeypatch.setenv(VARIABLE, "nonsense")
    with pytest.raises(ConfigError, match="'nonsense'"):
        runpy.run_path(notices.__file__)


def test_no_other_destination() -> None:
    with pytest.raises(ConfigError, match="cannot be reported by 'print'; choose one of \"loguru\""):
        report_by("print")  # type: ignore[arg-type]


# notebooks


@pytest.mark.parametrize("table", [lambda: Decoder(**UNWISE, attn_qk_norm=True, verbose=False).explain()])
def test_explanations_in_notebooks(table: Callable[[], object]) -> None:
    explained = table()
    page = ElementTree.fromstring(f"<div>{explained._repr_html_().replace('<br>', '<br/>')}</div>")  # type: ignore[attr-defined]
    rows = [["".join(cell.itertext()) for cell in row] for row in page.iter("tr")]
    assert len(rows) == len(explained.rows) + 2  # type: ignore[attr-defined]
    assert rows[1][0] == "0 attention"
    assert rows[1][4] == "qk_norm"
    assert rows[-1][1] == f"{explained.parameters:,}"  # type: ignore[attr-defined]
