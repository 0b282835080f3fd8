"""The limit, counted: on a small model of the same architecture, parameters less the rank of the Jacobian, in fp64.

The Jacobian is that of all logits on many random sequences, at random weights: what it does not see, no output sees.
"""

import dataclasses
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float

from skipless.architecture.config import Architecture
from skipless.architecture.limit import closable, limit
from skipless.errors import InputError
from skipless.inference import load
from skipless.model import SkiplessConfig, SkiplessForCausalLM
from skipless.quiet import no_library_bars
from skipless.rewrite.fusion import fuse

# Diagonal entries of R below this part of the largest are zero; a rank counts only if the next is smaller by GAP.
ZERO, GAP = 1e-12, 1e2
TOKENS = 10
# In how many sequences each token stands.
CONTEXTS = 8
# Outputs that are looked at, for each parameter.
ROWS = 1.2
# An eps that counts: of a tiny one, rounding hides that norms see their input's scale.
EPS = 0.1


@dataclass(frozen=True)
class Rank:
    """A model's parameters and its Jacobian's rank.

    gap: the last diagonal entry of R (of the QR decomposition) that counts, over the first that does not.
    """

    parameters: int
    rank: int
    gap: float

    @property
    def free(self) -> int:
        """How many parameters carry no information."""
        return self.parameters - self.rank


@dataclass(frozen=True)
class Certificate:
    """The limit, counted on a small model.

    shape: its config. expected: what carries no information, by the formula. removed: what fusing removes, with these
    `kinds`. before, after: the ranks (after is None if nothing can be removed). Where biases move into matrices that
    had none, a fused model can do more than the original, and its rank may be larger.
    """

    shape: Mapping[str, Any]
    expected: int
    exact: bool
    kinds: tuple[str, ...]
    removed: int
    before: Rank
    after: Rank | None

    @property
    def holds(self) -> bool:
        """Whether both ranks are clear and what the formula and the files say."""
        ranks = [self.before, *([self.after] if self.after else [])]
        right = self.before.free == self.expected if self.exact else self.before.free >= self.expected
        left = self.after is None or self.after.rank == self.before.rank
        if self.after is not None and self.shape["attention_bias"]:
            left = self.after.rank >= self.before.rank
        return right and left and all(rank.gap > GAP for rank in ranks)


def certify(
    architecture: Architecture, progress: Callable[[str, int, int], None] = lambda step, done, total: None
) -> Certificate:
    """Count the limit of a small copy before and after fusing it. Raises InputError for what the model does not run.

    `progress` is called with which copy is looked at, on how many sequences it has been run, and of how many.
    """
    config = shrink(architecture)
    small = Architecture.from_config({"model_type": "skipless", **config})
    expected = limit(small)
    torch.manual_seed(0)
    model = SkiplessForCausalLM(SkiplessConfig(**config)).double().eval()
    _randomize(model)
    before, after = rank(model, partial(progress, "a small copy")), None
    kinds = tuple(dict.fromkeys(seam.kind for seam in closable(small, torch.float64.itemsize)))
    removed = 0
    if kinds:
        with tempfile.TemporaryDirectory() as folder, no_library_bars():
            model.save_pretrained(Path(folder) / "source")
            plan = fuse(Path(folder) / "source", Path(folder) / "fused", remove=kinds, basis="auto")
            fused = load(Path(folder) / "fused", torch.float64)
        removed = plan.parameters[0] - plan.parameters[1]
        after = rank(fused, partial(progress, "the copy, fused"))
    return Certificate(config, expected.removable, not expected.at_least, kinds, removed, before, after)


