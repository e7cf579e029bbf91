"""Registers for Numba: a tile of float32 vectors as a type, and the dozen operations that the kernels are made of.

LLVM vectorises plain loops well, but it does not keep a tile of accumulators in registers through one. Here a tile is a
value: ``rows`` rows of ``registers`` vectors of ``width`` floats, handed to LLVM as what it is. A tile of one row is called a
row; kernels are written once in terms of "the type of this argument" and compiled for several shapes.

Operands of the arithmetic may be scalars, which every lane gets, or a single row, which every row of the tile gets. No
operation carries a fast-math flag: NaN, inf and the sign of zero mean what IEEE 754 says. ``fma`` alone may round once or
twice, as suits the processor.

Memory is addressed by integers, in bytes: the arrays behind a call have any strides, and a kernel that is compiled once must
serve them all.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic, models, register_model

_F32 = ir.FloatType()
_I32 = ir.IntType(32)
_I64 = ir.IntType(64)

# How numbers lie in memory, by Numba type: the type for LLVM and its name there. uint16 is the upper half of a float32: bfloat16.
_STORAGE = {
    types.float32: (_F32, "f32"),
    types.float16: (ir.HalfType(), "f16"),
    types.uint16: (ir.IntType(16), "i16"),
}


def _isa():
    """What Numba compiles for, and whether that has instructions for float16."""
    triple, _, features = cpu_target.target_context.codegen().magic_tuple()
    features = features.split(",")
    if triple.startswith(("aarch64", "arm64")):
        return "neon", True
    for name in ("avx512", "avx2"):
        if any(feature.startswith(f"+{name}") for feature in features):
            return name, "+f16c" in features
    return "portable", False


ISA, CONVERTS_HALF = _isa()


class Tile(types.Type):
    """``rows`` rows of ``registers`` vectors of ``width`` float32 lanes."""

    def __init__(self, rows, registers, width):
        self.rows, self.registers, self.width = rows, registers, width
        super().__init__(f"Tile({rows}, {registers}, {width})")

    @property
    def row(self):
        return Tile(1, self.registers, self.width)

    @property
    def column(self):
        return Tile(self.rows, 1, self.width)

    @property
    def partial_sums(self):
        return Tile(self.registers * self.width, 1, self.width)

    @property
    def size(self):
        return self.rows * self.registers


@register_model(Tile)
class _TileModel(models.PrimitiveModel):
    def __init__(self, manager, tile):
        super().__init__(manager, tile, ir.ArrayType(ir.VectorType(_F32, tile.width), tile.size))


def _splat(builder, scalar, width):
    vector = ir.VectorType(scalar.type, width)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, _I32(0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(_I32, width), None))


def _load(builder, address, element, align=4):
    value = builder.load(builder.inttoptr(address, element.as_pointer()))
    value.align = align
    return value


def _load_stored(builder, address, width, storage, n):
    """A vector of float32, widened from `storage`; where `n` is not None, the first `n` lanes and zeros."""
    element, name = _STORAGE[storage]
    vector = ir.VectorType(element, width)
    size = storage.bitwidth // 8
    if n is None:
        value = _load(builder, address, vector, size)
    else:
        present = builder.icmp_unsigned("<", _indices(list(range(width))), _splat(builder, builder.trunc(n, _I32), width))
        kind = ir.FunctionType(vector, [vector.as_pointer(), _I32, present.type, vector])
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.load.v{width}{name}.p0")
        pointer = builder.inttoptr(address, vector.as_pointer())
        value = builder.call(function, [pointer, _I32(size), present, ir.Constant(vector, None)])
    if storage == types.uint16:
        bits = ir.VectorType(_I32, width)
        value = builder.shl(builder.zext(value, bits), ir.Constant(bits, [16] * width))
        return builder.bitcast(value, ir.VectorType(_F32, width))
    return value if storage == types.float32 else builder.fpext(value, ir.VectorType(_F32, width))


def _store(builder, value, address):
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=4)


def _indices(lanes):
    return ir.Constant(ir.VectorType(_I32, len(lanes)), lanes)


def _addresses(builder, tile, address, itemsize=4):
    """The addresses of the vectors of a tile that lies in memory without gaps."""
    return [builder.add(address, _I64(itemsize * tile.width * k)) for k in range(tile.size)]


def _line(builder, address, stride, i):
    """The address of row `i` of an array."""
    return builder.add(address, builder.mul(stride, _I64(i)))


def _vectors(context, builder, tile, kind, value):
    """The vectors of an operand of an operation on `tile`: its own, those of one row repeated, or a scalar everywhere."""
    if isinstance(kind, Tile):
        return [builder.extract_value(value, k % kind.size) for k in range(tile.size)]
    return [_splat(builder, context.cast(builder, value, kind, types.float32), tile.width)] * tile.size


def _pack(builder, tile, vectors):
    value = ir.Constant(ir.ArrayType(ir.VectorType(_F32, tile.width), tile.size), ir.Undefined)
    for k, vector in enumerate(vectors):
        value = builder.insert_value(value, vector, k)
    return value


def _elementwise(emit, *operands):
    """Apply `emit(builder, *vectors)` to each vector of the largest of the operands."""
    tile = max((kind for kind in operands if isinstance(kind, Tile)), key=lambda kind: kind.rows)

    def generate(context, builder, signature, values):
        columns = [_vectors(context, builder, tile, kind, value) for kind, value in zip(operands, values)]
        return _pack(builder, tile, [emit(builder, *vectors) for vectors in zip(*columns)])

    return tile(*operands), generate


def _zeros(tile, *arguments):
    return tile(*arguments), lambda context, builder, signature, values: ir.Constant(context.get_value_type(tile), None)


def _fma(builder, a, b, c):
    name = f"llvm.fmuladd.v{c.type.count}f32"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(c.type, [c.type] * 3), name)
    return builder.call(function, [a, b, c])


@intrinsic
def blank(context, rows, registers, width):
    """A tile of zeros whose shape is given by three constants."""
    if not all(isinstance(kind, types.IntegerLiteral) for kind in (rows, registers, width)):
        return None
    tile = Tile(rows.literal_value, registers.literal_value, width.literal_value)

    return _zeros(tile, rows, registers, width)


@intrinsic
def rows(context, tile):
    """The number of rows of a tile."""
    return types.int64(tile), lambda context, builder, signature, values: _I64(tile.rows)


@intrinsic
def lanes(context, tile):
    """The number of floats in a row of a tile."""
    return types.int64(tile), lambda context, builder, signature, values: _I64(tile.registers * tile.width)


@intrinsic
def width(context, tile):
    """The number of floats in a register of a tile."""
    return types.int64(tile), lambda context, builder, signature, values: _I64(tile.width)


@intrinsic
def itemsize(context, storage):
    """The number of bytes that a float takes in memory."""
    return types.int64(storage), lambda context, builder, signature, values: _I64(storage.dtype.bitwidth // 8)


@intrinsic
def column(context, tile):
    """Zeros, a register for each row of a tile."""
    return _zeros(tile.column, tile)


@intrinsic
def partial_sums(context, row):
    """Zeros, a register for each lane of a row: what `dots` adds to and `sums` makes a row of."""
    return _zeros(row.partial_sums, row)


@intrinsic
def load(context, address, like):
    """The tile, shaped as `like`, at an address."""

    def generate(context, builder, signature, values):
        vector = ir.VectorType(_F32, like.width)
        return _pack(builder, like, [_load(builder, each, vector) for each in _addresses(builder, like, values[0])])

    return like(types.int64, like), generate


@intrinsic
def store(context, address, tile):
    """Write a tile to an address."""

    def generate(context, builder, signature, values):
        for k, each in enumerate(_addresses(builder, tile, values[0])):
            _store(builder, builder.extract_value(values[1], k), each)
        return context.get_dummy_value()

    return types.void(types.int64, tile), generate


@intrinsic
def splat(context, scalar, like):
    """The tile, shaped as `like`, whose every lane is `scalar`."""

    def generate(context, builder, signature, values):
        return _pack(builder, like, _vectors(context, builder, like, scalar, values[0]))

    return like(scalar, like), generate


@intrinsic
def add(context, a, b):
    """``a + b``"""
    return _elementwise(lambda builder, x, y: builder.fadd(x, y), a, b)


@intrinsic
def sub(context, a, b):
    """``a - b``"""
    return _elementwise(lambda builder, x, y: builder.fsub(x, y), a, b)


@intrinsic
def mul(context, a, b):
    """``a * b``"""
    return _elementwise(lambda builder, x, y: builder.fmul(x, y), a, b)


@intrinsic
def div(context, a, b):
    """``a / b``"""
    return _elementwise(lambda builder, x, y: builder.fdiv(x, y), a, b)


@intrinsic
def fma(context, a, b, c):
    """``a * b + c``, rounded once where the processor can."""
    return _elementwise(_fma, a, b, c)


@intrinsic
def where_less(context, a, b, yes, no):
    """`yes` where ``a < b``, else `no`; a comparison with NaN is false."""
    return _elementwise(lambda builder, x, y, t, f: builder.select(builder.fcmp_ordered("<", x, y), t, f), a, b, yes, no)


@intrinsic
def two_to(context, a):
    """``2**n`` for integers n in [-126, 127] that come as the float ``1.5 * 2**23 + n``."""

    def emit(builder, x):
        vector = ir.VectorType(_I32, x.type.count)
        exponent = builder.shl(builder.bitcast(x, vector), ir.Constant(vector, [23] * vector.count))
        return builder.bitcast(builder.add(exponent, ir.Constant(vector, [127 << 23] * vector.count)), x.type)

    return _elementwise(emit, a)


@intrinsic
def rank_one(context, tile, a, a_stride, b, n, storage):
    """``tile[t, :] + a[t] * b[:]``: column `a` has an element every `a_stride` bytes, row `b` is contiguous.

    Row `b` lies in memory as `storage`; it has `n` elements, or as many as the tile if `n` is None. The step of every sum of
    outer products: ``rows`` broadcasts and one row of loads for ``rows * registers`` multiply-adds.
    """

    def generate(context, builder, signature, values):
        accumulators, a, a_stride, b, n, _ = values
        n = None if signature.args[4] == types.none else n
        places = _addresses(builder, tile.row, b, storage.dtype.bitwidth // 8)
        row = [_load_stored(builder, each, tile.width, storage.dtype, n) for each in places]
        result = []
        for t in range(tile.rows):
            factor = _splat(builder, _load(builder, _line(builder, a, a_stride, t), _F32), tile.width)
            for vector in row:
                result.append(_fma(builder, factor, vector, builder.extract_value(accumulators, len(result))))
        return _pack(builder, tile, result)

    return tile(tile, types.int64, types.int64, types.int64, n, storage), generate


@intrinsic
def dots(context, total, k, k_row, q, q_row, n, storage, like):
    """``total[j * rows + r, :] + k[j, :] * q[r, :]`` for the ``rows`` of `like` and as many keys as that makes of `total`.

    The step of every sum of inner products. The rows are a register wide; those of `k` lie in memory as
    `storage` and have `n` elements, or as many as a register if `n` is None.
    """

    def generate(context, builder, signature, values):
        accumulators, k, k_row, q, q_row, n, _, _ = values
        n = None if signature.args[5] == types.none else n
        vector = ir.VectorType(_F32, total.width)
        queries = [_load(builder, _line(builder, q, q_row, r), vector) for r in range(like.rows)]
        result = []
        for j in range(total.rows // like.rows):
            key = _load_stored(builder, _line(builder, k, k_row, j), total.width, storage.dtype, n)
            for query in queries:
                result.append(_fma(builder, key, query, builder.extract_value(accumulators, len(result))))
        return _pack(builder, total, result)

    return total(total, types.int64, types.int64, types.int64, types.int64, n, storage, like), generate


def _exchange(builder, a, b, step):
    """Swap every other run of `step` lanes: the odd ones of `a` with the even ones of `b`."""
    width = a.type.count
    odd = [lane & step for lane in range(width)]
    upper = _indices([lane + width - step if odd[lane] else lane for lane in range(width)])
    lower = _indices([lane + width if odd[lane] else lane + step for lane in range(width)])
    return builder.shuffle_vector(a, b, upper), builder.shuffle_vector(a, b, lower)


@intrinsic
def sums(context, total):
    """A row whose lanes are the sums of the registers of `total`, in order."""

    def generate(context, builder, signature, values):
        vectors = [builder.extract_value(values[0], i) for i in range(total.rows)]
        step = 1
        while step < total.width:
            vectors = [builder.fadd(*_exchange(builder, a, b, step)) for a, b in zip(vectors[::2], vectors[1::2])]
            step *= 2
        return _pack(builder, row, vectors)

    row = Tile(1, total.rows // total.width, total.width)
    return row(total), generate


@intrinsic
def spread(context, target, target_row, row, like):
    """Write the lanes of a row as the rows of an array, as many to each as `like` has rows."""

    def generate(context, builder, signature, values):
        target, target_row, value, _ = values
        for lane in range(0, row.size * row.width, like.rows):
            vector, first = builder.extract_value(value, lane // row.width), lane % row.width
            piece = builder.shuffle_vector(vector, vector, _indices(list(range(first, first + like.rows))))
            _store(builder, piece, _line(builder, target, target_row, lane // like.rows))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, row, like), generate


@intrinsic
def rescale(context, target, target_row, factors, tile):
    """``target[t, :] = target[t, :] * factors[t] + tile[t, :]``"""

    def generate(context, builder, signature, values):
        target, target_row, factors, value = values
        vector = ir.VectorType(_F32, tile.width)
        for t in range(tile.rows):
            factor = _splat(builder, _load(builder, _line(builder, factors, _I64(4), t), _F32), tile.width)
            for k, each in enumerate(_addresses(builder, tile.row, _line(builder, target, target_row, t))):
                total = builder.extract_value(value, t * tile.registers + k)
                _store(builder, _fma(builder, _load(builder, each, vector), factor, total), each)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, tile), generate


@intrinsic
def transpose(context, source, source_row, target, target_row, like):
    """Transpose a square of floats, as many as `like` has lanes in a register, whose rows are so many bytes apart."""
    width = like.width

    def generate(context, builder, signature, values):
        source, source_row, target, target_row, _ = values
        vector = ir.VectorType(_F32, width)
        square = [_load(builder, builder.add(source, builder.mul(source_row, _I64(i))), vector) for i in range(width)]
        step = 1
        while step < width:  # swap the squares of `step` next to the diagonal of those of twice the size
            for i in range(width):
                if not i & step:
                    square[i], square[i + step] = _exchange(builder, square[i], square[i + step], step)
            step *= 2
        for i, value in enumerate(square):
            _store(builder, value, builder.add(target, builder.mul(target_row, _I64(i))))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64, like), generate


@intrinsic
def convert_half(context, bits):
    """The float32 of the bits of a float16, by an instruction: only where `CONVERTS_HALF`."""

    def generate(context, builder, signature, values):
        return builder.fpext(builder.bitcast(values[0], ir.HalfType()), _F32)

    return types.float32(types.uint16), generate


@intrinsic
def prefetch(context, address):
    """Ask for the cache line at an address. Nothing is read: the address may be any."""

    def generate(context, builder, signature, values):
        pointer = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        read, second_level, data = _I32(0), _I32(2), _I32(1)
        builder.call(function, [builder.inttoptr(values[0], pointer), read, second_level, data])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def elements(context, address, dtype):
    """A pointer that is indexed like an array of `dtype`, a Numba type, without bounds."""
    pointer = types.CPointer(dtype.dtype)

    def generate(context, builder, signature, values):
        return builder.inttoptr(values[0], context.get_value_type(pointer))

    return pointer(types.int64, dtype), generate


@intrinsic
def count(context, counter):
    """Add 1 to the first element of an int64 array, which other threads do as well, and return what it was."""

    def generate(context, builder, signature, values):
        data = context.make_array(signature.args[0])(context, builder, values[0]).data
        return builder.atomic_rmw("add", data, _I64(1), "monotonic")

    return types.int64(counter), generate


@intrinsic
def call_score_function(context, function, scores, keys, batch, head, query, first_key, argument):
    """Call the C function at an address, whose signature is that of ``fastattn_score_function``."""

    def generate(context, builder, signature, arguments):
        function, scores, *integers, argument = arguments
        pointers = _F32.as_pointer(), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointers[0], *[_I64] * 5, pointers[1]])
        scores, argument = (builder.inttoptr(x, pointer) for x, pointer in zip((scores, argument), pointers))
        builder.call(builder.inttoptr(function, kind.as_pointer()), [scores, *integers, argument])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), generate
