"""Reads a deployment file: YAML, bounded in size, from a regular file or a pipe that ends.

Scenarios of `drover simulate` are read in the same way.

A file can be read once only if it is a pipe. So one process reads it, and hands the result on.
"""

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from checkpoint.errors import quoted
from cluster.config import ConfigError, DeploymentConfig, parse_deployment

# The shipped one, with all keys and their explanations, has 3 kB.
MAX_BYTES = 2**18


def read_deployment(path: Path, what: str = "deployment", example: str = "deploy/local.yaml") -> str:
    """The file's text. Waits for a pipe to end. Raises ConfigError.

    what, example: the kind of file that is expected, for messages, and one of that kind.
    """
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISFIFO(mode):
                raise ConfigError(f"{path} is neither a file nor a pipe; {example} is an example")
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; {example} is an example of a {what} file") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path} has more than {MAX_BYTES >> 10} KiB; a {what} file has a few keys")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} cannot be read: it is not UTF-8 ({error.reason} at byte {error.start})") from None


def deployment_of(text: str, path: Path, overrides: Sequence[str] = ()) -> DeploymentConfig:
    """Validate the text of the file at `path`. Raises ConfigError.

    A relative `checkpoint` in the file is relative to the file; in an override, to the working
    directory.
    overrides: "section.key=value" each, with the value in YAML. They replace the file's values.
    """
    raw = mapping_of(text, path)
    _resolve_checkpoint(raw, path.parent)
    for override in overrides:
        set_key(raw, override)
    _resolve_checkpoint(raw, Path())
    return parse_deployment(raw, str(path))


def mapping_of(text: str, path: Path) -> dict[str, Any]:
    """The keys and values of the file at `path`, which has this text. Raises ConfigError."""
    raw = _parse(text, f"{path} is not valid YAML")
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a {type(raw).__name__}; a mapping of keys to values is expected")
    return raw


def _parse(text: str, wrong: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{wrong}: {_yaml_problem(error)}") from None
    except RecursionError:
        raise ConfigError(f"{wrong}: it is nested too deeply") from None
    except Exception as error:  # PyYAML's own for what looks like a number or a date, and is none
        raise ConfigError(f"{wrong}: {type(error).__name__}: {quoted(str(error))}; put the value in quotes") from None


def _yaml_problem(error: yaml.YAMLError) -> str:
    """In one line. YAML's own text shows each place on a line of its own."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        what = ", ".join(text for text in (error.context, error.problem) if text)
        return f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}: {what:.300}"
    return " ".join(str(error).split())[:300]


def _resolve_checkpoint(raw: dict[str, Any], folder: Path) -> None:
    """Make the checkpoint's path absolute. Raises ConfigError."""
    named = raw.get("checkpoint")
    if not isinstance(named, str) or not named:
        return
    expanded = os.path.expanduser(named)
    if expanded.startswith("~"):
        raise ConfigError(f"checkpoint is {quoted(named)}; no such home directory is known, write the whole path")
    try:
        raw["checkpoint"] = os.path.realpath(folder / expanded)
    except FileNotFoundError:
        raise ConfigError(
            f"checkpoint is {quoted(named)}; the working directory was deleted, write the whole path"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"checkpoint is {quoted(named)}, which is no path: {error}") from None


def set_key(raw: dict[str, Any], override: str) -> None:
    """Replace a value. override: "section.key=value", with the value in YAML. Raises ConfigError."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"{quoted(override)} is no override; write section.key=value, such as shards.count=3")
    *sections, last = key.split(".")
    for name in sections:
        if raw.get(name) is None:  # YAML reads a section without keys as null
            raw[name] = {}
        raw = raw[name]
        if not isinstance(raw, dict):
            raise ConfigError(f"{quoted(override)} cannot be set: {quoted(name)} is not a section")
    raw[last] = _parse(text, f"{quoted(override)} has a value that is not valid YAML")
