"""What is predicted is what is measured."""

import dataclasses

import pytest
import torch

from skipless.algebra import rounding
from skipless.algebra.affine import Affine
from skipless.algebra.forecast import PROBES, letter
from skipless.algebra.rounding import HALF, Rest, round_seam, round_stream
from skipless.architecture.seams import Seam
from skipless.errors import BugError
from skipless.removals import columns, forecast
from skipless.removals.columns import OpenStream
from skipless.removals.merge import merge
from tests.seams import READERS, apply, gaussian_layer, outputs, relative_errors
from tests.seams import error as relative_error

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
        rounded = round_stream(stream, opened.weights, opened.extra_weights, {"o": dtype, "rest": dtype})
        measured = outputs(rounded, affines)
    else:
        measured = outputs(stream, affines, o=cast(stream.writers["o"], dtype), rest=cast(stream.rest, dtype))
    predicted = forecast(seam, affines, [name], [way]).ways[way].errors[name]
    assert {letter(module): pytest.approx(error, rel=0.2) for module, error in measured.items()} == predicted

    plain = outputs(stream, affines, o=cast(stream.writers["o"], dtype), rest=cast(stream.rest, dtype))
    if dtype in HALF and condition != 30:
        assert max(plain.values()) > 1.5 * max(predicted.values())  # a cast without feedback is not what is predicted


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
@pytest.mark.parametrize("way", ["q", "pivoted"])
def test_columns_of_different_power(name, way):
    """As trained streams have: which column goes last, and makes up for no other, depends on it."""
    seam, affines = gaussian_layer(width=192, seed=1)
    for reader in seam.readers:
        sizes = torch.logspace(-1.5, 1.5, affines[reader].weight.shape[1], dtype=torch.float64)
        affines[reader] = Affine(affines[reader].weight * sizes)
    opened, dtype = OpenStream(seam, affines), getattr(torch, name)
    stream = opened.close(opened.basis(way))
    dtypes = {"o": dtype, "rest": dtype}
    measured = outputs(round_stream(stream, opened.weights, opened.extra_weights, dtypes), affines)
    predicted = forecast(seam, affines, [name], [way]).ways[way].errors[name]
    assert {letter(module): pytest.approx(error, rel=0.2) for module, error in measured.items()} == predicted


