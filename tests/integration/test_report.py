"""One page that needs nothing else: what it says, that it is one, and what a browser makes of it."""

import json
import re
from html.parser import HTMLParser

import pytest
from click.testing import CliRunner

from skipless import cli
from skipless.bundled import BUNDLED
from skipless.cli.page import render
from skipless.reports.overview import overview
from skipless.rewrite.fusion import fuse
from tests.browser import needs_browser, shown
from tests.families import saved
from tests.models import build, save

HOSTILE = "<img src=x onerror=alert(1)> & 'model'"
VOID = {"meta", "br", "img", "link", "input", "hr"}


def run(*arguments, code=0):
    result = CliRunner().invoke(cli.main, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    return result


class Page(HTMLParser):
    """Tags, each with its attributes, and the text outside of style and script."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.feed(text)
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.words.append(data)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A model whose name is an attack, fused in bf16, and the report on it as a page and as JSON."""
    folder = tmp_path_factory.mktemp("report")
    source = save(build(num_key_value_heads=2), folder / HOSTILE)
    fuse(source, folder / "fused", dtype="bfloat16", layers_open=[1])
    found = json.loads(run("report", source, folder / "fused", "--html", folder / "page.html", "--json").stdout)
    return folder, found


def test_a_page_stands_alone_and_closes_what_it_opens(written):
    folder, _ = written
    page = Page((folder / "page.html").read_text())
    assert not [tag for tag, _ in page.tags if tag in ("img", "link", "iframe", "object")]
    addresses = [values[name] for _, values in page.tags for name in ("src", "href") if name in values]
    assert addresses == ["https://arxiv.org/abs/2404.12362"]
    assert not re.search(r"url\(|@import|fetch\(", (folder / "page.html").read_text())
    assert HOSTILE in page.text
    assert [tag for tag, _ in page.tags].count("h1") == 1


def test_it_says_what_the_commands_say(written):
    folder, found = written
    text = Page((folder / "page.html").read_text()).text
    before, after = found["parameters"]
    fused = json.loads(run("count", folder / "fused", "--json").stdout)["models"][0]
    assert after == fused["parameters"] == sum(after for _, after in found["parts"].values())
    assert before == sum(before for before, _ in found["parts"].values())
    assert found["parts"]["P"][1] == 0 < found["parts"]["P"][0]
    assert f"{before:,} → {after:,}" in text
    assert before - after == sum(each["saves"] for each in found["closed"])
    assert found["report"]["note"] in text
    assert "layers_open 1;" in text
    audited = json.loads(run("audit", folder / HOSTILE, "--dtype", "bfloat16", "--layers-open", "1", "--json").stdout)
    assert found["audit"] | {"safe": True} == audited
    for seam in audited["seams"]:
        for matrix in seam["matrices"].values():
            assert f"{matrix['condition']:.1e}" in text


def test_its_plots_have_what_fuse_has_measured(written):
    folder, found = written
    page = (folder / "page.html").read_text()
    plots = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    assert [plot["title"] for plot in plots] == ["Condition numbers", "Errors of q, k, v", "Errors of M's outputs"]
    stream = plots[1]["views"][0]
    assert stream["name"] == "bfloat16"
    assert stream["lines"]["as written"] == found["stored"]["stream"]
    assert set(stream["lines"]["as written"]) < set(stream["lines"]["original"])  # layer 1 was left open


def test_another_function_is_a_no(tmp_path, written):
    folder, _ = written
    other = save(build(num_key_value_heads=2, seed=5), tmp_path / "other")
    assert (
        "not the same function"
        in run("report", other, folder / "fused", "--html", tmp_path / "page.html", code=1).stdout
    )
    assert 'class="verdict no"' in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("fused", "page", "message"),
    [
        ("fused", "fused/page.html", "outside of SRC and DST"),
        ("fused", "nowhere/page.html", "in a folder that exists"),
        ("fused", ".", "in a folder that exists"),
        (HOSTILE, "new.html", "no seam that was closed in it"),
    ],
)
def test_what_cannot_be_reported(written, fused, page, message):
    folder, _ = written
    result = run("report", folder / HOSTILE, folder / fused, "--html", folder / page, code=2)
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (folder / "new.html").exists()


