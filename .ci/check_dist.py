"""What a wheel or an sdist must and must not contain.

    python .ci/check_dist.py FILE...
"""

import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
JUNK = {".o", ".a", ".pyc", ".nbi", ".nbc"}


def c_library(wheel):
    archive = "fastattn.lib" if "-win" in wheel else "libfastattn.a"
    return {"fastattn/include/fastattn.h", f"fastattn/lib/{archive}", "fastattn/libfastattn.pxd"}


def modules():
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastattn").rglob("*.py")} | {"fastattn/py.typed"}


def engine():
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "src_c").rglob("*")
        if path.is_file() and path.suffix not in JUNK
    }


def extensions(names):
    return {name for name in names if name.startswith("fastattn/_native.") and name.endswith((".so", ".pyd"))}


def check_wheel(wheel, names):
    needed = modules() | c_library(wheel)
    extension = extensions(names)
    metadata = {name for name in names if name.partition("/")[0].endswith(".dist-info")}
    openmp = {name for name in names if name.startswith(("fastattn.libs/libgomp", "fastattn/.dylibs/libomp"))}  # after a repair
    yield from (f"lacks {name}" for name in sorted(needed - names))
    yield from (f"must not hold {name}" for name in sorted(names - needed - metadata - openmp - extension))
    if len(extension) != 1:
        yield f"holds {len(extension)} native extensions, not 1"
    if not any(name.endswith("licenses/LICENSE") for name in metadata):
        yield "lacks LICENSE"


# By the end of a wheel's tag, kernels that its extension must hold. Some are inline assembly, which the compiler of Windows has not.
X86_64 = ("float32_portable", "float32_avx2", "float32_avx512", "bfloat16_avx512", "int16_avx512")
AARCH64 = ("float32_portable", "float32_neon")
KERNELS = {
    ("x86_64",): (*X86_64, "bfloat16_amx"),
    ("win_amd64",): X86_64,
    ("aarch64", "0_arm64"): (*AARCH64, "bfloat16_neon", "bytes_rows_neon"),  # Linux, and a version of macOS
    ("win_arm64",): AARCH64,
}


def check_extension(wheel, data):
    """Of the bytes of a wheel's extension."""
    if b".debug_info" in data:
        yield "holds an extension with debug information"
    found = [kernels for names, kernels in KERNELS.items() if wheel.removesuffix(".whl").endswith(names)]
    if not found:
        yield "is for an architecture of which nothing is known here"
    yield from (f"lacks the kernels {name}" for kernels in found for name in kernels if f"{name}\0".encode() not in data)


def check_sdist(names):
    names = {str(PurePosixPath(*PurePosixPath(name).parts[1:])) for name in names}
    tests = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.[pch]*") if path.suffix not in JUNK}
    needed = modules() | engine() | tests | {
        ".ci/run", "LICENSE", "README.md", "fastattn/_native.pyx", "pyproject.toml", "setup.py",
    }
    yield from (f"lacks {name}" for name in sorted(needed - names))
    yield from (f"must not hold {name}" for name in sorted(names) if PurePosixPath(name).suffix in JUNK | {".so"})
    if "fastattn/_native.c" in names:
        yield "must not hold generated C"


def main():
    failed = False
    for file in map(Path, sys.argv[1:]):
        if file.suffix == ".whl":
            archive = zipfile.ZipFile(file)
            names = {name for name in archive.namelist() if not name.endswith("/")}
            problems = list(check_wheel(file.name, names))
            for name in extensions(names):
                problems += check_extension(file.name, archive.read(name))
        else:
            with tarfile.open(file) as archive:
                names = {member.name for member in archive if member.isfile()}
            problems = list(check_sdist(names))
        for problem in problems:
            print(f"{file.name} {problem}")
        print(f"{file.name}: {len(names)} files, {len(problems)} problems")
        failed |= bool(problems)
    return failed


if __name__ == "__main__":
    sys.exit(main())
