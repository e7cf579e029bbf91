"""Pictures of attention, in one style that reads in print and without colours, and a page to look around in.

Darker is always more. What has to be told apart differs in brightness and hatching as well as in hue (Okabe and Ito's colours).
matplotlib is imported when something is drawn; the page of :func:`html` needs nothing but a browser.
"""

import base64
import html as _escape
import json
import math
import string
from pathlib import Path

import numpy as np

COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
HATCHES = ("", "///", "...", "xxx")
_MOST_LABELS = 64


def heatmap(weights, *, queries=None, keys=None, ax=None, **imshow):
    """Draw the weights of one head, queries down, keys across.

    Parameters
    ----------
    weights : array_like, (Lq, Lk)
    queries, keys : sequence of str, optional
        What to write beside rows and under columns (up to 64 of them).
    ax : matplotlib Axes, optional
        Where; a new figure by default.
    **imshow
        Handed to ``Axes.imshow``.

    Returns
    -------
    matplotlib Axes
    """
    weights = _matrix("weights", weights)
    ax = _axes(ax)
    ax.imshow(weights, **{"cmap": "Greys", "vmin": 0, "aspect": "auto", "interpolation": "nearest"} | imshow)
    ax.set(xlabel="key", ylabel="query")
    _labels(ax.set_xticks, "keys", keys, weights.shape[1], rotation=90)
    _labels(ax.set_yticks, "queries", queries, weights.shape[0])
    return ax


