"""The documentation does what it says: the Python blocks of the README and of each page in `docs` run, in order, with
one namespace a page (or block, where the page says so); every feature of the catalogs that has a paper has its section;
every page is in the navigation; links have targets.

`<!-- no-run: reason -->` on the line before a block keeps it from being run; it is still compiled.
"""

import importlib
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
from loguru import logger

import x_transformers
from x_transformers.layers.catalog import FEATURES as STACK_FEATURES
from x_transformers.mixers.catalog import MIXERS
from x_transformers.models.options.catalog import FEATURES as MODEL_FEATURES

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^(?:<!-- no-run: (?P<reason>[^\n]+) -->\n)?```python\n(?P<code>.*?)^```$", re.M | re.S)
FENCE = re.compile(r"^( *)```.*?^\1```$", re.M | re.S)
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
README = (ROOT / "README.md").read_text(encoding="utf-8")
FILES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")]
FILES += [ROOT / "examples/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
"""Everything that links."""
FEATURES = {
    feature.name: feature
    for feature in (*STACK_FEATURES, *MODEL_FEATURES)
    if feature.paper is not None and feature.name not in ("mixer", "layer_period") and feature.group != "mixer"
}

GALLERY = (
    "positions",
    "attention-scores-and-weights",
    "queries-keys-and-values",
    "token-mixers",
    "memory",
    "feedforwards",
    "experts",
    "norms",
    "residual-streams",
    "order-of-layers",
    "embeddings-and-outputs",
    "training-objectives",
    "decoding",
)
"""The pages of papers: under each heading two to four sentences, one block, and where the idea comes from."""

ALONE = {"models", "training-and-sampling"}
"""The pages whose blocks run each by itself."""

WITHOUT_PAPER = {
    "Query-dependent position bias",
    "A zero key",
    "Custom attention functions",
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
    """A `##` heading and the text below it."""

    page: str
    title: str
    text: str

    @property
    def blocks(self) -> list[str]:
        return [match["code"] for match in BLOCK.finditer(self.text)]


def without_code(text: str) -> str:
    """The same lines, blank where there is code, in which `#` begins a comment."""
    return FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)


def blocks(text: str) -> list[Block]:
    """The Python blocks of a page."""
    return [
        Block(text[: match.start("code")].count("\n"), match["code"], run=match["reason"] is None)
        for match in BLOCK.finditer(text)
    ]


def sections(page: str) -> list[Section]:
    """The `##` sections of a page."""
    lines, plain = PAGES[page].splitlines(keepends=True), without_code(PAGES[page]).splitlines()
    places = [number for number, line in enumerate(plain) if line.startswith("## ")]
    return [
        Section(page, plain[start].removeprefix("## "), "".join(lines[start + 1 : end]))
        for start, end in pairwise([*places, len(lines)])
    ]


def anchors(text: str) -> list[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    used: dict[str, int] = {}
    found = []
    for title in re.findall(r"^#+ (.+)$", without_code(text), re.M):
        name = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        count = used[name] = used.get(name, -1) + 1
        found.append(f"{name}-{count}" if count else name)
    return found


SECTIONS = [section for page in PAGES for section in sections(page)]
PAPERS = [section for section in SECTIONS if section.page in GALLERY]
RUN = {name: text for name, text in {**PAGES, "README": README}.items() if blocks(text)}


def test_every_block_is_found() -> None:
    assert sum(len(blocks(text)) for text in RUN.values()) == sum(map(_fences, RUN.values())) > 190


def _fences(text: str) -> int:
    return len(re.findall(r"^ *```python", text, re.M))


@pytest.mark.parametrize("page", RUN)
def test_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a word in the log: no example has an option without effect, or an unwise one."""
    monkeypatch.chdir(tmp_path)
    logged: list[str] = []
    sink = logger.add(logged.append, level="WARNING", format="{message}")
    namespace: dict[str, object] = {"__name__": "docs"}
    try:
        for block in blocks(RUN[page]):
            if page in ALONE:
                namespace = {"__name__": "docs"}
            # Blank lines in front, so that a traceback names the page's own line.
            code = compile("\n" * block.line + block.code, f"{page}.md", "exec")
            if block.run:
                exec(code, namespace)
    finally:
        logger.remove(sink)
    assert logged == []


def test_every_page_is_in_the_navigation() -> None:
    yaml = pytest.importorskip("yaml")
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    elsewhere = site["extra"]["pages"]
    assert [path for path in elsewhere.values() if not (ROOT / path).is_file()] == []
    listed = sorted(_leaves(site["nav"]))
    assert listed == sorted([*(f"{page}.md" for page in PAGES), *elsewhere, *site["extra"]["made"]])


def _leaves(nav: object) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for each in nav.values() if isinstance(nav, dict) else nav:  # type: ignore[attr-defined]
            yield from _leaves(each)


def test_the_readme_leads_to_every_page() -> None:
    linked = set(re.findall(r"\]\(docs/([\w-]+)\.md", README))
    assert linked == set(PAGES)
    assert len(README.splitlines()) <= 330


def test_every_extra_is_described() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    table = PAGES["first-steps"].split("| extra |")[1].split("\n\n")[0]
    described = re.findall(r"`([\w-]+)`", "\n".join(line.split("|")[1] for line in table.splitlines()[2:]))
    assert sorted(described) == sorted(project["optional-dependencies"])


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_one_title(page: str) -> None:
    assert PAGES[page].startswith("# ")
    assert len(re.findall(r"^# ", without_code(PAGES[page]), re.M)) == 1


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
    assert {section.page for section in PAPERS} == set(GALLERY)
    assert set(PAGES) >= ALONE


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The modules of the folder of benchmarks, which is not installed."""
    monkeypatch.syspath_prepend(ROOT)
    return {name: importlib.import_module(f"benchmarks.{name}") for name in ("configurations", "table")}


@pytest.mark.parametrize("name", FEATURES)
def test_every_paper_has_its_section(name: str, benchmarks: dict[str, ModuleType]) -> None:
    """A block switches the feature on, and the section cites its paper."""
    switches = benchmarks["table"].keywords(benchmarks["configurations"].configuration(name))
    found = [
        section
        for section in SECTIONS
        if section.page not in ALONE and any(_uses(block, keyword) for block in section.blocks for keyword in switches)
    ]
    assert found, f"no block has one of {', '.join(switches)}"
    cited = CITED_OTHERWISE.get(name, FEATURES[name].paper)
    assert cited is None or any(cited in section.text for section in found), f"{cited} is not cited"


@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_has_its_section(name: str) -> None:
    """A block has it, and the section cites its paper."""
    found = [section for section in sections("token-mixers") if re.search(rf"mixer = \(?'{name}'", section.text)]
    assert any(str(MIXERS[name].paper) in section.text for section in found)


def _uses(code: str, keyword: str) -> bool:
    """Return True if a call has this keyword; a single attention has it without the prefix of a stack."""
    return re.search(rf"\b(?:{keyword}|{keyword.removeprefix('attn_')}) = ", code) is not None


@pytest.mark.parametrize("name", sorted(set(x_transformers.__all__) - PARTS))
def test_every_class_has_its_section(name: str) -> None:
    own = [section for section in SECTIONS if section.title == name and section.blocks]
    assert len(own) == 1
    assert any(f"{name}(" in block for block in own[0].blocks)


@pytest.mark.parametrize("name", ["train", "test"])
def test_commands_are_one_line(name: str) -> None:
    commands = re.findall(rf"^<!-- command: {name} -->\n```bash\n(.*?)^```$", README, re.M | re.S)
    assert len(commands) == 1
    assert commands[0].count("\n") == 1
    assert "-c constraints.txt" in commands[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_have_targets(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    missing = []
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#\s]*)(?:#([^)]+))?\)", without_code(text)):
        file = path.parent / target if target else path
        known = file.suffix != ".md" or not anchor or anchor in anchors(file.read_text(encoding="utf-8"))
        if not file.exists() or not known:
            missing.append(f"{target}#{anchor}")
    assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_headings_are_unique(page: str) -> None:
    titles = re.findall(r"^##+ (.+)$", without_code(PAGES[page]), re.M)
    assert [(a, b) for a, b in pairwise(sorted(titles, key=str.lower)) if a.lower() == b.lower()] == []
