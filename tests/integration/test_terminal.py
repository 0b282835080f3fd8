"""What files, folders, tensors and configs are called is printed as it is, and controls no terminal."""

import io
import json
import logging

import pytest
from click.testing import CliRunner

from skipless import cli
from skipless.cli import output
from skipless.cli.terminal import Terminal
from skipless.errors import printable
from skipless.log import logger
from skipless.rewrite import fusion
from tests import hostile
from tests.models import build, edit_config, save

TITLE, FORGED, MARKUP = "\x1b]0;title\x07", "x\nskipless: wrote", "[red]x[bold] :cat: "
NAMES = {
    "title": (TITLE, "\\x1b]0;title\\x07"),
    "newline": (FORGED, "x\\nskipless: wrote"),
    "return": ("a\r\x85\u2028\u202eb", "a\\r\\x85\\u2028\\u202eb"),
    "markup": (MARKUP, MARKUP),
    "bytes": ("a\udcffb", "a\\udcffb"),
}
COMMANDS = ("count", "limit", "audit", "fuse", "verify", "refresh", "bench")
named = pytest.mark.parametrize(("name", "shown"), NAMES.values(), ids=NAMES)


@pytest.fixture
def run(capfd, monkeypatch):
    """What a command prints, on stdout and stderr, logs included: lines that print."""
    monkeypatch.setattr(output.out, "_width", 1000)
    monkeypatch.setattr(output.err, "_width", 1000)
    handler = logging.StreamHandler(io.StringIO())
    logger.addHandler(handler)

    def running(*arguments, code=0):
        result = CliRunner().invoke(cli.main, list(map(str, arguments)))
        assert result.exit_code in (code if isinstance(code, tuple) else (code,)), result.output
        raw = capfd.readouterr()  # of what does not go through Python's streams
        texts = result.stdout, result.stderr + handler.stream.getvalue() + raw.out + raw.err
        for text in texts:
            assert all(line.isprintable() for line in text.split("\n")), text
            assert "\nskipless: wrote" not in text
        return texts

    yield running
    logger.removeHandler(handler)


@named
def test_files_that_are_copied_and_left_out(tmp_path, run, name, shown):
    source = save(build(), tmp_path / "source")
    for file in (f"{name}.py", f"{name}.md", "own.py"):
        (source / file).touch()
    _, err = run("fuse", source, tmp_path / "fused", "--copy", "*.py")
    copied = [file for file in (f"{name}.py", f"{name}.md") if (tmp_path / "fused" / file).exists()]
    assert len(copied) == 2 * name.isprintable()
    if not name.isprintable():
        assert f"not copied: {shown}.md, {shown}.py; --copy PATTERN copies more" in err
    (tmp_path / "fused" / f"{name}.new").touch()
    out, _ = run("verify", tmp_path / "fused", code=1)
    assert f"{shown}.new: expected no file that was not written with it" in out


@named
def test_source_and_destination(tmp_path, run, name, shown):
    source = save(build(), tmp_path / f"{name}source")
    fused = tmp_path / f"{name}fused"
    out, _ = run("fuse", source, fused)
    assert f"wrote {tmp_path}/{shown}fused; check it with: skipless verify {tmp_path}/{shown}source" in out
    _, err = run("fuse", source, fused, code=2)
    assert f"{shown}fused: expected a new folder" in err
    (fused / "modeling_skipless.py").write_text("other")
    out, err = run("refresh", fused)
    assert f"{shown}fused/modeling_skipless.py" in out
    assert f"{shown}fused: the model files are this version's" in err
    out, _ = run("count", source)
    assert f"{shown}source" in out
    for option in ("--csv", "--markdown"):
        assert f"{shown}source" in run("count", source, option)[0]


def test_code_that_refresh_shows(tmp_path, run):
    fused = save(build(), tmp_path / "fused")
    (fused / "modeling_skipless.py").write_text(f"# {TITLE}{MARKUP}\n")
    out, _ = run("refresh", fused, "--dry-run")
    assert f"-# {printable(TITLE)}{MARKUP}\n" in out


@named
def test_a_journal(tmp_path, run, name, shown):
    source = save(build(), tmp_path / "source")
    unfinished = tmp_path / ".fused.unfinished"
    unfinished.mkdir()
    (unfinished / "job.json").write_text(json.dumps({name: 1, "format": 2, "basis": name, "reason": name}))
    _, err = run("fuse", source, tmp_path / "fused", "--resume", code=2)
    assert err.count("\n") == 1


@named
@pytest.mark.parametrize(
    "command", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("limit", "audit"))) for name in COMMANDS[:5]]
)
def test_tensors_and_configs(tmp_path, run, name, shown, command):
    tensors = hostile.promised(hostile.SKIPLESS)
    fields, size = hostile.header(tensors)
    fields[name] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    source = hostile.write(tmp_path / "case", hostile.BASES["skipless"])
    more = [tmp_path / "fused"] if command == "fuse" else [source] if command == "verify" else []
    if name != "a\udcffb":
        (source / "model.safetensors").write_bytes(hostile.shard(fields, size))
        _, err = run(command, source, *more, code=2)
        assert shown in err
    for field in ("rope_parameters", "id2label", "architectures", "hidden_act", name):
        for value in ({name: 1}, {"rope_theta": 1e4, "rope_type": "default", name: 1}, [name], name):
            hostile.write(source, hostile.BASES["skipless"])
            edit_config(source, **{field: value})
            run(command, source, *more, code=(0, 1, 2))


@named
def test_a_bug_and_wrong_usage(tmp_path, run, monkeypatch, name, shown):
    def broken(*_, **__):
        raise ZeroDivisionError(name)

    monkeypatch.setattr(fusion, "fuse", broken)
    _, err = run("fuse", "a", "b", code=3)
    assert shown.split("\\n")[0] in err
    monkeypatch.undo()
    _, err = run("fuse", "a", "b", name, code=2)
    assert shown in err


def test_what_is_logged_is_one_line_whatever_handles_it(caplog):
    logger.warning("%s of %d", TITLE + FORGED, 3)
    assert [record.getMessage() for record in caplog.records] == [f"{printable(TITLE + FORGED)} of 3"]


def test_what_other_libraries_log(tmp_path, run, monkeypatch, caplog):
    def fuse(*_, **__):
        logging.getLogger("transformers.some").warning("is %s\n", TITLE)
        raise SystemExit(0)

    monkeypatch.setattr(fusion, "fuse", fuse)
    run("fuse", "a", "b")
    logging.getLogger("transformers.some").warning("after\n")
    assert [record.getMessage() for record in caplog.records] == [f"is {printable(TITLE)}\\n", "after\n"]


def test_a_table_shows_what_it_is_given(capsys):
    from skipless.cli import tables

    Terminal().print(tables.count_table([("", TITLE), (MARKUP, "1")]))
    shown = capsys.readouterr().out
    assert printable(TITLE) in shown
    assert MARKUP.strip() in shown
    assert "\x1b" not in shown
