"""Gemma 3, and the language model of a multimodal one, whose published configs leave out what is usual."""

import dataclasses
from typing import Any

from skipless.checkpoint.families import gemma2
from skipless.checkpoint.family import Config


def ropes(config: Config) -> dict[str, Any]:
    """RoPE's parameters of each kind of layers, or, where all are of one, its own."""
    parameters = {kind: dict(config["rope_parameters"][kind]) for kind in sorted(set(config["layer_types"]))}
    return parameters if len(parameters) > 1 else next(iter(parameters.values()))


FAMILY = dataclasses.replace(
    gemma2.FAMILY,
    model_types=("gemma3", "gemma3_text"),
    inside="text_config",
    prefixes=("model.", "language_model.model.", "model.language_model."),
    defaults={**gemma2.FAMILY.defaults, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262208},
    fixed={**gemma2.FAMILY.fixed, "qk_norm": "head_dim"},
    computes={**(gemma2.FAMILY.computes or {}), "rope_parameters": ropes},
    requires={"use_bidirectional_attention": False},
    beside=("vision_tower.", "multi_modal_projector."),
)
