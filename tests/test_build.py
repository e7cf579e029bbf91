"""The build files agree with each other, with the README, and with the promises about compiler flags."""

import importlib.metadata
import re
from pathlib import Path

import pytest

import fastattn

ROOT = Path(__file__).resolve().parent.parent
SRC = ROOT / "src_c"


def read(*parts):
    return ROOT.joinpath(*parts).read_text(encoding="utf-8")


def listed_sources():
    lines = (line.partition("#")[0].strip() for line in read("src_c", "sources.txt").splitlines())
    return [line for line in lines if line]


def readme_blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", read("README.md"), re.MULTILINE | re.DOTALL)


def test_sources_txt_lists_each_c_file_once():
    existing = {path.relative_to(SRC).as_posix() for path in SRC.rglob("*.c")}
    assert sorted(listed_sources()) == sorted(existing)


def test_header_and_library_are_in_the_package():
    pytest.importorskip("fastattn._native", exc_type=ImportError)
    header = Path(fastattn.get_include(), "fastattn.h")
    assert header.read_bytes() == (SRC / "include" / "fastattn.h").read_bytes()
    assert [path.name for path in Path(fastattn.get_library_dir()).iterdir()] in (["libfastattn.a"], ["fastattn.lib"])


def test_without_the_native_backend_there_is_no_library(monkeypatch):
    monkeypatch.setattr("os.path.isdir", lambda path: False)
    for folder in (fastattn.get_include, fastattn.get_library_dir):
        with pytest.raises(FileNotFoundError, match="without its native backend"):
            folder()


FORBIDDEN = re.compile(
    r"-m(arch|cpu|tune)=|/arch:"  # a build serves every machine of a family
    r"|-Ofast|-f(fast|unsafe|finite|associative|reciprocal)-?math|-fno-signed-zeros|/fp:fast"  # IEEE arithmetic
    r"|#\s*pragma\s+(GCC\s+optimize|float_control|STDC\s+FENV_ACCESS\s+OFF)"
    r"|_MM_SET_(FLUSH_ZERO|DENORMALS_ZERO)_MODE"  # the caller's floating-point environment
)


def test_no_flag_names_a_processor_or_relaxes_arithmetic():
    files = [ROOT / "setup.py", ROOT / "pyproject.toml", *(ROOT / "fastattn").glob("*.p[xy][xdi]")]
    files += [path for path in SRC.rglob("*") if path.is_file() and path.suffix not in {".o", ".a", ".so"}]
    found = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in files
        for match in FORBIDDEN.finditer(path.read_text(encoding="utf-8"))
    ]
    assert not found


@pytest.mark.parametrize("flag", ["-march=native", "-Ofast", "-ffast-math", "-funsafe-math-optimizations", "/fp:fast"])
def test_the_search_for_forbidden_flags_finds_them(flag):
    assert FORBIDDEN.search(f'FLAGS = ["-O2", "{flag}"]')


def test_cmake_compiles_with_the_flags_of_setup_py():
    flags = re.search(r'"unix": \[("-O.*?)\]', read("setup.py")).group(1)
    cmake = read("src_c", "CMakeLists.txt")
    spelling = {"-std=c11": "C_STANDARD 11", "-fvisibility=hidden": "C_VISIBILITY_PRESET hidden"}
    for flag in re.findall(r'"(.+?)"', flags):
        assert spelling.get(flag, flag) in cmake


def test_version_is_the_same_everywhere():
    assert re.fullmatch(r"\d+\.\d+\.\d+", fastattn.__version__)
    native = pytest.importorskip("fastattn._native", exc_type=ImportError)
    assert native.version() == fastattn.__version__


def test_version_stands_in_one_file():
    files = [ROOT / name for name in ("setup.py", "pyproject.toml", "src_c/CMakeLists.txt", "src_c/fastattn.pc.in")]
    assert not [path.name for path in files if fastattn.__version__ in path.read_text(encoding="utf-8")]


def test_installed_metadata():
    try:
        distribution = importlib.metadata.distribution("fastattn")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("fastattn runs from its folder; it is not installed")
    assert distribution.version == fastattn.__version__
    (script,) = distribution.entry_points.select(group="console_scripts")
    assert script.name == "fastattn" and callable(script.load())
    required = [line for line in distribution.requires if "extra ==" not in line]
    assert len(required) == 1 and required[0].startswith("numpy")


def test_readme_has_one_block_to_run_it_and_one_to_test_it():
    assert len(re.findall(r"^\s*```\s*sh", read("README.md"), re.MULTILINE)) == 2
    run, test = readme_blocks("sh")
    assert "pip install" in run and "fastattn bench" in run
    assert "pip install" in test and "pytest" in test


def test_readme_commands_name_files_that_exist():
    for block in readme_blocks("sh"):
        for path in re.findall(r"(?<= )[\w/]+\.py\b", block):
            assert (ROOT / path).is_file(), path


def test_readme_python_runs():
    (block,) = (block for block in readme_blocks("python") if "import fastattn" in block)
    names = {}
    exec(compile(block, "<README>", "exec"), names)
    assert names["out"].shape == (1, 32, 1, 128)


def test_readme_lists_every_environment_variable():
    documented = set(re.findall(r"^\| `(FASTATTN_\w+?)(?:=1)?` ", read("README.md"), re.MULTILINE))
    used = set(re.findall(r'enabled\("(FASTATTN_\w+)"\)', read("setup.py")))
    for path in (ROOT / "fastattn").rglob("*.py"):
        used |= set(re.findall(r"\bFASTATTN_[A-Z_]+\b", path.read_text(encoding="utf-8")))
    assert documented == used


def test_readme_links_to_files_that_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", read("README.md")):
        assert (ROOT / target).exists(), target
