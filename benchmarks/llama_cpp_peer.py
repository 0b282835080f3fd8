"""llama.cpp as bench sees it: a random GGUF of a Llama, and a process that decodes with it (benchmarks/engines.py).

python benchmarks/llama_cpp_peer.py FILE.gguf    # answers requests on stdin
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from transformers import MistralConfig

from skipless.serving.running import disagreement, sequence
from skipless.serving.worker import serve


def write(file: Path, config: MistralConfig) -> None:
    """Random weights of a Llama of this config, its matrices in bf16."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")  # llama.cpp's word for: tokens are numbers
    quantization = GGMLQuantizationType.BF16
    generator = np.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int) -> None:
        values = generator.standard_normal((rows, columns), dtype=np.float32) * columns**-0.5
        writer.add_tensor(f"{name}.weight", quantize(values, quantization), raw_dtype=quantization)

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(config.hidden_size, dtype=np.float32))

    d, f = config.hidden_size, config.intermediate_size
    query, value = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    matrix("token_embd", config.vocab_size, d)
    for layer in range(config.num_hidden_layers):
        block = f"blk.{layer}"
        norm(f"{block}.attn_norm")
        norm(f"{block}.ffn_norm")
        for name, rows, columns in (
            ("attn_q", query, d),
            ("attn_k", value, d),
            ("attn_v", value, d),
            ("attn_output", d, query),
            ("ffn_gate", f, d),
            ("ffn_up", f, d),
            ("ffn_down", d, f),
        ):
            matrix(f"{block}.{name}", rows, columns)
    norm("output_norm")
    matrix("output", config.vocab_size, d)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Runner:
    """A GGUF file in llama.cpp."""

    def __init__(self, file: Path):
        from llama_cpp import Llama

        tensors = gguf.GGUFReader(file).tensors
        self.bytes_per_token = sum(int(tensor.n_bytes) for tensor in tensors if tensor.name != "token_embd.weight")
        threads = torch.get_num_threads()
        self.model = Llama(
            str(file), n_ctx=1024, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False
        )

    def generate(self, batch: int, prompt: int, tokens: int) -> list[float]:
        """As bench asks for it, one sequence at a time."""
        if batch != 1:
            raise ValueError(f"batch: expected 1, found {batch}")
        start = time.perf_counter()
        return [time.perf_counter() - start for _ in self.decode(sequence(prompt, self.model.n_vocab()), tokens)]

    def broken_cache(self, prompt: int, tokens: int) -> str | None:
        """What is wrong with its cache, by its tokens."""
        return disagreement(
            lambda ids, count: list(self.decode(ids, count)), sequence(prompt, self.model.n_vocab()), tokens
        )

    def decode(self, ids: list[int], tokens: int) -> Iterator[int]:
        """The next tokens, after a prompt of ids."""
        self.model.reset()
        for _ in range(tokens):
            self.model.eval(ids)
            ids = [int(np.argmax(self.model._scores[-1]))]
            yield ids[0]


if __name__ == "__main__":
    serve(lambda: Runner(Path(sys.argv[1])))
