"""The engines that run models, and the formats that models are exported to: a module here for each. Imports none."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Engine:
    """module: the one here whose `open_runner` loads a model. precisions: that it runs in. extra: what installs it."""

    module: str
    precisions: tuple[str, ...]
    extra: str | None = None


ENGINES = {
    "torch": Engine("decoding", ("float64", "float32", "bfloat16", "float16")),
    "openvino": Engine("openvino", ("float32", "bfloat16", "int8", "int4"), "openvino"),
    "onnxruntime-genai": Engine("onnx_genai", ("float32",), "onnx"),
    "mlx": Engine("mlx", ("float32", "bfloat16", "float16"), "mlx"),
    "vllm": Engine("vllm", ("float32", "bfloat16", "float16"), "vllm"),
}

# What `export` writes: the module that does (with WEIGHTS and `write`).
FORMATS = {"openvino": "openvino", "onnx": "onnx", "gguf": "gguf", "mlx": "mlx", "executorch": "executorch"}