def heads(weights, *, columns=4, queries=None, keys=None, names=None):
    """Draw the weights of several heads side by side, all on the same scale.

    Parameters
    ----------
    weights : array_like, (H, Lq, Lk)
    columns : int
        Pictures in a row, at most.
    queries, keys : sequence of str, optional
        As for :func:`heatmap`, written at the edges only.
    names : sequence of str, optional
        Titles. Default: the number of the head.

    Returns
    -------
    matplotlib Figure
    """
    import matplotlib.pyplot as plt

    weights = np.asarray(weights, np.float32)
    if weights.ndim != 3 or not len(weights):
        raise ValueError(f"weights must have shape (H, Lq, Lk), with 1 head or more; got {weights.shape}")
    across = min(columns, len(weights))
    down = math.ceil(len(weights) / across)
    size = (2.2 * across, 2.2 * down)
    figure, grid = plt.subplots(down, across, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained")
    for n, ax in enumerate(grid.flat):
        if n >= len(weights):
            ax.axis("off")
            continue
        heatmap(weights[n], queries=queries, keys=keys, ax=ax, vmax=float(weights.max(initial=0)))
        ax.set_title(f"head {n}" if names is None else names[n], fontsize="small")
        ax.label_outer()
    return figure


def segments(mass, *, names=None, queries=None, ax=None):
    """Draw how each query divides its attention among segments of the keys, as bars that sum to its share.

    Parameters
    ----------
    mass : array_like, (Lq, num_segments)
        Of one head, or the mean of some: :func:`fastattn.attention_mass`.
    names : sequence of str, optional
        Of the segments.
    queries : sequence of str, optional
        What to write beside the bars.
    ax : matplotlib Axes, optional
        Where; a new figure by default.

    Returns
    -------
    matplotlib Axes
    """
    mass = _matrix("mass", mass)
    names = [f"segment {n}" for n in range(mass.shape[1])] if names is None else list(map(_plain, names))
    if len(names) != mass.shape[1]:
        raise ValueError(f"names must have one for each of {mass.shape[1]} segments; got {len(names)}")
    ax = _axes(ax)
    left = np.zeros(len(mass))
    for n, name in enumerate(names):
        colour, hatch = COLOURS[n % len(COLOURS)], HATCHES[(n + n // len(COLOURS)) % len(HATCHES)]  # neighbours differ in both
        ax.barh(np.arange(len(mass)), mass[:, n], left=left, color=colour, hatch=hatch, edgecolor="white", linewidth=0.5, label=name)
        left += mass[:, n]
    ax.set(xlabel="share of attention", ylabel="query", xlim=(0, 1), ylim=(len(mass) - 0.5, -0.5))
    _labels(ax.set_yticks, "queries", queries, len(mass))
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    return ax


def html(tokens, weights, path, *, keys=None, title="Attention"):
    """Write a page on which tokens are coloured by the attention that the token under the pointer pays, or is paid.

    The page is one file without references to others: it opens from a disk, without a server or a network, and forbids itself
    to load anything. Tokens are text to it, whatever they look like. Hover, or move with Tab, to choose a token; click to keep
    it; choose a head, or the mean of all; and turn the direction round. ``#head=2&query=5`` behind its address opens it so.

    Parameters
    ----------
    tokens : sequence of str, Lq
        The text of each query.
    weights : array_like, (H, Lq, Lk) or (Lq, Lk)
        From 0 to 1. Kept to 16 bits.
    path : str or path
        Where to write.
    keys : sequence of str, Lk, optional
        The text of each key. Default: `tokens`.
    title : str

    Returns
    -------
    pathlib.Path
    """
    weights = np.asarray(weights, np.float32)
    weights = weights[None] if weights.ndim == 2 else weights
    texts = list(map(str, tokens))
    key_texts = texts if keys is None else list(map(str, keys))
    if weights.ndim != 3 or weights.shape[1:] != (len(texts), len(key_texts)):
        raise ValueError(f"weights must have shape (H, {len(texts)}, {len(key_texts)}), by the tokens given; got {weights.shape}")
    if weights.size and not (weights.min() >= 0 and weights.max() <= 1 + 1e-4):
        raise ValueError(f"weights must lie between 0 and 1; got {weights.min()} to {weights.max()}")
    sixteen_bits = np.rint(np.minimum(weights, 1) * 65535).astype("<u2")
    data = {
        "queries": texts,
        "keys": key_texts,
        "same": keys is None,
        "heads": len(weights),
        "weights": base64.b64encode(sixteen_bits.tobytes()).decode(),
    }
    # Nothing in the data can end the element that holds it.
    text = json.dumps(data, ensure_ascii=True).replace("<", "\\u003c")
    page = string.Template(_PAGE).substitute(title=_escape.escape(title), data=text)
    path = Path(path)
    path.write_text(page, encoding="utf-8")
    return path


def _matrix(name, array):
    array = np.asarray(array, np.float32)
    if array.ndim != 2:
        raise ValueError(f"{name} must have 2 axes: those of one head, or a mean; got shape {array.shape}")
    return array


def _axes(ax):
    if ax is None:
        import matplotlib.pyplot as plt

        ax = plt.figure(layout="constrained").add_subplot()
    return ax


def _plain(text):
    """Text in which matplotlib finds no formula."""
    return str(text).replace("$", r"\$")


def _labels(set_ticks, name, texts, size, **options):
    if texts is None:
        return
    if len(texts) != size:
        raise ValueError(f"{name} must have {size} texts; got {len(texts)}")
    if size <= _MOST_LABELS:
        set_ticks(range(size), list(map(_plain, texts)), fontsize="small", **options)


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>$title</title>
<style>
body { font: 16px/1.9 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #111; background: #fff; }
h1 { font-size: 1.2rem; } h2 { font-size: 1rem; margin: 1rem 0 0; color: #555; }
.text span { white-space: pre-wrap; border-radius: 3px; padding: 2px 1px; cursor: pointer; border-bottom: 2px solid transparent; }
.text span.chosen { border-bottom-color: #d55e00; font-weight: bold; }
.text span:focus { outline: 2px solid #d55e00; }
#said { color: #555; min-height: 1.9em; }
</style>
</head>
<body>
<h1>$title</h1>
<p>
<label>head <select id="head"></select></label>
<label>colour <select id="way"><option value="to">what the chosen token looks at</option>
<option value="from">what looks at the chosen token</option></select></label>
</p>
<p id="said" role="status"></p>
<h2 id="queries-title">queries</h2><div class="text" id="queries"></div>
<h2 id="keys-title">keys</h2><div class="text" id="keys"></div>
<script type="application/json" id="data">$data</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const rows = data.queries.length, columns = data.keys.length, bytes = atob(data.weights);
const weight = (h, i, j) => {
  const at = 2 * ((h * rows + i) * columns + j);
  return (bytes.charCodeAt(at) + 256 * bytes.charCodeAt(at + 1)) / 65535;
};
const byId = id => document.getElementById(id);
const state = { head: -1, way: "to", token: Math.max(0, rows - 1), kept: false };
const shown = (i, j) => {
  if (state.head >= 0) return weight(state.head, i, j);
  let sum = 0;
  for (let h = 0; h < data.heads; h++) sum += weight(h, i, j);
  return sum / Math.max(1, data.heads);
};
/* White to dark blue: its brightness falls as the weight grows; text is white where that reads better. */
const paint = (span, value, largest) => {
  const x = largest > 0 ? Math.sqrt(value / largest) : 0, mix = (a, b) => Math.round(a + (b - a) * x);
  span.style.backgroundColor = "rgb(" + mix(255, 8) + "," + mix(255, 48) + "," + mix(255, 107) + ")";
  span.style.color = x > 0.55 ? "#fff" : "#111";
  span.title = value.toPrecision(3);
  span.dataset.weight = value.toFixed(4);
};
const fill = (parent, texts, choosable) => texts.map((text, n) => {
  const span = document.createElement("span");
  span.textContent = text === "" ? "\\u2205" : text;
  if (choosable) {
    span.tabIndex = 0;
    const choose = keep => { if (keep || !state.kept) { state.token = n; draw(); } };
    span.addEventListener("mouseenter", () => choose(false));
    span.addEventListener("focus", () => choose(false));
    span.addEventListener("click", () => { state.kept = !state.kept || state.token !== n; choose(true); });
  }
  parent.append(span, "\\u200b");
  return span;
});
let queries = [], keys = [];
const build = () => {
  const to = state.way === "to";
  byId("queries").replaceChildren();
  byId("keys").replaceChildren();
  if (data.same) {
    queries = keys = fill(byId("keys"), data.keys, true);
  } else {
    queries = fill(byId("queries"), data.queries, to);
    keys = fill(byId("keys"), data.keys, !to);
  }
  byId("queries-title").hidden = byId("keys-title").hidden = data.same;
};
const draw = () => {
  const to = state.way === "to", coloured = to ? keys : queries, choosing = to ? queries : keys;
  state.token = Math.min(state.token, Math.max(0, choosing.length - 1));
  const values = coloured.map((_, n) => choosing.length ? (to ? shown(state.token, n) : shown(n, state.token)) : 0);
  const largest = Math.max(0, ...values);
  coloured.forEach((span, n) => paint(span, values[n], largest));
  for (const span of [...queries, ...keys]) span.classList.remove("chosen");
  if (choosing.length) choosing[state.token].classList.add("chosen");
  byId("said").textContent = (state.head < 0 ? "mean of heads" : "head " + state.head) + ", largest weight " + largest.toPrecision(3) +
    (state.kept ? ", token kept: click it again to let go" : "");
};
byId("head").append(new Option("mean of all", -1), ...Array.from({ length: data.heads }, (_, h) => new Option(h, h)));
byId("head").addEventListener("change", event => { state.head = Number(event.target.value); draw(); });
byId("way").addEventListener("change", event => { state.way = event.target.value; build(); draw(); });
const asked = new URLSearchParams(location.hash.slice(1));
const number = (name, least, end, otherwise) => {
  const n = asked.has(name) ? Number(asked.get(name)) : otherwise;
  return Number.isInteger(n) && n >= least && n < end ? n : otherwise;
};
state.head = number("head", -1, data.heads, -1);
state.token = number("query", 0, rows, state.token);
byId("head").value = state.head;
build();
draw();
</script>
</body>
</html>
"""
