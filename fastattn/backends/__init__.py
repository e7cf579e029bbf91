"""Three ways to compute the same thing.

Every backend is a module with these names and no others:

``attention(call)``
    Fill ``call.out`` and, unless it is None, ``call.lse``; `call` is a :class:`fastattn._call.Call`.
``merge_states(outs, lses, out, lse)``
    Combine parts, lists of contiguous ``(rows, Dv)`` and ``(rows,)`` arrays, into `out` and `lse`.
``store(pairs, slots, rotate)``
    Cast the rows ``(B, L, H, D)`` of each pair into its cache ``(pages, rows of a page, H, D)``, or quantise them where that holds records:
    each to the slot ``page * (rows of a page) + row`` that `slots`, ``(B, L)`` int64, has for it; -1 leaves it out. With `rotate` rows are
    turned first. False, and then nothing is written, where a number cannot be quantised.
``select_keys(call)``
    Fill ``call.indices``; `call` is a :class:`fastattn.indexed.Selection`.
``apply_rope(x, cos, sin, out, interleaved)``
    Turn the pairs of `x` ``(B, H, L, D)`` by the angles of the tables ``(B, H, L, pairs)`` into `out`, which may be `x`.
``normalize(x, add, add_bias, total, weight, bias, out, eps, centred)``
    Fill `out` ``(n, m, width)`` with the rows of `x` normalised, or with those of ``x + add + add_bias``, which go to `total` as well
    unless it is None. `out` or `total` may be `x` or `add`.
``pointwise(x, bias, out, kind, gated)``
    Fill `out` ``(n, width)`` with an activation of ``x + bias``; gated, that of its first half times the second.
``linear_attention(call)``
    Fill ``call.out`` and, unless it is None, ``call.new_state``; `call` is a :class:`fastattn.linear.LinearCall`. Decays outside of
    their range are an error, before anything is written.
``explain(call)``
    A dict that says how `call` would be computed.
``dtypes``
    The names of the dtypes that `q`, `k` and `v` may have.
``set_num_threads(n)``
    Use at most `n` threads in later calls, where the calling context (`fastattn._settings`) has set no number.

``native`` also has ``attention_plain``, ``linear_plain``, ``paged_plain``, ``rope_plain`` and ``store_plain``, shorter ways into the same
engine.
A backend imports nothing from the layers above it.
"""
