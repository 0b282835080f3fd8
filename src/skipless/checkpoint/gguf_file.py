"""A GGUF file (llama.cpp) as a checkpoint: its metadata as a config, its tensors one at a time, dequantized."""

import mmap
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from skipless.checkpoint.headers import MOST_TENSORS, MOST_VALUES, Header, check_file, check_headers, ignores_nothing
from skipless.errors import InputError

# Metadata that lists or describes tokens is no part of the architecture, and large.
TOKENIZER = "tokenizer."
# How the name of a tensor of indices ends.
INDEX = "_order"

# Values from which on metadata is a list of tokens or merges, and values in all that is shorter: the package takes up
# to 2 kB of memory for each that it reads.
LONG = 1000
MOST_KEPT = 10**5
# Bytes of the metadata's types, as the format numbers them; strings and arrays begin with their length.
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9
MOST_DIMENSIONS = 4

# Types that are read as they are stored, as safetensors calls them, and integers; others become fp32.
PLAIN = ("F64", "F32", "F16", "BF16", "I32")

AGAIN = "copy or download it again"


class GGUFReader:
    """A GGUF file opened for reading; tensors are memory-mapped, and quantized ones dequantized on request, to fp32.

    config: the metadata, model_type "gguf-" and the architecture's name; tokenizer: what of it describes the tokenizer,
    by names less "tokenizer.", and is no long list. Raises InputError for what is no whole GGUF
    file, for tensors that overlap or are not aligned, and if the package gguf is not there.
    """

    def __init__(self, file: Path):
        check_file(file, "a GGUF file")
        try:
            self._file = _open(file)
            said: dict[str, Any] = {name: field.contents() for name, field in self._file.fields.items()}
        except ImportError:
            raise InputError(f"{file}: GGUF files need the [gguf] extra; pip install 'skipless[gguf]'") from None
        except Exception as error:  # the package raises whatever its parsing comes upon
            raise InputError(f"{file}: expected a whole GGUF file, found {error!r}; {AGAIN}") from error
        self.path = file
        metadata = {name: value for name, value in said.items() if not name.startswith(TOKENIZER)}
        self.tokenizer = {name.removeprefix(TOKENIZER): said[name] for name in said.keys() - metadata.keys()}
        _check_places(file, self._file)
        self._tensors = {tensor.name: tensor for tensor in self._file.tensors}
        shapes = {name: tuple(int(size) for size in tensor.shape[::-1]) for name, tensor in self._tensors.items()}
        self.headers = {
            name: Header(shapes[name], kind if kind in PLAIN else "F32", file.name, int(tensor.data_offset))
            for name, tensor in self._tensors.items()
            for kind in [tensor.tensor_type.name]
        }
        self.config: Mapping[str, Any] = {
            **metadata,
            "model_type": f"gguf-{metadata.get('general.architecture')}",
            "vocab_size": shapes.get("token_embd.weight", (None,))[0],
            "tie_word_embeddings": "output.weight" not in shapes,
            "qkv_bias": "blk.0.attn_q.bias" in shapes,
        }

    def check(self, expected: Mapping[str, tuple[int, ...]], ignores: Callable[[str], bool] = ignores_nothing) -> None:
        """Compare names and shapes with what the metadata promises. Raises InputError for the first difference."""
        indices = [name for name in expected if name.endswith(INDEX)]
        check_headers(self.headers, str(self.path), "the metadata", expected, indices, ignores)

    @property
    def tensors(self) -> Mapping[str, Any]:
        """As reader.TensorInfo says it."""
        from skipless.checkpoint.reader import DTYPES, TensorInfo

        return {
            name: TensorInfo(header.shape, DTYPES[header.dtype], header.shard) for name, header in self.headers.items()
        }

    def tensor(self, name: str) -> Any:
        """Read one tensor. Raises InputError if it cannot be dequantized, or holds NaN or infinity."""
        stored = self.values(name, bytearray(self._tensors[name].data), self.headers[name].shape)
        if stored.is_floating_point() and not stored.isfinite().all():
            raise InputError(f"{name}: expected finite numbers, found NaN or infinite ones; the file is damaged")
        return stored

    def size(self, name: str) -> int:
        """How many bytes of the file a tensor takes."""
        return int(self._tensors[name].n_bytes)

    def values(self, name: str, data: bytearray, shape: tuple[int, ...]) -> Any:
        """Rows of a tensor, by their bytes. Raises InputError if they cannot be dequantized."""
        import numpy as np
        import torch
        from gguf.quants import dequantize

        from skipless.checkpoint.reader import DTYPES

        kind = self._tensors[name].tensor_type
        if self._file.endianess.name != "LITTLE":
            raise InputError(f"{name}: expected numbers with their lowest byte first, found a big-endian file")
        if kind.name in PLAIN:
            return torch.frombuffer(data, dtype=DTYPES[kind.name]).reshape(shape)
        try:
            values = dequantize(np.frombuffer(data, np.uint8).reshape(*shape[:-1], -1), kind)
        except (NotImplementedError, ValueError) as error:
            raise InputError(f"{name}: {kind.name} in {self.path} cannot be dequantized: {error}") from error
        return torch.from_numpy(np.array(values.reshape(shape), dtype=np.float32))


