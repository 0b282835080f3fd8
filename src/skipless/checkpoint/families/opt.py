"""OPT: learned positions (two rows more than positions), in one size an embedding of another width and post-norms."""

from skipless.checkpoint.family import LLAMA_FIELDS, LLAMA_FIXED, Config, Family

# The position table's first two rows are for padding.
OFFSET = 2
# torch's own.
EPS = 1e-5


def norms(config: Config) -> tuple[str, ...]:
    """Where norms stand; without gains and biases they are no tensors."""
    if not config["layer_norm_elementwise_affine"]:
        return ()
    if not config["do_layer_norm_before"]:
        return ("attention_stream_norm", "ffn_stream_norm")
    last = () if config["_remove_final_layer_norm"] else ("model.norm",)
    return ("input_layernorm", "post_attention_layernorm", *last)


FAMILY = Family(
    model_types=("opt",),
    fields={
        **{name: rule for name, rule in LLAMA_FIELDS.items() if name not in ("num_key_value_heads", "head_dim")},
        "intermediate_size": "ffn_dim",
        "embedding_size": lambda config: (
            None if config["word_embed_proj_dim"] == config["hidden_size"] else config["word_embed_proj_dim"]
        ),
        "max_position_embeddings": "max_position_embeddings",
        "attention_bias": "enable_bias",
        "mlp_bias": "enable_bias",
        "norms": norms,
    },
    defaults={
        "tie_word_embeddings": True,
        "word_embed_proj_dim": None,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
    },
    fixed={
        **LLAMA_FIXED,
        "norm_type": "layer",
        "ffn_type": "mlp",
        "position_type": "learned",
        "position_offset": OFFSET,
    },
    computes={"hidden_act": "activation_function", "norm_eps": lambda config: EPS},
    requires={"layer_norm_elementwise_affine": True},
    prefixes=("model.decoder.", "decoder."),
    names={
        "model.position_embeddings": "embed_positions",
        "model.norm": "final_layer_norm",
        "input_layernorm": "self_attn_layer_norm",
        "post_attention_layernorm": "final_layer_norm",
        "attention_stream_norm": "self_attn_layer_norm",
        "ffn_stream_norm": "final_layer_norm",
        "self_attn.o_proj": "self_attn.out_proj",
        "mlp.up_proj": "fc1",
        "mlp.down_proj": "fc2",
    },
)
