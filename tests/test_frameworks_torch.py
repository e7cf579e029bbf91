"""fastattn.torch: tensors in and out, as torch's own function has it, in every way in which torch can be asked to run."""

import contextlib
import warnings

import numpy as np
import pytest
from inputs import random_qkv
from processes import run_script

import fastattn

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch
F = torch.nn.functional
imported = F.scaled_dot_product_attention  # as other modules import it
DTYPES = ["float32", "bfloat16", "float16"]


def original(*args, **options):
    """torch's own function, under the one name that `replaced` leaves alone."""
    return torch._C._nn.scaled_dot_product_attention(*args, **options)


def tensors(*args, dtype="float32", **options):
    return [torch.from_numpy(x).to(getattr(torch, dtype)) for x in random_qkv(*args, **options)]


def assert_close(ours, theirs):
    assert ours.dtype is theirs.dtype and ours.shape == theirs.shape
    tolerance = {torch.float32: 3e-6, torch.float16: 4 * 2**-10, torch.bfloat16: 4 * 2**-7}[ours.dtype]
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def same_as_torch(q, k, v, *args, **options):
    assert_close(fastattn.torch.scaled_dot_product_attention(q, k, v, *args, **options), original(q, k, v, *args, **options))


# Meaning


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}], ids=str)
@pytest.mark.parametrize("q_len, kv_len", [(7, 7), (5, 33), (33, 5), (1, 40)])
def test_is_torchs_function(q_len, kv_len, options, dtype):
    same_as_torch(*tensors(2, 3, q_len, kv_len, 24, 16, dtype=dtype), **options)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", DTYPES)
def test_masks(dtype):
    q, k, v = tensors(2, 3, 9, 17, 8, dtype=dtype)
    boolean = torch.rand(2, 1, 9, 17, generator=torch.Generator().manual_seed(0)) < 0.6
    boolean[..., 0] = True
    same_as_torch(q, k, v, boolean)
    same_as_torch(q, k, v, torch.randn(9, 17, generator=torch.Generator().manual_seed(0)).to(q.dtype))


def test_grouped_heads_only_when_enabled():
    q, k, v = tensors(2, 6, 9, 17, 8, kv_heads=2)
    same_as_torch(q, k, v, enable_gqa=True)
    with pytest.raises(ValueError, match="enable_gqa"):
        fastattn.torch.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize(
    "shapes",
    [
        ((7, 8), (9, 8), (9, 4)),
        ((3, 7, 8), (3, 9, 8), (3, 9, 4)),
        ((2, 3, 7, 8), (2, 1, 9, 8), (2, 1, 9, 4)),
        ((2, 3, 7, 8), (1, 3, 9, 8), (9, 4)),
        ((2, 2, 3, 7, 8), (2, 2, 3, 9, 8), (2, 2, 3, 9, 4)),
        ((2, 2, 3, 7, 8), (2, 1, 3, 9, 8), (1, 1, 3, 9, 4)),
    ],
    ids=str,
)
def test_leading_axes_broadcast(shapes):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    same_as_torch(q, k, v, is_causal=True)
    same_as_torch(q, k, v, torch.rand(7, 9, generator=generator) < 2)


def test_masks_of_many_axes():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 4, 7, 8, generator=generator) for _ in range(3))
    same_as_torch(q, k, v, torch.rand(2, 1, 4, 7, 7, generator=generator) < 0.5 + torch.eye(7))


