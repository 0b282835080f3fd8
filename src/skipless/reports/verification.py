"""Are two checkpoints the same function? What they say is compared as data, and what they do by running them.

1. Data: fields of config.json, special tokens, tokenizer, model files, and the SHA-256 that fuse has written down.
2. Tensors, if B is A less what fuse removes: those that no closed seam touches are equal; around the others, single
   tokens get the same q, k, v, FFN inputs and logits, and every row of a rewritten table is read alike (probe.py). This
   covers every token of the vocabulary and every position, whether or not a sample has it.
3. Runs: logits, distributions and greedy tokens on samples, in several dtypes, with A in fp64 as the arbiter; and each
   model's cache against one pass without it.

Errors are judged by what A itself loses in the same storage and arithmetic.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from skipless.algebra.tolerances import OWN_ERROR_FACTOR, TOLERANCES, dtype_name, tolerance
from skipless.checkpoint.reader import CheckpointReader
from skipless.checkpoint.remote import open_reader
from skipless.dtypes import DTYPE_NAMES
from skipless.errors import InputError
from skipless.inference import Generated, arithmetic, generate, load, load_tokenizer, positions_of, spread
from skipless.reports.comparing import (
    Differences,
    Opened,
    Relation,
    compare_data,
    differing_tensors,
    read_config,
    relation,
)
from skipless.reports.routing import Choice, following, follows, noting, routed
from skipless.rewrite import probe
from skipless.rewrite.card import named, plain, put_verified
from skipless.rewrite.machine import available_memory
from skipless.rewrite.maps import compare
from skipless.rewrite.probe import SINGLE, chance, stored_in
from skipless.rewrite.record import differences, read_record
from skipless.version import __version__

# A dtype in which the original itself is so wrong that any other model would pass proves nothing.
LARGEST_LIMIT = 0.5
# What A loses by being stored is a mean over so many numbers at least: of a narrow model, over several such draws.
ENOUGH, MOST_DRAWS = 64, 8

# What is run: at most so many positions, and so many logits (512 MB in fp64), unless all are asked for.
MAX_POSITIONS = 4096
MAX_LOGITS = 2**26
# Logits that a model makes at a time (128 MB in fp64).
LOGITS = 2**24
# Of the tokens, those off the most, which "error" leaves out: a few may be near a point where the model is not smooth,
# and, where experts are chosen anew, many more, which the least error may send to another one, or whose context was.
# "worst" looks at all, but for those.
OUTLIERS, REROUTED = 0.05, 0.5
# Nats that fp64 itself makes of nothing.
LEAST_KL = 1e-13
# Tokens beyond a sliding window, so that some of them no longer see the first.
BEYOND = 32

DEFAULT_DTYPES = ("float64", "float32", "bfloat16")
DEFAULT_PROMPT = 'def read(path):\n    """Read'


@dataclass(frozen=True)
class Loss:
    """How far a model in some dtype is from A in fp64, token by token.

    error: the root mean square difference of a token's logits over their standard deviation, or, if that is more, of
        its experts' weights in a layer (routing.py), over all tokens but OUTLIERS
    worst: the same of the worst token
    kl: mean KL(A || it) per token, in nats
    top1: fraction of tokens with the same most likely successor
    lead: by how many standard deviations a successor of A's leads at most that this model does not choose
    greedy: fraction of greedy tokens before the first difference
    """

    error: float
    worst: float
    kl: float
    top1: float
    lead: float
    greedy: float

    def cells(self) -> tuple[str, str, str, str]:
        """Error, KL, top-1 and greedy, as tables have them."""
        return f"{self.error:.1e}", f"{self.kl:.1e}", f"{self.top1:.1%}", f"{self.greedy:.0%}"


@dataclass(frozen=True)
class Row:
    """B run in one dtype, and A in the same.

    limit: what B's error may be, from what A loses in this dtype and as stored. judged: whether the dtype is at least
    as fine as that of B's stored weights.
    """

    dtype: str
    b: Loss
    a: Loss
    limit: float
    judged: bool
    passed: bool


@dataclass(frozen=True)
class Map(probe.Difference):
    """The map around closed seams that comes closest to its limit.

    what: whether all columns of an output are judged together, one column, or a row of a table.
    """

    what: str


