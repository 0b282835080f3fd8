"""What a checkpoint does to single tokens, in fp64, by the model file's own code, a few rows of its weights in memory.

Two checkpoints that are the same function agree wherever the basis is not free: in q, k and v (where Q and K have a
basis of their own, in each query's scores, but for a number that all of them share), in what the FFN's input matrices
give, and in the logits. Here a model runs on sequences of one token, so that attention passes the token's own
value on, and the FFN's hidden activations are replaced by random ones, the same for both models: every output then
depends on the matrices of one layer or two, and its relative error is that of closing their seams.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from zlib import crc32

import torch
from jaxtyping import Float
from torch import nn

from skipless.algebra.forecast import Outcome
from skipless.algebra.linalg import slices
from skipless.algebra.rounding import rounding_error
from skipless.algebra.tolerances import coarsest, tolerance
from skipless.architecture.config import Architecture
from skipless.architecture.graph import graph
from skipless.checkpoint.opening import RowReader
from skipless.checkpoint.reader import TensorInfo
from skipless.errors import BugError
from skipless.model import SkiplessConfig, SkiplessForCausalLM
from skipless.model.modeling_skipless import SkiplessNorm, apply, rotary_cos_sin
from skipless.rewrite.casting import CAST
from skipless.rewrite.planning import Plan

# Tokens, each a sequence of its own. Errors are means over them and over an output's columns. Of 4 tokens, some of the
# thousands of columns of a wide model are almost nothing by chance, and rounding is much beside it.
TOKENS = 16
# Of q, k and v's columns, how many random mixtures are made to compare rows of tables by.
MIXTURES = 64
# Numbers of a weight that are brought to fp64 at a time.
BLOCK = 2**22
# How much larger than what was forecast, or than what rounding otherwise would have done, an error may be.
SLACK = 4.0
# One token, one column, or one row of a table may be off by so many times what all together may: each is a single draw.
SINGLE = 4.0
# What rounding does is one draw of its errors: of n numbers together, another may be so much larger, over sqrt(n).
CHANCE = 4.0
# What fp64 may lose in any case, and what casting the weights of a layer costs, in rounding errors of their dtype.
EXACT = 1e-9
# Of q, k and v, one this much smaller than the others is nothing; a column is as large as this part of the mean one.
ZERO, SMALL = 1e-6, 0.1


class Streamed(torch.Tensor):
    """A matrix that stays in its file: linear layers and look-ups read it some rows at a time, all else reads it whole.

    It stands in for a parameter; `read` gives its rows, in fp64. Its own storage is empty (on the meta device).
    """

    read: Callable[[slice | None], torch.Tensor]

    @classmethod
    def of(cls, shape: tuple[int, ...], read: Callable[[slice | None], torch.Tensor]) -> "Streamed":
        """A matrix of this shape, in fp64."""
        matrix = torch.empty(shape, dtype=torch.float64, device="meta").as_subclass(cls)
        matrix.read = read
        return matrix

    def whole(self) -> torch.Tensor:
        """All of it."""
        return self.read(None)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is nn.functional.linear and isinstance(args[1], cls):
            return _linear(args[0], args[1], *args[2:], **kwargs)
        if function is nn.functional.embedding:
            return _rows(args[1], args[0])
        if getattr(function, "__name__", "") in ("__get__", "size", "dim", "numel", "as_subclass"):
            return super().__torch_function__(function, types, args, kwargs)
        return function(*(each.whole() if isinstance(each, cls) else each for each in args), **kwargs)


def _linear(x: torch.Tensor, weight: Streamed, bias: torch.Tensor | None = None) -> torch.Tensor:
    n, d = weight.shape
    parts = [x @ weight.read(rows).T for rows in slices(n, max(1, BLOCK // max(1, d)))]
    result = torch.cat(parts, -1) if parts else x.new_zeros(*x.shape[:-1], 0)
    return result if bias is None else result + bias


def _rows(table: Streamed, which: torch.Tensor) -> torch.Tensor:
    rows = [table.read(slice(row, row + 1)) for row in which.flatten().tolist()]
    return torch.cat(rows).unflatten(0, which.shape)


# What becomes of some rows of a tensor of this name before they are used.
Change = Callable[[str, torch.Tensor], torch.Tensor]


def exactly(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """As it is, in fp64."""
    return tensor.double()


def stored_as(dtype: torch.dtype, touched: Collection[str] | None = None, draw: int = 0) -> Change:
    """What storing weights in a dtype does to them.

    It rounds them. Where they have no more bits than the dtype, there is noise as large instead, in `modules` alone
    (None: in all). draw: which of many draws; after the first, all is noise.
    """
    generator = torch.Generator().manual_seed(draw)

    def changed(name: str, tensor: torch.Tensor) -> torch.Tensor:
        finer = torch.finfo(tensor.dtype).eps < torch.finfo(dtype).eps
        if finer and not draw:
            return tensor.to(dtype).double()
        if not finer and touched is not None and name.rpartition(".")[0] not in touched:
            return tensor.double()
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        return tensor.double() * (1 + rounding_error(dtype) * noise)

    return changed


def streamed_model(config: Mapping[str, Any], reader: RowReader, change: Change = exactly) -> SkiplessForCausalLM:
    """A checkpoint's model, in fp64, whose matrices stay in the file, and are changed as they are read."""
    with torch.device("meta"):
        model = SkiplessForCausalLM(SkiplessConfig.from_dict({**config, "dtype": "float64"})).eval()
    model.set_attn_implementation("eager")
    for prefix, module in model.named_modules():
        for name in list(module._parameters) + list(module._buffers):
            key = f"{prefix}.{name}"
            if key == "lm_head.weight" and model.config.tie_word_embeddings:
                module._parameters[name] = model.model.embed_tokens._parameters["weight"]
            elif key in reader.tensors:
                info = reader.tensors[key]
                if name in module._buffers:
                    module._buffers[name] = reader.tensor(key).cpu()
                elif len(info.shape) == 1:
                    weight = change(key, reader.tensor(key).cpu())
                    module._parameters[name] = nn.Parameter(weight, requires_grad=False)
                else:
                    module._parameters[name] = Streamed.of(info.shape, _reading(reader, key, change))
    return model


