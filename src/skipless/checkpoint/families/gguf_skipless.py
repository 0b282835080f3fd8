"""GGUF files of architecture "skipless", as `skipless export --to gguf` writes them (integrations/llama.cpp).

They have the tensors of the model folder, under llama.cpp's names, but for these: an FFN's experts lie in one tensor;
a gain of a head is there for each of its outputs; a norm that acts without a gain has one of 1, by which llama.cpp
knows it; and the keys and values of a closed seam have their identity columns back, which cost less than gathering
others would.
"""

import json
from collections.abc import Collection
from typing import Any

from skipless.architecture.config import Architecture, Module
from skipless.checkpoint.families import gguf_llama
from skipless.checkpoint.family import Config, Family, Layout, Location
from skipless.errors import InputError

# The metadata that holds config.json.
CONFIG = "skipless.config"


class SkiplessLayout(Layout):
    """Where a GGUF file of a skipless architecture has its tensors; of keys and values of a closed seam, and of
    gains of 1, no places.
    """

    def __init__(self, family: Family, architecture: Architecture, *names: Any):
        super().__init__(family, architecture, *names)
        size, heads = architecture.head_dim, range(architecture.num_attention_heads)
        for layer in range(architecture.num_hidden_layers):
            for tensor in architecture.gain_tensors(layer):
                stored = self._stored(tensor)
                self.locations[tensor] = Location((stored,), tuple((head * size, head * size + 1) for head in heads))
                self.shapes[stored] = (architecture.query_width,)
        for norm in architecture.gains_removed:
            self.shapes[f"{self._stored(norm)}.weight"] = (architecture.hidden_size,)
        for tensor, shape in architecture.index_tensors().items():
            if not tensor.endswith(("key_order", "value_order")):
                stored = self._stored(tensor)
                self.locations[tensor] = Location((stored,))
                self.shapes[stored] = shape

    def stored(self, module: str) -> str:
        """What the file calls a module's weight."""
        return f"{self._stored(module)}.weight"

    def _module(self, module: Module) -> None:
        parts, stored = module.name.split("."), self._stored(module.name)
        a, closed = self.architecture, {"v_proj": self.architecture.values_removed}
        closed |= dict.fromkeys(("k_proj", "k_rope_proj"), a.keys_removed)
        if parts[4:5] == ["experts"]:
            expert = int(parts[5])
            for tensor, shape in module.tensors().items():
                stacked = f"{stored}.{tensor.rpartition('.')[2]}"
                self.locations[tensor] = Location((stacked,), ((expert, expert + 1),))
                self.shapes[stacked] = (self.architecture.num_local_experts, *shape)
        elif closed.get(parts[-1]):
            self.shapes[f"{stored}.weight"] = (a.value_width, a.hidden_size)
            if module.bias:  # of what RoPE rotates of each head
                starts = range(0, a.value_width, a.head_dim)
                rows = tuple((start, start + a.rotated) for start in starts)
                self.locations[f"{module.name}.bias"] = Location((f"{stored}.bias",), rows)
                self.shapes[f"{stored}.bias"] = (a.value_width,)
        else:
            super()._module(module)


class SkiplessFamily(Family):
    """Files that say all in one field, as config.json does."""

    def architecture(self, config: Config) -> Architecture:
        try:
            own = json.loads(config[CONFIG])
        except (KeyError, TypeError, ValueError):
            own = None
        if not isinstance(own, dict):
            raise InputError(f"{CONFIG}: expected the text of a config.json in the metadata, found none; export anew")
        return Architecture.from_config(own)

    def layout(self, architecture: Architecture, names: Collection[str]) -> SkiplessLayout:
        return SkiplessLayout.of(self, architecture, names)


FAMILY = SkiplessFamily(
    model_types=("gguf-skipless",),
    prefixes=("",),
    layers="blk.{i}",
    names={
        **gguf_llama.FAMILY.names,
        "model.position_embeddings": "position_embd",
        "model.embed_norm": "token_embd_norm",
        "lm_head.column_order": "output_order",
        "self_attn.k_rope_proj": "attn_k",
        "self_attn.rest_proj": "attn_qkv",
        "self_attn.column_order": "attn_qkv_order",
        "self_attn.row_order": "attn_output_order",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "self_attn.alpha": "attn_alpha",
        "self_attn.beta": "attn_beta",
        "mlp.router": "ffn_gate_inp",
        "mlp.experts.{e}.gate_proj": "ffn_gate_exps",
        "mlp.experts.{e}.up_proj": "ffn_up_exps",
        "mlp.experts.{e}.down_proj": "ffn_down_exps",
    },
)
