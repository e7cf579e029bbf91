"""SmolLM2 in NumPy: a checked GGUF reader, the tokenizer, and the network. Attention is the caller's.

The network is a Llama: RMS norm, grouped-query attention with rotary positions, a SiLU-gated MLP, tied embeddings.
Weights are dequantised to float32 and kept as (outputs, inputs), the order of the file: ``x @ w.T`` then reads each
weight once along memory, which is all that one token's worth of work costs.

The file is not trusted. Every length, count and offset in it is checked before it is used, every shape must be the one
the hyper-parameters imply, and tensors may not share bytes, so that memory stays in proportion to the file's size.
"""

import codecs
from pathlib import Path
from typing import NamedTuple

import numpy as np
from gguf import GGMLQuantizationType as Encoding, GGUFReader, GGUFValueType, dequantize
from tokenizers import Tokenizer as Engine, models, pre_tokenizers

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
PREFILL = 512  # prompt tokens per pass: bounds the activations, and the baseline's score matrix, for any prompt


class ModelError(Exception):
    """The model could not be fetched, or its file is not what this program can run."""


# ---------------------------------------------------------------------------------------------------- the file


class CheckedReader(GGUFReader):
    """``GGUFReader`` for files from anywhere.

    The base class slices past the end of the file without noticing, so that a forged count makes it loop and allocate
    for ever. All its reads pass through ``_get``: here each must lie inside the file, and their number is limited.
    """

    max_reads = 300_000  # a vocabulary of 49,152 needs 250,000; so many take less than 100 MB

    def _get(self, offset, dtype, count=1, override_order=None):
        self.max_reads -= 1
        if self.max_reads < 0:
            raise ValueError("too many metadata entries")
        if self.byte_order != "I":
            raise ValueError("big-endian files are not supported")
        return np.frombuffer(self.data, np.dtype(dtype).newbyteorder("<"), int(count), int(offset))


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
_ENCODINGS = {Encoding[name] for name in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")}


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


def _tensors(reader, config):
    """The tensors by name, after checking that they are exactly those of `config` and lie side by side."""
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    shapes = _shapes(config)
    if tensors.keys() != shapes.keys():
        raise ModelError(f"missing or unexpected tensors: {sorted(tensors.keys() ^ shapes.keys())[:4]}")
    for name, shape in shapes.items():
        found = tuple(tensors[name].shape[::-1].tolist())
        if found != shape:
            raise ModelError(f"{name} has shape {found}, expected {shape}")
        if tensors[name].tensor_type not in _ENCODINGS:
            raise ModelError(f"{name} is stored as {tensors[name].tensor_type.name}, which is not supported")
    end = reader.data_offset
    for tensor in sorted(reader.tensors, key=lambda tensor: tensor.data_offset):
        if tensor.data_offset < end:
            raise ModelError(f"{tensor.name} overlaps other data")
        end = tensor.data_offset + tensor.n_bytes
    return tensors


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
            reader = CheckedReader(Path(path))
        config = _config(reader)
        return Model(config, _tensors(reader, config)), Tokenizer(reader)
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
        try:
            start, end = self._controls["<|im_start|>"], self._controls["<|im_end|>"]
        except KeyError as error:
            raise ModelError(f"the vocabulary has no {error}: this is no chat model") from None
        turns = [("system", system), ("user", prompt)]
        tokens = []
        for role, text in turns:
            tokens += [start, *self.encode(f"{role}\n{text}"), end, *self.encode("\n")]
        return [*tokens, start, *self.encode("assistant\n")]

    def decoder(self):
        """A function from token number to text that holds back the bytes of an unfinished character."""
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda token: utf8.decode(self._bytes[token])


# ------------------------------------------------------------------------------------------------- the network


class Cache:
    """Rotated keys and values of all layers, in arrays that double when they are full."""

    def __init__(self, config, capacity=256):
        self._config = config
        self.length = 0
        shape = (config.layers, 1, config.kv_heads, min(capacity, config.context), config.head_dim)
        self.keys, self.values = np.empty(shape, np.float32), np.empty(shape, np.float32)

    def reserve(self, new):
        """Make room for `new` more tokens."""
        needed, capacity = self.length + new, self.keys.shape[3]
        if needed > self._config.context:
            raise ModelError(f"the model's context of {self._config.context} tokens is full")
        if needed > capacity:
            capacity = min(max(2 * capacity, needed), self._config.context)
            self.keys, self.values = self._grown(self.keys, capacity), self._grown(self.values, capacity)

    def _grown(self, old, capacity):
        new = np.empty((*old.shape[:3], capacity, old.shape[4]), old.dtype)
        new[..., : self.length, :] = old[..., : self.length, :]
        return new

    def store(self, layer, k, v):
        """Put `k` and `v`, (kv_heads, new, head_dim), behind the tokens there are; return all, (1, kv_heads, :, :)."""
        end = self.length + k.shape[1]
        self.keys[layer, 0, :, self.length : end] = k
        self.values[layer, 0, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Layer(NamedTuple):
    """Weights of one block; matrices that read the same input are one."""

    attn_norm: np.ndarray
    qkv: np.ndarray
    attn_output: np.ndarray
    ffn_norm: np.ndarray
    gate_up: np.ndarray
    ffn_down: np.ndarray


class Model:
    """The network, from token numbers to logits."""

    def __init__(self, config, tensors):
        def weight(name):
            tensor = tensors[f"{name}.weight"]
            return np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), np.float32)

        def split_halves(w):
            """Undo the row order of Q and K in llama-type GGUF files.

            They hold the two coordinates that rotate together side by side; here the first coordinates of all pairs
            come first, then the second ones, so that a rotation works on two contiguous halves. The same order in Q
            and in K leaves their products as they are.
            """
            return w.reshape(-1, config.head_dim // 2, 2, config.hidden).swapaxes(1, 2).reshape(w.shape)

        def layer(block):
            q, k, v = (weight(f"{block}.attn_{name}") for name in "qkv")
            return Layer(
                attn_norm=weight(f"{block}.attn_norm"),
                qkv=np.concatenate([split_halves(q), split_halves(k), v]),
                attn_output=weight(f"{block}.attn_output"),
                ffn_norm=weight(f"{block}.ffn_norm"),
                gate_up=np.concatenate([weight(f"{block}.ffn_gate"), weight(f"{block}.ffn_up")]),
                ffn_down=weight(f"{block}.ffn_down"),
            )

        self.config = config
        self.embedding = weight("token_embd")
        self.layers = [layer(f"blk.{i}") for i in range(config.layers)]
        self.output_norm = weight("output_norm")
        half = np.arange(0, config.head_dim, 2) / config.head_dim
        self._frequencies = config.rope_base**-half

    def prefill(self, tokens, cache, attention):
        """Run a prompt of any length and return the logits (vocab,) after its last token."""
        for start in range(0, len(tokens), PREFILL):
            hidden = self.forward(tokens[start : start + PREFILL], cache, attention)
        return self.logits(hidden[-1])

    def forward(self, tokens, cache, attention):
        """Run `tokens` behind those in `cache`.

        Parameters
        ----------
        tokens : sequence of int
            New token numbers.
        cache : Cache
            Keys and values so far; the new ones are added.
        attention : callable
            ``attention(q, k, v, causal=True)`` on (1, heads, length, head_dim), with fewer kv heads than query heads
            and the last query seeing the last key.

        Returns
        -------
        ndarray (len(tokens), hidden)
            What `logits` takes.
        """
        c, new = self.config, len(tokens)
        cache.reserve(new)
        angles = np.outer(np.arange(cache.length, cache.length + new), self._frequencies)[:, None]
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        x = self.embedding[tokens]
        for index, layer in enumerate(self.layers):
            heads = (self._norm(x, layer.attn_norm) @ layer.qkv.T).reshape(new, -1, c.head_dim)
            _rotate(heads[:, : c.heads + c.kv_heads], cos, sin)
            heads = heads.swapaxes(0, 1)
            k, v = cache.store(index, heads[c.heads : -c.kv_heads], heads[-c.kv_heads :])
            out = attention(heads[None, : c.heads], k, v, causal=True)
            x += out[0].swapaxes(0, 1).reshape(new, -1) @ layer.attn_output.T
            gate_up = self._norm(x, layer.ffn_norm) @ layer.gate_up.T
            x += (_silu(gate_up[:, : c.ffn]) * gate_up[:, c.ffn :]) @ layer.ffn_down.T
        cache.length += new
        return self._norm(x, self.output_norm)

    def logits(self, hidden):
        """Scores (..., vocab) of the next token."""
        return hidden @ self.embedding.T

    def _norm(self, x, weight):
        square = np.einsum("ij,ij->i", x, x)[:, None] / np.float32(x.shape[1])
        return x / np.sqrt(square + np.float32(self.config.rms_eps)) * weight


def _rotate(x, cos, sin):
    """Rotary positions, in place: coordinate i turns with coordinate i + head_dim / 2."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    a_turned = a * cos - b * sin
    b *= cos
    b += a * sin
    a[...] = a_turned


def _silu(x):
    """x * sigmoid(x), by way of tanh because exp would overflow."""
    return x * (np.float32(0.5) * np.tanh(np.float32(0.5) * x) + np.float32(0.5))
