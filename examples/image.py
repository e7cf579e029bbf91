"""Neighbourhood attention over the patches of an image, beside full attention, as a picture.

    python examples/image.py                       # a photograph that comes with matplotlib; writes image.png
    python examples/image.py --image my.png --size 96 --window 15

Non-local means (Buades, Coll and Morel, 2005) is attention: every pixel becomes the mean of all pixels, weighted by how alike the
patches around them are. Queries and keys are patches, values are pixels; the squared distance of the paper is a dot product when each key
carries the square of its length, as a bias would. Here it takes the noise out of an image twice: among all pixels, and among
those of a window around each (``BlockMask.neighborhood``; Hassani et al., "Neighborhood Attention Transformer", 2022).

The picture shows the clean image, the noisy one, both results, and what one pixel attends to in each. No weights are trained here, so that
nothing follows about networks; it says what a window costs and what it saves, on one image. Needs matplotlib (extra ``plot``).
"""

import argparse
import sys
from pathlib import Path
from time import perf_counter

import numpy as np

import fastattn
from fastattn import BlockMask


def patches(image, radius):
    """The neighbourhood of each pixel of (height, width, channels): rows (height * width, (2 radius + 1)**2 * channels)."""
    padded = np.pad(image, [(radius, radius), (radius, radius), (0, 0)], mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * radius + 1, 2 * radius + 1), axis=(0, 1))
    return windows.reshape(image.shape[0] * image.shape[1], -1).astype(np.float32)


def queries_and_keys(rows, sharpness):
    """Rows whose products are ``-sharpness * squared distance``, but for what is the same for all keys of a query."""
    square = (rows**2).sum(axis=1, keepdims=True)
    one = np.ones_like(square)
    return np.hstack([2 * sharpness * rows, -sharpness * one]), np.hstack([rows, square])


def denoised(q, k, image, mask=None):
    """The image by attention of its patches, and the seconds that it took."""
    values = image.reshape(len(q), -1)
    start = perf_counter()
    out = fastattn.attention(q[None], k[None], values[None], scale=1.0, mask=mask)
    return out[0].reshape(image.shape), perf_counter() - start


def quality(image, clean):
    """Peak signal-to-noise ratio, in decibels."""
    return -10 * np.log10(np.mean((image - clean) ** 2))


def load(path, size):
    """A square of an image with values in [0, 1], (size, size, 3): the middle of it, averaged down."""
    import matplotlib.cbook
    import matplotlib.pyplot as plt

    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") if path is None else open(path, "rb") as file:
        image = plt.imread(file, format=None if path is None else path.suffix[1:]).astype(np.float32)
    image = image[..., None].repeat(3, 2) if image.ndim == 2 else image[..., :3]
    image = image / (255 if image.max() > 1 else 1)
    step = min(image.shape[:2]) // size
    if step < 1:
        raise ValueError(f"the image is smaller than {size} pixels")
    top, left = ((n - step * size) // 2 for n in image.shape[:2])
    square = image[top : top + step * size, left : left + step * size]
    return square.reshape(size, step, size, step, 3).mean(axis=(1, 3))


def draw(path, clean, noisy, results, weights, pixel):
    """The picture: images above, and below what the pixel attends to."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(12, 6.4), layout="constrained")
    titles = ["clean", f"noisy, {quality(noisy, clean):.1f} dB"]
    titles += [f"{name}: {quality(image, clean):.1f} dB, {1e3 * seconds:.0f} ms" for name, (image, seconds) in results.items()]
    for ax, image, title in zip(axes[0], [clean, noisy, *(image for image, _ in results.values())], titles):
        ax.imshow(image.clip(0, 1), interpolation="nearest")
        ax.set_title(title, fontsize=10)
    for ax, (name, row) in zip(axes[1, 2:], weights.items()):
        ax.imshow(row, cmap="Greys", interpolation="nearest", vmax=np.sort(row.reshape(-1))[-2])  # the pixel itself is the largest
        ax.plot(*pixel[::-1], "+", color="C1", markersize=12)
        ax.set_title(f"{name}: what + attends to", fontsize=10)
    for ax in axes.flat:
        ax.set_axis_off()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse_arguments(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--image", type=Path, metavar="FILE", help="a PNG or JPEG file; default: a photograph of matplotlib's")
    parser.add_argument("--size", type=int, default=128, metavar="N", help="pixels of a side, each a query")
    parser.add_argument("--window", type=int, default=21, metavar="N", help="pixels of a side that each one sees")
    parser.add_argument("--noise", type=float, default=0.08, metavar="S", help="standard deviation of what is added")
    parser.add_argument("--output", type=Path, default=Path("image.png"), metavar="FILE")
    arguments = parser.parse_args(argv)
    if not 8 <= arguments.size <= 1024 or not 1 <= arguments.window <= arguments.size or not 0 < arguments.noise < 10:
        parser.error("--size must be 8 to 1024, --window 1 to the size, --noise above 0")
    return arguments


def main(argv=None):
    """Run the program."""
    arguments = parse_arguments(argv)
    size = arguments.size
    clean = load(arguments.image, size)
    noisy = clean + arguments.noise * np.random.default_rng(0).standard_normal(clean.shape, dtype=np.float32)
    rows = patches(noisy, radius=2)
    q, k = queries_and_keys(rows, 0.5 / (rows.shape[1] * (0.7 * arguments.noise) ** 2))  # patches differ by 2 n noise**2 as it is
    mask = BlockMask.neighborhood((size, size), window=arguments.window, block_size=64)
    denoised(q, k, noisy, mask)  # the first call is slower
    results = {"full": denoised(q, k, noisy), "window": denoised(q, k, noisy, mask)}
    print(f"{size} x {size} pixels, patches of 5 x 5, a window of {arguments.window} x {arguments.window}")
    print(f"  noisy   {quality(noisy, clean):5.1f} dB")
    for name, (image, seconds) in results.items():
        print(f"  {name:7} {quality(image, clean):5.1f} dB  {1e3 * seconds:8.1f} ms")
    print(f"  the window's blocks are {100 * mask.density:.1f} % of all")
    pixel = size // 2, size // 2
    row = pixel[0] * size + pixel[1]
    maps = {
        name: fastattn.attention_weights(q[None], k[None], rows=row, scale=1.0, mask=rule)[0, 0].reshape(size, size)
        for name, rule in (("full", None), ("window", mask))
    }
    draw(arguments.output, clean, noisy, results, maps, pixel)
    print(f"picture in {arguments.output}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as failure:
        sys.exit(f"image.py: {failure}")
    except KeyboardInterrupt:
        sys.exit(130)
