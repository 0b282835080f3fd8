"""The vLLM plugin: `vllm serve` on a skipless model folder, with nothing said about its architecture.

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`), so this file imports little.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

import skipless.model  # noqa: F401  (registers the AutoClasses)
from skipless.errors import InputError
from skipless.serving.decoding import bytes_per_token
from skipless.serving.running import check_length, disagreement, sequence

ARCHITECTURE = "SkiplessForCausalLM"
CACHED_TOKENS = 16384  # of all sequences of a batch: Mistral-7B's take 2 GB in bf16


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
    """A model in vLLM (running.Runner), compiled as vLLM does by default. precision: a torch dtype's name."""

    def __init__(self, folder: Path, precision: str):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # else a token is there when another process has sent it
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        dtype = getattr(torch, precision)
        with torch.device("meta"):
            self.bytes_per_token = bytes_per_token(AutoModelForCausalLM.from_config(config, dtype=dtype))
        cached = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
        arguments = EngineArgs(
            model=str(folder),
            dtype=precision,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            max_model_len=min(config.max_position_embeddings, CACHED_TOKENS),
            kv_cache_memory_bytes=cached * CACHED_TOKENS,
        )
        try:
            self.engine = LLMEngine.from_engine_args(arguments)
        except (ValueError, RuntimeError) as error:
            raise InputError(f"{folder}: expected a model that vLLM runs, found: {error}") from error

    def generate(self, batch: int, prompt: int, tokens: int) -> list[float]:
        """Decode greedily after a prompt of this many tokens; when each token came, in seconds."""
        config = self.engine.vllm_config
        check_length(prompt, tokens, config.model_config.max_model_len)
        blocks = -(-(prompt + tokens) // config.cache_config.block_size)
        most = min(config.scheduler_config.max_num_seqs, config.cache_config.num_gpu_blocks // blocks)
        if batch > most:
            raise InputError(f"batch: expected at most {most} sequences of {prompt + tokens} tokens, found {batch}")
        ids = sequence(prompt, config.model_config.get_vocab_size())
        start = time.perf_counter()
        times: list[float] = []
        for came in self._decode(ids, batch, tokens):
            now = time.perf_counter() - start
            times += [now] * (min(map(len, came)) - len(times))
        return times

    def broken_cache(self, prompt: int, tokens: int) -> str | None:
        """What is wrong with its cache, by its tokens."""
        config = self.engine.vllm_config.model_config
        check_length(prompt, tokens, config.max_model_len)

        def decode(ids: list[int], count: int) -> list[int]:
            *_, (decoded,) = self._decode(ids, 1, count)
            return decoded

        return disagreement(decode, sequence(prompt, config.get_vocab_size()), tokens)

    def _decode(self, ids: list[int], batch: int, tokens: int) -> Iterator[list[list[int]]]:
        """After each step of the engine, the tokens of each sequence so far."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        came: dict[str, list[int]] = {str(number): [] for number in range(batch)}
        for name in came:
            self.engine.add_request(name, TokensPrompt(prompt_token_ids=ids), sampling)
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                came[output.request_id] = list(output.outputs[0].token_ids)
            yield list(came.values())


def open_runner(folder: Path, precision: str, compiled: bool) -> Runner:
    """A model folder, loaded; it is always compiled."""
    return Runner(folder, precision)
