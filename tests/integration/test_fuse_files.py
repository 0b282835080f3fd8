"""What fuse reads and writes: lazily, whole or not at all, and everything else copied."""

import json
import os
import stat
import subprocess
import sys
import weakref

import pytest
import torch
from safetensors import safe_open

import skipless
from skipless.checkpoint.reader import CheckpointReader
from skipless.planning import make_plan
from skipless.request import Request
from tests.models import build, edit_config, load, random_ids, save
from tests.tolerances import FP64


@pytest.fixture
def source(tmp_path):
    return save(build(), tmp_path / "source")


def test_the_folder_loads_without_skipless_through_trust_remote_code(source, tmp_path):
    skipless.fuse(source, tmp_path / "fused")
    code = f"""
import sys; sys.modules["skipless"] = None
import torch; from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "fused")!r}, trust_remote_code=True, dtype=torch.float64)
torch.save(model(torch.arange(9)[None]).logits, {str(tmp_path / "logits")!r})
assert AutoModel.from_pretrained({str(tmp_path / "fused")!r}, trust_remote_code=True).config.stream_basis == "q"
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)
    found, expected = torch.load(tmp_path / "logits"), load(source)(torch.arange(9)[None]).logits
    assert (found - expected).abs().max() <= FP64 * expected.abs().max()
    assert (found.roll(1) - expected).abs().max() > FP64 * expected.abs().max()


def test_shards_and_index_load_like_one_file(source, tmp_path):
    one = skipless.fuse(source, tmp_path / "one")
    many = skipless.fuse(source, tmp_path / "many", max_shard_size=40_000)
    assert {info.shard for info in one.outputs.values()} == {"model.safetensors"}
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: info.shard for name, info in many.outputs.items()}
    assert index["metadata"]["total_size"] == many.bytes[1]
    shards = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    largest = max(info.bytes for info in many.outputs.values())
    assert all((tmp_path / "many" / shard).stat().st_size < max(40_000, largest) + 4000 for shard in shards)
    expected = load(tmp_path / "one").state_dict()
    for name, tensor in load(tmp_path / "many").state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_a_sharded_source_gives_the_same_result(source, tmp_path):
    save(load(source), tmp_path / "sharded", max_shard_size="30KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    skipless.fuse(source, tmp_path / "a")
    skipless.fuse(tmp_path / "sharded", tmp_path / "b")
    a, b = (CheckpointReader(tmp_path / name) for name in "ab")
    assert all(torch.equal(a.tensor(name), b.tensor(name)) for name in a.tensors | b.tensors)


def test_every_other_file_is_copied_byte_for_byte(source, tmp_path):
    (source / "tokenizer.json").write_bytes(b'{"not": "parsed"}\r\n')
    (source / "onnx").mkdir()
    (source / "onnx" / "LICENSE").write_bytes(b"\x00\xff")
    skipless.fuse(source, tmp_path / "fused")
    copied = ("tokenizer.json", "onnx/LICENSE", "generation_config.json")
    assert all((source / name).read_bytes() == (tmp_path / "fused" / name).read_bytes() for name in copied)


def test_code_beside_the_source_is_copied_and_said_so(source, tmp_path, caplog):
    (source / "tokenization_own.py").write_text("raise SystemExit(1)")
    skipless.fuse(source, tmp_path / "fused")
    assert "copied tokenization_own.py: code of the source's, which trust_remote_code=True may run" in caplog.text
    assert (tmp_path / "fused" / "tokenization_own.py").read_text() == "raise SystemExit(1)"


def test_config_keeps_what_fusing_does_not_change(source, tmp_path):
    edit_config(source, eos_token_id=7, dtype="float64", torch_dtype="float64")
    before = json.loads((source / "config.json").read_text())
    skipless.fuse(source, tmp_path / "same")
    skipless.fuse(source, tmp_path / "cast", dtype="float32")
    same, cast = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("same", "cast"))
    changed = {name for name in before.keys() | same.keys() if before.get(name) != same.get(name)}
    assert changed == {"stream_basis", "p_removed", "auto_map"}
    assert (same["dtype"], cast["dtype"]) == ("float64", "float32")
    assert "torch_dtype" not in cast


def test_untouched_tensors_are_copied_bit_for_bit(tmp_path):
    save(build(attention_shaping="full"), tmp_path / "source")
    skipless.fuse(tmp_path / "source", tmp_path / "fused")
    a, b = CheckpointReader(tmp_path / "source"), CheckpointReader(tmp_path / "fused")
    for name in ("lm_head.weight", "model.layers.1.self_attn.gamma", "model.layers.2.mlp.down_proj.weight"):
        assert torch.equal(a.tensor(name), b.tensor(name))


# Half precision rounds these with feedback, and everything else plainly. (The last layer's O writes no stream seam.)
WITH_FEEDBACK = (
    "embed_tokens.weight",
    "0.mlp.down_proj.weight",
    "1.mlp.down_proj.weight",
    "k_proj.weight",
    "v_proj.weight",
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_casts_every_tensor(source, tmp_path, dtype):
    skipless.fuse(source, tmp_path / "fused", basis="q", dtype=dtype)
    found = {info.dtype for info in CheckpointReader(tmp_path / "fused").tensors.values()}
    assert found == {getattr(torch, dtype)}
    skipless.fuse(source, tmp_path / "exact", basis="q")  # fp64 throughout, cast once at the end
    exact, cast = (CheckpointReader(tmp_path / folder) for folder in ("exact", "fused"))
    same = {
        name for name in exact.tensors if torch.equal(cast.tensor(name), exact.tensor(name).to(getattr(torch, dtype)))
    }
    shaped = set() if dtype == "float32" else {name for name in exact.tensors if name.endswith(WITH_FEEDBACK)}
    assert exact.tensors.keys() - same == shaped


def test_files_have_the_usual_mode_and_metadata(source, tmp_path):
    skipless.fuse(source, tmp_path / "fused")
    assert stat.S_IMODE((tmp_path / "fused").stat().st_mode) == 0o755
    for file in (tmp_path / "fused").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) & 0o444 == 0o444, file
    with safe_open(tmp_path / "fused" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fused", "source"]


@pytest.fixture
def held(monkeypatch):
    """Bytes of the tensors that were read and are still there: now, and at most."""
    sizes = {"now": 0, "most": 0}
    read = CheckpointReader.tensor

    def counted(reader, *what):
        tensor = read(reader, *what)
        size = tensor.nbytes
        sizes["now"] += size
        sizes["most"] = max(sizes.values())

        def gone():
            sizes["now"] -= size

        weakref.finalize(tensor.untyped_storage(), gone)
        return tensor

    monkeypatch.setattr(CheckpointReader, "tensor", counted)
    return sizes


def test_memory_holds_one_task_at_a_time(tmp_path, held):
    save(build(num_hidden_layers=12, vocab_size=20), tmp_path / "source")
    plan = skipless.fuse(tmp_path / "source", tmp_path / "fused")
    largest = max(sum(plan.inputs[name].bytes for name in task.reads) for task in plan.tasks)
    assert 0 < held["most"] <= largest
    assert largest < plan.bytes[0] / 10


def test_seams_that_hang_together_are_closed_one_by_one(tmp_path, held):
    save(build(num_hidden_layers=12, vocab_size=20, block_type="parallel"), tmp_path / "source")
    plan = skipless.fuse(tmp_path / "source", tmp_path / "fused", remove=("stream", "values"))
    assert max(len(task.seams) for task in plan.tasks) == 24
    assert 0 < held["most"] < plan.bytes[0] / 4


def test_a_plan_reads_no_tensor_and_tasks_cover_everything_once(source, monkeypatch):
    monkeypatch.setattr(CheckpointReader, "tensor", lambda *_: pytest.fail("a tensor was read"))
    plan = make_plan(CheckpointReader(source), Request("pivoted"))
    reads = [name for task in plan.tasks for name in task.reads]
    writes = [name for task in plan.tasks for name in task.writes]
    assert sorted(reads) == sorted(plan.inputs)
    assert sorted(writes) == sorted(plan.outputs)


def test_tasks_can_run_in_any_order(source, tmp_path, monkeypatch):
    from skipless import engines

    monkeypatch.setitem(
        engines.ENGINES, "backwards", lambda plan, reader, todo: engines.run_local(plan, reader, todo[::-1])
    )
    skipless.fuse(source, tmp_path / "a")
    skipless.fuse(source, tmp_path / "b", engine="backwards")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_fusing_twice_is_deterministic(source, tmp_path):
    for name in ("a", "b"):
        skipless.fuse(source, tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_a_rest_in_fp32_asks_for_pivoted(source, tmp_path):
    plan = skipless.fuse(source, tmp_path / "fused", dtype="bfloat16", rest_dtype="float32")
    assert plan.basis == "pivoted"
    assert plan.reason == "only its rest_proj can be stored in float32"
    dtypes = {name: info.dtype for name, info in plan.outputs.items() if not info.is_index}
    assert {dtype for name, dtype in dtypes.items() if "rest_proj" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if "rest_proj" not in name} == {torch.bfloat16}


def test_a_fused_model_saves_and_loads_again(source, tmp_path):
    skipless.fuse(source, tmp_path / "fused")
    model = load(tmp_path / "fused")
    save(model, tmp_path / "again")
    ids = random_ids(model)
    assert torch.equal(load(tmp_path / "again")(ids).logits, model(ids).logits)
    CheckpointReader(tmp_path / "again")
