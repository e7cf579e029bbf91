"""What a quantised cache costs: the perplexity of SmolLM2-135M on a text that every Python has, by the dtype of its cache.

    python examples/quality.py                              # a table, and a picture in quality.png
    python examples/quality.py --text FILE --tokens 2000

It is the command ``fastattn quality``, which ``fastattn quality --help`` describes.
"""

import sys

from fastattn.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["quality", *sys.argv[1:]]))
