"""Where a token stands, as numbers: angles for rotary embedding, sinusoids, and biases that depend on a distance.

All of it is data, made once with NumPy and handed to :func:`fastattn.apply_rope` and :func:`fastattn.attention`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ._check import as_array, flag, integer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ._typing import Array


def rope_table(
    positions: int | Array, dim: int, *, base: float = 10000.0, scaling: Mapping[str, Any] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines of the angles by which :func:`apply_rope` turns pairs of numbers.

    Pair ``n`` of a row at position ``p`` has the angle ``p * base ** (-2 n / dim)``. A model that is to see positions beyond
    those that it was trained on has its frequencies changed by `scaling`.

    Parameters
    ----------
    positions : int or array_like of real numbers, (...)
        A length, for positions 0 to ``length - 1``; or the positions themselves, of any shape: ``np.arange(start, stop)`` for
        tokens that follow others, ``offsets[:, None] + np.arange(L)`` for a batch. (A single position is an array of one.)
    dim : int
        The numbers of a row that are turned: the head size, or less in models that turn a part of it. Even.
    base : float
        `rope_theta` of a checkpoint's configuration. More than 0.
    scaling : mapping, optional
        As in a checkpoint's configuration (`rope_scaling` or `rope_parameters` of transformers): its kind under ``"rope_type"``, or
        ``"type"``, and the parameters of the kind; ``rope_theta`` is refused unless it is `base`. With `s` for ``factor``:

        - ``"default"``: none;
        - ``"linear"``: all frequencies divided by `s` (position interpolation; Chen et al., 2023);
        - ``"ntk"``: ``base * s ** (dim / (dim - 2))`` in place of `base`, which leaves the highest frequency as it is and divides
          the lowest by `s` ("NTK-aware" scaling; bloc97, 2023);
        - ``"dynamic"``: the same with ``s * n / m - (s - 1)`` for `s`, where ``m`` is ``original_max_position_embeddings`` and
          ``n`` the larger of ``m`` and the last position and one (emozilla, 2023);
        - ``"yarn"``: frequencies that turn fewer than ``beta_slow`` (1) times in ``original_max_position_embeddings`` positions are
          divided by `s`, those that turn more than ``beta_fast`` (32) times are not, and between them is a ramp, whose ends
          ``truncate`` (True) rounds to whole pairs; cosines and sines are multiplied by ``attention_factor``, which is
          ``0.1 ln s + 1`` unless it is given, or ``mscale`` and ``mscale_all_dim`` are (Peng et al., "YaRN", 2023);
        - ``"llama3"``: frequencies with wavelengths above ``original_max_position_embeddings / low_freq_factor`` are divided
          by `s`, those below ``original_max_position_embeddings / high_freq_factor`` are not, and between them is a ramp (Llama 3.1).

    Returns
    -------
    cos, sin : ndarray, (..., dim // 2)
        float32, rounded from float64: exact to half an ulp however large the positions.

    Examples
    --------
    >>> cos, sin = fastattn.rope_table(4096, 128, base=500000.0, scaling={
    ...     "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    ...     "original_max_position_embeddings": 8192})
    """
    dim = integer("dim", dim, 0)
    if dim % 2:
        raise ValueError(f"dim must be even; got {dim}")
    base = _positive("base", base)
    positions = _positions(positions)
    frequencies, factor = _frequencies(dim, base, {} if scaling is None else scaling, positions)
    angles = positions[..., None] * frequencies
    return (factor * np.cos(angles)).astype(np.float32), (factor * np.sin(angles)).astype(np.float32)


def _positions(positions):
    """Positions as float64, from what may be a length."""
    array = as_array("positions", positions)
    if array.ndim == 0:
        return np.arange(integer("positions", positions, 0), dtype=np.float64)
    if array.dtype.kind not in "iuf" and array.size:
        raise TypeError(f"positions must be a length or an array of numbers; got {array.dtype}")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise ValueError("positions must be finite; got NaN or inf")
    return array


_REQUIRED, _LENGTH = object(), "original_max_position_embeddings"
_PARAMETERS = {  # of each kind of scaling, and their defaults
    "default": {},
    "linear": {"factor": _REQUIRED},
    "ntk": {"factor": _REQUIRED},
    "dynamic": {"factor": _REQUIRED, _LENGTH: _REQUIRED},
    "yarn": {
        "factor": _REQUIRED, _LENGTH: _REQUIRED, "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": None,
        "mscale": None, "mscale_all_dim": None, "truncate": True,
    },
    "llama3": {"factor": _REQUIRED, _LENGTH: _REQUIRED, "low_freq_factor": _REQUIRED, "high_freq_factor": _REQUIRED},
}  # fmt: skip


