"""A GGUF file (llama.cpp) as a checkpoint: its metadata as a config, its tensors dequantized one at a time."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from skipless.checkpoint.headers import Header, check_headers, ignores_nothing
from skipless.errors import InputError

# Metadata that lists or describes tokens is no part of the architecture, and large.
TOKENIZER = "tokenizer."


class GGUFReader:
    """A GGUF file opened for reading; tensors are memory-mapped and dequantized on request, to fp32.

    config: the metadata, model_type "gguf-" and the architecture's name. Raises InputError for what is no whole GGUF
    file, and if the package gguf is not there.
    """

    def __init__(self, file: Path):
        try:
            import gguf
        except ImportError:
            raise InputError(f"{file}: GGUF files need the [gguf] extra; pip install 'skipless[gguf]'") from None
        if not file.is_file():
            raise InputError(f"{file}: expected a GGUF file, found {'a folder' if file.exists() else 'nothing'}")
        try:
            self._file = gguf.GGUFReader(file)
        except Exception as error:  # the package raises whatever its parsing comes upon
            raise InputError(
                f"{file}: expected a whole GGUF file, found {error!r}; copy or download it again"
            ) from error
        self.path = file
        self._tensors = {tensor.name: tensor for tensor in self._file.tensors}
        shapes = {name: tuple(int(size) for size in tensor.shape[::-1]) for name, tensor in self._tensors.items()}
        self.headers = {name: Header(shape, "F32", file.name) for name, shape in shapes.items()}
        metadata: dict[str, Any] = {
            name: field.contents() for name, field in self._file.fields.items() if not name.startswith(TOKENIZER)
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
        check_headers(self.headers, str(self.path), "the metadata", expected, (), ignores)

    @property
    def tensors(self) -> Mapping[str, Any]:
        """As reader.TensorInfo says it; all will be fp32."""
        import torch

        from skipless.checkpoint.reader import TensorInfo

        return {name: TensorInfo(header.shape, torch.float32, header.shard) for name, header in self.headers.items()}

    def tensor(self, name: str) -> Any:
        """Read one tensor. Raises InputError if it cannot be dequantized, or holds NaN or infinity."""
        import numpy as np
        import torch
        from gguf.quants import dequantize

        found = self._tensors[name]
        try:
            values = dequantize(found.data, found.tensor_type).reshape(self.headers[name].shape)
        except (NotImplementedError, ValueError) as error:
            raise InputError(
                f"{name}: {found.tensor_type.name} in {self.path} cannot be dequantized: {error}"
            ) from error
        if not np.isfinite(values).all():
            raise InputError(f"{name}: expected finite numbers, found NaN or infinite ones; the file is damaged")
        return torch.from_numpy(np.array(values, dtype=np.float32))
