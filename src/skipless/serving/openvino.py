"""OpenVINO: a stateful IR, as openvino-genai and optimum-intel expect one, and a runner that times it.

Inputs input_ids, attention_mask, position_ids (B, T) and beam_idx (B); output logits (B, T, vocab). The cache is state,
whose rows beam_idx picks before each step: the reordering that a beam search needs.
"""

import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as ops
from openvino.op.util import Variable, VariableInfo

from skipless.errors import InputError
from skipless.inference import load_tokenizer
from skipless.serving.decoder import Decoder, cache_names, example, load_decoder

MODEL = "openvino_model.xml"
STORED = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
WEIGHTS = (*STORED, "int8", "int4")
# What a Runner is asked for, and the weights that it then has.
PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "int8": "int8", "int4": "int4"}


def convert(folder: Path, weights: str = "f32") -> ov.Model:
    """A skipless model folder as an IR, its weights stored as `weights` says (of WEIGHTS).

    f32 also computes in fp32, where OpenVINO's own choice would be bf16 and a cache of 8 bits. Raises InputError.
    """
    decoder = load_decoder(folder, STORED.get(weights, torch.float32))
    model = trace(decoder)
    if weights in ("int8", "int4"):
        model = compress(model, weights)
    else:
        model.set_rt_info(weights, ["runtime_options", "KV_CACHE_PRECISION"])
    if weights == "f32":
        model.set_rt_info("f32", ["runtime_options", "INFERENCE_PRECISION_HINT"])
    return model


def write(source: Path, folder: Path, weights: str) -> None:
    """The model folder `source` into `folder`: the IR, and its tokenizer and detokenizer if it has one."""
    model = convert(source, weights)
    save(model, folder / MODEL)
    if any(source.glob("tokenizer*")):
        from openvino_tokenizers import convert_tokenizer

        parts = convert_tokenizer(load_tokenizer(source), with_detokenizer=True)
        for part, name in zip(parts, ("openvino_tokenizer.xml", "openvino_detokenizer.xml"), strict=True):
            save(part, folder / name)


def save(model: ov.Model, file: Path) -> None:
    """Write an IR as it is. Raises OSError when it is not all there afterwards."""
    ov.save_model(model, file, compress_to_fp16=False)


def trace(decoder: Decoder) -> ov.Model:
    """The decoder as a stateful IR.

    openvino-genai replaces attention by a paged one that knows nothing of slopes and windows; attention spelled out it
    leaves alone.
    """
    config = decoder.model.config
    if config.position_type == "alibi" or config.sliding_window is not None:
        decoder.model.set_attn_implementation("eager")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of Python values that become constants; none of ours depends on an input
        model = ov.convert_model(decoder, example_input=example(decoder))
    past, present = cache_names(config, "past_key_values"), cache_names(config, "present")
    for port, name in zip(model.inputs, ("input_ids", "attention_mask", "position_ids", *past), strict=True):
        port.get_tensor().set_names({name})
        cache = (-1, config.num_key_value_heads, -1, config.head_dim)
        port.get_node().set_partial_shape(ov.PartialShape(cache if name in past else (-1, -1)))
    for port, name in zip(model.outputs, ("logits", *present), strict=True):
        port.get_tensor().set_names({name})
    model.validate_nodes_and_infer_types()
    keep_cache(model, past, present)
    return model


def keep_cache(model: ov.Model, past: list[str], present: list[str]) -> None:
    """Make the cache state: empty at first, its rows taken by beam_idx, what it becomes kept for the next step."""
    beam_idx = ops.parameter([-1], ov.Type.i32, name="beam_idx")
    beam_idx.output(0).get_tensor().set_names({"beam_idx"})
    model.add_parameters([beam_idx])
    batch = ops.gather(ops.shape_of(model.input("input_ids"), "i64"), ops.constant([0]), ops.constant(0))
    for before, after in zip(past, present, strict=True):
        parameter = model.input(before).get_node()
        result = model.output(after).get_node()
        shape = parameter.get_partial_shape()
        heads, width = (ops.constant(np.array([shape[axis].get_length()])) for axis in (1, 3))
        empty = ops.broadcast(ops.constant(np.float32(0)), ops.concat([batch, heads, ops.constant([0]), width], 0))
        variable = Variable(described(before + after, shape))
        state = ops.read_value(empty, variable)
        for reader in parameter.output(0).get_target_inputs():
            reader.replace_source_output(ops.gather(state, beam_idx, ops.constant(0)).output(0))
        model.add_variables([variable])
        model.add_sinks([ops.assign(result.input_value(0).get_node(), variable)])
        model.remove_parameter(parameter)
        model.remove_result(result)
    model.validate_nodes_and_infer_types()


def described(name: str, shape: ov.PartialShape) -> VariableInfo:
    """A part of the state."""
    info = VariableInfo()
    info.variable_id, info.data_type, info.data_shape = name, ov.Type.f32, shape
    return info


def compress(model: ov.Model, weights: str) -> ov.Model:
    """Weights rounded to int8 (each row its own scale) or int4 (each 128 of a row, the tables int8) by NNCF."""
    import nncf

    if weights == "int8":
        return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
    # rows of another multiple than of 128 have smaller groups
    advanced = nncf.AdvancedCompressionParameters(group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST)
    mode = nncf.CompressWeightsMode.INT4_SYM
    return nncf.compress_weights(model, mode=mode, group_size=128, advanced_parameters=advanced)
