"""Build the native extension; everything else about the package is in pyproject.toml.

The C engine is compiled straight into ``fastattn._native``: its sources are those of ``src_c/sources.txt``, the list that
CMake reads too. Each C file selects its own instruction set, so one set of flags serves all of them.

Two environment variables are read:

FASTATTN_REQUIRE_NATIVE=1
    Fail when the extension cannot be built. Otherwise the package is installed without it and uses another backend.
FASTATTN_NO_OPENMP=1
    Do not look for OpenMP.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

ENGINE = Path("src_c")

# No flag names a processor or relaxes IEEE arithmetic: the kernels choose instruction sets at run time, and hidden keys,
# NaN and inf depend on exact comparisons. Contraction is off because compilers differ in where they fuse a multiply and
# an add; where the engine wants an FMA it says so with an intrinsic. Nothing reads errno after a math function.
FLAGS = {
    "unix": ["-O2", "-std=c11", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"],
    "msvc": ["/O2", "/std:c11", "/fp:precise"],
}

# Candidates of (compiler flags, linker flags); the second is Apple's clang with the libomp of a package manager.
OPENMP = {
    "unix": [(["-fopenmp"], ["-fopenmp"]), (["-Xpreprocessor", "-fopenmp"], ["-lomp"])],
    "msvc": [(["/openmp"], [])],
}

PTHREAD = {"unix": ["-pthread"], "msvc": []}

# Python hands on the flags of its own build, -g among them, which makes an extension ten times as large: these come last,
# unless build_ext has --debug. Not every linker can leave out the names of what is not exported.
NO_DEBUG = {"unix": [(["-g0"], ["-Wl,-s"]), (["-g0"], [])], "msvc": [([], [])]}

EMPTY_PROBE = "int main(void) { return 0; }\n"

OPENMP_PROBE = """
#include <omp.h>
int main(void) {
    int n = 0;
    #pragma omp parallel reduction(+ : n)
    n += omp_get_num_threads();
    return n < 1;
}
"""


def enabled(variable):
    return os.environ.get(variable, "0") not in ("", "0")


def engine_sources():
    lines = (line.partition("#")[0].strip() for line in (ENGINE / "sources.txt").read_text().splitlines())
    return [str(ENGINE / line) for line in lines if line]


def version():
    text = Path("fastattn/__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1)


class BuildNative(build_ext):
    """build_ext that looks for OpenMP and, unless told otherwise, survives a compiler that is absent or fails."""

    def initialize_options(self):
        super().initialize_options()
        self.cython_c_in_temp = True  # generated C stays out of the package

    def build_extensions(self):
        openmp = None if enabled("FASTATTN_NO_OPENMP") else self.first_that_links(OPENMP_PROBE, OPENMP)
        if openmp is None:
            self.warn("fastattn: building without OpenMP; the native backend will use its own threads only")
        no_debug = None if self.debug else self.first_that_links(EMPTY_PROBE, NO_DEBUG)
        flags = [(self.of_compiler(FLAGS), self.of_compiler(PTHREAD)), openmp or ([], []), no_debug or ([], [])]
        for ext in self.extensions:
            ext.extra_compile_args = [flag for compile_flags, _ in flags for flag in compile_flags]
            ext.extra_link_args = [flag for _, link_flags in flags for flag in link_flags]
        super().build_extensions()

    def of_compiler(self, choices):
        return choices.get(self.compiler.compiler_type, choices["unix"])

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
            self.add_c_library(Path(self.get_ext_fullpath(ext.name)).parent)
        except (BaseError, CCompilerError):
            if ext.optional:
                self.warn(
                    "fastattn: THE NATIVE BACKEND WAS NOT BUILT (the error is below). The package still works, slower, "
                    "on its Numba or NumPy backend. Install a C compiler and reinstall for full speed."
                )
            raise  # build_extensions() swallows it for an optional extension

    def add_c_library(self, package):
        """What programs in C and Cython are built with: the header, and the engine as a static library."""
        objects = self.compiler.object_filenames(engine_sources(), output_dir=self.build_temp)
        self.compiler.create_static_lib(objects, "fastattn", output_dir=str(package / "lib"))
        self.mkpath(str(package / "include"))
        self.copy_file(str(ENGINE / "include" / "fastattn.h"), str(package / "include"))

    def copy_extensions_to_source(self):
        super().copy_extensions_to_source()
        built = Path(self.build_lib, "fastattn")
        if (built / "lib").exists():  # not where there is no compiler
            self.copy_tree(str(built / "lib"), "fastattn/lib")
            self.copy_tree(str(built / "include"), "fastattn/include")

    def first_that_links(self, program, candidates):
        """The first (compiler flags, linker flags) with which a program compiles and links, or None."""
        with tempfile.TemporaryDirectory() as folder:
            probe = Path(folder, "probe.c")
            probe.write_text(program)
            for compile_flags, link_flags in self.of_compiler(candidates):
                try:
                    objects = self.compiler.compile([str(probe)], output_dir=folder, extra_postargs=compile_flags)
                    self.compiler.link_executable(objects, str(Path(folder, "probe")), extra_postargs=link_flags)
                except (BaseError, CCompilerError):
                    continue
                return compile_flags, link_flags
        return None


setup(
    cmdclass={"build_ext": BuildNative},
    ext_modules=[
        Extension(
            "fastattn._native",
            ["fastattn/_native.pyx", *engine_sources()],
            include_dirs=[str(ENGINE), str(ENGINE / "include"), numpy.get_include()],
            define_macros=[
                ("FASTATTN_VERSION", f'"{version()}"'),
                ("FASTATTN_API", ""),  # nothing but the module's init function leaves the extension
                ("FASTATTN_PORTABLE", None),  # on every processor FASTATTN_ISA=portable tells whether vectors have to do with a result
                ("FASTATTN_LAYERS", None),  # what is around attention in a transformer, which is no part of the C library
                ("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION"),
            ],
            libraries=[] if sys.platform == "win32" else ["m"],
            depends=[
                "setup.py", "fastattn/_short_ways.pxi", "fastattn/libfastattn.pxd",
                *map(str, [ENGINE / "sources.txt", *ENGINE.rglob("*.h"), *ENGINE.rglob("*.inc")]),
            ],  # fmt: skip
            optional=not enabled("FASTATTN_REQUIRE_NATIVE"),
        )
    ],
)
