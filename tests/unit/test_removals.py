import dataclasses

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import skipless
from skipless.algebra.affine import Affine
from skipless.algebra.basis import MAX_CONDITION, MAX_REST, Basis
from skipless.algebra.forecast import Outcome
from skipless.algebra.stream import close_stream, column_order
from skipless.architecture import seams
from skipless.architecture.seams import Seam
from skipless.errors import BugError, InputError
from skipless.removals import WAYS
from skipless.removals.columns import choose, modules
from skipless.removals.merge import merge
from skipless.rewrite.cost import steps
from tests.models import build, save
from tests.pages import module
from tests.tolerances import FP64


def affine(generator, inputs, outputs, bias, one_hot=False):
    weight = torch.randn(inputs, outputs, generator=generator, dtype=torch.float64)
    offset = torch.randn(outputs, generator=generator, dtype=torch.float64) if bias else None
    return Affine(weight, offset, one_hot)


def close(stream, way, affines):
    """Close a stream seam as fusing does, without rounding."""
    readers = {name: affines[name].weight for name in stream.readers}
    widths = {name: weight.shape[1] for name, weight in readers.items()}
    basis = choose(stream, way, readers, torch.ones(sum(widths.values()), dtype=torch.float64))
    closed = close_stream(stream, affines, basis)
    return modules(stream, way, closed, widths), column_order(closed)


def apply(x, module):
    return x @ module.weight + (0 if module.bias is None else module.bias)


def seam(width, writers, readers, identities, duals=()):
    return Seam("stream", 3, width, writers, readers, identities, 0, writers[:1], duals, "rest", "order")


@given(
    d=st.integers(2, 12),
    e=st.integers(1, 12),
    f=st.integers(1, 16),
    tokens=st.integers(1, 5),
    biases=st.tuples(*[st.booleans()] * 4),
    seed=st.integers(0, 2**16),
)
def test_a_reader_becomes_the_identity(d, e, f, tokens, biases, seed):
    generator = torch.Generator().manual_seed(seed)
    affines = {
        "o": affine(generator, f, d, biases[0]),
        "positions": affine(generator, f, d, False),
        "q": affine(generator, d, d, biases[1]),
        "k": affine(generator, d, e, biases[2]),
        "up": affine(generator, d, f, biases[3]),
    }
    assume(Basis.of_columns(affines["q"].weight, torch.arange(d)).condition < 1e4)
    closed, _ = close(seam(d, ("o", "positions"), ("q", "k", "up"), {"q": ("q",)}), "q", affines)
    assert set(closed) == {"o", "positions", "k", "up"}
    a, b = (torch.randn(tokens, f, generator=generator, dtype=torch.float64) for _ in range(2))
    stream = apply(a, affines["o"]) + apply(b, affines["positions"])
    moved = apply(a, closed["o"]) + apply(b, closed["positions"])
    torch.testing.assert_close(moved, apply(stream, affines["q"]), rtol=FP64, atol=FP64)
    for name in ("k", "up"):
        torch.testing.assert_close(apply(moved, closed[name]), apply(stream, affines[name]), rtol=FP64, atol=1e-8)
    spoiled = dataclasses.replace(closed["k"], weight=closed["k"].weight * 1.001)
    assert not torch.allclose(apply(moved, spoiled), apply(stream, affines["k"]), rtol=FP64, atol=1e-8)


