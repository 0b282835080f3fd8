"""Load a model folder whole, save one, and decode greedily, with a cache and without."""

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import skipless.model  # noqa: F401  (registers the AutoClasses)
from skipless.algebra.tolerances import dtype_name
from skipless.checkpoint.gguf_folder import GGUFFolder
from skipless.checkpoint.headers import Folder, check_links
from skipless.errors import InputError, StorageError
from skipless.model.modeling_skipless import exchanged
from skipless.quiet import no_library_bars

# What transformers raises for a model that it cannot load; ImportError: for one that another package would quantize.
LOAD_ERRORS = (
    OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError, StrictDataclassError,
)  # fmt: skip
# What families call the most tokens that a sequence may have.
POSITIONS = ("max_position_embeddings", "max_seq_len")
# Logits that spread by less than this part of their size are all but equal.
EVEN = 1e-3
# By how much of their spread a cache may change a token's logits: rounding, also to fp32, in which transformers hands
# them out. One that is broken changes them by more.
CACHE_ERRORS = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 0.2, torch.bfloat16: 0.5}


def load(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load a model folder, or a GGUF file as the one that it was made of, whole, in `dtype`, for inference. Code in the
    folder is never run.

    Raises InputError when the folder does not load, or its tensors are not exactly the model's.
    """
    if folder.suffix == ".gguf":
        return _load_gguf(folder, dtype)
    Folder(folder)
    check_links(folder)
    try:
        with no_library_bars():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, output_loading_info=True, local_files_only=True, trust_remote_code=False
            )
    except LOAD_ERRORS as error:
        raise InputError(f"{folder}: expected a model that transformers loads, found: {_line(error)}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise InputError(
                f"{folder}: expected all tensors of the model and no others, found {kind} {sorted(info[kind])[0]}"
            )
    for name, buffer in model.named_buffers():
        if name.endswith("_order"):
            check_order(f"{folder}: {name}", buffer, model.config.hidden_size)
    if dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the others know no fp64
    return model.eval()


def check_order(name: str, order: torch.Tensor, hidden_size: int) -> None:
    """Raise InputError unless an order, or what each head's inputs become by one, holds each index of its source once.

    name: that it has in its folder.
    """
    there = True
    if name.endswith(("key_order", "value_order")):
        there = bool(order.min() >= 0 and order.max() < hidden_size)
        order = exchanged(order, hidden_size) if there else order
    if not there or not bool((order.sort().values == torch.arange(order.shape[-1])).all()):
        raise InputError(f"{name}: expected each index of its source once; the file is damaged")


def save(model: PreTrainedModel, folder: Path) -> None:
    """Save a model into a folder, each file as the umask says. Raises StorageError where the disk does not take it."""
    try:
        with no_library_bars():
            model.save_pretrained(folder)
    except SafetensorError as error:
        raise StorageError(f"{folder}: could not be written: {_line(error)}") from error
    for file in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", file)  # safetensors ignores the umask


def _load_gguf(file: Path, dtype: torch.dtype) -> PreTrainedModel:
    """As dequantized: transformers may keep weights in as few bits as the file has."""
    reader = GGUFFolder(file, tokenizer=False)
    config = AutoConfig.from_pretrained(reader.folder, local_files_only=True, trust_remote_code=False)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, weight in model.named_parameters():
        weight.data = reader.tensor(name).to(dtype)
    return model.eval()


class InDouble(TorchFunctionMode):
    """Has what is computed in fp32 whatever a model's dtype - norms and softmax, in most of transformers' - be fp64.

    But not RoPE's frequencies: most are made with the model, in fp32, and those that depend on the length would differ.
    """

    def __enter__(self) -> Any:
        self._frequencies, self._finer = dict(ROPE_INIT_FUNCTIONS), True
        ROPE_INIT_FUNCTIONS.update({name: self._as_it_is(make) for name, make in self._frequencies.items()})
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        ROPE_INIT_FUNCTIONS.update(self._frequencies)
        super().__exit__(*error)

    def _as_it_is(self, make: Callable[..., Any]) -> Callable[..., Any]:
        def made(*args: Any, **kwargs: Any) -> Any:
            self._finer = False
            try:
                return make(*args, **kwargs)
            finally:
                self._finer = True

        return made

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._finer:
            return function(*args, **(kwargs or {}))

        def finer(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        function = torch.Tensor.double if function is torch.Tensor.float else function
        return function(*map(finer, args), **{name: finer(value) for name, value in (kwargs or {}).items()})


def arithmetic(model: PreTrainedModel) -> AbstractContextManager[object]:
    """In what a model is to be run: one in fp64, unless it is skipless and so anyway, wholly so."""
    foreign = model.config.model_type != "skipless"
    return InDouble() if model.dtype == torch.float64 and foreign else nullcontext()


def positions_of(config: PreTrainedConfig) -> int:
    """The most tokens that a sequence may have; a large number where nothing says."""
    found = (getattr(config, name, None) for name in POSITIONS)
    return next((number for number in found if isinstance(number, int)), 2**31)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a model folder's tokenizer. Code in the folder is never run. Raises InputError when it does not load."""
    check_links(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise InputError(f"{folder}: expected a tokenizer that transformers loads, found: {_line(error)}") from error


def greedy_config(tokens: int) -> GenerationConfig:
    """Greedy decoding of exactly `tokens` tokens, with the logits."""
    return GenerationConfig(
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )


@dataclass(frozen=True)
class Generated:
    """Greedy tokens after a prompt, and the logits that each was chosen by, (tokens, vocab): with a cache, and in one
    pass of the same tokens without one.
    """

    tokens: torch.Tensor
    logits: torch.Tensor
    uncached: torch.Tensor

    @property
    def cache_error(self) -> float:
        """The largest difference that the cache makes to a token's logits, relative to their spread."""
        difference = (self.logits - self.uncached).double().abs().amax(-1)
        error = (difference / spread(self.uncached.double())).max().item()
        return error if math.isfinite(error) else math.inf

    def broken_cache(self) -> str | None:
        """What is wrong with the cache, or None: it changes the logits by more than their dtype's rounding."""
        allowed = CACHE_ERRORS[self.logits.dtype]
        numbers = self.uncached.float().isfinite().all()  # else there is nothing to compare, in fp32
        if not numbers or self.cache_error <= allowed:
            return None
        return (
            f"with a cache, the logits of a token are off by {self.cache_error:.1e} of their spread from those of one "
            f"pass without it (at most {allowed:.0e} is rounding in {dtype_name(self.logits.dtype)}), "
            f"with transformers {transformers.__version__}"
        )


def spread(logits: torch.Tensor) -> torch.Tensor:
    """Of each token's logits (tokens, vocab), their standard deviation over the vocabulary, and, where they are all but
    equal, a small part of the largest.
    """
    least = EVEN * logits.abs().amax(-1)
    return logits.std(-1, correction=0).maximum(least).clamp(min=torch.finfo(logits.dtype).tiny)


@torch.no_grad()
def generate(model: PreTrainedModel, ids: torch.Tensor, tokens: int) -> Generated:
    """Continue a prompt (1, length) greedily, by so many tokens, and run the same tokens once more without a cache.

    Nothing that the folder says of generation changes that: transformers would take from it what is not asked for.
    """
    with arithmetic(model), _own_generation_set_aside(model):
        output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy_config(tokens))
        again = model(input_ids=output.sequences[:, :-1], use_cache=False, logits_to_keep=tokens).logits[0]
    return Generated(output.sequences[0, ids.shape[1] :], torch.cat(output.logits).to(again.dtype), again)


@contextmanager
def _own_generation_set_aside(model: PreTrainedModel) -> Iterator[None]:
    own = model.generation_config
    model.generation_config = GenerationConfig(cache_implementation=own.cache_implementation)
    try:
        yield
    finally:
        model.generation_config = own


def _line(error: Exception) -> str:
    """An error's message on one line."""
    return " ".join(str(error.__cause__ or error).split())
