"""Is what audit forecasts what fuse does, in bf16 and fp16? Is anything called safe that loses too much?

    python benchmarks/forecasts.py [--models 40] [--keep FILE]

Random models of several widths and switches, Gaussian weights in fp32, serial layers without skips and norms. Each kind
of seam is closed alone, and several together. Measured, in fp64, with white inputs: the errors of q, k and v; and those
on the way through each layer that is rewritten, x O V P M, head by head, and of the last O and the head. Beside them,
the errors of logits on random tokens, relative, the median over tokens, as a multiple of the original's in that dtype.

Biases are a single draw of rounding errors, where a matrix is thousands: models with them stand apart. What they give
by themselves is in the errors of q, k, v and the logits, not in what layers give. Exits with 1 if a forecast of a seam,
a layer or all together is off by more than 15 %, or something that is called safe loses more than 2.5 times what the
original does. Prints the table of docs/half-precision.md; the last line is one JSON object.
"""

import argparse
import json
import logging
import math
import os
import random
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from rich.console import Console
from rich.progress import track
from tests.models import build, load, random_ids, save
from transformers.utils import logging as transformers_logging

import skipless
from skipless.algebra.tolerances import OWN_ERROR_FACTOR
from skipless.errors import InputError

DTYPES = ("bfloat16", "float16")
KINDS = ("stream", "p", "values", "head", "stream,p", "stream,values", "stream,values,p,head")
OFF = 0.15
MEMORY = Path("/dev/shm")


