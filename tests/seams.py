"""One stream seam, made of random matrices: O (n, d), written in, and Q, K, V read from it."""

import torch

from skipless.algebra.affine import Affine
from skipless.algebra.stream import Stream
from skipless.architecture.seams import Seam

READERS = ("q_proj", "k_proj", "v_proj")


def gaussian_layer(width, rows=None, seed=0, condition=None, biased=False):
    """A seam of GQA 4:1 and its modules; Gaussian, the least singular value of Q made to fit a condition number."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * shape[0] ** -0.5

    q = draw(width, width)
    if condition is not None:
        left, values, right = torch.linalg.svd(q)
        values[-1] = values[0] / condition
        q = left * values @ right
    weights = [draw(rows or 3 * width, width), q, draw(width, width // 4), draw(width, width // 4)]
    affines = {
        name: Affine(weight, 0.1 * draw(1, weight.shape[1])[0] if biased else None)
        for name, weight in zip(("o", *READERS), weights, strict=True)
    }
    identities = {"q": ("q_proj",), "pivoted": READERS}
    seam = Seam("stream", 0, width, ("o",), READERS, identities, width**2, ("o",), rest="rest", order="order")
    return seam, affines


def apply(x, affine):
    return x @ affine.weight.double() + (0 if affine.bias is None else affine.bias)


def relative_errors(affines, other, x=None):
    """Relative errors of q, k and v computed with other modules, for one-hot inputs: every row of O alike."""
    x = torch.eye(len(affines["o"].weight), dtype=torch.float64)
    return {
        name: error(apply(apply(x, other["o"]), other[name]), apply(apply(x, affines["o"]), affines[name]))
        for name in READERS
    }


def outputs(stream: Stream, affines, **changes):
    """The same for a closed seam; changes: other modules for "o" and "rest"."""
    x = torch.eye(len(affines["o"].weight), dtype=torch.float64)
    written = apply(x, changes.get("o", stream.writers["o"]))
    read = apply(written, changes.get("rest", stream.rest))
    joined = torch.cat([written, read], 1)[:, torch.cat([stream.kept, stream.others]).argsort()]
    parts = joined.split([affines[name].weight.shape[1] for name in READERS], 1)
    return {
        name: error(part, apply(apply(x, affines["o"]), affines[name]))
        for name, part in zip(READERS, parts, strict=True)
    }


def error(found, exact):
    """Relative error in the Frobenius norm; of zeros, absolute."""
    return (torch.linalg.norm(found - exact) / (torch.linalg.norm(exact) or 1)).item()
