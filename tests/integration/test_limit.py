"""What carries no information, as a number: parameters less the rank of the Jacobian of all outputs, in fp64."""

import pytest
import torch
from torch.func import functional_call, jacfwd

from skipless.architecture import Architecture
from skipless.counting import removable_at_most
from skipless.model import SkiplessConfig, SkiplessForCausalLM

TINY = {
    "vocab_size": 32,
    "hidden_size": 6,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 2,
    "max_position_embeddings": 10,
}


def removable(**fields):
    torch.manual_seed(0)
    model = SkiplessForCausalLM(SkiplessConfig(**TINY | fields, attn_implementation="eager")).double().eval()
    parameters = {
        name: torch.randn_like(parameter) * (1 if "embed" in name else parameter.shape[-1] ** -0.5)
        for name, parameter in model.named_parameters()
    }
    tokens = torch.stack([torch.randperm(TINY["vocab_size"])[:10] for _ in range(24)])

    def logits(parameters):
        return functional_call(model, parameters, (tokens,), {"use_cache": False}).logits.flatten()

    with torch.no_grad():
        jacobian = jacfwd(logits)(parameters)
    columns = torch.cat([jacobian[name].flatten(1) for name in parameters], 1)
    values = torch.linalg.svdvals(columns / columns.norm(dim=0))
    rank = int((values > 1e-10 * values[0]).sum())
    assert rank == len(values) or values[rank - 1] > 1e3 * values[rank]  # a clear gap
    return len(values) - rank


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tie_word_embeddings": True},
        {"position_type": "learned", "num_attention_heads": 4, "num_key_value_heads": 2},
        {"position_type": "none", "ffn_type": "mlp", "hidden_act": "gelu"},
        {"num_attention_heads": 2},
        {"num_attention_heads": 4, "num_key_value_heads": 2},
    ],
    ids=str,
)
def test_the_limit_is_the_jacobians(fields):
    architecture = Architecture.from_config({"model_type": "skipless", **TINY, **fields})
    assert removable(**fields) == removable_at_most(architecture)