def _frequencies(dim, base, scaling, positions):
    """The frequency of each pair, and what cosines and sines are multiplied by."""
    kind, given = _scaling(scaling, base)
    if kind == "ntk":
        base *= _stretch(given["factor"], dim)
    elif kind == "dynamic":
        length = max(given[_LENGTH], positions.max(initial=-1.0) + 1)
        base *= _stretch(given["factor"] * length / given[_LENGTH] - (given["factor"] - 1), dim)
    plain = base ** (-np.arange(0, dim, 2) / max(dim, 1))
    if kind == "linear":
        return plain / given["factor"], 1.0
    if kind == "yarn":
        kept = 1 - _yarn_ramp(dim, base, given)
        return plain * (kept + (1 - kept) / given["factor"]), _yarn_factor(given)
    if kind == "llama3":
        turns = given[_LENGTH] * plain / (2 * math.pi)
        low, high = given["low_freq_factor"], given["high_freq_factor"]
        if not low < high:
            raise ValueError(f'scaling["high_freq_factor"] must be larger than low_freq_factor, {low}; got {high}')
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return plain * (kept + (1 - kept) / given["factor"]), 1.0
    return plain, 1.0


def _scaling(scaling, base):
    """The kind of scaling and all its parameters."""
    if not isinstance(scaling, Mapping):
        raise TypeError(f"scaling must be a mapping with a rope_type, or None; got {scaling!r}")
    given = dict(scaling)
    kind = given.pop("rope_type", None) or given.pop("type", "default" if not given else None)
    given.pop("type", None)
    if not isinstance(kind, str) or kind not in _PARAMETERS:
        raise ValueError(f'scaling["rope_type"] must be one of {", ".join(_PARAMETERS)}; got {kind!r}')
    if given.pop("rope_theta", base) != base:
        raise ValueError(f'scaling["rope_theta"] must be base, {base}; got {scaling["rope_theta"]!r}')
    unknown = set(given) - set(_PARAMETERS[kind])
    if unknown:
        raise ValueError(f"scaling must have only the parameters of {kind!r}, {list(_PARAMETERS[kind])}; got also {sorted(unknown)}")
    parameters = {}
    for name, default in _PARAMETERS[kind].items():
        value = given.get(name)
        if value is None and default is _REQUIRED:
            raise ValueError(f"scaling must have a {name} for {kind!r}; got {scaling!r}")
        if value is None:
            parameters[name] = default
        else:
            parameters[name] = flag(f'scaling["{name}"]', value) if name == "truncate" else _positive(f'scaling["{name}"]', value)
    return kind, parameters


def _stretch(factor, dim):
    """By how much `base` grows, for the lowest frequency to be divided by `factor` while the highest stays."""
    return factor ** (dim / (dim - 2)) if dim > 2 else 1.0


