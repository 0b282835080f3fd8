#include "models.h"

void llama_model_skipless::load_arch_hparams(llama_model_loader & ml) {
    norm_type = ml.get_key(LLM_KV_ATTENTION_LAYERNORM_EPS, hparams.f_norm_eps, false) ? LLM_NORM : LLM_NORM_RMS;
    ml.get_key(LLM_KV_ATTENTION_LAYERNORM_RMS_EPS, hparams.f_norm_rms_eps, false);

    ml.get_key(LLM_KV_USE_PARALLEL_RESIDUAL, hparams.use_par_res);

    std::string residual;
    ml.get_key(LLM_KV_RESIDUAL, residual);
    if (residual != "none" && residual != "attention" && residual != "ffn" && residual != "both") {
        throw std::runtime_error("unknown residual: " + residual);
    }
    attn_skip = residual == "attention" || residual == "both";
    ffn_skip  = residual == "ffn"       || residual == "both";

    std::string hidden_act;
    ml.get_key(LLM_KV_HIDDEN_ACT, hidden_act);
    if (hidden_act == "silu") {
        hparams.llm_ffn_op = LLM_FFN_SILU;
    } else if (hidden_act == "relu") {
        hparams.llm_ffn_op = LLM_FFN_RELU;
    } else if (hidden_act == "gelu" || hidden_act == "gelu_tanh") {
        hparams.llm_ffn_op = LLM_FFN_GELU;
        gelu_erf = hidden_act == "gelu";
    } else {
        throw std::runtime_error("unknown hidden activation: " + hidden_act);
    }

    ml.get_key(LLM_KV_ROPE_INTERLEAVED,         hparams.rope_interleaved,    false);
    ml.get_key(LLM_KV_ATTENTION_MAX_ALIBI_BIAS, hparams.f_max_alibi_bias,    false);
    ml.get_key(LLM_KV_EXPERT_WEIGHTS_NORM,      hparams.expert_weights_norm, false);

    hparams.attn_soft_cap = ml.get_key(LLM_KV_ATTN_LOGIT_SOFTCAPPING, hparams.f_attn_logit_softcapping, false);
    if (!ml.get_key(LLM_KV_FINAL_LOGIT_SOFTCAPPING, hparams.f_final_logit_softcapping, false)) {
        hparams.f_final_logit_softcapping = 0.0f;
    }

    type = LLM_TYPE_UNKNOWN;
}

