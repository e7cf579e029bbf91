"""fastattn.onnx: the package's own tests of the operators, and onnxruntime for those that it defines."""

import itertools

import numpy as np
import pytest

import fastattn

onnx = pytest.importorskip("onnx", minversion="1.19")
import fastattn.onnx  # noqa: E402

pytestmark = pytest.mark.torch


def node_tests():
    """onnx's test cases of single nodes that are computed here."""
    from onnx.backend.test.loader import load_model_tests

    names = {op.__name__ for op in fastattn.onnx.ops}
    with np.errstate(all="ignore"):
        cases = load_model_tests(kind="node")
    return [case for case in cases if case.model is not None and {n.op_type for n in case.model.graph.node} <= names]


@pytest.fixture(scope="module")
def cases():
    return node_tests()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("operator", ["Attention", "RotaryEmbedding", "LinearAttention", "CausalConvWithState"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_node_tests_of_onnx(operator, cases):
    mine = [case for case in cases if case.model.graph.node[0].op_type == operator]
    if not mine:
        pytest.skip(f"this onnx has no {operator}")
    assert operator != "Attention" or len(mine) > 40
    for case in mine:
        prepared = fastattn.onnx.Backend.prepare(case.model)
        for inputs, expected in case.data_sets:
            actual = prepared.run(inputs)
            assert len(actual) == len(expected), case.name
            for ours, theirs in zip(actual, expected):
                assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, case.name
                narrow = ours.dtype.name == "bfloat16"  # the reference rounds every step to it, we the result
                wide = [x.astype(np.float64) for x in (ours, theirs)]
                tolerance = {"rtol": 2.0**-6 if narrow else case.rtol, "atol": 2.0**-9 if narrow else max(case.atol, 1e-7)}
                np.testing.assert_allclose(*wide, **tolerance, err_msg=case.name)


@pytest.mark.parametrize("opset", [23, 24])
def test_earlier_opsets(opset, cases):
    """The same graphs, said to be of an opset that has all that they use."""
    schema = onnx.defs.get_schema("Attention", opset)
    ran = 0
    for case in cases:
        node = case.model.graph.node[0]
        attributes = {x.name for x in node.attribute}
        if node.op_type != "Attention" or len(node.input) > len(schema.inputs) or not attributes <= set(schema.attributes):
            continue
        model = onnx.ModelProto()
        model.CopyFrom(case.model)
        model.opset_import[0].version = opset
        names = [x.name for x in model.graph.input]
        for inputs, expected in case.data_sets:
            for ours, theirs in zip(fastattn.onnx.run(model, dict(zip(names, inputs))), expected):
                narrow = ours.dtype.name == "bfloat16"
                wide = [x.astype(np.float64) for x in (ours, theirs)]
                np.testing.assert_allclose(*wide, rtol=2.0**-6 if narrow else case.rtol, atol=2.0**-9 if narrow else 1e-6)
        ran += 1
    assert ran > 40


def test_the_operators_are_ours(monkeypatch, cases):
    """The evaluator does not fall back to its own."""
    case = next(case for case in cases if case.name == "test_attention_4d_causal")
    seen = []
    monkeypatch.setattr(fastattn.onnx, "_attention", lambda *a, **o: seen.append(a) or fastattn.attention(*a, **o))
    inputs = dict(zip((i.name for i in case.model.graph.input), case.data_sets[0][0]))
    (out,) = fastattn.onnx.run(case.model, inputs)
    assert len(seen) == 1
    np.testing.assert_allclose(out, case.data_sets[0][1][0], atol=1e-6)


# com.microsoft


def theirs(operator, inputs, attributes, num_outputs):
    """What onnxruntime and our evaluator make of one node."""
    runtime = pytest.importorskip("onnxruntime")
    names = [f"x{i}" if x is not None else "" for i, x in enumerate(inputs)]
    given = {name: np.asarray(x) for name, x in zip(names, inputs) if x is not None}
    outputs = [f"y{i}" for i in range(num_outputs)]
    node = onnx.helper.make_node(operator, names, outputs, domain="com.microsoft", **attributes)
    graph = onnx.helper.make_graph(
        [node], "g",
        [onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(x.dtype), x.shape) for n, x in given.items()],
        [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in outputs],
    )  # fmt: skip
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, given), fastattn.onnx.run(model, given)


def normal(*shape, seed=0):
    return np.random.default_rng(seed + sum(shape)).standard_normal(shape).astype(np.float32)


def agree(operator, inputs, attributes, num_outputs=1, rows=None):
    expected, actual = theirs(operator, inputs, attributes, num_outputs)
    if rows is not None:
        expected[0], actual[0] = expected[0][rows], actual[0][rows]
    np.testing.assert_allclose(actual[0], expected[0], atol=2e-6)
    return expected[1:], actual[1:]


