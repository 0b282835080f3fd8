"""The check of shapes in annotations, at a third of the price of beartype's own: a test calls the algebra thousands of
times.
"""

from collections.abc import Callable
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Beartype's check of a function that jaxtyping has made of another one's signature, if any of it is a shape.

    jaxtyping makes two of each: of its arguments alone, which returns Any, and of these with what it returns. The
    second sees all that the first does.
    """
    hints = function.__annotations__
    return beartype(function) if hints.get("return") is not Any and any(map(has_shape, hints.values())) else function


def has_shape(hint: Any) -> bool:
    """Whether an annotation holds an array's."""
    return (isinstance(hint, type) and issubclass(hint, AbstractArray)) or any(map(has_shape, get_args(hint)))
