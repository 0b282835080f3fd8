"""Starting values with which a norm-free, skipless model trains: every layer begins as a near-isometry.

Without norms and skips nothing corrects a layer that shrinks or grows its input, and a bias-free SwiGLU is of degree
two in it. So the FFN starts linear (gate bias 1, a small gate, O the pseudo-inverse of M), the attention starts as its
value path (He & Hofmann, arXiv:2311.01906, shaped attention), and the matrices on that path are orthogonal.
"""

import torch
from torch import nn

from skipless.errors import InputError
from skipless.model import SkiplessForCausalLM
from skipless.model.modeling_skipless import SkiplessAttention, SkiplessMLP

# Spread of the gate's weights before its bias of 1: small enough that the GLU starts linear, large enough to learn.
GATE_SPREAD = 0.1


@torch.no_grad()
def initialize(model: SkiplessForCausalLM) -> None:
    """Set the starting values in place.

    Raises InputError for a model that already lacks projections, or whose GLU has no gate bias.
    """
    config = model.config
    if config.stream_basis is not None or config.p_removed:
        raise InputError("stream_basis, p_removed: expected a model with all its projections to start training from")
    if config.ffn_type == "glu" and not (config.gate_bias or config.mlp_bias):
        raise InputError("gate_bias: expected true to train a GLU without norms, found false: its signal would die out")
    nn.init.normal_(model.model.embed_tokens.weight)
    if model.model.position_embeddings is not None:
        nn.init.normal_(model.model.position_embeddings.weight, std=0.1)
    if not config.tie_word_embeddings:
        nn.init.normal_(model.lm_head.weight, std=0.1 * config.hidden_size**-0.5)
    for layer in model.model.layers:
        initialize_attention(layer.self_attn)
        initialize_ffn(layer.mlp)


def initialize_attention(attention: SkiplessAttention) -> None:
    """Orthogonal Q, V, P. Shaped: K = 0 (uniform softmax). Plain: K = Q summed over each group, so tokens see
    themselves first.
    """
    for linear in (attention.q_proj, attention.v_proj, attention.o_proj):
        nn.init.orthogonal_(linear.weight)
    if attention.config.attention_shaping is not None:
        nn.init.zeros_(attention.k_proj.weight)
    else:
        grouped = attention.q_proj.weight.view(
            attention.num_key_value_heads, -1, attention.head_dim, attention.config.hidden_size
        )
        attention.k_proj.weight.copy_(grouped.sum(1).flatten(0, 1))


def initialize_ffn(mlp: SkiplessMLP) -> None:
    """M orthogonal, O its pseudo-inverse over the activation's gain, a GLU's gate open (bias 1) and nearly constant."""
    nn.init.orthogonal_(mlp.up_proj.weight)
    if mlp.gate_proj is None:
        z = torch.special.ndtri(torch.linspace(0.001, 0.999, 999))
        gain = (z * mlp.act_fn(z)).mean() / z.square().mean()  # the line closest to the activation, for normal inputs
    else:
        nn.init.normal_(mlp.gate_proj.weight, std=GATE_SPREAD * mlp.gate_proj.in_features**-0.5)
        nn.init.ones_(mlp.gate_proj.bias)
        gain = mlp.act_fn(torch.ones(()))
    mlp.down_proj.weight.copy_(torch.linalg.pinv(mlp.up_proj.weight) / gain)
