"""Sphinx: the pages of this folder, and the reference from the docstrings.

python -m sphinx -W -b html docs build/docs
"""

import importlib.util

import fastattn

project = "fastattn"
author = "The fastattn authors"
release = version = fastattn.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "numpydoc"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "fastattn"

myst_heading_anchors = 3
autodoc_mock_imports = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
autodoc_typehints = "none"  # numpydoc has the types
autodoc_member_order = "bysource"
autosummary_generate = False
numpydoc_show_class_members = False
