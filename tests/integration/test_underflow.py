"""Numbers that are too small for a dtype are a loss like any other: named, and refused, before anything is written."""

import pytest
import torch
from click.testing import CliRunner

import skipless
from skipless import cli
from skipless.checkpoint.reader import CheckpointReader
from skipless.rewrite.casting import underflows
from tests.models import build, edit_tensors, save

HEAD = "lm_head.weight"


def scale(folder, factor, *names):
    reader = CheckpointReader(folder)
    edit_tensors(folder, **{name: factor * reader.tensor(name) for name in names})


def run(*arguments):
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def test_a_matrix_that_is_only_cast(source, tmp_path):
    assert run("audit", source, "--dtype", "float16").exit_code == 0
    scale(source, 1e-7, HEAD)
    audit = run("audit", source, "--dtype", "float16")
    assert audit.exit_code == 1
    assert f"not safe: {HEAD}: expected numbers that float16 can hold, found " in audit.stdout
    assert "safe instead: --dtype" in audit.stdout
    assert "--dtype float16" not in audit.stdout.split("safe instead:")[1].splitlines()[0]
    for more in ((), ("--dry-run",)):
        fuse = run("fuse", source, tmp_path / "fused", "--dtype", "float16", *more)
        assert fuse.exit_code == 2
        assert fuse.stderr.startswith(f"skipless: {HEAD}: expected numbers that float16 can hold, found ")
        assert "become zero" in fuse.stderr
        assert len(fuse.stderr.splitlines()) == 1
        assert {path.name for path in tmp_path.iterdir()} == {"source"}
    assert run("audit", source).exit_code == 0  # as it is, in fp32
    assert run("audit", source, "--dtype", "bfloat16").exit_code == 0


def test_its_share_and_its_error_are_those_of_the_tensor(source):
    scale(source, 1e-7, HEAD)
    reader = CheckpointReader(source)
    (found,) = underflows(reader.tensors, dict.fromkeys(reader.tensors, torch.float16), reader.tensor)
    exact = reader.tensor(HEAD)
    half = exact.half()
    assert found.name == HEAD
    assert found.zeros == pytest.approx((half == 0).float().mean().item())
    assert 0.1 < found.zeros < 1
    assert found.error == pytest.approx((torch.dist(half.float(), exact) / exact.norm()).item(), rel=1e-4)


def test_few_small_numbers_among_others_are_none(source, tmp_path):
    head = CheckpointReader(source).tensor(HEAD)
    head[: len(head) // 4] *= 1e-7
    edit_tensors(source, **{HEAD: head})
    skipless.fuse(source, tmp_path / "fused", dtype="float16")


def test_both_matrices_of_a_seam(source, tmp_path, caplog):
    """The original would lose as much, which is no excuse."""
    names = [f"model.layers.0.{name}.weight" for name in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")]
    scale(source, 1e-4, *names)
    audit = run("audit", source, "--dtype", "float16")
    assert audit.exit_code == 1
    assert "layer 0 by p in float16: the relative error of m is" in audit.stdout
    skipless.fuse(source, tmp_path / "fused", dtype="float16")
    assert "layer 0 by p in float16" in caplog.text
    assert not skipless.verify(source, tmp_path / "fused", tokens=8).same
    caplog.clear()
    skipless.fuse(source, tmp_path / "exact", dtype="float32")
    assert "layer 0" not in caplog.text


def test_gains_that_become_zero(tmp_path):
    """They are vectors, of which a little may be nothing beside what it is added to: what was written tells."""
    folder = save(build(dtype=torch.float32, attention_shaping="full", ffn_type="mlp"), tmp_path / "source")
    skipless.fuse(folder, tmp_path / "fused", dtype="float16")
    (tmp_path / "fused").rename(tmp_path / "before")
    gains = [name for name in CheckpointReader(folder).tensors if name.endswith((".alpha", ".beta", ".gamma"))]
    scale(folder, 1e-9, *gains)
    result = run("fuse", folder, tmp_path / "fused", "--dtype", "float16")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"skipless: {gains[0]}: expected numbers that float16 can hold, found 100.00% so")
    assert not (tmp_path / "fused").exists()
    skipless.fuse(folder, tmp_path / "fused", dtype="bfloat16")
