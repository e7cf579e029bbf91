"""Which document does an answer rest on? SmolLM2 answers a question over several documents, and says where it looked.

    python examples/attribution.py                                   # three short documents and a question
    python examples/attribution.py --page attribution.html --picture attribution.png
    python examples/attribution.py --question "Who built it?" one.txt two.txt

It is the command ``fastattn attribution``, which ``fastattn attribution --help`` describes.
"""

import sys

from fastattn.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["attribution", *sys.argv[1:]]))