void llama_model_skipless::load_arch_tensors(llama_model_loader &) {
    LLAMA_LOAD_LOCALS;

    const int64_t n_embd_q = n_embd_head_k * n_head;

    tok_embd   = create_tensor(tn(LLM_TENSOR_TOKEN_EMBD, "weight"), {n_embd, n_vocab}, 0);
    tok_embd_b = create_tensor(tn(LLM_TENSOR_TOKEN_EMBD, "bias"),   {n_embd}, TENSOR_NOT_REQUIRED);
    pos_embd   = create_tensor(tn(LLM_TENSOR_POS_EMBD,   "weight"), {n_embd, n_ctx_train}, TENSOR_NOT_REQUIRED);

    tok_norm   = create_tensor(tn(LLM_TENSOR_TOKEN_EMBD_NORM, "weight", 0), {n_embd}, TENSOR_NOT_REQUIRED);
    tok_norm_b = create_tensor(tn(LLM_TENSOR_TOKEN_EMBD_NORM, "bias",   0), {n_embd}, TENSOR_NOT_REQUIRED);

    // output
    output_norm   = create_tensor(tn(LLM_TENSOR_OUTPUT_NORM, "weight"), {n_embd}, TENSOR_NOT_REQUIRED);
    output_norm_b = create_tensor(tn(LLM_TENSOR_OUTPUT_NORM, "bias"),   {n_embd}, TENSOR_NOT_REQUIRED);

    output_order = create_tensor(tn(LLM_TENSOR_OUTPUT_ORDER), {n_vocab}, TENSOR_NOT_REQUIRED);
    output       = create_tensor(tn(LLM_TENSOR_OUTPUT, "weight"), {n_embd, n_vocab - (output_order ? n_embd : 0)}, TENSOR_NOT_REQUIRED);
    if (output == nullptr) {
        output = create_tensor(tn(LLM_TENSOR_TOKEN_EMBD, "weight"), {n_embd, n_vocab}, TENSOR_DUPLICATED);
    }

    layers_skipless.resize(n_layer);

    for (int i = 0; i < n_layer; ++i) {
        auto & layer = layers[i];
        auto & extra = layers_skipless[i];

        layer.attn_norm   = create_tensor(tn(LLM_TENSOR_ATTN_NORM, "weight", i), {n_embd}, TENSOR_NOT_REQUIRED);
        layer.attn_norm_b = create_tensor(tn(LLM_TENSOR_ATTN_NORM, "bias",   i), {n_embd}, TENSOR_NOT_REQUIRED);

        // q, k and v: each its matrix, or the stream; or all by columns, v perhaps by its matrix
        const auto *  order    = ml->get_tensor_meta(tn(LLM_TENSOR_ATTN_QKV_ORDER, i).str().c_str());
        const bool    has_v    = !order || order->ne[0] == n_embd_q + n_embd_k_gqa;
        const int64_t n_placed = n_embd_q + n_embd_k_gqa + (has_v ? 0 : n_embd_v_gqa);

        extra.qkv_order = create_tensor(tn(LLM_TENSOR_ATTN_QKV_ORDER, i), {n_placed}, TENSOR_NOT_REQUIRED);
        if (extra.qkv_order) {
            layer.wqkv   = create_tensor(tn(LLM_TENSOR_ATTN_QKV, "weight", i), {n_embd, n_placed - n_embd}, n_placed > n_embd ? 0 : TENSOR_NOT_REQUIRED);
            layer.wqkv_b = create_tensor(tn(LLM_TENSOR_ATTN_QKV, "bias",   i), {n_placed - n_embd}, TENSOR_NOT_REQUIRED);
        } else {
            layer.wq   = create_tensor(tn(LLM_TENSOR_ATTN_Q, "weight", i), {n_embd, n_embd_q},     n_embd_q     == n_embd ? TENSOR_NOT_REQUIRED : 0);
            layer.wk   = create_tensor(tn(LLM_TENSOR_ATTN_K, "weight", i), {n_embd, n_embd_k_gqa}, n_embd_k_gqa == n_embd ? TENSOR_NOT_REQUIRED : 0);
            layer.wq_b = create_tensor(tn(LLM_TENSOR_ATTN_Q, "bias",   i), {n_embd_q},     TENSOR_NOT_REQUIRED);
            layer.wk_b = create_tensor(tn(LLM_TENSOR_ATTN_K, "bias",   i), {n_embd_k_gqa}, TENSOR_NOT_REQUIRED);
        }
        if (has_v) {
            layer.wv   = create_tensor(tn(LLM_TENSOR_ATTN_V, "weight", i), {n_embd, n_embd_v_gqa}, n_embd_v_gqa == n_embd ? TENSOR_NOT_REQUIRED : 0);
            layer.wv_b = create_tensor(tn(LLM_TENSOR_ATTN_V, "bias",   i), {n_embd_v_gqa}, TENSOR_NOT_REQUIRED);
        }

        layer.attn_q_norm = create_tensor(tn(LLM_TENSOR_ATTN_Q_NORM, "weight", i), {n_embd_head_k}, TENSOR_NOT_REQUIRED);
        layer.attn_k_norm = create_tensor(tn(LLM_TENSOR_ATTN_K_NORM, "weight", i), {n_embd_head_k}, TENSOR_NOT_REQUIRED);

        extra.alpha = create_tensor(tn(LLM_TENSOR_ATTN_ALPHA, i), {n_embd_q}, TENSOR_NOT_REQUIRED);
        extra.beta  = create_tensor(tn(LLM_TENSOR_ATTN_BETA,  i), {n_embd_q}, extra.alpha ? 0 : TENSOR_NOT_REQUIRED);

        extra.out_order = create_tensor(tn(LLM_TENSOR_ATTN_OUT_ORDER, i), {n_embd_q}, TENSOR_NOT_REQUIRED);
        layer.wo   = create_tensor(tn(LLM_TENSOR_ATTN_OUT, "weight", i), {n_embd_q - (extra.out_order ? n_embd : 0), n_embd}, TENSOR_NOT_REQUIRED);
        layer.wo_b = create_tensor(tn(LLM_TENSOR_ATTN_OUT, "bias",   i), {n_embd}, TENSOR_NOT_REQUIRED);

        layer.ffn_norm   = create_tensor(tn(LLM_TENSOR_FFN_NORM, "weight", i), {n_embd}, TENSOR_NOT_REQUIRED);
        layer.ffn_norm_b = create_tensor(tn(LLM_TENSOR_FFN_NORM, "bias",   i), {n_embd}, TENSOR_NOT_REQUIRED);

        // the ffn reads the stream, or the heads
        const int64_t n_in = layer.wo || hparams.use_par_res ? n_embd : n_embd_q;

        if (n_expert == 0) {
            layer.ffn_gate = create_tensor(tn(LLM_TENSOR_FFN_GATE, "weight", i), {n_in, n_ff},   TENSOR_NOT_REQUIRED);
            layer.ffn_up   = create_tensor(tn(LLM_TENSOR_FFN_UP,   "weight", i), {n_in, n_ff},   0);
            layer.ffn_down = create_tensor(tn(LLM_TENSOR_FFN_DOWN, "weight", i), {n_ff, n_embd}, 0);

            layer.ffn_gate_b = create_tensor(tn(LLM_TENSOR_FFN_GATE, "bias", i), {n_ff},   TENSOR_NOT_REQUIRED);
            layer.ffn_up_b   = create_tensor(tn(LLM_TENSOR_FFN_UP,   "bias", i), {n_ff},   TENSOR_NOT_REQUIRED);
            layer.ffn_down_b = create_tensor(tn(LLM_TENSOR_FFN_DOWN, "bias", i), {n_embd}, TENSOR_NOT_REQUIRED);
        } else {
            layer.ffn_gate_inp   = create_tensor(tn(LLM_TENSOR_FFN_GATE_INP, "weight", i), {n_in, n_expert}, 0);
            layer.ffn_gate_inp_b = create_tensor(tn(LLM_TENSOR_FFN_GATE_INP, "bias",   i), {n_expert}, TENSOR_NOT_REQUIRED);

            layer.ffn_gate_exps = create_tensor(tn(LLM_TENSOR_FFN_GATE_EXPS, "weight", i), {n_in, n_ff, n_expert},   0);
            layer.ffn_up_exps   = create_tensor(tn(LLM_TENSOR_FFN_UP_EXPS,   "weight", i), {n_in, n_ff, n_expert},   0);
            layer.ffn_down_exps = create_tensor(tn(LLM_TENSOR_FFN_DOWN_EXPS, "weight", i), {n_ff, n_embd, n_expert}, 0);

            layer.ffn_gate_exps_b = create_tensor(tn(LLM_TENSOR_FFN_GATE_EXPS, "bias", i), {n_ff, n_expert},   TENSOR_NOT_REQUIRED);
            layer.ffn_up_exps_b   = create_tensor(tn(LLM_TENSOR_FFN_UP_EXPS,   "bias", i), {n_ff, n_expert},   TENSOR_NOT_REQUIRED);
            layer.ffn_down_exps_b = create_tensor(tn(LLM_TENSOR_FFN_DOWN_EXPS, "bias", i), {n_embd, n_expert}, TENSOR_NOT_REQUIRED);
        }
    }
}

