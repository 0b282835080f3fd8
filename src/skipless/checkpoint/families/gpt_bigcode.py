"""StarCoder 1 and SantaCoder (gpt_bigcode): GPT-2 with one key-value head."""

import dataclasses

from skipless.checkpoint.families import gpt2

FAMILY = dataclasses.replace(
    gpt2.FAMILY,
    model_types=("gpt_bigcode",),
    fields={**gpt2.FAMILY.fields, "num_key_value_heads": lambda config: 1 if config["multi_query"] else None},
    defaults={**gpt2.FAMILY.defaults, "multi_query": True},
    qkv="grouped",
    requires={"scale_attn_weights": True, "add_cross_attention": False},
    transposed=False,
)
