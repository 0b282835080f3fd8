"""What is said of a task's FLOPs is what is counted while it runs, and its memory holds what goes in and out."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from skipless.algebra import linalg
from skipless.checkpoint.reader import CheckpointReader
from skipless.removals.merge import FEW_PROBES
from skipless.rewrite.cost import cost, steps
from skipless.rewrite.execution import run_task
from skipless.rewrite.planning import make_plan
from skipless.rewrite.request import Request
from tests.models import build, save

# Of these steps half of what the counter finds is needed: symmetric products, and triangles.
HALVED = ("G = X^T X", "N", "round R", "H = 1 + R R^T", "round X")
# These are factorizations and triangular solves, which the counter does not know.
UNSEEN = ("choose columns", "factorize S", "R = S^-1 A", "shrink R", "factorize G", "factorize N", "factorize H")
UNSEEN += ("R^T H^-1",)


MOE = {"ffn_type": "moe", "num_local_experts": 3, "num_experts_per_tok": 2}


def plan_of(tmp_path, basis, dtype=torch.bfloat16, remove=("stream", "p"), **fields):
    save(build(dtype=dtype, **fields), tmp_path / "source")
    reader = CheckpointReader(tmp_path / "source")
    return reader, make_plan(reader, Request(basis, remove=remove))


def counted(plan, task, reader, monkeypatch):
    """FLOPs of products, all of them by torch, as its counter finds them."""
    monkeypatch.setattr(linalg, "_numpy", lambda *_: False)
    with FlopCounterMode(display=False) as counter:
        for _ in run_task(plan, task, reader.tensor).tensors:
            pass
    return counter.get_total_flops()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_merging_p_takes_what_is_counted(tmp_path, monkeypatch, dtype):
    reader, plan = plan_of(tmp_path, "q", dtype)
    task = next(task for task in plan.tasks if task.seams and task.seams[0].kind == "p")
    found = cost(plan, task)
    product, sample = 2 * 2 * 32 * 32 * 48, 2 * FEW_PROBES * 32 * (32 + 2 * 48)
    exact = sample if dtype == torch.bfloat16 else product + sample
    assert found.flops == ({"bfloat16": product} if dtype == torch.bfloat16 else {}) | {"float64": exact}
    assert counted(plan, task, reader, monkeypatch) == found.total == product + sample


@pytest.mark.parametrize("basis", ["q", "pivoted"])
@pytest.mark.parametrize("shape", [(64, 6000), (256, 300)], ids=["many rows", "a large R"])
@pytest.mark.parametrize("by_rows", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_closing_a_stream_takes_what_is_counted(tmp_path, monkeypatch, basis, shape, by_rows):
    width, rows = shape
    reader, plan = plan_of(
        tmp_path, basis, hidden_size=width, intermediate_size=rows, num_hidden_layers=2, num_key_value_heads=4
    )
    plan = plan.by_rows([task for task in plan.tasks if by_rows and plan.can_go_by_rows(task)])
    task = next(task for task in plan.tasks if task.seams and task.seams[0].layer == 1 and task.seams[0].rest)
    assert task.by_rows == by_rows
    expected = 0.0
    for name, (_, flops) in steps(plan, task).items():
        step = name.removeprefix("stream seam: ")
        expected += 0 if step in UNSEEN else flops * (2 if step in HALVED else 1)
    assert 0.75 * expected < counted(plan, task, reader, monkeypatch) < 1.25 * expected


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": True}, {"block_type": "parallel"}, MOE])
@pytest.mark.parametrize("remove", [("stream", "p"), ("stream", "values", "p")])
def test_memory_holds_what_goes_in_and_out(tmp_path, fields, remove):
    _, plan = plan_of(tmp_path, "pivoted", attention_bias=True, **fields, remove=remove)
    for task in plan.tasks:
        found = cost(plan, task)
        assert found.memory >= plan.moved(task)
        assert all(flops > 0 for flops in found.flops.values())
        assert bool(found.flops) == bool(task.seams)
