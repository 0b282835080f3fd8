"""How far exported models are from torch in fp32: the bundled model, as it is and fused, in every engine and precision.

    python benchmarks/export.py

On 512 tokens of text that it was not trained on: the largest and the mean error of the logits, relative to
each token's largest; how often the likeliest token is the same; and how many of 64 greedy tokens after the demo's
prompt are equal to HuggingFace's. The last line is one JSON object.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import openvino
import torch

import skipless
from skipless.bundled import BUNDLED
from skipless.cli.demo import PROMPT
from skipless.inference import load, load_tokenizer
from skipless.serving import onnx
from skipless.serving.export import export
from skipless.serving.openvino import MODEL, bytes_per_token

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.exports import greedy, relative_error

from stored import held_out

TOKENS, GREEDY = 512, 64
# weights, and how OpenVINO computes: in fp32, or as it chooses where the CPU has bf16
OPENVINO = [("f32", "f32"), ("bf16", "f32"), ("bf16", "bf16"), ("int8", "f32"), ("int8", "bf16")]
OPENVINO += [("int4", "f32"), ("int4", "bf16")]
ONNX = ["f32", "f16", "bf16"]


class OpenVINO:
    """An exported IR."""

    def __init__(self, folder: Path, arithmetic: str):
        model = openvino.Core().read_model(folder / MODEL)
        self.bytes = bytes_per_token(model)
        exact = {"KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"} if arithmetic == "f32" else {}
        options = {"INFERENCE_PRECISION_HINT": arithmetic, **exact}
        self.request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()

    def start(self) -> None:
        """Forget."""
        self.request.reset_state()

    def step(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Logits of the next tokens."""
        return self.request.infer({**inputs, "beam_idx": np.zeros(1, np.int32)})["logits"].copy()


class ONNX_Runtime:  # noqa: N801
    """An exported graph."""

    def __init__(self, folder: Path):
        self.session = onnxruntime.InferenceSession(folder / onnx.MODEL)
        self.bytes = None

    def start(self) -> None:
        """Forget."""
        inputs = self.session.get_inputs()[3:]
        self.cache = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in inputs}

    def step(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Logits of the next tokens."""
        logits, *cache = self.session.run(None, {**inputs, **self.cache})
        self.cache = dict(zip(self.cache, cache, strict=True))
        return logits


def feed(engine: OpenVINO | ONNX_Runtime, given: np.ndarray, seen: int) -> np.ndarray:
    """Logits of tokens after `seen` others."""
    total = seen + given.shape[1]
    ones, positions = np.ones((1, total), np.int64), np.arange(seen, total)[None]
    return engine.step({"input_ids": given, "attention_mask": ones, "position_ids": positions})


def decode(engine: OpenVINO | ONNX_Runtime, prompt: np.ndarray) -> list[int]:
    """The next greedy tokens."""
    engine.start()
    given, seen, found = prompt, 0, []
    while len(found) < GREEDY:
        logits = feed(engine, given, seen)
        seen += given.shape[1]
        given = logits[:, -1:].argmax(-1)
        found.append(given.item())
    return found


def engines(source: Path, folder: Path) -> object:
    """Every engine and precision, one at a time."""
    for weights in dict.fromkeys(weights for weights, _ in OPENVINO):
        export(source, folder / f"ov-{weights}", to="openvino", weights=weights)
    for weights, arithmetic in OPENVINO:
        yield f"OpenVINO, {weights}, computed in {arithmetic}", OpenVINO(folder / f"ov-{weights}", arithmetic)
    for weights in ONNX:
        export(source, folder / f"onnx-{weights}", to="onnx", weights=weights)
        yield f"ONNX Runtime, {weights}, computed in f32", ONNX_Runtime(folder / f"onnx-{weights}")


def main() -> None:
    tokenizer = load_tokenizer(BUNDLED)
    ids = held_out(TOKENS // 256).view(1, TOKENS)
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    found = {}
    print("| model | engine, weights | error, largest | mean | top-1 equal | greedy | MB a token |")
    print("|---|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        skipless.fuse(BUNDLED, folder / "model")  # in bf16, as the original is
        for label, source in {"original": BUNDLED, "fused": folder / "model"}.items():
            with torch.no_grad():
                expected = load(source, torch.float32)(ids).logits
            tokens = greedy(source, prompt, GREEDY)
            (folder / label).mkdir()
            for engine_name, engine in engines(source, folder / label):
                engine.start()
                logits = torch.from_numpy(feed(engine, ids.numpy(), 0))
                errors = relative_error(logits, expected)
                top1 = (logits.argmax(-1) == expected.argmax(-1)).double().mean().item()
                same = sum(a == b for a, b in zip(decode(engine, prompt.numpy()), tokens, strict=True))
                row = found[f"{label}: {engine_name}"] = (errors.max().item(), errors.mean().item(), top1, same)
                size = "" if engine.bytes is None else f"{engine.bytes / 1e6:.1f}"
                errors_shown = f"{row[0]:.1e} | {row[1]:.1e} | {top1:.1%} | {same} of {GREEDY}"
                print(f"| {label} | {engine_name} | {errors_shown} | {size} |", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
