"""Who may know whom. The rules are those of the package's design; here they are grepped."""

import ast
import importlib.util
import re
import sys
from pathlib import Path

import pytest
from processes import run_script

import fastattn

PACKAGE = Path(fastattn.__file__).parent
ENGINE = Path(__file__).parents[1] / "src_c"


# Python

MAY_IMPORT = {  # a part of the package, and the parts that it may know
    "_typing": {"sparse"},  # which all may know, for it is imported by checkers alone
    "_arrays": set(),
    "_quantized": set(),
    "_check": {"_arrays", "_quantized"},
    "_call": {"_arrays", "_check", "_functions", "_quantized"},
    "_functions": {"_arrays"},
    "_processors": set(),
    "_settings": set(),
    "runtime": {"_call", "_processors", "_settings", "backends", "_native"},
    "attention": {"_call", "_check", "runtime", "backends", "sparse"},
    "quantized": {"_check", "_quantized", "runtime"},
    "indexed": {"_call", "_check", "runtime"},
    "kvcache": {"_call", "_check", "_quantized", "attention", "indexed", "inspect", "quantized"},
    "varlen": {"_call", "runtime"},
    "pagebounds": {"_quantized", "indexed", "runtime"},
    "pagedcache": {"_call", "_check", "_quantized", "attention", "inspect", "kvcache", "pagebounds", "quantized", "varlen"},
    "positions": {"_check"},  # data, made with NumPy; its errors speak as all others do
    "inspect": {"_call", "_check", "_quantized", "backends", "runtime"},  # weights are made by the oracle, whichever backend is in use
    "plot": set(),  # draws numbers, whosever they are
    "rope": {"_check", "runtime"},  # beside attention: what is done to rows goes through the backends
    "scores": {"_arrays", "_call", "_check", "runtime"},
    "linear": {"_arrays", "_check", "runtime"},
    "layers": {"_call", "_check", "runtime", "attention", "kvcache", "pagedcache", "positions", "rope", "varlen"},
    "models": {"layers"},
    "torch": {"_check", "runtime", "_native", "attention", "varlen"},
    "flash_attn": {"_check", "attention", "rope", "torch", "varlen"},
    "transformers": {"attention", "torch", "varlen"},
    "onnx": {"_call", "backends", "attention", "inspect", "linear", "rope"},
    "sparse": {"sparse"},
    "backends": {"_quantized", "_settings", "backends", "_native"},
}
# A module for a framework, and the packages that are there when it is imported.
FRAMEWORKS = {"torch": {"torch"}, "flash_attn": set(), "transformers": {"torch", "transformers"}, "onnx": {"onnx"}}
MODELS = {"models": {"gguf", "tokenizers"}}  # run by commands and examples, which import them when they are called
OPTIONAL = {"numba", "onnx", "llvmlite", "ml_dtypes", "torch", "matplotlib", "rich", "transformers", "gguf", "safetensors", "tokenizers"}