DRIVE = """<script>
const svg = document.querySelectorAll("svg")[1];
svg.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", cancelable: true }));
svg.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", cancelable: true }));
document.querySelector("figure button").click();
const select = document.querySelector("select");
select.value = 1;
select.dispatchEvent(new Event("change"));
document.body.dataset.overflow = document.documentElement.scrollWidth > innerWidth;
</script></body>"""


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("width", [500, 1280])
def test_a_browser_draws_it_and_answers(written, width):
    folder, _ = written
    (folder / "driven.html").write_text((folder / "page.html").read_text().replace("</body>", DRIVE))
    html, complaints = shown(folder / "driven.html", width)
    assert complaints == []
    figures = re.findall(r'<figure data-plot="\d">(.*?)</figure>', html, re.DOTALL)
    plots = json.loads(re.search(r'id="data">(.*?)</script>', html)[1])
    lines = [len(plot["views"][0]["lines"]) for plot in plots]
    assert figures[0].count("<polyline") == lines[0] - 1  # one was switched off
    assert figures[2].count("<polyline") == lines[2]
    other = plots[1]["views"][1]
    assert figures[1].count("<polyline") == len(other["lines"])  # another dtype
    assert f"layer 1: original {other['lines']['original']['1']:.1e}".replace("e-0", "e-") in html
    assert 'data-overflow="false"' in html


@needs_browser
def test_a_broken_page_would_be_seen(written):
    folder, _ = written
    page = (folder / "page.html").read_text().replace("JSON.parse(", "JSON.parse('x' + ")
    (folder / "broken.html").write_text(page)
    html, complaints = shown(folder / "broken.html")
    assert complaints
    assert "<svg" not in html


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({"ffn_type": "moe", "num_local_experts": 3, "num_experts_per_tok": 2}, {"dtype": "bfloat16"}),
        ({"block_type": "parallel"}, {"remove": ("stream", "values", "head")}),
        ({"norm_type": "rms", "residual": "both"}, {"remove": ("values", "norms")}),
        ({"num_hidden_layers": 1}, {"basis": "q"}),
    ],
    ids=str,
)
def test_other_architectures(tmp_path, config, options):
    source = save(build(**config), tmp_path / "source")
    fuse(source, tmp_path / "fused", **options)
    found = overview(source, tmp_path / "fused", tokens=4)
    before, after = found.parameters
    assert found.report.same
    assert before - after == sum(each.saves for each in found.closed) > 0
    assert [sum(sizes) for sizes in zip(*found.parts.values(), strict=True)] == [before, after]
    assert {each.kind for each in found.closed} >= {*options.get("remove", ("stream",))}
    assert f"{before:,} → {after:,}" in Page(render(found)).text


@pytest.mark.slow
def test_an_ordinary_model(tmp_path):
    saved("llama", tmp_path / "source")
    fuse(tmp_path / "source", tmp_path / "folded")
    found = overview(tmp_path / "source", tmp_path / "folded", tokens=4)
    assert found.report.same
    assert found.parameters[0] == found.parameters[1]
    assert [each.kind for each in found.closed] == ["norms"]
    assert "neutral now" in Page(render(found)).text


@pytest.mark.slow
def test_a_report_of_the_bundled_model_shows_what_both_write(tmp_path):
    fuse(BUNDLED, tmp_path / "fused", dtype="float32")
    prompt = "class Stack:\n    def get(self"
    run("report", BUNDLED, tmp_path / "fused", "--html", tmp_path / "page.html", "--prompt", prompt, "--tokens", 16)
    page = Page((tmp_path / "page.html").read_text())
    assert "The same, token for token" in page.text
    assert page.text.count("class Stack: def get(self") == 2
    assert page.text.count(", name, value):") == 2


@pytest.mark.parametrize("layout", ["family", "skipless"])
def test_what_moved_in_an_ordinary_model_is_what_is_audited(tmp_path, layout):
    saved("llama", tmp_path / "source")
    fuse(tmp_path / "source", tmp_path / "fused", layout=layout)
    run("report", tmp_path / "source", tmp_path / "fused", "--html", tmp_path / "page.html")
    text = Page((tmp_path / "page.html").read_text()).text
    assert "not safe" not in text


def test_a_prompt_that_cannot_be_read_is_left_out(tmp_path):
    fuse(BUNDLED, tmp_path / "fused", remove=("p",))
    for prompt, tokens in (("", 2), ("a", 2000)):
        found = overview(BUNDLED, tmp_path / "fused", prompt=prompt, tokens=tokens)
        assert found.texts is None
