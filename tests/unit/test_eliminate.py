import dataclasses

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from skipless.basis import MAX_CONDITION, Basis, choose
from skipless.eliminate import Affine
from skipless.eliminate import close as close_with
from skipless.errors import InputError
from skipless.seams import Seam
from tests.tolerances import FP64


def affine(generator, inputs, outputs, bias, one_hot=False):
    weight = torch.randn(inputs, outputs, generator=generator, dtype=torch.float64)
    offset = torch.randn(outputs, generator=generator, dtype=torch.float64) if bias else None
    return Affine(weight, offset, one_hot)


def weights(modules):
    return {name: module.weight for name, module in modules.items()}


def close(stream, gone, modules):
    basis = choose(stream, gone, weights(modules)) if gone in stream.readers else None
    return close_with(stream, gone, modules, basis)


def apply(x, module):
    return x @ module.weight + (0 if module.bias is None else module.bias)


def seam(writers, readers, identities, duals=()):
    return Seam("stream", 3, 0, writers, readers, identities, 0, writers[:1], duals)


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
    modules = {
        "o": affine(generator, f, d, biases[0]),
        "positions": affine(generator, f, d, False),
        "q": affine(generator, d, d, biases[1]),
        "k": affine(generator, d, e, biases[2]),
        "up": affine(generator, d, f, biases[3]),
    }
    assume(Basis.factorize(modules["q"].weight).condition < 1e4)
    closed = close(seam(("o", "positions"), ("q", "k", "up"), {"q": "q"}), "q", modules)
    assert set(closed) == {"o", "positions", "k", "up"}
    a, b = (torch.randn(tokens, f, generator=generator, dtype=torch.float64) for _ in range(2))
    stream = apply(a, modules["o"]) + apply(b, modules["positions"])
    moved = apply(a, closed["o"]) + apply(b, closed["positions"])
    torch.testing.assert_close(moved, apply(stream, modules["q"]), rtol=FP64, atol=FP64)
    for name in ("k", "up"):
        torch.testing.assert_close(apply(moved, closed[name]), apply(stream, modules[name]), rtol=FP64, atol=1e-8)
    spoiled = dataclasses.replace(closed["k"], weight=closed["k"].weight * 1.001)
    assert not torch.allclose(apply(moved, spoiled), apply(stream, modules["k"]), rtol=FP64, atol=1e-8)


def test_a_tied_table_keeps_its_logits():
    generator = torch.Generator().manual_seed(0)
    table, q = affine(generator, 20, 6, False), affine(generator, 6, 6, True)
    last = affine(generator, 9, 6, True)
    modules = {"e": table, "q": q, "o": last}
    closed = close(seam(("e",), ("q",), {"q": "q"}, duals=("o",)), "q", modules)
    hidden = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(
        apply(hidden, closed["o"]) @ closed["e"].weight.T, apply(hidden, last) @ table.weight.T, rtol=FP64, atol=FP64
    )
    assert torch.equal(closed["e"].bias, q.bias)  # kept apart, or the head would read it


def test_an_untied_table_takes_the_bias_into_its_rows():
    generator = torch.Generator().manual_seed(0)
    table, q = affine(generator, 20, 6, False, one_hot=True), affine(generator, 6, 6, True)
    closed = close(seam(("e",), ("q",), {"q": "q"}), "q", {"e": table, "q": q})["e"]
    torch.testing.assert_close(closed.weight, apply(table.weight, q))
    assert closed.bias is None


@given(
    heads=st.integers(1, 12), d=st.integers(2, 12), f=st.integers(1, 12), bias=st.booleans(), seed=st.integers(0, 999)
)
def test_a_writer_merges_into_its_readers_even_if_singular(heads, d, f, bias, seed):
    generator = torch.Generator().manual_seed(seed)
    modules = {
        "p": affine(generator, heads, d, bias),
        "up": affine(generator, d, f, bias),
        "gate": affine(generator, d, f, False),
    }
    modules["p"].weight[:, 0] = 0
    closed = close(seam(("p",), ("up", "gate"), {"p": "p"}), "p", modules)
    x = torch.randn(3, heads, generator=generator, dtype=torch.float64)
    for name in ("up", "gate"):
        expected = apply(apply(x, modules["p"]), modules[name])
        torch.testing.assert_close(apply(x, closed[name]), expected, rtol=FP64, atol=FP64)
        spoiled = dataclasses.replace(closed[name], weight=closed[name].weight * 1.001)
        assert not torch.allclose(apply(x, spoiled), expected, rtol=FP64, atol=FP64)


def with_condition(condition, d=8):
    orthogonal = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    values = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), d, dtype=torch.float64)
    return Affine(orthogonal * values @ orthogonal.T)


@pytest.mark.parametrize("condition", [1e9, 1e30])
def test_a_singular_basis_is_refused_with_the_alternatives(condition):
    modules = {
        "o": with_condition(1.0),
        "q": with_condition(condition),
        "k": with_condition(10.0),
        "v": with_condition(1e12),
    }
    stream = seam(("o",), ("q", "k", "v"), {"q": "q", "k": "k", "v": "v"})
    with pytest.raises(InputError) as caught:
        close(stream, "q", modules)
    message = str(caught.value)
    assert "q.weight: expected an invertible matrix (condition number at most 4.5e+06)" in message
    assert "--basis k (condition number" in message
    assert "--basis v" not in message
    assert "--layers-open 3" in message


@given(exponent=st.floats(0, 12), d=st.integers(1, 20))
def test_the_condition_estimate_is_close_to_the_true_one(exponent, d):
    matrix = with_condition(10.0**exponent, d).weight
    true = (torch.linalg.matrix_norm(matrix, 1) * torch.linalg.matrix_norm(torch.linalg.inv(matrix), 1)).item()
    assert true / 3.1 < Basis.factorize(matrix).condition < true * 1.1  # gecon: a lower bound, almost always within 3


def test_an_exactly_singular_matrix_has_an_infinite_condition():
    basis = Basis.factorize(torch.zeros(4, 4, dtype=torch.float64))
    assert basis.condition == float("inf")
    assert not basis.usable
    assert MAX_CONDITION > 1e6
