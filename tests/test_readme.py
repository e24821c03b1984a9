"""The README does what it says: each Python block runs, in order, with one namespace for each `##` chapter (or
block, where the README says so); every feature of the catalogs that has a paper has its section; the contents are the
headings.

`<!-- no-run: reason -->` on the line before a block keeps it from being run; it is still compiled.

`python tests/test_readme.py --write` writes the table of contents again.
"""

import importlib
import re
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
from loguru import logger

import x_transformers
from x_transformers.layers.catalog import FEATURES as STACK_FEATURES
from x_transformers.models.options.catalog import FEATURES as MODEL_FEATURES

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^(?:<!-- no-run: (?P<reason>[^\n]+) -->\n)?```python\n(?P<code>.*?)^```$", re.M | re.S)
START, END = "<!-- contents: made by `python tests/test_readme.py --write` -->", "<!-- end of the contents -->"
TABLE = "<!-- options: made by"
FEATURES = {
    feature.name: feature
    for feature in (*STACK_FEATURES, *MODEL_FEATURES)
    if feature.paper is not None and feature.group != "mixer" and feature.name not in ("mixer", "layer_period")
}
"""Features with a paper; those of mixers are in `docs/token-mixers.md`."""

GALLERY = (
    "Positions",
    "Attention scores and weights",
    "Queries, keys and values",
    "Memory",
    "Feedforwards",
    "Norms",
    "Residual streams",
    "The order of layers",
    "Embeddings and outputs",
    "Training objectives",
    "Decoding",
)
"""The chapters of papers: under each heading two to four sentences, one block, and where the idea comes from."""

ALONE = {"Models", "Training and sampling"}
"""The chapters whose blocks run each by itself."""

WITHOUT_PAPER = {
    "Query-dependent position bias",
    "A zero key",
    "Custom attention functions",
    "Soft-clamped feedforwards",
    "Custom layer orders",
    "Deep embeddings",
    "Compiling block by block",
    "Predicting the next embedding",
    "Top-a",
    "Custom filters",
    "Beam search",
    "Streaming",
    "Static caches",
    "Windowed caches",
    "Reusing a prefix",
}
"""Sections of ideas that nobody published, or that nobody could find."""

CITED_OTHERWISE = {
    "value_gates": "2505.06708",  # the broader study of gates after attention
    "ff_softclamp": None,
    "inverted_attention": "Inverted-Attention Transformers",
}
"""Papers that a section cites instead of the one of its feature."""

PARTS = {"AdaptiveRMSNorm", "AttentionLayers", "RMSNorm", "default_device", "layer_schedule"}
"""Public names without a section: parts, a base class, helpers."""


@dataclass(frozen=True)
class Block:
    line: int
    code: str
    run: bool


@dataclass(frozen=True)
class Section:
    """A `###` heading and the text below it."""

    chapter: str
    title: str
    text: str

    @property
    def blocks(self) -> list[str]:
        return [match["code"] for match in BLOCK.finditer(self.text)]


def chapters() -> dict[str, list[Block]]:
    """The Python blocks under each `##` heading that has some."""
    found: dict[str, list[Block]] = {}
    for match in BLOCK.finditer(README):
        above = README[: match.start("code")]
        heading = re.findall(r"^## (.+)$", above, re.M)[-1]
        block = Block(above.count("\n"), match["code"], run=match["reason"] is None)
        found.setdefault(heading, []).append(block)
    return found


def sections() -> list[Section]:
    """Every `###` section up to the table of options."""
    before_table = README.split(TABLE)[0]
    found = []
    for chapter in re.split(r"^## ", before_table, flags=re.M)[1:]:
        title = chapter.split("\n", 1)[0]
        for text in re.split(r"^### ", chapter, flags=re.M)[1:]:
            found.append(Section(title, *text.split("\n", 1)))
    return found


CHAPTERS, SECTIONS = chapters(), sections()
PAPERS = [section for section in SECTIONS if section.chapter in GALLERY]


def contents(readme: str) -> str:
    """The table of contents: a line for each chapter, with its sections."""
    used: dict[str, int] = {}
    lines: list[str] = []
    for marks, title in re.findall(r"^(##|###) (.+)$", readme.split(TABLE)[0], re.M):
        slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")  # as GitHub makes them
        count = used[slug] = used.get(slug, -1) + 1
        link = f"[{title}](#{slug}{f'-{count}' if count else ''})"
        if title == "Contents":
            continue
        if marks == "##":
            lines.append(f"- {link}")
        else:
            lines[-1] += (" · " if " · " in lines[-1] or ": [" in lines[-1] else ": ") + link
    more = re.findall(r"^## (.+)$", readme.split(TABLE)[1], re.M)
    lines += [f"- [{title}](#{title.lower().replace(' ', '-')})" for title in more]
    return "\n".join((START, *lines, END))