@pytest.mark.usefixtures("backend")
def test_attention_has_all_keywords():
    q, k, v = tensors(2, 4, 5, 17, 8, kv_heads=2)
    keywords = {
        "causal": True, "window": (9, None), "scale": 0.4, "softcap": 5.0, "query_offset": np.array([11, 9]),
        "kv_lengths": np.array([17, 12]), "alibi_slopes": np.array([0.1, 0.2, 0.3, 0.4], np.float32),
        "sinks": np.array([0.1, 0.2, 0.3, 0.4], np.float32), "mask": np.random.default_rng(0).random((5, 17)) < 0.8,
    }  # fmt: skip
    given = {name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in keywords.items()}
    out, lse = fastattn.torch.attention(q, k, v, return_lse=True, **given)
    expected, expected_lse = fastattn.attention(q.numpy(), k.numpy(), v.numpy(), return_lse=True, **keywords)
    np.testing.assert_array_equal(out.numpy(), expected)
    np.testing.assert_array_equal(lse.numpy(), expected_lse)
    np.testing.assert_array_equal(fastattn.torch.attention(q, k, v, **given).numpy(), expected)
    padded = {"kv_starts": np.array([2, 0]), "kv_lengths": np.array([17, 12]), "q_lengths": np.array([3, 5])}
    out = fastattn.torch.attention(q, k, v, **{name: torch.from_numpy(x) for name, x in padded.items()})
    np.testing.assert_array_equal(out.numpy(), fastattn.attention(q.numpy(), k.numpy(), v.numpy(), **padded))
    lists = fastattn.torch.attention(q, k, v, kv_lengths=[17, 12], query_offset=3, window=(None, 2))
    expected = fastattn.attention(q.numpy(), k.numpy(), v.numpy(), kv_lengths=[17, 12], query_offset=3, window=(None, 2))
    np.testing.assert_array_equal(lists.numpy(), expected)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_sequences(dtype):
    q, k, v = (x[0].transpose(0, 1) for x in tensors(1, 4, 10, 40, 8, 6, kv_heads=2, dtype=dtype))
    starts_q, starts_k = torch.tensor([0, 3, 3, 10]), torch.tensor([0, 5, 9, 40], dtype=torch.int32)
    keywords = {"causal": True, "window": (9, None), "scale": 0.4, "softcap": 5.0, "kv_starts": [1, 0, 2], "q_lengths": [3, 0, 5]}
    sinks = torch.tensor([0.1, 0.2, 0.3, 0.4])
    out, lse = fastattn.torch.attention_varlen(q, k, v, starts_q, starts_k, sinks=sinks, return_lse=True, **keywords)
    arrays = [fastattn.torch.as_array(x) for x in (q, k, v, starts_q, starts_k)]
    expected, expected_lse = fastattn.attention_varlen(*arrays, sinks=sinks.numpy(), return_lse=True, **keywords)
    np.testing.assert_array_equal(fastattn.torch.as_array(out), expected)
    np.testing.assert_array_equal(lse.numpy(), expected_lse)
    alone = fastattn.torch.attention_varlen(q, k, v, starts_q, starts_k, sinks=sinks, **keywords)
    torch.testing.assert_close(alone, out, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="no backward pass"):
        fastattn.torch.attention_varlen(q.clone().requires_grad_(), k, v, starts_q, starts_k)


@pytest.mark.parametrize("rank", [2, 3])
def test_attention_of_lower_ranks(rank):
    q, k, v = (x[(0,) * (4 - rank)] for x in tensors(1, 2, 5, 17, 8))
    out, lse = fastattn.torch.attention(q, k, v, causal=True, return_lse=True)
    expected, expected_lse = fastattn.attention(q.numpy(), k.numpy(), v.numpy(), causal=True, return_lse=True)
    np.testing.assert_array_equal(out.numpy(), expected)
    np.testing.assert_array_equal(lse.numpy(), expected_lse)


# Memory


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_cost_nothing(dtype, monkeypatch):
    """Heads side by side, an expanded axis, a slice and reversed order of axes are read where they lie."""
    seen = []
    monkeypatch.setattr(fastattn.torch, "_attention", lambda *a, **o: seen.append((a, o)) or fastattn.attention(*a, **o))
    packed = torch.randn(2, 9, 3, 4, 16, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    q, k, v = (x.transpose(1, 2) for x in packed.unbind(2))
    k = k[:, :1].expand(-1, 4, -1, -1)
    out = fastattn.torch.scaled_dot_product_attention(q, k, v)
    ((arrays, options),) = seen
    for array, x in zip(arrays, (q, k, v)):
        assert array.__array_interface__["data"][0] == x.data_ptr()
        assert array.strides == tuple(stride * x.itemsize for stride in x.stride())
    assert options["out"].__array_interface__["data"][0] == out.data_ptr()
    assert out.transpose(1, 2).is_contiguous()
    assert_close(out, original(q, k, v))


def test_arrays_keep_tensors_alive():
    def view():
        return fastattn.torch.as_array(torch.full((3, 5), 7.0))

    array = view()
    np.testing.assert_array_equal(array, np.full((3, 5), 7.0, np.float32))
    assert array.flags.aligned and array.flags.c_contiguous and array.flags.writeable


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 2, 0, 8), (2, 0, 3, 8)])
def test_empty_axes(shape):
    x = torch.zeros(shape)
    assert fastattn.torch.scaled_dot_product_attention(x, x, x).shape == shape


