"""What fewer bits cost, engine by engine, original against fused: the bundled model on held-out text.

    make llama-cpp
    pip install 'mlx-lm[cpu]'
    python benchmarks/perplexity.py [--folder WORK]    # WORK keeps what was made and measured: a second run goes on

Perplexity, and the Kullback-Leibler divergence from the original in f32 (nats a token): perplexity can also fall by
chance, a divergence cannot. "By export" is what `skipless export --weights` stores, "by fuse" what `skipless fuse
--dtype bfloat16` does; llama-quantize makes the others of what skipless exports in f32, rest_proj as export stores it,
"weighed" with the importance matrix that llama-imatrix finds on other held-out text. The other engines run what
`skipless fuse --dtype` stores, and what `skipless export` makes of the model in f32; of that, mlx_lm.convert makes
those of MLX in 8 and 4 bits. The last line is one JSON object.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path

import mlx.core as mx
import mlx_lm
import torch
from mlx_lm.utils import load_model
from torch.nn.functional import cross_entropy

import skipless
from engines import LLAMA_CPP, made, rest_as
from export import ONNX_Runtime, OpenVINO, feed
from skipless.bundled import BUNDLED
from skipless.inference import load, load_tokenizer
from skipless.serving.export import export
from stored import compare, logits, never_seen

CONTEXT = 256  # the length that the model was trained with: beyond it, any two models differ
# llama.cpp's log is written by a thread that does not always come to its end, the less so the busier the machine is.
TRIES = 10
NAMES = {"original": "original", "q": "by q", "pivoted": "pivoted"}
MODEL = "model.gguf"


# From a window of tokens (1, CONTEXT) to its logits (CONTEXT, vocabulary), in fp64.
Engine = Callable[[torch.Tensor], torch.Tensor]


class Models:
    """What was made in a folder, by name; each is made when it is first asked for. blocks: of 256 tokens of text."""

    def __init__(self, folder: Path, blocks: int):
        self.folder, self.blocks = folder, blocks

    def made(self, name: str, make: Callable[[Path], object]) -> Path:
        """The file or folder of this name."""
        return made(self.folder / name, make)

    def text(self, number: int) -> Path:
        """Held-out text: 0 that perplexity is of, 1 for importance matrices."""

        def write(file: Path) -> None:
            mine = slice(number * self.blocks, (number + 1) * self.blocks)
            file.write_text(
                load_tokenizer(BUNDLED).decode(never_seen().tokens[mine].flatten(), skip_special_tokens=True)
            )

        return self.made(f"text-{number}", write)

    @cached_property
    def windows(self) -> torch.Tensor:
        """Text 0 as tokens (windows, CONTEXT)."""
        ids = load_tokenizer(BUNDLED)(self.text(0).read_text(), return_tensors="pt").input_ids[0]
        return ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)

    def judged(self, engine: Engine) -> torch.Tensor:
        """An engine's logits where llama-perplexity looks: (tokens, vocabulary)."""
        return torch.cat([engine(window)[CONTEXT // 2 : -1] for window in self.windows.split(1)])

    @cached_property
    def expected(self) -> torch.Tensor:
        """Those of the original in fp32."""
        return self.judged(partial(logits, load(BUNDLED, torch.float32)))

    def source(self, name: str, dtype: str) -> Path:
        """A model folder."""
        if name == "original":  # which is stored in bf16
            return BUNDLED
        return self.made(f"{name}-{dtype}", lambda folder: skipless.fuse(BUNDLED, folder, basis=name, dtype=dtype))

    def exported(self, name: str, to: str, weights: str) -> Path:
        source = self.source(name, "bfloat16" if weights == "bf16" else "float32")  # which fuse stores better
        return self.made(f"{name}-{to}-{weights}", lambda folder: export(source, folder, to=to, weights=weights))

    def exact(self, name: str) -> Path:
        return self.exported(name, "gguf", "f32") / MODEL

    def quantized(self, name: str, kind: str, weighed: bool = False, rest: str | None = None) -> Path | None:
        """What llama-quantize makes of the f32 file, rest_proj as asked or as export has it; by q, q8_0 is enough."""
        if name == "q" and kind.startswith("q4"):
            return None
        file = self.exact(name)
        options = ("--imatrix", self.importance(name, file)) if weighed else ()
        options += rest_as(kind, rest)
        made = f"{name}-{kind}{'-weighed' * weighed}{rest or ''}.gguf"
        return self.made(made, lambda found: llama_cpp("llama-quantize", *options, file, found, kind))

    def by_fuse(self, name: str) -> Path | None:
        """The original has not been fused."""
        return None if name == "original" else self.exported(name, "gguf", "bf16") / MODEL

    def by_export(self, name: str, kind: str) -> Path | None:
        return None if name == "q" and kind.startswith("q4") else self.exported(name, "gguf", kind) / MODEL

    def importance(self, name: str, file: Path) -> Path:
        asked = ("--model", file, "--file", self.text(1), "--ctx-size", CONTEXT)
        return self.made(f"{name}-imatrix", lambda found: llama_cpp("llama-imatrix", *asked, "--output-file", found))

    def probabilities(self) -> Path:
        """Of all tokens, by the original in f32."""
        asked = (self.exact("original"), self.text(0), "--kl-divergence-base")
        return self.made("probabilities", lambda found: said(*asked, found))


def llama_cpp(program: str, *arguments: object) -> str:
    """What one of llama.cpp's programs prints. Its threads spin: more than are free make it many times slower."""
    if program != "llama-quantize":
        arguments += ("--threads", torch.get_num_threads())
    command = [str(LLAMA_CPP / "bin" / program), *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return done.stdout + done.stderr


def said(file: Path, text: Path, *arguments: object) -> tuple[float, float]:
    """Perplexity and divergence (0 if it is not asked for) as llama-perplexity says them with its last window.

    Of the second half of each CONTEXT tokens, each after all of those before it.
    Asked again where the program ends before its log has said so.
    """
    windows = len(load_tokenizer(BUNDLED)(text.read_text()).input_ids) // CONTEXT
    exact = ("--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off", *arguments)
    for _ in range(TRIES):
        log = llama_cpp("llama-perplexity", "--model", file, "--file", text, "--ctx-size", CONTEXT, *exact)
        if found := re.search(rf"^ *{windows} +(\S+) ± +\S+ +\S+ ± +\S+ +(\S+) ±", log, re.MULTILINE):
            return float(found[1]), float(found[2])
        if found := re.search(rf"\[{windows}\]([\d.]+)", log):
            return float(found[1]), 0.0
    raise RuntimeError(log[-2000:])


def elsewhere(models: Models, engine: Engine) -> dict[str, float]:
    """What `said` says of a file, of an engine's logits: of the same tokens, each after the same others."""
    found = models.judged(engine)
    loss = cross_entropy(found, models.windows[:, CONTEXT // 2 + 1 :].flatten())
    return {"perplexity": loss.exp().item(), "divergence": compare(found, models.expected)["kl"]}


def of_graph(model: OpenVINO | ONNX_Runtime, window: torch.Tensor) -> torch.Tensor:
    """An Engine."""
    model.start()
    return torch.from_numpy(feed(model, window.numpy(), 0))[0].double()


def size_of(folder: Path, pattern: str) -> int:
    """Bytes of the files whose names are such."""
    return sum(file.stat().st_size for file in folder.rglob(pattern))


def in_torch(dtype: str) -> Callable[[Models, str], dict[str, float]]:
    def row(models: Models, name: str) -> dict[str, float]:
        model = load(models.source(name, dtype), getattr(torch, dtype))
        size = sum(weight.nbytes for weight in model.parameters())
        return {"bytes": size, **elsewhere(models, partial(logits, model))}

    return row


def in_openvino(weights: str, arithmetic: str) -> Callable[[Models, str], dict[str, float] | None]:
    def row(models: Models, name: str) -> dict[str, float] | None:
        if weights == "int4" and name == "q":  # as in llama.cpp
            return None
        folder = models.exported(name, "openvino", weights)
        found = elsewhere(models, partial(of_graph, OpenVINO(folder, arithmetic)))
        return {"bytes": size_of(folder, "openvino_model.bin"), **found}

    return row


def in_onnx(weights: str) -> Callable[[Models, str], dict[str, float]]:
    def row(models: Models, name: str) -> dict[str, float]:
        folder = models.exported(name, "onnx", weights)
        return {"bytes": size_of(folder, "*.onnx*"), **elsewhere(models, partial(of_graph, ONNX_Runtime(folder)))}

    return row


def in_mlx(weights: str, bits: int | None = None) -> Callable[[Models, str], dict[str, float] | None]:
    """What `skipless export --to mlx` writes; with bits, what `mlx_lm.convert --quantize` makes of it."""

    def row(models: Models, name: str) -> dict[str, float] | None:
        if bits == 4 and name == "q":  # as in llama.cpp
            return None
        folder = models.exported(name, "mlx", weights)
        if bits is not None:
            exact, asked = folder, {"quantize": True, "q_bits": bits, "trust_remote_code": True}
            folder = models.made(f"{name}-mlx-{bits}", lambda found: mlx_lm.convert(str(exact), str(found), **asked))
        model, _ = load_model(folder, trust_remote_code=True)

        def infer(window: torch.Tensor) -> torch.Tensor:
            return torch.tensor(model(mx.array(window.numpy()))[0].astype(mx.float32).tolist()).double()

        return {"bytes": size_of(folder, "*.safetensors"), **elsewhere(models, infer)}

    return row


def measured(models: Models, file: Path | None) -> dict[str, float] | None:
    if file is None:
        return None
    asked = ("--kl-divergence", "--kl-divergence-base", models.probabilities())
    perplexity, divergence = said(file, models.text(0), *asked)
    return {"bytes": file.stat().st_size, "perplexity": perplexity, "divergence": divergence}


def in_llama_cpp(file: Callable[[Models, str], Path | None]) -> Callable[[Models, str], dict[str, float] | None]:
    return lambda models, name: measured(models, file(models, name))


# Each row: how weights are stored (without an engine's name: in llama.cpp), and what is measured of a model of NAMES.
ROWS: dict[str, Callable[[Models, str], dict[str, float] | None]] = {
    "f32": in_llama_cpp(Models.exact),
    "bf16": in_llama_cpp(lambda models, name: models.quantized(name, "bf16")),
    "bf16, by fuse": in_llama_cpp(Models.by_fuse),
    "q8_0": in_llama_cpp(lambda models, name: models.quantized(name, "q8_0")),
    "q8_0, rest_proj too": in_llama_cpp(lambda models, name: models.quantized(name, "q8_0", rest="q8_0")),
    "q8_0, by export": in_llama_cpp(lambda models, name: models.by_export(name, "q8_0")),
    "q4_0": in_llama_cpp(lambda models, name: models.quantized(name, "q4_0")),
    "q4_0, by export": in_llama_cpp(lambda models, name: models.by_export(name, "q4_0")),
    "q4_0, weighed": in_llama_cpp(lambda models, name: models.quantized(name, "q4_0", True)),
    "q4_K_M": in_llama_cpp(lambda models, name: models.quantized(name, "q4_K_M")),
    "q4_K_M, weighed": in_llama_cpp(lambda models, name: models.quantized(name, "q4_K_M", True)),
    "PyTorch, f32": in_torch("float32"),
    "PyTorch, bf16, by fuse": in_torch("bfloat16"),
    "OpenVINO, f32": in_openvino("f32", "f32"),
    "OpenVINO, bf16, by fuse": in_openvino("bf16", "bf16"),
    "OpenVINO, int8": in_openvino("int8", "bf16"),
    "OpenVINO, int4": in_openvino("int4", "bf16"),
    "ONNX Runtime, f32": in_onnx("f32"),
    "ONNX Runtime, bf16, by fuse": in_onnx("bf16"),
    "MLX, f32": in_mlx("f32"),
    "MLX, bf16, by fuse": in_mlx("bf16"),
    "MLX, 8 bits": in_mlx("f32", 8),
    "MLX, 4 bits": in_mlx("f32", 4),
}


def line(label: str, each: dict[str, dict[str, float] | None]) -> str:
    """A row of the table; of what is no language model any more, the size of its perplexity."""
    cells = [label]
    for found in each.values():
        if found is None:
            cells += ["", "", ""]
        else:
            value = found["perplexity"]
            cells += [f"{found['bytes'] / 1e3:,.0f}", f"{value:.3f}" if value < 1e4 else f"{value:.0e}"]
            cells += [f"{max(found['divergence'], 0.0):.1e}"]  # of none at all, llama.cpp says -0
    return f"| {' | '.join(cells)} |"


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
        for label, row in ROWS.items():
            if label not in found:
                found[label] = {name: row(models, name) for name in NAMES}
                results.write_text(json.dumps(found))
    print(f"| weights | {' | '.join(f'{name}: KB | perplexity | divergence' for name in NAMES.values())} |")
    print(f"|---|{'---:|' * 3 * len(NAMES)}")
    for label in ROWS:
        print(line(label, found[label]))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
