"""The English of docstrings, comments, messages and pages, measured.

    python tests/test_english.py

prints how often each phrase occurs in 10,000 words, every place where one does, and every docstring that is incomplete.
"""

from __future__ import annotations

import ast
import functools
import inspect
import io
import re
import textwrap
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import pytest

import x_transformers

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "x_transformers"
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs")

MOST = {
    r"behind": 2.0,
    r"beside": 1.0,
    r"stands?": 2.0,
    r"weigh(s|ed|ing)?": 1.0,
    r"in place of": 1.0,
}
"""Phrases, as regular expressions, and how often each may occur in 10,000 words."""
SHOWN = (r"alone", r"anew", r"by and by", r"as ever", r"is told", r"speaks? of")
"""Phrases that are counted and not bounded."""

SENTENCE = 4
"""A string literal of at least this many words is a message."""


@dataclass(frozen=True)
class Text:
    """A piece of prose.

    Attributes:
        path: of the file, relative to the checkout.
        line: where it begins, from 1.
        kind: "docstring", "comment", "message" or "page".
        words: the prose, without code.
    """

    path: str
    line: int
    kind: str
    words: str

    def places(self, phrase: str) -> Iterator[str]:
        """Each place where a phrase occurs, with the words around it."""
        for match in re.finditer(rf"\b{phrase}\b", self.words, re.IGNORECASE):
            before, after = max(match.start() - 40, 0), match.end() + 40
            line = self.line + self.words.count("\n", 0, match.start())
            yield f"{self.path}:{line}: {' '.join(self.words[before:after].split())}"


def without_code(prose: str) -> str:
    """Code in backquotes is no English. Line breaks stay."""
    prose = re.sub(r"```.*?```", lambda match: "\n" * match[0].count("\n"), prose, flags=re.DOTALL)
    return re.sub(r"`[^`]*`", lambda match: "\n" * match[0].count("\n"), prose)


