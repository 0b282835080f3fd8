"""Decoding in the engines people use, original against fused, and beside them the models and engines they have now.

    make llama-cpp      # with its architecture for them; then its binding, which need not build it again:
    CMAKE_ARGS=-DLLAMA_BUILD=OFF pip install llama-cpp-python==0.3.36 gguf
    python benchmarks/engines.py [--folder WORK]   # hours on 2 cores, 20 GB of memory; WORK keeps what was made and
                                                   # measured: a second run goes on, and shows what is new
    python benchmarks/engines.py --layers 1 --rounds 2 --only "torch bfloat16"

Random weights of Mistral-7B's shape, 4 layers. Each line is one run: its models decode in turns, each in a process of
its own, and ratios are medians of those of a round. Peers have the norms and skips that the shape comes with:
MistralForCausalLM of transformers, and a GGUF of a Llama in llama.cpp, whose matrices llama-quantize has stored as it
has the skipless models', rest_proj as `skipless export` does. "llama.cpp bf16" and "q8_0" have the fused model in other
engines beside them, with as many bits. "Options" are OpenVINO's own against those that skipless asks for. The last line
is one JSON object.
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.console import Console
from transformers import MistralConfig, MistralForCausalLM

from skipless.cli import tables
from skipless.serving.bench import Bench, Work, measure
from skipless.serving.gguf import REST
from skipless.serving.shapes import write_shapes
from skipless.serving.worker import Worker

SHAPE = "mistral-7b"
WORK = Work(batches=(1,), context=128, tokens=32, prefill=0)
PROMPTS = Work(batches=(1,), context=128, tokens=2, prefill=512)
BOTH_PARTS = Work(batches=(1,), context=128, tokens=32, prefill=512)
LLAMA_CPP = Path(__file__).parents[1] / ".venv-llama-cpp"
console = Console(width=100)


class Models:
    """Folders of models by name and dtype, made when first asked for, and files for llama.cpp."""

    def __init__(self, folder: Path, layers: int):
        self.folder, self.layers = folder, layers

    def skipless(self, dtype: str) -> dict[str, Path]:
        """Original, q and pivoted."""

        def write(folder: Path) -> None:
            folder.mkdir()
            write_shapes(SHAPE, self.layers, dtype, folder)

        folder = made(self.folder / dtype, write)
        return {name: folder / name for name in ALL}

    def openvino(self, dtype: str, name: str) -> Path:
        """One of them, exported."""
        weights = {"float32": "f32", "bfloat16": "bf16"}.get(dtype, dtype)
        source = self.skipless("float32" if dtype == "float32" else "bfloat16")[name]
        folder = self.folder / f"openvino-{dtype}-{name}"
        return made(folder, lambda folder: export(source, folder, "openvino", weights))

    def _config(self) -> MistralConfig:
        config = json.loads((self.skipless("bfloat16")["original"] / "config.json").read_text())
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        names += ("num_key_value_heads", "head_dim", "max_position_embeddings", "rope_parameters")
        return MistralConfig(**{name: config[name] for name in names}, tie_word_embeddings=False, sliding_window=None)

    def transformers(self) -> Path:
        """With norms and skips, for transformers, in bf16."""

        def write(folder: Path) -> None:
            torch.manual_seed(0)
            torch.set_default_dtype(torch.bfloat16)
            MistralForCausalLM(self._config()).save_pretrained(folder)
            torch.set_default_dtype(torch.float32)

        return made(self.folder / "transformers", write)

    def llama(self, kind: str) -> Path:
        """The same, for llama.cpp, as llama-quantize stores it."""
        from llama_cpp_peer import write

        folder = self.folder / "llama"
        folder.mkdir(exist_ok=True)
        return quantized(made(folder / "model.gguf", lambda file: write(file, self._config())), kind)

    def gguf(self, name: str, kind: str) -> Path:
        """One of the skipless models, for llama.cpp."""
        source, folder = self.skipless("bfloat16")[name], self.folder / f"gguf-{name}"
        return quantized(made(folder, lambda folder: export(source, folder, "gguf", "bf16")) / "model.gguf", kind)


def made(path: Path, make: Callable[[Path], object]) -> Path:
    """A file or folder, made whole where it is not there."""
    if not path.exists():
        part = path.with_name(f"{path.name}.part")
        if part.is_dir():
            shutil.rmtree(part)
        make(part)
        part.rename(path)
    return path


def export(source: Path, folder: Path, to: str, weights: str) -> None:
    """In a process of its own: converting takes several times the memory that running does."""
    command = ("export", str(source), str(folder), "--to", to, "--weights", weights)
    skipless = Path(sys.executable).with_name("skipless")
    subprocess.run([str(skipless), *command], check=True, stdout=subprocess.DEVNULL)


def rest_as(kind: str, rest: str | None = None) -> tuple[str, ...]:
    """llama-quantize's options for rest_proj in a file of a kind: as asked, or as `skipless export` stores it."""
    return ("--tensor-type", f"attn_qkv={rest or REST.get(kind, 'q8_0')}") if kind.startswith("q") else ()


def quantized(file: Path, kind: str) -> Path:
    """A GGUF file in bf16, as bf16 or what llama-quantize makes of it."""
    if kind == "bf16":
        return file

    def write(part: Path) -> None:
        command = [str(LLAMA_CPP / "bin" / "llama-quantize"), *rest_as(kind), str(file), str(part), kind]
        subprocess.run(command, check=True, capture_output=True)

    return made(file.with_name(f"{kind}.gguf"), write)


