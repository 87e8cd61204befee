"""A deployment file is read once, from a file or a pipe; whatever is in it, the error is one line with a fix."""

import os
import signal
import threading
from pathlib import Path

import pytest

from cli.serve import _working_directory
from cluster.config import ConfigError, DeploymentConfig
from cluster.deployment_file import MAX_BYTES
from tests.cluster.commands import load_deployment
from tests.command import drover, start
from tests.processes import PATIENCE_S, wait_until


def written(folder: Path, text: str) -> Path:
    path = folder / "deployment.yaml"
    path.write_text(text)
    return path


def test_a_relative_checkpoint_is_relative_to_the_file(tmp_path: Path) -> None:
    config = load_deployment(written(tmp_path, "checkpoint: models/scout"))
    assert config.checkpoint == tmp_path / "models" / "scout"
    assert config.name == "scout"


def test_the_home_directory_is_expanded(tmp_path: Path) -> None:
    assert load_deployment(written(tmp_path, "checkpoint: ~/scout")).checkpoint == Path.home() / "scout"


def test_overrides_replace_what_the_file_says(tmp_path: Path) -> None:
    path = written(tmp_path, "checkpoint: a\nshards: {count: 3}\n")
    config = load_deployment(path, ["shards.count=5", "engine.max_running=7", "checkpoint=/b"])
    assert (config.shards.count, config.engine.max_running, config.checkpoint) == (5, 7, Path("/b"))


