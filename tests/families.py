"""Tiny models of every family that is described, built by transformers itself."""

import torch
import transformers

LLAMA = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
}
GPT = {"vocab_size": 96, "n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 4}
MOE = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
OPT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "ffn_dim": 40,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
    "word_embed_proj_dim": 32,
    "pad_token_id": 1,
}
FALCON = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "llama": ("Llama", LLAMA),
    "llama-mha-biased": ("Llama", {**LLAMA, "num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
    "llama-tied-wide": ("Llama", {**LLAMA, "tie_word_embeddings": True, "head_dim": 12}),
    "mistral": ("Mistral", {**LLAMA, "sliding_window": None}),
    "mixtral": ("Mixtral", {**LLAMA, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2", LLAMA),
    "qwen3": ("Qwen3", {**LLAMA, "head_dim": 12}),
    "qwen3_moe": ("Qwen3Moe", {**LLAMA, **MOE, "mlp_only_layers": [1]}),
    "qwen3_moe-every-other": ("Qwen3Moe", {**LLAMA, **MOE, "num_hidden_layers": 3, "decoder_sparse_step": 2}),
    "gemma": ("Gemma", {**LLAMA, "head_dim": 16}),
    "gemma2": ("Gemma2", {**LLAMA, "head_dim": 16, "query_pre_attn_scalar": 24}),
    "gemma3": ("Gemma3Text", {**LLAMA, "head_dim": 16}),
    "phi": ("Phi", LLAMA),
    "phi-normed": ("Phi", {**LLAMA, "qk_layernorm": True}),
    "phi3": ("Phi3", LLAMA),
    "gpt2": ("GPT2", GPT),
    "gpt2-inner": ("GPT2", {**GPT, "n_inner": 40}),
    "gptj": ("GPTJ", {**GPT, "rotary_dim": 4}),
    "gpt_neox": ("GPTNeoX", LLAMA),
    "gpt_neox-serial": ("GPTNeoX", {**LLAMA, "use_parallel_residual": False, "attention_bias": False}),
    "opt": ("OPT", OPT),
    "opt-projected": ("OPT", {**OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "opt-bare": ("OPT", {**OPT, "enable_bias": False, "layer_norm_elementwise_affine": False}),
    "bloom": ("Bloom", {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon-7b": ("Falcon", {**FALCON, "multi_query": True}),
    "falcon-40b": ("Falcon", {**FALCON, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "falcon-rw": (
        "Falcon",
        {**FALCON, "multi_query": False, "parallel_attn": False, "bias": True, "alibi": True, "ffn_hidden_size": 40},
    ),
    "mpt": ("Mpt", {"vocab_size": 96, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 24}),
    "gpt_bigcode": ("GPTBigCode", GPT),
    "gpt_bigcode-mha": ("GPTBigCode", {**GPT, "multi_query": False}),
    "stablelm": ("StableLm", LLAMA),
    "stablelm-biased": ("StableLm", {**LLAMA, "use_qkv_bias": True, "qk_layernorm": True}),
    "stablelm-parallel": ("StableLm", {**LLAMA, "use_parallel_residual": True, "num_key_value_heads": 4}),
    "cohere": ("Cohere", LLAMA),
    "cohere-normed": ("Cohere", {**LLAMA, "use_qk_norm": True}),
    "olmo2": ("Olmo2", LLAMA),
}


def build(name):
    """A model of transformers' own class, in fp64, random in every tensor."""
    kind, values = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**values)
    # Falcon's eager attention adds its ALiBi twice; Gemma 2's soft-cap needs the eager one
    attention = "sdpa" if kind == "Falcon" else "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, experts_implementation="eager"
    )
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def saved(name, folder):
    """The same, saved as a user would."""
    model = build(name)
    model.save_pretrained(folder)
    return model