def _check_places(path: Path, file: Any) -> None:
    """Raise InputError for a tensor that is not where general.alignment says, or begins within another one."""
    alignment, end, before = int(file.alignment), 0, ""
    if alignment < 1 or alignment & (alignment - 1):
        raise InputError(f"{path}: general.alignment: expected a power of 2, found {alignment}; {AGAIN}")
    for tensor in sorted(file.tensors, key=lambda tensor: int(tensor.data_offset)):
        start = int(tensor.data_offset) - int(file.data_offset)
        if start % alignment:
            raise InputError(
                f"{path}: {tensor.name}: expected at a multiple of {alignment} bytes, as general.alignment says, found "
                f"at {start:,}; {AGAIN}"
            )
        if start < end:
            raise InputError(
                f"{path}: {tensor.name}: expected after the end of {before} at {end:,} bytes, found at {start:,}: the "
                f"two overlap; {AGAIN}"
            )
        end, before = start + int(tensor.n_bytes), tensor.name


def _open(file: Path) -> Any:
    """The package's reader, once the file's lengths have been checked. Raises whatever it comes upon."""
    import gguf

    long = _long_lists(file)

    class Reader(gguf.GGUFReader):
        """Passes over long lists, which nothing here needs."""

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if size := long.get(int(orig_offs)):
                return size, [], [], [gguf.GGUFValueType.ARRAY]
            return super()._get_field_parts(orig_offs, raw_type)

    return Reader(file)


def _long_lists(file: Path) -> dict[int, int]:
    """Where metadata of more than LONG values lies, which the package would take long to read: place -> bytes.

    Raises ValueError or struct.error for lengths and places beyond the file, which the package would believe.
    """
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        order = "<" if struct.unpack_from("<I", data, 4)[0] & 0xFFFF else ">"
        values, long = 0, {}

        def number(code: str, at: int) -> int:
            read: int = struct.unpack_from(order + code, data, at)[0]
            return read

        def after(kind: int, at: int) -> int:
            """Where the value that begins at `at` ends."""
            nonlocal values
            values += 1
            if kind in SCALARS:
                at += SCALARS[kind]
            elif kind == STRING:
                at += 8 + number("Q", at)
            elif kind == ARRAY:
                inner, count = number("I", at), number("Q", at + 4)
                at += 12
                if inner in SCALARS:
                    values += count
                    at += count * SCALARS[inner]
                else:
                    for _ in range(count):
                        at = after(inner, at)
            else:
                raise ValueError(f"metadata of the unknown type {kind}")
            if values > MOST_VALUES or at > len(data):
                raise ValueError(f"metadata beyond the end of the file, or more than {MOST_VALUES:,} values")
            return at

        tensors, pairs, at, kept = number("Q", 8), number("Q", 16), 24, 0
        for _ in range(pairs):
            start = after(STRING, at) + 4
            before, at = values, after(number("I", start - 4), start)
            if values - before > LONG:
                long[start] = at - start
            else:
                kept += values - before
            if kept > MOST_KEPT:
                raise ValueError(f"more than {MOST_KEPT:,} values in short lists")
        if tensors > MOST_TENSORS:
            raise ValueError(f"{tensors:,} tensors")
        for _ in range(tensors):
            at = after(STRING, at)
            dimensions = number("I", at)
            if dimensions > MOST_DIMENSIONS:
                raise ValueError(f"a tensor of {dimensions:,} dimensions")
            at += 4 + 8 * dimensions + 12
            if number("Q", at - 8) > len(data):
                raise ValueError("a tensor beyond the end of the file")
        return long
