"""Load a model folder whole, and decode greedily."""

from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

import skipless.model  # noqa: F401  (registers the AutoClasses)
from skipless.checkpoint.headers import Folder
from skipless.errors import InputError
from skipless.quiet import no_library_bars


def load(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load a model folder whole, in `dtype`, for inference. Code in the folder is never run.

    Raises InputError when the folder does not load, or its tensors are not exactly the model's.
    """
    Folder(folder)
    try:
        with no_library_bars():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, output_loading_info=True, local_files_only=True, trust_remote_code=False
            )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, StrictDataclassError) as error:
        raise InputError(f"{folder}: expected a model that transformers loads, found: {_line(error)}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise InputError(
                f"{folder}: expected all tensors of the model and no others, found {kind} {sorted(info[kind])[0]}"
            )
    for name, buffer in model.named_buffers():
        size = buffer.shape[-1]
        if name.endswith("_order") and not (buffer.sort().values == torch.arange(size)).all():
            raise InputError(f"{folder}: {name}: expected each of 0..{size - 1} once; the file is damaged")
    return model.eval()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a model folder's tokenizer. Code in the folder is never run. Raises InputError when it does not load."""
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
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )


def _line(error: Exception) -> str:
    """An error's message on one line."""
    return " ".join(str(error.__cause__ or error).split())
