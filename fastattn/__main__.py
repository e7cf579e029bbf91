"""The command line: ``fastattn``, or ``python -m fastattn``."""

import importlib
import sys

import fastattn

from .models.weights import ModelError

USAGE = """\
usage: fastattn {info,bench,quality,attribution} ...

  info         what computes, on which processor, and why not something faster
  bench        a table of speed and error on this machine
  quality      what quantised caches cost a language model
  attribution  which of several documents an answer of a language model looked at

Each command but info has more to say: fastattn bench --help
"""
PROGRAMS = {  # commands with arguments of their own: their modules, and the extras that they need
    "bench": ("_bench", "bench"),
    "quality": ("_quality", "examples"),
    "attribution": ("_attribution", "examples"),
}


def main(argv=None):
    """Run a command and return its exit status."""
    command, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if command in PROGRAMS:
        return run(command, rest)
    if command == "info" and not rest:
        fastattn.show_config()
        return 0
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if command == "--version":
        print(fastattn.__version__)
        return 0
    print(USAGE, end="", file=sys.stderr)
    return 2


def run(command, arguments):
    """Run a program. A package that it lacks, and a file that is not as it must be, end it with a line that says so."""
    module, extra = PROGRAMS[command]
    try:
        return importlib.import_module(f"fastattn.{module}").main(arguments)
    except ImportError as error:
        print(f"fastattn {command}: {error}; it needs the extra {extra} (pip install 'fastattn[{extra}]')", file=sys.stderr)
        return 2
    except (ModelError, OSError, UnicodeDecodeError) as error:
        print(f"fastattn {command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
