"""ONNX: one graph, with the cache among its inputs and outputs, as optimum and ONNX Runtime's examples expect it.

Inputs input_ids (B, T), attention_mask (B, S), position_ids (B, T), past_key_values.{layer}.{key,value}, each
(B, K, S - T, h) and S - T 0 at first; outputs logits (B, T, vocab), present.{layer}.{key,value} (B, K, S, h).
Arithmetic is in fp32, whatever weights are stored in: ONNX Runtime has no bf16 kernels for CPUs.
"""

import warnings
from pathlib import Path

import onnxscript  # noqa: F401  (what torch's exporter needs; found missing here rather than there)
import torch

from skipless.quiet import errors_only
from skipless.serving.decoder import cache_names, example, load_decoder

MODEL = "model.onnx"
WEIGHTS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def write(source: Path, folder: Path, weights: str) -> None:
    """The skipless model folder `source` into `folder`: the graph, and its weights beside it. Raises InputError."""
    decoder = load_decoder(source, WEIGHTS[weights]).eval()
    inputs = example(decoder)
    past, present = (cache_names(decoder.model.config, prefix) for prefix in ("past_key_values", "present"))
    by_tokens, by_past = (dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for axes in ((0, 1), (0, 2)))
    with errors_only("torch.onnx"), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            decoder,
            inputs,
            input_names=["input_ids", "attention_mask", "position_ids", *past],
            output_names=["logits", *present],
            dynamic_shapes=(by_tokens, by_tokens, by_tokens, tuple(by_past for _ in past)),
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # it is where the old exporter was asked for
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # where in whose files each was traced
    program.save(folder / MODEL, external_data=True)
