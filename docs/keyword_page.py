"""Page of all keywords, made from the schemas when the site is built. MkDocs imports this file, see `mkdocs.yml`."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from sections import sections_of_keywords

from x_transformers import Decoder, TransformerWrapper
from x_transformers.options.schema import Schema, default_of

PAGE = "all-keywords.md"
INTRO = """# All keywords

Every keyword of stacks and of `TransformerWrapper`, with its default. The link of a keyword leads to a section with an
example, and that of a number to the paper. In Python, `print(Decoder.describe())` prints the same, and
`Decoder.describe('rotary_xpos')` one feature.
"""
HEADINGS = {
    (TransformerWrapper, ""): ("TransformerWrapper", "Besides `num_tokens`, `max_seq_len` and `attn_layers`."),
    (Decoder, ""): ("Stacks", "Of `Decoder`, `Encoder`, `CrossAttender` and `PrefixDecoder`, besides `dim`."),
    (Decoder, "attn_"): (
        "Attention in stacks",
        "With `cross_attn_`, a keyword is that of cross-attention only. `Attention` has them without a prefix.",
    ),
    (Decoder, "ff_"): (
        "Feedforwards in stacks",
        "`FeedForward` has them without the prefix, apart from those of [experts](experts.md).",
    ),
    (Decoder, "mixer_"): ("Token mixers in stacks", "Of blocks with a [token mixer](token-mixers.md)."),
}
"""Heading and text of each schema, by class and prefix."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page."""
    files.append(File.generated(config, PAGE, content=page(Path(config.docs_dir))))
    return files


def page(docs: Path) -> str:
    """Return the page in Markdown."""
    examples = sections_of_keywords(docs)
    parts, shown = [INTRO], set()
    for owner in (TransformerWrapper, Decoder):
        for schema, prefix in owner.keyword_schemas:
            if id(schema) in shown:  # the same keywords with another prefix
                continue
            shown.add(id(schema))
            heading, words = HEADINGS[owner, prefix]
            parts += [f"## {heading}", words, _table(schema, prefix, examples)]
    return "\n\n".join(parts) + "\n"


def _table(schema: Schema, prefix: str, examples: dict[str, str]) -> str:
    lines = ["| keyword | default | meaning | |", "| --- | --- | --- | --- |"]
    for feature in schema.features.values():
        for entry in dataclasses.fields(feature.options):
            name = prefix + entry.name
            shown = f"[`{name}`]({examples[name]})" if name in examples else f"`{name}`"
            default = repr(default_of(entry)).replace("|", r"\|")
            meaning = str(entry.metadata.get("doc", "")).replace("|", r"\|")
            lines.append(f"| {shown} | `{default}` | {meaning} | {_paper(feature.paper)} |")
    return "\n".join(lines)


def _paper(number: str | None) -> str:
    if number is None or not re.fullmatch(r"\d{4}\.\d{5}", number):
        return number or ""
    return f"[{number}](https://arxiv.org/abs/{number})"
