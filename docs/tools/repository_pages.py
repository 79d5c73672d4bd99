"""A hook of MkDocs: files of the repository outside `docs` become part of the site, at the same links.

README, changelog and the like are pages, and so are the notebooks with their stored outputs. Any other file that a page
links to is copied below `repository/`. So one document serves a reader of the repository and a reader of the site.
"""

import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[2]
NOTEBOOKS = {f"notebooks/{path.name}": f"notebooks/{path.stem}.md" for path in (ROOT / "notebooks").glob("*.ipynb")}
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "recorded_figures.md",
    **NOTEBOOKS,
}
"""Files that become pages, and the pages' places in the site."""

SOURCES = {uri: source for source, uri in PAGES.items()}
LINK = re.compile(r"(?<=\]\()([^)\s#]+)")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the pages of `PAGES`, and all files outside `docs` that a page links to."""
    for source in PAGES:
        for file in _pages_of(source, config):
            files.append(file)
    for page in list(files.documentation_pages()):
        for target in sorted(_targets(page)):
            if target not in PAGES and files.get_file_from_path(_place(target)) is None:
                files.append(File.generated(config, _place(target), abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Points links at the places that their files have in the site."""
    uri = page.file.src_uri
    return LINK.sub(lambda link: _rewritten(uri, link.group()), markdown)


def _pages_of(source: str, config: MkDocsConfig) -> list[File]:
    """A page, and the pictures of a notebook."""
    uri = PAGES[source]
    if source not in NOTEBOOKS:
        return [File.generated(config, uri, abs_src_path=str(ROOT / source))]
    prefix = Path(source).stem
    resources = {"unique_key": prefix, "output_files_dir": prefix}
    text, found = MarkdownExporter().from_filename(str(ROOT / source), resources=resources)
    pictures = found["outputs"].items()
    return [
        File.generated(config, uri, content=text),
        *(File.generated(config, f"notebooks/{Path(name).as_posix()}", content=data) for name, data in pictures),
    ]


def _targets(page: File) -> set[str]:
    """Files of the repository outside `docs` to which a page links, from the repository's root."""
    found = {_resolved(page.src_uri, link) for link in LINK.findall(page.content_string)}
    return {path for path in found if path is not None and not path.startswith("docs/")}


def _resolved(uri: str, link: str) -> str | None:
    """The file of the repository to which a link of a page leads; None for any other link."""
    source = SOURCES.get(uri, f"docs/{uri}")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    return path if ":" not in link and not path.startswith("..") and (ROOT / path).is_file() else None


def _place(path: str) -> str:
    """Where the site has a file of the repository."""
    if path in PAGES:
        return PAGES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}"


def _rewritten(uri: str, link: str) -> str:
    path = _resolved(uri, link)
    return link if path is None else os.path.relpath(_place(path), posixpath.dirname(uri) or ".").replace(os.sep, "/")