std::unique_ptr<llm_graph_context> llama_model_skipless::build_arch_graph(const llm_graph_params & params) const {
    return std::make_unique<graph>(*this, params);
}

ggml_tensor * llama_model_skipless::graph::build_order(ggml_tensor * cur, ggml_tensor * order) const {
    const int64_t n = cur->ne[1];

    // rows are gathered, not columns
    cur = n == 1 ? ggml_reshape_2d(ctx0, cur, 1, cur->ne[0]) : ggml_cont(ctx0, ggml_transpose(ctx0, cur));
    cur = ggml_get_rows(ctx0, cur, order);

    return n == 1 ? ggml_reshape_2d(ctx0, cur, cur->ne[1], 1) : ggml_cont(ctx0, ggml_transpose(ctx0, cur));
}

ggml_tensor * llama_model_skipless::graph::build_linear(ggml_tensor * w, ggml_tensor * b, ggml_tensor * cur) const {
    if (w) {
        cur = build_lora_mm(w, cur);
    }
    if (b) {
        cur = ggml_add(ctx0, cur, b);
    }

    return cur;
}

ggml_tensor * llama_model_skipless::graph::build_heads(llm_graph_input_attn_kv * inp, ggml_tensor * inp_pos, ggml_tensor * cur, int il) const {
    const auto & layer = model.layers[il];
    const auto & extra = model.layers_skipless[il];

    const int64_t n_embd_head = hparams.n_embd_head_v();
    const int64_t n_group     = n_head / n_head_kv;

    ggml_tensor * Qcur = nullptr;
    ggml_tensor * Kcur = nullptr;
    ggml_tensor * Vcur = nullptr;

    if (extra.qkv_order) {
        ggml_tensor * placed = cur;
        if (layer.wqkv) {
            ggml_tensor * rest = build_linear(layer.wqkv, layer.wqkv_b, cur);
            cb(rest, "qkv_rest", il);
            placed = ggml_concat(ctx0, cur, rest, 0);
        }
        placed = build_order(placed, extra.qkv_order);
        cb(placed, "qkv_placed", il);

        const size_t head = ggml_row_size(placed->type, n_embd_head);

        Qcur = ggml_view_3d(ctx0, placed, n_embd_head, n_head,    n_tokens, head, placed->nb[1], 0);
        Kcur = ggml_view_3d(ctx0, placed, n_embd_head, n_head_kv, n_tokens, head, placed->nb[1], n_head*head);
        if (placed->ne[0] > n_embd_head*(n_head + n_head_kv)) {
            Vcur = ggml_view_3d(ctx0, placed, n_embd_head, n_head_kv, n_tokens, head, placed->nb[1], (n_head + n_head_kv)*head);
        }
    } else {
        Qcur = ggml_reshape_3d(ctx0, build_linear(layer.wq, layer.wq_b, cur), n_embd_head, n_head,    n_tokens);
        Kcur = ggml_reshape_3d(ctx0, build_linear(layer.wk, layer.wk_b, cur), n_embd_head, n_head_kv, n_tokens);
    }
    if (!Vcur) {
        Vcur = ggml_reshape_3d(ctx0, build_linear(layer.wv, layer.wv_b, cur), n_embd_head, n_head_kv, n_tokens);
    }

    if (layer.attn_q_norm) {
        Qcur = build_norm(Qcur, layer.attn_q_norm, NULL, LLM_NORM_RMS, il);
        Kcur = build_norm(Kcur, layer.attn_k_norm, NULL, LLM_NORM_RMS, il);
    }

    if (rope_type != LLAMA_ROPE_TYPE_NONE) {
        Qcur = ggml_rope_ext(
                ctx0, Qcur, inp_pos, nullptr,
                n_rot, rope_type, n_ctx_orig, freq_base, freq_scale,
                ext_factor, attn_factor, beta_fast, beta_slow
                );

        Kcur = ggml_rope_ext(
                ctx0, Kcur, inp_pos, nullptr,
                n_rot, rope_type, n_ctx_orig, freq_base, freq_scale,
                ext_factor, attn_factor, beta_fast, beta_slow
                );
    }

    cb(Qcur, "Qcur", il);
    cb(Kcur, "Kcur", il);
    cb(Vcur, "Vcur", il);

    float kq_scale = 1.0f/sqrtf(float(n_embd_head));
    if (hparams.attn_soft_cap) {
        // the cap is of scores that have been scaled
        Qcur = ggml_scale(ctx0, ggml_cont(ctx0, Qcur), kq_scale);
        kq_scale = 1.0f;
    }

    cur = build_attn(inp,
            nullptr, nullptr, nullptr,
            Qcur, Kcur, Vcur, nullptr, nullptr, nullptr, kq_scale, il);

    if (extra.alpha) {
        ggml_tensor * own = ggml_cont_4d(ctx0, Vcur, n_embd_head, 1, n_head_kv, n_tokens);
        own = ggml_repeat_4d(ctx0, own, n_embd_head, n_group, n_head_kv, n_tokens);
        own = ggml_reshape_2d(ctx0, own, n_embd_head*n_head, n_tokens);

        cur = ggml_add(ctx0, ggml_mul(ctx0, own, extra.alpha), ggml_mul(ctx0, cur, extra.beta));
        cb(cur, "attn_shaped", il);
    }

    return cur;
}

