"""Chat templates: Jinja sources that models bring along, filled in with what transformers would give them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, ClassVar


def render_chat(source: str, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
    """Fill in a chat template, sandboxed.

    Templates are written for `apply_chat_template` of transformers and find what they find there: its block options,
    `break` and `continue`, `generation` blocks, `raise_exception`, `strftime_now`, `tojson` with its arguments, and
    `tools` and `documents`, which are None.

    Args:
        source: Jinja source.
        messages: The conversation. Entries that are None are left out of a message.
        **variables: Further variables of the template.

    Returns:
        The text of the conversation.

    Raises:
        ValueError: If the source is no template, or if the template refuses the conversation or fails with it.

    Example:
        >>> render_chat("{% for m in messages %}{{ m.role }}: {{ m | tojson }}{% endfor %}", [{"role": "user"}])
        'user: {"role": "user"}'
    """
    import jinja2

    given = [{name: value for name, value in message.items() if value is not None} for message in messages]
    try:
        template = _environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"chat template: expected Jinja, got line {error.lineno}: {error.message}") from error
    try:
        return template.render(messages=given, tools=None, documents=None, **variables)
    except jinja2.TemplateError as error:
        raise ValueError(f"chat template: expected a conversation that it accepts, got {error}") from error
    except Exception as error:  # a template is a program: it can fail with any error
        raise ValueError(
            f"chat template: expected a conversation that it can write, got {type(error).__name__}: {error}"
        ) from error


def _environment() -> Any:
    """The sandbox in which templates run."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Blocks that mark the assistant's own words, for training: their contents are written like any others."""

        tags: ClassVar[set[str]] = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            # A scope of its own, so that variables that the block sets end with it.
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON of a value; without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
