"""ONNX: one graph, with the cache among its inputs and outputs, in a folder as model hubs have it.

Inputs input_ids (B, T), attention_mask (B, S), position_ids (B, T), past_key_values.{layer}.{key,value}, each
(B, K, S - T, h) and S - T 0 at first; outputs logits (B, T, vocab), present.{layer}.{key,value} (B, K, S, h).
Arithmetic is in fp32, whatever weights are stored in: ONNX Runtime has no bf16 kernels for CPUs.

Two files say so to those that generate from such graphs: config.json to transformers.js, which knows them by the
model_type of an architecture with these inputs, and genai_config.json to onnxruntime-genai.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import onnx_ir
import onnxscript  # noqa: F401  (what torch's exporter needs; found missing here rather than there)
import torch
from transformers import PreTrainedModel

from skipless.quiet import errors_only
from skipless.serving.decoder import Decoder, cache_names, example, load_decoder

MODEL = "onnx/model.onnx"
GENAI = "genai_config.json"
WEIGHTS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def write(source: Path, folder: Path, weights: str) -> None:
    """The skipless model folder `source` into `folder`: the graph, its weights beside it, and what is said of it.

    Raises InputError.
    """
    decoder = load_decoder(source, WEIGHTS[weights]).eval()
    file = folder / MODEL
    file.parent.mkdir(exist_ok=True)
    onnx_ir.save(trace(decoder), file, external_data=f"{file.name}_data")
    save_json(transformers_js(decoder.model), folder / "config.json")
    save_json(genai(decoder.model), folder / GENAI)


def trace(decoder: Decoder) -> onnx_ir.Model:
    """The decoder as a graph."""
    past, present = (cache_names(decoder.model.config, prefix) for prefix in ("past_key_values", "present"))
    given, seen, cached = (
        {0: "batch_size", axis: name}  # names that transformers.js knows
        for axis, name in ((1, "sequence_length"), (1, "total_sequence_length"), (2, "past_sequence_length"))
    )
    with errors_only("torch.onnx"), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            decoder,
            example(decoder),
            input_names=["input_ids", "attention_mask", "position_ids", *past],
            output_names=["logits", *present],
            dynamic_shapes=(given, seen, given, tuple(cached for _ in past)),
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # it is where the old exporter was asked for
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # where in whose files each was traced
    return program.model


def save_json(value: dict[str, Any], file: Path) -> None:
    """Write it, in place of what is there."""
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def transformers_js(model: PreTrainedModel) -> dict[str, Any]:
    """Its config.json: an architecture with the same inputs, and the sizes of the cache. It has fp32 in it, and so has
    the graph's name.
    """
    names = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        **{name: getattr(model.config, name) for name in names},
        "transformers.js_config": {"dtype": "fp32", "use_external_data_format": True},
    }


def genai(model: PreTrainedModel) -> dict[str, Any]:
    """Its genai_config.json: "decoder" is any graph with these inputs and outputs, which need not be named. It takes
    0 for what is not said of tokens.
    """
    config, tokens = model.config, model.generation_config
    eos = tokens.eos_token_id
    pad = tokens.pad_token_id
    if pad is None:
        pad = eos[0] if isinstance(eos, list) else eos
    fields = {
        "type": "decoder",
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "bos_token_id": tokens.bos_token_id,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "decoder": {
            "filename": MODEL,
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "head_size": config.head_dim,
        },
    }
    return {"model": {name: value for name, value in fields.items() if value is not None}}
