"""Layer 0 is looked up: what it makes of a token before any attention replaces the token's embedding in the table.

Precomputing the first layer (arXiv:2402.13388), with x the embedding and n what its norms leave of it:

    serial      a row is [x, if a skip passes layer 0's attention] and q, k, v = n Q, n K, n V
    parallel    q, k, v, and all that is added to the attention: skip and FFN(n)
    closed      Q, K and V as closing the layer's stream seam has left them, and x, which is some of their columns

RoPE turns what has been looked up. Every row is computed by itself, some at a time, and rounded once.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.activations import ACT2FN

from skipless.algebra.affine import Affine
from skipless.algebra.forecast import Forecast, Outcome, Way, letter, precision_of
from skipless.algebra.linalg import HALF, block_rows, product
from skipless.algebra.rows import Rows
from skipless.algebra.tolerances import dtype_name
from skipless.architecture.config import Architecture
from skipless.architecture.seams import Seam, closed
from skipless.checkpoint.opening import Read
from skipless.model.modeling_skipless import exchanged
from skipless.removals.setting import Closed, Setting, Step
from skipless.removals.table import normalize_rows

LAYER = "model.layers.0"


def close(seam: Seam, affines: dict[str, Affine], setting: Setting, read: Read) -> Closed:
    """The table of layer 0, each of whose rows is made when it is asked for."""
    (name,) = seam.writers
    stored, embeddings = setting.stored(name), affines[name].weight
    # of numbers with more bits than half precision, fp32 loses 1e-7
    exact = any(affine.weight.dtype == torch.float64 for affine in affines.values())
    within = torch.float32 if stored in HALF and not exact else torch.float64
    target = closed(setting.architecture, [seam], setting.basis)
    layer = Layer0(setting.architecture, target.row, affines, {name: read(name) for name in seam.mixed}, within)
    shape = (len(embeddings), sum(target.row.values()))
    table = Rows(shape, within, embeddings.device, lambda which: layer.rows(embeddings[which]))
    outcome = Outcome(seam.kind, seam.layer, "lookup", dtype_name(stored), {}, {})
    return {name: replace(affines[name], weight=cast(Tensor, table))}, None, outcome


@dataclass(frozen=True)
class Layer0:
    """What layer 0 makes of embeddings.

    row: the parts that are wanted (Architecture.row). affines: its modules. gains: the other tensors that matter
    (Seam.mixed). within: the precision of the arithmetic.
    """

    architecture: Architecture
    row: Mapping[str, int]
    affines: Mapping[str, Affine]
    gains: Mapping[str, Tensor]
    within: torch.dtype

    def rows(self, embeddings: Float[Tensor, "n d"]) -> Float[Tensor, "n r"]:
        """The table's rows of these embeddings."""
        x = self._normed("model.embed_norm", embeddings.to(self.within))
        n = self._normed(f"{LAYER}.input_layernorm", x)
        return torch.cat([self._part(name, x, n) for name in self.row], 1)

    def _part(self, name: str, x: Float[Tensor, "n d"], n: Float[Tensor, "n d"]) -> Float[Tensor, "n m"]:
        """The part of this name (Architecture.row)."""
        if name == "x":
            return x
        if name == "beside":
            return self._beside(x, n)
        return self._values(n) if name == "v" else self._apply(f"{LAYER}.self_attn.{name}_proj", n)

    def _apply(self, name: str, x: Float[Tensor, "n d"]) -> Float[Tensor, "n m"]:
        affine = self.affines[name]
        y = product(x, affine.weight, self.within, self.within)
        return y if affine.bias is None else y + affine.bias.to(self.within)

    def _normed(self, name: str, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """The norm of this name, if there is one."""
        a = self.architecture
        if not a.has_norm(name):
            return x
        return normalize_rows(Affine(x), self.affines.get(name), a.norm_type, a.norm_eps).weight.to(self.within)

    def _values(self, n: Float[Tensor, "n d"]) -> Float[Tensor, "n e"]:
        """V's outputs; of each head whose block is the identity, what passes and what the other rows make."""
        name = f"{LAYER}.self_attn.v_proj"
        order = self.gains.get(f"{LAYER}.self_attn.value_order")
        if order is None:
            return self._apply(name, n)
        size = self.architecture.head_dim
        columns = self.affines[name].weight.split(size, 1)
        heads = []
        for own, block in zip(exchanged(order, n.shape[1]), columns, strict=True):
            passed, others = n[:, own[:size]], n[:, own[size:]]
            heads.append(passed + product(others, block, self.within, self.within))
        return torch.cat(heads, 1)

    def _beside(self, x: Float[Tensor, "n d"], n: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """What a parallel layer adds to its attention."""
        norm = f"{LAYER}.post_attention_layernorm"
        ffn = self._ffn(self._normed(norm, x) if self.architecture.has_norm(norm) else n)
        ffn = ffn * self._gain("ffn_gain")
        return ffn if self.architecture.residual == "none" else x * self._gain("attention_skip_gain") + ffn

    def _gain(self, name: str) -> Tensor | float:
        gain = self.gains.get(f"{LAYER}.{name}")
        return 1.0 if gain is None else gain.to(self.within)

    def _ffn(self, n: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """The FFN, or what each token's experts give, weighed by its router (arXiv:2401.04088, sec. 2.1)."""
        a = self.architecture
        if not a.has_experts(0):
            return self._expert(f"{LAYER}.mlp", n)
        weights = self._apply(f"{LAYER}.mlp.router", n).double().softmax(-1)
        weights, taken = weights.topk(a.num_experts_per_tok, -1)
        weights = weights / weights.sum(-1, keepdim=True) if a.norm_topk_prob else weights
        outputs = torch.zeros_like(n)
        for number, name in enumerate(a.experts(0)):
            token, place = torch.where(taken == number)
            if len(token):
                outputs[token] += self._expert(name, n[token]) * weights[token, place, None].to(self.within)
        return outputs

    def _expert(self, name: str, n: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """M, activation, O."""
        up, act = self._apply(f"{name}.up_proj", n), ACT2FN[self.architecture.hidden_act]
        if self.architecture.ffn_type == "mlp":
            return self._apply(f"{name}.down_proj", act(up))
        return self._apply(f"{name}.down_proj", act(self._apply(f"{name}.gate_proj", n)) * up)


def forecast(
    seam: Seam,
    affines: Mapping[str, Affine],
    dtypes: Sequence[str],
    ways: Iterable[str] | None = None,
    rest_dtype: str | None = None,
    later: frozenset[str] = frozenset(),
) -> Forecast:
    """What is looked up is rounded once; in the original, embedding and matrix both are, each by itself."""
    outputs = {letter(name) for name in seam.readers if ".self_attn." in name}
    errors = {dtype: dict.fromkeys(outputs, precision_of(dtype)[0]) for dtype in dtypes}
    original = {dtype: {name: 2**0.5 * error for name, error in each.items()} for dtype, each in errors.items()}
    return Forecast(seam, original, {"lookup": Way(None, None, errors)})


def steps(seam: Seam, setting: Setting) -> Iterator[Step]:
    """One product a matrix, of all rows of the table; of experts as many as a token takes."""
    a = setting.architecture
    within = torch.float32 if setting.stored(seam.writers[0]) in HALF else torch.float64
    taken = a.num_experts_per_tok / a.num_local_experts if a.has_experts(0) else 1.0
    for name in (name for name in seam.readers if name.endswith(("_proj", "router"))):
        share = taken if ".experts." in name else 1.0
        yield f"E {name.rpartition('.')[2]}", within, 2.0 * a.vocab_size * setting.size(name) * share


def memory(seam: Seam, setting: Setting) -> float:
    """One block of rows with all that it goes through, and the largest matrix as its products take it; of embeddings
    that are read by rows, less what reading them whole would be.
    """
    a, (name,) = setting.architecture, seam.writers
    width = sum(closed(a, [seam], setting.basis).row.values())
    ffn = 3 * a.ffn_width(0) if a.block_type == "parallel" else 0
    size = 4.0 if setting.stored(name) in HALF else 8.0
    largest = max(setting.size(name) for name in seam.readers if name in setting.modules)
    unread = setting.info(name).bytes if setting.by_rows else 0
    return size * (block_rows(width) * (2 * width + 3 * a.hidden_size + ffn) + largest) - unread
