"""Time and memory of `skipless audit`: SmolLM2-135M from its GGUF file, and one layer of Mistral-7B's shape.

    python benchmarks/audit.py SmolLM2-135M.gguf [PLOT.svg]

Draws SmolLM2's condition numbers into PLOT. The layer is random (Gaussian, bf16), with a small vocabulary.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from skipless.checkpoint.family import read

MISTRAL_LAYER = {
    "model_type": "mistral",
    "vocab_size": 1024,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


def write(folder: Path) -> Path:
    torch.manual_seed(0)
    tensors = {
        name: torch.randn(shape, dtype=torch.float32).mul_(shape[-1] ** -0.5).bfloat16()
        for name, shape in read(MISTRAL_LAYER).tensors().items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(MISTRAL_LAYER))
    return folder


def audit(*arguments: str) -> None:
    start = time.perf_counter()
    print("skipless audit", *(Path(argument).name for argument in arguments))
    run = subprocess.run(
        [sys.executable, "-c", "from skipless.cli import main; main()", "audit", *arguments],
        text=True,
        stdout=subprocess.PIPE,
    )
    print(run.stdout)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(
        f"{time.perf_counter() - start:.0f} s, largest resident set so far {peak:.2f} GiB, exit code {run.returncode}"
    )


def main() -> None:
    plot = ["--plot", sys.argv[2]] if len(sys.argv) > 2 else []
    audit(sys.argv[1], "--dtype", "bfloat16", *plot)
    with tempfile.TemporaryDirectory() as folder:
        audit(str(write(Path(folder))))


if __name__ == "__main__":
    main()