@in_each_dtype
@pytest.mark.parametrize("way", ["q", "pivoted"])
def test_what_a_parallel_layer_loses(name, way):
    """M reads the stream, too, and takes the basis in: M* = S^-1 M, rounded as the rest is."""
    seam, affines = gaussian_layer(width=128, seed=2)
    generator, dtype = torch.Generator().manual_seed(3), getattr(torch, name)
    affines["up_proj"] = Affine(torch.randn(128, 300, generator=generator, dtype=torch.float64))
    seam = dataclasses.replace(seam, followers=("up_proj",))
    opened = OpenStream(seam, affines)
    basis = opened.basis(way)
    stream, m = opened.close(basis), basis.solve(affines["up_proj"].weight)
    written, read = stream.writers["o"].weight, [stream.rest.weight, m]
    if dtype in HALF:
        weights = (opened.weights[stream.others], opened.extra_weights)
        rests = [Rest(matrix, weight, dtype) for matrix, weight in zip(read, weights, strict=True)]
        (written,), read = round_seam([written], rests, opened.weights[stream.kept], [dtype])
    written, rest, m = (matrix.to(dtype).double() for matrix in (written, *read))
    measured = outputs(stream, affines, o=Affine(written), rest=Affine(rest))
    measured = {letter(module): error for module, error in measured.items()}
    measured["m"] = relative_error(written @ m, affines["o"].weight @ affines["up_proj"].weight)
    predicted = forecast(seam, affines, [name], [way]).ways[way].errors[name]
    assert {module: pytest.approx(found, rel=0.2) for module, found in measured.items()} == predicted


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_what_biases_past_gains_lose(name):
    """Those that move into the stream, and out of it again in what else reads it; each is one draw of rounding errors,
    so the mean square of several models is compared.
    """
    way, dtype, squares, foretold = "pivoted", getattr(torch, name), torch.zeros(4), torch.zeros(4)
    for seed in range(8):
        seam, affines = gaussian_layer(width=96, seed=seed, biased=True)
        generator = torch.Generator().manual_seed(100 + seed)
        affines["o"] = dataclasses.replace(affines["o"], scale=-0.4)
        weight, bias = (0.1 * torch.randn(*shape, generator=generator).double() for shape in ((96, 200), (200,)))
        affines["up_proj"] = Affine(weight, bias, scale=2.5)
        seam = dataclasses.replace(seam, followers=("up_proj",))
        opened, dtypes = OpenStream(seam, affines), dict.fromkeys(("o", "up_proj", "rest"), dtype)
        basis = opened.basis(way)
        stream = opened.close(basis)
        opened.check(way, basis, stream)
        rounded = round_stream(stream, opened.weights, opened.extra_weights, dtypes)
        measured = opened.measure(way, basis.condition, rounded, dtypes, name)
        predicted = forecast(seam, affines, [name], [way])
        assert measured.original[name] == pytest.approx(predicted.original[name], rel=0.05)
        squares += torch.tensor([*measured.ways[way].errors[name].values()]) ** 2
        foretold += torch.tensor([*predicted.ways[way].errors[name].values()]) ** 2
    assert torch.allclose(squares.sqrt(), foretold.sqrt(), rtol=0.15)
    for module in ("o", "up_proj"):
        others = {**affines, module: dataclasses.replace(affines[module], scale=1.0)}
        with pytest.raises(BugError, match="closing the stream seam to change nothing"):
            opened.check(way, basis, OpenStream(seam, others).close(basis))


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
    assert problem.endswith("(the original's: 3.0e-04)")
    good, affines = gaussian_layer(width=64, condition=1.5)
    assert forecast(good, affines, DTYPES).problem("q", "float32") is None


def test_a_basis_that_cannot_be_used_has_infinite_errors():
    seam, affines = gaussian_layer(width=64, condition=1e9)
    found = forecast(seam, affines, DTYPES)
    assert all(found.ways["q"].worst(name) == float("inf") for name in DTYPES)
    assert "layer 0 cannot be rewritten by q: the condition number is 6.8e+09" in found.problem("q", "float32")
    assert found.problem("pivoted", "bfloat16") is None


@pytest.mark.parametrize("zero", ["o", "q_proj", "k_proj"])
def test_of_nothing_nothing_is_lost(zero):
    seam, affines = gaussian_layer(width=64)
    affines[zero].weight[:] = 0
    found = forecast(seam, affines, DTYPES)
    lost = {"q", "k", "v"} if zero == "o" else {letter(zero)}
    for name in DTYPES:
        if zero == "q_proj":  # k and v alone are too few
            assert found.ways["pivoted"].worst(name) == float("inf")
        else:
            assert {key for key, error in found.ways["pivoted"].errors[name].items() if error == 0} == lost
        assert {key for key, error in found.original[name].items() if error == 0} == lost


def tied_layer(width, condition=None, seed=0):
    """A seam whose writer is a table that the head reads transposed, through the last O."""
    seam, affines = gaussian_layer(width=width, condition=condition, seed=seed)
    seam = dataclasses.replace(seam, duals=("last",))
    generator = torch.Generator().manual_seed(seed + 100)
    last = torch.randn(3 * width, width, generator=generator, dtype=torch.float64) / (3 * width) ** 0.5
    return seam, {**affines, "last": Affine(last)}


