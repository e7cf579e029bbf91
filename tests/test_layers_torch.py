"""Layers against PyTorch's own modules, and models against those of transformers, to 1e-5."""

import numpy as np
import pytest

from fastattn import layers

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

LENGTHS = [11, 4, 1]


def close(actual, expected):
    expected = expected.detach().numpy()
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))


def real():
    return torch.arange(11) < torch.tensor(LENGTHS)[:, None]


def shaken(module):
    """A module in evaluation mode whose biases and norms are not what they begin with."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1)
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("keywords", [{}, {"bias": False}, {"batch_first": True}, {"kdim": 20, "vdim": 20}], ids=str)
def test_multi_head_attention(keywords):
    with torch.inference_mode(False):
        module = shaken(torch.nn.MultiheadAttention(32, 4, **{"batch_first": True, **keywords}))
    ours = layers.MultiHeadAttention.from_torch(module)
    x, context = torch.randn(3, 7, 32), torch.randn(3, 11, keywords.get("kdim", 32))
    padding = ~real()
    close(ours(x.numpy(), context.numpy(), context_lengths=LENGTHS), module(x, context, context, key_padding_mask=padding)[0])
    if "kdim" not in keywords:
        close(ours(context.numpy()), module(context, context, context)[0])
        causal = torch.nn.Transformer.generate_square_subsequent_mask(11)
        both = layers.MultiHeadAttention.from_torch(module, causal=True)
        close(both(context.numpy()), module(context, context, context, attn_mask=causal)[0])


def test_modules_that_are_not_followed():
    with torch.inference_mode(False):
        module = torch.nn.MultiheadAttention(8, 2, add_bias_kv=True)
        layer = torch.nn.TransformerEncoderLayer(8, 2, 8, activation=torch.tanh)
    with pytest.raises(ValueError, match="neither add_bias_kv nor add_zero_attn"):
        layers.MultiHeadAttention.from_torch(module)
    with pytest.raises(ValueError, match="module must have an activation of relu, gelu, silu"):
        layers.TransformerBlock.from_torch(layer)


ACTIVATIONS = ["relu", "gelu", torch.nn.GELU("tanh"), torch.nn.functional.silu]


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=["relu", "gelu", "gelu-tanh", "silu"])
@pytest.mark.parametrize("bias", [False, True])
def test_encoder_layer(norm_first, activation, bias):
    with torch.inference_mode(False):
        module = shaken(
            torch.nn.TransformerEncoderLayer(32, 4, 48, activation=activation, batch_first=True, norm_first=norm_first, bias=bias)
        )
    x = torch.randn(3, 11, 32)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast and not isinstance(activation, torch.nn.GELU))  # which takes any GELU for the exact one
    expected = module(x, src_key_padding_mask=~real()) * real()[..., None]
    torch.backends.mha.set_fastpath_enabled(fast)
    close(layers.TransformerBlock.from_torch(module)(x.numpy(), lengths=LENGTHS), expected)


@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_and_decoder(norm_first):
    with torch.inference_mode(False):
        keywords = {"batch_first": True, "norm_first": norm_first}
        encoder, decoder = (
            shaken(kind(layer(32, 4, 48, **keywords), 2, norm=torch.nn.LayerNorm(32)))
            for kind, layer in (
                (torch.nn.TransformerEncoder, torch.nn.TransformerEncoderLayer),
                (torch.nn.TransformerDecoder, torch.nn.TransformerDecoderLayer),
            )
        )
    x, y = torch.randn(3, 11, 32), torch.randn(3, 5, 32)
    memory = encoder(x, src_key_padding_mask=~real())
    ours = layers.Encoder.from_torch(encoder)(x.numpy(), attention_mask=real().numpy())
    close(ours, memory * real()[..., None])
    causal = torch.nn.Transformer.generate_square_subsequent_mask(5)
    expected = decoder(y, memory, tgt_mask=causal, memory_key_padding_mask=~real(), tgt_is_causal=True)
    ours = layers.Decoder.from_torch(decoder)
    close(ours(y.numpy(), memory.numpy(), context_lengths=LENGTHS), expected)
    cache, keys = ours.new_cache(3, 5), ours.keys(memory.numpy(), lengths=LENGTHS)
    steps = [ours(y[:, n : n + 1].numpy(), keys, cache=cache) for n in range(5)]
    close(np.concatenate(steps, 1), expected)


def test_weights_are_copies():
    with torch.inference_mode(False):
        module = shaken(torch.nn.TransformerEncoderLayer(16, 2, 16, batch_first=True))
        ours = layers.TransformerBlock.from_torch(module)
        x = torch.randn(1, 3, 16)
        before = ours(x.numpy())
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()
    np.testing.assert_array_equal(ours(x.numpy()), before)


def test_parallel_residual():
    """GPT-NeoX, whose queries, keys and values lie side by side for each head."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPTNeoXConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, vocab_size=50, rotary_pct=0.5
    )
    with torch.inference_mode(False):
        model = shaken(transformers.GPTNeoXModel(config))
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}

    def pair(name):
        return state[f"layers.0.{name}.weight"], state[f"layers.0.{name}.bias"]

    weight, bias = pair("attention.query_key_value")
    parts = zip(np.moveaxis(weight.reshape(4, 3, 8, 32), 1, 0).reshape(3, 32, 32), np.moveaxis(bias.reshape(4, 3, 8), 1, 0).reshape(3, 32))
    block = layers.TransformerBlock(
        layers.MultiHeadAttention(*parts, pair("attention.dense"), num_heads=4, rope=layers.Rope(4), causal=True),
        layers.FeedForward(pair("mlp.dense_h_to_4h"), pair("mlp.dense_4h_to_h")),
        attention_norm=layers.LayerNorm(*pair("input_layernorm")),
        feed_forward_norm=layers.LayerNorm(*pair("post_attention_layernorm")),
        parallel=True,
    )
    ours = layers.Decoder(
        [block],
        embedding=layers.TokenEmbedding(state["embed_in.weight"]),
        norm=layers.LayerNorm(state["final_layer_norm.weight"], state["final_layer_norm.bias"]),
    )
    tokens = torch.randint(0, 50, (2, 9))
    close(ours(tokens.numpy()), model(tokens).last_hidden_state)