ggml_tensor * llama_model_skipless::graph::build_attn_out(ggml_tensor * cur, int il) const {
    const auto & layer = model.layers[il];
    const auto & extra = model.layers_skipless[il];

    if (!extra.out_order) {
        return build_linear(layer.wo, layer.wo_b, cur);
    }

    cur = build_order(cur, extra.out_order);

    ggml_tensor * passed = ggml_view_2d(ctx0, cur, n_embd, cur->ne[1], cur->nb[1], 0);
    ggml_tensor * others = ggml_view_2d(ctx0, cur, cur->ne[0] - n_embd, cur->ne[1], cur->nb[1], ggml_row_size(cur->type, n_embd));

    return ggml_add(ctx0, build_linear(layer.wo, layer.wo_b, others), passed);
}

ggml_tensor * llama_model_skipless::graph::build_mlp(ggml_tensor * cur, int il) const {
    const auto & layer = model.layers[il];

    if (layer.ffn_gate_inp) {
        return build_moe_ffn(cur,
                layer.ffn_gate_inp,  layer.ffn_gate_inp_b,
                layer.ffn_up_exps,   layer.ffn_up_exps_b,
                layer.ffn_gate_exps, layer.ffn_gate_exps_b,
                layer.ffn_down_exps, layer.ffn_down_exps_b,
                nullptr,
                n_expert, n_expert_used,
                hparams.llm_ffn_op, hparams.expert_weights_norm,
                hparams.expert_weights_scale,
                LLAMA_EXPERT_GATING_FUNC_TYPE_SOFTMAX,
                il);
    }

    if (model.gelu_erf) {
        ggml_tensor * up = build_linear(layer.ffn_up, layer.ffn_up_b, cur);
        cur = layer.ffn_gate ?
            ggml_geglu_erf_split(ctx0, build_linear(layer.ffn_gate, layer.ffn_gate_b, cur), up) :
            ggml_gelu_erf(ctx0, up);
        return build_linear(layer.ffn_down, layer.ffn_down_b, cur);
    }

    return build_ffn(cur,
            layer.ffn_up,   layer.ffn_up_b,   NULL,
            layer.ffn_gate, layer.ffn_gate_b, NULL,
            layer.ffn_down, layer.ffn_down_b, NULL,
            NULL,
            hparams.llm_ffn_op, layer.ffn_gate ? LLM_FFN_PAR : LLM_FFN_SEQ, il);
}

