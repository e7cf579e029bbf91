"""What the example that runs a language model makes of damaged and hostile files: an error of its own, at little cost."""

import struct
import tracemalloc

import numpy as np
import pytest
from tiny_model import F32, HIDDEN, TOKENS, fields, gguf, smollm2, tensors, tiny_path, write  # noqa: F401


def refused(path, message=None):
    """Check that loading fails with the error meant for it, and without allocating much."""
    tracemalloc.start()
    try:
        with pytest.raises(smollm2.ModelError, match=message):
            smollm2.load(path)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


def with_field(key, value):
    return lambda fields, tensors: fields.__setitem__(key, value)


def with_tensor(name, shape, encoding=F32):
    return lambda fields, tensors: tensors.__setitem__(name, (np.zeros(shape, np.float32), encoding))


@pytest.mark.parametrize(
    "change, message",
    [
        (with_field("llama.block_count", 3), "missing or unexpected tensors"),
        (with_field("llama.block_count", 2**31 - 1), "llama.block_count is 2147483647, expected 1 to 256"),
        (with_field("llama.block_count", "2"), "llama.block_count is missing or not a number"),
        (with_field("llama.block_count", [2]), "llama.block_count is missing or not a number"),
        (lambda fields, tensors: fields.pop("llama.embedding_length"), "llama.embedding_length is missing"),
        (with_field("llama.embedding_length", 0), "llama.embedding_length is 0"),
        (with_field("llama.attention.head_count", 5), "do not fit"),
        (with_field("llama.attention.head_count_kv", 3), "do not fit"),
        (with_field("llama.attention.head_count_kv", 4), r"attn_k.weight has shape \(32, 64\), expected \(64, 64\)"),
        (with_field("llama.attention.layer_norm_rms_epsilon", float("nan")), "rms_epsilon is nan"),
        (with_field("llama.rope.freq_base", float("inf")), "freq_base is inf"),
        (with_field("llama.rope.dimension_count", 8), "dimension_count is 8, expected 16"),
        (with_field("llama.vocab_size", 10), "vocab_size is 10"),
        (with_field("tokenizer.ggml.model", "llama"), "tokenizer.ggml.model is not 'gpt2'"),
        (with_field("tokenizer.ggml.pre", 7), "tokenizer.ggml.pre is not 'smollm'"),
        (with_field("tokenizer.ggml.tokens", TOKENS[:-1]), "token_embd.weight has shape"),
        (with_field("tokenizer.ggml.tokens", [*TOKENS[:-1], "a"]), "repeats a token"),
        (with_field("tokenizer.ggml.tokens", ["日" if token == "x" else token for token in TOKENS]), "stands for no byte"),
        (with_field("tokenizer.ggml.tokens", list(range(len(TOKENS)))), "not an array of STRING"),
        (with_field("tokenizer.ggml.token_type", [1]), "no kind for each"),
        (with_field("tokenizer.ggml.merges", ["a b c"]), "a merge names"),
        (with_field("tokenizer.ggml.merges", ["x y"]), "a merge names"),
        (with_field("tokenizer.ggml.eos_token_id", len(TOKENS)), "eos_token_id is 265"),
        (with_field("general.alignment", 3), "not a readable GGUF file"),
        (with_tensor("output.weight", (HIDDEN, HIDDEN)), r"unexpected tensors: \['output.weight'\]"),
        (with_tensor("output_norm.weight", (HIDDEN, 1)), "output_norm.weight has shape"),
        (with_tensor("output_norm.weight", HIDDEN, gguf.GGMLQuantizationType.I32), "stored as I32"),
        (lambda fields, tensors: tensors.pop("blk.1.ffn_up.weight"), r"missing or .*\['blk.1.ffn_up.weight'\]"),
    ],
)
def test_a_file_that_is_not_the_model_is_refused(tmp_path, change, message):
    metadata, weights = fields(), tensors()
    change(metadata, weights)
    refused(write(tmp_path / "bad.gguf", metadata, weights), message)