@pytest.mark.parametrize("unidirectional", [0, 1])
@pytest.mark.parametrize("past", [0, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_multi_head_attention(unidirectional, past, bias):
    before = [normal(2, 3, past, 8, seed=n) if past else None for n in (1, 2)]
    inputs = [normal(2, 5, 24), normal(2, 5, 24, seed=1), normal(2, 5, 24, seed=2), normal(72) if bias else None, None]
    inputs += [normal(2, 3, 5, 5 + past), *before]
    expected, actual = agree("MultiHeadAttention", inputs, {"num_heads": 3, "unidirectional": unidirectional}, 3)
    for a, b in zip(actual, expected):
        np.testing.assert_array_equal(a, b)
    q, k = (x.reshape(2, 5, 3, 8).swapaxes(1, 2) for x in inputs[:2])
    if bias:
        q, k = (x + part.reshape(3, 1, 8) for x, part in zip((q, k), np.split(inputs[3], 3)))
    scores = q @ (k if not past else np.concatenate((before[0], k), axis=2)).swapaxes(2, 3) / np.sqrt(8)
    np.testing.assert_allclose(
        fastattn.onnx.multi_head_attention(*inputs, num_heads=3, unidirectional=unidirectional)[3], scores, atol=1e-5
    )


def test_multi_head_attention_packed_and_padded():
    packed = normal(2, 5, 3, 3, 8)  # which onnxruntime has on GPUs only
    expected, *_ = fastattn.onnx.multi_head_attention(*(packed[:, :, :, n].reshape(2, 5, 24) for n in range(3)), num_heads=3)
    np.testing.assert_array_equal(fastattn.onnx.multi_head_attention(packed, num_heads=3)[0], expected)
    query, kv = normal(2, 5, 24), normal(2, 7, 3, 2, 8)
    expected, *_ = fastattn.onnx.multi_head_attention(query, *(kv[:, :, :, n].reshape(2, 7, 24) for n in range(2)), num_heads=3)
    np.testing.assert_array_equal(fastattn.onnx.multi_head_attention(query, kv, num_heads=3)[0], expected)
    qkv = [normal(2, 5, 24), normal(2, 7, 24, seed=1), normal(2, 7, 24, seed=2), None]
    seen = np.array([[1, 1, 1, 1, 0, 0, 0], [0, 1, 1, 0, 1, 1, 1]], np.int32)
    agree("MultiHeadAttention", [*qkv, seen], {"num_heads": 3})
    agree("MultiHeadAttention", [*qkv[:1], *(normal(2, 3, 7, 8, seed=n) for n in (1, 2))], {"num_heads": 3})


@pytest.mark.parametrize("options", [{}, {"local_window_size": 3}, {"softcap": 2.0, "scale": 0.4}, {"smooth_softmax": 1}], ids=str)
@pytest.mark.parametrize("rotary, prompt, packed", [*itertools.product([0, 1, 2], [True, False], [True, False])])
def test_group_query_attention(options, rotary, prompt, packed):
    length, capacity = (6, 6) if prompt else (1, 9)
    lengths = np.array([6, 4]) if prompt else np.array([8, 5])
    q, k, v = normal(2, length, 64), normal(2, length, 32, seed=1), normal(2, length, 32, seed=2)
    past = [None, None] if prompt else [normal(2, 2, capacity, 16, seed=n) for n in (3, 4)]
    caches = [normal(16, 8, seed=5), normal(16, 8, seed=6)] if rotary else [None, None]
    qkv = [np.concatenate((q, k, v), axis=2), None, None] if packed else [q, k, v]
    attributes = {"num_heads": 4, "kv_num_heads": 2, "do_rotary": min(rotary, 1), "rotary_interleaved": int(rotary == 2), **options}
    inputs = [*qkv, *past, (lengths - 1).astype(np.int32), np.array([lengths.max()], np.int32), *caches]
    real = np.arange(length) < (lengths if prompt else np.full(2, length))[:, None]
    expected, actual = agree("GroupQueryAttention", inputs, attributes, 3, real)
    for a, b in zip(actual, expected):
        assert a.shape == b.shape
        for n, total in enumerate(lengths):
            np.testing.assert_allclose(a[n, :, :total], b[n, :, :total], atol=1e-6)


@pytest.mark.parametrize("mode", [1, 2])
@pytest.mark.parametrize("options", [{"causal": 0}, {"softcap": 2.0}, {"local_window_size": 3}], ids=str)
def test_group_query_attention_gives_scores(options, mode):
    """Over a cache."""
    lengths = np.array([9, 6])
    inputs = [normal(2, 1, 64), normal(2, 1, 32, seed=1), normal(2, 1, 32, seed=2), *(normal(2, 2, 9, 16, seed=n) for n in (3, 4))]
    inputs += [(lengths - 1).astype(np.int32), np.array([9], np.int32)]
    attributes = {"num_heads": 4, "kv_num_heads": 2, "qk_output": mode, **options}
    expected, actual = agree("GroupQueryAttention", inputs, attributes, 4)
    for b, n in enumerate(lengths):
        ours, theirs = (x[2][b, :, :, :n] for x in (actual, expected))
        seen = ours > -np.inf
        np.testing.assert_allclose(ours[seen], theirs[seen], atol=2e-6)


def test_group_query_attention_normalises():
    """Which onnxruntime has on GPUs only."""
    q, k, v = normal(2, 5, 64), normal(2, 5, 32, seed=1), normal(2, 5, 32, seed=2)
    weights, caches = (normal(16, seed=5), normal(16, seed=6)), (normal(16, 8, seed=5), normal(16, 8, seed=6))
    attributes = {"num_heads": 4, "kv_num_heads": 2, "do_rotary": 1}

    def normed(x, weight, epsilon):
        heads = x.astype(np.float64).reshape(2, 5, -1, 16)
        return (heads / np.sqrt((heads**2).mean(-1, keepdims=True) + epsilon) * weight).reshape(x.shape).astype(np.float32)

    def attend(q, k, *weights, **epsilons):
        given = (q, k, v, None, None, np.array([4, 4]), 5, *caches, None, None, None, None, None, *weights)
        return fastattn.onnx.group_query_attention(*given, **attributes, **epsilons)[0]

    expected = attend(normed(q, weights[0], 0.25), normed(k, weights[1], 0.5))
    np.testing.assert_allclose(attend(q, k, *weights, qk_norm_epsilon=0.25, k_norm_epsilon=0.5), expected, atol=1e-6)


def test_group_query_attention_of_padded_chunks():
    """As each entry's own tokens alone."""
    lengths, counts = np.array([8, 5, 4]), np.array([4, 2, 0])
    q, k, v = normal(3, 4, 64), normal(3, 4, 32, seed=1), normal(3, 4, 32, seed=2)
    past, caches = [normal(3, 2, 9, 16, seed=n) for n in (3, 4)], [normal(16, 8, seed=5), normal(16, 8, seed=6)]
    attributes = {"num_heads": 4, "kv_num_heads": 2, "do_rotary": 1}

    def attend(rows, length, query_seqlens):
        return fastattn.onnx.group_query_attention(
            *(x[rows, :length] for x in (q, k, v)), *(x[rows] for x in past), lengths[rows] - 1, 9, *caches, None, None, None,
            query_seqlens=query_seqlens, **attributes,
        )  # fmt: skip

    out, present_key, present_value, _ = attend(slice(None), 4, counts)
    for b in range(3):
        alone = attend(slice(b, b + 1), counts[b], None)
        np.testing.assert_array_equal(out[b, : counts[b]], alone[0][0])
        for ours, theirs in ((present_key, alone[1]), (present_value, alone[2])):
            np.testing.assert_array_equal(ours[b, :, : lengths[b]], theirs[0, :, : lengths[b]])
    assert not out[2].any() and not out[1, 2:].any()


def test_what_is_refused():
    x = normal(1, 2, 3, 4)
    with pytest.raises(ValueError, match="past_key"):
        fastattn.onnx.attention(x, x, x, past_key=x)
    with pytest.raises(ValueError, match="nonpad_kv_seqlen"):
        fastattn.onnx.attention(x, x, x, None, x, x, np.array([1]))
    with pytest.raises(ValueError, match="heads"):
        fastattn.onnx.attention(x[0], x[0], x[0])
    with pytest.raises(ValueError, match="cos_cache"):
        fastattn.onnx.rotary_embedding(x, normal(1, 3, 3), normal(1, 3, 3))
    tokens = normal(1, 5, 8)
    with pytest.raises(NotImplementedError, match="cache_indirection"):
        fastattn.onnx.multi_head_attention(tokens, tokens, tokens, cache_indirection=np.zeros((1, 1, 1), np.int32), num_heads=2)
    with pytest.raises(NotImplementedError, match="k_quant_type"):
        fastattn.onnx.group_query_attention(tokens, tokens, tokens, num_heads=2, kv_num_heads=2, k_quant_type="PER_TENSOR")
    with pytest.raises(ValueError, match="update_rule"):
        fastattn.onnx.linear_attention(tokens, tokens, tokens, q_num_heads=2, kv_num_heads=2, update_rule="gate")
    with pytest.raises(ValueError, match="beta must be given"):
        fastattn.onnx.linear_attention(tokens, tokens, tokens, q_num_heads=2, kv_num_heads=2, update_rule="delta")
    with pytest.raises(ValueError, match="decay must not be given"):
        fastattn.onnx.linear_attention(
            tokens, tokens, tokens, None, tokens[..., :2], q_num_heads=2, kv_num_heads=2, update_rule="linear"
        )
    with pytest.raises(ValueError, match="kv_num_heads"):
        fastattn.onnx.linear_attention(tokens, tokens, tokens, q_num_heads=2, kv_num_heads=3, update_rule="linear")
    with pytest.raises(ValueError, match="activation"):
        fastattn.onnx.causal_conv_with_state(normal(1, 2, 3), normal(2, 1, 2), activation="relu")
