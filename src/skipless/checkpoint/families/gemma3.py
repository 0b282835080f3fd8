"""Gemma 3, and the language model of a multimodal one, whose published configs leave out what is usual."""

import dataclasses

from skipless.checkpoint.families import gemma2

FAMILY = dataclasses.replace(
    gemma2.FAMILY,
    model_types=("gemma3", "gemma3_text"),
    inside="text_config",
    prefixes=("model.", "language_model.model.", "model.language_model."),
    defaults={**gemma2.FAMILY.defaults, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262208},
    fixed={**gemma2.FAMILY.fixed, "qk_norm": "head_dim"},
    beside=("vision_tower.", "multi_modal_projector."),
)
