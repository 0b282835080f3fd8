"""What does not fit in memory whole is computed some rows at a time, and comes out the same, bit for bit."""

import pytest
import torch
from click.testing import CliRunner

from skipless import InputError, cli, fuse
from skipless.algebra import linalg
from skipless.checkpoint.opening import read_architecture
from skipless.checkpoint.reader import CheckpointReader
from skipless.checkpoint.staging import LocalDestination
from skipless.checkpoint.writer import CheckpointWriter
from skipless.rewrite import cost, execution, fusion, planning
from skipless.rewrite.cost import within_memory
from skipless.rewrite.modules import read_seam
from skipless.rewrite.planning import make_plan, prepare
from skipless.rewrite.request import Request
from tests.models import build, contents, edit_tensors, save

TABLE = "model.embed_tokens.weight"
DOWN = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)]
# So that tables and FFNs are larger than what of them is worked on at a time.
SIZES = {"vocab_size": 501, "intermediate_size": 140, "num_hidden_layers": 3}
ROWS = 48


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    monkeypatch.setattr(linalg, "ROWS", ROWS)
    for room in (execution, cost):
        monkeypatch.setattr(room, "COPIED", 5000)


@pytest.fixture
def source(tmp_path):
    return save(build(dtype=torch.bfloat16, **SIZES), tmp_path / "source")


@pytest.fixture
def least(monkeypatch):
    """Let fuse take no more memory than it must."""
    monkeypatch.setattr(fusion, "within_memory", lambda plan, held, limit: all_by_rows(plan))


@pytest.fixture
def large(tmp_path):
    """With a table that takes most of the memory."""
    return save(build(dtype=torch.bfloat16, **{**SIZES, "vocab_size": 50_000}), tmp_path / "source")


def all_by_rows(plan):
    return plan.by_rows([task for task in plan.tasks if plan.can_go_by_rows(task)])


def first_of(tasks):
    return [task.writes[0] for task in tasks if task.by_rows]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("position_type", ["rope", "learned"])
@pytest.mark.parametrize("stored", [None, pytest.param("float16", marks=pytest.mark.slow)])
def test_the_bytes_are_the_same(tmp_path, monkeypatch, dtype, position_type, stored):
    """A table, one that positions are added to, and linear layers; rounded or not; in another dtype or not."""
    source = save(build(dtype=dtype, position_type=position_type, **SIZES), tmp_path / "source")
    read, sizes = CheckpointReader.tensor, {}

    def seen(reader, name, *rows):
        tensor = read(reader, name, *rows)
        sizes[name] = max(sizes.get(name, 0), len(tensor))
        return tensor

    for basis in ("q", "pivoted"):
        whole = fuse(source, tmp_path / basis, basis=basis, dtype=stored)
        with monkeypatch.context() as patch:
            patch.setattr(CheckpointReader, "tensor", seen)
            patch.setattr(fusion, "within_memory", lambda plan, held, limit: all_by_rows(plan))
            plan = fuse(source, tmp_path / f"{basis} by rows", basis=basis, dtype=stored)
        assert first_of(plan.tasks) == [TABLE, *DOWN]
        assert not first_of(whole.tasks)
        assert sizes.pop(TABLE) == ROWS < SIZES["vocab_size"]
        assert contents(tmp_path / f"{basis} by rows") == contents(tmp_path / basis)
    assert contents(tmp_path / "q") != contents(tmp_path / "pivoted")


def test_the_largest_go_first_and_no_more_than_have_to(large):
    plan = make_plan(CheckpointReader(large), Request("q"))
    enough = cost.needed(plan, plan.tasks)
    assert within_memory(plan, 1000, 1000 + enough) == plan
    assert first_of(within_memory(plan, 1000, 999 + enough).tasks) == [TABLE]
    least = all_by_rows(plan)
    for task, smaller in zip(plan.tasks, least.tasks, strict=True):
        assert smaller == task or cost.cost(least, smaller).flops["float32"] > cost.cost(plan, task).flops["float32"]
    with pytest.raises(
        InputError, match=r"weight: expected at most 0\.1 GB of memory, found that computing it takes 0"
    ):
        within_memory(plan, 0, cost.needed(least, least.tasks) - 1)