def modules():
    return {path.relative_to(PACKAGE): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path, top_level_only=False):
    """The dotted names that a module imports, relative ones resolved."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = ["fastattn", *path.relative_to(PACKAGE).parent.parts]
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{stem}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("module", modules(), ids=str)
def test_who_may_import_whom(module):
    part = module.parts[0].removesuffix(".py")
    if part not in MAY_IMPORT:
        pytest.skip("the package's face and its programs may know everything")
    parts = {path.parts[0].removesuffix(".py") for path in modules()} | {"_native"}
    inside = {name.split(".")[1] for name in imports(modules()[module]) if name.startswith("fastattn.")}
    assert inside & parts - {part, "_typing"} <= MAY_IMPORT[part]


@pytest.mark.parametrize("module", modules(), ids=str)
def test_optional_packages_are_imported_when_used(module):
    """At the top of a module there is the standard library and NumPy; Numba in its own backend, a framework in its own module."""
    outside = {name.split(".")[0] for name in imports(modules()[module], top_level_only=True)} - {"fastattn"}
    own = {"numba", "llvmlite"} if "numba" in module.name and module.parts[0] == "backends" else set()
    own = (FRAMEWORKS | MODELS).get(module.parts[0].removesuffix(".py"), own)
    assert outside - set(sys.stdlib_module_names) <= {"numpy"} | own


@pytest.mark.parametrize("part", ["sparse", "positions"])
def test_descriptions_know_numpy_only(part):
    for module, path in modules().items():
        if module.parts[0].removesuffix(".py") == part:
            outside = {name.split(".")[0] for name in imports(path)} - {"fastattn"} - set(sys.stdlib_module_names)
            assert outside <= {"numpy", "matplotlib"}  # plot() imports matplotlib when it is called


def test_import_is_light():
    run_script(f"""
        import sys
        import fastattn
        unwanted = {OPTIONAL | {"fastattn._typing", "typing_extensions"}!r} & set(sys.modules)
        assert not unwanted, unwanted
        """)


def test_modules_for_frameworks_are_found_when_named():
    for name, packages in FRAMEWORKS.items():
        if all(map(importlib.util.find_spec, packages)):
            module = getattr(fastattn, name)
            assert module.__name__ == f"fastattn.{name}"
            assert all(getattr(module, public).__doc__ for public in module.__all__)
    with pytest.raises(AttributeError, match="no attribute 'tensorflow'"):
        getattr(fastattn, "tensorflow")  # noqa: B009


def test_public_names_exist_and_are_documented():
    assert fastattn.__all__
    for name in fastattn.__all__:
        assert getattr(fastattn, name).__doc__, name


# C

engine_only = pytest.mark.skipif(not ENGINE.is_dir(), reason="the C sources are not beside the tests")
INTRINSICS = re.compile(
    r"\b_mm\d*_\w+|\b__m(128|256|512)\w*|\b(float32x4|uint16x8)\w*_t\b|(imm|amx|arm_\w+)intrin\.h|arm_neon\.h"
    r"|\bv128_t\b|\bwasm_\w+x\d+_\w+|wasm_simd128\.h"
)


def c_files(folder=""):
    return [path for path in sorted((ENGINE / folder).rglob("*")) if path.suffix in (".c", ".h", ".inc")]


def code(path):
    """The text of a C file without its comments."""
    return re.sub(r"/\*.*?\*/|//[^\n]*", " ", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def includes(path):
    return re.findall(r'^\s*#\s*include\s*["<]([^">]+)[">]', code(path), re.MULTILINE)


def folder_of(path, name):
    """The part of the engine to which a header belongs that this file includes, or None for a header of the system."""
    for folder in (path.parent, ENGINE / "include"):
        if (folder / name).is_file():
            return (folder / name).resolve().relative_to(ENGINE.resolve()).parts[0]
    return None


@engine_only
def test_the_engine_has_its_parts():
    assert all(c_files(part) for part in ("include", "core", "ukernel", "simd", "cpu"))


@engine_only
def test_core_knows_the_contract_of_the_kernels_and_no_intrinsic():
    for path in c_files("core"):
        assert not INTRINSICS.search(code(path)), path
        for name in includes(path):
            # storage.h reads and writes single numbers of any storage type; it belongs to no instruction set.
            contract = Path(name).name in ("ukernel.h", "layers.h", "quantised.h", "storage.h")
            assert contract or folder_of(path, name) in (None, "core", "cpu", "include"), (path, name)


@engine_only
def test_kernels_know_simd_and_never_core():
    for path in c_files("ukernel"):
        assert not {"core"} & {folder_of(path, name) for name in includes(path)}, path


@engine_only
def test_simd_knows_nothing_of_the_engine():
    for path in c_files("simd"):
        assert {folder_of(path, name) for name in includes(path)} <= {None, "simd"}, path


@engine_only
def test_every_operation_is_tested_alone():
    """The operations that kernels use are in the checks of each instruction set, and every header of lanes has these."""
    tests = Path(__file__).parent / "c"
    called = re.compile(r"\bsimd_\w+(?=\()")
    used = {name for path in c_files("ukernel") for name in called.findall(code(path))}
    checked = {name for path in (tests / "operations.h", *tests.glob("test_operations_*.c")) for name in called.findall(code(path))}
    assert len(used) > 40 and not used - checked
    headers = {path.stem for path in c_files("simd") if "define SIMD_LANES" in code(path)}
    assert headers == {path.stem.removeprefix("test_operations_") for path in tests.glob("test_operations_*.c")}


@engine_only
def test_one_file_includes_omp():
    with_omp = [path for path in c_files() if "omp.h" in includes(path)]
    assert len(with_omp) == 1 and with_omp[0].parent.name == "core"


@engine_only
def test_pragmas_of_openmp_stay_in_that_file():
    assert len([path for path in c_files() if re.search(r"#\s*pragma\s+omp\b", code(path))]) <= 1


@engine_only
def test_no_code_is_switched_off():
    for path in c_files():
        assert not re.search(r"#\s*if\s+0\b", code(path)), path


@engine_only
def test_the_public_header_needs_nothing_of_ours():
    (header,) = c_files("include")
    assert set(includes(header)) == {"stddef.h", "stdint.h"}
