"""Rounding with feedback: does what its formulas say, and holds the errors of q, k, v near the original's own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skipless.algebra import rounding
from skipless.algebra.affine import Affine
from skipless.algebra.basis import Basis, pivot
from skipless.algebra.rounding import (
    Rest,
    factorize,
    joint_metric,
    moment,
    passed_moment,
    repaired_metric,
    round_both_ways,
    round_passed,
    round_reader,
    round_rows,
    round_seam,
    round_stream,
    rounding_error,
    shrink,
    solve_rest,
)
from skipless.errors import InputError
from skipless.removals.columns import OpenStream
from tests.seams import gaussian_layer, outputs, relative_errors

HALF = [torch.bfloat16, torch.float16]
half = pytest.mark.parametrize("dtype", HALF, ids=["bf16", "fp16"])


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def metric_of(size, seed=0):
    matrix = draw(3 * size, size, seed=seed) @ draw(size, size, seed=seed + 1)
    return matrix.T @ matrix


def cast(matrix, dtype):
    return matrix.to(dtype).double()


@given(size=st.integers(1, 40), seed=st.integers(0, 999))
def test_a_metric_is_factorized_as_upper_triangles(size, seed):
    metric = metric_of(size, seed)
    found = factorize(metric, torch.rand(size, dtype=torch.float64))
    assert torch.equal(found.upper, found.upper.triu())
    assert torch.equal(found.upper.diagonal(), torch.ones(size, dtype=torch.float64))
    product = found.upper * found.pivots @ found.upper.T
    torch.testing.assert_close(product, metric[found.order][:, found.order], rtol=1e-9, atol=1e-9 * metric.max().item())
    torch.testing.assert_close(metric @ found.solve(draw(size, 2)), draw(size, 2), rtol=1e-4, atol=1e-4)


def one_by_one(values, down, across, dtype):
    """round_both_ways as its formula reads: entry (i, j) makes up for all (a <= i, b <= j) before it."""
    exact = values[down.order][:, across.order]
    rounded, error = torch.empty_like(exact), torch.zeros_like(exact)
    for i in range(exact.shape[0]):
        for j in range(exact.shape[1]):
            owed = (down.upper.T @ error @ across.upper)[i, j]
            rounded[i, j] = (exact[i, j] - owed).to(dtype)
            error[i, j] = rounded[i, j] - exact[i, j]
    result = torch.empty_like(values)
    result[down.order[:, None], across.order] = rounded
    return result


@settings(max_examples=20)
@given(rows=st.integers(1, 70), columns=st.integers(1, 70), seed=st.integers(0, 999), dtype=st.sampled_from(HALF))
def test_rounding_in_tiles_is_rounding_one_by_one(rows, columns, seed, dtype):
    values = draw(rows, columns, seed=seed)
    down = factorize(metric_of(rows, seed), torch.ones(rows, dtype=torch.float64))
    across = factorize(metric_of(columns, seed + 7), torch.ones(columns, dtype=torch.float64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding, "TILE", 16)  # so that there are many
        found = round_both_ways(values, down, across, dtype)
    expected = one_by_one(values, down, across, dtype)
    assert found.dtype == dtype
    different = (found != expected).double().mean()  # fp32 against fp64: a value half-way may go either way
    assert different <= 0.01
    assert not torch.equal(found, values.to(dtype)) or min(rows, columns) == 1


@half
def test_the_rounding_error_is_that_of_numbers_spread_over_many_sizes(dtype):
    values = 2.0 ** (8 * torch.rand(10**5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 4)
    found = ((cast(values, dtype) / values - 1) ** 2).mean().sqrt().item()
    assert rounding_error(dtype) == pytest.approx(found, rel=0.01)


@given(rows=st.integers(1, 20), columns=st.integers(1, 70), seed=st.integers(0, 999), dtype=st.sampled_from(HALF))
def test_rows_are_rounded_one_by_one(rows, columns, seed, dtype):
    values, change = draw(rows, columns, seed=seed), 0.1 * draw(columns, columns, seed=seed + 1)
    metric = factorize(metric_of(columns, seed), torch.ones(columns, dtype=torch.float64))
    nothing = factorize(torch.eye(rows, dtype=torch.float64), torch.ones(rows, dtype=torch.float64))
    found = round_rows(values, change, metric, dtype, power := (values**2).mean(0))
    expected = one_by_one(values + values @ change, nothing, metric, dtype)
    assert found.dtype == dtype
    assert (found != expected).double().mean() <= 0.02
    untouched = round_rows(values, change, metric, torch.float32, power)
    torch.testing.assert_close(untouched, values + values @ change, rtol=1e-12, atol=1e-12)


@half
def test_feedback_costs_the_pivots_and_a_plain_cast_the_diagonal(dtype):
    values, metric = draw(200, 64), metric_of(64)
    factors = factorize(metric, (values**2).mean(0))
    found = round_rows(values, torch.zeros(64, 64).double(), factors, dtype, (values**2).mean(0)).double()
    unit, power = rounding_error(dtype) ** 2, (values**2).sum(0)

    def cost(rounded):
        return torch.trace((rounded - values) @ metric @ (rounded - values).T).item()

    with_feedback, plain = unit * (factors.pivots @ power[factors.order]).item(), unit * (metric.diagonal() @ power)
    assert cost(found) == pytest.approx(with_feedback, rel=0.1)
    assert cost(cast(values, dtype)) == pytest.approx(plain.item(), rel=0.1)
    assert with_feedback < 0.5 * plain


def test_the_moment_is_that_of_sums_of_random_rows():
    writers = [draw(3, 5), draw(4, 5, seed=1), draw(2, 5, seed=2)]
    sums = torch.stack([a + b + c for a in writers[0] for b in writers[1] for c in writers[2]])
    torch.testing.assert_close(moment(writers), sums.T @ sums / len(sums))


def test_what_resolving_the_stream_repairs():
    """Min over X' of || [X' - X | X' R' - X R] ||^2 (weighted) is tr(G E N E^T)."""
    x, rest = draw(40, 8), draw(8, 5)
    other = rest + 1e-3 * draw(8, 5, seed=1)
    passed_weights, rest_weights = 1 + torch.rand(8).double(), 1 + torch.rand(5).double()
    left = torch.cat([torch.eye(8).double() * passed_weights.sqrt(), other * rest_weights.sqrt()], 1)
    right = torch.cat([x * passed_weights.sqrt(), x @ rest * rest_weights.sqrt()], 1)
    best = torch.linalg.lstsq(left.T, right.T).solution.T
    least = torch.linalg.norm(best @ left - right) ** 2
    error = other - rest
    repaired = repaired_metric(other, passed_weights, rest_weights)
    torch.testing.assert_close(torch.trace(x.T @ x @ error @ repaired @ error.T), least)

    under = factorize(joint_metric(other, passed_weights, rest_weights), torch.ones(8).double())
    change = (rest - other) @ under.solve(other * rest_weights).T
    torch.testing.assert_close(x + x @ change, best)


def test_the_rest_is_solved_again_for_the_rounded_stream():
    x, rest = draw(40, 8), draw(8, 5)
    rounded = cast(x, torch.bfloat16)
    expected = torch.linalg.lstsq(rounded, x @ rest).solution
    torch.testing.assert_close(solve_rest([x], [rounded], rest), expected, rtol=1e-8, atol=1e-8)
    assert not torch.allclose(rest, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("mean", [0, 1, 5])
def test_the_rest_is_solved_again_for_sums_of_rows(mean):
    """Of two writers, as tokens and positions are; every pair of rows is as likely."""
    exact, rest = [draw(9, 4) + mean, draw(7, 4, seed=1) - mean], draw(4, 3, seed=2)
    rounded = [cast(writer * 1.001, torch.bfloat16) for writer in exact]
    x, y = ((a[:, None] + b[None]).flatten(0, 1) for a, b in (exact, rounded))
    expected = torch.linalg.lstsq(y, x @ rest).solution
    torch.testing.assert_close(solve_rest(exact, rounded, rest), expected, rtol=1e-8, atol=1e-8)
    assert not torch.allclose(rest, expected, rtol=1e-8, atol=1e-8)


def test_shrinking_is_ridge_regression_on_the_noise():
    x = draw(60, 10) @ torch.diag(torch.logspace(0, -6, 10, dtype=torch.float64)) @ draw(10, 10, seed=3)
    rest, metric = 100 * draw(10, 4), moment([x])
    found = shrink(Rest(rest, torch.ones(4).double(), torch.bfloat16), metric, torch.ones(10).double()).matrix
    scale = (2 * len(x) * metric.diagonal()).sqrt() * rounding_error(torch.bfloat16)
    stacked = torch.cat([x, scale.diag()])
    expected = torch.linalg.lstsq(stacked, torch.cat([x @ rest, torch.zeros(10, 4).double()])).solution
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    assert not torch.allclose(found, rest, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@half
@pytest.mark.parametrize(
    ("rest_dtype", "worst"), [(None, 1.5), (torch.float32, 1.11)], ids=["all in half", "rest in fp32"]
)
@pytest.mark.parametrize("seed", range(3))
def test_pivoted_and_rounded_q_k_v_are_as_good_as_the_originals(dtype, rest_dtype, worst, seed):
    seam, affines = gaussian_layer(width=256, seed=seed)
    opened = OpenStream(seam, affines)
    stream = opened.close(opened.basis("pivoted"))
    dtypes = {"o": dtype, "rest": rest_dtype or dtype}
    rounded = round_stream(stream, opened.weights, opened.extra_weights, dtypes)
    assert rounded.writers["o"].weight.dtype == dtype
    own = relative_errors(affines, {name: Affine(cast(affine.weight, dtype)) for name, affine in affines.items()})
    found = outputs(rounded, affines)
    assert max(found[name] / own[name] for name in own) <= worst

    plain = {"o": Affine(cast(stream.writers["o"].weight, dtype)), "rest": Affine(cast(stream.rest.weight, dtype))}
    control = outputs(stream, affines, **plain)
    assert max(control[name] / own[name] for name in own) > 2


@half
def test_by_an_ill_conditioned_q_it_is_ten_times_better_than_a_cast(dtype):
    seam, affines = gaussian_layer(width=256, condition=1e5)
    opened = OpenStream(seam, affines)
    stream = opened.close(opened.basis("q"))
    rounded = round_stream(stream, opened.weights, opened.extra_weights, {"o": dtype, "rest": dtype})
    plain = {"o": Affine(cast(stream.writers["o"].weight, dtype)), "rest": Affine(cast(stream.rest.weight, dtype))}
    found, control = outputs(rounded, affines), outputs(stream, affines, **plain)
    own = relative_errors(affines, {name: Affine(cast(affine.weight, dtype)) for name, affine in affines.items()})
    assert max(control.values()) > 10 * max(found.values())
    assert max(found[name] / own[name] for name in own) < 10


@pytest.mark.parametrize("seed", [2, 3])
def test_a_stream_in_fp32_is_rounded_as_well_as_one_in_fp64(seed):
    """Its change may be multiplied in bf16 only where R does not enlarge what that is off by."""
    o, s, a = draw(384, 128, seed=3 * seed), draw(128, 128, seed=3 * seed + 1), draw(128, 64, seed=3 * seed + 2)
    x, rest = o @ s / 128**0.5, torch.linalg.solve(s, a)
    ones = torch.ones(128).double()

    def lost(writer):
        (writer,), (rounded,) = round_seam([writer], [Rest(rest, ones[:64], torch.bfloat16)], ones, [torch.bfloat16])
        return (writer.double() @ rounded.double() - x @ rest).norm().item()

    assert lost(x.float()) <= 1.05 * lost(x)
    assert (cast(x, torch.bfloat16) @ rest - x @ rest).norm().item() > 2 * lost(x)


@half
@pytest.mark.parametrize("rows", [3, 20, 64], ids=["three tokens", "fewer tokens than dimensions", "as many"])
def test_a_small_vocabulary(dtype, rows):
    seam, affines = gaussian_layer(width=64, rows=rows)
    opened = OpenStream(seam, affines)
    rounded = round_stream(
        opened.close(opened.basis("pivoted")), opened.weights, opened.extra_weights, {"o": dtype, "rest": dtype}
    )
    assert max(outputs(rounded, affines).values()) < 4 * torch.finfo(dtype).eps


@half
@pytest.mark.parametrize("dead", ["o", "k_proj", "a unit"])
def test_dead_weights_stay_dead(dead, dtype):
    """A writer or reader that is zero, or a unit that is never written, as in models fresh from initialization."""
    seam, affines = gaussian_layer(width=64)
    if dead == "a unit":
        affines["o"].weight[:, 5] = 0
    else:
        affines[dead].weight[:] = 0
    opened = OpenStream(seam, affines)
    rounded = round_stream(
        opened.close(opened.basis("pivoted")), opened.weights, opened.extra_weights, {"o": dtype, "rest": dtype}
    )
    found = outputs(rounded, affines)
    assert all(error < 4 * torch.finfo(dtype).eps for error in found.values())
    assert dead != "k_proj" or found["k_proj"] == 0


def test_biases_are_carried_through_rounding():
    seam, affines = gaussian_layer(width=64, biased=True)
    opened = OpenStream(seam, affines)
    stream = opened.close(opened.basis("pivoted"))
    rounded = round_stream(stream, opened.weights, opened.extra_weights, {"o": torch.bfloat16, "rest": torch.bfloat16})
    assert max(outputs(rounded, affines).values()) < 4 * torch.finfo(torch.bfloat16).eps
    assert max(outputs(rounded, affines, o=Affine(rounded.writers["o"].weight)).values()) > 0.1


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("factor", [1, 100], ids=["small R", "large R"])
def test_what_is_rounded_stays_as_it_was(transposed, factor):
    x, rest = draw(20, 8).T.contiguous().T if transposed else draw(20, 8), factor * draw(8, 5)
    before = x.clone(), rest.clone()
    round_seam([x], [Rest(rest, torch.ones(5).double(), torch.bfloat16)], torch.ones(8).double(), HALF[:1])
    assert torch.equal(x, before[0])
    assert torch.equal(rest, before[1])


def test_numbers_too_large_to_square_are_refused():
    x = draw(20, 4) * 1e200
    with pytest.raises(InputError, match="weights: expected numbers whose squares can be summed"):
        round_seam([x], [Rest(draw(4, 3), torch.ones(3).double(), torch.bfloat16)], torch.ones(4).double(), HALF[:1])


@half
@pytest.mark.parametrize(("white", "part"), [(True, 0.9), (False, 0.6)])
def test_rows_that_pass_are_rounded_with_feedback(dtype, white, part):
    """x [I; K] (T A) loses less than a cast of K and T A, and much less where a stream seam has left S^-1 W."""
    size, inputs = 16, 96
    writer, reader, x = draw(inputs, size), draw(size, 100, seed=1), torch.eye(inputs).double()
    if not white:
        closed = draw(inputs, inputs, seed=2)
        writer, x = torch.linalg.solve(closed, writer), draw(200, inputs, seed=3) @ closed
    basis = Basis.of_columns(writer.T, pivot(writer.T))
    left = torch.ones(inputs, dtype=torch.bool)
    left[basis.columns] = False
    kept, read = basis.solve(writer[left].T).T, (writer[basis.columns] @ reader).T

    def given(kept, reads):
        return x @ torch.cat([torch.eye(size).double(), cast(kept, dtype)]) @ cast(reads, dtype).T

    exact = x @ torch.cat([torch.eye(size).double(), kept]) @ read.T
    found, solved, moment = round_passed(kept, [read[:60], read[60:]], None if white else x.T @ x, dtype)
    rounded = [round_reader(each, moment[None], dtype) for each in solved]
    assert {found.dtype, *(each.dtype for each in rounded)} == {dtype}
    torch.testing.assert_close(moment, passed_moment(found.double(), None if white else x.T @ x))
    lost = torch.linalg.norm(given(found, torch.cat(rounded)) - exact)
    assert lost < part * torch.linalg.norm(given(kept, read) - exact)


def test_what_reads_makes_up_for_the_rounding_of_rows_that_pass():
    """A' = argmin || X [I; K'] A' - X [I; K] A ||, where A itself is not rounded."""
    kept, reader, x = draw(20, 5), draw(7, 5, seed=1), draw(60, 25, seed=2)
    found, (resolved,), _ = round_passed(kept, [reader], x.T @ x, torch.bfloat16)
    before, after = (x @ torch.cat([torch.eye(5).double(), each.double()]) for each in (kept, found))
    expected = torch.linalg.lstsq(after, before @ reader.T).solution.T
    torch.testing.assert_close(resolved, expected, rtol=1e-7, atol=1e-7)
    assert not torch.allclose(reader, expected, rtol=1e-7, atol=1e-7)


