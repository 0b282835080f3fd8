"""What half precision costs the bundled model: logits on held-out text, stored in it, and both stored and run in it.

    python benchmarks/stored.py

The bundled file is bf16 already, so casting it to bf16 would show nothing. Its weights are first mixed within every
seam by a random orthogonal matrix (the function stays the same, to 1e-14): they then use all their bits, as weights do
that were trained in fp32. Prints a table, and on the last line one JSON object.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

import skipless
from skipless.architecture.config import Architecture
from skipless.architecture.seams import REMOVABLE, seams
from skipless.bundled import BUNDLED
from skipless.checkpoint.reader import CheckpointReader
from skipless.inference import load, load_tokenizer
from skipless.train.data import Blocks, read_texts, split, standard_library
from skipless.train.recipe import Recipe

console = Console(width=100)


@torch.no_grad()
def mix(model: Any, seed: int = 0) -> None:
    """Put a random orthogonal matrix G into every seam: writers W G, readers G^-1 W."""
    generator = torch.Generator().manual_seed(seed)
    weights = dict(model.named_parameters())
    for seam in seams(Architecture.from_config(CheckpointReader(BUNDLED).config)):
        if seam.kind not in REMOVABLE:
            continue
        matrix = torch.randn(seam.width, seam.width, generator=generator, dtype=torch.float64)
        gauge = torch.linalg.qr(matrix).Q
        for name in seam.writers:
            weight = weights[f"{name}.weight"]
            weight.copy_(weight @ gauge if "embed" in name else gauge.T @ weight)
        for name in seam.readers:
            weight = weights[f"{name}.weight"]
            weight.copy_(weight @ gauge)


def never_seen() -> Blocks:
    """The files that the bundled model was not trained on, in blocks of 256 tokens."""
    recipe = Recipe.read("stdlib")
    _, texts = split(read_texts(standard_library()), recipe.data.held_out, recipe.seed)
    return Blocks.from_texts(texts, load_tokenizer(BUNDLED), recipe.sequence_length)


def held_out(sequences: int) -> torch.Tensor:
    """Some of these blocks (sequences, 256), from all places."""
    tokens = never_seen().tokens
    return tokens[torch.linspace(0, len(tokens) - 1, sequences).long()]


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(input_ids=ids).logits.flatten(0, 1).double() for ids in tokens.split(8)])


def compare(found: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    target, other = exact.log_softmax(-1), found.log_softmax(-1)
    return {
        "logit_error": (torch.linalg.norm(found - exact) / torch.linalg.norm(exact)).item(),
        "kl": (target.exp() * (target - other)).sum(-1).mean().item(),
        "top1": (found.argmax(-1) == exact.argmax(-1)).double().mean().item(),
    }


def cast(model: Any, dtype: torch.dtype) -> Any:
    """The same model with every weight rounded to `dtype`, in fp64."""
    return model.to(dtype).double()


@torch.no_grad()
def resolve(model: Any, dtype: torch.dtype) -> Any:
    """A model fused by q in fp64, cast, its K and V then solved for (least squares) what now writes the stream."""
    layers, embedding = model.model.layers, model.model.embed_tokens
    solved = []
    for index, layer in enumerate(layers):
        x = layers[index - 1].mlp.down_proj.weight.T if index else embedding.weight
        for linear in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            solution = torch.linalg.lstsq(x.to(dtype).double(), x @ linear.weight.T).solution
            solved.append((linear, solution.T))
    for linear, weight in solved:
        linear.weight.copy_(weight)
    return cast(model, dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=32, help="held-out sequences of 256 tokens")
    parser.add_argument("--seeds", type=int, default=3, help="random mixtures to average over")
    arguments = parser.parse_args()
    disable_progress_bar()
    tokens = held_out(arguments.sequences)
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in range(arguments.seeds):
        for name, numbers in one_mixture(tokens, seed).items():
            rows.setdefault(name, []).append(numbers)
    means = {
        name: {key: sum(found[key] for found in runs) / len(runs) for key in runs[0]} for name, runs in rows.items()
    }
    table = Table(title=f"{tokens.numel():,} held-out tokens, mean of {arguments.seeds} mixtures")
    for column in ("stored", "logits, relative error", "KL, nats", "top-1 equal"):
        table.add_column(column, justify="left" if column == "stored" else "right")
    for name, numbers in means.items():
        table.add_row(name, f"{numbers['logit_error']:.2g}", f"{numbers['kl']:.2g}", f"{numbers['top1']:.4f}")
    console.print(table)
    print(json.dumps(means))


def one_mixture(tokens: torch.Tensor, seed: int) -> dict[str, dict[str, float]]:
    """Every way to store one mixture of the bundled model against that mixture in fp64."""
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = load(BUNDLED, torch.float64)
        mix(model, seed)
        model.save_pretrained(folder / "original")
        exact = logits(model, tokens)

        def add(name: str, other: Any) -> None:
            found[name] = compare(logits(other, tokens), exact)

        for dtype in (torch.bfloat16, torch.float16):
            short = str(dtype).removeprefix("torch.")
            add(f"{short}: original, cast", cast(load(folder / "original", torch.float64), dtype))
            for basis, plain in (("q", "S = Q, cast (the paper's way)"), ("pivoted", "pivoted, cast")):
                exact_folder, fused = folder / f"{basis}-exact-{short}", folder / f"{basis}-{short}"
                skipless.fuse(folder / "original", exact_folder, basis=basis)
                add(f"{short}: {plain}", cast(load(exact_folder, torch.float64), dtype))
                if basis == "q":
                    add(f"{short}: S = Q, cast, R re-solved", resolve(load(exact_folder, torch.float64), dtype))
                skipless.fuse(folder / "original", fused, basis=basis, dtype=short)
                add(f"{short}: --basis {basis}", load(fused, torch.float64))
            fused = folder / f"rest-{short}"
            skipless.fuse(folder / "original", fused, basis="pivoted", dtype=short, rest_dtype="float32")
            add(f"{short}: --basis pivoted --rest-dtype float32", load(fused, torch.float64))
            folders = {"original, cast": "original", "--basis q": f"q-{short}", "--basis pivoted": f"pivoted-{short}"}
            for name, fused in folders.items():
                add(f"run in {short}: {name}", load(folder / fused, dtype))
        for dtype in ("float32", "float64"):
            for basis in ("q", "pivoted"):
                fused = folder / f"{basis}-{dtype}"
                skipless.fuse(folder / "original", fused, basis=basis, dtype=dtype)
                add(f"{dtype}: --basis {basis}", load(fused, torch.float64))
    return found


if __name__ == "__main__":
    main()