# Models of transformers

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 50}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
GROUPED = {**SMALL, "num_key_value_heads": 2}
CAUSAL = {
    "llama": ("LlamaForCausalLM", GROUPED),
    "llama, scaled": ("LlamaForCausalLM", {**GROUPED, "rope_parameters": {"rope_theta": 100.0, **LLAMA3}, "attention_bias": True}),
    "llama, tied": ("LlamaForCausalLM", {**GROUPED, "tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", {**GROUPED, "sliding_window": 4}),
    "qwen2": ("Qwen2ForCausalLM", {**GROUPED, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("Qwen3ForCausalLM", {**GROUPED, "head_dim": 16}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0}),
}


def model_of(name, keywords):
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, name)
    with torch.inference_mode(False):
        return shaken(kind(kind.config_class(**keywords, attn_implementation="eager")))


@pytest.mark.parametrize("name, keywords", CAUSAL.values(), ids=CAUSAL)
def test_language_models(name, keywords, tmp_path):
    model = model_of(name, keywords)
    tokens = torch.randint(0, 50, (3, 11))
    with torch.inference_mode(False):
        model.save_pretrained(tmp_path)
    ours = layers.Decoder.from_pretrained(tmp_path)
    close(ours.logits(ours(tokens.numpy())), model(tokens).logits)
    cache = ours.new_cache(3, 11)
    parts = [ours(tokens[:, a:b].numpy(), cache=cache) for a, b in ((0, 6), (6, 7), (7, 11))]
    close(ours.logits(np.concatenate(parts, 1)), model(tokens).logits)


ENCODERS = {
    "bert": ("BertModel", SMALL),
    "roberta": ("RobertaModel", {**SMALL, "pad_token_id": 1}),
}


@pytest.mark.parametrize("name, keywords", ENCODERS.values(), ids=ENCODERS)
def test_text_encoders(name, keywords, tmp_path):
    model = model_of(name, keywords)
    tokens, mask = torch.randint(2, 50, (3, 11)), real()
    tokens[~mask] = 1
    with torch.inference_mode(False):
        model.save_pretrained(tmp_path)
    ours = layers.Encoder.from_pretrained(tmp_path)
    expected = model(tokens, attention_mask=mask.long()).last_hidden_state * mask[..., None]
    close(ours(tokens.numpy(), attention_mask=mask.numpy()), expected)
    packed = ours(tokens[mask].numpy(), cu_seqlens=np.cumsum([0, *LENGTHS]))
    close(packed, expected[mask])


def test_vision(tmp_path):
    keywords = {key: value for key, value in SMALL.items() if key != "vocab_size"}
    model = model_of("ViTModel", {**keywords, "image_size": 24, "patch_size": 8})
    images = torch.randn(2, 3, 24, 24)
    with torch.inference_mode(False):
        model.save_pretrained(tmp_path)
    close(layers.Encoder.from_pretrained(tmp_path)(images.numpy()), model(images).last_hidden_state)


def test_encoder_and_decoder_of_a_translator():
    small = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 50}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 2, "scale_embedding": True, "max_position_embeddings": 32}
    model = model_of("BartModel", {**small, **heads})
    config, state = model.config.to_dict(), model.state_dict()
    encoder = layers.Encoder.from_state_dict(state, layout="bart_encoder", config=config)
    decoder = layers.Decoder.from_state_dict(state, layout="bart_decoder", config=config)
    tokens, answer, mask = torch.randint(3, 50, (3, 11)), torch.randint(3, 50, (3, 6)), real()
    expected = model(tokens, attention_mask=mask.long(), decoder_input_ids=answer)
    memory = encoder(tokens.numpy(), attention_mask=mask.numpy())
    close(memory, expected.encoder_last_hidden_state * mask[..., None])
    close(decoder(answer.numpy(), memory, context_lengths=LENGTHS), expected.last_hidden_state)
    cache, keys = decoder.new_cache(3, 6), decoder.keys(memory, lengths=LENGTHS)
    steps = [decoder(answer[:, n : n + 1].numpy(), keys, cache=cache) for n in range(6)]
    close(np.concatenate(steps, 1), expected.last_hidden_state)


