"""The model card that fuse writes: what it says, and what of the source's card it takes over."""

import json

import pytest
from huggingface_hub import ModelCard

import skipless
from skipless.rewrite.card import CARD, named
from tests.models import build, save

SOURCE = """---
license: mit
tags: [old]
model-index: [{name: old, results: []}]
---
# Old

[here](LICENSE) [gone](docs/training.md "why") ![picture](curve.png) [web](https://example.org/a) [above](#old)
![lost](plot.png) [code](./run.py) [config](config.json)
"""


@pytest.fixture
def source(tmp_path):
    folder = save(build(), tmp_path / "models--lab--model" / "snapshots" / "0a1b")
    (folder / CARD).write_text(SOURCE)
    for name in ("LICENSE", "curve.png", "run.py"):
        (folder / name).write_text(name)
    return folder


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
