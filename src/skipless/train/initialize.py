"""Starting values with which a norm-free, skipless model trains: every layer begins as a near-isometry.

Without norms and skips nothing corrects a layer that shrinks or grows its input, and a bias-free SwiGLU is of degree
two in it. So the FFN starts linear (gate bias 1, a small gate, O the pseudo-inverse of M), the attention starts as its
value path (He & Hofmann, arXiv:2311.01906, shaped attention), and the matrices on that path are orthogonal.
"""

import torch
from torch import nn

from skipless.errors import InputError
from skipless.model import SkiplessForCausalLM
from skipless.model.modeling_skipless import SkiplessAttention, SkiplessDecoderLayer, SkiplessExperts, SkiplessMLP

# Spread of the gate's weights before its bias of 1: small enough that the GLU starts linear, large enough to learn.
GATE_SPREAD = 0.1
# Where the FFN's output is added to something - a skip, the attention beside it - it starts as this part of it.
FFN_SHARE = 0.1


@torch.no_grad()
def initialize(model: SkiplessForCausalLM, sharpness: tuple[float, ...] = ()) -> None:
    """Set the starting values in place. Projections may be absent, as in Fig. 1 to 4 of arXiv:2404.12362.

    sharpness: K over Q in the first and in the last layer, and evenly between them in the others; the softmax of 0 is
    uniform, and the larger, the more of it a token keeps for itself. Without it, 0 in shaped attention, else 1.
    Raises InputError for a model that was fused in a way that no model is trained in, or whose GLU has neither norms
    nor a gate bias.
    """
    config = model.config
    removed = (config.values_removed, config.keys_removed, config.head_removed, config.first_layer_removed)
    if config.stream_basis == "pivoted" or any(removed):
        raise InputError(
            "stream_basis, values_removed, keys_removed, head_removed, first_layer_removed: expected a model with "
            "whole matrices to start training from, found one that was fused"
        )
    gated = config.ffn_type != "mlp" and not (config.gate_bias or config.mlp_bias)
    if gated and config.norm_type == "none":
        raise InputError("gate_bias: expected true to train a GLU without norms, found false: its signal would die out")
    nn.init.normal_(model.model.embed_tokens.weight)
    if model.model.position_embeddings is not None:
        nn.init.normal_(model.model.position_embeddings.weight, std=0.1)
    if not config.tie_word_embeddings:
        nn.init.normal_(model.lm_head.weight, std=0.1 * config.hidden_size**-0.5)
    first, last = sharpness or ((1.0, 1.0) if config.attention_shaping is None else (0.0, 0.0))
    factors = torch.linspace(first, last, config.num_hidden_layers).tolist()
    for layer, factor in zip(model.model.layers, factors, strict=True):
        initialize_attention(layer.self_attn, factor)
        for mlp in layer.mlp.experts if isinstance(layer.mlp, SkiplessExperts) else [layer.mlp]:
            initialize_ffn(mlp)
        share_output(layer)


def initialize_attention(attention: SkiplessAttention, sharpness: float) -> None:
    """Orthogonal Q, V, P, and K = sharpness Q, summed over each group.

    An absent Q is the identity. Where K is absent, Q is sharpness times the identity.
    """
    for linear in (attention.q_proj, attention.v_proj, attention.o_proj):
        if linear is not None:
            nn.init.orthogonal_(linear.weight)
    if attention.k_proj is None:
        attention.q_proj.weight.copy_(sharpness * torch.eye(attention.q_proj.in_features))
        return
    weight = attention.k_proj.weight
    query = torch.eye(weight.shape[1]).to(weight) if attention.q_proj is None else attention.q_proj.weight
    grouped = query.view(attention.num_key_value_heads, -1, attention.head_dim, weight.shape[1])
    weight.copy_(sharpness * grouped.sum(1).flatten(0, 1))


def initialize_ffn(mlp: SkiplessMLP) -> None:
    """M orthogonal, O its pseudo-inverse - its transpose - over the activation's gain.

    A gate with a bias starts open (1) and nearly constant. One without, which a norm precedes, starts as any matrix.
    """
    nn.init.orthogonal_(mlp.up_proj.weight)
    if mlp.gate_proj is None:
        z = torch.special.ndtri(torch.linspace(0.001, 0.999, 999))
        gain = (z * mlp.act_fn(z)).mean() / z.square().mean()  # the line closest to the activation, for normal inputs
    elif mlp.gate_proj.bias is None:
        nn.init.normal_(mlp.gate_proj.weight, std=mlp.gate_proj.in_features**-0.5)
        gain = torch.ones(())
    else:
        nn.init.normal_(mlp.gate_proj.weight, std=GATE_SPREAD * mlp.gate_proj.in_features**-0.5)
        nn.init.ones_(mlp.gate_proj.bias)
        gain = mlp.act_fn(torch.ones(()))
    mlp.down_proj.weight.copy_(mlp.up_proj.weight.T / gain)


def share_output(layer: SkiplessDecoderLayer) -> None:
    """Start the FFN small where its output is added to something, by its gain if it has one."""
    if not (layer.parallel or layer.ffn_skip):
        return
    if layer.ffn_gain is not None:
        layer.ffn_gain.fill_(FFN_SHARE)
        return
    for name, weight in layer.mlp.named_parameters():
        if "down_proj" in name:
            weight.mul_(FFN_SHARE)
