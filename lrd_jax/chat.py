"""Chat messages -> the text a chat model reads, by the checkpoint's Jinja template.

Templates come with downloaded checkpoints, so they run in Jinja's immutable sandbox and
see plain JSON values only. The environment is the one of transformers'
`render_jinja_template` (importing that takes a second and prints a warning without
PyTorch); a test compares the two.
"""

import datetime
import functools
import json
from typing import Any

from lrd_jax.errors import UserError

# Templates drop a role they do not know without a word, and the message with it.
ROLES = ("system", "user", "assistant", "tool")


def one_line(error: object) -> str:
    """The message of a foreign error without its line breaks."""
    return " ".join(str(error).split())


def check_messages(messages: Any) -> None:
    """Raises `UserError` unless these are chat messages with a role and a text."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f"messages must be a list of at least one: {messages!r:.80}.")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise UserError(
                f"messages[{i}] must be an object with a role and a content: "
                f"{message!r:.80}."
            )
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            known = ", ".join(ROLES)
            raise UserError(f"messages[{i}]: role must be one of {known}: {role!r}.")
        if not isinstance(content, str):
            raise UserError(f"messages[{i}]: content must be text: {content!r:.80}.")


def render(template: str, messages: list[Any], named: dict[str, str]) -> str:
    """Renders `template` with the prompt for the assistant's turn at its end.

    Args:
        template: Jinja source.
        messages: as checked by `check_messages`.
        named: `bos_token` and the like, for the template to use.

    Raises:
        UserError: the template is broken or refuses these messages.
    """
    try:
        # JSON there and back: the template gets nothing but plain values.
        plain = json.loads(json.dumps(messages))
        return _compiled(template).render(
            messages=plain,
            tools=None,
            documents=None,
            add_generation_prompt=True,
            **named,
        )
    # A template may fail in any way that code can.
    except Exception as error:
        raise UserError(f"the chat template fails: {one_line(error)}") from None


def _raise_exception(message: str) -> None:
    raise ValueError(message)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # Jinja's own filter escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks an assistant's text in training; no effect here."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)
