"""A folder that an older version has written: its model files are told apart, shown, and replaced."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner

import skipless
from skipless import cli
from skipless.checkpoint.reader import CheckpointReader
from skipless.errors import INTERRUPTED
from skipless.rewrite import model_files
from skipless.rewrite.record import digest
from tests.models import edit_tensors, load

OLD = "\n# an older version's last line\n"


@pytest.fixture
def old(source, tmp_path):
    """A fused folder as an older version would have written it: other model files, and a record of those."""
    folder = tmp_path / "old"
    skipless.fuse(source, folder)
    record = json.loads((folder / "skipless.json").read_text())
    for file in model_files.MODEL_FILES:
        written = folder / file.name
        written.write_text(written.read_text() + OLD)
        record["files"][file.name] = {"bytes": written.stat().st_size, "sha256": digest(written)}
    (folder / "skipless.json").write_text(json.dumps(record))
    return folder


def run(*arguments):
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_its_model_files_are_replaced_and_its_weights_are_not(source, old):
    before = contents(old)
    assert run("verify", old).exit_code == 0
    result = run("refresh", old)
    assert result.exit_code == 0
    assert "-# an older version's last line" in result.stdout.splitlines()
    after = contents(old)
    assert {file.name: file.read_bytes() for file in model_files.MODEL_FILES}.items() <= after.items()
    replaced = {*(file.name for file in model_files.MODEL_FILES), "skipless.json"}
    assert {name for name in before if before[name] != after[name]} == replaced
    assert before.keys() == after.keys()
    assert run("verify", old).exit_code == 0
    assert skipless.verify(source, old, tokens=8).same
    assert CheckpointReader(old).tensors.keys() == load(old, torch.float32).state_dict().keys()


def test_a_dry_run_shows_it_and_changes_nothing(old):
    before = contents(old)
    result = run("refresh", old, "--dry-run")
    assert result.exit_code == 0
    assert "-# an older version's last line" in result.stdout.splitlines()
    assert contents(old) == before


def test_a_folder_of_other_tensors_than_this_versions_is_left_alone(old):
    edit_tensors(old, model__layers__0__mlp__down_proj__weight=torch.zeros(3, 2))
    before = contents(old)
    result = run("refresh", old)
    assert result.exit_code == 2
    assert "model.layers.0.mlp.down_proj.weight" in result.stderr
    assert contents(old) == before


def test_stopped_between_the_files_and_the_record_it_goes_on(old, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(model_files, "replace_record", stop)
        assert run("refresh", old).exit_code == INTERRUPTED
    assert run("verify", old).exit_code == 1
    assert run("refresh", old).exit_code == 0
    assert run("verify", old).exit_code == 0


def test_of_this_version_there_is_nothing_to_change(source, tmp_path):
    skipless.fuse(source, tmp_path / "new")
    before = contents(tmp_path / "new")
    result = run("refresh", tmp_path / "new")
    assert result.exit_code == 0
    assert result.stdout == ""
    assert "nothing to change" in result.stderr
    assert contents(tmp_path / "new") == before


def test_damage_elsewhere_is_not_forgotten(old):
    (old / "generation_config.json").write_text("{}")
    run("refresh", old)
    result = run("verify", old)
    assert result.exit_code == 1
    assert "generation_config.json" in result.stdout


@pytest.mark.slow
def test_verify_bench_and_audit_say_so_in_a_line(source, old):
    line = f"{old}: configuration_skipless.py and modeling_skipless.py: not this version's"
    once = ("--rounds", "1", "--tokens", "2", "--context", "4", "--prefill", "0")
    assert line in run("bench", old, *once).stderr
    assert line in run("audit", old).stderr
    assert "configuration_skipless.py and modeling_skipless.py: not this version's" in run("verify", source, old).stdout
    run("refresh", old)
    assert "not this version's" not in run("audit", old).stderr


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda folder: shutil.rmtree(folder), "config.json"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "gpt2"}'), "expected a skipless model"),
        (lambda folder: [(folder / file.name).unlink() for file in model_files.MODEL_FILES], "found neither"),
        (lambda folder: (folder / "modeling_skipless.py").write_bytes(b"\xff\xfe"), "expected a model file"),
        (lambda folder: (folder / "skipless.json").write_text("[]"), "skipless.json"),
    ],
)
def test_what_is_no_such_folder_is_left_alone(change, line, old):
    change(old)
    before = contents(old) if old.exists() else None
    result = run("refresh", old)
    assert result.exit_code == 2
    assert line in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert (contents(old) if old.exists() else None) == before
