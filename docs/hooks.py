"""What the site has beside the pages of this folder: the project's own pages, and tables that are rendered from the code they describe."""

import argparse
import dataclasses
import importlib
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PROJECT = {"EXPERIMENTS.md": "experiments.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
CARDS = "model_cards.md"


def on_files(files: Files, config: Any) -> Files:
    """Pages that stand in the repository's root, so that links to them have an end."""
    for source, page in PROJECT.items():
        files.append(File.generated(config, page, content=_for_the_site(ROOT / source)))
    files.append(File.generated(config, CARDS, content=_cards()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links out of docs/ lead to the site's copies; marked places are filled from the code."""
    up = "../" * page.file.src_uri.count("/")
    for source, target in {**PROJECT, "model_cards": CARDS}.items():
        markdown = re.sub(rf"\]\((?:\.\./)+{re.escape(source)}/?(#[^)]*)?\)", rf"]({up}{target}\1)", markdown)
    markdown = re.sub(r"<!-- choices: (\S+) -->", lambda found: choices(found[1]), markdown)
    return re.sub(r"<!-- commands -->", lambda _: commands(), markdown)


def _for_the_site(source: Path) -> str:
    """A page of the root, with links into docs/ as this folder has them."""
    return re.sub(r"\]\((?:\./)?docs/([^)]*)\)", r"](\1)", source.read_text(encoding="utf-8"))


def _cards() -> str:
    """The cards of the released weights on one page, without their metadata."""
    cards = sorted((ROOT / "model_cards").glob("[a-z]*.md"))
    texts = [re.sub(r"\A---\n.*?\n---\n", "", card.read_text(encoding="utf-8"), flags=re.DOTALL).strip() for card in cards]
    return "# Cards of the released weights\n\n" + "\n\n".join(re.sub(r"^#", "##", text, flags=re.MULTILINE) for text in texts)


def choices(kind: str) -> str:
    """The table of a config: every choice with its default and what it is."""
    module, name = kind.rsplit(".", 1)
    entries = dataclasses.fields(getattr(importlib.import_module(module), name))
    rows = [f"| `{entry.name}` | {_default(entry)} | {entry.metadata['help'].replace('|', '&#124;')} |" for entry in entries]
    return "\n".join(["| choice | if not given | what it is |", "| --- | --- | --- |", *rows])


def _default(entry: dataclasses.Field) -> str:
    if entry.default is not dataclasses.MISSING:
        return "-" if entry.default is None else f"`{entry.default}`"
    return f"`{entry.default_factory()}`" if entry.default_factory is not dataclasses.MISSING else "must be given"


def commands() -> str:
    """What `--help` of every command says, as wide as a page, whatever terminal builds it."""
    from drifting_diffusers.cli import _parser

    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "92"
    try:
        parser = _parser()
        verbs = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction)).choices
        parsers = {parser.prog: parser, **{f"{parser.prog} {name}": verb for name, verb in verbs.items()}}
        return "\n\n".join(f"## {title}\n\n```text\n{one.format_help().strip()}\n```" for title, one in parsers.items())
    finally:
        os.environ.pop("COLUMNS") if before is None else os.environ.update(COLUMNS=before)
