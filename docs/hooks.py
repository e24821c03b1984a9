"""Pages of the site that are files elsewhere in the checkout, and the links to and from them.

MkDocs imports this file, see `mkdocs.yml`. Links in Markdown are those that a reader of the checkout follows; in the
site, a link to a file that is no page becomes plain text.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ("images", "benchmarks")
FENCE = re.compile(r"^( *)```.*?^\1```$", re.M | re.S)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and pictures that are not in `docs`."""
    for page, source in config.extra["pages"].items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for folder in PICTURES:
        for picture in sorted((ROOT / folder).glob("*.png")):
            files.append(File.generated(config, place_of(picture, {}), abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Translate links between files of the checkout to links between pages."""
    pages = config.extra["pages"]
    source = pages.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    folder, pieces, end = (ROOT / source).parent, [], 0
    for fence in FENCE.finditer(markdown):
        pieces += [translated(markdown[end : fence.start()], folder, pages), fence[0]]
        end = fence.end()
    return "".join([*pieces, translated(markdown[end:], folder, pages)])


def translated(text: str, folder: Path, pages: dict[str, str]) -> str:
    """Translate the links of a text that is in a folder."""

    def link(match: re.Match[str]) -> str:
        mark, words, target = match.groups()
        path, _, anchor = target.partition("#")
        if not path or "://" in path:
            return match[0]
        page = place_of((folder / path).resolve(), pages)
        if page is None:
            return words
        return f"{mark}[{words}]({page}{'#' + anchor if anchor else ''})"

    return LINK.sub(link, text)


def place_of(path: Path, pages: dict[str, str]) -> str | None:
    """Return the place in the site of a file of the checkout; None if it is not in the site."""
    name = path.relative_to(ROOT).as_posix()
    if path.suffix == ".png":
        return f"images/{path.name}"
    if name.startswith("docs/"):
        return name.removeprefix("docs/")
    return next((page for page, source in pages.items() if source == name), None)
