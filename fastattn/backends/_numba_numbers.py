"""Numbers for Numba: how they lie in memory, as float32, float16, bfloat16 and the types of masks, and functions of lanes."""

import numpy as np
from numba import float32, float64, int8, int32, njit, uint8, uint16, uint32

from ._numba_simd import CONVERTS_HALF, add, convert_half, div, elements, fma, mul, sub, two_to, where_less

FLOAT32, FLOAT16, BFLOAT16, FLOAT64, BOOL, INT8, INT4 = range(7)
LOWEST = float(np.finfo(np.float32).min)  # what is less than this is -inf
_LOG2E = 1.4426950408889634
_ROUND = 1.5 * 2.0**23  # adding it rounds to an integer, which is then in the low bits
_TINY = -126 * 0.6931471805599453  # below this exp is no normal number, and 0

jit = njit(error_model="numpy")
inline = njit(error_model="numpy", forceinline=True)


# Numbers in memory


@inline
def float_of(bits):
    return np.uint32(bits).view(np.float32)


@inline
def bits_of(x):
    return np.float32(x).view(np.uint32)


@inline
def widen_half(half):
    """The float32 of the bits of a float16."""
    if CONVERTS_HALF:
        return convert_half(half)
    magnitude = np.uint32(half & 0x7FFF) << np.uint32(13)
    sign = np.uint32(half & 0x8000) << np.uint32(16)
    if magnitude >= np.uint32(0x0F800000):  # inf and NaN
        return float_of(sign | (magnitude + np.uint32(0x70000000)))
    if magnitude < np.uint32(0x00800000):  # subnormals: a sum does what a shift cannot
        return float_of(sign | bits_of(float_of(magnitude + np.uint32(0x38800000)) - float_of(np.uint32(0x38800000))))
    return float_of(sign | (magnitude + np.uint32(0x38000000)))


@inline
def widen(address, index, code):
    """Element `index` of an array of floats of any storage type, as a float32."""
    if code == FLOAT32:
        return elements(address, float32)[index]
    bits = elements(address, uint16)[index]
    if code == BFLOAT16:
        return float_of(np.uint32(bits) << np.uint32(16))
    return widen_half(bits)


