"""Before a fused folder gets its name, fuse compares what it wrote with the source; a bug publishes nothing."""

import dataclasses
import json

import pytest
import torch
from click.testing import CliRunner

from skipless import cli, fuse, verify
from skipless.algebra.forecast import Forecast
from skipless.checkpoint.opening import read_architecture
from skipless.checkpoint.reader import CheckpointReader
from skipless.errors import BugError
from skipless.removals import columns, merge, rows
from skipless.rewrite import execution
from skipless.rewrite.probe import TOKENS, Inputs, Outputs, Streamed, judge, outputs
from tests.models import build, save

BUGS = {
    "a redundant norm's gain dropped": (
        {"norm_type": "rms", "norm_eps": 0.0, "hidden_act": "relu"},
        {"remove": ("p",)},
        lambda patch: patch.setattr(merge, "past_norm", lambda seam, affines: {n: affines[n] for n in seam.readers}),
    ),
    "a branch's gain dropped": (
        {"attention_bias": True, "residual_gains": True},
        {"remove": ("p",)},
        lambda patch: patch.setattr(merge, "merge", lambda seam, affines, dtypes, scale: right_merge(seam, affines)),
    ),
    "a gain that a bias moves past with the wrong sign": (
        {"attention_bias": True, "residual_gains": True},
        {"basis": "pivoted"},
        lambda patch: patch.setattr(execution, "scaled", turned),
    ),
    "columns in another order": (
        {},
        {"basis": "pivoted"},
        lambda patch: patch.setattr(columns, "column_order", lambda stream: right_order(stream).flip(0)),
    ),
    "heads of V mixed up": (
        {},
        {"remove": ("values",)},
        lambda patch: patch.setattr(rows, "choose_rows", lambda seam, weight: list(reversed(right_rows(seam, weight)))),
    ),
}
right_merge, right_order, right_rows = merge.merge, columns.column_order, rows.choose_rows
right_scaled = execution.scaled


def turned(seam, affines, read):
    scaled = right_scaled(seam, affines, read)
    return {name: dataclasses.replace(each, scale=-each.scale) for name, each in scaled.items()}


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize(("fields", "options", "bug"), BUGS.values(), ids=BUGS)
def test_a_bug_publishes_nothing(tmp_path, monkeypatch, fields, options, bug, dtype):
    source = save(build(**fields), tmp_path / "source")
    fuse(source, tmp_path / "right", dtype=dtype, **options)
    with monkeypatch.context() as patch:
        bug(patch)
        with pytest.raises(BugError, match=r"expected to differ from the source's by at most .* nothing was published"):
            fuse(source, tmp_path / "wrong", dtype=dtype, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["right", "source"]


@pytest.mark.parametrize(("tokens", "fits"), [(TOKENS, True), (4, False)])
def test_no_column_of_a_wide_model_is_called_lossy_by_chance(tokens, fits, tmp_path):
    """Of few tokens, one column or another of thousands is almost nothing, and rounding is much beside it."""
    narrow = read_architecture(CheckpointReader(save(build(num_hidden_layers=1), tmp_path)))
    architecture = dataclasses.replace(narrow, hidden_size=4096)
    generator = torch.Generator().manual_seed(0)
    exact, *noise = torch.randn(3, tokens, 2**16, generator=generator, dtype=torch.float64)
    lost = [2**-9 * exact * each for each in noise]
    before = Outputs({"0.m": exact}, {"0.m": lost[0].norm().item()})
    after = Outputs({"0.m": exact + 2**-9 * exact.std() * noise[1]}, {"0.m": lost[1].norm().item()})
    ((together, column),) = judge(before, after, architecture, architecture, torch.bfloat16)
    assert together.passed
    assert column.passed == fits


def test_the_command_says_that_it_is_a_bug(tmp_path, monkeypatch):
    fields, options, bug = BUGS["columns in another order"]
    source = save(build(**fields), tmp_path / "source")
    bug(monkeypatch)
    result = CliRunner().invoke(cli.main, ["fuse", str(source), str(tmp_path / "fused"), "--basis", options["basis"]])
    assert result.exit_code == 3
    assert "this is a bug in skipless" in result.stderr
    assert not (tmp_path / "fused").exists()


def test_what_is_streamed_is_what_the_model_gives(tmp_path):
    """The same numbers as of a model that is loaded whole, whose hidden activations are its own."""
    model = build(num_hidden_layers=1, attention_bias=True, mlp_bias=True, attention_shaping="full")
    reader = CheckpointReader(save(model, tmp_path / "model"))
    inputs = Inputs.drawn(read_architecture(reader))
    found = outputs(reader.config, reader, inputs).exact
    seen = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda _, __, output: seen.append(output.flatten(0, 1)))
    with torch.no_grad():
        model(input_ids=inputs.ids, position_ids=inputs.positions)
    assert torch.allclose(found["0.m"][:, :48], seen[0], rtol=1e-12)
    assert not torch.allclose(found["0.m"][:, 48:], seen[0], rtol=1e-3)  # the gate's


