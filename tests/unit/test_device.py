"""The algebra stays on the device of its inputs."""

import dataclasses

import pytest
import torch

from skipless.algebra.rounding import round_stream
from skipless.algebra.stream import column_order
from skipless.architecture.seams import Seam
from skipless.removals import forecast
from skipless.removals.columns import OpenStream, modules
from skipless.removals.merge import merge
from tests.seams import gaussian_layer

DTYPES = ("bfloat16", "float32")


def close(seam, affines, way, dtype):
    opened = OpenStream(seam, affines)
    stream = opened.close(opened.basis(way))
    forecasts = opened.forecast(DTYPES, {way: opened.basis(way)})
    rounded = round_stream(stream, opened.weights, opened.extra_weights, {"o": dtype, "rest": dtype})
    widths = {name: affines[name].weight.shape[1] for name in seam.readers}
    return modules(seam, way, rounded, widths), column_order(rounded), forecasts


def closings():
    for condition in (None, 1e5):
        seam, affines = gaussian_layer(width=48, biased=True, condition=condition)
        for way in seam.identities:
            for dtype in (torch.bfloat16, torch.float32):
                yield seam, affines, way, dtype


def test_no_tensor_is_made_where_torch_makes_them_by_default():
    """A tensor on the meta device has no numbers: whatever touched one would fail or be one."""
    for seam, affines, way, dtype in closings():
        expected, order, forecasts = close(seam, affines, way, dtype)
        with torch.device("meta"):
            found, found_order, found_forecasts = close(seam, affines, way, dtype)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name].weight, affine.weight) for name, affine in expected.items())
        assert torch.equal(found_order, order)
        assert found_forecasts == forecasts
        p = Seam("p", 0, 48, ("o",), ("q_proj", "k_proj"), {"p": ("o",)}, 0)
        with torch.device("meta"):
            assert merge(p, affines)["k_proj"].weight.device.type == "cpu"
            assert forecast(p, affines, DTYPES).original["bfloat16"]["m"] > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device that torch finds")
def test_a_cuda_device_gives_the_same():
    for seam, affines, way, dtype in closings():
        expected, order, forecasts = close(seam, affines, way, dtype)
        moved = {
            name: dataclasses.replace(affine, weight=affine.weight.cuda(), bias=affine.bias.cuda())
            for name, affine in affines.items()
        }
        found, found_order, found_forecasts = close(seam, moved, way, dtype)
        assert all(affine.weight.is_cuda for affine in found.values())
        assert torch.equal(found_order.cpu(), order)
        for name in DTYPES:
            assert found_forecasts.ways[way].errors[name] == pytest.approx(forecasts.ways[way].errors[name], rel=1e-3)
        for name, affine in expected.items():
            difference = torch.linalg.norm(found[name].weight.cpu() - affine.weight) / torch.linalg.norm(affine.weight)
            assert difference < 4 * torch.finfo(dtype).eps
