"""Another family's tensors by our names, and back: parts of fused ones, in the orientation of nn.Linear."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache

import torch

from skipless.checkpoint.family import Layout, Location
from skipless.checkpoint.reader import TensorInfo
from skipless.errors import InputError


class Canonical:
    """A checkpoint's tensors by our names.

    tensors: their headers. read: gives the stored ones; rows are read alone of a tensor that is stored as we have it.
    as_stored: whether a gain's offset is left out.
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorInfo],
        read: Callable[..., torch.Tensor],
        layout: Layout,
        as_stored: bool = False,
    ):
        self._read, self._layout, self._as_stored = read, layout, as_stored
        self.tensors = infos(tensors, layout)

    def tensor(self, name: str, rows: slice | None = None, /) -> torch.Tensor:
        """Read one, or rows (start, stop) of it: in its dtype, or, if it is stored less an offset, in fp64."""
        location = self._layout.locations[name]
        if rows is not None and location == Location(location.tensors[:1]):
            return self._read(*location.tensors, rows)
        parts = [self._read(stored) for stored in location.tensors]
        whole = parts[0].T if location.transposed else torch.cat(parts) if len(parts) > 1 else parts[0]
        chosen = torch.cat([whole[start:stop] for start, stop in location.rows]) if location.rows else whole
        tensor = chosen.reshape(self.tensors[name].shape).contiguous()
        tensor = tensor.double() + location.offset if location.offset and not self._as_stored else tensor
        return tensor if rows is None else tensor[rows]


def infos(tensors: Mapping[str, TensorInfo], layout: Layout) -> dict[str, TensorInfo]:
    """What is known of the canonical tensors, by what is known of the stored ones.

    Raises InputError for a layout that lacks one of them.
    """
    shapes = layout.architecture.tensors()
    if missing := shapes.keys() - layout.locations:
        raise InputError(
            f"{min(missing)}: expected in what is read tensor by tensor, found it in another form; use the model "
            f"folder that it was exported from"
        )
    return {
        name: TensorInfo(shape, (first := tensors[layout.locations[name].tensors[0]]).dtype, first.shard)
        for name, shape in shapes.items()
    }


def keeping(read: Callable[..., torch.Tensor], layout: Layout) -> Callable[..., torch.Tensor]:
    """The same, but of what is fused, whose parts are asked for in turn, the last weight and bias are kept."""
    kept = lru_cache(2)(read)
    return lambda name, *rows: kept(name) if len(layout.parts[name]) > 1 else read(name, *rows)


def restored(
    made: Iterable[tuple[str, torch.Tensor]], layout: Layout, read: Callable[[str], torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Canonical tensors as the family stores them, under its names; what is fused comes at the end, its other parts as
    they are read.
    """
    fused: dict[str, torch.Tensor] = {}
    for name, tensor in made:
        location = layout.locations[name]
        (stored,) = location.tensors
        tensor = tensor - location.offset if location.offset else tensor
        if not location.rows:
            yield stored, (tensor.T if location.transposed else tensor).reshape(layout.shapes[stored]).contiguous()
        else:
            if stored not in fused:
                fused[stored] = read(stored).to(tensor.dtype, copy=True)
            _put(fused[stored], location, tensor)
        del tensor
    while fused:
        yield fused.popitem()


def _put(whole: torch.Tensor, location: Location, part: torch.Tensor) -> None:
    """Write a part into the rows of a fused tensor that are its own."""
    turned = whole.T if location.transposed else whole
    sizes = [stop - start for start, stop in location.rows]
    for (start, stop), rows in zip(location.rows, part.split(sizes), strict=True):
        turned[start:stop] = rows