# Ways to run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, contextlib.nullcontext])
def test_modes(mode, dtype):
    with mode():
        q, k, v = tensors(2, 3, 9, 9, 8, dtype=dtype)
        same_as_torch(q, k, v, is_causal=True)


class Layer(torch.nn.Module):
    """A projection, attention over heads side by side, a projection."""

    def __init__(self, attend):
        super().__init__()
        self.attend, self.qkv, self.out = attend, torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, 4, 8).permute(2, 0, 3, 1, 4)
        return self.out(self.attend(q, k, v).transpose(1, 2).reshape(batch, length, width))


ATTEND = {
    "sdpa": lambda q, k, v: fastattn.torch.scaled_dot_product_attention(q, k, v, is_causal=True),
    "attention": lambda q, k, v: fastattn.torch.attention(q, k, v, causal=True, window=(4, 0), sinks=q.new_ones(4)),
    "lse": lambda q, k, v: fastattn.torch.attention(q, k, v, kv_lengths=torch.tensor([3, 5]), return_lse=True)[0],
}


@pytest.mark.parametrize("attend", ATTEND.values(), ids=ATTEND)
def test_compiles_without_a_break(attend):
    layer = Layer(attend).eval()
    x = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")(x), layer(x))


def test_inductor_keeps_the_layout():
    layer = Layer(ATTEND["sdpa"]).eval()
    x = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))