@given(
    d=st.integers(2, 12),
    widths=st.tuples(*[st.integers(1, 12)] * 3),
    f=st.integers(1, 16),
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_pivoted_columns_become_the_identity(d, widths, f, bias, seed):
    assume(sum(widths) >= d)
    generator = torch.Generator().manual_seed(seed)
    readers = {name: affine(generator, d, width, bias) for name, width in zip("qkv", widths, strict=True)}
    affines = {"o": affine(generator, f, d, bias), **readers}
    joined = torch.cat([reader.weight for reader in readers.values()], 1)
    assume(torch.linalg.cond(joined) < 1e4)
    closed, order = close(seam(d, ("o",), ("q", "k", "v"), {"pivoted": ("q", "k", "v")}), "pivoted", affines)
    assert set(closed) == {"o"} | ({"rest"} if sum(widths) > d else set())
    x = torch.randn(3, f, generator=generator, dtype=torch.float64)
    stream = apply(x, closed["o"])
    found = torch.cat([stream, apply(stream, closed["rest"])], 1) if "rest" in closed else stream
    expected = torch.cat([apply(apply(x, affines["o"]), readers[name]) for name in "qkv"], 1)
    torch.testing.assert_close(found[:, order], expected, rtol=FP64, atol=1e-8)
    if "rest" in closed:
        assert closed["rest"].weight.abs().max() <= MAX_REST + 1e-9
    wrong = order.roll(1)
    assert not torch.allclose(found[:, wrong], expected, rtol=FP64, atol=1e-8)


def test_a_tied_table_keeps_its_logits():
    generator = torch.Generator().manual_seed(0)
    table, q = affine(generator, 20, 6, False), affine(generator, 6, 6, True)
    last = affine(generator, 9, 6, True)
    affines = {"e": table, "q": q, "o": last}
    closed, _ = close(seam(6, ("e",), ("q",), {"q": ("q",)}, duals=("o",)), "q", affines)
    hidden = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(
        apply(hidden, closed["o"]) @ closed["e"].weight.T, apply(hidden, last) @ table.weight.T, rtol=FP64, atol=FP64
    )
    assert torch.equal(closed["e"].bias, q.bias)  # kept apart, or the head would read it


def test_an_untied_table_takes_the_bias_into_its_rows():
    generator = torch.Generator().manual_seed(0)
    table, q = affine(generator, 20, 6, False, one_hot=True), affine(generator, 6, 6, True)
    closed, _ = close(seam(6, ("e",), ("q",), {"q": ("q",)}), "q", {"e": table, "q": q})
    torch.testing.assert_close(closed["e"].weight, apply(table.weight, q))
    assert closed["e"].bias is None


@given(
    heads=st.integers(1, 12), d=st.integers(2, 12), f=st.integers(1, 12), bias=st.booleans(), seed=st.integers(0, 999)
)
def test_a_writer_merges_into_its_readers_even_if_singular(heads, d, f, bias, seed):
    generator = torch.Generator().manual_seed(seed)
    affines = {
        "p": affine(generator, heads, d, bias),
        "up": affine(generator, d, f, bias),
        "gate": affine(generator, d, f, False),
    }
    affines["p"].weight[:, 0] = 0
    closed = merge(seam(d, ("p",), ("up", "gate"), {"p": ("p",)}), affines)
    x = torch.randn(3, heads, generator=generator, dtype=torch.float64)
    for name in ("up", "gate"):
        expected = apply(apply(x, affines["p"]), affines[name])
        torch.testing.assert_close(apply(x, closed[name]), expected, rtol=FP64, atol=FP64)
        spoiled = dataclasses.replace(closed[name], weight=closed[name].weight * 1.001)
        assert not torch.allclose(apply(x, spoiled), expected, rtol=FP64, atol=FP64)


def with_condition(condition, d=8):
    orthogonal = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    values = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), d, dtype=torch.float64)
    return Affine(orthogonal * values @ orthogonal.T)


@pytest.mark.parametrize("condition", [1e9, 1e30])
def test_a_singular_basis_is_refused_with_the_alternatives(condition):
    affines = {
        "o": with_condition(1.0),
        "q": with_condition(condition),
        "k": with_condition(10.0),
        "v": with_condition(1e12),
    }
    stream = seam(8, ("o",), ("q", "k", "v"), {"q": ("q",), "k": ("k",), "v": ("v",), "pivoted": ("q", "k", "v")})
    with pytest.raises(InputError) as caught:
        close(stream, "q", affines)
    message = str(caught.value)
    assert "q.weight: expected an invertible matrix (condition number at most 4.5e+06)" in message
    assert "--basis k (condition number" in message
    assert "--basis pivoted (condition number" in message
    assert "--basis v" not in message
    assert "--layers-open 3" in message


@given(exponent=st.floats(0, 12), d=st.integers(1, 20))
def test_the_condition_estimate_is_close_to_the_true_one(exponent, d):
    matrix = with_condition(10.0**exponent, d).weight
    true = (torch.linalg.matrix_norm(matrix, 1) * torch.linalg.matrix_norm(torch.linalg.inv(matrix), 1)).item()
    assert (
        true / 3.1 < Basis.of_columns(matrix, torch.arange(d)).condition < true * 1.1
    )  # gecon: a lower bound, almost always within 3


def test_an_exactly_singular_matrix_has_an_infinite_condition():
    basis = Basis.of_columns(torch.zeros(4, 4, dtype=torch.float64), torch.arange(4))
    assert basis.condition == float("inf")
    assert not basis.usable
    assert MAX_CONDITION > 1e6


def test_a_removal_is_one_module_and_its_entries(tmp_path, monkeypatch):
    """What the page about it shows is planned, costed, audited, fused, checked and verified like any other."""
    finds = module("add-a-removal", "architecture/seams.py", **vars(seams))
    last = module("add-a-removal", "removals/last.py")
    monkeypatch.setitem(seams.KINDS, "last", finds._last_seams)
    monkeypatch.setitem(WAYS, "last", last)
    source = save(build(norm_type="rms", norms=["model.norm"]), tmp_path / "source")
    options = {"remove": ("last",)}
    assert skipless.audit(source, **options).safe
    plan = skipless.fuse(source, tmp_path / "fused", **options)
    assert plan.parameters[0] - plan.parameters[1] == 32
    assert [seam.kind for task in plan.tasks for seam in task.seams] == ["last"]
    assert any(step.startswith("last seam: gain") for task in plan.tasks for step in steps(plan, task))
    assert skipless.verify(source, tmp_path / "fused").same
    outcome = Outcome("last", 3, "last", "float64", {}, {})
    wrong = lambda seam, affines, *_: ({"lm_head": affines["lm_head"]}, None, outcome)  # noqa: E731
    monkeypatch.setattr(last, "close", wrong)
    with pytest.raises(BugError, match="nothing was published"):
        skipless.fuse(source, tmp_path / "wrong", **options)