@pytest.mark.slow
def test_what_a_limit_forbids_goes_by_rows(large, tmp_path, monkeypatch):
    """As the command line has it: the plan says so, and the result is the same."""
    plan = fuse(large, tmp_path / "whole", basis="q")
    monkeypatch.setattr(fusion, "resident_memory", lambda: 0)
    limit = f"{cost.needed(plan, plan.tasks) // 10**6 - 1}MB"
    options = ["fuse", str(large), str(tmp_path / "fused"), "--basis", "q", "--max-memory", limit]
    said = CliRunner().invoke(cli.main, [*options, "--dry-run"])
    assert said.exit_code == 0, said.output
    assert "by rows" in said.stdout
    assert CliRunner().invoke(cli.main, options).exit_code == 0
    assert contents(tmp_path / "fused") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("fields", "options", "by_rows"),
    [
        ({"attention_bias": True}, {}, [False, False, False]),
        ({"tie_word_embeddings": True}, {}, [False, True, True]),
        ({}, {"basis": "pivoted", "rest_dtype": "float32"}, [False, False, False]),
        ({"ffn_type": "moe", "num_local_experts": 3, "num_experts_per_tok": 2}, {}, [True, False, False]),
    ],
    ids=["biases", "tied", "a rest that is solved for last", "experts"],
)
def test_what_is_held_whole(tmp_path, least, fields, options, by_rows):
    source = save(build(dtype=torch.bfloat16, **SIZES, **fields), tmp_path / "source")
    plan = fuse(source, tmp_path / "fused", **{"basis": "q", **options})
    streams = [task for task in plan.tasks if any(seam.kind == "stream" for seam in task.seams)]
    assert [task.by_rows for task in streams] == by_rows


