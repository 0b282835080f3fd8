"""The site's demo: in node and in a browser, transformers.js writes with exported models what transformers writes."""

import html
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from skipless.bundled import BUNDLED
from skipless.cli.demo import PROMPT
from skipless.inference import load_tokenizer
from tests.browser import driven, needs_browser
from tests.exports import greedy
from tests.pages import blocks, page

ROOT = Path(__file__).parents[2]
SITE = ROOT / "site"
LIBRARY = ROOT / "tools" / "site" / "node_modules" / "@huggingface" / "transformers" / "dist" / "transformers.node.mjs"
MODEL = SITE / "demo" / "fused"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not MODEL.exists(), reason="needs the site: make test-site")]

RUN = """
const [library, demo, models, prompt, tokens, ...names] = process.argv.slice(2);
const transformers = await import(library);
const { writer } = await import(demo);
Object.assign(transformers.env, { allowRemoteModels: false, localModelPath: models });
const found = {};
for (const name of names) found[name] = await (await writer(transformers, name))(prompt, Number(tokens));
console.log(JSON.stringify(found));
"""


def node(folder, script, *arguments):
    """What a script prints in node, where the demo's models are."""
    program = shutil.which("node")
    if program is None:
        pytest.skip("needs node: apt-get install nodejs")
    (folder / "run.mjs").write_text(script)
    command = [program, folder / "run.mjs", *arguments]
    done = subprocess.run(command, cwd=SITE / "demo", capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def expected(source, tokens):
    ids = load_tokenizer(source)(PROMPT, return_tensors="pt").input_ids
    return [*ids[0].tolist(), *greedy(source, ids, tokens)]


def test_in_node_the_original_and_the_fused_model_write_what_transformers_writes(tmp_path):
    found = node(tmp_path, RUN, LIBRARY, SITE / "demo" / "demo.mjs", SITE / "demo", PROMPT, "64", "original", "fused")
    found, ids = json.loads(found.splitlines()[-1]), expected(BUNDLED, 64)
    for name in ("original", "fused"):
        assert found[name]["ids"] == ids
        assert found[name]["text"] == load_tokenizer(BUNDLED).decode(ids)


def test_what_the_docs_show(tmp_path):
    (block,) = blocks(page("serving"), "js")
    script = block.text.replace("@huggingface/transformers", str(LIBRARY)).replace("fused-onnx", "fused")
    assert node(tmp_path, script) == load_tokenizer(BUNDLED).decode(expected(BUNDLED, 64)) + "\n"


@needs_browser
def test_the_page_writes_also_where_the_browser_has_no_room_to_keep_files():
    shown, complaints = driven(
        SITE,
        "demo.html",
        """
        Cache.prototype.put = async () => { throw new DOMException("no room", "QuotaExceededError"); };
        const status = document.getElementById("demo-status");
        new MutationObserver(() => status.textContent.endsWith("...") || done()).observe(status, { childList: true });
        document.querySelector("#demo button").click();
        """,
    )
    assert complaints == []
    assert "Both have written the same tokens." in shown
    text = load_tokenizer(BUNDLED).decode(expected(BUNDLED, 64))
    assert html.unescape(shown).count(f"<pre>{text}</pre>") == 2
