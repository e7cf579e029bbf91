"""The pages for users: their code runs and prints what they say, their links lead somewhere, and the reference leaves nothing out."""

import contextlib
import io
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import fastattn
from fastattn import layers

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS = {"frameworks.md": ("torch", "transformers", "onnx"), "scores.md": ("matplotlib",)}  # beyond what the tests need anyway
GIVEN = {"README.md": "import numpy as np, fastattn; q = k = v = np.ones((1, 2, 8, 16), np.float32)"}  # for a line at the top of a page
KEYWORDS = {"activation", "scaling", "sinks", "softcap", "k", "v", "q_norm", "k_norm"}  # of functions, which mechanisms.md names like these

pytestmark = pytest.mark.skipif(not PAGES[0].exists(), reason="the pages are not beside the tests")


def blocks(page):
    """The Python blocks of a page: their line, their code, and what a block of text right behind them says that they print."""
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"^```python\n(.*?)^```\n(?:```text\n(.*?)^```\n)?", text, re.MULTILINE | re.DOTALL):
        yield text.count("\n", 0, found.start()) + 2, found[1], found[2]


@pytest.mark.parametrize("page", [page for page in PAGES if list(blocks(page))], ids=lambda page: page.name)
def test_code_runs_and_prints_what_the_page_says(page, tmp_path, monkeypatch):
    for package in NEEDS.get(page.name, ()):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    names, threads = {}, fastattn.get_num_threads()
    exec(GIVEN.get(page.name, ""), names)
    try:
        for line, code, expected in blocks(page):
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)
            if expected is not None:
                assert output.getvalue() == expected, f"{page.name}, line {line}"
    finally:
        fastattn.set_num_threads(threads)


def test_c_code_is_a_program_that_prints_what_the_page_says(tmp_path):
    pytest.importorskip("fastattn._native", exc_type=ImportError)
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    text = (ROOT / "docs/c-library.md").read_text(encoding="utf-8")
    source = tmp_path / "program.c"
    source.write_text("\n".join(re.findall(r"^```c\n(.*?)^```", text, re.MULTILINE | re.DOTALL)), encoding="utf-8")
    (expected,) = re.findall(r"^```text\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    strict = ["-std=c99", "-Wall", "-Wextra", "-pedantic", "-Werror"]
    places = ["-I", fastattn.get_include(), "-L", fastattn.get_library_dir()]
    libraries = ["-lfastattn", "-lm", "-pthread"] + ["-fopenmp"] * fastattn.show_config("dicts")["openmp"]
    subprocess.run(["cc", *strict, source, *places, *libraries, "-o", tmp_path / "program"], check=True)
    assert subprocess.run([tmp_path / "program"], check=True, capture_output=True, text=True).stdout == expected


def anchors(page):
    """What a link into a page may name: its headings, as they are written in addresses."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text)):
        if re.match(r"[a-z]+://", target):
            assert target.startswith("https://"), target
            continue
        path, _, anchor = target.partition("#")
        place = page if not path else (page.parent / path).resolve()
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target


def test_every_page_is_in_the_contents():
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    contents = {line for tree in re.findall(r"^```\{toctree\}\n(.*?)^```", index, re.MULTILINE | re.DOTALL) for line in tree.split("\n")}
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"} <= contents


def test_the_reference_has_every_public_name():
    reference = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\.\. auto(?:function|class|module):: (\S+)$", reference, re.MULTILINE))
    assert {f"fastattn.{name}" for name in fastattn.__all__} | {f"fastattn.layers.{name}" for name in layers.__all__} <= named
    assert {f"fastattn.{name}" for name in fastattn._WHEN_NAMED} - {"fastattn.layers"} <= named


def test_the_reference_names_nothing_else():
    reference = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    for name in re.findall(r"^\.\. auto(?:function|class):: fastattn\.(\S+)$", reference, re.MULTILINE):
        thing = fastattn
        for part in name.split("."):
            thing = getattr(thing, part)
        assert thing.__doc__, name


def test_mechanisms_are_named_as_they_are_called():
    page = (ROOT / "docs/mechanisms.md").read_text(encoding="utf-8")
    for name in re.findall(r"^\|[^|]*\|([^|]*)\|", page, re.MULTILINE)[2:]:
        for code in re.findall(r"`(\w[\w.]*)(?:\(|`)", name):
            if (ROOT / code).exists():
                continue
            first, *rest = code.split(".")
            thing = getattr(fastattn, first, None)
            for part in rest:
                thing = getattr(thing, part)
            assert thing is not None or first in KEYWORDS, code
