"""Pictures and the page: their structure, and the page in a headless browser where one is installed."""

import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from fastattn import plot

WEIGHTS = np.random.default_rng(0).dirichlet(np.ones(5), (3, 5)).astype(np.float32)
TOKENS = ["The", " <b>bold</b>", "</script><script>document.title='owned'</script>", "$x$ & \"quoted\"", "\u2028 Zürich 中 \U0001f600"]


class Reader(html.parser.HTMLParser):
    """The elements of a page and the text of the one that holds the data."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.data, self._inside = [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._inside = dict(attributes).get("id") == "data"

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        if self._inside:
            self.data += data


def test_the_page_is_one_file_that_loads_nothing(tmp_path):
    path = plot.html(TOKENS, WEIGHTS, tmp_path / "page.html", title="<i>attention</i>")
    text = path.read_text(encoding="utf-8")
    page = Reader(text)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 2 and not {"link", "img", "iframe", "i", "b"} & set(tags)
    assert not any({"src", "href"} & set(attributes) for _, attributes in page.elements)
    assert "default-src 'none'" in text and not re.search(r"https?://", text)
    data = json.loads(page.data)
    assert data["queries"] == data["keys"] == TOKENS and data["heads"] == 3


@pytest.mark.parametrize(
    "tokens, weights, message",
    [
        (TOKENS[:4], WEIGHTS, r"weights must have shape \(H, 4, 4\)"),
        (TOKENS, WEIGHTS[0, 0], "weights must have shape"),
        (TOKENS, -WEIGHTS, "weights must lie between 0 and 1"),
        (TOKENS, WEIGHTS * np.nan, "weights must lie between 0 and 1"),
    ],
)
def test_the_page_names_mistakes(tmp_path, tokens, weights, message):
    with pytest.raises(ValueError, match=message):
        plot.html(tokens, weights, tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


def in_browser(path, fragment, *options):
    """What a headless browser makes of the page."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium is installed")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={path.parent / 'profile'}", *options]
    run = subprocess.run([*command, f"file://{path}#{fragment}"], capture_output=True, text=True, timeout=600)
    if run.returncode:
        pytest.skip(f"Chromium does not run here: {run.stderr[-200:]}")
    return run.stdout


class Spans(html.parser.HTMLParser):
    """Text and attributes of the tokens of a rendered page."""

    def __init__(self, text):
        super().__init__()
        self.spans, self.title, self._open = [], "", None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self._open = tag
        if tag == "span":
            self.spans.append(["", dict(attributes)])

    def handle_endtag(self, tag):
        self._open = None

    def handle_data(self, data):
        if self._open == "span":
            self.spans[-1][0] += data
        if self._open == "title":
            self.title += data


def test_the_page_shows_the_weights_of_a_head_and_a_token(tmp_path):
    path = plot.html(TOKENS, WEIGHTS, tmp_path / "page.html", title="a page")
    page = Spans(in_browser(path, "head=2&query=1", "--dump-dom"))
    assert page.title == "a page" and [text for text, _ in page.spans] == TOKENS
    shown = [float(attributes["data-weight"]) for _, attributes in page.spans]
    np.testing.assert_allclose(shown, WEIGHTS[2, 1], atol=1e-4)
    assert ["chosen" in attributes.get("class", "") for _, attributes in page.spans] == [False, True, False, False, False]
    brightness = [sum(map(int, re.findall(r"\d+", re.search(r"background-color: (rgb\([^)]*\))", a["style"])[1]))) for _, a in page.spans]
    np.testing.assert_array_equal(np.argsort(brightness), np.argsort(-WEIGHTS[2, 1]))


def test_the_page_shows_the_mean_of_heads_over_other_keys(tmp_path):
    keys = ["k0", "k1", "k2", "k3", "k4"]
    path = plot.html(TOKENS, WEIGHTS, tmp_path / "page.html", keys=keys)
    page = Spans(in_browser(path, "query=0", "--dump-dom"))
    assert [text for text, _ in page.spans] == TOKENS + keys
    shown = [float(attributes["data-weight"]) for _, attributes in page.spans[5:]]
    np.testing.assert_allclose(shown, WEIGHTS[:, 0].mean(axis=0), atol=1e-4)


@pytest.fixture
def pyplot():
    matplotlib = pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    matplotlib.use("agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


def test_heatmap(pyplot):
    ax = plot.heatmap(WEIGHTS[0], queries=TOKENS, keys=TOKENS)
    np.testing.assert_array_equal(ax.images[0].get_array(), WEIGHTS[0])
    assert [label.get_text() for label in ax.get_yticklabels()][3] == r"\$x\$ & " + '"quoted"'
    assert plot.heatmap(WEIGHTS[1], ax=ax) is ax
    with pytest.raises(ValueError, match="weights must have 2 axes"):
        plot.heatmap(WEIGHTS)
    with pytest.raises(ValueError, match="keys must have 5 texts; got 2"):
        plot.heatmap(WEIGHTS[0], keys=["a", "b"])


def test_heads_share_a_scale(pyplot):
    figure = plot.heads(WEIGHTS, columns=2)
    pictures = [ax.images[0] for ax in figure.axes if ax.images]
    assert len(pictures) == 3 and {picture.get_clim() for picture in pictures} == {(0, float(WEIGHTS.max()))}
    assert [ax.get_title() for ax in figure.axes if ax.images] == ["head 0", "head 1", "head 2"]


def test_segments_are_told_apart_without_colour(pyplot):
    mass = np.full((4, 20), 0.05)
    ax = plot.segments(mass, names=[f"document {n}" for n in range(20)])
    bars = [(container[0].get_facecolor(), container[0].get_hatch() or "") for container in ax.containers]
    assert len(set(bars)) == 20
    assert max(bar.get_x() + bar.get_width() for container in ax.containers for bar in container) == pytest.approx(1)
    with pytest.raises(ValueError, match="names must have one for each of 20 segments; got 1"):
        plot.segments(mass, names=["a"])
    ax.figure.canvas.draw()