def docstrings(tree: ast.Module) -> Iterator[ast.Constant]:
    """Strings that are statements: docstrings of modules, classes, functions and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value


def texts_of(path: Path) -> Iterator[Text]:
    """All prose of a file."""
    name, source = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        yield Text(name, 1, "page", without_code(source))
        return
    tree = ast.parse(source)
    found = list(docstrings(tree))
    for node in found:
        yield Text(name, node.lineno, "docstring", without_code(str(node.value)))
    known = {id(node) for node in found}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in known:
            message = without_code(node.value)
            if len(message.split()) >= SENTENCE:
                yield Text(name, node.lineno, "message", message)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith(("#!", "# type:", "# noqa", "# ruff")):
            yield Text(name, token.start[0], "comment", without_code(token.string.lstrip("# ")))


@functools.cache
def corpora() -> dict[str, list[Text]]:
    """The package, its docstrings and comments by themselves, and each page; those in `docs` are one text."""
    package = [text for path in sorted(PACKAGE.rglob("*.py")) for text in texts_of(path)]
    found = {
        "docstrings and comments": [text for text in package if text.kind in ("docstring", "comment")],
        "messages": [text for text in package if text.kind == "message"],
    }
    for name in PAGES:
        paths = sorted(ROOT.glob(f"{name}/**/*.md")) or [ROOT / name]
        found[name] = [text for path in paths for text in texts_of(path)]
    return found


def size(texts: list[Text]) -> int:
    """Number of words."""
    return sum(len(re.findall(r"[A-Za-z][\w'-]*", text.words)) for text in texts)


def places(texts: list[Text], phrase: str) -> list[str]:
    """Every place where a phrase occurs."""
    return [place for text in texts for place in text.places(phrase)]


@pytest.mark.parametrize("corpus", ["docstrings and comments", "messages", *PAGES])
@pytest.mark.parametrize("phrase", MOST)
def test_phrases_are_rare(corpus: str, phrase: str) -> None:
    texts = corpora()[corpus]
    found = places(texts, phrase)
    allowed = MOST[phrase] * size(texts) / 10_000
    assert len(found) <= allowed, "\n".join(["", *found])


# Docstrings

QUESTION = re.compile(r"(What|Whether)\b")
NO_PHRASE = re.compile(r"(What|Whether|Where|How|The same)\b")


def questions() -> list[str]:
    """Docstrings that begin as a question does."""
    return [
        f"{text.path}:{text.line}: {text.words.strip().splitlines()[0]}"
        for text in corpora()["docstrings and comments"]
        if text.kind == "docstring" and QUESTION.match(text.words.strip())
    ]


def test_no_docstring_begins_as_a_question() -> None:
    assert questions() == []


@dataclass(frozen=True, eq=False)
class Documented:
    """A public class, function, method or property.

    Attributes:
        name: how users write it.
        code: the function whose parameters and errors the docstring describes; None for a property.
        generated: its signature is derived from options, which `help` describes.
    """

    name: str
    owner: Any
    code: Callable[..., Any] | None
    generated: bool = False

    @property
    def where(self) -> str:
        target = self.owner.fget if isinstance(self.owner, property) else self.owner
        path = Path(inspect.getsourcefile(target) or "").resolve()
        return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.as_posix()

    def faults(self) -> Iterator[str]:
        """What is missing from the docstring."""
        doc = inspect.cleandoc(self.owner.__doc__ or "")
        if not doc:
            if self.code is not None or isinstance(self.owner, type):
                yield "has no docstring"  # the name of a property may say it
            return
        first = doc.splitlines()[0]
        if not first.endswith("."):
            yield f"its first line does not end with a period: {first}"
        if NO_PHRASE.match(first):
            yield f"its first line begins with neither a verb nor a noun phrase: {first}"
        if self.code is None:
            return
        if self.parameters() and not self.generated and not re.search(r"^Args:", doc, re.MULTILINE):
            yield f"has parameters ({', '.join(self.parameters())}) and no `Args`"
        if self.raises() and not re.search(r"^Raises:", doc, re.MULTILINE):
            yield f"raises {', '.join(sorted(self.raises()))} and has no `Raises`"

    def parameters(self) -> list[str]:
        names = list(inspect.signature(self.code).parameters) if self.code is not None else []
        return [name for name in names if name not in ("self", "cls") and not name.startswith("_")]

    def raises(self) -> set[str]:
        """Names of the errors that the body raises itself."""
        assert self.code is not None
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(self.code)))
        except (OSError, TypeError):
            return set()
        raised = (node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc is not None)
        names = {ast.unparse(exc.func if isinstance(exc, ast.Call) else exc) for exc in raised}
        return names - {"NotImplementedError", "error"}


def is_ours(thing: Any) -> bool:
    return str(getattr(thing, "__module__", "")).startswith("x_transformers")


def methods(cls: type) -> Iterator[Documented]:
    """Public methods and properties that the class or a base of it in this package defines and documents first."""
    for base in cls.__mro__:
        if not is_ours(base):
            continue
        for name, member in vars(base).items():
            plain = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
            if name.startswith("_") or not (inspect.isfunction(plain) or isinstance(plain, property)):
                continue
            if not plain.__doc__ and any(
                getattr(getattr(other, name, None), "__doc__", None) for other in base.__mro__[1:]
            ):
                continue  # documented where it is declared
            code = None if isinstance(plain, property) else plain
            generated = code is not None and "__signature__" in vars(code)
            yield Documented(f"{base.__name__}.{name}", plain, code, generated)


def public() -> list[Documented]:
    """Everything that `x_transformers` exports, and its public methods, each once."""
    found: dict[str, Documented] = {}
    for name in x_transformers.__all__:
        thing = getattr(x_transformers, name)
        if inspect.isclass(thing):
            own = vars(thing).get("__init__")
            generated = any("__signature__" in vars(base) for base in thing.__mro__)
            found[name] = Documented(name, thing, own if inspect.isfunction(own) else None, generated)
            for method in methods(thing):
                found.setdefault(method.name, method)
        else:
            found[name] = Documented(name, thing, thing)
    return list(found.values())


def incomplete() -> list[str]:
    """Every fault of a public docstring."""
    return sorted(f"{each.where}: {each.name} {fault}" for each in public() for fault in each.faults())


def test_public_docstrings_are_complete() -> None:
    found = incomplete()
    assert not found, "\n".join(["", *found])


def test_faults_of_docstrings_are_seen() -> None:
    def wrong(x: int) -> None:
        """What is wrong"""  # noqa: D415
        raise ValueError(x)

    assert [fault.split(":")[0].split(" (")[0] for fault in Documented("wrong", wrong, wrong).faults()] == [
        "its first line does not end with a period",
        "its first line begins with neither a verb nor a noun phrase",
        "has parameters",
        "raises ValueError and has no `Raises`",
    ]


def test_phrases_are_found() -> None:
    text = Text("a.py", 3, "docstring", without_code("One stands\nbehind `behind`; a standalone one."))
    assert [place.split(": ")[0] for place in (*text.places("stands?"), *text.places("behind"))] == ["a.py:3", "a.py:4"]


def main() -> None:
    """Print the table, then the offenders by file."""
    phrases = (*MOST, *SHOWN)
    print(f"{'in 10,000 words':<26}{'words':>8}" + "".join(f"{re.sub(r'[(].*|[?]', '', p):>13}" for p in phrases))
    for name, texts in corpora().items():
        words = size(texts)
        rates = (len(places(texts, phrase)) * 10_000 / max(words, 1) for phrase in phrases)
        print(f"{name:<26}{words:>8}" + "".join(f"{rate:>13.1f}" for rate in rates))
    print(f"{'allowed':<26}{'':>8}" + "".join(f"{MOST[phrase]:>13.1f}" for phrase in MOST))
    found = [place for texts in corpora().values() for phrase in MOST for place in places(texts, phrase)]
    begin, faults = questions(), incomplete()
    for title, lines in (("phrases", found), ("questions", begin), ("public docstrings", faults)):
        print(f"\n{title}: {len(lines)}")
        for path, count in Counter(line.split(":")[0] for line in lines).most_common():
            print(f"{count:>5}  {path}")
        for line in sorted(lines):
            print(f"  {line}")


if __name__ == "__main__":
    main()
