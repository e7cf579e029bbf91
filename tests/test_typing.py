"""Annotations: everything public has them, and mypy reads a program of a user's with them."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastattn

PROGRAM = Path(__file__).with_name("typed_program.py")


def test_a_users_program(tmp_path):
    pytest.importorskip("mypy", reason="mypy is not installed")
    arguments = ["--strict", "--cache-dir", str(tmp_path), "--follow-imports=silent", "--no-error-summary", str(PROGRAM)]
    beside = Path(fastattn.__file__).parents[1]  # an editable installation, which mypy does not follow, is found from there
    folder = tmp_path if beside.name == "site-packages" else beside
    run = subprocess.run([sys.executable, "-m", "mypy", *arguments], capture_output=True, text=True, cwd=folder)
    assert not run.stderr, run.stderr
    found = {int(line): kind for line, kind in re.findall(r":(\d+): error: .*\[([\w-]+)\]", run.stdout)}
    lines = PROGRAM.read_text().splitlines()
    wanted = {n: line.partition("# error: ")[2].split(", ") for n, line in enumerate(lines, 1) if "# error: " in line}
    assert found.keys() == wanted.keys(), run.stdout
    assert all(found[n] in kinds for n, kinds in wanted.items()), run.stdout


def public_functions():
    for name in fastattn.__all__:
        thing = getattr(fastattn, name)
        if inspect.isfunction(thing):
            yield name, thing
        elif inspect.isclass(thing) and not issubclass(thing, Exception):
            yield f"{name}.__init__", thing.__init__
            for part, member in inspect.getmembers(thing):
                if not part.startswith("_") and callable(member):
                    yield f"{name}.{part}", getattr(member, "__func__", member)


@pytest.mark.parametrize("name, function", list(public_functions()), ids=lambda x: x if isinstance(x, str) else "")
def test_everything_public_is_annotated(name, function):
    function = inspect.unwrap(function)
    arguments = [p for p in inspect.signature(function).parameters if p not in ("self", "cls")]
    assert {*arguments, "return"} <= {*function.__annotations__}