def shrink(architecture: Architecture) -> dict[str, Any]:
    """Config fields of a small model with the same switches and the same relations between widths."""
    a = architecture
    if not a.expressible:
        raise InputError(
            "config.json: expected a model that a skipless checkpoint can be, to count its rank; found projected "
            "embeddings, a norm of all heads together, or layers of different kinds"
        )
    if a.num_attention_heads == a.num_key_value_heads:
        heads = kv = 3
    else:
        heads, kv = (3, 1) if a.num_key_value_heads == 1 else (4, 2)
    partly = 0 < a.rotated < a.head_dim
    size = 4 if partly else 2
    relation = (a.query_width > a.hidden_size) - (a.query_width < a.hidden_size)
    d = heads * size - 2 * relation
    narrow = min(a.ffn_read_width(layer) for layer in range(a.num_hidden_layers)) < a.hidden_size
    f = d // 2 - 1 if narrow else d + 2
    fields = {
        field.name: getattr(a, field.name)
        for field in dataclasses.fields(SkiplessConfig)
        if field.name in _SWITCHES and hasattr(a, field.name)
    }
    if a.ffn_type == "moe":
        fields |= {"num_local_experts": 3, "num_experts_per_tok": min(a.num_experts_per_tok, 2)}
    if partly:
        fields["rope_parameters"] = {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    if a.norm_type != "none":
        fields |= {"norms": list(a.norms), "norm_eps": EPS if a.norm_eps else 0.0}
    return fields | {
        # else a layer that reads single tokens' rows is a lookup table; so many are routed to each expert, too
        "vocab_size": max(4 * d, 5 * f, 3 * fields.get("num_local_experts", 0) * f),
        "hidden_size": d,
        "intermediate_size": f,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": size,
        "max_position_embeddings": TOKENS,
    }


_SWITCHES = {
    "attention_bias", "mlp_bias", "gate_bias", "tie_word_embeddings", "block_type", "ffn_type", "residual", "norm_type",
    "qk_norm", "position_type", "attention_shaping", "residual_gains", "hidden_act", "norm_topk_prob",
}  # fmt: skip


@torch.no_grad()
def _randomize(model: SkiplessForCausalLM) -> None:
    """Generic weights, at which the rank is the largest there is."""
    for name, weight in model.named_parameters():
        if name.endswith("_gain") or ("norm" in name and name.endswith("weight")):
            weight.normal_(1, 0.3)
        else:
            weight.normal_(std=1 if "embed" in name or weight.ndim == 1 else weight.shape[-1] ** -0.5)


def rank(model: SkiplessForCausalLM, progress: Callable[[int, int], None] = lambda done, total: None) -> Rank:
    """The rank of the Jacobian of all logits by all parameters, its columns scaled to the same length.

    Each token's logits are mixed at random, into ROWS times as many rows in all as there are parameters: a random
    projection onto more dimensions than the rank keeps the rank (with probability 1). The columns are mixed at random,
    too. Then the diagonal of R of a QR decomposition shows the rank without pivoting (RURV: Demmel, Dumitriu and Holtz,
    "Fast linear algebra is stable", 2007). `progress` is called with how many sequences the model has been run on, and
    of how many.
    """
    generator = torch.Generator().manual_seed(1)
    columns = _jacobian(model, generator, progress)
    count = columns.shape[1]
    lengths = columns.norm(dim=0)
    columns *= torch.where(lengths < ZERO * lengths.max(), 0, 1 / lengths.clamp(min=ZERO * lengths.max()))
    columns = columns @ torch.randn(count, count, generator=generator, dtype=torch.float64)
    values = torch.linalg.qr(columns, mode="r").R.diagonal().abs().sort(descending=True).values
    dimensions = int((values > ZERO * values[0]).sum())
    gap = (
        float(values[dimensions - 1] / values[dimensions])
        if dimensions < count and values[dimensions]
        else float("inf")
    )
    return Rank(count, dimensions, gap)


def _jacobian(
    model: SkiplessForCausalLM, generator: torch.Generator, progress: Callable[[int, int], None]
) -> Float[torch.Tensor, "outputs parameters"]:
    """The derivatives of random mixtures of each token's logits by all parameters, one sequence at a time."""
    model.set_attn_implementation("eager")
    parameters = [*model.requires_grad_().parameters()]
    size, count = model.config.vocab_size, sum(parameter.numel() for parameter in parameters)
    drawn = torch.cat([torch.randperm(size, generator=generator) for _ in range(CONTEXTS)])
    sequences = drawn[: len(drawn) // TOKENS * TOKENS].view(-1, TOKENS)
    mixtures = min(size, math.ceil(ROWS * count / sequences.numel()))
    rows = torch.eye(TOKENS * mixtures, dtype=torch.float64)
    parts = []
    for done, ids in enumerate(sequences):
        progress(done, len(sequences))
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        mixed = logits[:, None] @ torch.randn(TOKENS, size, mixtures, generator=generator, dtype=torch.float64)
        gradients = torch.autograd.grad(mixed.flatten(), parameters, rows, is_grads_batched=True)
        parts.append(torch.cat([each.flatten(1) for each in gradients], 1))
    return torch.cat(parts)
