"""The model card that fuse writes: what it says, and what of the source's card it takes over."""

import json

import pytest
from click.testing import CliRunner
from huggingface_hub import ModelCard

import skipless
from skipless import cli
from skipless.checkpoint import files
from skipless.errors import INTERRUPTED
from skipless.rewrite import card
from skipless.rewrite.card import CARD, named
from tests.models import SMALL, build, edit_tensors, load, save

SOURCE = """---
license: mit
tags: [old]
model-index: [{name: old, results: []}]
---
# Old

[here](LICENSE) [gone](docs/training.md "why") ![picture](curve.png) [web](https://example.org/a) [above](#old)
![lost](plot.png) [code](./run.py) [config](config.json)
"""


def model_with_card(folder, **fields):
    save(build(**fields), folder)
    (folder / CARD).write_text(SOURCE)
    for name in ("LICENSE", "curve.png", "run.py"):
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def source(tmp_path):
    return model_with_card(tmp_path / "models--lab--model" / "snapshots" / "0a1b")


def test_it_says_what_was_done_to_what(source, tmp_path):
    plan = skipless.fuse(source, tmp_path / "fused", layers_open=(1,), dtype="bfloat16")
    text = (tmp_path / "fused" / CARD).read_text()
    found = ModelCard(text)
    assert found.data.to_dict() == {
        "base_model": "lab/model",
        "library_name": "transformers",
        "license": "mit",
        "tags": ["skipless"],
    }
    before, after = plan.parameters
    assert f"| parameters | {before:,} | {after:,} | {1 - after / before:.1%} |" in text
    assert f"- 2 stream seams closed by {plan.basis}: 2,048 weights less" in text
    assert "- 3 p seams closed by p: 3,072 weights less" in text
    assert "basis auto, dtype bfloat16, layers_open 1, remove stream,p, parallel_removes readers" in text


def test_the_sources_card_follows_with_the_links_that_lead_somewhere(source, tmp_path):
    skipless.fuse(source, tmp_path / "fused", copy=("run.py",))
    own, _, follows = (tmp_path / "fused" / CARD).read_text().partition("## The card of lab/model")
    assert follows.strip().splitlines() == [
        "# Old",
        "",
        "[here](LICENSE) gone ![picture](curve.png) [web](https://example.org/a) [above](#old)",
        "lost [code](./run.py) [config](config.json)",
    ]
    assert "old" not in own
    assert json.loads((tmp_path / "fused" / "skipless.json").read_text())["files"].keys() >= {CARD}
    assert not skipless.verify(source, tmp_path / "fused", tokens=8).data.notes


@pytest.mark.parametrize(
    "text",
    [
        "---\n- a list\n---\nthe text",
        "---\n{\n---\nthe text",
        "---\nlicense: !!python/object/apply:os.system [exit]\n---\nthe text",
        "---\na: &a [*a]\n---\nthe text",
        "the text \x1b[31m",
    ],
    ids=["a list", "no YAML", "a tag", "a circle", "an escape"],
)
def test_a_card_whose_metadata_cannot_be_read(source, tmp_path, text):
    (source / CARD).write_text(text)
    skipless.fuse(source, tmp_path / "fused")
    found = (tmp_path / "fused" / CARD).read_text()
    assert ModelCard(found).data.base_model == "lab/model"
    assert "the text" in found


def test_no_card_and_one_that_is_too_large(source, tmp_path):
    (source / CARD).unlink()
    skipless.fuse(source, tmp_path / "without")
    (source / CARD).write_text("x" * (2**20 + 1))
    skipless.fuse(source, tmp_path / "large")
    for name in ("without", "large"):
        assert "The card of" not in (tmp_path / name / CARD).read_text()


def test_names():
    assert named("a/b/c") == named("s3://bucket/c") == "c"
    assert named("/cache/models--lab--a--b/snapshots/0a") == "lab/a/b"


def verify(*arguments):
    options = ("--tokens", 8)
    return CliRunner().invoke(cli.main, [str(argument) for argument in ("verify", *arguments, *options)])


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def pair(tmp_path):
    source = model_with_card(tmp_path / "models--lab--model" / "snapshots" / "0a1b", **SMALL)
    skipless.fuse(source, tmp_path / "fused", dtype="bfloat16", basis="q")
    return source, tmp_path / "fused"


