"""GGUF for llama.cpp: one file, with the architecture "skipless" that integrations/llama.cpp adds to it.

Tensors and metadata have llama.cpp's names; families/gguf_skipless.py lists the tensors, and reads them back.
"""

import copy
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType
from gguf.constants import GGML_QUANT_SIZES

from skipless.algebra.rows import Matrix, Rows
from skipless.architecture.config import OUTPUT_NORMS, Architecture
from skipless.checkpoint.families.gguf_skipless import CONFIG, FAMILY, SkiplessLayout
from skipless.checkpoint.family import Layout
from skipless.checkpoint.opening import read_architecture
from skipless.checkpoint.reader import CheckpointReader
from skipless.errors import InputError
from skipless.inference import check_order
from skipless.model.configuration_skipless import MULTIPLIERS, SkiplessConfig
from skipless.model.modeling_skipless import exchanged
from skipless.quiet import errors_only
from skipless.serving.gguf_grids import RANGES, plain, spaces
from skipless.serving.gguf_tokenizer import add_tokenizer

MODEL = "model.gguf"
# How rest_proj is stored, where not as the others.
REST = {"q8_0": "f16", "q5_1": "q8_0", "q5_0": "q8_0", "q4_1": "q8_0", "q4_0": "q8_0"}
WEIGHTS = ("f32", "f16", "bf16", *REST)
# Our activations, by the names that skipless.cpp knows.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# Matrices that llama.cpp wants in fp32: one is added to the stream, the other chooses experts.
IN_FULL = ("position_embd.weight", "ffn_gate_inp.weight")
# ALiBi's slopes end at 2^-8 (arXiv:2108.12409).
ALIBI = 8.0
# The kind of layers without a window.
FULL = "full_attention"
# LLAMA_MAX_LAYERS and LLAMA_MAX_EXPERTS.
MOST_LAYERS, MOST_EXPERTS = 512, 1024


