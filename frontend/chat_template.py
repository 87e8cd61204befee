"""Conversations to token ids, with the checkpoint's own chat template.

The template is a Jinja program written for Hugging Face's `apply_chat_template`, and gets here
what it gets there. It writes special tokens by name into one long text, between the contents of
the messages. What looks like a special token *inside* a content must stay text, or a user could
end a turn and speak as the system:

1. Render the conversation. This is the text that the model shall read.
2. In the contents, replace the first letter of every special token's name by a stand-in: a private-use character that
   occurs nowhere else. Render again. Apart from the stand-ins the text must be the same. If it is not, the template
   looked at such a name, and the request is refused.
3. Every special token in the second text was written by the template. Split the text there, put the first letters back
   into the pieces between, and encode these as plain text.

The pieces between special tokens are always encoded whole. So the ids are those of the plain
rendering, except that a name in a content is text. If no content holds such a name, step 1 is
enough.

Known limit: a template that itself writes the first part of a special token's name right before a
content.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoint.errors import CheckpointError
from checkpoint.read_file import TEMPLATE_FILES, is_there, read_json, read_text
from checkpoint.tokenizer import Tokenizer
from checkpoint.tokenizer_files import token_name, tokenizer_settings
from frontend.template_process import TEMPLATE_PROCESS, TemplateFailed, TemplateProcessEnded
from router.errors import InvalidArgument, Unavailable

ROLES = ("system", "user", "assistant", "tool")

# A role, one of ROLES, and a content: text from outside, in which nothing is a special token.
Message = tuple[str, str]

_PRIVATE_USE = range(0xF0000, 0xFFFFE)


class ChatTemplate:
    """One checkpoint's chat template. It never changes, so threads may share it."""

    def __init__(self, source: str, special_names: dict[str, str] | None = None) -> None:
        """source: the Jinja program.

        special_names: variables for it, such as eos_token.
        """
        self._source = source
        self._special_names = special_names or {}

    @classmethod
    def open(cls, directory: Path) -> "ChatTemplate | None":
        """A checkpoint's template; None where it has none.

        It is chat_template.jinja, or additional_chat_templates/default.jinja, or `chat_template` in
        tokenizer_config.json or in chat_template.json (which is where transformers used to put that
        of models that take images). Where that has several templates by name, the one called
        "default" is it. Raises CheckpointError when a file is damaged.
        """
        config = tokenizer_settings(directory)
        path, source = _find_source(directory, config)
        if source is None:
            return None
        names = {key: token_name(value) for key, value in config.items() if key.endswith("_token")}
        try:
            TEMPLATE_PROCESS.check(source)
        except TemplateFailed as error:
            where = "the chat template" if error.line is None else f"line {error.line} of the chat template"
            raise CheckpointError(f"{path}: {where}: {error}; download the file again") from None
        return cls(source, {key: name for key, name in names.items() if name is not None})

    def encode(
        self,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        most_tokens: int = 2**24,
        *,
        now_s: float | None = None,
    ) -> list[int]:
        """The prompt that lets the model answer a conversation, whose oldest message is first.

        most_tokens: a text that must have more than these is refused before it is encoded. now_s:
        seconds since the epoch, for templates that write the date; None: now.

        Raises InvalidArgument when there is no message, a role is unknown or the template refuses
        the conversation; Unavailable when this machine keeps it from being rendered.
        """
        _check(messages)
        now_s = time.time() if now_s is None else now_s  # one instant for both renderings
        text = self._render(messages, tokenizer, now_s, most_tokens)
        name_starts = [tokenizer.special_starts(content) for _, content in messages]
        if not any(name_starts):
            return tokenizer.encode_with_specials(text)
        stand_ins = _stand_ins(tokenizer, [text, *(content for _, content in messages)])
        masked = [
            (role, _mask(content, starts, stand_ins))
            for (role, content), starts in zip(messages, name_starts, strict=True)
        ]
        masked_text = self._render(masked, tokenizer, now_s, most_tokens)
        restore = str.maketrans({stand_in: letter for letter, stand_in in stand_ins.items()})
        if masked_text.translate(restore) != text:
            raise InvalidArgument(
                "messages",
                "a content holds the name of a special token, and the checkpoint's chat template does not treat that "
                "like other text; remove the name",
            )
        ids: list[int] = []
        for part in tokenizer.split_specials(masked_text):
            ids += [part] if isinstance(part, int) else tokenizer.encode(part.translate(restore), add_bos=False)
        return ids

    def _render(self, messages: Sequence[Message], tokenizer: Tokenizer, now_s: float, most_tokens: int) -> str:
        names = dict(self._special_names)
        if tokenizer.bos_token_id is not None:
            names["bos_token"] = tokenizer.decode([tokenizer.bos_token_id])
        variables = names | {
            "messages": [{"role": role, "content": content} for role, content in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
        }
        try:
            most_chars = most_tokens * tokenizer.max_token_bytes
            return TEMPLATE_PROCESS.render(self._source, variables, now_s, most_chars)
        except TemplateProcessEnded as error:
            raise Unavailable(f"{error}; try again") from None
        except TemplateFailed as error:
            raise InvalidArgument("messages", f"the checkpoint's chat template refuses them: {error}") from None


def _check(messages: Sequence[Message]) -> None:
    if not messages:
        raise InvalidArgument("messages", "is empty; give at least one message")
    for i, (role, _) in enumerate(messages):
        if role not in ROLES:
            raise InvalidArgument(f"messages[{i}].role", f"is {role[:80]!r}; must be one of {', '.join(ROLES)}")


def _stand_ins(tokenizer: Tokenizer, texts: Sequence[str]) -> dict[str, str]:
    """For each letter that begins a special token's name, a character that no text holds."""
    used = set().union(*texts)
    free = (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
    return {letter: next(free) for letter in sorted({name[0] for name in tokenizer.special_tokens})}


def _mask(content: str, starts: Sequence[int], stand_ins: dict[str, str]) -> str:
    letters = list(content)
    for start in starts:
        letters[start] = stand_ins[content[start]]
    return "".join(letters)


def _find_source(directory: Path, tokenizer_config: dict[str, Any]) -> tuple[Path, str | None]:
    for path in (directory / name for name in TEMPLATE_FILES):
        if is_there(path):
            return path, read_text(path)
    path = directory / "tokenizer_config.json"
    source = tokenizer_config.get("chat_template")
    if source is None and is_there(directory / "chat_template.json"):
        path = directory / "chat_template.json"
        source = read_json(path).get("chat_template")
    try:
        if isinstance(source, list):
            source = {item["name"]: item["template"] for item in source}
        if isinstance(source, dict):
            source = source.get("default")
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: a chat template without name or template; download the file again") from error
    if source is not None and not isinstance(source, str):
        raise CheckpointError(f"{path}: chat_template is no text; download the file again")
    return path, source
