"""Add the architecture "skipless" to a source tree of llama.cpp: two files of ours, and lines at named places of it.

python integrations/llama.cpp/register.py LLAMA_CPP    # the tree that llama-cpp-python 0.3.36 vendors

Nothing is written unless every place is found once, as in that release.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

OURS = Path(__file__).parent
FILES = ("skipless.cpp", "skipless.h")


@dataclass(frozen=True)
class Place:
    """Lines to add to a file before (or after) the one line that begins with `anchor`; None: at the end."""

    name: str
    file: str
    anchor: str | None
    lines: str
    after: bool = False

    def add(self, text: str) -> str:
        """The file's text with the lines. Raises LookupError unless the place is there once."""
        if self.anchor is None:
            return f"{text}\n{self.lines}\n"
        lines = text.splitlines()
        found = [number for number, line in enumerate(lines) if line.startswith(self.anchor)]
        if len(found) != 1:
            raise LookupError(
                f"{self.file}: {self.name}: expected one line that begins with {self.anchor.strip()!r}, found "
                f"{len(found)}; use the llama.cpp of llama-cpp-python 0.3.36, or correct the place in {__file__}"
            )
        at = found[0] + self.after
        return "\n".join([*lines[:at], *self.lines.splitlines(), *lines[at:]]) + "\n"


TENSORS = {  # our name -> the file's, and in which kind of layer
    "ATTN_QKV_ORDER": ("blk.%d.attn_qkv_order", "REPEATING", "GET_ROWS"),
    "ATTN_OUT_ORDER": ("blk.%d.attn_output_order", "REPEATING", "GET_ROWS"),
    "ATTN_ALPHA": ("blk.%d.attn_alpha", "REPEATING", "MUL"),
    "ATTN_BETA": ("blk.%d.attn_beta", "REPEATING", "MUL"),
    "OUTPUT_ORDER": ("output_order", "OUTPUT", "GET_ROWS"),
}

PLACES = (
    Place("enum llm_arch", "src/llama-arch.h", "    LLM_ARCH_UNKNOWN,", "    LLM_ARCH_SKIPLESS,"),
    Place(
        "enum llm_kv",
        "src/llama-arch.h",
        "    LLM_KV_ROPE_FREQ_BASE,",
        "    LLM_KV_ROPE_INTERLEAVED,\n    LLM_KV_RESIDUAL,",
    ),
    Place(
        "enum llm_tensor",
        "src/llama-arch.h",
        "    LLM_TENSOR_ATTN_QKV,",
        "\n".join(f"    LLM_TENSOR_{name}," for name in TENSORS),
        after=True,
    ),
    Place("LLM_ARCH_NAMES", "src/llama-arch.cpp", "    { LLM_ARCH_UNKNOWN,", '    { LLM_ARCH_SKIPLESS, "skipless" },'),
    Place(
        "LLM_KV_NAMES",
        "src/llama-arch.cpp",
        "    { LLM_KV_ROPE_FREQ_BASE,",
        '    { LLM_KV_ROPE_INTERLEAVED, "%s.rope.interleaved" },\n    { LLM_KV_RESIDUAL, "%s.residual" },',
    ),
    Place(
        "LLM_TENSOR_NAMES",
        "src/llama-arch.cpp",
        "    { LLM_TENSOR_ATTN_QKV,",
        "\n".join(f'    {{ LLM_TENSOR_{name}, "{file}" }},' for name, (file, _, _) in TENSORS.items()),
        after=True,
    ),
    Place(
        "LLM_TENSOR_INFOS",
        "src/llama-arch.cpp",
        "    {LLM_TENSOR_ATTN_QKV,",
        "\n".join(
            f"    {{LLM_TENSOR_{name}, {{LLM_TENSOR_LAYER_{layer}, GGML_OP_{op}}}}},"
            for name, (_, layer, op) in TENSORS.items()
        ),
        after=True,
    ),
    Place(
        "llm_arch_supports_sm_tensor",
        "src/llama-arch.cpp",
        "        case LLM_ARCH_GROK:",
        "        case LLM_ARCH_SKIPLESS:",
    ),
    Place(
        "llama_hparams",
        "src/llama-hparams.h",
        "    bool rope_finetuned;",
        "    bool rope_interleaved = false;",
        after=True,
    ),
    Place(
        "llama_model_mapping",
        "src/llama-model.cpp",
        "            return new llama_model_llama(params);",
        "        case LLM_ARCH_SKIPLESS:\n            return new llama_model_skipless(params);",
        after=True,
    ),
    Place(
        "llama_model_rope_type",
        "src/llama-model.cpp",
        "        // all model arches should be listed explicitly here",
        "        case LLM_ARCH_SKIPLESS:\n"
        "            return model->hparams.n_rot_full == 0 ? LLAMA_ROPE_TYPE_NONE\n"
        "                : model->hparams.rope_interleaved ? LLAMA_ROPE_TYPE_NORM : LLAMA_ROPE_TYPE_NEOX;",
    ),
    Place("the models", "src/models/models.h", None, '#include "skipless.h"'),
)


def register(tree: Path) -> None:
    """Add it to the tree. Raises LookupError or OSError, nothing having been written, for one of another release."""
    texts: dict[str, str] = {}
    for place in PLACES:
        text = texts.get(place.file) or (tree / place.file).read_text()
        if place.lines in text:
            raise LookupError(f"{place.file}: {place.name}: expected a tree without the architecture, found it there")
        texts[place.file] = place.add(text)
    for file, text in texts.items():
        (tree / file).write_text(text)
    for file in FILES:
        shutil.copy(OURS / file, tree / "src" / "models" / file)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: register.py LLAMA_CPP")
    try:
        register(Path(sys.argv[1]))
    except (LookupError, OSError) as error:
        sys.exit(str(error))
