#pragma once

// included at the end of models.h

// transformers without skip connections (arXiv:2404.12362): of the projections that such a model can do without, the
// tensors are absent, and the stream itself (or, without attn_output, the heads themselves) takes their place
struct llama_model_skipless : public llama_model_base {
    llama_model_skipless(const struct llama_model_params & params) : llama_model_base(params) {}
    void load_arch_hparams(llama_model_loader & ml) override;
    void load_arch_tensors(llama_model_loader & ml) override;

    struct graph : public llm_graph_context {
        const llama_model_skipless & model;

        graph(const llama_model_skipless & model, const llm_graph_params & params);

        // the rows of cur, with its columns in this order
        ggml_tensor * build_order(ggml_tensor * cur, ggml_tensor * order) const;

        ggml_tensor * build_linear(ggml_tensor * w, ggml_tensor * b, ggml_tensor * cur) const;

        // the concatenated heads
        ggml_tensor * build_heads(llm_graph_input_attn_kv * inp, ggml_tensor * inp_pos, ggml_tensor * cur, int il) const;

        ggml_tensor * build_attn_out(ggml_tensor * cur, int il) const;

        ggml_tensor * build_mlp(ggml_tensor * cur, int il) const;
    };

    std::unique_ptr<llm_graph_context> build_arch_graph(const llm_graph_params & params) const override;

    struct layer_skipless {
        // with pivoted columns: of the stream and attn_qkv's outputs together, which is which of q, k and v
        ggml_tensor * qkv_order = nullptr;
        // the heads' outputs that are added as they are, then those that attn_output reads
        ggml_tensor * out_order = nullptr;

        // shaped attention: alpha * v + beta * softmax(.) * v (arXiv:2311.01906), one factor for each output
        ggml_tensor * alpha = nullptr;
        ggml_tensor * beta  = nullptr;
    };

    std::vector<layer_skipless> layers_skipless;

    ggml_tensor * tok_embd_b   = nullptr;
    // of the stream and the output matrix's logits together, which is which token's
    ggml_tensor * output_order = nullptr;

    llm_norm_type norm_type = LLM_NORM_RMS;

    bool attn_skip = false; // the attention's input is added to its output
    bool ffn_skip  = false;

    bool gelu_erf = false; // gelu by the error function, not by tanh
};
