"""A checkpoint's tokenizer: `tokenizer.json` and what is needed of its config.

`tokenizers` is imported where it is used: work on ids alone does without it.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable
from typing import Any, SupportsInt

from lrd_jax import chat
from lrd_jax.errors import UserError

# The named strings that chat templates use and `tokenizer_config.json` keeps.
NAMED_TOKENS = tuple(f"{name}_token" for name in "bos eos unk sep pad cls mask".split())


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A checkpoint's tokenizer with its chat template.

    Attributes:
        backend: the `tokenizers.Tokenizer`.
        named: strings of `bos_token`, `eos_token`, ... that are set.
        chat_template: Jinja source, None for a model without one.
    """

    backend: Any
    named: dict[str, str]
    chat_template: str | None = None

    @classmethod
    def load(cls, folder: str | pathlib.Path) -> "Tokenizer | None":
        """Reads `tokenizer.json` and `tokenizer_config.json` of a checkpoint.

        Args:
            folder: the checkpoint's directory.

        Returns:
            None if there is no `tokenizer.json`: such a model takes ids only.

        Raises:
            UserError: a file is damaged.
        """
        folder = pathlib.Path(folder)
        if not (folder / "tokenizer.json").is_file():
            return None
        config = read_json_object(folder / "tokenizer_config.json", missing_ok=True)
        named, template = named_tokens(config), config.get("chat_template")
        if template is not None and not isinstance(template, str):
            raise UserError(
                f"{folder}/tokenizer_config.json: chat_template is no text."
            )
        return cls(read_backend(folder / "tokenizer.json"), named, template)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, nothing added; `<|eot_id|>` and the like become their id.

        Raises:
            UserError: `text` holds half a surrogate pair, which no encoding can take.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            bad = text[error.start]
            raise UserError(
                f"the text has {bad!r} at character {error.start}, half of a "
                "surrogate pair: not valid Unicode."
            ) from None
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """Text of `ids` without the special tokens.

        The output head has rows that are no token (LLaDA's 126349 to 126463) and an
        untrained model may choose them; they have no text.
        """
        # `tokenizers` drops an id above its vocabulary but fails at a negative one.
        known = [i for i in map(int, ids) if i >= 0]
        return str(self.backend.decode(known, skip_special_tokens=True))

    def apply_chat_template(self, messages: Any) -> str:
        """The text a chat model reads, up to where its answer begins.

        Args:
            messages: `[{"role": ..., "content": ...}, ...]`.

        Raises:
            UserError: malformed messages, no template, or the template fails.
        """
        chat.check_messages(messages)
        if self.chat_template is None:
            raise UserError("this model has no chat template; give a raw prompt.")
        return chat.render(self.chat_template, messages, self.named)


def read_backend(path: pathlib.Path) -> Any:
    """Loads a `tokenizer.json` as `tokenizers.Tokenizer`.

    Raises:
        UserError: the file is damaged.
    """
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    # The library raises bare Exception for a file that it cannot read.
    except Exception as error:
        raise UserError(f"{path}: not a tokenizer: {chat.one_line(error)}") from None
    # Some published files cut or fill up what they encode; a prompt stays as it is.
    backend.no_truncation()
    backend.no_padding()
    return backend


def write_backend(backend: Any, path: pathlib.Path) -> None:
    """Writes a `tokenizers.Tokenizer` as `tokenizer.json`.

    Raises:
        OSError: the disk is full or cannot be written. (The library's own `save` raises
            a bare Exception then.)
    """
    path.write_text(backend.to_str(pretty=True), encoding="utf-8")


def read_json_object(path: pathlib.Path, missing_ok: bool = False) -> dict[str, Any]:
    """Reads a JSON file that holds an object; {} for a missing one if that is fine.

    Raises:
        UserError: missing, unreadable, not JSON, or not an object.
    """
    if missing_ok and not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}.") from None
    except RecursionError:
        raise UserError(f"{path}: not valid JSON: nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {chat.one_line(error)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got {value!r:.80}.")
    return value


def named_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Picks `bos_token` and the like, given as text or as `{"content": text}`."""
    named = {}
    for name in NAMED_TOKENS:
        token = config.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            named[name] = token
    return named