@in_each_dtype
@pytest.mark.parametrize("way", ["q", "pivoted"])
@pytest.mark.parametrize("condition", [30.0, 1e4])
def test_what_closing_a_seam_does_to_a_tied_head(name, way, condition):
    seam, affines = tied_layer(128, condition)
    dtype = getattr(torch, name)
    opened = OpenStream(seam, affines)
    stream = opened.close(opened.basis(way))
    if dtype in HALF:
        dtypes = {"o": dtype, "rest": dtype, "last": dtype}
        stream = round_stream(stream, opened.weights, opened.extra_weights, dtypes)
    table, dual = cast(stream.writers["o"], dtype).weight, cast(stream.duals["last"], dtype).weight
    exact = affines["last"].weight @ affines["o"].weight.T
    measured = torch.linalg.norm(dual @ table.T - exact) / torch.linalg.norm(exact)
    found = forecast(seam, affines, [name], [way])
    assert found.ways[way].errors[name]["logits"] == pytest.approx(measured.item(), rel=0.2)
    own = cast(affines["last"], dtype).weight @ cast(affines["o"], dtype).weight.T
    own_measured = torch.linalg.norm(own - exact) / torch.linalg.norm(exact)
    assert found.original[name]["logits"] == pytest.approx(own_measured.item(), rel=0.05)


def test_pivoted_columns_must_be_well_conditioned_where_a_tied_head_is_rewritten():
    """R stays small whatever their condition number is, S^-1 O^T does not."""
    seam, affines = tied_layer(64)
    for name in seam.readers:
        affines[name].weight[0] *= 1e-8
    found = forecast(seam, affines, DTYPES)
    assert "cannot be rewritten by pivoted: the condition number is" in found.problem("pivoted", "float32")
    untied = dataclasses.replace(seam, duals=())
    assert forecast(untied, affines, DTYPES).problem("pivoted", "float32") is None


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
@pytest.mark.parametrize("rows", [None, 100], ids=["full rank", "few rows"])
def test_a_rest_in_fp32(name, rows):
    seam, affines = gaussian_layer(width=192, rows=rows, seed=1)
    dtype = getattr(torch, name)
    opened = OpenStream(seam, affines)
    stream = opened.close(opened.basis("pivoted"))
    dtypes = {"o": dtype, "rest": torch.float32}
    measured = outputs(round_stream(stream, opened.weights, opened.extra_weights, dtypes), affines)
    predicted = forecast(seam, affines, [name], ["pivoted"], "float32").ways["pivoted"].errors[name]
    assert {letter(module): pytest.approx(error, rel=0.2) for module, error in measured.items()} == predicted
    in_half = forecast(seam, affines, [name], ["pivoted"]).ways["pivoted"].errors[name]
    assert max(predicted.values()) < 0.9 * max(in_half.values())


@pytest.mark.parametrize(("scale_o", "scale_readers"), [(1e-4, 1.0), (1.0, 1e-4), (1e-4, 1e-2)])
def test_numbers_too_small_for_fp16(scale_o, scale_readers):
    """They are a loss, which the original's own does not excuse: that is what rounding alone would cost it."""
    seam, affines = gaussian_layer(width=128, condition=20.0)
    own = relative_errors(affines, {module: cast(affine, torch.float16) for module, affine in affines.items()})
    assert forecast(seam, affines, ["float16"]).problem("pivoted", "float16") is None
    for name, affine in affines.items():
        affine.weight.mul_(scale_o if name == "o" else scale_readers)
    opened = OpenStream(seam, affines)
    found = forecast(seam, affines, ["float16"])
    for name, error in own.items():
        assert found.original["float16"][letter(name)] == pytest.approx(error, rel=0.15)
    assert "by pivoted in float16: the relative error of" in found.problem("pivoted", "float16")
    for way in ("q", "pivoted"):
        stream = opened.close(opened.basis(way))
        dtypes = {"o": torch.float16, "rest": torch.float16}
        measured = outputs(round_stream(stream, opened.weights, opened.extra_weights, dtypes), affines)
        for name, error in measured.items():
            assert found.ways[way].errors["float16"][letter(name)] == pytest.approx(error, rel=0.3)