def llama(file: Path) -> Worker:
    """A GGUF file in llama.cpp, in a process of its own."""
    return Worker([sys.executable, str(Path(__file__).parent / "llama_cpp_peer.py"), str(file)])


Run = Callable[[Models], dict[str, Callable[[], Worker]]]


def ours(engine: str, dtype: str, compiled: bool, *names: str) -> Run:
    """Original and fused models in one engine."""

    def run(models: Models) -> dict[str, Callable[[], Worker]]:
        found = {
            name: models.openvino(dtype, name) if engine == "openvino" else models.skipless(dtype)[name]
            for name in names
        }
        return {
            name: lambda folder=folder: Worker.of(engine, folder, dtype, compiled) for name, folder in found.items()
        }

    return run


def llama_cpp(kind: str) -> Run:
    """The ordinary Llama, and original and fused models, all in llama.cpp; and fused ones of as many bits elsewhere."""
    elsewhere = {"bf16": (("torch", "bfloat16"), ("openvino", "bfloat16")), "q8_0": (("openvino", "int8"),)}

    def run(models: Models) -> dict[str, Callable[[], Worker]]:
        files = {"llama": models.llama(kind), **{name: models.gguf(name, kind) for name in ALL}}
        loads = {name: lambda file=file: llama(file) for name, file in files.items()}
        for engine, dtype in elsewhere.get(kind, ()):
            (load,) = ours(engine, dtype, engine == "torch", "q")(models).values()
            loads[f"q, {engine}"] = load
        return loads

    return run


def peers(models: Models) -> dict[str, Callable[[], Worker]]:
    """16 bits a weight."""
    fused, exported = models.skipless("bfloat16")["q"], models.openvino("bfloat16", "q")
    return {
        "transformers": lambda: Worker.of("torch", models.transformers(), "bfloat16"),
        "transformers, compiled": lambda: Worker.of("torch", models.transformers(), "bfloat16", True),
        "llama.cpp": lambda: llama(models.llama("bf16")),
        "fused, llama.cpp": lambda: llama(models.gguf("q", "bf16")),
        "fused, torch": lambda: Worker.of("torch", fused, "bfloat16", True),
        "fused, OpenVINO": lambda: Worker.of("openvino", exported, "bfloat16"),
    }


def peers_int8(models: Models) -> dict[str, Callable[[], Worker]]:
    """8 bits a weight (llama.cpp's q8_0: 8.5)."""
    folders = {name: models.openvino("int8", name) for name in BOTH}
    return {
        "llama.cpp": lambda: llama(models.llama("q8_0")),
        "fused, llama.cpp": lambda: llama(models.gguf("q", "q8_0")),
        "original, OpenVINO": lambda: Worker.of("openvino", folders["original"], "int8"),
        "fused, OpenVINO": lambda: Worker.of("openvino", folders["q"], "int8"),
    }


def options(dtype: str) -> Run:
    """OpenVINO with its own options, and with those that skipless asks for."""

    def run(models: Models) -> dict[str, Callable[[], Worker]]:
        folder = models.openvino(dtype, "q")
        own = [sys.executable, str(Path(__file__).parent / "openvino_own.py"), str(folder), dtype]
        return {"its own": lambda: Worker(own), "for decoding": lambda: Worker.of("openvino", folder, dtype)}

    return run


BOTH = ("original", "q")
ALL = (*BOTH, "pivoted")
RUNS: dict[str, Run] = {
    "torch float32": ours("torch", "float32", False, *ALL),
    "torch float32, compiled": ours("torch", "float32", True, *BOTH),
    "torch bfloat16": ours("torch", "bfloat16", False, *ALL),
    "torch bfloat16, compiled": ours("torch", "bfloat16", True, *ALL),
    "torch bfloat16, prompts": ours("torch", "bfloat16", False, *ALL),
    "openvino float32": ours("openvino", "float32", False, *ALL),
    "openvino bfloat16": ours("openvino", "bfloat16", False, *ALL),
    "openvino int8": ours("openvino", "int8", False, *ALL),
    "openvino bfloat16, options": options("bfloat16"),
    "openvino int8, options": options("int8"),
    **{f"llama.cpp {kind}": llama_cpp(kind) for kind in ("bf16", "q8_0", "q4_0", "q4_K_M")},
    "peers bfloat16": peers,
    "peers int8": peers_int8,
}


def run(name: str, models: Models, rounds: int) -> Bench:
    """Load one run's models, time them in turns, and let them go."""
    with ExitStack() as stack:
        found = RUNS[name](models)
        runners = [(label, stack.enter_context(load())) for label, load in found.items()]
        engine, dtype = name.split()[0], name.split()[1].strip(",")
        work = PROMPTS if "prompts" in name else BOTH_PARTS if "options" in name or "llama.cpp" in name else WORK
        return measure(runners, work, rounds, engine + (", compiled" if "compiled" in name else ""), dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", action="append", choices=list(RUNS), help="a run, repeatable [default: all]")
    parser.add_argument("--folder", type=Path, help="where to keep models and results [default: nowhere]")
    arguments = parser.parse_args()
    os.environ.setdefault("LLAMA_CPP_LIB_PATH", str(LLAMA_CPP / "build" / "bin"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        models, kept = Models(folder, arguments.layers), folder / "results.json"
        results = json.loads(kept.read_text()) if kept.exists() else {}
        for name in arguments.only or RUNS:
            if name in results:
                continue
            found = run(name, models, arguments.rounds)
            results[name] = dataclasses.asdict(found)
            kept.write_text(json.dumps(results))
            console.rule(name)
            console.print(tables.bench_line(found), soft_wrap=True, highlight=False)
            console.print(tables.bench_table(found))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
