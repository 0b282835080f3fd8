"""What is generated with a cache is what one pass of the same tokens without one gives: of the bundled model, fused and
not, with each cache, by import and by trust_remote_code where there is no skipless.

`make test-newest` and `make test-oldest` run this on other releases of transformers.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

import skipless
from skipless.bundled import BUNDLED
from tests.models import load

PROMPT = [84, 12, 309, 7, 7, 1200, 45, 3]
# In a process of its own: greedy tokens with a cache, and what one pass without it gives after each token before.
SCRIPT = """
import json, sys
if not {skipless}:
    sys.modules["skipless"] = None  # importing it fails
else:
    import skipless.model
import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache
if {forget}:
    update = DynamicCache.update
    DynamicCache.update = lambda cache, key, value, *args, **kwargs: update(
        cache, key, 0 * value if key.shape[2] == 1 else value, *args, **kwargs
    )
ids, found = torch.tensor([{prompt}]), {{}}
options = dict(max_new_tokens=24, min_new_tokens=24, do_sample=False, pad_token_id=0)
for folder in {folders}:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=not {skipless}, dtype=torch.float32)
    for cache in {caches}:
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), cache_implementation=cache, **options)[0]
        with torch.no_grad():
            again = model(input_ids=tokens[None, :-1], use_cache=False).logits[0, ids.shape[1] - 1 :].argmax(-1)
        found[f"{{folder}} {{cache}}"] = [tokens[ids.shape[1] :].tolist(), again.tolist()]
print("\\n" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generation")
    load(BUNDLED, torch.float32).save_pretrained(folder / "original")
    skipless.fuse(BUNDLED, folder / "fused", dtype="float32")
    return [str(folder / name) for name in ("original", "fused")]


def generated(folders, modules, caches=("dynamic", "static"), by_import=True, forget=False):
    script = SCRIPT.format(prompt=PROMPT, folders=folders, caches=caches, skipless=by_import, forget=forget)
    environment = {**os.environ, "HF_MODULES_CACHE": str(modules)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("by_import", [True, False], ids=["import", "trust_remote_code"])
def test_with_each_cache_it_is_what_is_generated_without(by_import, folders, tmp_path):
    found = generated(folders, tmp_path, by_import=by_import)
    assert len(found) == 4
    for tokens, again in found.values():
        assert tokens == again
    assert len({tuple(tokens) for tokens, _ in found.values()}) == 1  # fused, too, it says the same


@pytest.mark.slow
def test_with_a_cache_that_forgets_it_is_not(folders, tmp_path):
    for tokens, again in generated(folders, tmp_path, caches=("dynamic",), forget=True).values():
        assert tokens != again
