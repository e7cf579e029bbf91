"""Files of weights: safetensors and GGUF, as a mapping of names to arrays and a configuration in transformers' words."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import os

    from numpy.typing import NDArray


def read_checkpoint(path: str | os.PathLike[str]) -> tuple[Mapping[str, NDArray[Any]], dict[str, Any]]:
    """Open a file of weights.

    Parameters
    ----------
    path : path-like
        A ``.gguf`` file, a ``.safetensors`` file with ``config.json`` beside it, or a folder with ``config.json`` and one or more
        ``.safetensors`` files. Needs the package ``gguf``, or ``safetensors`` (extra ``checkpoints``).

    Returns
    -------
    state : mapping of str to ndarray
        The names of the checkpoint in transformers' format, whichever the file has. An array is read when it is asked for.
    config : dict
        What ``config.json`` says, or would.

    Raises
    ------
    ValueError
        If the file is damaged, or of a kind of model that is not known here.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        from .gguf import read

        return read(path)
    folder = path if path.is_dir() else path.parent
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"no .safetensors file in {path}")
    with open(folder / "config.json", encoding="utf-8") as file:
        config = json.load(file)
    return _Safetensors(files), config


class _Safetensors(Mapping):
    """Arrays of one or more files, read when they are asked for."""

    def __init__(self, files):
        from safetensors import safe_open

        self._files = {}
        for path in files:
            try:
                with safe_open(path, framework="np") as file:
                    self._files.update(dict.fromkeys(file.keys(), path))
            except Exception as error:  # safetensors has its own kinds
                raise ValueError(f"{path} is not a readable safetensors file: {error}") from error

    def __getitem__(self, name):
        from safetensors import safe_open

        with safe_open(self._files[name], framework="np") as file:
            return np.asarray(file.get_tensor(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