llama_model_skipless::graph::graph(const llama_model_skipless & model, const llm_graph_params & params) :
    llm_graph_context(params), model(model) {
    ggml_tensor * cur;
    ggml_tensor * inpL;

    inpL = build_inp_embd(model.tok_embd);

    if (model.tok_embd_b) {
        inpL = ggml_add(ctx0, inpL, model.tok_embd_b);
    }
    if (model.tok_norm) {
        inpL = build_norm(inpL, model.tok_norm, model.tok_norm_b, model.norm_type, -1);
    }

    // inp_pos - contains the positions
    ggml_tensor * inp_pos = nullptr;
    if (model.pos_embd || rope_type != LLAMA_ROPE_TYPE_NONE) {
        inp_pos = build_inp_pos();
    }
    if (model.pos_embd) {
        inpL = ggml_add(ctx0, inpL, ggml_get_rows(ctx0, model.pos_embd, inp_pos));
        cb(inpL, "pos_embd", -1);
    }

    auto * inp_attn = build_attn_inp_kv();

    ggml_tensor * inp_out_ids = build_inp_out_ids();

    for (int il = 0; il < n_layer; ++il) {
        const auto & layer = model.layers[il];

        ggml_tensor * attn_in = inpL;
        if (layer.attn_norm) {
            attn_in = build_norm(inpL, layer.attn_norm, layer.attn_norm_b, model.norm_type, il);
            cb(attn_in, "attn_norm", il);
        }

        cur = build_heads(inp_attn, inp_pos, attn_in, il);

        if (il == n_layer - 1 && inp_out_ids) {
            cur     = ggml_get_rows(ctx0, cur,     inp_out_ids);
            attn_in = ggml_get_rows(ctx0, attn_in, inp_out_ids);
            inpL    = ggml_get_rows(ctx0, inpL,    inp_out_ids);
        }

        cur = build_attn_out(cur, il);
        cb(cur, "attn_out", il);

        if (model.attn_skip) {
            cur = ggml_add(ctx0, cur, inpL);
        }

        // feed-forward network
        ggml_tensor * ffn_in = cur;
        if (hparams.use_par_res) {
            ffn_in = layer.ffn_norm ? inpL : attn_in;
        }
        if (layer.ffn_norm) {
            ffn_in = build_norm(ffn_in, layer.ffn_norm, layer.ffn_norm_b, model.norm_type, il);
            cb(ffn_in, "ffn_norm", il);
        }

        ggml_tensor * ffn_out = build_mlp(ffn_in, il);
        cb(ffn_out, "ffn_out", il);

        // a parallel layer's one skip is past both
        cur = hparams.use_par_res || model.ffn_skip ? ggml_add(ctx0, ffn_out, cur) : ffn_out;

        cur = build_cvec(cur, il);
        cb(cur, "l_out", il);

        // input for next layer
        inpL = cur;
    }

    cur = inpL;

    if (model.output_norm) {
        cur = build_norm(cur, model.output_norm, model.output_norm_b, model.norm_type, -1);
    }
    cb(cur, "result_norm", -1);
    res->t_embd = cur;

    // lm_head
    ggml_tensor * stream = cur;

    cur = build_lora_mm(model.output, cur, model.output_s);
    if (model.output_order) {
        cur = build_order(ggml_concat(ctx0, stream, cur, 0), model.output_order);
    }

    if (hparams.f_final_logit_softcapping > 0.0f) {
        cur = ggml_scale(ctx0, cur, 1.0f / hparams.f_final_logit_softcapping);
        cur = ggml_tanh (ctx0, cur);
        cur = ggml_scale(ctx0, cur, hparams.f_final_logit_softcapping);
    }

    cb(cur, "result_output", -1);
    res->t_logits = cur;

    ggml_build_forward_expand(gf, cur);
}
