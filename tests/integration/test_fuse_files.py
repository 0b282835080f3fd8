"""What fuse reads and writes: lazily, whole or not at all, and everything else copied."""

import json
import os
import stat
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import skipless
from skipless.bundled import BUNDLED
from skipless.checkpoint.others import is_copied
from skipless.checkpoint.reader import CheckpointReader
from skipless.reports.comparing import GENERATION_FILES
from skipless.rewrite.planning import make_plan
from skipless.rewrite.request import Request
from tests.models import build, edit_config, load, random_ids, save
from tests.tolerances import FP64


@pytest.fixture
def source(tmp_path):
    return save(build(), tmp_path / "source")


def logits_without_skipless(folder, tmp_path):
    """Those of tokens 0 to 8 in fp64, by transformers alone."""
    code = f"""
import sys; sys.modules["skipless"] = None
import torch; from transformers import AutoModel, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True, dtype=torch.float64)
torch.save(model(torch.arange(9)[None]).logits, {str(tmp_path / "logits")!r})
base = AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True)
assert base.config.stream_basis == model.config.stream_basis
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)
    return torch.load(tmp_path / "logits")


@pytest.mark.slow
@pytest.mark.parametrize("bundled", [False, True])
def test_the_folder_loads_without_skipless_through_trust_remote_code(source, tmp_path, bundled):
    folder, original = (BUNDLED, BUNDLED) if bundled else (tmp_path / "fused", source)
    if not bundled:
        skipless.fuse(source, folder)
    found, expected = logits_without_skipless(folder, tmp_path), load(original)(torch.arange(9)[None]).logits
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


def test_every_other_file_of_use_is_copied_byte_for_byte(source, tmp_path):
    (source / "tokenizer.json").write_bytes(b'{"not": "parsed"}\r\n')
    (source / "onnx").mkdir()
    (source / "onnx" / "LICENSE").write_bytes(b"\x00\xff")
    skipless.fuse(source, tmp_path / "fused")
    copied = ("tokenizer.json", "onnx/LICENSE", "generation_config.json")
    assert all((source / name).read_bytes() == (tmp_path / "fused" / name).read_bytes() for name in copied)


WANTED = {
    "LICENSE", "License.MD", "NOTICE.txt", "README.md", "a.model", "added_tokens.json", "assets/logo.PNG",
    "chat_template.jinja", "chat_template.json", "generation_config.json", "merges.txt", "preprocessor_config.json",
    "special_tokens_map.json", "spiece.model", "templates/tool.jinja", "tokenizer.json", "tokenizer_config.json",
    "vocab.json", "vocab.txt",
}  # fmt: skip
UNWANTED = {
    "pickle.pickle", "scaler.joblib", "A.PKL", "weights.h5", "hook.so", "old.pyc", "tokenization_own.py", "run.sh",
    "pytorch_model.bin", "adapter.safetensors", "vocab.pickle", "license.so", ".gitattributes", "onnx/config.json",
    "onnx/model.onnx", "LICENSE.pkl",
}  # fmt: skip
HIDDEN = {
    ".git/config", ".git/hooks/README.md", ".cache/huggingface/tokenizer.json", "__pycache__/a.pyc",
    ".ipynb_checkpoints/README.md", "assets/.hidden/logo.png", "assets/__pycache__/logo.png",
}  # fmt: skip


def fill(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


WRITTEN = {
    "config.json", "model.safetensors", "skipless.json", "configuration_skipless.py", "modeling_skipless.py"
}  # fmt: skip


def test_what_is_copied_is_on_a_list_and_what_is_left_out_is_said(source, tmp_path, caplog):
    fill(source, WANTED | UNWANTED | HIDDEN)
    skipless.fuse(source, tmp_path / "fused")
    assert files(tmp_path / "fused") == WANTED | WRITTEN
    (line,) = [record.message for record in caplog.records if "not copied" in record.message]
    folders = {".git/", ".cache/", "__pycache__/", ".ipynb_checkpoints/", "assets/.hidden/", "assets/__pycache__/"}
    expected = sorted(UNWANTED | folders)
    assert line == f"not copied: {', '.join(expected[:8])} and {len(expected) - 8} more; --copy PATTERN copies more"
    record = json.loads((tmp_path / "fused" / "skipless.json").read_text())
    assert record["source"]["files"].keys() == WANTED | {"config.json"}


def test_nothing_is_said_where_nothing_is_left_out(source, tmp_path, caplog):
    fill(source, WANTED)
    skipless.fuse(source, tmp_path / "once", remove=("stream",))
    skipless.fuse(tmp_path / "once", tmp_path / "twice", remove=("p",))
    assert "not copied" not in caplog.text


def sorted_text(names):
    """The same in every process."""
    return ",".join(sorted(names))


@pytest.mark.parametrize(
    ("patterns", "more"),
    [
        (["*.py"], {"tokenization_own.py"}),
        (["*.p[iy]*", "h*.so"], {"pickle.pickle", "old.pyc", "vocab.pickle", "tokenization_own.py", "hook.so"}),
        (["onnx"], {"onnx/model.onnx"}),
        (["onnx/*.onnx"], {"onnx/model.onnx"}),
        (["./onnx/", "run.sh"], {"onnx/model.onnx", "run.sh"}),
        ([".git*"], {".gitattributes", ".git/config", ".git/hooks/README.md"}),
        ([".git/hooks/*"], {".git/hooks/README.md"}),
        (["__pycache__"], {"__pycache__/a.pyc", "assets/__pycache__/logo.png"}),
        (["assets/.hidden"], {"assets/.hidden/logo.png"}),
        (
            ["*"],
            UNWANTED - {"A.PKL", "LICENSE.pkl", "pytorch_model.bin", "adapter.safetensors", "onnx/config.json"}
            - {".gitattributes"},
        ),
    ],
    ids=sorted_text,
)  # fmt: skip
def test_patterns_of_what_is_copied_too(source, tmp_path, patterns, more):
    fill(source, WANTED | UNWANTED | HIDDEN)
    reader = CheckpointReader(source)
    assert {path.as_posix() for path in reader.other_files(patterns)} - WRITTEN == WANTED | more
    skipless.fuse(source, tmp_path / "fused", copy=patterns)
    assert files(tmp_path / "fused") == WANTED | WRITTEN | more
    assert reader.fingerprint(patterns).keys() - WRITTEN == WANTED | more
    record = json.loads((tmp_path / "fused" / "skipless.json").read_text())
    assert record["options"]["copy"] == patterns
    assert record["source"]["files"].keys() - WRITTEN == WANTED | more


@pytest.mark.parametrize(
    "pattern", ["x", "", "*.bin", "config.json", "modeling_*.py", "model.safetensors", "/etc/passwd", "../*", "git*"]
)
def test_a_pattern_that_names_nothing_to_copy(source, tmp_path, pattern):
    fill(source, UNWANTED | HIDDEN)
    with pytest.raises(skipless.InputError, match="copy: expected a pattern that names a file to copy, found "):
        skipless.fuse(source, tmp_path / "fused", copy=["*.py", pattern])
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_hidden_folder_is_not_entered(source, monkeypatch):
    fill(source, HIDDEN)
    entered, listing = [], Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: entered.append(path.name) or listing(path))
    CheckpointReader(source).other_files()
    assert entered == ["source", "assets"]


def test_all_that_generation_reads_is_copied():
    assert [name for name in GENERATION_FILES if not is_copied(Path(name))] == []


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
    from skipless.rewrite import executors

    monkeypatch.setitem(
        executors.EXECUTORS, "backwards", lambda plan, reader, todo: executors.run_local(plan, reader, todo[::-1])
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