def _yarn_ramp(dim, base, given):
    """0 for pairs that are left as they are, 1 for those whose positions are interpolated."""

    def pair_that_turns(times):
        """The pair, a real number, that turns so many times in the original length."""
        return dim * math.log(given[_LENGTH] / (2 * math.pi * times)) / (2 * math.log(base))

    low, high = pair_that_turns(given["beta_fast"]), pair_that_turns(given["beta_slow"])
    if given["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    return np.clip((np.arange(dim // 2) - low) / (high - low or 0.001), 0, 1)


def _yarn_factor(given):
    """What stands in for a temperature of the softmax."""

    def by(scale):
        return 0.1 * scale * math.log(max(given["factor"], 1.0)) + 1

    if given["attention_factor"] is not None:
        return given["attention_factor"]
    if given["mscale"] is not None and given["mscale_all_dim"] is not None:
        return by(given["mscale"]) / by(given["mscale_all_dim"])
    return by(1.0)


def sinusoidal_positions(length: int, dim: int) -> NDArray[np.float32]:
    """The position vectors that the first Transformer adds to its embeddings.

    ::

        out[p, 2 n]     = sin(p / 10000 ** (2 n / dim))
        out[p, 2 n + 1] = cos(p / 10000 ** (2 n / dim))

    Parameters
    ----------
    length : int
    dim : int
        Even or odd.

    Returns
    -------
    ndarray, (length, dim)
        float32, rounded from float64.

    Notes
    -----
    Vaswani et al., "Attention Is All You Need", 2017, section 3.5. (Some models put all sines before all cosines.)
    """
    length, dim = integer("length", length, 0), integer("dim", dim, 0)
    angles = np.arange(length)[:, None] * 10000.0 ** (-np.arange(0, dim, 2) / max(dim, 1))
    out = np.empty((length, dim), np.float32)
    out[:, 0::2] = np.sin(angles)
    out[:, 1::2] = np.cos(angles[:, : dim // 2])
    return out


def alibi_slopes(num_heads: int) -> NDArray[np.float32]:
    """The slopes of ALiBi for any number of heads, as :func:`fastattn.attention` takes them under the same name.

    For a power of two ``n`` they are ``2 ** (-8 / n)`` and its powers up to ``2 ** -8``. For another number of heads they are those
    of the largest power of two below it, and as many more as are needed of every other slope of twice that power of two.

    Parameters
    ----------
    num_heads : int

    Returns
    -------
    ndarray, (num_heads,)
        float32.

    Notes
    -----
    Press, Smith and Lewis, "Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation", 2022, and its
    published code.
    """
    num_heads = integer("num_heads", num_heads, 0)
    power = 1 << max(num_heads.bit_length() - 1, 0)
    exponents = np.concatenate([np.arange(1, power + 1) * 8 / power, np.arange(1, 2 * power, 2) * 4 / power])
    return (2.0 ** -exponents[:num_heads]).astype(np.float32)


def t5_bias(
    table: Array,
    q_len: int,
    k_len: int,
    *,
    bidirectional: bool = True,
    max_distance: int = 128,
    query_offset: int | None = None,
) -> NDArray[Any]:
    """The relative position bias of T5, as a `mask` for :func:`fastattn.attention` that holds one vector for each head.

    Key ``j`` adds ``table[bucket, h]`` to its score with the query at position ``p``, where the bucket depends on ``j - p`` alone.
    So the result is a view: row ``i`` of a head is the row before it, moved by one element. It takes ``H * (q_len + k_len - 1)``
    numbers of memory, whatever its shape says, and is read-only.

    Parameters
    ----------
    table : array_like, (num_buckets, H)
        `relative_attention_bias.weight` of a checkpoint.
    q_len, k_len : int
    bidirectional : bool
        Half of the buckets are for keys behind the query. True in encoders; in decoders False, where such keys share the bucket of
        distance 0 (they are hidden by ``causal=True``).
    max_distance : int
        From here on all distances share the last bucket.
    query_offset : int, optional
        The position of the first query. Default: ``k_len - q_len``, as in :func:`fastattn.attention`.

    Returns
    -------
    ndarray, (H, q_len, k_len)
        Of the dtype of `table`; float32 where that is no floating type.

    Notes
    -----
    Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", 2020. Half of the buckets (of a
    side) are for one distance each, the others for ranges that grow logarithmically up to `max_distance`. T5 does not scale its scores:
    pass ``scale=1.0`` as well.

    Examples
    --------
    >>> bias = fastattn.t5_bias(np.zeros((32, 8), np.float32), 512, 512)
    >>> out = fastattn.attention(q, k, v, mask=bias, scale=1.0)
    """
    table = as_array("table", table)
    sides = 2 if flag("bidirectional", bidirectional) else 1
    if table.ndim != 2 or len(table) < 2 * sides:
        raise ValueError(f"table must have shape (num_buckets, H), with {2 * sides} buckets or more; got {table.shape}")
    if table.dtype.kind not in "f" and table.dtype.name != "bfloat16":
        table = table.astype(np.float32)
    q_len, k_len = integer("q_len", q_len, 0), integer("k_len", k_len, 0)
    offset = k_len - q_len if query_offset is None else integer("query_offset", query_offset)
    buckets = _t5_buckets(np.arange(1 - q_len, k_len) - offset, len(table) // sides, sides, max_distance)
    diagonals = np.ascontiguousarray(table[buckets].T)  # [h, q_len - 1 - i + j] is the bias of (i, j)
    if not q_len * k_len:
        return np.empty((table.shape[1], q_len, k_len), table.dtype)
    return np.lib.stride_tricks.sliding_window_view(diagonals, k_len, axis=1)[:, ::-1]


def _t5_buckets(distance, size, sides, max_distance):
    """The bucket of each distance, ``j - p``: `size` of them for keys before the query, and where there are two sides as many behind."""
    near = size // 2
    max_distance = integer("max_distance", max_distance, near + 1)
    away = np.abs(distance) if sides == 2 else np.maximum(-distance, 0)
    far = np.log(np.maximum(away, near) / near) / math.log(max_distance / near) * (size - near)
    bucket = np.where(away < near, away, np.minimum(near + far.astype(np.int64), size - 1))
    return bucket + size * (distance > 0) if sides == 2 else bucket


def _positive(name, value):
    """`value` as a float that is finite and more than 0."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a real number; got {value!r}") from None
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be finite and more than 0; got {value!r}")
    return number
