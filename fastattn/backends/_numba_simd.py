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


def _load(builder, address, element):
    value = builder.load(builder.inttoptr(address, element.as_pointer()))
    value.align = 4
    return value


def _store(builder, value, address):
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=4)


def _indices(lanes):
    return ir.Constant(ir.VectorType(_I32, len(lanes)), lanes)


def _addresses(builder, tile, address):
    """The addresses of the vectors of a tile that lies in memory without gaps."""
    return [builder.add(address, _I64(4 * tile.width * k)) for k in range(tile.size)]


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

    def generate(context, builder, signature, values):
        return ir.Constant(context.get_value_type(tile), None)

    return tile(rows, registers, width), generate


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
def rank_one(context, tile, a, a_stride, b):
    """``tile[t, :] + a[t] * b[:]``: column `a` has an element every `a_stride` bytes, row `b` is contiguous.

    The step of every matrix product: ``rows`` broadcasts and one row of loads for ``rows * registers`` multiply-adds.
    """

    def generate(context, builder, signature, values):
        accumulators, a, a_stride, b = values
        vector = ir.VectorType(_F32, tile.width)
        row = [_load(builder, each, vector) for each in _addresses(builder, tile.row, b)]
        result = []
        for t in range(tile.rows):
            scalar = _load(builder, builder.add(a, builder.mul(a_stride, _I64(t))), _F32)
            factor = _splat(builder, scalar, tile.width)
            for vector in row:
                result.append(_fma(builder, factor, vector, builder.extract_value(accumulators, len(result))))
        return _pack(builder, tile, result)

    return tile(tile, types.int64, types.int64, types.int64), generate


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
            high = [lane & step for lane in range(width)]
            upper = _indices([lane + width - step if high[lane] else lane for lane in range(width)])
            lower = _indices([lane + width if high[lane] else lane + step for lane in range(width)])
            for i in range(width):
                if not i & step:
                    a, b = square[i], square[i + step]
                    square[i], square[i + step] = builder.shuffle_vector(a, b, upper), builder.shuffle_vector(a, b, lower)
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
