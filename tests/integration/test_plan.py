"""A plan says what it will cost before anything is done, from headers alone, and refuses what cannot be."""

import json

import pytest
import torch
from click.testing import CliRunner

from skipless import InputError, cli, fuse
from skipless.checkpoint.reader import CheckpointReader
from skipless.rewrite import fusion, machine
from skipless.rewrite.cost import cost, estimate, waiting
from skipless.rewrite.machine import Rates
from skipless.rewrite.request import Request
from tests.models import build, save

RATES = Rates({"float64": 1e9, "float32": 2e9, "bfloat16": 4e9}, disk=1e8)


@pytest.fixture
def source(tmp_path):
    return save(build(dtype=torch.bfloat16), tmp_path / "source")


def dry_run(source, tmp_path, *options):
    arguments = ["fuse", str(source), str(tmp_path / "fused"), "--basis", "pivoted", "--dry-run", *options]
    return CliRunner().invoke(cli.main, arguments)


def test_a_dry_run_reads_no_tensor_and_writes_nothing(source, tmp_path, monkeypatch):
    monkeypatch.setattr(CheckpointReader, "tensor", lambda *_: pytest.fail("a tensor was read"))
    result = dry_run(source, tmp_path)
    assert result.exit_code == 0, result.output
    for part in ("close stream seam", "measured a second", "of arithmetic", "memory: at most", "model.safetensors"):
        assert part in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_json_lists_every_task_and_file(source, tmp_path):
    work = json.loads(dry_run(source, tmp_path, "--json", "--max-shard-size", "0.02MB").stdout)["work"]
    plan = fuse(source, tmp_path / "fused", basis="pivoted", max_shard_size=20_000)
    assert len(work["tasks"]) == len(plan.tasks)
    for found, task in zip(work["tasks"], plan.tasks, strict=True):
        assert found["reads"] == {name: plan.inputs[name].bytes for name in task.reads}
        assert found["writes"] == {name: plan.outputs[name].bytes for name in task.writes}
        assert found["memory"] == cost(plan, task).memory
    written = {path.name: path.stat().st_size for path in (tmp_path / "fused").glob("*.safetensors")}
    assert work["shards"].keys() == written.keys()
    assert all(size < written[name] < size + 4000 for name, size in work["shards"].items())
    assert work["seconds"]["all"] >= work["seconds"]["check"] > 0


def test_an_estimate_adds_up(source, tmp_path):
    plan = fusion.plan_fuse(source, tmp_path / "fused", Request("q"), 10**9).plan
    found = estimate(plan, RATES, held=1000)
    costs = [cost(plan, task) for task in plan.tasks]
    assert found.memory == 1000 + max(each.memory for each in costs) + waiting(plan)
    total = {name: sum(each.flops.get(name, 0) for each in costs) for name in RATES.flops}
    assert dict(found.flops) == {name: flops for name, flops in total.items() if flops}
    assert found.arithmetic == pytest.approx(sum(flops / RATES.flops[name] for name, flops in total.items()))
    assert found.seconds == max(found.arithmetic, sum(plan.bytes) / 1e8) + (sum(plan.bytes) + plan.bytes[1]) / 1e8


def test_too_little_memory_is_refused(source, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"down_proj\.weight: expected at most 0\.0 GB of memory, found that comp"):
        fuse(source, tmp_path / "fused", basis="q", max_memory=10**6)
    result = dry_run(source, tmp_path, "--max-memory", "1MB")
    assert result.exit_code == 2
    assert "use --max-memory, or a machine that has more" in result.stderr.replace("\n", " ")
    monkeypatch.setattr(fusion, "available_memory", lambda: 0)
    with pytest.raises(InputError, match="GB of memory, found"):
        fuse(source, tmp_path / "fused", basis="q")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_max_memory_is_for_what_computes_here(source, tmp_path):
    with pytest.raises(InputError, match="max_memory: expected none with another engine or device"):
        fuse(source, tmp_path / "fused", basis="q", max_memory=10**9, engine="ray")


def test_rates_are_measured(source):
    found = machine.measure(CheckpointReader(source).sample, torch.device("cpu"), size=64)
    assert found.flops.keys() == {"float64", "float32", "bfloat16"}
    assert all(rate > 0 for rate in (*found.flops.values(), found.disk))
    assert machine.available_memory() > 10**7 < machine.resident_memory()


@pytest.mark.parametrize("text", ["4", "4TB", "-1GB", "0MB"])
def test_a_size_that_is_none(source, tmp_path, text):
    result = dry_run(source, tmp_path, "--max-memory", text)
    assert result.exit_code == 2
    assert "--max-memory: expected a number and MB or GB" in result.stderr
