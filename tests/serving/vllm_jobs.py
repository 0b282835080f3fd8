"""What vLLM generates, job by job: its classes, once patched, are no longer transformers', so a process of their own.

    python -m tests.serving.vllm_jobs JOBS.json

reads [{folder, prompts, **options of vllm.LLM} or {folder, works}] and writes one line a job: its tokens and their
log-probabilities, when they came, or what was refused. After a refusal vLLM can only refuse, so those come last.
"""

import gc
import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

TOKENS = 24
SMALL = {
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "max_model_len": 64,
    "max_num_seqs": 4,
    "kv_cache_memory_bytes": 64 << 20,
}


def generate(folder, prompts, **options):
    """Greedy tokens and their log-probabilities, prompt by prompt."""
    llm = LLM(folder, **{**SMALL, **options})
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False, logprobs=0)
    answers = [
        answer.outputs[0]
        for answer in llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], sampling, use_tqdm=False)
    ]
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    return {
        "tokens": [list(answer.token_ids) for answer in answers],
        "logprobs": [
            [place[token].logprob for token, place in zip(answer.token_ids, answer.logprobs, strict=True)]
            for answer in answers
        ],
    }


def bench(folder, works):
    """What skipless bench is told: when tokens came, and what is wrong with the cache."""
    from skipless.serving.vllm import Runner  # not by those jobs that do without the plugin

    runner = Runner(Path(folder), "float32")
    times = [runner.generate(*work) for work in works]
    return {"bytes": runner.bytes_per_token, "times": times, "broken_cache": runner.broken_cache(5, 4)}


def main(jobs):
    for job in jobs:
        try:
            found = bench(**job) if "works" in job else generate(**job)
        except Exception as error:
            found = {"error": str(error)}
        print("\n" + json.dumps(found), flush=True)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