def test_rows_that_pass_stay_as_they_are_in_full_precision():
    kept, reader = draw(20, 5), draw(7, 5, seed=1)
    found, (same,), moment = round_passed(kept, [reader], None, torch.float64)
    assert torch.equal(found, kept)
    assert torch.equal(same, reader)
    assert torch.equal(round_reader(same, moment[None], torch.float32), reader)


@half
@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize(("size", "pays"), [(3.0, True), (0.01, False)])
def test_what_reads_makes_up_for_what_rounding_its_bias_does(dtype, blocks, size, pays):
    """Of inputs with a mean, if a bias is large: A is told of it, or of the mean, in vain."""
    mixed, matrix, bias = draw(64, 96) / 8, draw(48, 64, seed=2) / 8, size * draw(1, 48, seed=3)[0]
    moment = torch.stack([part @ part.T for part in mixed.split(64 // blocks)])
    mean = draw(1, 64, seed=4)[0]

    def lost(*told):
        change = round_reader(matrix, moment, dtype, *told).double() - matrix
        owed = bias - change @ mean  # what the bias has to be, for the mean to lose nothing
        return (cast(owed, dtype) - owed).square().sum(), (change @ torch.block_diag(*moment) * change).sum()

    (constant, varying), plain = lost(mean, bias), lost()
    if pays:
        assert constant < plain[0] / 4
        assert constant + varying < 0.9 * sum(plain)
    else:
        assert (constant, varying) == plain
    assert lost(mean, None) == lost(None, bias) == plain