def test_exports():
    layer = Layer(ATTEND["sdpa"]).eval()
    x = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        program = torch.export.export(layer, (x,), dynamic_shapes={"x": {1: torch.export.Dim("length", min=2, max=64)}})
        longer = torch.randn(2, 23, 32, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(program.module()(longer), layer(longer))
    assert any("fastattn" in str(node.target) for node in program.graph.nodes)


def test_the_operator_is_what_it_says():
    q, k, v = tensors(2, 4, 5, 17, 8, kv_heads=2)
    side_by_side = q.transpose(1, 2).contiguous().transpose(1, 2)
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for queries in (q, side_by_side):
        for op in (torch.ops.fastattn.attention.default, torch.ops.fastattn.scaled_dot_product_attention.default):
            torch.library.opcheck(op, (queries, k, v), {"causal": True}, test_utils=utilities)
        torch.library.opcheck(torch.ops.fastattn.attention_lse.default, (queries, k, v), {"scale": 0.5}, test_utils=utilities)
    packed = (*(x[0].transpose(0, 1) for x in (q, k, v)), torch.tensor([0, 2, 5]), torch.tensor([0, 9, 17]))
    for op in (torch.ops.fastattn.attention_varlen.default, torch.ops.fastattn.attention_varlen_lse.default):
        torch.library.opcheck(op, packed, {"causal": True}, test_utils=utilities)


# Gradients, and what else is refused


def test_a_gradient_is_refused_and_the_remedy_named():
    q, k, v = tensors(1, 2, 5, 5, 8)
    q.requires_grad_()
    for attend in (fastattn.torch.scaled_dot_product_attention, fastattn.torch.attention):
        with pytest.raises(RuntimeError, match=r"no backward pass.*detach"):
            attend(q, k, v)
        with pytest.raises(RuntimeError, match="no backward pass"):
            torch.compile(attend, backend="aot_eager")(q, k, v)
        with torch.no_grad():
            attend(q, k, v)


def test_what_is_refused():
    q, k, v = tensors(1, 2, 5, 5, 8)
    sdpa = fastattn.torch.scaled_dot_product_attention
    with pytest.raises(NotImplementedError, match="dropout_p must be 0; it is 0.1"):
        sdpa(q, k, v, dropout_p=0.1)
    with pytest.raises(ValueError, match="is_causal"):
        sdpa(q, k, v, torch.ones(5, 5, dtype=torch.bool), is_causal=True)
    with pytest.raises(TypeError, match="float64"):
        sdpa(q.double(), k.double(), v.double())
    with pytest.raises(NotImplementedError):
        sdpa(q.to_sparse(), k, v)
    with pytest.raises(ValueError, match="axes"):
        sdpa(q[0, 0, 0], k, v)
    with pytest.raises(ValueError, match="head size"):
        sdpa(q, k[..., :4], v)


# In the place of torch's own


def test_replaced_serves_what_it_can():
    q, k, v = tensors(2, 3, 9, 9, 8)
    before = F.scaled_dot_product_attention
    with fastattn.torch.replaced() as report, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert F.scaled_dot_product_attention is imported is not before
        assert_close(F.scaled_dot_product_attention(q, k, v, is_causal=True), original(q, k, v, is_causal=True))
        attention = torch.nn.MultiheadAttention(16, 2, batch_first=True)
        with torch.no_grad():
            attention(*[torch.randn(2, 5, 16)] * 3, attn_mask=torch.zeros(5, 5), need_weights=False)
    assert F.scaled_dot_product_attention is imported is before
    assert report.served == 2 and not report.refused
    assert "2 calls served" in repr(report)


def test_replaced_tells_what_it_could_not_and_why():
    q, k, v = tensors(2, 3, 9, 9, 8)
    doubles = [x.double() for x in (q, k, v)]
    with fastattn.torch.replaced() as report:
        with pytest.warns(fastattn.torch.FallbackWarning, match="float64"):
            F.scaled_dot_product_attention(*doubles)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # once for each reason
            F.scaled_dot_product_attention(*doubles)
        with pytest.warns(fastattn.torch.FallbackWarning, match="dropout"):
            F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
        with pytest.warns(fastattn.torch.FallbackWarning, match="backward"):
            out = F.scaled_dot_product_attention(q.clone().requires_grad_(), k, v)
            out.sum().backward()  # torch's own, gradient and all
        with pytest.warns(fastattn.torch.FallbackWarning, match="CPU"):
            F.scaled_dot_product_attention(*(x.to("meta") for x in (q, k, v)))
        with pytest.warns(fastattn.torch.FallbackWarning, match="autocast"), torch.autocast("cpu", torch.bfloat16):
            assert F.scaled_dot_product_attention(q, k, v).dtype is torch.bfloat16
    assert report.served == 0 and report.refused.total() == 6
    assert "float64" in repr(report)


def test_replaced_compiles():
    q, k, v = tensors(2, 3, 9, 9, 8)

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v) * 2

    with fastattn.torch.replaced():
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(q, k, v), attend(q, k, v))


# Threads


def test_threads_are_torchs_unless_told_otherwise():
    run_script("""
        import fastattn, torch
        q = torch.zeros(1, 1, 4, 8)
        for n in (3, 1, 2):
            torch.set_num_threads(n)
            fastattn.torch.scaled_dot_product_attention(q, q, q)
            assert fastattn.get_num_threads() == n
        with fastattn.threads(5):
            fastattn.torch.scaled_dot_product_attention(q, q, q)
            assert fastattn.get_num_threads() == 5
        fastattn.torch.scaled_dot_product_attention(q, q, q)
        assert fastattn.get_num_threads() == 2
        fastattn.set_num_threads(4)
        fastattn.torch.scaled_dot_product_attention(q, q, q)
        assert fastattn.get_num_threads() == 4
        """)
    run_script(
        """
        import fastattn, torch
        q = torch.zeros(1, 1, 4, 8)
        torch.set_num_threads(1)
        fastattn.torch.scaled_dot_product_attention(q, q, q)
        assert fastattn.get_num_threads() == 3
        """,
        FASTATTN_NUM_THREADS="3",
    )


@pytest.mark.parametrize("line", ["import fastattn.torch", "from fastattn import torch as ours", "import fastattn; fastattn.torch"])
def test_ways_to_import(line):
    run_script(f"{line}\nimport fastattn, sys\nassert sys.modules['fastattn.torch'] is fastattn.torch")