def write(source: Path, folder: Path, weights: str) -> None:
    """The skipless model folder `source` as one file in `folder`, read and written tensor by tensor.

    weights: how matrices are stored, of WEIGHTS; those whose rows are no multiple of its blocks are in f16, vectors in
    f32, rest_proj in f16 for q8_0, in q8_0 for fewer bits. Raises InputError for a model or a tokenizer that llama.cpp
    cannot run.
    """
    reader = CheckpointReader(source)
    architecture = read_architecture(reader)
    with errors_only("transformers"):
        config = SkiplessConfig.from_dict(copy.deepcopy(dict(reader.config)))
    check(architecture, config)
    layout = FAMILY.layout(architecture, reader.tensors)
    kinds = {name: stored_as(name, shape, architecture, weights) for name, shape in layout.shapes.items()}
    writer = gguf.GGUFWriter(folder / MODEL, "skipless")
    try:
        add_metadata(writer, config)
        writer.add_string(CONFIG, json.dumps(dict(reader.config)))
        writer.add_file_type(LlamaFileType["ALL_F32" if weights == "f32" else f"MOSTLY_{weights.upper()}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_tokenizer(writer, source, architecture.vocab_size)
        for name, shape in layout.shapes.items():
            block, size = GGML_QUANT_SIZES[kinds[name]]
            count = math.prod(shape) // block * size
            writer.add_tensor_info(name, shape, np.dtype(np.float32), count, kinds[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for data in encoded(layout, reader, kinds, together=weights.upper() in RANGES):
            writer.write_tensor_data(data)
    finally:
        writer.close()


def check(architecture: Architecture, config: SkiplessConfig) -> None:
    """Raise InputError, naming the field, for what the architecture in llama.cpp does not compute."""
    experts = config.ffn_type == "moe"
    rope_type = config.rope_of(FULL).get("rope_type", "default")
    read = architecture.query_width if config.p_removed and config.p_merged else architecture.hidden_size
    for name, expected, fits in (
        ("attention_shaping", "null or 'value'", config.attention_shaping != "full"),
        ("residual_gains", "false", not config.residual_gains),
        ("first_layer_removed", "false", not config.first_layer_removed),
        ("sliding_window", "null", config.sliding_window is None),
        ("head_bias", "false", not config.head_bias),
        ("position_offset", "0", not config.position_offset),
        ("logit_scale", "1", config.logit_scale == 1),
        *((name, "null", getattr(config, name) is None) for name in MULTIPLIERS),
        ("gain_offset", "0", not config.gain_offset),
        ("norms", "none of what P and O give", not set(OUTPUT_NORMS).intersection(config.norms or ())),
        ("qk_norm", "null or 'head_dim'", config.qk_norm != "heads"),
        ("rope_parameters", "null or those of default RoPE", rope_type == "default"),
        ("hidden_act", f"one of {', '.join(ACTIVATIONS)}", config.hidden_act in ACTIVATIONS),
        ("hidden_act", "another than 'gelu' for experts", not (experts and config.hidden_act == "gelu")),
        (
            "p_removed",
            "false with experts, unless the heads together are hidden_size wide",
            not experts or read == config.hidden_size,
        ),
        ("num_hidden_layers", f"at most {MOST_LAYERS}", config.num_hidden_layers <= MOST_LAYERS),
        ("num_local_experts", f"at most {MOST_EXPERTS}", (config.num_local_experts or 0) <= MOST_EXPERTS),
    ):
        if not fits:
            raise InputError(f"config.json: {name}: expected {expected} for gguf, found {getattr(config, name)!r}")


def add_metadata(writer: gguf.GGUFWriter, config: SkiplessConfig) -> None:
    """The fields of the architecture that llama.cpp reads."""
    rope = config.position_type.startswith("rope")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_parallel_residual(config.block_type == "parallel")
    writer.add_string("skipless.residual", config.residual)
    writer.add_string("skipless.hidden_activation", ACTIVATIONS[config.hidden_act])
    writer.add_rope_dimension_count(config.rotated(config.rope_of(FULL)) if rope else 0)
    if rope:
        writer.add_rope_freq_base(config.rope_of(FULL)["rope_theta"])
        writer.add_bool("skipless.rope.interleaved", config.position_type == "rope_interleaved")
    if config.position_type == "alibi":
        writer.add_max_alibi_bias(ALIBI)
    if config.norm_type == "layer":
        writer.add_layer_norm_eps(config.norm_eps)
    if config.norm_type == "rms" or config.qk_norm:
        writer.add_layer_norm_rms_eps(config.norm_eps)
    if config.ffn_type == "moe":
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_weights_norm(config.norm_topk_prob)
    if config.attn_logit_softcapping is not None:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if config.final_logit_softcapping is not None:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def stored_as(name: str, shape: tuple[int, ...], architecture: Architecture, weights: str) -> GGMLQuantizationType:
    """How a tensor of the file is stored: indices as such, what is no large matrix in fp32, the others as asked; but
    rest_proj with twice the bits of 8 or fewer: it multiplies what rounding the stream adds (docs/half-precision.md).
    """
    if name.endswith("_order"):
        return GGMLQuantizationType.I32
    rest = name.endswith("attn_qkv.weight")
    if len(shape) == 1 or name.endswith((".bias", *IN_FULL)) or (rest and architecture.rest_dtype == "float32"):
        return GGMLQuantizationType.F32
    kind = GGMLQuantizationType[(REST.get(weights, weights) if rest else weights).upper()]
    return GGMLQuantizationType.F16 if shape[-1] % GGML_QUANT_SIZES[kind][0] else kind


def encoded(
    layout: SkiplessLayout, reader: CheckpointReader, kinds: Mapping[str, GGMLQuantizationType], together: bool
) -> Iterator[np.ndarray[Any, Any]]:
    """Each tensor as the file has it. together: round what writes and reads a space with care for each other."""
    parts = stored_from(layout)

    def read(name: str) -> Matrix:
        return tensor(name, parts[name], layout, reader)

    members = {name: space for space in spaces(layout) for name in space.names} if together else {}
    ready: dict[str, np.ndarray[Any, Any]] = {}
    for name in layout.shapes:
        if name in members and name not in ready:
            ready |= members[name].encoded(read, kinds)
        if name in ready:
            yield ready.pop(name)
        else:
            index = kinds[name] is GGMLQuantizationType.I32
            yield read(name).numpy() if index else plain(name, read(name), kinds[name])


def stored_from(layout: Layout) -> dict[str, list[str]]:
    """Which of the model folder's tensors each of the file's is made of."""
    sources: dict[str, list[str]] = {name: [] for name in layout.shapes}
    for tensor, location in layout.locations.items():
        sources[location.tensors[0]].append(tensor)
    return sources


def tensor(name: str, parts: list[str], layout: Layout, reader: CheckpointReader) -> Matrix:
    """One tensor of the file, in fp32 or, of indices, int32; a matrix that stands so in the folder as Rows."""
    shape = layout.shapes[name]
    if not parts and len(shape) == 1:
        return torch.ones(shape)
    if not parts:
        kind = "key" if name.endswith("attn_k.weight") else "value"
        return whole_projection(kind, int(name.split(".")[1]), layout.architecture, reader)
    if len(shape) == 2 and len(parts) == 1 and reader.tensors[parts[0]].shape == shape:

        def rows(which: Any) -> torch.Tensor:
            return reader.tensor(parts[0], which).float()

        return cast(torch.Tensor, Rows(shape, torch.float32, torch.device("cpu"), rows))
    values = [reader.tensor(part) for part in parts]
    whole = torch.stack(values) if len(values) > 1 else values[0]
    if not whole.dtype.is_floating_point:
        check_order(parts[0], whole, layout.architecture.hidden_size)
        return whole
    if name.endswith("attn_k.bias") and len(whole) < layout.architecture.value_width:
        size = layout.architecture.unrotated  # whose bias the softmax takes away
        whole = torch.nn.functional.pad(whole.unflatten(0, (-1, layout.architecture.rotated)), (0, size)).flatten()
    if whole.numel() < math.prod(shape):  # a gain of each head, for each of its outputs
        whole = whole.repeat_interleave(layout.architecture.head_dim)
    return whole.float().reshape(shape)


def whole_projection(kind: str, layer: int, architecture: Architecture, reader: CheckpointReader) -> torch.Tensor:
    """k_proj or v_proj ("key", "value") of a closed seam with its identity columns, and what RoPE rotates of keys,
    (heads * head_dim, hidden_size).
    """
    attention = f"model.layers.{layer}.self_attn"
    weight = reader.tensor(f"{attention}.{kind[0]}_proj.weight")
    order = reader.tensor(name := f"{attention}.{kind}_order")
    check_order(name, order, architecture.hidden_size)
    order = exchanged(order, architecture.hidden_size)
    size, heads = architecture.head_dim, architecture.num_key_value_heads
    rotated = architecture.rotated if kind == "key" else 0
    identity = torch.eye(size - rotated, dtype=weight.dtype).expand(heads, -1, -1)
    ordered = torch.cat((identity, weight.unflatten(0, (heads, size - rotated))), -1)
    weights = torch.empty_like(ordered).scatter_(-1, order[:, None].expand_as(ordered), ordered)
    if rotated:
        own = reader.tensor(f"{attention}.k_rope_proj.weight").unflatten(0, (heads, rotated))
        weights = torch.cat((own, weights), 1)
    return weights.flatten(0, 1).float()
