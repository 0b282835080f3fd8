"""What is predicted is what is measured."""

import pytest
import torch

from skipless.eliminate import Affine, merge
from skipless.prediction import OpenStream, forecast, letter
from skipless.rounding import HALF, round_stream
from skipless.seams import Seam
from tests.seams import gaussian_layer, outputs, relative_errors

DTYPES = ("bfloat16", "float16", "float32")
in_each_dtype = pytest.mark.parametrize("name", DTYPES)


def cast(affine, dtype):
    return Affine(affine.weight.to(dtype).double())


@in_each_dtype
def test_what_the_dtype_does_to_the_original(name):
    seam, affines = gaussian_layer(width=192)
    dtype = getattr(torch, name)
    measured = relative_errors(affines, {module: cast(affine, dtype) for module, affine in affines.items()})
    predicted = forecast(seam, affines, [name]).original[name]
    assert {letter(module): pytest.approx(error, rel=0.05) for module, error in measured.items()} == predicted


@in_each_dtype
@pytest.mark.parametrize("way", ["q", "pivoted"])
@pytest.mark.parametrize("condition", [None, 30.0, 1e4], ids=["Gaussian", "well-conditioned Q", "ill-conditioned Q"])
@pytest.mark.parametrize("rows", [None, 100], ids=["full rank", "few rows"])
def test_what_closing_a_seam_does(name, way, condition, rows):
    seam, affines = gaussian_layer(width=192, condition=condition, rows=rows, seed=1)
    dtype = getattr(torch, name)
    opened = OpenStream(seam, affines)
    stream = opened.close(opened.basis(way))
    if dtype in HALF:
        rounded = round_stream(stream, opened.weights, opened.dual_weights, {"o": dtype, "rest": dtype})
        measured = outputs(rounded, affines)
    else:
        measured = outputs(stream, affines, o=cast(stream.writers["o"], dtype), rest=cast(stream.rest, dtype))
    predicted = forecast(seam, affines, [name], [way]).ways[way].errors[name]
    assert {letter(module): pytest.approx(error, rel=0.2) for module, error in measured.items()} == predicted

    plain = outputs(stream, affines, o=cast(stream.writers["o"], dtype), rest=cast(stream.rest, dtype))
    if dtype in HALF and condition != 30:
        assert max(plain.values()) > 1.5 * max(predicted.values())  # a cast without feedback is not what is predicted


@in_each_dtype
def test_what_merging_p_does(name):
    generator = torch.Generator().manual_seed(0)
    shapes = {"o_proj": (64, 96), "gate_proj": (96, 128), "up_proj": (96, 128)}
    affines = {
        module: Affine(torch.randn(*shape, generator=generator, dtype=torch.float64))
        for module, shape in shapes.items()
    }
    seam = Seam("p", 0, 96, ("o_proj",), ("gate_proj", "up_proj"), {"p": ("o_proj",)}, 0)
    dtype = getattr(torch, name)

    def joined(affines):
        return torch.cat([affine.weight for affine in affines.values()], 1)

    exact, rounded = merge(seam, affines), {module: cast(affine, dtype) for module, affine in affines.items()}
    predicted = forecast(seam, affines, [name])
    for found, error in (
        (joined({module: cast(affine, dtype) for module, affine in exact.items()}), predicted.ways["p"].errors),
        (joined(merge(seam, rounded)), predicted.original),
    ):
        difference = torch.linalg.norm(found - joined(exact)) / torch.linalg.norm(joined(exact))
        assert error[name] == {"m": pytest.approx(difference.item(), rel=0.05)}


def test_a_problem_is_an_error_beyond_the_tolerance():
    seam, affines = gaussian_layer(width=64, condition=1e5)
    found = forecast(seam, affines, DTYPES)
    assert all(found.problem("pivoted", name) is None for name in DTYPES)
    problem = found.problem("q", "float16")
    assert problem.startswith("layer 0 by q in float16: ")
    assert problem.endswith("(the original: 3.0e-04)")
    good, affines = gaussian_layer(width=64, condition=1.5)
    assert forecast(good, affines, DTYPES).problem("q", "float32") is None


def test_a_basis_that_cannot_be_used_has_infinite_errors():
    seam, affines = gaussian_layer(width=64, condition=1e9)
    found = forecast(seam, affines, DTYPES)
    assert all(found.ways["q"].worst(name) == float("inf") for name in DTYPES)
    assert "layer 0 cannot be rewritten by q: the condition number is 6.8e+09" in found.problem("q", "float32")
    assert found.problem("pivoted", "bfloat16") is None


@pytest.mark.parametrize("zero", ["o", "q_proj", "k_proj", "all"])
def test_of_nothing_nothing_is_lost(zero):
    seam, affines = gaussian_layer(width=64)
    for name in affines if zero == "all" else [zero]:
        affines[name].weight[:] = 0
    found = forecast(seam, affines, DTYPES)
    for errors in (found.original, found.ways["pivoted"].errors):
        for name in DTYPES:
            assert all(error == error for error in errors[name].values())
            assert zero in ("o", "all") or errors[name][letter(zero)] in (0.0, float("inf"))