def draw_fields(choose: Any) -> dict[str, Any]:
    """The config of a model: widths for which each kind saves weights, and the switches of a serial model."""
    heads, head_dim = choose((4, 6)), choose((16, 20))
    d = choose((heads * head_dim, heads * head_dim, heads * head_dim + 16))
    bias = choose((False, False, True))
    return {
        "hidden_size": d,
        "num_attention_heads": heads,
        "num_key_value_heads": choose([n for n in (1, 2, heads // 2, heads) if heads % n == 0]),
        "head_dim": head_dim,
        "intermediate_size": choose((2 * d, 3 * d)),
        "num_hidden_layers": 2,
        "vocab_size": 3 * d,
        "ffn_type": choose(("glu", "glu", "mlp")),
        "position_type": choose(("rope", "learned", "none")),
        "attention_bias": bias,
        "mlp_bias": bias,
    }


@torch.no_grad()
def gaussian(seed: int, fields: dict[str, Any]) -> Any:
    """A model of Gaussian weights, whose layers give outputs of unit size."""
    model = build(seed, **fields)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        size = 1.0 if "embed" in name else 0.1 if weight.ndim == 1 else weight.shape[1] ** -0.5
        weight.copy_(size * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    for layer in model.model.layers:
        given = []
        hook = layer.mlp.register_forward_hook(lambda _, __, output, given=given: given.append(output))
        model(input_ids=random_ids(model))
        hook.remove()
        layer.mlp.down_proj.weight /= given[0].std()
    return model.float()


@torch.no_grad()
def on_the_way(model: Any) -> tuple[list[dict[str, torch.Tensor]], list[torch.Tensor]]:
    """Of white inputs: q, k (and v) of each layer; and what it gives on the way, head by head, and the head."""
    reads, ways = [], []
    tokens = torch.arange(model.config.vocab_size)
    tables = [model.model.embed_tokens(tokens)]
    if model.model.position_embeddings is not None:
        tables.append(model.model.position_embeddings.weight)
    generator = torch.Generator().manual_seed(0)
    picks = [torch.randint(len(table), (2048,), generator=generator) for table in tables]
    x = sum(table[pick] for table, pick in zip(tables, picks, strict=True))
    for layer in model.model.layers:
        attention, size = layer.self_attn, layer.self_attn.head_dim
        projected = attention.project(x)
        names = "qk" if model.config.values_removed else "qkv"
        reads.append(dict(zip(names, projected, strict=False)))
        value = projected[2].unflatten(-1, (-1, size))
        value = value.repeat_interleave(attention.num_heads // value.shape[1], 1)
        parts = []
        for head in range(attention.num_heads):
            alone = torch.zeros_like(value)
            alone[:, head] = value[:, head]
            given = attention.project_out(alone.flatten(1))
            parts += [
                given @ linear.weight.T for linear in (layer.mlp.gate_proj, layer.mlp.up_proj) if linear is not None
            ]
        given = torch.cat(parts, 1)
        ways.append(given - given.mean(0))  # without biases, which are elsewhere once seams are closed
        inputs = model.config.intermediate_size  # one at a time, as large as all together are
        x = layer.mlp.down_proj(inputs**0.5 * torch.eye(inputs, dtype=torch.float64))
    ways.append(model.lm_head(x))
    return reads, ways


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative to what the matrices give: biases would be most of what single inputs do."""
    return (torch.linalg.norm(found - exact) / torch.linalg.norm(exact - exact.mean(0))).item()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=random_ids(model, batch=16, length=32)).logits


def lost(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The relative error of a token's logits, the median over tokens."""
    return ((found - exact).norm(dim=-1) / exact.norm(dim=-1)).median().item()


def judge(seed: int) -> dict[str, dict[str, list[float]]]:
    """The ratios of what one model shows, by dtype and kind."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    generator = random.Random(seed)
    fields, basis = draw_fields(generator.choice), generator.choice(("pivoted", "pivoted", "auto"))
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as temporary:
        folder = Path(temporary)
        source = save(gaussian(seed, fields), folder / "source")
        exact = load(source)
        exact_reads, exact_ways = on_the_way(exact)
        right = logits(exact)
        for dtype in DTYPES:
            cast = load(source).to(getattr(torch, dtype)).double()
            own, (_, own_ways) = lost(logits(cast), right), on_the_way(cast)
            for kind in KINDS:
                options = {"remove": kind.split(","), "dtype": dtype, "basis": basis}
                fused = folder / f"{dtype} {kind}"
                try:
                    skipless.fuse(source, fused, **options)
                except InputError:
                    continue
                audit, after = skipless.audit(source, **options), load(fused)
                biases = ", with biases" if fields["attention_bias"] else ""
                seen, numbers = found[f"{dtype} {kind}{biases}"], audit.together
                reads, ways = on_the_way(after)
                for seam in audit.seams:
                    if seam.asked and seam.kind == "stream":
                        errors = seam.ways[audit.basis].errors[dtype]
                        for name, exactly in exact_reads[seam.layer].items():
                            if name in reads[seam.layer]:
                                seen["read"].append(errors[name] / error(reads[seam.layer][name], exactly))
                closed = {seam.layer for seam in audit.seams if seam.asked}
                for layer, exactly in ((layer, exact_ways[layer]) for layer in sorted(closed)):
                    seen["way"].append(numbers.after[layer] / error(ways[layer], exactly))
                    seen["own"].append(numbers.before[layer] / error(own_ways[layer], exactly))
                multiple = lost(logits(after), right) / own
                seen["multiple"].append(multiple)
                seen["all"].append(numbers.fused / numbers.original / multiple)
                seen["safe"].append(audit.safe)
    return found


def kept(file: Path | None) -> dict[int, dict[str, dict[str, list[float]]]]:
    """What an earlier run has written, by seed."""
    lines = file.read_text().splitlines() if file and file.exists() else []
    return dict(map(json.loads, lines))


def worst(ratios: list[float]) -> float:
    """The one that is furthest from 1."""
    return max(ratios, key=lambda ratio: abs(math.log(ratio)), default=1.0)


def is_off(ratio: float) -> bool:
    """Whether a forecast is off by more than 15 %."""
    return abs(math.log(ratio)) > math.log(1 + OFF)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, default=40)
    parser.add_argument("--keep", type=Path, help="a line for each model; those that are there are not judged again")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    models = kept(arguments.keep)
    for seed in track(range(arguments.models), console=Console(stderr=True)):
        if seed not in models:
            models[seed] = judge(seed)
            if arguments.keep:
                with arguments.keep.open("a") as file:
                    print(json.dumps([seed, models[seed]]), file=file)
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    missed, unsafe = [], []
    for seed in range(arguments.models):
        for name, seen in models[seed].items():
            dtype, kind = name.split(" ", 1)
            kind, *biased = kind.split(", with ")
            together = " with biases" if biased else " without biases"
            for each in ("read", *([] if biased else ["way"])):
                found[kind][each] += seen.get(each, [])
            found[kind]["all" + together] += seen["all"]
            found[kind][dtype] += seen["multiple"]
            missed += [f"seed {seed}, {name}: {ratio:.2f}" for ratio in seen["all"] if is_off(ratio)]
            pairs = zip(seen["multiple"], seen["safe"], strict=True)
            unsafe += [f"seed {seed}, {name}: {each:.2f}" for each, safe in pairs if safe and each > OWN_ERROR_FACTOR]
    columns = {"read": "q, k, v", "way": "a layer, or the head"}
    columns |= {f"all {biased}": f"logits, {biased}" for biased in ("without biases", "with biases")}
    header = ["`--remove`", *columns.values(), "bf16: logits", "fp16: logits"]
    print(f"| {' | '.join(header)} |\n{'|---' * len(header)}|")
    for kind in KINDS:
        seen = found[kind]
        cells = [f"{median(seen[name]):.2f}, {worst(seen[name]):.2f}" if seen[name] else "" for name in columns]
        cells += [f"{median(seen[dtype]):.2f}, {max(seen[dtype]):.2f}" if seen[dtype] else "" for dtype in DTYPES]
        print(f"| `{kind}` | {' | '.join(cells)} |")
    for biased in ("without biases", "with biases"):
        ratios = [ratio for seen in found.values() for ratio in seen[f"all {biased}"]]
        print(f"all together, {biased}: {sum(not is_off(each) for each in ratios)} of {len(ratios)} within 15 %")
    safe = [each for model in models.values() for seen in model.values() for each in seen["safe"]]
    print(f"called safe: {sum(safe)} of {len(safe)}")
    off = [kind for kind, seen in found.items() if is_off(worst(seen["read"] + seen["way"]))]
    print(json.dumps({"models": arguments.models, "off": off, "missed": missed, "unsafe": unsafe}))
    sys.exit(1 if off or missed or unsafe else 0)


if __name__ == "__main__":
    main()
