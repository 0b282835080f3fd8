"""The vLLM plugin: `vllm serve` on a skipless model folder, with nothing said about its architecture.

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`), so this file imports little.
"""

import os
import time
from pathlib import Path

from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

import skipless.model  # noqa: F401  (registers the AutoClasses)

ARCHITECTURE = "SkiplessForCausalLM"


def register() -> None:
    """Tell vLLM of the architecture; the model itself is imported where it runs."""
    ModelRegistry.register_model(ARCHITECTURE, "skipless.serving.vllm_model:SkiplessForCausalLM")
    MODELS_CONFIG_MAP[ARCHITECTURE] = SkiplessVerification


class SkiplessVerification(VerifyAndUpdateConfig):
    """What vLLM asks an architecture before anything is loaded: can this run, and is anything to be set?"""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Set what the model needs. Raises ValueError, naming the option, for what vLLM cannot do with it."""
        config = vllm_config.model_config.hf_config
        parallel = vllm_config.parallel_config
        if parallel.pipeline_parallel_size > 1:
            raise ValueError(
                f"--pipeline-parallel-size: expected 1 with a skipless model, found "
                f"{parallel.pipeline_parallel_size}; use --tensor-parallel-size"
            )
        if config.num_key_value_heads % parallel.tensor_parallel_size:
            raise ValueError(
                f"--tensor-parallel-size: expected a divisor of num_key_value_heads ({config.num_key_value_heads}), "
                f"found {parallel.tensor_parallel_size}"
            )
        if config.ffn_type == "moe":  # which experts run depends on the data: nothing to compile or capture
            vllm_config.model_config.enforce_eager = True
        if config.attention_shaping == "full":  # the zero query of each group is one more head
            vllm_config.model_config.model_arch_config.total_num_attention_heads += config.num_key_value_heads


class Runner:
    """One model in vLLM, in this process, for the benchmark. precision: "float32" or "bfloat16"."""

    def __init__(self, folder: Path, precision: str):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # else a token arrives when another process has sent it
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        arguments = EngineArgs(
            model=str(folder), dtype=precision, skip_tokenizer_init=True, enable_prefix_caching=False
        )
        self.engine = LLMEngine.from_engine_args(arguments)

    def generate(self, batch: int, prompt: int, tokens: int) -> list[float]:
        """Seconds from the call until each of `tokens` greedy tokens is there, in all of `batch` sequences, of which
        each continues `prompt` token ids.
        """
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        vocabulary = self.engine.model_config.get_vocab_size()
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        arrivals: list[float] = []
        start = time.perf_counter()
        for index in range(batch):
            ids = [(7 * position + index) % vocabulary for position in range(prompt)]
            self.engine.add_request(str(index), TokensPrompt(prompt_token_ids=ids), sampling)
        there = dict.fromkeys(map(str, range(batch)), 0)
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                there[output.request_id] = len(output.outputs[0].token_ids)
            now = time.perf_counter() - start
            arrivals += [now] * (min(there.values()) - len(arrivals))
        return arrivals
