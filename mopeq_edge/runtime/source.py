"""Get llama.cpp's source: the one inside llama-cpp-python's source distribution."""

from __future__ import annotations

import gzip
import os
import shutil
import sys
import tarfile
import zlib
from email.parser import HeaderParser
from pathlib import Path, PurePosixPath

from mopeq_edge.errors import RuntimeMissingError
from mopeq_edge.runtime.locate import BINDING
from mopeq_edge.runtime.process import last_words, run_lines

SOURCE_IN_SDIST = PurePosixPath("vendor/llama.cpp")


def download_sdist(version: str, into: Path) -> Path:
    """Download the source distribution of llama-cpp-python ``version`` with pip; return its file.

    Raises RuntimeMissingError if pip is missing or fails.
    """
    into.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", BINDING]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(into), f"{BINDING}=={version}"]
    lines: list[str] = []
    # pip unpacks the archive once more for its metadata; /tmp is small on many devices.
    code = run_lines(command, lines.append, env={**os.environ, "TMPDIR": str(into)})
    archives = sorted(into.glob("*.tar.gz"))
    if code != 0 or not archives:
        errors = [line for line in lines if line.startswith("ERROR:")] or lines
        raise RuntimeMissingError(
            f"pip could not download the source of {BINDING} {version} ({last_words(errors[-1:])}); "
            "check the network, or give the file with --sdist PATH"
        )
    return archives[0]


def unpack_source(sdist: Path, into: Path, version: str) -> Path:
    """Put llama.cpp's source tree from ``sdist`` below ``into`` and return its directory.

    ``sdist`` is a .tar.gz or an unpacked source distribution, which is copied and never changed.
    Raises RuntimeMissingError if it is broken, unsafe, or not llama-cpp-python ``version``.
    """
    if not sdist.exists():
        raise RuntimeMissingError(f"{sdist}: no such file; give a source distribution of {BINDING}")
    if sdist.is_dir():
        _check_sdist(sdist, sdist, version)
        return Path(shutil.copytree(sdist / SOURCE_IN_SDIST, into / SOURCE_IN_SDIST, symlinks=True))
    _extract(sdist, into)
    roots = sorted(path.parent for path in into.glob("*/PKG-INFO"))
    root = roots[0] if roots else into
    _check_sdist(root, sdist, version)
    return root / SOURCE_IN_SDIST


def _extract(archive: Path, into: Path) -> None:
    if not hasattr(tarfile, "data_filter"):
        raise RuntimeMissingError(
            f"Python {sys.version.split()[0]} cannot unpack archives safely; "
            "update to the latest patch release of Python"
        )
    into.mkdir(parents=True)
    try:
        with tarfile.open(archive, "r:gz") as tar:
            tar.extractall(into, filter=_wanted)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise RuntimeMissingError(
            f"{archive}: not a sound source archive of {BINDING} ({' '.join(str(error).split())}); download it again"
        ) from error


def _wanted(member: tarfile.TarInfo, destination: str) -> tarfile.TarInfo | None:
    # The safety check comes first: one bad member refuses the archive, even if we do not need it.
    checked = tarfile.data_filter(member, destination)
    inside = PurePosixPath(*PurePosixPath(checked.name).parts[1:])
    return checked if inside == PurePosixPath("PKG-INFO") or inside.is_relative_to(SOURCE_IN_SDIST) else None


def _check_sdist(root: Path, given: Path, version: str) -> None:
    if not (root / SOURCE_IN_SDIST / "CMakeLists.txt").is_file() or not (root / "PKG-INFO").is_file():
        raise RuntimeMissingError(
            f"{given}: expected a source distribution of {BINDING} with PKG-INFO and "
            f"{SOURCE_IN_SDIST}, found neither or one; give the archive of version {version}"
        )
    metadata = HeaderParser().parsestr((root / "PKG-INFO").read_text(encoding="utf-8", errors="replace"))
    if metadata["Version"] != version:
        raise RuntimeMissingError(
            f"{given}: expected {BINDING} {version}, found version {metadata['Version']}; "
            f"give the archive of version {version}"
        )
