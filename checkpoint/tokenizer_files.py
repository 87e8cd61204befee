"""What the files beside tokenizer.json say of its tokens, as transformers reads them.

tokenizer_config.json, special_tokens_map.json, added_tokens.json, and config.json for the beginning
of a text. None of them need be there.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoint.errors import CheckpointError
from checkpoint.json_fields import Fields
from checkpoint.read_file import is_there, read_json

FIX = "download the file again"


def tokenizer_settings(directory: Path) -> dict[str, Any]:
    """What stands in tokenizer_config.json, and in special_tokens_map.json where transformers reads that, too."""
    path, map_path = directory / "tokenizer_config.json", directory / "special_tokens_map.json"
    settings = read_json(path) if is_there(path) else {}
    if "added_tokens_decoder" not in settings and is_there(map_path):
        settings |= read_json(map_path)
    return settings


def tokens_beside(directory: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tokens that other files add, as transformers reads them: by id. Raises CheckpointError.

    They are in added_tokens_decoder of tokenizer_config.json, or else in added_tokens.json.
    """
    decoder = settings.get("added_tokens_decoder")
    path = directory / ("tokenizer_config.json" if decoder else "added_tokens.json")
    try:
        if decoder:
            tokens = [{**token, "id": int(token_id)} for token_id, token in decoder.items()]
        else:
            named = read_json(path) if is_there(path) else {}
            tokens = [{"content": name, "id": token_id, "special": True} for name, token_id in named.items()]
        if not all(type(token["id"]) is int and isinstance(token["content"], str) for token in tokens):
            raise ValueError
    except (AttributeError, KeyError, TypeError, ValueError):
        where = "added_tokens_decoder" if decoder else "the file"
        raise CheckpointError(f"{path}: {where} must name tokens and their ids; {FIX}") from None
    return sorted(tokens, key=lambda token: token["id"])


def named_bos_token_id(directory: Path, settings: Mapping[str, Any], special_tokens: dict[str, int]) -> int | None:
    """The id of the token that begins a text. Raises CheckpointError.

    None also where the tokenizer lacks the token that is named: then it puts none in front of a
    text.
    """
    if "bos_token" in settings:
        return special_tokens.get(token_name(settings["bos_token"]) or "")
    path = directory / "config.json"
    model = Fields(read_json(path) if is_there(path) else {}, str(path))
    text_config = model.get("text_config", dict, None) or {}  # where multimodal models have it
    token_id = text_config.get("bos_token_id", model.raw.get("bos_token_id"))
    return token_id if token_id in special_tokens.values() and type(token_id) is int else None


def token_name(value: Any) -> str | None:
    """A token's name from tokenizer_config.json: a string, an object with `content`, or null."""
    name = value.get("content") if isinstance(value, dict) else value
    return name if isinstance(name, str) else None
