"""What quantizing costs in llama.cpp, original against fused: perplexity of the bundled model on held-out text.

    make llama-cpp
    python benchmarks/perplexity.py

f32 is exported by skipless; llama-quantize makes the others of it, the last with the importance matrix that
llama-imatrix finds on other held-out text. A loss is what perplexity has grown by since the original's f32; the ratio,
by how much the fused model's is larger. bf16 fused by skipless is what `fuse --dtype bfloat16` writes. Prints a table,
and on the last line one JSON object.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

import skipless
from engines import LLAMA_CPP
from skipless.bundled import BUNDLED
from skipless.inference import load_tokenizer
from skipless.serving.export import export
from stored import held_out

BLOCKS, CONTEXT = 128, 512
KINDS = ("bf16", "q8_0", "q5_K_M", "q4_K_M", "q4_0")
console = Console(width=100)


def run(program: str, *arguments: object) -> str:
    """What one of llama.cpp's programs prints."""
    command = [str(LLAMA_CPP / "bin" / program), *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return done.stdout + done.stderr


def perplexity(file: Path, text: Path) -> float:
    """Of the second half of each CONTEXT tokens, each after all of those before it.

    Asked again where the program ends before its log has said it.
    """
    exact = ("--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off")
    while True:
        found = run("llama-perplexity", "--model", file, "--file", text, "--ctx-size", CONTEXT, *exact)
        if said := re.search(r"PPL = ([\d.]+)", found):
            return float(said[1])


def measure(folder: Path) -> dict[str, dict[str, float]]:
    """Perplexities by how weights are stored, of original, q and pivoted."""
    tokenizer, blocks = load_tokenizer(BUNDLED), held_out(2 * BLOCKS)
    texts = {}
    for name, part in (("text", blocks[::2]), ("other", blocks[1::2])):
        texts[name] = folder / name
        texts[name].write_text("".join(tokenizer.batch_decode(part)))
    sources = {"original": BUNDLED}
    for basis in ("q", "pivoted"):
        skipless.fuse(BUNDLED, folder / basis, basis=basis, dtype="float32")
        skipless.fuse(BUNDLED, folder / f"{basis}-bf16", basis=basis, dtype="bfloat16")
        sources[basis] = folder / basis
    found: dict[str, dict[str, float]] = {}
    for name, source in sources.items():
        export(source, folder / f"{name}-gguf", to="gguf")
        file = folder / f"{name}-gguf" / "model.gguf"
        made = {"f32": file}
        if name != "original":
            export(folder / f"{name}-bf16", folder / f"{name}-bf16-gguf", to="gguf", weights="bf16")
            made["bf16, by fuse"] = folder / f"{name}-bf16-gguf" / "model.gguf"
        matrix = file.with_name("imatrix")
        run("llama-imatrix", "--model", file, "--file", texts["other"], "--output-file", matrix, "--ctx-size", CONTEXT)
        for kind in KINDS:
            run("llama-quantize", file, made.setdefault(kind, file.with_name(kind)), kind)
        weighed = made["q4_K_M, weighed"] = file.with_name("weighed")
        run("llama-quantize", "--imatrix", matrix, file, weighed, "q4_K_M")
        for kind, stored in made.items():
            found.setdefault(kind, {})[name] = perplexity(stored, texts["text"])
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder))
    table = Table("weights", "original", "by q", "pivoted", "loss of the original", "by q: ratio", "pivoted: ratio")
    exact = found["f32"]["original"]
    for kind, each in found.items():
        losses = {name: value / exact - 1 for name, value in each.items()}
        lost = losses.get("original")
        ratios = [f"{losses[name] / lost:.2f}" if lost and kind != "f32" else "" for name in ("q", "pivoted")]
        values = [f"{each[name]:.4f}" if name in each else "" for name in ("original", "q", "pivoted")]
        table.add_row(kind, *values, "" if lost is None else f"{lost:.2%}", *ratios)
    console.print(table)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
