"""Ordinary models as llama.cpp's converter writes them into a GGUF file."""

import gguf
import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import quantize

from skipless.checkpoint.families import llama
from skipless.checkpoint.families.gguf_llama import FAMILY
from skipless.checkpoint.family import Layout


def write(model, file, kind="F32", edit=lambda writer: None, rotated=True):
    """A transformers Llama's weights, matrices in `kind`. edit: of the metadata; rotated: whether Q's and K's rows are
    put in llama.cpp's order.
    """
    config = model.config
    architecture = llama.FAMILY.architecture(config.to_dict())
    layout = Layout.of(FAMILY, architecture, [""] * 99)
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    edit(writer)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        if name not in layout.locations:
            continue
        values, kept = weight.float().numpy(), GGMLQuantizationType["F32" if weight.ndim == 1 else kind]
        if rotated and (count := heads.get(name.split(".")[-2])):  # permute() of llama.cpp's convert_hf_to_gguf.py
            shape = values.shape
            values = values.reshape(count, 2, shape[0] // count // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
        (stored,) = layout.locations[name].tensors
        writer.add_tensor(stored, quantize(np.ascontiguousarray(values), kept), raw_dtype=kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
