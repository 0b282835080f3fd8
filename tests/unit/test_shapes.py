"""The shapes in annotations are checked while tests run: of what a function is given, and of what it returns."""

import pytest
import torch
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor

from skipless.algebra.rounding import mean_row
from tests.shapes import check


@jaxtyped(typechecker=check)
def scaled(rows: Float[Tensor, "n d"], by: list[Float[Tensor, "d"]], last: int) -> Float[Tensor, "n d"]:
    return rows[:last] * by[0][:1]


@pytest.mark.parametrize(
    ("rows", "by", "last"),
    [
        (torch.ones(3, 2), [torch.ones(4)], 3),
        (torch.ones(2), [torch.ones(2)], 2),
        (torch.ones(3, 2), [torch.ones(2)], 1),
        (torch.ones(3, 2, dtype=torch.int64), [torch.ones(2)], 3),
        (torch.ones(3, 2), (torch.ones(2),), 3),
    ],
    ids=["two widths", "a vector", "too few rows returned", "integers", "no list"],
)
def test_a_wrong_shape_is_refused(rows, by, last):
    assert scaled(torch.ones(3, 2), [torch.ones(2)], 3).shape == (3, 2)
    with pytest.raises(TypeCheckError):
        scaled(rows, by, last)


def test_the_algebra_is_checked():
    assert mean_row(torch.ones(3, 2)).shape == (2,)
    with pytest.raises(TypeCheckError):
        mean_row(torch.ones(3, 2, dtype=torch.int64))