def test_a_streamed_matrix_is_read_some_rows_at_a_time(monkeypatch):
    from skipless.rewrite import probe

    monkeypatch.setattr(probe, "BLOCK", 64)
    whole, read = torch.randn(10, 16, dtype=torch.float64), []

    def rows_of(rows):
        read.append(rows)
        return whole if rows is None else whole[rows]

    matrix, x = Streamed.of((10, 16), rows_of), torch.randn(3, 16, dtype=torch.float64)
    assert torch.equal(torch.nn.functional.linear(x, matrix), x @ whole.T)
    assert read == [slice(0, 4), slice(4, 8), slice(8, 10)]
    read.clear()
    which = torch.tensor([[3], [7]])
    assert torch.equal(torch.nn.functional.embedding(which, matrix), whole[which])
    assert read == [slice(3, 4), slice(7, 8)]
    assert (matrix.shape, matrix.dtype) == ((10, 16), torch.float64)
    assert len(read) == 2
    assert torch.equal(matrix + 0, whole)


def test_the_record_has_every_output(tmp_path):
    source = save(build(dtype=torch.bfloat16), tmp_path / "source")
    fuse(source, tmp_path / "fused")
    check = json.loads((tmp_path / "fused" / "skipless.json").read_text())["check"]
    assert set(check) == {f"{layer}.{name}" for layer in range(3) for name in "qkvm"} | {"logits"}
    assert all(error <= limit for error, limit in check.values())
    assert any(error > 1e-4 for error, _ in check.values())  # bf16 was compared as it is stored


def test_every_expert_counts(tmp_path):
    """Also one to which no token would be sent."""
    fields = {"ffn_type": "moe", "num_local_experts": 6, "num_experts_per_tok": 1}
    model = build(**fields)
    reader = CheckpointReader(save(model, tmp_path / "a"))
    inputs = Inputs.drawn(read_architecture(reader))
    before = outputs(reader.config, reader, inputs).exact
    for expert in range(6):
        with torch.no_grad():
            model.model.layers[1].mlp.experts[expert].up_proj.weight[3, 4] += 1e-3
        spoiled = CheckpointReader(save(model, tmp_path / str(expert)))
        after = outputs(spoiled.config, spoiled, inputs).exact
        assert not torch.allclose(before["1.m"], after["1.m"], rtol=1e-9)
        before = after


def test_a_difference_that_is_no_number_does_not_pass():
    from skipless.rewrite.probe import Difference

    assert Difference("logits", 0.1, 0.1).passed
    assert not dataclasses.replace(Difference("logits", 0.1, 0.1), error=float("nan")).passed


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize(
    "wrong",
    [
        lambda stream: dataclasses.replace(
            stream, rest=dataclasses.replace(stream.rest, weight=1.1 * stream.rest.weight)
        ),
        lambda stream: dataclasses.replace(stream, kept=stream.kept.flip(0)),
    ],
    ids=["the rest", "the order"],
)
def test_what_is_wrong_before_it_is_rounded_is_no_loss_to_warn_of(tmp_path, monkeypatch, wrong, dtype):
    source = save(build(), tmp_path / "source")
    right = columns.close_stream
    monkeypatch.setattr(columns, "close_stream", lambda *arguments: wrong(right(*arguments)))
    with pytest.raises(BugError, match=r"expected closing the stream seam to change nothing .* nothing was published"):
        fuse(source, tmp_path / "wrong", basis="pivoted", dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_reads_before_all_have_written_is_judged_by_what_is_there(tmp_path):
    """Past a skip, Q reads what the FFN has written, and M what P has, too: of a small part rounding loses as much."""
    fields = {"hidden_size": 18, "head_dim": 6, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 37}
    fields |= {"intermediate_size": 3, "ffn_type": "mlp", "hidden_act": "relu2", "attention_bias": True}
    fields |= {
        "mlp_bias": True,
        "qk_norm": "head_dim",
        "norm_type": "layer",
        "norms": ["model.norm", "model.embed_norm"],
    }
    fields |= {"residual": "attention", "attention_shaping": "value", "tie_word_embeddings": True}
    source = save(build(114, torch.float16, **fields), tmp_path / "source")
    options = {"remove": ("stream", "values"), "layers_open": (0,)}
    fuse(source, tmp_path / "fused", basis="pivoted", dtype="float16", **options)
    record = json.loads((tmp_path / "fused" / "skipless.json").read_text())
    assert all(error <= limit < 0.1 for error, limit in record["check"].values())


def test_fuse_warns_of_a_loss_by_the_numbers_that_verify_judges_by(tmp_path, caplog, monkeypatch):
    """Even if no forecast says so."""
    monkeypatch.setattr(Forecast, "problem", lambda *_: None)
    fields = {"hidden_size": 18, "head_dim": 6, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 37}
    fields |= {"intermediate_size": 3, "ffn_type": "mlp", "residual": "attention", "attention_bias": True}
    source = save(build(10, torch.float32, **fields, mlp_bias=True), tmp_path / "source")
    losses = {}
    for dtype in ("bfloat16", "float32"):
        caplog.clear()
        fuse(source, tmp_path / dtype, dtype=dtype, remove=("stream", "values"), basis="pivoted", layers_open=(0,))
        record = json.loads((tmp_path / dtype / "skipless.json").read_text())
        losses[dtype] = record["losses"]
        assert ("that storing the source so may cost" in caplog.text) == bool(losses[dtype])
        report = verify(source, tmp_path / dtype, tokens=8, dtypes=())
        assert report.same == (not losses[dtype])
        assert all([each.error, each.limit] in losses[dtype].values() for each in report.maps if not each.passed)
    assert losses["bfloat16"]
    assert not losses["float32"]