def test_what_verify_has_found_is_in_the_card_once_it_is_asked_for(pair):
    source, fused = pair
    before = contents(fused)
    assert verify(source, fused).exit_code == 0
    assert contents(fused) == before
    result = verify(source, fused, "--card")
    assert (result.exit_code, result.stderr) == (0, "")
    own, _, rest = (fused / CARD).read_text().partition("\n## Verified\n")
    found, heading, follows = rest.partition("\n## The card of lab/model\n")
    assert own + "\n" + heading.lstrip("\n") + follows == before[CARD].decode()
    assert "compared with lab/model: the same function as stored in bfloat16." in found
    report = skipless.verify(source, fused, tokens=8)
    for row in report.rows:
        error, *others = row.b.cells()
        assert f"| {row.dtype} | {error} | {row.limit:.1e} | {row.a.cells()[0]} | {' | '.join(others)} |" in found
    assert "all 11 tokens, all positions and experts are covered" in found
    assert verify(fused).exit_code == 0  # the record knows the new card
    assert {name for name, each in contents(fused).items() if each != before[name]} == {CARD, "skipless.json"}


@pytest.mark.slow
def test_a_later_result_takes_the_earlier_ones_place(pair):
    source, fused = pair
    assert verify(source, fused, "--card").exit_code == 0
    first = contents(fused)
    assert verify(source, fused, "--card").exit_code == 0
    assert contents(fused) == first
    assert verify(source, fused, "--card", "--dtype", "float16").exit_code == 0
    text = (fused / CARD).read_text()
    assert (text.count("## Verified"), text.count("| float16 |"), text.count("## The card of")) == (1, 1, 1)


def test_another_function_leaves_the_card_alone(pair):
    source, fused = pair
    name = "model.layers.0.mlp.down_proj.weight"
    edit_tensors(fused, **{name: 1.1 * load(fused).state_dict()[name].bfloat16()})
    before = contents(fused)
    assert verify(source, fused, "--card").exit_code == 1
    assert contents(fused) == before


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda folder: (folder / CARD).write_text("mine"), "found another; it stays as it is"),
        (lambda folder: (folder / CARD).write_text("x" * 2**22), "found 4,194,304 bytes; it stays as it is"),
        (lambda folder: (folder / CARD).unlink(), "found none"),
        (lambda folder: (folder / "skipless.json").unlink(), "found none"),
    ],
    ids=["another", "a large one", "none", "no record"],
)
def test_a_card_that_fuse_has_not_written_is_left_alone(pair, spoil, what):
    source, fused = pair
    spoil(fused)
    before = contents(fused)
    result = verify(source, fused, "--card")
    assert result.exit_code == 0
    assert [line.startswith("--card: nothing was written: ") for line in result.stderr.splitlines()] == [True]
    assert what in result.stderr
    assert contents(fused) == before


def test_a_folder_that_cannot_be_written_is_verified_all_the_same(pair, monkeypatch):
    source, fused = pair
    before = contents(fused)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(files, "create", refuse)
    result = verify(source, fused, "--card", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["same"]
    assert "nothing was written: [Errno 13] Permission denied" in result.stderr
    assert contents(fused) == before


@pytest.mark.slow
@pytest.mark.parametrize("step", ["replace_record", "files.rename"])
def test_stopped_on_the_way_it_goes_on(pair, monkeypatch, step):
    source, fused = pair
    before = contents(fused)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(f"{card.__name__}.{step}", stop)
        assert verify(source, fused, "--card").exit_code == INTERRUPTED
    assert contents(fused).keys() == before.keys()
    assert (fused / CARD).read_bytes() == before[CARD]
    assert verify(source, fused, "--card").exit_code == 0
    assert "## Verified" in (fused / CARD).read_text()
    assert verify(fused).exit_code == 0


def test_of_one_folder_there_is_nothing_to_write_into_a_card(tmp_path):
    result = verify(tmp_path, "--card")
    assert result.exit_code == 2
    assert "--card: expected A and B, found" in result.stderr