def test_a_section_with_nothing_in_it_keeps_its_defaults(tmp_path: Path) -> None:
    assert load_deployment(written(tmp_path, "checkpoint: a\nshards:\n")).shards.count == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [1", "is not valid YAML"), ("just words", "holds a str"), ("checkpoint: a\nshards: 3\n", "shards is 3")],
)
def test_a_file_that_is_no_deployment(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_deployment(written(tmp_path, text))


BAD_YAML = {
    "shards: {count: 3\nrouter: [\n": "line 2, column 7: while parsing a flow mapping, expected ',' or '}'",
    "checkpoint: a: b\n": "line 1, column 14: mapping values are not allowed here",
    "checkpoint: a\0\n": "unacceptable character #x0000: special characters are not allowed",
}


@pytest.mark.parametrize("text", BAD_YAML)
def test_bad_yaml_is_one_line_with_its_place(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        load_deployment(path)
    assert str(error.value).startswith(f"{path} is not valid YAML: {BAD_YAML[text]}")
    assert "\n" not in str(error.value)


def test_bad_yaml_in_an_override_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_deployment(written(tmp_path, "checkpoint: a\n"), ["shards=[1"])
    assert str(error.value).startswith(
        "'shards=[1' has a value that is not valid YAML: line 1, column 3: while parsing"
    )
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_names_an_example(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"deploy/local\.yaml is an example"):
        load_deployment(tmp_path / "none.yaml")


@pytest.mark.parametrize("override", ["shards.count", "=3", "dtype.what=3"])
def test_an_override_that_is_none(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="override|cannot be set"):  # noqa: RUF043
        load_deployment(written(tmp_path, "checkpoint: a\ndtype: auto\n"), [override])


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_deployment(path, overrides)
    message = str(error.value)
    assert message.isprintable()  # in one line
    assert len(message) < 1000
    return message


LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(30))
WRONG_VALUES = {
    "somebody's home": ("checkpoint", "~nosuch/x", "checkpoint is '~nosuch/x'; no such home"),
    "a zero byte": ("checkpoint", r'"a\0b"', r"checkpoint is 'a\x00b', which is no path: "),
    "no date": ("model_name", "2001-13-45", "not valid YAML: ValueError: 'month must be in 1..12'"),
    "no number": ("threads", "0b_", "not valid YAML: ValueError: "),
    "a number without end": ("model_name", "9" * 10_000, "not valid YAML: ValueError: "),
    "a hexadecimal number without end": ("engine.kv_bytes", "0x-" + "f" * 10_000, "engine.kv_bytes is "),
    "deep": ("model_name", "[" * 1000, "not valid YAML: it is nested too deeply"),
    "a long host": ("frontend.host", "\u00fc" * 80, "frontend.host is 'ü"),
    "a host with a zero byte": ("frontend.host", r'"a\0b"', r"frontend.host is 'a\x00b': it must be a host's name"),
    "a host of nothing": ("frontend.host", "a..b", "frontend.host is 'a..b': it must be a host's name"),
    "an address with odd digits": ("ray.address", "127.0.0.1:\u00b2", "ray.address is '127.0.0.1:²': it must be host"),
    "an address of letters": ("ray.address", "\u00fc" * 80 + ":1", "ray.address is '"),
    "an address without port": ("ray.address", "127.0.0.1", "with a port from 1 to 65535; or 'local' or 'auto'"),
    "a namespace without end": ("ray.namespace", "a" * 300, "ray.namespace is 'a"),
    "a name that drives a terminal": ("ray.namespace", r'"\e[31m"', r"ray.namespace is '\x1b[31m'"),
    "a name of a surrogate": ("model_name", r'"\ud800"', "model_name is "),
    "a key that drives a terminal": (r"shards", r'{"\e[31m": 3}', r"shards.\x1b[31m is unknown"),
}


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_a_wrong_value_is_one_line_in_the_file_and_in_an_override(name: str, tmp_path: Path) -> None:
    key, value, message = WRONG_VALUES[name]
    assert message in error_of(written(tmp_path, "checkpoint: a\n"), f"{key}={value}")
    section, _, last = key.rpartition(".")
    text = f"{section}:\n  {last}: {value}" if section else f"{key}: {value}"
    assert message in error_of(written(tmp_path, ("" if key == "checkpoint" else "checkpoint: a\n") + text))


def test_values_that_name_each_other_without_end_are_refused_at_once(tmp_path: Path) -> None:
    """Thirty lines of nine aliases each: written out, they would have 10^28 entries."""
    with pytest.raises(ConfigError, match="a0 is unknown"):
        load_deployment(written(tmp_path, LAUGHS + "checkpoint: a\nmodel_name: *a30\n"))


def test_an_override_in_a_section_with_nothing_in_it(tmp_path: Path) -> None:
    assert load_deployment(written(tmp_path, "checkpoint: a\nshards:\n"), ["shards.count=5"]).shards.count == 5


def test_a_home_is_not_known_where_no_variable_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.getuid", lambda: 3_000_000_000)
    assert "no such home directory is known" in error_of(written(tmp_path, "checkpoint: ~/scout"))


def test_a_file_without_end_is_not_read(tmp_path: Path) -> None:
    path = written(tmp_path, "")
    os.truncate(path, 2**40)
    assert f"has more than {MAX_BYTES >> 10} KiB" in error_of(path)
    assert "is neither a file nor a pipe" in error_of(Path("/dev/zero"))
    assert "cannot be read: Is a directory" in error_of(tmp_path)


def test_a_deleted_working_directory_does_not_matter_to_whole_paths(tmp_path: Path) -> None:
    path = written(tmp_path, "checkpoint: /models/scout\n")
    gone = tmp_path / "gone"
    gone.mkdir()
    here = Path.cwd()
    os.chdir(gone)
    try:
        gone.rmdir()
        assert load_deployment(path).name == "scout"
        assert load_deployment(path, ["checkpoint=/b"]).name == "b"
        assert "the working directory was deleted" in error_of(path, "checkpoint=b")
        assert _working_directory() == "/"  # of the process that serves
    finally:
        os.chdir(here)


def test_a_pipe_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)

    def write() -> None:
        with open(path, "w") as file:
            file.write("checkpoint: /models/")
            file.flush()
            file.write("scout")

    writer = threading.Thread(target=write)
    writer.start()
    assert load_deployment(path).name == "scout"
    writer.join(PATIENCE_S)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_serve_that_waits_for_a_pipe(number: signal.Signals, tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    writers: list[int] = []

    def is_read() -> bool:
        try:
            writers.append(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:  # nobody reads it yet
            return False
        return True

    with start("serve", str(path)) as process:
        wait_until(is_read)
        process.send_signal(number)
        out, err = process.communicate(timeout=PATIENCE_S)
    os.close(writers[0])
    assert (process.returncode, out, err) == (130, b"", b"")


def test_what_is_handed_on_is_the_same(tmp_path: Path) -> None:
    path = written(tmp_path, "checkpoint: a\nmodel_name: \u00fc\nengine: {kv_share: 0.1}\nrouter: {cpus: 2}\n")
    config = load_deployment(path)
    assert DeploymentConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize("command", ["status", "stop"])
@pytest.mark.parametrize("flag", ["--namespace", "--ray-address"])
@pytest.mark.parametrize("value", ["", "**", "/etc", "a\x1b[31m", "x" * 101, "127.0.0.1:²", "\u00fc" * 80 + ":1"])
def test_flags_are_checked_as_in_the_file(command: str, flag: str, value: str) -> None:
    done = drover(command, f"{flag}={value}")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert f"argument {flag}: " in done.stderr
    assert "\x1b" not in done.stderr