def _reading(reader: RowReader, name: str, change: Change) -> Callable[[slice | None], torch.Tensor]:
    return lambda rows: change(name, reader.tensor(name, rows).cpu())


@dataclass(frozen=True)
class Inputs:
    """Tokens, and their positions, each a sequence of its own: (tokens, 1)."""

    ids: torch.Tensor
    positions: torch.Tensor

    @classmethod
    def drawn(cls, architecture: Architecture) -> "Inputs":
        """Random ones, always the same."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(architecture.vocab_size, (TOKENS, 1), generator=generator)
        return cls(ids, torch.randint(architecture.max_position_embeddings, (TOKENS, 1), generator=generator))


# By a module's name, the relative error that rounding its weights leaves.
Rounded = Callable[[str], float]


@dataclass(frozen=True)
class Outputs:
    """What a checkpoint gives, (tokens, columns): "0.q" of layer 0, "0.scores" of its queries and all tokens' keys,
    "0.m" of its FFN's input matrices, "logits". Where RoPE rotates a part of each head, "0.rotated q" and "0.rotated k"
    are that part, and scores are of the other one.

    exact: that. lost: the norm of its change when the weights are rounded.
    """

    exact: dict[str, torch.Tensor]
    lost: dict[str, float]


@torch.no_grad()
def outputs(
    config: Mapping[str, Any],
    reader: RowReader,
    inputs: Inputs,
    rounded: Rounded = lambda name: 0.0,
    looked_up: bool = False,
) -> Outputs:
    """What a checkpoint gives, and what becomes of that when its weights are rounded, in one pass.

    An error of relative size u of each weight W_ij is, in x_j W_ij, as large on average as one of x_j. So the same
    tokens go through the model twice. The second time every map's input is off by u at random, and so is what a bias, a
    norm's gain or a table's row gives. looked_up: whether this or the other model has layer 0 in its table: an FFN
    beside layer 0's attention then keeps its own activations.
    """
    model, noted = streamed_model(config, reader), dict[str, torch.Tensor]()
    for name, module in model.named_modules():
        tied = name == "lm_head" and model.config.tie_word_embeddings
        _round(module, rounded("model.embed_tokens" if tied else name), name)
    parts: dict[int, list[torch.Tensor]] = {}
    layers: Any = model.model.layers
    for index, layer in enumerate(layers):
        layer.self_attn.project = _noting(layer.self_attn.project, noted, index, model.config)
        if looked_up and not index and layer.parallel:
            continue
        parts[index] = []
        if hasattr(layer.mlp, "top_k"):  # every expert counts
            layer.mlp.top_k = len(layer.mlp.experts)
        for name, module in layer.mlp.named_modules():
            last = name.rpartition(".")[2]
            if last in ("router", "gate_proj", "up_proj"):
                module.register_forward_hook(
                    lambda _, __, output, kept=parts[index]: kept.append(output.flatten(0, -2))
                )
            elif last == "down_proj":
                module.register_forward_pre_hook(_replacing(f"{index}.{name}"), prepend=True)
    ids, positions = (torch.cat([each, each]) for each in (inputs.ids, inputs.positions))
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    noted |= {f"{index}.m": torch.cat(each, -1) for index, each in parts.items()}
    noted["logits"] = logits.flatten(0, 1)
    exact, lost = {}, {}
    for name in list(noted):
        exact[name], lossy = noted.pop(name).chunk(2)
        lost[name] = (lossy - exact[name]).norm().item()
    return Outputs(exact, lost)


def _round(module: nn.Module, error: float, name: str) -> None:
    """Have a module give, of the second half of what comes in, what it would with rounded weights."""
    if not error or not isinstance(module, nn.Linear | nn.Embedding | SkiplessNorm):
        return
    off = partial(spoiled, error=error, generator=generator_of(f"rounding {name}"))
    if not isinstance(module, nn.Linear):
        module.register_forward_hook(lambda _, __, output: off(output))
        return
    module.register_forward_pre_hook(lambda _, args: (off(args[0]),))
    if (bias := module.bias) is not None:
        module.register_forward_hook(lambda _, __, output: off(output, size=bias))


def spoiled(
    x: Float[torch.Tensor, "n *d"],
    error: float,
    generator: torch.Generator,
    size: Float[torch.Tensor, "d"] | None = None,
) -> Float[torch.Tensor, "n *d"]:
    """The same numbers, those of the second half of the rows off at random by this part of `size` (of themselves)."""
    first, second = x.chunk(2)
    noise = torch.randn(second.shape, generator=generator, dtype=x.dtype)
    return torch.cat([first, second + error * noise * (second if size is None else size)])


def generator_of(name: str) -> torch.Generator:
    """Random numbers, always the same for a name."""
    return torch.Generator().manual_seed(crc32(name.encode()))


@torch.no_grad()
def table_reads(
    config: Mapping[str, Any], reader: RowReader, letters: str, change: Change = exactly, looked_up: bool = False
) -> dict[str, torch.Tensor]:
    """What layer 0 reads of each row of the tables, "tokens" and "positions": (rows, MIXTURES).

    These are random mixtures of the columns of q, k and v (`letters`), or, without q and k, of scores. looked_up: as in
    outputs; what passes by the attention then shows in "after", which is read of layer 0's output, each token a
    sequence of its own.
    """
    whole: Any = streamed_model(config, reader, change)
    model, layer = whole.model, whole.model.layers[0]
    mixing: dict[str, torch.Tensor] = {}

    def mixed(name: str, columns: torch.Tensor) -> torch.Tensor:
        if name not in mixing:
            shape = (columns.shape[-1], MIXTURES)
            mixing[name] = torch.randn(shape, generator=generator_of(f"mixing {name}"), dtype=torch.float64)
        return columns @ mixing[name]

    def projected(rows: torch.Tensor, reader: Any = layer) -> torch.Tensor:
        attention = reader.self_attn
        parts = dict(zip("qkv", attention.project(rows[None]), strict=True))
        columns = [parts[name][0] for name in "qkv" if name in letters]
        if "k" not in letters:
            reference = torch.randn(MIXTURES, rows.shape[-1], generator=generator_of("queries"), dtype=torch.float64)
            queries = attention.project(_past_gain(reader.input_layernorm, reference)[None])[0][0]
            nothing = _past_gain(reader.input_layernorm, torch.zeros_like(rows[:1]))
            keys = parts["k"] - attention.project(nothing[None])[1]  # a bias of all keys matters to none
            (rotated, own), (_, queries) = (parted(each, model.config) for each in (keys[0], queries))
            columns += [scored(queries, own), rotated.flatten(1), parted(parts["q"][0], model.config)[0].flatten(1)]
        return mixed("q, k, v", torch.cat(columns, -1))

    def scored(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        summed = queries.unflatten(1, (keys.shape[1], -1)).sum(2)  # of each group, its queries' sum
        return keys.flatten(1) @ summed.flatten(1).T

    def after(x: torch.Tensor) -> torch.Tensor:
        positions = torch.zeros(len(x), 1, dtype=torch.long)
        rope = model.config.position_type.startswith("rope")
        cos_sin = rotary_cos_sin(positions, model.config, x.dtype) if rope else None
        x = layer(x[:, None], position_embeddings=cos_sin, position_ids=positions)[:, 0]
        if len(model.layers) == 1:
            return mixed("logits", whole.lm_head(apply(model.norm, x)))
        return projected(apply(model.layers[1].input_layernorm, x), model.layers[1])

    table, bias = model.embed_tokens.weight, model.embed_tokens.bias
    width = table.shape[1]
    offset = projected(torch.zeros(1, width, dtype=torch.float64))
    unit = torch.eye(width, dtype=torch.float64)
    matrix = torch.cat([projected(unit[rows]) - offset for rows in slices(width, MIXTURES)])
    tokens, passed = [], []
    for rows in slices(table.shape[0], max(1, BLOCK // width)):
        x = table.read(rows) if bias is None else table.read(rows) + bias
        x = apply(model.embed_norm, x)
        tokens.append(apply(layer.input_layernorm, x) @ matrix + offset)
        if looked_up and (layer.parallel or layer.attention_skip):
            passed.append(after(x))
    reads = {"tokens": torch.cat(tokens)} | ({"after": torch.cat(passed)} if passed else {})
    if model.position_embeddings is not None:
        table = model.position_embeddings.weight
        parts = [table.read(rows) @ matrix for rows in slices(table.shape[0], max(1, BLOCK // width))]
        reads["positions"] = torch.cat(parts)
    return reads


def _past_gain(norm: Any, rows: torch.Tensor) -> torch.Tensor:
    """What a norm's gain and bias make of normalized rows: itself, where they have been folded, or there is none."""
    if norm is None or norm.weight is None:
        return rows
    scaled = rows * (norm.offset + norm.weight)
    return scaled if norm.bias is None else scaled + norm.bias