def test_another_architecture_is_refused(tmp_path):
    refused(write(tmp_path / "bad.gguf", fields(), tensors(), architecture="gpt2"), "not 'llama'")


def forge_tensor(data, name, offset=None, dims=None):
    """Overwrite the offset or the sizes of a tensor in the header."""
    at = data.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)
    (rank,) = struct.unpack_from("<I", data, at)
    if dims is not None:
        struct.pack_into(f"<{rank}Q", data, at + 4, *dims)
    if offset is not None:
        struct.pack_into("<Q", data, at + 4 + 8 * rank + 4, offset)


@pytest.mark.parametrize(
    "name, forgery",
    [
        ("output_norm.weight", {"offset": 0}),  # the place of token_embd
        ("output_norm.weight", {"offset": 2**64 - 320}),  # wraps round into the metadata
        ("output_norm.weight", {"offset": 2**40}),
        ("output_norm.weight", {"dims": [2**62]}),
        ("blk.0.attn_q.weight", {"dims": [2**32, 2**32]}),  # their product wraps to 0
        ("blk.0.attn_q.weight", {"dims": [33, 64]}),
        ("blk.0.attn_q.weight", {"dims": [128, 32]}),
    ],
)
def test_forged_tensors_are_refused(tiny_path, tmp_path, name, forgery):
    data = bytearray(tiny_path.read_bytes())
    forge_tensor(data, name, **forgery)
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    refused(path)


def header(kv_count, *entries):
    return struct.pack("<4sIQQ", b"GGUF", 3, 0, kv_count) + b"".join(entries)


def entry(kind, payload):
    return struct.pack("<Q1sI", 1, b"k", kind) + payload


UINT8, STRING, ARRAY = (gguf.GGUFValueType[name] for name in ("UINT8", "STRING", "ARRAY"))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GGUF",
        b"PK\x03\x04" + bytes(100),
        struct.pack("<4sIQQ", b"GGUF", 9, 0, 0),
        struct.pack("<4s", b"GGUF") + struct.pack(">IQQ", 3, 0, 0) + bytes(64),
        header(0),
        header(2**64 - 1),
        header(1, struct.pack("<Q", 2**63)),
        header(1, entry(STRING, struct.pack("<Q", 2**64 - 1))),
        header(1, entry(ARRAY, struct.pack("<IQ", UINT8, 2**62))),
        header(1, entry(ARRAY, struct.pack("<IQ", ARRAY, 1) * 5000)),
        header(1, entry(99, bytes(8))),
        header(2, *[entry(UINT8, b"\0")] * 2),
        header(1, struct.pack("<Q1sI", 1, b"\xff", UINT8), b"\0"),
    ],
    ids=range(14),
)
def test_forged_headers_are_refused(tmp_path, data):
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    refused(path, "not a readable GGUF file|general.architecture")


def test_metadata_without_end_is_refused(tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(header(1, entry(ARRAY, struct.pack("<IQ", UINT8, 10**6)), bytes(10**6)))
    with pytest.raises(smollm2.ModelError, match="too many metadata entries"):
        smollm2.load(path)


def test_a_file_cut_anywhere_is_refused(tiny_path, tmp_path):
    data, path = tiny_path.read_bytes(), tmp_path / "cut.gguf"
    end = 32 * (len(data) // 32) - 32  # the padding behind the last tensor may go
    for length in [*range(0, 4000, 97), *range(4000, end, 9973), end]:
        path.write_bytes(data[:length])
        with pytest.raises(smollm2.ModelError):
            smollm2.load(path)


def test_damaged_headers_load_or_are_refused_but_never_crash(tiny_path, tmp_path):
    data, path, rng = tiny_path.read_bytes(), tmp_path / "damaged.gguf", np.random.default_rng(5)
    size = smollm2.gguf.checked_reader()(tiny_path).data_offset
    refusals = 0
    for _ in range(150):
        damaged = bytearray(data)
        for at in rng.integers(0, size, 3):
            damaged[at] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            smollm2.load(path)
        except smollm2.ModelError:
            refusals += 1
    assert refusals > 50
