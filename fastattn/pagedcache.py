"""A pool of pages that many sequences of keys and values share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import pagebounds
from ._call import known_keywords
from ._check import as_array, as_float32, check_out, flag, integers, most_kept, shares
from ._quantized import dim_of
from .attention import merge_states
from .inspect import mass, segments_of
from .kvcache import MOST_PLAIN, CacheFullError, cache_rows, check_queries, new_rows, size, stored_as
from .quantized import attend_turned, store, store_plain, turned
from .varlen import paged_attention, paged_plain

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from ._typing import Array, Ints

# Arguments of attention under which it matters to keys that sequences share how far away a query is, or which it is.
_NOT_IN_LEVELS = ("window", "alibi_slopes", "kv_starts", "q_lengths", "score_function", "tail_mask", "indices")

_INDICES = 1 << 22  # in lists of keys at a time


class Sequence:
    """The handle of a sequence in a :class:`PagedKVCache`; made by its ``new_sequence`` and ``fork``."""

    __slots__ = ("_length", "_pages", "_pool", "_row")

    def __init__(self, pool, pages, length):
        self._pool, self._pages = pool, None
        self._hold(pages, length)

    def _hold(self, pages, length):
        """Be so many tokens in these pages, a list that nobody changes; None, once it has been freed."""
        if pages is not self._pages:
            self._row = None
        self._pages, self._length = pages, length

    def _table(self):
        """The pages as an array, which is made once for as long as they stay the same."""
        row = self._row
        if row is None:
            row = self._row = np.array(self._pages, np.int32)
        return row

    def __len__(self) -> int:
        return self._length

    def __repr__(self):
        return "<freed Sequence>" if self._pages is None else f"<Sequence of {self._length} tokens in {len(self._pages)} pages>"

    def __copy__(self):
        raise TypeError("a Sequence is a handle: fork() of its pool makes another one")


class PagedKVCache:
    """Keys and values of any number of sequences, in pages of a common pool (Kwon et al., "PagedAttention", 2023).

    A sequence takes pages as it grows, so that no memory is reserved for what may never come. A fork shares the pages of its parent;
    the last one, if it is not full, is copied when either writes to it. A sequence gives the bits that :func:`attention` gives of its
    tokens side by side, whatever the size of the pages and whoever shares them.

    Parameters
    ----------
    num_pages : int
    page_size : int
        Tokens of a page, 1 or more; 16 to 256 are usual.
    num_kv_heads, head_dim : int
    v_head_dim : int, optional
        Head size of the values. Default: `head_dim`.
    dtype : {"bfloat16", "float16", "float32", "int8", "int4"} or dtype
        As of a :class:`KVCache`, which says what quantising costs.
    v_dtype : {"int8", "int4"}, optional
        Of the values of a quantised pool, likewise.
    rotate : bool
        Of a quantised pool, likewise.
    bounds : bool
        Keep the smallest and the largest number that the keys of each full page have in each channel, for ``attend(top_pages=)``: two keys
        more for each page.

    Notes
    -----
    Pages are given back by :meth:`free` and :meth:`truncate` alone: a handle that is dropped keeps its own.

    Several threads may attend at once; whatever changes sequences meanwhile (appending, forking, freeing, ...) is for the caller to
    order. To pickle or deep-copy a pool with its sequences, do it to both at once: ``pickle.dumps((pool, sequences))``.

    Examples
    --------
    >>> pool = fastattn.PagedKVCache(num_pages=1024, page_size=16, num_kv_heads=8, head_dim=64)
    >>> prompt = pool.new_sequence()
    >>> pool.append([prompt], k, v)                        # (L, 8, 64) each
    >>> answers = [pool.fork(prompt) for _ in range(4)]
    >>> pool.append(answers, k4, v4)                       # (4, 8, 64): one token for each
    >>> out = pool.attend(answers, q4, cascade=True)       # (4, 32, 64)
    """

    def __init__(
        self, num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, v_head_dim: int | None = None, dtype: Any = "bfloat16",
        *, v_dtype: str | None = None, rotate: bool = False, bounds: bool = False,
    ) -> None:  # fmt: skip
        pages, rows, heads = size("num_pages", num_pages), size("page_size", page_size, 1), size("num_kv_heads", num_kv_heads)
        if pages >= 2**31:
            raise ValueError(f"num_pages must be below 2**31; got {num_pages}")
        head_dim = size("head_dim", head_dim)
        v_head_dim = head_dim if v_head_dim is None else size("v_head_dim", v_head_dim)
        self._rotate = flag("rotate", rotate)
        # A head's keys of a page lie together, as they are read together.
        self._k, self._v = cache_rows((pages, heads, rows), head_dim, v_head_dim, dtype, v_dtype, self._rotate)
        of_bounds = self._k.dtype if dim_of(self._k) == self._k.shape[3] else np.float32
        self._bounds = np.zeros((heads, pages, 2 * head_dim), of_bounds) if flag("bounds", bounds) else None
        self._references = np.zeros(pages, np.int64)
        self._free = list(range(pages - 1, -1, -1))

    def __repr__(self):
        pages, heads, rows, _ = self._k.shape
        of = f"{heads} heads of {dim_of(self._k)}, {stored_as(self)}"
        return f"<PagedKVCache of {pages} pages of {rows} tokens, {self.num_free_pages} free, {of}>"

    def __copy__(self):
        raise TypeError("a pool is copied with its sequences: copy.deepcopy((pool, sequences))")

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the stored keys and values; of quantised ones the record of a row of keys."""
        return self._k.dtype

    @property
    def v_dtype(self) -> np.dtype[Any]:
        """Of the stored values; of quantised ones the record of a row."""
        return self._v.dtype

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self._k.shape[2]

    @property
    def num_free_pages(self) -> int:
        """Pages that belong to no sequence."""
        return len(self._free)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, filled or not, and of bounds."""
        return self._k.nbytes + self._v.nbytes + (0 if self._bounds is None else self._bounds.nbytes)

    def new_sequence(self) -> Sequence:
        """An empty sequence, which has no page yet."""
        return Sequence(self, [], 0)

    def fork(self, sequence: Sequence) -> Sequence:
        """A sequence with the tokens of another one, whose pages it shares."""
        (sequence,) = self._own([sequence])
        self._references[sequence._table()] += 1
        return Sequence(self, sequence._pages, sequence._length)

    def free(self, sequence: Sequence) -> None:
        """Give back the pages of a sequence that no other one shares. The handle is then of no more use."""
        (sequence,) = self._own([sequence])
        self._release(sequence._pages)
        sequence._hold(None, 0)

    def truncate(self, sequence: Sequence, n: int) -> None:
        """Forget all but the first `n` tokens of a sequence: drafts that were rejected. Pages beyond them are given back."""
        (sequence,) = self._own([sequence])
        n = size("n", n)
        if n > sequence._length:
            raise ValueError(f"n must not exceed the length of the sequence, {sequence._length}; got {n}")
        kept = -(-n // self.page_size)
        if kept < len(sequence._pages):
            self._release(sequence._pages[kept:])
            sequence._hold(sequence._pages[:kept], n)
        sequence._length = n

    def reorder(self, sequences: Iterable[Sequence], indices: Ints) -> None:
        """Let sequence ``n`` become what sequence ``indices[n]`` was, as in a beam search; no token is copied.

        Parameters
        ----------
        sequences : iterable of Sequence
            Each at most once.
        indices : array_like of int, (B,)
            Sequences may be repeated and left out.
        """
        sequences = self._own(sequences, once=True)
        indices = as_array("indices", indices)
        if indices.shape != (len(sequences),):
            raise ValueError(f"indices must have shape ({len(sequences)},), one for each sequence; got {indices.shape}")
        chosen = integers("indices", indices, len(sequences), 0, len(sequences) - 1).tolist()
        states = [(sequences[n]._pages, sequences[n]._length) for n in chosen]
        for pages, _ in states:
            self._references[pages] += 1
        for sequence, (pages, length) in zip(sequences, states):
            self._release(sequence._pages)
            sequence._hold(pages, length)

    def lengths(self, sequences: Iterable[Sequence]) -> NDArray[np.int64]:
        """(B,) int64: the tokens of each sequence."""
        return np.array([sequence._length for sequence in self._own(sequences)], np.int64)

    def block_table(self, sequences: Iterable[Sequence]) -> NDArray[np.int32]:
        """(B, most pages) int32: the pages of each sequence, -1 beyond its last."""
        rows = [sequence._table() for sequence in self._own(sequences)]
        table = np.full((len(rows), max(map(len, rows), default=0)), -1, np.int32)
        for row, pages in zip(table, rows):
            row[: len(pages)] = pages
        return table

    def append(self, sequences: Iterable[Sequence], k: Array, v: Array, cu_seqlens: Ints | None = None) -> None:
        """Take in new tokens of several sequences.

        Parameters
        ----------
        sequences : iterable of Sequence
            Each at most once.
        k : array_like, (total, Hkv, D)
            The new keys, sequence after sequence, of any storage type; cast to that of the pool.
        v : array_like, (total, Hkv, Dv)
        cu_seqlens : array_like of int, (B + 1,), optional
            Where the tokens of each sequence begin, and the total. Default: each sequence has an equal share.

        Raises
        ------
        CacheFullError
            If there are not enough free pages. Nothing has changed then.
        ValueError
            If a number that is to be quantised is NaN, infinite or too large. Nothing has changed then either.
        """
        sequences = self._own(sequences, once=True)
        if cu_seqlens is None and self._append_plain(sequences, k, v):
            return
        heads, rows = self._k.shape[1:3]
        k = new_rows("k", k, (-1, heads, dim_of(self._k)), "(total, Hkv, D)")
        total = k.shape[0]
        v = new_rows("v", v, (total, heads, dim_of(self._v)), "(total, Hkv, Dv) with the total of k")
        counts = np.diff(shares("cu_seqlens", cu_seqlens, len(sequences), total, "k")).tolist()

        room, taken, copies, slots, after = len(self._free), 0, [], [], []  # pages are taken from the end, when all is well
        left = {}  # references to a page that is written to, when sequences before have their own copy of it
        for sequence, count in zip(sequences, counts):
            begin, end = sequence._length, sequence._length + count
            pages, wanted = sequence._pages, -(-end // rows) - len(sequence._pages)
            shared = begin % rows and count and left.setdefault(pages[-1], int(self._references[pages[-1]])) > 1
            if shared:
                left[pages[-1]] -= 1
                copies.append((pages[-1], taken, begin % rows))
                wanted += 1
                pages = pages[:-1]
            taken += wanted
            if taken <= room:
                new = self._free[room - taken : room - taken + wanted][::-1]
                after.append((pages, new, end))
                own = (pages + new)[begin // rows :]
                slots += [own[j // rows] * rows + j % rows for j in range(begin % rows, begin % rows + count)]
        if taken > room:
            raise CacheFullError(f"the pool has {room} free pages of {self._references.size}; {taken} are wanted")

        for old, n, filled in copies:
            for cache in (self._k, self._v):
                cache[self._free[room - 1 - n], :, :filled] = cache[old, :, :filled]
        parts = [(name, new_ones[None], cache.swapaxes(1, 2)) for name, new_ones, cache in (("k", k, self._k), ("v", v, self._v))]
        store(parts, np.array(slots, np.int64)[None], self._rotate)
        for old, _, _ in copies:
            self._references[old] -= 1
        self._references[self._free[room - taken :]] = 1
        del self._free[room - taken :]
        full = []
        for sequence, (pages, new, end) in zip(sequences, after):
            full += (pages + new)[sequence._length // rows : end // rows]
            sequence._hold(pages + new if new else pages, end)
        if self._bounds is not None:  # a page that is full never changes, and one that is not is bounded when it matters
            pagebounds.renew(self._bounds, self._k, full)

    def _append_plain(self, sequences, k, v):
        """The short way of a few ordinary tokens for which the last pages have room; False, with nothing done, for others."""
        if type(k) is not np.ndarray or k.ndim != 3 or not sequences or len(k) > MOST_PLAIN:
            return False
        share, left = divmod(len(k), len(sequences))
        rows, most = self.page_size, self.page_size - (self._bounds is not None)  # bounds are those of full pages
        if left or not share:
            return False
        slots = []
        for sequence in sequences:
            row = sequence._length % rows
            if row == 0 or row + share > most or self._references[sequence._pages[-1]] > 1:
                return False
            first = sequence._pages[-1] * rows + row
            slots += range(first, first + share)
        if not store_plain(k, v, (self._k, self._v), 3, slots):
            return False
        for sequence in sequences:
            sequence._length += share
        return True

    def attend(
        self,
        sequences: Iterable[Sequence],
        q: Array,
        cu_seqlens_q: Ints | None = None,
        *,
        causal: bool = True,
        cascade: bool = False,
        top_pages: int | None = None,
        keep_first: int = 0,
        keep_recent: int = 1,
        return_mass: bool = False,
        **keywords: Any,
    ) -> Any:
        """Attention of the latest tokens' queries to the sequences that they belong to.

        Parameters
        ----------
        sequences : iterable of Sequence
        q : array_like, (total_q, Hq, D)
            The queries of the last positions of each sequence, sequence after sequence: prefill and decoding may be mixed.
        cu_seqlens_q : array_like of int, (B + 1,), optional
            Where the queries of each sequence begin, and their total. Default: each sequence has an equal share.
        causal : bool
        cascade : bool
            Read the pages that sequences have in common, from their first on, once for all of them, and merge (Juravsky et al.,
            "Hydragen", 2024). Bits then depend on the company. Without effect where they must not, with `invariant`, and where the
            distance from query to key matters to shared keys: with `window`, `alibi_slopes`, `kv_starts`, `q_lengths`, a
            `score_function`, a `tail_mask`, `indices` or another `activation`.
        top_pages : int, optional
            Read so many pages only, for each query row and kv head those whose keys could score highest, by the smallest and the largest
            number of each channel of their keys, summed over the heads of a group (Tang et al., "Quest", 2024). Of a pool with `bounds`.
            All other rules still hold.
        keep_first, keep_recent : int
            Keys whose pages are among these whatever they could score: the first of a sequence, and the last up to the row's own.
        return_mass : bool
            Return also the share of its attention that each row has found in its pages, at the cost of attention to all keys. Sinks
            have no part in it.
        **keywords
            As for :func:`paged_attention`, `tail_mask`, `indices` and `invariant` among them, but query_offset and kv_lengths, which the
            pool knows better.

        Returns
        -------
        out : ndarray, (total_q, Hq, Dv)
            Of the dtype of `q`.
        lse : ndarray, (Hq, total_q)
            float32, only with ``return_lse=True``.
        mass : ndarray, (Hq, total_q)
            float32, only with ``return_mass=True``.
        """
        q = self._queries("attend", q, keywords)
        sequences = self._own(sequences)
        choice = None
        if top_pages is not None:
            choice = *self._page_choice(top_pages, keep_first, keep_recent, keywords), flag("return_mass", return_mass)
        elif flag("return_mass", return_mass):
            raise ValueError("return_mass must be False without top_pages, for then all of it is covered; got True")
        if self._rotate:

            def attend(wide, **rest):
                return self._attend(sequences, wide, cu_seqlens_q, **rest)

            return attend_turned(attend, q, {"causal": causal, "cascade": cascade, "choice": choice, **keywords})
        return self._attend(sequences, q, cu_seqlens_q, causal, cascade, choice, **keywords)

    def attention_mass(
        self,
        sequences: Iterable[Sequence],
        q: Array,
        segments: Array,
        cu_seqlens_q: Ints | None = None,
        *,
        num_segments: int | None = None,
        causal: bool = True,
        **keywords: Any,
    ) -> NDArray[np.float32]:
        """How much of the attention of the latest tokens' queries falls on each segment of the sequences that they belong to.

        Parameters
        ----------
        sequences : iterable of Sequence
        q, cu_seqlens_q
            As for :meth:`attend`.
        segments : array_like of int, (total_k,)
            The segment of each token of the sequences, sequence after sequence; a token at -1 is in none.
        num_segments : int, optional
            Default: the largest segment and one.
        causal : bool
        **keywords
            As for :func:`fastattn.attention_mass`, but mask, query_offset and kv_lengths.

        Returns
        -------
        ndarray, (total_q, Hq, num_segments)
            float32.
        """
        known_keywords("attention_mass", keywords, without=("return_lse", "out", "mask"))
        q, sequences = self._queries("attention_mass", q, keywords), self._own(sequences)
        table, lengths = self.block_table(sequences), self.lengths(sequences)
        segments, count = segments_of(segments, num_segments, (int(lengths.sum()),))
        of_pages = np.full((len(sequences), table.shape[1] * self.page_size), -1, np.int32)
        of_pages[np.arange(of_pages.shape[1]) < lengths[:, None]] = segments
        rules = {"causal": causal, "kv_lengths": lengths, **keywords}
        return mass(turned(q) if self._rotate else q, self._k.swapaxes(1, 2), of_pages, count, paged=(table, cu_seqlens_q), **rules)

    def _queries(self, method, q, keywords):
        """The queries of a call, checked, and that its keywords say nothing that the pool knows better."""
        for name in ("query_offset", "kv_lengths", "block_table"):
            if name in keywords:
                raise TypeError(f"{method}() has no argument {name}: the pool knows where its tokens are")
        q = as_array("q", q)
        if q.ndim != 3:
            raise ValueError(f"q must have shape (total_q, Hq, D); got {q.shape}")
        if self._rotate:
            check_queries(q, dim_of(self._k))
        return q

    def _attend(self, sequences, q, cu_seqlens_q, causal, cascade, choice, **keywords):
        table, lengths = self.block_table(sequences), self.lengths(sequences)
        if choice is None and cu_seqlens_q is None and cascade is False and not keywords:
            out = paged_plain(q, self._k, self._v, table, lengths, causal)
            if out is not None:
                return out
        starts = shares("cu_seqlens_q", cu_seqlens_q, len(sequences), q.shape[0], "q")
        if choice is not None:
            return self._attend_top(choice, q, cu_seqlens_q is None, starts, table, lengths, flag("causal", causal), keywords)
        plain = all(keywords.get(name) is None for name in _NOT_IN_LEVELS) and keywords.get("activation", "softmax") == "softmax"
        if flag("cascade", cascade) and plain and not flag("invariant", keywords.get("invariant", False)):
            # The pages that every query of a sequence sees may be shared.
            seen = np.maximum(lengths - np.diff(starts) + 1, 0) if flag("causal", causal) else lengths
            levels = list(_levels(table, np.minimum(seen, lengths) // self.page_size))
            if len(levels) > 1:
                return self._attend_levels(levels, q, starts, table, lengths, causal, keywords)
        return self._paged(q, table, lengths, starts, causal=causal, **keywords)

    def _paged(self, q, table, lengths, cu_seqlens_q, **keywords):
        k, v = self._k.swapaxes(1, 2), self._v.swapaxes(1, 2)
        return paged_attention(q, k, v, table, lengths, cu_seqlens_q=cu_seqlens_q, **keywords)

    def _page_choice(self, top_pages, keep_first, keep_recent, keywords):
        """What is to be chosen, checked: pages, first keys and recent keys."""
        if self._bounds is None:
            raise ValueError("top_pages must be None in a pool without bounds=True; got some")
        for name in ("indices", "tail_mask"):
            if keywords.get(name) is not None:
                raise TypeError(f"attend() has either {name} or top_pages")
        count, first, recent = size("top_pages", top_pages, 1), size("keep_first", keep_first), size("keep_recent", keep_recent)
        if most_kept(first, recent, self.page_size) > count:
            room = f"{count} of {self.page_size} tokens"
            raise ValueError(f"keep_first and keep_recent must fit into top_pages, {room}; got {keep_first} and {keep_recent}")
        return count, first, recent

    def _attend_top(self, choice, q, in_equal_shares, starts, table, lengths, causal, keywords):
        """Attention to the best pages of each row: some rows at a time, so that lists of keys stay small."""
        count, keep_first, keep_recent, return_mass = choice
        counts, rows, heads = np.diff(starts), q.shape[0], self._k.shape[1]
        owner = np.repeat(np.arange(counts.size), counts)
        position = np.arange(rows) - starts[owner] + (lengths - counts)[owner]
        scale = keywords.get("scale")
        signed = q if scale is None or scale >= 0 else -q
        bounds, columns = self._bounds, table
        if keep_recent == 0:
            bounds, columns = self._with_last_pages(table, lengths)
        given_out, return_lse = keywords.pop("out", None), flag("return_lse", keywords.pop("return_lse", False))
        if given_out is not None:
            inputs = ("q", q), ("the pool", self._k), ("the pool", self._v)
            target = check_out(given_out, (rows, q.shape[1], dim_of(self._v)), q.dtype, inputs)
        step, parts = max(1, _INDICES // max(heads * count * self.page_size, 1)), []
        plain = in_equal_shares and rows <= step and not (keywords or return_lse or return_mass)
        for r0 in range(0, max(rows, 1), step):
            here, own = slice(r0, min(r0 + step, rows)), owner[r0 : r0 + step]
            pages = pagebounds.select_pages(
                signed[here], bounds, columns[own], position[here], lengths[own], count, self.page_size, causal, keep_first, keep_recent
            )
            listed = pagebounds.keys_of(pages, self.page_size)
            out = paged_plain(q, self._k, self._v, table, lengths, causal, listed) if plain else None
            if out is not None:
                parts.append((out, None, None))
                continue
            cut = np.clip(starts, here.start, here.stop)
            part = {"cu_seqlens_q": cut - here.start, "query_offset": lengths - counts + cut[:-1] - starts[:-1], "causal": causal}
            out, lse = self._paged(q[here], table, lengths, indices=listed, return_lse=True, **part, **keywords)
            mass = None
            if return_mass:
                rules = {**keywords, "return_lse": True, "sinks": None}
                found = lse if keywords.get("sinks") is None else self._paged(q[here], table, lengths, indices=listed, **part, **rules)[1]
                everything = self._paged(q[here], table, lengths, **part, **rules)[1]
                with np.errstate(invalid="ignore"):  # a row that sees nothing has found all of it
                    mass = np.where(everything == -np.inf, np.float32(1), np.exp(found - everything))
            parts.append((out, lse, mass))
        outs, lses, masses = zip(*parts)
        out = outs[0] if len(outs) == 1 else np.concatenate(outs)
        if given_out is not None:
            target[...] = out
            out = given_out
        result = [out]
        if return_lse:
            result.append(np.concatenate(lses, axis=1))
        if return_mass:
            result.append(np.concatenate(masses, axis=1))
        return result[0] if len(result) == 1 else tuple(result)

    def _with_last_pages(self, table, lengths):
        """The bounds of these pages alone, those of last pages that are not full among them, and a table of their places."""
        bounds = self._bounds[:, table]  # where there is no page, of some: nobody looks
        for b in np.flatnonzero(lengths % self.page_size):
            last = lengths[b] // self.page_size
            bounds[:, b, last] = pagebounds.bounds_of(self._k[table[b, last], None, :, : lengths[b] % self.page_size])[:, 0]
        return bounds.reshape(bounds.shape[0], table.size, bounds.shape[3]), np.arange(table.size, dtype=np.int32).reshape(table.shape)

    def _attend_levels(self, levels, q, starts, table, lengths, causal, keywords):
        """Attention level by level of a tree of shared pages, merged."""
        sinks, return_lse, given_out = (keywords.pop(name, None) for name in ("sinks", "return_lse", "out"))
        total, num_heads, _ = q.shape
        wide = q
        if q.itemsize == 2:  # parts are rounded once, when they have been merged; "medium" keeps products of bfloat16 exact
            wide = q.astype(np.float32)
            if q.dtype.name == "bfloat16":
                keywords["precision"] = "medium"
        outs, lses = [], []
        for runs in levels:
            rows = [np.concatenate([np.arange(starts[m], starts[m + 1]) for m in run.members]) for run in runs]
            counts, rows = np.array([row.size for row in rows]), np.concatenate(rows)
            pages = np.full((len(runs), max(run.pages for run in runs)), -1, np.int32)
            for row, run in zip(pages, runs):
                row[: run.pages] = table[run.members[0], run.first : run.first + run.pages]
            held = [min(run.pages * self.page_size, lengths[run.members[0]] - run.first * self.page_size) for run in runs]
            # Behind its last key a query sees all, and so do those of a run that sequences share.
            offset = [n if len(run.members) > 1 else n - count for run, n, count in zip(runs, held, counts)]
            part, part_lse = self._paged(
                wide[rows], pages, held, np.append(0, counts.cumsum()), query_offset=offset, causal=causal, return_lse=True, **keywords
            )
            out, lse = np.zeros((total, num_heads, part.shape[2]), np.float32), np.full((total, num_heads), -np.inf, np.float32)
            out[rows], lse[rows] = part, part_lse.T
            outs.append(out)
            lses.append(lse)
        if sinks is not None:  # one more key, whose value is 0
            sinks = as_float32("sinks", sinks)
            if sinks.shape != (num_heads,) or not (sinks < np.inf).all():
                raise ValueError(f"sinks must have shape ({num_heads},), one for each query head, finite or -inf; got {sinks}")
            outs.append(np.zeros_like(outs[0]))
            lses.append(np.broadcast_to(sinks, (total, num_heads)))
        merged, lse = merge_states(outs, lses)
        out = merged.astype(q.dtype, copy=False)
        if given_out is not None:
            target = check_out(given_out, merged.shape, q.dtype, (("q", q), ("the pool", self._k), ("the pool", self._v)))
            target[...] = out
            out = given_out
        return (out, lse.T) if flag("return_lse", return_lse or False) else out

    def _own(self, sequences, once=False):
        """The sequences as a list, if they are of this pool and alive."""
        if isinstance(sequences, Sequence):
            raise TypeError("sequences must be a list of sequences; got a single one")
        sequences = list(sequences)
        for n, sequence in enumerate(sequences):
            if not isinstance(sequence, Sequence):
                raise TypeError(f"sequences must hold handles from new_sequence() and fork(); got {sequence!r} at {n}")
            if sequence._pool is not self:
                raise ValueError(f"sequences must be of this pool; that at {n} is of another")
            if sequence._pages is None:
                raise ValueError(f"sequences must not have been freed; that at {n} has")
        if once and len(set(map(id, sequences))) < len(sequences):
            raise ValueError("sequences must not hold one twice")
        return sequences

    def _release(self, pages):
        self._references[pages] -= 1
        self._free += [page for page in reversed(pages) if self._references[page] == 0]


class _Run(NamedTuple):
    """Consecutive pages that some sequences have in common."""

    members: list
    first: int
    pages: int


def _levels(table, most):
    """The tree of shared pages, from the root on: lists of runs. The pages of a sequence make one run on each level down to its own.

    Of sequence ``m`` the first ``most[m]`` pages may be shared.
    """
    counts = (table >= 0).sum(axis=1)
    groups = [(list(range(len(table))), 0)]
    while groups:
        runs, next_groups = [], []
        for members, first in groups:
            by_page = {}
            for m in members:
                shareable = first < most[m]
                by_page.setdefault((int(table[m, first]) if shareable else m, shareable), []).append(m)
            for (_, shareable), group in by_page.items():
                if not shareable or len(group) == 1:
                    runs += [_Run([m], first, int(counts[m]) - first) for m in group if counts[m] > first]
                    continue
                last = int(min(most[m] for m in group))
                same = (table[group, first:last] == table[group[0], first:last]).all(axis=0)
                pages = last - first if same.all() else int(same.argmin())
                runs.append(_Run(group, first, pages))
                next_groups.append((group, first + pages))
        if runs:
            yield runs
        groups = next_groups