@dataclass(frozen=True)
class Report:
    """The verdict on B.

    stored: B's coarsest dtype. data: the differences, one sentence each. tensors: those that should be equal and are
    not. maps: those around closed seams, if B is made of A. caches: those that are broken. proved: whether tensors and
    maps cover all tokens and positions. not_run: what the runs leave out, in words.
    """

    same: bool
    stored: str
    data: Differences
    tensors: tuple[str, ...]
    maps: tuple[Map, ...]
    proved: bool
    caches: tuple[str, ...]
    tokens_seen: int
    vocab_size: int
    positions_seen: int
    not_run: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str

    def covered(self) -> Iterator[str]:
        """What was compared beside the runs, in words, and what was not."""
        for each in self.maps:
            where = "" if each.passed else f" ({each.name})"
            yield f"maps around closed seams, {each.what}: off by {each.error:.1e}, may be {each.limit:.1e}{where}"
        if self.proved:
            yield f"all {self.vocab_size:,} tokens, all positions and experts are covered by comparing tensors"
        elif self.not_run:
            yield f"not run (--full runs it): {'; '.join(self.not_run)}"


@dataclass(frozen=True)
class _Inputs:
    """What both models are run on, and how much of the model that covers.

    Sequences (batch, length), each batch with how many of its last tokens' logits are wanted, and prompts, which are
    continued by `tokens`.
    """

    sequences: tuple[tuple[Tensor, int], ...]
    prompts: tuple[Tensor, ...]
    tokens: int
    tokens_seen: int
    vocab_size: int
    positions_seen: int
    not_run: tuple[str, ...]

    def batches(self) -> Iterator[tuple[Tensor, int]]:
        """The sequences, as many at a time as a model may make logits of."""
        for ids, kept in self.sequences:
            for part in ids.split(max(1, LOGITS // (kept * self.vocab_size))):
                yield part, kept


class _Steps:
    """Tells how far the comparison is: a step for each run of a model, and one for each look at the files."""

    def __init__(self, progress: Callable[[str, int, int], None], total: int):
        self._progress, self._done, self._total = progress, -1, total

    def next(self, what: str) -> None:
        self._done += 1
        self._progress(what, self._done, self._total)


class _Reference:
    """A in fp64: what it generates, and the logits of each batch, which are kept if they are few, else made anew.

    change: what is done to A's weights first, by their names.
    """

    def __init__(self, folder: Path, inputs: _Inputs, change: Mapping[str, torch.dtype] | None):
        self.inputs, self._model = inputs, load(folder, torch.float64)
        for name, weight in self._model.named_parameters():
            if change is not None and name in change:
                weight.data = weight.to(change[name]).double()
        self.greedy = [generate(self._model, ids, inputs.tokens) for ids in inputs.prompts]
        few = sum(ids.shape[0] * kept for ids, kept in inputs.sequences) * inputs.vocab_size <= MAX_LOGITS
        self._kept = [self._exact(ids, kept) for ids, kept in inputs.batches()] if few else None

    @cached_property
    def spreads(self) -> list[Tensor]:
        """Of each batch, that of each token's logits; not finite where these are not."""
        return [spread(exact) for _, _, exact, _ in self.logits()]

    def numbers(self) -> float:
        """For what part of the tokens the logits are finite."""
        return torch.cat(self.spreads).isfinite().double().mean().item()

    def scale(self) -> float:
        """The largest mean square of a batch's spreads."""
        return max(size.square().mean().item() for size in self.spreads)

    def of(self, greedy: Sequence[Generated]) -> Sequence[Generated]:
        """What it generated of the same prompts as these."""
        return self.greedy[len(self.greedy) - len(greedy) :]

    def logits(self) -> Iterator[tuple[Tensor, int, Tensor, list[Choice]]]:
        """Each batch's ids, how many of its last tokens count, these tokens' logits, and the experts chosen."""
        for number, (ids, kept) in enumerate(self.inputs.batches()):
            yield ids, kept, *(self._exact(ids, kept) if self._kept is None else self._kept[number])

    def _exact(self, ids: Tensor, kept: int) -> tuple[Tensor, list[Choice]]:
        with noting(self._model) as choices:
            return _logits(self._model, ids, kept), choices


@dataclass(frozen=True)
class _Run:
    """What running a model has shown: its losses, the tokens it generated, and whether it has experts.

    rerouted: whether it may send tokens to other experts than A does.
    """

    loss: Loss
    greedy: tuple[Generated, ...]
    routed: bool
    rerouted: bool


def verify_record(folder: str | Path) -> tuple[str, ...]:
    """How a folder that fuse has written differs from what its skipless.json says, one sentence each.

    Raises InputError for a folder without one.
    """
    record = read_record(Path(folder))
    if record is None:
        raise InputError(
            f"{folder}: expected skipless.json, which fuse leaves in what it writes, found none; compare it with the "
            f"model that it was made of: skipless verify A {folder}"
        )
    return tuple(f"{name}: {problem}" for name, problem in differences(Path(folder), record))


def verify(
    a: str | Path,
    b: str | Path,
    *,
    dtypes: Sequence[str] = DEFAULT_DTYPES,
    prompt: str = DEFAULT_PROMPT,
    tokens: int = 64,
    seed: int = 0,
    full: bool = False,
    progress: Callable[[str, int, int], None] = lambda step, done, total: None,
) -> Report:
    """Compare model folder B with the original A: as data, by its tensors, and on a prompt and random tokens.

    dtypes: to run in, beside fp64 and the one that B is stored in. tokens: length of the sequences that walk through
    the vocabulary, and of the greedy continuations. full: run every token of the vocabulary, every position, and a
    context beyond the window, however long that takes. `progress` is called with what is done next, how many steps are
    done, and of how many. Raises InputError for folders that do not load whole, or whose vocabularies differ.
    """
    a, b = Path(a), Path(b)
    first, second = open_reader(a), CheckpointReader(b)
    for name in dtypes:
        if name not in DTYPE_NAMES:
            raise InputError(f"dtype: expected one of {', '.join(DTYPE_NAMES)}, found {name!r}")
    stored = stored_in(second.tensors)
    dtypes = tuple(dict.fromkeys(("float64", *dtypes, dtype_name(stored))))
    configs = [read_config(reader.folder).get_text_config() for reader in (first, second)]
    inputs = _inputs(first.folder, configs, prompt, tokens, seed, full)
    steps = _Steps(progress, 3 + 2 * len(dtypes))

    steps.next("comparing files")
    data, related = compare_data(first, second), relation(first, second)
    if prompt and prompt != DEFAULT_PROMPT and len(inputs.prompts) == 1:
        line = "the prompt was left out: A's tokenizer, or its positions, leave no room for it and what is generated"
        data = replace(data, notes=(*data.notes, line))
    source = first if related is None or related.before is None else related.before
    steps.next("comparing tensors")
    tensors: tuple[str, ...] = ()
    maps: tuple[Map, ...] = ()
    if related is not None:
        tensors = tuple(differing_tensors(related, source, second))
        if related.closed and not tensors:
            maps = tuple(_maps(related, source, second, stored))

    exact = related is not None and not related.closed  # then B's weights are A's, cast
    steps.next("running A in float64")
    cast = {name: info.dtype for name, info in second.tensors.items()} if exact else None
    reference = _Reference(a, inputs, cast)
    proved = related is not None and not tensors and all(each.passed for each in maps)
    width = min(_size(configs[0], "hidden_size", 1), inputs.vocab_size)
    margin = chance(width)
    nothing = Loss(0.0, 0.0, 0.0, 1.0, 0.0, 1.0)
    storage = nothing
    if not exact:
        steps.next(f"running A as {dtype_name(stored)} stores it")
        touched = None if related is None or related.layout or related.before else related.touched
        draws = range(min(MOST_DRAWS, math.ceil(ENOUGH / width)))
        storage = _usual(
            [_run(a, torch.float64, reference, proved, 0, _noise(first, stored, touched, draw)).loss for draw in draws]
        )
    rows, generated = [], dict[str, Sequence[Generated]]({"A": reference.greedy})
    for name in dtypes:
        kind = getattr(torch, name)
        own = nothing
        if name != "float64":
            steps.next(f"running A in {name}")
            own = _run(a, kind, reference, proved).loss
        steps.next(f"running B in {name}")
        run = _run(b, kind, reference, proved, len(inputs.prompts) if name == "float64" else 1)
        generated.setdefault("B", run.greedy)
        bits = [torch.finfo(dtype).eps for dtype in (stored_in(first.tensors), stored, kind)]
        included = bits[0] < bits[2] >= bits[1]  # A's weights lose as many bits in this dtype
        allowed = own if included else _together(own, storage)
        rows.append(_judge(name, stored, run, own, allowed, reference, margin, proved))
    caches = tuple(
        f"{name}'s cache: {problem}"
        for name, each in generated.items()
        for problem in [one.broken_cache() for one in each]
        if problem is not None
    )
    return _Evidence(
        stored=dtype_name(stored),
        data=data,
        related=related,
        tensors=tensors,
        maps=maps,
        proved=proved,
        inputs=inputs,
        numbers=reference.numbers(),
        rows=tuple(rows),
        caches=caches[:2],
    ).report()


def write_verdict(report: Report, a: Path, b: Path) -> None:
    """Write a report that says B is the same function as A into B's card. Raises as put_verified does."""
    assert report.same
    put_verified(b, _verdict(report, named(str(a))))


def _verdict(report: Report, original: str) -> Iterator[str]:
    """What a card says of a report."""
    yield f"By `skipless verify` {__version__}, compared with {plain(original)}: {report.note}."
    yield ""
    yield "| run in | error | at most | the original's own | KL, nats | top-1 equal | greedy tokens equal |"
    yield "|---|---|---|---|---|---|---|"
    for row in report.rows:
        error, *others = row.b.cells()
        cells = (row.dtype, error, f"{row.limit:.1e}", row.a.cells()[0], *others)
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield (
        f"An error is the root mean square difference of a token's logits from the original's in float64, over their "
        f"standard deviation, on {report.tokens_seen:,} of {report.vocab_size:,} tokens."
    )
    yield ""
    yield from (f"- {line}" for line in report.covered())


def _maps(related: Relation, a: Opened, b: CheckpointReader, stored: torch.dtype) -> Iterator[Map]:
    """The maps around closed seams: all together, the worst single column, and the worst row of a rewritten table."""
    if related.layout is not None:
        moved = (each for each, _ in compare(related.layout, related.closed, a, b, stored))
        worst = max(moved, key=_share)
        yield Map(worst.name, worst.error, worst.limit, "together")
        return
    source, target = related.source, related.target
    inputs, rounded = probe.Inputs.drawn(source), probe.rounded_as(stored, a.tensors, related.touched)
    looked_up = target.first_layer_removed
    before = probe.outputs(a.config, a, inputs, rounded, looked_up)
    after = probe.outputs(b.config, b, inputs, looked_up=looked_up)
    pairs = list(probe.judge(before, after, source, target, stored))
    for judged, what in zip(zip(*pairs, strict=True), ("together", "one column"), strict=True):
        worst = max(judged, key=_share)
        yield Map(worst.name, worst.error, worst.limit, what)
    letters = ("qk" if source.keys_removed == target.keys_removed else "") + (
        "v" if source.values_removed == target.values_removed else ""
    )
    tables = {"tokens": "model.embed_tokens", "positions": "model.position_embeddings", "after": "model.embed_tokens"}
    if related.touched.isdisjoint(tables.values()):
        return
    rows, other = (probe.table_reads(reader.config, reader, letters, looked_up=looked_up) for reader in (a, b))
    lost = probe.table_reads(a.config, a, letters, probe.stored_as(stored, related.touched), looked_up)
    for name, exact in rows.items():
        if tables[name] in related.touched:
            size = exact.norm(dim=1)
            size = size.clamp(min=0.1 * size.square().mean().sqrt()).clamp(min=torch.finfo(size.dtype).tiny)
            error = ((other[name] - exact).norm(dim=1) / size).max().item()
            noise = ((lost[name] - exact).norm(dim=1) / size).square().mean().sqrt().item()
            limit = SINGLE * max(tolerance(stored, noise), probe.EXACT)
            yield Map(f"a row of {tables[name]}", error, limit, "one row")


def _share(difference: probe.Difference) -> float:
    """An error as a part of its limit; NaN is beyond it."""
    return difference.error / difference.limit if difference.error <= math.inf else math.inf


def _inputs(a: Path, configs: Sequence[PreTrainedConfig], prompt: str, tokens: int, seed: int, full: bool) -> _Inputs:
    """One long sequence of random tokens; short ones that walk through the vocabulary; the prompt, if A can read it.

    a: A's folder. configs: of A's and B's language models.
    """
    vocab_size, other = (_size(config, "vocab_size", None) for config in configs)
    if vocab_size != other:
        raise InputError(f"vocab_size: expected {vocab_size} as in A, found {other} in B")
    limit = min(positions_of(config) for config in configs)
    tokens = min(tokens, max(1, limit // 2))
    not_run = []
    generator = torch.Generator().manual_seed(seed)
    positions = max(4 * tokens, min(MAX_POSITIONS, MAX_LOGITS // vocab_size))
    kept = min(limit, positions // 2)
    wanted = limit if full and limit < 2**31 else kept
    windows = [size for config in configs if isinstance(size := getattr(config, "sliding_window", None), int)]
    if windows:
        wanted = max(wanted, min(limit, max(windows) + BEYOND))
    length = min(wanted, max(kept, _longest(configs[0])))
    if windows and length <= max(windows) < limit:
        not_run.append(f"a context beyond the window of {max(windows):,} tokens: there is no memory for it")
    kept = length if full else min(length, kept)
    long = torch.randint(vocab_size, (1, length), generator=generator)
    width = min(tokens, limit)
    order = torch.randperm(vocab_size, generator=generator)
    once = -(-vocab_size // width)
    rows = once if full else min(once, max(1, (positions - kept) // width))
    walk = order.repeat(-(-rows * width // vocab_size))[: rows * width].view(rows, width)
    sequences = [(long, kept), (walk, width)]
    prompts = [walk[:1, : max(1, min(tokens, limit - tokens) // 4)]]
    if (encoded := prompt_ids(a, prompt, limit - tokens, vocab_size)) is not None:
        sequences.append((encoded, encoded.shape[1]))
        prompts.append(encoded)
    seen = torch.cat([ids.flatten() for ids, _ in sequences]).unique().numel()
    if seen < vocab_size:
        not_run.append(f"{vocab_size - seen:,} of {vocab_size:,} tokens of the vocabulary")
    if length < limit < 2**31:
        not_run.append(f"{limit - length:,} of {limit:,} positions")
    return _Inputs(tuple(sequences), tuple(prompts), tokens, seen, vocab_size, length, tuple(not_run))


def prompt_ids(folder: Path, prompt: str, most: int, vocab_size: int) -> Tensor | None:
    """A prompt as a model folder's tokenizer has it, (1, length), if it has at most so many, all of them known."""
    if not prompt or not (folder / "tokenizer.json").exists():
        return None
    ids: Tensor = load_tokenizer(folder)(prompt, return_tensors="pt").input_ids
    return ids if 0 < ids.shape[1] <= most and int(ids.max()) < vocab_size else None


def _longest(config: PreTrainedConfig) -> int:
    """How many tokens a sequence may have: two copies of its scores, in fp64, take half of the free memory at most."""
    return int((available_memory() / 2 / (3 * 8 * _size(config, "num_attention_heads", 64))) ** 0.5)


def _size(config: PreTrainedConfig, name: str, default: int | None) -> int:
    value = getattr(config, name, default)
    if type(value) is not int or value < 1:
        raise InputError(f"config.json: {name}: expected a positive integer, found {value!r}")
    return value


def _noise(
    reader: CheckpointReader, dtype: torch.dtype, touched: Collection[str] | None, draw: int
) -> Callable[[PreTrainedModel], None]:
    """A change to a model in fp64: what storing its weights in a dtype does to them.

    It rounds them. Modules that are rewritten (None: all) get noise as large where they have no more bits than that.
    """
    change, others = probe.stored_as(dtype, touched, draw), stored_in(reader.tensors)

    def changed(model: PreTrainedModel) -> None:
        for name, weight in model.named_parameters():
            kept = reader.tensors[name].dtype if name in reader.tensors else others
            weight.data = change(name, weight.to(kept))

    return changed


@torch.no_grad()
def _run(
    folder: Path,
    dtype: torch.dtype,
    reference: _Reference,
    proved: bool,
    prompts: int = 1,
    change: Callable[[PreTrainedModel], None] = lambda model: None,
) -> _Run:
    """Run a model folder in a dtype on all that the reference was run on; of its prompts, on the last `prompts`.

    proved: whether tensors and maps prove B; if not, tokens that go to other experts count as all do. change: what is
    done to its weights first.
    """
    model = load(folder, dtype)
    change(model)
    errors, divergences, leads, rerouted = [], [], [], False
    for (ids, kept, exact, choices), size in zip(reference.logits(), reference.spreads, strict=True):
        rerouted = proved and routed(model) and not follows(model, choices)
        with following(model, choices) as misrouted:
            logits = _logits(model, ids, kept)
        error = (logits - exact).square().mean(-1).sqrt() / size
        for each in misrouted:
            error = torch.maximum(error, each.view(ids.shape)[:, -kept:].flatten())
        errors.append(error)
        target = exact.log_softmax(-1)
        divergences.append((target.exp() * (target - logits.log_softmax(-1))).sum(-1))
        leads.append((exact.amax(-1) - exact.gather(-1, logits.argmax(-1, keepdim=True))[:, 0]) / size)
    chosen = reference.inputs.prompts[len(reference.inputs.prompts) - prompts :]
    greedy = tuple(generate(model, ids, reference.inputs.tokens) for ids in chosen)
    error, divergence, lead = torch.cat(errors), torch.cat(divergences), torch.cat(leads)
    usual = math.ceil((1 - (REROUTED if rerouted else OUTLIERS)) * len(error))
    loss = Loss(
        error=_finite(error.sort().values[:usual].square().mean().sqrt()),
        worst=_finite(error.max()),
        kl=_finite(divergence.sort().values[:usual].mean().clamp(min=0)),
        top1=(lead == 0).double().mean().item(),
        lead=_finite(lead.max()),
        greedy=_equal_tokens(greedy, reference.of(greedy)),
    )
    return _Run(loss, greedy, routed(model), rerouted)


def _finite(value: Tensor) -> float:
    return value.item() if value.isfinite() else math.inf


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: Tensor, kept: int) -> Tensor:
    """Of the last `kept` tokens of each sequence, (sequences * kept, vocab), in fp64."""
    with arithmetic(model):
        logits: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits
    return logits.flatten(0, 1).double()


def _equal_tokens(generated: Sequence[Generated], expected: Sequence[Generated]) -> float:
    """Fraction of greedy tokens before the first difference."""
    firsts = [_first_difference(one, other) for one, other in zip(generated, expected, strict=True)]
    return sum(firsts) / max(1, sum(len(each.tokens) for each in expected))


def _first_difference(generated: Generated, expected: Generated) -> int:
    different = (generated.tokens != expected.tokens).nonzero()
    return int(different[0]) if len(different) else len(expected.tokens)


def _ties(generated: Sequence[Generated], expected: Sequence[Generated], limit: float) -> bool:
    """Whether greedy tokens differ only where errors of `limit` can make them: the first difference is a tie."""
    for one, other in zip(generated, expected, strict=True):
        first = _first_difference(one, other)
        if first < len(other.tokens):
            scores = other.uncached[first].double()
            gap = scores[other.tokens[first]] - scores[one.tokens[first]]
            if not gap <= 2 * SINGLE * limit * spread(scores[None])[0]:
                return False
    return True


def _usual(losses: Sequence[Loss]) -> Loss:
    """What several draws lose: their mean square error, and the worst of the rest."""
    return Loss(
        (sum(loss.error**2 for loss in losses) / len(losses)) ** 0.5,
        max(loss.worst for loss in losses),
        sum(loss.kl for loss in losses) / len(losses),
        min(loss.top1 for loss in losses),
        max(loss.lead for loss in losses),
        min(loss.greedy for loss in losses),
    )


def _together(own: Loss, storage: Loss) -> Loss:
    """What arithmetic and storage lose together."""
    return Loss(
        math.hypot(own.error, storage.error),
        math.hypot(own.worst, storage.worst),
        own.kl + storage.kl,
        min(own.top1, storage.top1),
        max(own.lead, storage.lead),
        min(own.greedy, storage.greedy),
    )


def _judge(
    name: str,
    stored: torch.dtype,
    run: _Run,
    own: Loss,
    allowed: Loss,
    reference: _Reference,
    margin: float,
    proved: bool,
) -> Row:
    """The verdict on B's run in one dtype, from what A loses there.

    own: by arithmetic. allowed: by arithmetic and storage. margin: a factor for chance. proved: whether tensors and
    maps prove B; then what A loses may be large.
    """
    kind, loss, factor = getattr(torch, name), run.loss, OWN_ERROR_FACTOR * margin
    floor = max(TOLERANCES.get(kind, 0.0), TOLERANCES.get(stored, 0.0))
    limit = max(floor, factor * allowed.error)
    worst = SINGLE * max(floor, factor * allowed.worst)
    kl = factor**2 * allowed.kl + (SINGLE * floor) ** 2 * reference.scale() + LEAST_KL
    half = kind not in TOLERANCES or stored not in TOLERANCES
    passed = (
        loss.error <= limit
        and (limit <= LARGEST_LIMIT or proved)
        and (run.rerouted or (loss.worst <= worst and loss.lead <= 2 * SINGLE * worst))
        and loss.kl <= kl
        and (half or run.routed or _ties(run.greedy, reference.of(run.greedy), limit))
    )
    return Row(name, loss, own, limit, torch.finfo(kind).eps <= torch.finfo(stored).eps, passed)


@dataclass(frozen=True)
class _Evidence:
    """What the verdict is made of.

    related: how B was made of A. numbers: the part of the tokens run for which A's logits are finite. The rest: as in
    Report.
    """

    stored: str
    data: Differences
    related: Relation | None
    tensors: tuple[str, ...]
    maps: tuple[Map, ...]
    proved: bool
    inputs: _Inputs
    numbers: float
    rows: tuple[Row, ...]
    caches: tuple[str, ...]

    @property
    def _failed(self) -> list[Row]:
        return [row for row in self.rows if row.judged and not row.passed]

    @property
    def _closed(self) -> bool:
        """Whether B is A less what fuse removes."""
        return self.related is not None and bool(self.related.closed)

    def report(self) -> Report:
        """The verdict."""
        # where no seam was closed, other tensors may be another basis of the same function, if fp64 sees no difference
        rebased = self.related is not None and not self._closed and bool(self.tensors)
        covered = self.proved or ((self.related is None or rebased) and not self.inputs.not_run)
        differs = self.data.function or self.data.generation or self.caches
        return Report(
            same=not self._failed and covered and self.numbers == 1 and not differs,
            stored=self.stored,
            data=self.data,
            tensors=self.tensors,
            maps=self.maps,
            proved=self.proved,
            caches=self.caches,
            tokens_seen=self.inputs.tokens_seen,
            vocab_size=self.inputs.vocab_size,
            positions_seen=self.inputs.positions_seen,
            not_run=self.inputs.not_run,
            rows=self.rows,
            note=self._note(),
        )

    def _note(self) -> str:
        """The verdict in a sentence: what decides it first."""
        data, tensors, failed, stored = self.data, self.tensors, self._failed, self.stored
        if self.numbers < 1:
            part = f"{1 - self.numbers:.1%} of the tokens run"
            return f"cannot be judged: A itself gives NaN or infinity in float64, for {part}"
        if self.caches:
            return f"a broken cache, whatever the function: {self.caches[0]}"
        if data.function:
            return f"not the same function: {data.function[0]}"
        if self._closed and tensors:
            return (
                f"not the same function: {tensors[0]}: expected as in A, since no closed seam touches it, found other "
                f"numbers{_more(tensors)}"
            )
        if off := [each for each in self.maps if not each.passed]:
            worst = max(off, key=_share)
            return (
                f"not the same function: {worst.name} is off by {worst.error:.1e}, where storing it in {stored} "
                f"explains {worst.limit:.1e}"
            )
        if blind := [row for row in failed if not row.limit <= LARGEST_LIMIT]:
            return (
                f"cannot be judged: in {blind[0].dtype}, the original itself is too far from what it is in fp64; fuse "
                f"with --dtype float32 or finer and verify that"
            )
        if failed and self.related is not None and not self._closed:
            return (
                f"not the same function: {tensors[0] if tensors else 'the model'} is another than A's{_more(tensors)}"
            )
        if failed and stored == "float64":
            return "not the same function: in fp64, rounding cannot explain the difference"
        if failed:
            return (
                f"not the same function as stored in {stored}; to tell rounding from a bug, fuse with --dtype float64 "
                f"and verify that: fp64 leaves no room for rounding"
            )
        if data.generation:
            return f"the same function, but not the same generation: {data.generation[0]}{_more(data.generation)}"
        if not self.proved and self.inputs.not_run:
            return (
                f"the same on all that was run, which proves nothing of the rest; --full runs it: "
                f"{self.inputs.not_run[0]}"
            )
        same_as = f"the same function as stored in {stored}"
        if worse := [row for row in self.rows if not row.judged and not row.passed]:
            names = " or ".join(row.dtype for row in worse)
            factors = " and ".join(f"{row.b.error / max(row.a.error, 1e-300):.0f}" for row in worse)
            same_as += f"; do not run it in {names}, where its error is {factors} times the original's"
        return same_as


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