def _noting(
    project: Callable[..., Any], notes: dict[str, torch.Tensor], index: int, config: SkiplessConfig
) -> Callable[..., Any]:
    def noted(hidden_states: torch.Tensor) -> Any:
        projected = project(hidden_states)
        notes.update((f"{index}.{name}", each.flatten(0, 1)) for name, each in zip("qkv", projected, strict=True))
        rotated, others = zip(*(parted(notes[f"{index}.{name}"], config) for name in "qk"), strict=True)
        notes.update((f"{index}.rotated {name}", each.flatten(1)) for name, each in zip("qk", rotated, strict=True))
        pairs = zip(*(each.chunk(2) for each in others), strict=True)
        notes[f"{index}.scores"] = torch.cat([scores(*pair).flatten(1) for pair in pairs])
        return projected

    return noted


def parted(
    states: Float[torch.Tensor, "n heads_h"], config: SkiplessConfig
) -> tuple[Float[torch.Tensor, "n heads r"], Float[torch.Tensor, "n heads u"]]:
    """Of each head of queries or keys, what RoPE rotates, and what it does not."""
    head_dim: int = config.head_dim  # type: ignore[assignment]
    rotated, others = states.unflatten(-1, (-1, head_dim)).split((head_dim - config.unrotated, config.unrotated), -1)
    return rotated, others