def test_numbers_too_large_for_fp16():
    seam, affines = gaussian_layer(width=64)
    affines["o"].weight.mul_(1e4)
    affines["q_proj"].weight.mul_(1e2)
    found = forecast(seam, affines, DTYPES)
    assert found.problem("q", "float16") == "layer 0 by q: there are numbers larger than float16 can hold"
    assert "larger than float16" in found.problem("pivoted", "float16")
    assert found.problem("pivoted", "bfloat16") is None


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@in_each_dtype
@pytest.mark.parametrize("way", ["q", "pivoted"])
def test_a_sample_measures_what_the_whole_loses(tied, biased, name, way):
    seam, affines = tied_layer(96) if tied else gaussian_layer(width=96, biased=biased)
    dtype = getattr(torch, name)
    opened = OpenStream(seam, affines)
    basis = opened.basis(way)
    stream = opened.close(basis)
    dtypes = dict.fromkeys(("o", "rest", "last"), dtype)
    if dtype in HALF:
        stream = round_stream(stream, opened.weights, opened.extra_weights, dtypes)
    measured = opened.measure(way, basis.condition, stream, dtypes, name)
    expected = opened.forecast([name], {way: basis})
    for kind in (measured.original[name], measured.ways[way].errors[name]):
        assert set(kind) == {"q", "k", "v"} | ({"logits"} if tied else set())
    if not biased:
        assert measured.original[name] == pytest.approx(expected.original[name], rel=0.1)
        assert measured.ways[way].errors[name] == pytest.approx(expected.ways[way].errors[name], rel=0.3)
    for module, error in expected.ways[way].errors[name].items():
        assert error / 2 < measured.ways[way].errors[name][module] < 2 * error
    spoiled = dataclasses.replace(stream, rest=Affine(1.1 * stream.rest.weight, stream.rest.bias))
    assert opened.measure(way, basis.condition, spoiled, dtypes, name).ways[way].errors[name]["k"] > 0.05


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
@pytest.mark.parametrize("way", ["q", "pivoted"])
def test_no_row_is_rounded_that_is_not_measured(name, way, monkeypatch):
    """What is said is the same, to the bit, as when all of them are."""
    seam, affines = gaussian_layer(width=96, rows=2000, seed=1)
    block, sizes = rounding._round_block, []

    def counted(exact, *others):
        sizes.append(exact.shape[1] if len(exact) == seam.width else 0)  # else a part of what was counted
        block(exact, *others)

    def foretold():
        sizes.clear()
        return forecast(seam, affines, [name], [way]).ways[way].errors[name], sum(sizes)

    monkeypatch.setattr(rounding, "_round_block", counted)
    sampled, few = foretold()
    monkeypatch.setattr(OpenStream, "by_rows", affines)
    whole, all_rows = foretold()
    assert sampled == whole
    assert all_rows - few == 2000 - PROBES
    monkeypatch.setattr(columns, "PROBES", PROBES - 1)
    assert foretold()[0] != whole


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
@pytest.mark.parametrize("table", [False, True])
def test_biases_count_beside_what_is_read(name, table):
    """That is one row of a table, else the sum of all rows, times inputs of variance 1: biases are small beside it."""
    seam, affines = gaussian_layer(width=256, rows=512, biased=True)
    affines["o"] = dataclasses.replace(affines["o"], table=table)
    dtype, generator = getattr(torch, name), torch.Generator().manual_seed(1)
    x = torch.eye(512).double() if table else torch.randn(512, 512, generator=generator, dtype=torch.float64)
    for module in READERS:
        affines[module].bias.mul_(1 if table else 20)
    rounded = {
        module: dataclasses.replace(cast(affine, dtype), bias=affine.bias.to(dtype).double())
        for module, affine in affines.items()
    }
    measured = {}
    for module in READERS:
        exact, found = (apply(apply(x, each["o"]), each[module]) for each in (affines, rounded))
        lost, size = (
            torch.linalg.norm(each) for each in (found - exact, x @ affines["o"].weight @ affines[module].weight)
        )
        measured[letter(module)] = (lost / size).item()
    opened = OpenStream(seam, affines)
    assert opened.forecast([name], {}).original[name] == pytest.approx(measured, rel=0.15)
    opened.bias_scale = 512**-0.5 if table else 1.0
    assert opened.forecast([name], {}).original[name] != pytest.approx(measured, rel=0.3)
