"""onnxruntime-genai: its loop over the graph that `skipless export --to onnx` writes, timed."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir
import onnxruntime_genai

from skipless.serving import onnx
from skipless.serving.running import TokenRunner, check_length


class Runner(TokenRunner):
    """A model in onnxruntime-genai.

    folder: a model folder, or one that `export` wrote.
    """

    def __init__(self, folder: Path):
        with tempfile.TemporaryDirectory() as name:
            if not (folder / onnx.GENAI).exists():
                onnx.write(folder, Path(name), "f32")
                folder = Path(name)
            config = json.loads((folder / onnx.GENAI).read_text(encoding="utf-8"))["model"]
            self.vocab_size, self.longest = config["vocab_size"], config["context_length"]
            self.bytes_per_token = bytes_per_token(onnx_ir.load(folder / onnx.MODEL))
            self._model = onnxruntime_genai.Model(str(folder))

    def decode(self, prompt: list[int], batch: int, tokens: int) -> Iterator[np.ndarray]:
        """As a TokenRunner."""
        check_length(len(prompt), tokens, self.longest)
        length = len(prompt) + tokens
        params = onnxruntime_genai.GeneratorParams(self._model)
        params.set_search_options(batch_size=batch, min_length=length, max_length=length)
        generator = onnxruntime_genai.Generator(self._model, params)
        generator.append_tokens(np.array([prompt] * batch, np.int32))
        while not generator.is_done():
            generator.generate_next_token()
            yield generator.get_next_tokens()


def bytes_per_token(graph: onnx_ir.Model) -> int:
    """Bytes of weights read to decode one token at batch 1: all, but one row of a table that is only looked up in.

    What is stored in 16 bits is fp32 by then: ONNX Runtime widens weights when it loads them.
    """
    sizes = []
    for value in graph.graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None
        shape = tensor.shape.numpy()
        table = len(shape) > 1 and all(_looks_up(*use) for use in value.uses())
        sizes.append(max(tensor.nbytes, 4 * tensor.size) // (shape[0] if table else 1))
    return sum(sizes)


def _looks_up(node: onnx_ir.Node, index: int) -> bool:
    """Whether a node takes rows of its input of this index."""
    return node.op_type == "Gather" and index == 0 and not node.attributes.get_int("axis", 0)


def open_runner(folder: Path, precision: str, compiled: bool) -> Runner:
    """A model folder, loaded; precision and compiled are float32 and False."""
    return Runner(folder)
