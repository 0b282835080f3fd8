"""A fuse killed with SIGKILL at random moments: does it go on where it was, and is the result the same?

    python benchmarks/kill.py             # 25 kills

A small checkpoint of many shards is fused once without interruption. Then, again and again: begun anew, killed after a
random part of the time from the first file to the last, and gone on with. Every file is compared, and every task that a
process carried out is counted: of those that were finished when it was killed, how many had to be done again? The last
line is one JSON object.
"""

import argparse
import dataclasses
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from skipless import fuse
from skipless.checkpoint.staging import LocalDestination
from skipless.model import SkiplessConfig, SkiplessForCausalLM
from skipless.rewrite import execution

SHARD = 500_000


def make(folder: Path, layers: int) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": layers}
    model = SkiplessForCausalLM(SkiplessConfig(**sizes, num_attention_heads=8, num_key_value_heads=2))
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="1MB")


def child(source: Path, destination: Path, log: Path) -> None:
    """Fuse, and note the number of every task that was carried out."""
    run_task = execution.run_task

    def noted(plan, task, read):
        done = run_task(plan, task, read)

        def tensors():
            yield from done.tensors
            with log.open("a") as file:
                file.write(f"{plan.tasks.index(task)}\n")

        return dataclasses.replace(done, tensors=tensors())

    execution.run_task = noted
    fuse(source, destination, basis="pivoted", max_shard_size=SHARD, resume=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", nargs=3, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder / "source", arguments.layers)

        def start(log: Path) -> subprocess.Popen[bytes]:
            paths = map(str, (folder / "source", folder / "fused", log))
            return subprocess.Popen([sys.executable, __file__, "--child", *paths])

        def wait_for_files(process: subprocess.Popen[bytes]) -> None:
            while process.poll() is None and not LocalDestination(folder / "fused").unfinished.exists():
                time.sleep(0.001)

        process = start(folder / "log")
        wait_for_files(process)
        begun = time.perf_counter()
        assert process.wait() == 0
        uninterrupted = time.perf_counter() - begun
        (folder / "fused").rename(folder / "whole")
        whole = contents(folder / "whole")
        tasks = len((folder / "log").read_text().split())
        shards = sum(file.endswith(".safetensors") for file in whole)
        print(f"{tasks} tasks, {shards} shards, {uninterrupted:.1f} s from the first file to the last", flush=True)

        generator = random.Random(arguments.seed)
        kept, again, identical = [], [], 0
        for kill in range(arguments.kills):
            log = folder / f"log-{kill}"
            log.touch()
            process = start(log)
            wait_for_files(process)
            moment = generator.random() * uninterrupted
            time.sleep(moment)
            process.send_signal(signal.SIGKILL)
            process.wait()
            journal = LocalDestination(folder / "fused").unfinished / "journal.jsonl"
            whole_lines = journal.read_text().count("\n") if journal.exists() else 0
            finished = set(log.read_text().split())
            if not (folder / "fused").exists():
                assert start(log).wait() == 0, "could not go on"
            repeated = sum(count - 1 for task, count in Counter(log.read_text().split()).items() if task in finished)
            same = contents(folder / "fused") == whole
            identical += same
            kept.append(whole_lines)
            again.append(repeated)
            print(
                f"killed after {moment:4.1f} s: {len(finished)} tasks finished, {whole_lines} in the journal, "
                f"{repeated} done again, {'identical' if same else 'DIFFERENT'}",
                flush=True,
            )
            for file in (folder / "fused").iterdir():
                file.unlink()
            (folder / "fused").rmdir()
    result = {"kills": arguments.kills, "tasks": tasks, "shards": shards, "seconds": uninterrupted}
    result |= {"identical": identical, "done_again_at_most": max(again), "in_journal": kept}
    print(f"identical: {identical} of {arguments.kills}; finished tasks done again: at most {max(again)}")
    print(json.dumps(result))
    sys.exit(0 if identical == arguments.kills and max(again) <= 1 else 1)


if __name__ == "__main__":
    main()
