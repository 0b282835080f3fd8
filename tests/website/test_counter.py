"""The site's counter counts what the command line counts: the same Python, in Pyodide, in node and in a browser."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from skipless import cli
from skipless.cli import output
from skipless.reports.counting import table
from tests.browser import driven, needs_browser

ROOT = Path(__file__).parents[2]
FILES = ROOT / "site" / "counter"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not FILES.exists(), reason="needs the site: make test-site")]

RUN = """
import { readFileSync } from "node:fs";
const folder = process.argv[2];
const { loadPyodide } = await import(`${folder}/pyodide.mjs`);
const { counter } = await import(`${folder}/counter.mjs`);
const archive = new Uint8Array(readFileSync(`${folder}/skipless.zip`));
const { names, count } = await counter(loadPyodide, `${folder}/`, archive);
const asked = [...names(), ...JSON.parse(readFileSync(0))];
console.log(JSON.stringify(Object.fromEntries(asked.map((each) => [each, count(each)]))));
"""
CONFIG = json.dumps({"architectures": ["GPT2LMHeadModel"], **table()["models"]["gpt2"], "n_layer": 3})
BROKEN = json.dumps({**table()["models"]["gpt2"], "n_head": -1})


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """What the counter says of every known name, and of two files that are pasted."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node: apt-get install nodejs")
    script = tmp_path_factory.mktemp("counter") / "run.mjs"
    script.write_text(RUN)
    asked = json.dumps([CONFIG, BROKEN, "no-such-model"])
    done = subprocess.run([node, script, FILES], input=asked, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def line(*arguments, code=0):
    result = CliRunner().invoke(cli.main, ["count", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def test_every_known_name_is_counted_as_on_the_command_line(counted):
    names = list(table()["models"])
    assert len(names) >= 103
    expected = json.loads(line(*names, "--json").stdout)["models"]
    assert [counted[name]["count"] for name in names] == expected


def test_a_pasted_file_is_counted_as_on_the_command_line(counted, tmp_path):
    (tmp_path / "pasted.json").write_text(CONFIG)
    (expected,) = json.loads(line(tmp_path / "pasted.json", "--json").stdout)["models"]
    assert counted[CONFIG]["count"] == expected
    assert expected["architecture"]["num_hidden_layers"] == 3


def test_the_table_is_the_command_lines(counted, monkeypatch):
    monkeypatch.setattr(output.out, "_width", 300)
    found = counted["pythia-6.9b"]
    text = line("pythia-6.9b").stdout
    for row in found["rows"]:
        assert all(cell in text for cell in row)
    assert all(note in text for note in found["notes"])


def test_what_cannot_be_counted_is_said_as_on_the_command_line(counted, tmp_path):
    (tmp_path / "pasted.json").write_text(BROKEN)
    said = line(tmp_path / "pasted.json", code=2).stderr
    assert counted[BROKEN]["error"].partition("pasted.json")[2] in said
    assert f"skipless: {counted['no-such-model']['error']}" == line("no-such-model", code=2).stderr.strip()


@needs_browser
def test_the_page_counts(counted):
    html, complaints = driven(
        ROOT / "site",
        "counter.html",
        """
        const status = document.getElementById("counter-status");
        new MutationObserver(() => {
          if (status.textContent !== "Ready.") return;
          document.querySelector("#counter button").click();
          done();
        }).observe(status, { childList: true });
        """,
    )
    assert complaints == []
    assert f"<td>{counted['llama-3.1-8b']['count']['weights']:,}</td>" in html
