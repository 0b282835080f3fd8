"""A GGUF file of llama.cpp's architecture "llama" as the model folder of transformers' Llama that it was made of.

llama.cpp rotates queries and keys in pairs of neighbours, for which its converter interleaves the halves of each head's
rows in Q and K; here they are as transformers has them again. Quantized tensors are read in fp32.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from skipless.architecture.config import Architecture
from skipless.checkpoint.family import LLAMA_FIELDS, laid_out
from skipless.checkpoint.gguf_file import GGUFReader
from skipless.checkpoint.gguf_tokens import convert_tokenizer
from skipless.checkpoint.headers import Header
from skipless.checkpoint.reader import DTYPES, CheckpointReader, file_stamp
from skipless.errors import InputError

# Metadata that the architecture, or the config below, has been read from, and what says nothing of the function.
READ = frozenset(
    {
        "vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length", "tensor_data_layout",
        "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
        "attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base",
    }
)  # fmt: skip
# What other metadata may say, since a Llama is so.
NEUTRAL = {"expert_count": 0, "expert_used_count": 0, "rope.scaling.type": "none", "rope.scale_linear": 1.0}

# Fields of config.json -> llama.cpp's names of special tokens.
TOKENS = {
    "bos_token_id": "ggml.bos_token_id",
    "eos_token_id": "ggml.eos_token_id",
    "pad_token_id": "ggml.padding_token_id",
}


class GGUFFolder(CheckpointReader):
    """A CheckpointReader of a GGUF file; `folder` is a local one that holds what describes it: config.json, and the
    tokenizer, if transformers can make it of the metadata (tokenizer: if it is wanted).

    Raises InputError as GGUFReader does, and for another architecture, and metadata that no LlamaConfig can say.
    """

    def __init__(self, file: Path, device: str = "cpu", *, tokenizer: bool = True):
        stamp = file_stamp(file) if file.exists() else ()
        self._file, self._gguf = file, GGUFReader(file)
        self._layout = laid_out(self._gguf)
        self._local = tempfile.TemporaryDirectory(prefix="skipless-")
        folder, config = Path(self._local.name), self._config()
        (folder / "config.json").write_text(json.dumps(config))
        if tokenizer:
            convert_tokenizer(file, self._gguf.tokenizer, folder)
        super().__init__(folder, device)
        self._stamps[file.name] = stamp

    @property
    def place(self) -> str:
        return str(self._file.resolve())

    def path(self, name: str) -> Path:
        return self._file if name == self._file.name else super().path(name)

    def size(self, name: str) -> int:
        return self._gguf.size(self._layout.locations[name].tensors[0])

    def fingerprint(self, copy: Any = ()) -> dict[str, Any]:
        """Of the file, which all else is made of."""
        return {self._file.name: list(self._stamps[self._file.name])}

    def check_unchanged(self) -> None:
        self._check_stamp(self._file.name, self._file.stat())

    def _config(self) -> dict[str, Any]:
        """config.json of the Llama that the metadata describes."""
        said, architecture = self._gguf.config, self._layout.architecture
        if self._layout.family.model_types != ("gguf-llama",):
            raise InputError(
                f"{self._file}: general.architecture: expected 'llama', found {said['general.architecture']!r}; use "
                f"the model folder that it was made of"
            )
        own = {name.removeprefix("llama."): value for name, value in said.items() if name.startswith("llama.")}
        for name, value in own.items():
            if name not in READ and NEUTRAL.get(name) != value:
                raise self._refusal(name, "none, or what says nothing", value)
        if (rotated := own.get("rope.dimension_count", architecture.head_dim)) != architecture.head_dim:
            raise self._refusal("rope.dimension_count", f"{architecture.head_dim}, the width of a head", rotated)
        if architecture.qkv_bias:
            raise self._refusal("blk.0.attn_q.bias", "none without one of attn_output", "one", "")
        if scaled := sorted(name for name in self._gguf.headers if name.startswith("rope_freqs.")):
            raise self._refusal(scaled[0], "none", "RoPE that is scaled by frequency", "")
        own.setdefault("rope.freq_base", 10000.0)
        numbers = {"context_length": int, "attention.layer_norm_rms_epsilon": float, "rope.freq_base": float}
        for name, kind in numbers.items():
            if type(own.get(name)) is not kind:
                raise self._refusal(name, f"a number ({kind.__name__})", own.get(name))
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **{name: getattr(architecture, name) for name in LLAMA_FIELDS},
            "hidden_act": "silu",
            "max_position_embeddings": own["context_length"],
            "rms_norm_eps": own["attention.layer_norm_rms_epsilon"],
            "rope_parameters": {"rope_type": "default", "rope_theta": own["rope.freq_base"]},
            **{name: number for name, key in TOKENS.items() if type(number := self._gguf.tokenizer.get(key)) is int},
            "dtype": str(DTYPES[self._gguf.headers["token_embd.weight"].dtype]).removeprefix("torch."),
        }

    def _refusal(self, name: str, expected: str, found: Any, prefix: str = "llama.") -> InputError:
        return InputError(
            f"{self._file}: {prefix}{name}: expected {expected}, found {found!r}: no LlamaConfig says so here; use the "
            f"model folder that it was made of"
        )

    def _find_shards(self) -> list[str]:
        return [self._file.name]

    def _read_headers(self) -> dict[str, Header]:
        stored = self._gguf.headers
        return {name: stored[location.tensors[0]] for name, location in self._layout.locations.items()}

    def _read(self, name: str, start: int, into: memoryview) -> int:
        """Fill a buffer with a tensor's bytes, as if it were stored as it is given."""
        info, (stored,) = self.tensors[name], self._layout.locations[name].tensors
        first, stop = start // info.row_bytes, -(-(start + len(into)) // info.row_bytes)
        together = _together(name, self._layout.architecture)
        low, high = first // together * together, -(-stop // together) * together
        if len(info.shape) == 1:
            low, high = 0, info.shape[0]
        size = self.size(name) // info.shape[0]
        data = bytearray((high - low) * size)
        if super()._read(name, low * size, memoryview(data)) < len(data):
            return 0
        values = self._gguf.values(stored, data, (high - low, *info.shape[1:]))
        if together > 1:
            values = values.unflatten(0, (-1, together // 2, 2)).transpose(1, 2).flatten(0, 2)
        begin = start - first * info.row_bytes
        chosen = values[first - low : stop - low].contiguous()
        into[:] = chosen.view(-1).view(torch.uint8).numpy().data[begin : begin + len(into)]
        return len(into)


def _together(name: str, architecture: Architecture) -> int:
    """How many rows llama.cpp has put in another order together: a head's of Q and K, else 1."""
    return architecture.head_dim if name.split(".")[-2] in ("q_proj", "k_proj") else 1
