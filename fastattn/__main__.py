"""The command line: ``fastattn``, or ``python -m fastattn``."""

import importlib
import sys

import fastattn

USAGE = """\
usage: fastattn {info,bench,quality} ...

  info     what computes, on which processor, and why not something faster
  bench    a table of speed and error on this machine; see fastattn bench --help
  quality  what quantised caches cost a language model; see fastattn quality --help
"""
PROGRAMS = {"bench": "_bench", "quality": "_quality"}  # commands with arguments of their own: their modules


def main(argv=None):
    """Run a command and return its exit status."""
    command, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if command in PROGRAMS:
        return importlib.import_module(f"fastattn.{PROGRAMS[command]}").main(rest)
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


if __name__ == "__main__":
    sys.exit(main())
