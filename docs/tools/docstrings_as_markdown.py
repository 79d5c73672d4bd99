"""An extension of griffe that hands docstrings to Markdown as they are meant."""

import re
from typing import Any

from griffe import Extension, Object

EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
PROSE = re.compile(r"^(?! *(?:>>>|\.\.\.) )(.*)$", re.MULTILINE)


class DocstringsAsMarkdown(Extension):
    """Calls the section of an example by the name under which griffe knows it, and keeps `<y, q>` from being a tag."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrites the docstring of an object."""
        if obj.docstring is not None:
            text = EXAMPLE.sub("Examples:", obj.docstring.value)
            obj.docstring.value = PROSE.sub(lambda line: _without_tags(line.group()), text)


def _without_tags(line: str) -> str:
    """A line of prose whose angle brackets, but for those between backticks, are no tags."""
    parts = line.split("`")
    return "`".join(part if i % 2 else re.sub(r"<(?=[A-Za-z])", "&lt;", part) for i, part in enumerate(parts))