def scores(
    queries: Float[torch.Tensor, "n heads u"], keys: Float[torch.Tensor, "m groups u"]
) -> Float[torch.Tensor, "n heads m"]:
    """Of queries and keys, before they are scaled, less each query's mean."""
    groups = keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1)
    products = torch.einsum("nhs,mhs->nhm", queries, groups)
    return products - products.mean(-1, keepdim=True)


def _replacing(name: str) -> Callable[..., Any]:
    generator = generator_of(name)

    def replaced(module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        half = torch.randn(args[0].chunk(2)[0].shape, generator=generator, dtype=args[0].dtype)
        return (torch.cat([half, half]),)

    return replaced


@dataclass(frozen=True)
class Difference:
    """Of an output: its relative error (root mean square over tokens and columns), and what it may be."""

    name: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether it is what it may be; NaN is not."""
        return self.error <= self.limit


@dataclass(frozen=True)
class Checked:
    """What fuse's own check has found.

    differences: each output's, with the limit that only a bug exceeds. losses: the outputs that lose more than storing
    the source in the same dtype may, as verify judges them.
    """

    differences: tuple[Difference, ...]
    losses: tuple[Difference, ...]


def check_fused(plan: Plan, source: RowReader, fused: RowReader, outcomes: Iterable[Outcome]) -> Checked:
    """Compare what a plan's source and result give for a few tokens.

    Raises BugError naming the first output that is off by more than the seams' forecasts and rounding the result's
    weights explain: what was written is another function.
    """
    inputs, touched = Inputs.drawn(plan.source), plan.touched
    stored = stored_in(plan.outputs)
    looked_up = plan.target.first_layer_removed
    before = outputs(plan.source_config, source, inputs, rounded_as(stored, plan.canonical[0], touched), looked_up)
    after = outputs(plan.config, fused, inputs, _as_written(plan), looked_up)
    limit = limits(outcomes, plan.source, _cast(plan))
    differences = [
        Difference(each.name, each.error, math.hypot(limit(each.name), SLACK * each.lost_after))
        for each in compare(before, after, plan.source, plan.target)
    ]
    expect_explained(differences, "its seams' forecasts and rounding explain")
    judged = (each for pair in judge(before, after, plan.source, plan.target, stored) for each in pair)
    return Checked(tuple(differences), tuple(each for each in judged if not each.passed))


def expect_explained(differences: Iterable[Difference], how: str) -> None:
    """Raise BugError naming the first difference that is larger than what explains it."""
    for each in differences:
        if not each.passed:
            raise BugError(
                f"{each.name}: expected to differ from the source's by at most {each.limit:.1e}, as {how}, found "
                f"{each.error:.1e}; nothing was published"
            )


def stored_in(tensors: Mapping[str, TensorInfo]) -> torch.dtype:
    """The coarsest dtype of a checkpoint's weights."""
    return coarsest(info.dtype for info in tensors.values() if not info.is_index)


def rounded_as(dtype: torch.dtype, tensors: Mapping[str, TensorInfo], touched: Collection[str]) -> Rounded:
    """By how much storing a source in a dtype changes a module: not at all if it has no more bits, unless rewritten."""

    def error(name: str) -> float:
        info = tensors.get(f"{name}.weight")
        finer = info is not None and torch.finfo(info.dtype).eps < torch.finfo(dtype).eps
        return rounding_error(dtype) if finer or name in touched else 0.0

    return error


def _as_written(plan: Plan) -> Rounded:
    """By how much rounding has changed the modules of what was written: those that are no longer the source's."""

    def error(name: str) -> float:
        before, after = (infos.get(f"{name}.weight") for infos in plan.canonical)
        kept = after is None or (name not in plan.touched and before is not None and before.dtype == after.dtype)
        return 0.0 if kept or after is None else rounding_error(after.dtype)

    return error


def _cast(plan: Plan) -> torch.dtype | None:
    """The coarsest dtype to which a tensor is cast from a finer one, or None."""
    inputs, outputs = plan.canonical
    pairs = [(inputs[name].dtype, info.dtype) for name, info in outputs.items() if name in inputs]
    cast = [after for before, after in pairs if torch.promote_types(before, after) != after]
    return coarsest(cast) if cast else None


@dataclass(frozen=True)
class Compared:
    """How far apart two checkpoints are in an output that closing seams does not change.

    error: relative, root mean square over tokens and columns. column: the largest of a single one of the `columns`.
    lost_before, lost_after: what rounding alone makes of `error` in either checkpoint.
    """

    name: str
    columns: int
    error: float
    column: float
    lost_before: float
    lost_after: float


def compare(before: Outputs, after: Outputs, source: Architecture, target: Architecture) -> Iterator[Compared]:
    """What two checkpoints give, wherever closing seams leaves the basis as it is.

    Queries and keys, and values, have a basis of their own once their seams are closed; and where a redundant norm
    went, what the FFN reads is scaled, token by token.
    """
    rescaled = set(target.norms_removed) - set(source.norms_removed)
    for name, exact in before.exact.items():
        result, (layer, _, kind) = after.exact[name], name.partition(".")
        rebased = target.keys_removed != source.keys_removed
        if kind == "v" and target.values_removed != source.values_removed:
            continue
        if kind in (("q", "k") if rebased else ("scores", "rotated q", "rotated k")) or not exact.shape[1]:
            continue
        sizes = [exact.norm().item(), result.norm().item()]
        if kind == "m" and f"model.layers.{layer}.post_attention_layernorm" in rescaled:
            result = result * (exact.norm(dim=-1, keepdim=True) / result.norm(dim=-1, keepdim=True))
        if kind in ("q", "k", "v"):
            beside = max(before.exact[f"{layer}.{other}"].norm().item() for other in "qkv")
            sizes = [max(size, ZERO * beside) for size in sizes]
        scale, columns = sizes[0], exact.shape[1]
        error = (result - exact).norm(dim=0)
        if not scale:
            nothing = math.inf if error.any() else 0.0
            yield Compared(name, columns, nothing, nothing, 0.0, 0.0)
            continue
        least = SMALL * scale / max(1, columns) ** 0.5
        column = (error / exact.norm(dim=0).clamp(min=least)).max().item() if len(error) else 0.0
        lost = [of.lost[name] / size if size else 0.0 for of, size in zip((before, after), sizes, strict=True)]
        yield Compared(name, columns, error.norm().item() / scale, column, *lost)


def judge(
    before: Outputs, after: Outputs, source: Architecture, target: Architecture, stored: torch.dtype
) -> Iterator[tuple[Difference, Difference]]:
    """By output: all columns together, and the worst single one.

    Their limits are what the source itself loses when it is stored so.
    """
    for each in compare(before, after, source, target):
        own = each.lost_before * chance(min(each.columns, source.hidden_size))
        limit = max(tolerance(stored, own), EXACT)
        together = Difference(each.name, each.error, limit)
        yield together, Difference(f"a column of {each.name}", each.column, SINGLE * limit)


def chance(numbers: int) -> float:
    """By how much the mean of so many numbers' errors may be larger than that of others like them."""
    return 1 + CHANCE / math.sqrt(max(1, numbers))


def limits(outcomes: Iterable[Outcome], source: Architecture, cast: torch.dtype | None) -> Callable[[str], float]:
    """What an output's relative error may be, from the forecasts of the seams before it.

    cast: the dtype to which other tensors were cast, if they were. A serial layer without skips and experts reads
    nothing but the hidden activations of the layer before; else the stream carries errors on.
    """
    squares: dict[int, float] = {}
    for outcome in outcomes:
        rounded = CAST * rounding_error(getattr(torch, outcome.dtype))
        worst = max(outcome.errors.values(), default=rounded)
        first = outcome.layer
        if outcome.kind in ("stream", "head"):  # M of the layer before may read what the seam closes
            first = graph(source).before(first).places[0].layer
        for at in {first, source.num_hidden_layers if "logits" in outcome.errors else first}:
            squares[at] = squares.get(at, 0.0) + worst**2
    own = 0.0 if cast is None else (CAST * rounding_error(cast)) ** 2
    alone = source.residual == "none" and source.block_type == "serial" and source.ffn_type != "moe"

    def limit(name: str) -> float:
        layer = source.num_hidden_layers if name == "logits" else int(name.partition(".")[0])
        first = layer if alone else 0
        total = sum(square for at, square in squares.items() if first <= at <= layer)
        return SLACK * math.sqrt(total + own * (layer - first + 1)) + EXACT

    return limit
