"""The whole promise on the bundled model: generate, fuse, verify, generate the same tokens, count and time."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from skipless.bundled import BUNDLED
from skipless.cli.output import count_bar, step_bar, waiting, work_bar
from skipless.inference import generate, load, load_tokenizer
from skipless.reports.verification import Report, verify
from skipless.rewrite.fusion import fuse
from skipless.rewrite.planning import Plan
from skipless.serving.bench import Bench, Work, measure
from skipless.serving.decoding import TorchRunner

PROMPT = "class Stack:\n    def get(self"
TOKENS = 72


@dataclass(frozen=True)
class Demo:
    """What the demo found. caches: what is wrong with either model's, original first; bench: of both."""

    text: str
    same_tokens: bool
    caches: tuple[str | None, str | None]
    plan: Plan
    report: Report
    bench: Bench


def demo(say: Callable[[str], None]) -> Demo:
    """Run it, telling `say` what happens. Both models are stored and run in fp32 (the bundled file is bf16)."""
    tokenizer = load_tokenizer(BUNDLED)
    say("The bundled model, a skipless transformer trained on Python source, continues a prompt:")
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with waiting("generating"):
        original = load(BUNDLED, torch.float32)
        before = generate(original, ids, TOKENS)
    text = PROMPT + tokenizer.decode(before.tokens)
    say(text)
    with tempfile.TemporaryDirectory() as folder:
        fused_folder = Path(folder) / "fused"
        say("Fusing it (256 columns of Q, K, V become the identity, P merges into the FFN), stored in float32 ...")
        with work_bar("fusing") as advance:
            plan = fuse(BUNDLED, fused_folder, dtype="float32", progress=advance)
        say("Verifying it against the original ...")
        with step_bar("verifying") as step:
            report = verify(BUNDLED, fused_folder, prompt=PROMPT, progress=step)
        with waiting("generating"):
            fused = load(fused_folder, torch.float32)
            after = generate(fused, ids, TOKENS)
        say("Timing both, in turns ...")
        runners = [("original", TorchRunner(original)), ("fused", TorchRunner(fused))]
        with count_bar("timing") as count:
            bench = measure(runners, Work(context=16, tokens=64, prefill=0), rounds=15, progress=count)
    same, caches = bool(torch.equal(before.tokens, after.tokens)), (before.broken_cache(), after.broken_cache())
    return Demo(text, same, caches, plan, report, bench)