@inline
def narrow(x, code):
    """The 16 bits of a float32 in storage type `code`, rounded to nearest even."""
    bits = bits_of(x)
    sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    if code == BFLOAT16:
        if magnitude > np.uint32(0x7F800000):  # rounding must not turn NaN into inf
            return sign | np.uint32(0x7FC0)
        return (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    if magnitude > np.uint32(0x7F800000):
        return sign | np.uint32(0x7E00)
    if magnitude >= np.uint32(0x477FF000):  # rounds to 65536 and above
        return sign | np.uint32(0x7C00)
    if magnitude < np.uint32(0x38800000):  # subnormals: adding 0.5 rounds at the right bit
        return sign | (bits_of(float_of(magnitude) + np.float32(0.5)) - np.uint32(0x3F000000))
    return sign | ((magnitude - np.uint32(0x37FFF001) + ((magnitude >> np.uint32(13)) & np.uint32(1))) >> np.uint32(13))


@jit
def widen_row(source, code, n, target):
    """Write `n` elements as float32."""
    to = elements(target, float32)
    for d in range(n):
        to[d] = widen(source, d, code)


@jit
def decode_row(source, code, n, target):
    """Write the `n` numbers of a quantised row as float32."""
    to, integers = elements(target, float32), elements(source, int8)
    if code == INT8:
        byte = elements(source + n, uint8)  # which need not be aligned
        bits = np.uint32(0)
        for i in range(4):
            bits |= np.uint32(byte[i]) << np.uint32(8 * i)
        scale = float_of(bits)
        for d in range(n):
            to[d] = np.float32(integers[d]) * scale
    else:
        pairs = elements(source, uint8)
        for g in range(n // 32):
            scale = widen(source + n // 2 + 2 * g, 0, FLOAT16)
            for i in range(16):
                pair = int32(pairs[16 * g + i])
                to[32 * g + i] = np.float32((pair & int32(15)) - int32(8)) * scale
                to[32 * g + 16 + i] = np.float32((pair >> int32(4)) - int32(8)) * scale


@jit
def narrow_row(source, factor, code, n, target):
    """Write `n` float32, times a factor, in their storage type."""
    x = elements(source, float32)
    if code == FLOAT32:
        to = elements(target, float32)
        for d in range(n):
            to[d] = x[d] * factor
    else:
        bits = elements(target, uint16)
        for d in range(n):
            bits[d] = narrow(x[d] * factor, code)


@jit
def replace_row(source, factor, code, n, target):
    """Like `narrow_row`, in float64, for those numbers of the target that are not finite, where the source is a number; what is
    finite is not made infinite."""
    x, to, bits = elements(source, float32), elements(target, float32), elements(target, uint16)
    largest = float64(float_of(np.uint32(0x7F7F0000 if code == BFLOAT16 else 0x7F7FFFFF)))
    for d in range(n):
        if np.isfinite(to[d] if code == FLOAT32 else widen(target, d, code)):
            continue
        y = float64(x[d]) * factor
        if np.isnan(y):  # weights that were made 0, of infinities
            continue
        y = np.float32(min(max(y, -largest), largest) if np.isfinite(y) else y)
        if code == FLOAT32:
            to[d] = y
        else:
            bits[d] = narrow(y, code)


@inline
def narrow_double(x):
    """A float64 bias as float32: one that is finite stays finite."""
    return np.float32(min(max(x, LOWEST), -LOWEST) if np.isfinite(x) else x)


@jit
def bias_row(source, step, code, n, target):
    """Write what `n` elements of the mask, `step` bytes apart, add to the scores: -inf hides, and only an exact -inf does."""
    to = elements(target, float32)
    if code == BOOL:
        if step == 1:  # a loop of its own, for it alone is vectorised
            for j in range(n):
                to[j] = 0.0 if elements(source, uint8)[j] else -np.inf
        else:
            for j in range(n):
                to[j] = 0.0 if elements(source + j * step, uint8)[0] else -np.inf
    elif code == FLOAT64:
        for j in range(n):
            to[j] = narrow_double(elements(source + j * step, float64)[0])
    elif step == (4 if code == FLOAT32 else 2):
        widen_row(source, code, n, target)
    else:
        for j in range(n):
            to[j] = widen(source + j * step, 0, code)


@jit
def fill(target, x, low, high):
    to = elements(target, float32)
    for j in range(low, high):
        to[j] = x


@jit
def all_finite(source, stride, n, n_columns, code):
    """Whether `n` rows, `stride` bytes apart, hold no NaN and no inf."""
    largest = np.uint32(0)
    if code == FLOAT32:
        exponent = np.uint32(0x7F800000)
        for j in range(n):
            bits = elements(source + j * stride, uint32)
            for d in range(n_columns):
                largest = max(largest, bits[d] & exponent)
    else:
        exponent = np.uint32(0x7F80 if code == BFLOAT16 else 0x7C00)
        for j in range(n):
            halves = elements(source + j * stride, uint16)
            for d in range(n_columns):
                largest = max(largest, halves[d] & exponent)
    return largest < exponent


# Functions of lanes


@inline
def exp(x):
    """``e**x`` for x <= 0 to a rounding error or two; less than 2**-126 is 0, NaN stays NaN."""
    shifted = fma(x, _LOG2E, _ROUND)
    f = fma(x, _LOG2E, sub(_ROUND, shifted))  # x = (n + f) ln 2 with f in [-1/2, 1/2]
    # 2**f by the polynomial of degree 5 with the smallest relative error (9e-8) and the exact value 1 at 0
    p = fma(f, 0.001326472731307149, 0.009671512991189957)
    p = fma(p, f, 0.05550733581185341)
    p = fma(p, f, 0.24022242426872253)
    p = fma(p, f, 0.6931470036506653)
    p = fma(p, f, 1.0)
    return where_less(x, _TINY, 0.0, mul(p, two_to(shifted)))


@inline
def magnitude_of(x):
    return where_less(x, 0.0, sub(0.0, x), x)


@inline
def tanh(x):
    """Cephes' two pieces: a polynomial where 1 - 2 / (e**2|x| + 1) would cancel."""
    a = magnitude_of(x)
    e = exp(mul(a, -2.0))
    far = div(sub(1.0, e), add(1.0, e))
    z = mul(x, x)
    p = fma(z, -5.70498872745e-3, 2.06390887954e-2)
    p = fma(p, z, -5.37397155531e-2)
    p = fma(p, z, 1.33314422036e-1)
    p = fma(p, z, -3.33332819422e-1)
    near = fma(mul(p, z), x, x)
    return where_less(a, 0.625, near, where_less(x, 0.0, sub(0.0, far), far))