def test_readers_in_fp32_beside_writers_in_bf16_are_solved_for_last(source, tmp_path, least):
    reader, names = CheckpointReader(source), [f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkv"]
    edit_tensors(source, **{name.replace(".", "__"): reader.tensor(name).float() for name in names})
    plan = fuse(source, tmp_path / "fused", basis="q")
    assert first_of(plan.tasks) == [TABLE, DOWN[1]]


def test_two_linear_writers(tmp_path, monkeypatch):
    """P and the FFN of a parallel layer."""
    source = save(build(dtype=torch.bfloat16, block_type="parallel", **SIZES), tmp_path / "source")
    options = {"basis": "pivoted", "remove": ("head",), "layers_open": (0, 1, 2)}
    fuse(source, tmp_path / "whole", **options)
    monkeypatch.setattr(fusion, "within_memory", lambda plan, held, limit: all_by_rows(plan))
    plan = fuse(source, tmp_path / "by rows", **options)
    assert [len(task.seams[0].writers) for task in plan.tasks if task.by_rows] == [2]
    assert contents(tmp_path / "by rows") == contents(tmp_path / "whole")


def test_a_fuse_goes_on_with_less_memory_or_more(source, tmp_path, monkeypatch):
    fuse(source, tmp_path / "whole", basis="q")
    write = CheckpointWriter.write

    def stopped(writer, name, rows):
        if name == DOWN[1]:
            raise KeyboardInterrupt
        return write(writer, name, rows)

    for first_by_rows in (False, True):
        for by_rows in (first_by_rows, not first_by_rows):
            with monkeypatch.context() as patch:
                if by_rows:
                    patch.setattr(fusion, "within_memory", lambda plan, held, limit: all_by_rows(plan))
                if by_rows == first_by_rows:
                    patch.setattr(CheckpointWriter, "write", stopped)
                    with pytest.raises(KeyboardInterrupt):
                        fuse(source, tmp_path / "fused", basis="q")
                    assert (LocalDestination(tmp_path / "fused").unfinished / "journal.jsonl").read_bytes()
                else:
                    fuse(source, tmp_path / "fused", basis="q", resume=True)
        assert contents(tmp_path / "fused") == contents(tmp_path / "whole")
        (tmp_path / "fused").rename(tmp_path / f"done {first_by_rows}")


def test_stopped_in_the_middle_of_a_tensor(source, tmp_path, monkeypatch, least):
    fuse(source, tmp_path / "whole", basis="q")
    write, written = CheckpointWriter.write, []

    def stopped(writer, name, rows):
        written.append(name)
        if written.count(TABLE) == 3:
            raise KeyboardInterrupt
        return write(writer, name, rows)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write", stopped)
        with pytest.raises(KeyboardInterrupt):
            fuse(source, tmp_path / "fused", basis="q")
    fuse(source, tmp_path / "fused", basis="q", resume=True)
    assert contents(tmp_path / "fused") == contents(tmp_path / "whole")


def test_what_is_wrong_with_a_row(source, tmp_path, least):
    bad = torch.zeros(SIZES["vocab_size"], 32, dtype=torch.bfloat16)
    bad[-1, 3] = torch.nan
    edit_tensors(source, model__embed_tokens__weight=bad)
    with pytest.raises(InputError, match=r"embed_tokens\.weight: expected finite numbers, found 1 of"):
        fuse(source, tmp_path / "fused", basis="q")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_stays_is_copied_in_parts(source, tmp_path, monkeypatch):
    write, written = CheckpointWriter.write, []

    def seen(writer, name, rows):
        written.append((name, len(rows)))
        return write(writer, name, rows)

    monkeypatch.setattr(CheckpointWriter, "write", seen)
    fuse(source, tmp_path / "fused", basis="q")
    head = [rows for name, rows in written if name == "lm_head.weight"]
    assert len(head) > 1
    assert sum(head) == SIZES["vocab_size"]
    assert max(head) * 32 * 2 <= execution.COPIED
    reader, copied = CheckpointReader(source), CheckpointReader(tmp_path / "fused")
    assert torch.equal(reader.tensor("lm_head.weight"), copied.tensor("lm_head.weight"))


@pytest.mark.parametrize("position_type", [pytest.param("rope", marks=pytest.mark.slow), "learned"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("request_", [Request(), Request(remove=("stream", "values"))], ids=["stream,p", "values"])
def test_a_forecast_by_rows_is_that_of_the_whole(position_type, bias, request_, tmp_path, monkeypatch):
    """Of a table that takes Q's bias in, to which positions are added, and whose followers another seam rewrites."""
    fields = {"attention_bias": bias, "position_type": position_type, "num_key_value_heads": 4}
    source = save(build(dtype=torch.bfloat16, **SIZES, **fields), tmp_path / "source")
    found = prepare(CheckpointReader(source), request_)
    monkeypatch.setattr(planning, "read_seam", lambda source, seam, read, _: read_seam(source, seam, read))
    assert prepare(CheckpointReader(source), request_).reason == found.reason != ""


def test_choosing_a_basis_takes_memory_too(source, tmp_path, monkeypatch):
    monkeypatch.setattr(fusion, "resident_memory", lambda: 0)
    with pytest.raises(InputError, match=r"basis: expected at most 0\.0 GB of memory, found that choosing one takes 0"):
        fuse(source, tmp_path / "fused", max_memory=10**4)
    monkeypatch.setattr(fusion, "resident_memory", lambda: 3 * 10**8)
    with pytest.raises(
        InputError, match=r"basis: expected at most 0\.1 GB of memory, found that choosing one takes 0\.3"
    ):
        fuse(source, tmp_path / "fused", max_memory=10**8)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_rows_of_a_tensor(source):
    reader = CheckpointReader(source)
    whole = reader.tensor(TABLE)
    assert torch.equal(reader.tensor(TABLE, slice(3, 70)), whole[3:70])
    assert reader.tensor(TABLE, slice(5, 5)).shape == (0, 32)
    seam = make_plan(reader, Request("q")).tasks[0].seams[0]
    rows = read_seam(read_architecture(reader), seam, reader.tensor, reader.tensor)[
        TABLE.removesuffix(".weight")
    ].weight
    which = torch.tensor([500, 3, 3, 47, 48, 0])
    assert torch.equal(rows[which], whole[which])
    assert len(rows) == len(whole)
