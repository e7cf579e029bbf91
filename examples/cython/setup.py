"""An extension of one's own that is linked with the engine."""

from setuptools import Extension, setup

import fastattn

setup(
    name="heads",
    ext_modules=[
        Extension(
            "heads",
            ["heads.pyx"],
            include_dirs=[fastattn.get_include()],
            library_dirs=[fastattn.get_library_dir()],
            libraries=["fastattn", "m"],
            extra_link_args=["-pthread"] + ["-fopenmp"] * fastattn.show_config("dicts")["openmp"],
        )
    ],
)
