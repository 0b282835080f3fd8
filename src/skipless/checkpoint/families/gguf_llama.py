"""GGUF files of architecture "llama": Llama, Mistral, SmolLM2; queries and keys in interleaved RoPE's order."""

from skipless.checkpoint.family import LLAMA_COMPUTES, LLAMA_FIXED, Family

FAMILY = Family(
    model_types=("gguf-llama",),
    fields={
        "vocab_size": "vocab_size",
        "hidden_size": "llama.embedding_length",
        "intermediate_size": "llama.feed_forward_length",
        "num_hidden_layers": "llama.block_count",
        "num_attention_heads": "llama.attention.head_count",
        "num_key_value_heads": "llama.attention.head_count_kv",
        "head_dim": "llama.attention.key_length",
        "tie_word_embeddings": "tie_word_embeddings",
        "qkv_bias": "qkv_bias",
    },
    defaults={"llama.attention.head_count_kv": None, "llama.attention.key_length": None},
    fixed={**LLAMA_FIXED, "position_type": "rope_interleaved"},
    prefixes=("",),
    layers="blk.{i}",
    names={
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    },
    buffers=("rope_freqs.",),
    computes=LLAMA_COMPUTES,  # of the Llama that gguf_folder makes of it
)
