"""The command line: ``python -m fastattn info`` and ``python -m fastattn bench``."""

import sys

import fastattn

USAGE = """\
usage: fastattn {info,bench} ...

  info    what computes, on which processor, and why not something faster
  bench   a table of speed and error on this machine; see fastattn bench --help
"""


def main(argv=None):
    """Run a command and return its exit status."""
    command, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if command == "bench":
        from fastattn import _bench

        return _bench.main(rest)
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