def written(readme: str) -> str:
    """The README with its contents as they are now."""
    before, rest = readme.split(START)
    return before + contents(readme) + rest.split(END)[1]


def test_every_block_is_found() -> None:
    assert sum(map(len, CHAPTERS.values())) == README.count("```python") > 100


@pytest.mark.parametrize("heading", CHAPTERS)
def test_blocks_run(heading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a word in the log: no example has an option without effect, or an unwise one."""
    monkeypatch.chdir(tmp_path)
    logged: list[str] = []
    sink = logger.add(logged.append, level="WARNING", format="{message}")
    namespace: dict[str, object] = {"__name__": "readme"}
    try:
        for block in CHAPTERS[heading]:
            if heading in ALONE:
                namespace = {"__name__": "readme"}
            # Blank lines in front, so that a traceback names the README's own line.
            code = compile("\n" * block.line + block.code, str(ROOT / "README.md"), "exec")
            if block.run:
                exec(code, namespace)
    finally:
        logger.remove(sink)
    assert logged == []


def test_table_of_contents_lists_the_headings() -> None:
    assert written(README) == README, "run `python tests/test_readme.py --write`"


@pytest.mark.parametrize("section", PAPERS, ids=lambda section: section.title)
def test_a_section_is_a_few_sentences_and_a_block(section: Section) -> None:
    words, code, rest = section.text.partition("```python\n")
    assert code, "there is no block"
    plain = re.sub(r"`[^`]*`", "code", words)
    assert 2 <= len(re.findall(r"[.!?](?=\s|$)", plain)) <= 4, plain
    assert len(section.blocks) == 1
    cited = re.search(r"^Papers?: .*(https://|\(NeurIPS)", rest, re.M | re.S) is not None
    assert cited == (section.title not in WITHOUT_PAPER)


def test_exceptions_are_used() -> None:
    assert {section.title for section in PAPERS} >= WITHOUT_PAPER
    assert set(CITED_OTHERWISE) <= set(FEATURES)
    assert list(dict.fromkeys(section.chapter for section in PAPERS)) == list(GALLERY)


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The modules of the folder of benchmarks, which is not installed."""
    monkeypatch.syspath_prepend(ROOT)
    return {name: importlib.import_module(f"benchmarks.{name}") for name in ("configurations", "table")}


@pytest.mark.parametrize("name", FEATURES)
def test_every_paper_has_its_section(name: str, benchmarks: dict[str, ModuleType]) -> None:
    """A block switches the feature on, and the section cites its paper."""
    switches = benchmarks["table"].keywords(benchmarks["configurations"].configuration(name))
    found = [section for section in PAPERS if any(_uses(section.blocks[0], keyword) for keyword in switches)]
    assert found, f"no block has one of {', '.join(switches)}"
    cited = CITED_OTHERWISE.get(name, FEATURES[name].paper)
    assert cited is None or any(cited in section.text for section in found), f"{cited} is not cited"


def _uses(code: str, keyword: str) -> bool:
    """Return True if a call has this keyword; a single attention has it without the prefix of a stack."""
    return re.search(rf"\b(?:{keyword}|{keyword.removeprefix('attn_')}) = ", code) is not None


@pytest.mark.parametrize("name", sorted(set(x_transformers.__all__) - PARTS))
def test_every_class_has_its_section(name: str) -> None:
    own = [section for section in SECTIONS if section.title == name]
    assert len(own) == 1
    assert any(f"{name}(" in block for block in own[0].blocks)


@pytest.mark.parametrize("name", ["train", "test"])
def test_commands_are_one_line(name: str) -> None:
    commands = re.findall(rf"^<!-- command: {name} -->\n```bash\n(.*?)^```$", README, re.M | re.S)
    assert len(commands) == 1
    assert commands[0].count("\n") == 1
    assert "-c constraints.txt" in commands[0]


def test_links_have_targets() -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_headings_are_unique() -> None:
    titles = [section.title for section in SECTIONS] + re.findall(r"^## (.+)$", README, re.M)
    assert [(a, b) for a, b in pairwise(sorted(titles, key=str.lower)) if a.lower() == b.lower()] == []


if __name__ == "__main__" and "--write" in sys.argv:
    (ROOT / "README.md").write_text(written(README), encoding="utf-8")
