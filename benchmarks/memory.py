"""What --max-memory costs: time and peak of a fuse whose largest matrices fit, and of the same one by rows.

    python benchmarks/memory.py                # two layers of Llama-3.1-8B's shapes, within 8, 4 and 2 GB
    python benchmarks/memory.py --d 8192 --ffn 28672 --limits 12 4       # of Llama-3.1-70B's: 25 GB of disk

A skipless checkpoint of random weights, in bf16, is fused once for each limit, in a process of its own, and every file
is compared with that of the first. The last line is one JSON object.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mistral import MISTRAL, SHARD, make
from skipless import fuse
from skipless.rewrite.machine import peak_memory


def child(source: str, destination: str, basis: str, limit: str) -> None:
    """Fuse, and print what it took."""
    start = time.perf_counter()
    plan = fuse(source, destination, basis=basis, max_shard_size=SHARD, max_memory=int(limit))
    by_rows = [task.writes[0] for task in plan.tasks if task.by_rows]
    print(json.dumps({"seconds": time.perf_counter() - start, "peak": peak_memory(), "by_rows": by_rows}))


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    found = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d", type=int, default=4096, help="hidden_size, in heads of 128")
    parser.add_argument("--ffn", type=int, default=14336, help="intermediate_size")
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--basis", default="q", help="auto: the memory that choosing takes is part of the peak")
    parser.add_argument("--limits", type=float, nargs="+", default=[8, 4, 2], help="--max-memory, in GB")
    parser.add_argument("--folder", type=Path, help="where to put the checkpoints [default: a temporary folder]")
    arguments = parser.parse_args()
    sizes = {"hidden_size": arguments.d, "intermediate_size": arguments.ffn, "vocab_size": arguments.vocabulary}
    config = {**MISTRAL, **sizes, "num_attention_heads": arguments.d // 128, "num_hidden_layers": arguments.layers}
    runs = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        source, destination, first = Path(name) / "source", Path(name) / "fused", None
        make(source, config)
        size = sum(path.stat().st_size for path in source.iterdir())
        print(f"{size / 1e9:.1f} GB in {arguments.layers} layers of {arguments.d}, {arguments.ffn}", flush=True)
        for limit in arguments.limits:
            options = [str(source), str(destination), arguments.basis, str(int(limit * 1e9))]
            done = subprocess.run([sys.executable, __file__, "--child", *options], stdout=subprocess.PIPE, check=True)
            run = {"limit": limit * 1e9, **json.loads(done.stdout)}
            found = hashes(destination)
            first = first or found
            run["identical"] = found == first
            for path in destination.iterdir():
                path.unlink()
            destination.rmdir()
            print(
                f"within {limit:g} GB: peak {run['peak'] / 1e9:.2f} GB, {run['seconds']:.0f} s, "
                f"{len(run['by_rows'])} tasks by rows, {'the same bytes' if run['identical'] else 'OTHER BYTES'}",
                flush=True,
            )
            runs.append(run)
    print(json.dumps({**sizes, "bytes": size, "basis": arguments.basis, "runs": runs}))


if __name__ == "__main__":
    main()
