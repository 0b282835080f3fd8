"""What quantizing costs in llama.cpp, original against fused: perplexity of the bundled model on held-out text.

    make llama-cpp
    python benchmarks/perplexity.py [--folder WORK]    # WORK keeps what was made and measured: a second run goes on

llama-quantize makes all but f32 of what skipless exports in f32, "weighed" with the importance matrix that
llama-imatrix finds on other held-out text; "bf16, by fuse" is what `fuse --dtype bfloat16` writes. A loss is what
perplexity has grown by since the original's in f32; the ratio, by how much the fused model's is larger. The last line
is one JSON object.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import skipless
from engines import LLAMA_CPP
from skipless.bundled import BUNDLED
from skipless.inference import load_tokenizer
from skipless.serving.export import export
from stored import held_out

CONTEXT = 512
NAMES = {"original": "original", "q": "by q", "pivoted": "pivoted"}
EXACT = "f32"


class Models:
    """What was made in a folder, by name; each is made when it is first asked for. blocks: of 256 tokens of text."""

    def __init__(self, folder: Path, blocks: int):
        self.folder, self.blocks = folder, blocks

    def made(self, name: str, make: Callable[[Path], object]) -> Path:
        """The file or folder of this name."""
        found = self.folder / name
        if not found.exists():
            make(self.folder / f"{name}.part")
            (self.folder / f"{name}.part").rename(found)
        return found

    def text(self, number: int) -> Path:
        """Held-out text: 0 that perplexity is of, 1 for importance matrices."""

        def write(file: Path) -> None:
            file.write_text("".join(load_tokenizer(BUNDLED).batch_decode(held_out(2 * self.blocks)[number::2])))

        return self.made(f"text-{number}", write)

    def source(self, name: str, dtype: str) -> Path:
        """A model folder."""
        if name == "original":  # which is stored in bf16
            return BUNDLED
        return self.made(f"{name}-{dtype}", lambda folder: skipless.fuse(BUNDLED, folder, basis=name, dtype=dtype))

    def exported(self, name: str, to: str, weights: str, dtype: str) -> Path:
        source = self.source(name, dtype)
        return self.made(f"{name}-{to}-{weights}", lambda folder: export(source, folder, to=to, weights=weights))

    def gguf(self, name: str, kind: str, weighed: bool) -> Path:
        """What llama-quantize makes of the f32 file."""
        file = self.exported(name, "gguf", "f32", "float32") / "model.gguf"
        if kind == "f32":
            return file
        options = ("--imatrix", self.importance(name, file)) if weighed else ()
        made = f"{name}-{kind}{'-weighed' * weighed}.gguf"
        return self.made(made, lambda found: llama_cpp("llama-quantize", *options, file, found, kind))

    def importance(self, name: str, file: Path) -> Path:
        asked = ("--model", file, "--file", self.text(1), "--ctx-size", CONTEXT)
        return self.made(f"{name}-imatrix", lambda found: llama_cpp("llama-imatrix", *asked, "--output-file", found))


def llama_cpp(program: str, *arguments: object) -> str:
    """What one of llama.cpp's programs prints. Its threads spin: more than are free make it many times slower."""
    if program != "llama-quantize":
        arguments += ("--threads", torch.get_num_threads())
    command = [str(LLAMA_CPP / "bin" / program), *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return done.stdout + done.stderr


def quantized(models: Models, name: str, kind: str, weighed: bool = False) -> float:
    return perplexity(models.gguf(name, kind, weighed), models.text(0))


def by_fuse(models: Models, name: str) -> float | None:
    """In llama.cpp; the original has not been fused."""
    if name == "original":
        return None
    return perplexity(models.exported(name, "gguf", "bf16", "bfloat16") / "model.gguf", models.text(0))


def perplexity(file: Path, text: Path) -> float:
    """Of the second half of each CONTEXT tokens, each after all of those before it.

    Asked again where the program ends before its log has said it.
    """
    exact = ("--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off")
    while True:
        found = llama_cpp("llama-perplexity", "--model", file, "--file", text, "--ctx-size", CONTEXT, *exact)
        if said := re.search(r"PPL = ([\d.]+)", found):
            return float(said[1])


# Each row: how weights are stored.
ROWS: dict[str, Callable[[Models, str], float | None]] = {
    **{kind: partial(quantized, kind=kind) for kind in ("f32", "bf16")},
    "bf16, by fuse": by_fuse,
    **{kind: partial(quantized, kind=kind) for kind in ("q8_0", "q4_K_M", "q4_0")},
    **{f"{kind}, weighed": partial(quantized, kind=kind, weighed=True) for kind in ("q4_K_M", "q4_0")},
}


def number(value: float, digits: int) -> str:
    """So many digits after the point; of what is no language model any more, the size."""
    return f"{value:.{digits}f}" if value < 1e4 else f"{value:.0e}"


def line(label: str, each: dict[str, float | None], exact: float) -> str:
    """A row of the table, of the perplexities of original, q and pivoted."""
    losses = [None if value is None else value / exact - 1 for value in each.values()]
    values = ["" if value is None else number(value, 3) for value in each.values()]
    small = losses[0] is None or losses[0] < 1e-3
    ratios = ["" if small else number(loss / losses[0], 2) for loss in losses[1:]]
    return f"| {' | '.join((label, *values, '' if losses[0] is None else f'{losses[0]:.2%}', *ratios))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to keep models and results [default: nowhere]")
    parser.add_argument("--blocks", type=int, default=128, help="of 256 tokens of text [default: 128]")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)) / f"{arguments.blocks}-blocks"
        folder.mkdir(parents=True, exist_ok=True)
        results = folder / "results.json"
        found = json.loads(results.read_text()) if results.exists() else {}
        models = Models(folder, arguments.blocks)
        for label, measure in ROWS.items():
            if label not in found:
                found[label] = {name: measure(models, name) for name in NAMES}
                results.write_text(json.dumps(found))
    print(f"| weights | {' | '.join(NAMES.values())} | loss of the original | by q: ratio | pivoted: ratio |")
    print(f"|---|{'---:|' * 6}")
    for label in ROWS:
        print(line(label, found[label], found[EXACT]["original"]))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
