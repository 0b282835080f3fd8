"""MLX: a folder that mlx_lm loads, generates from, serves and quantizes; and a runner that times it.

The model is mlx_model.py beside this file. It goes along, as config.json's model_file, which mlx_lm runs where it is
told to trust it.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import torch
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from skipless.checkpoint.headers import read_json_object
from skipless.errors import InputError
from skipless.inference import save
from skipless.model.configuration_skipless import SkiplessConfig
from skipless.model.modeling_skipless import alibi_slopes, ffn_inputs, rotary_frequencies
from skipless.serving import mlx_model
from skipless.serving.decoder import check_fixed_angles, load_skipless
from skipless.serving.running import TokenRunner, check_length, expert_share

MODEL_FILE = Path(mlx_model.__file__)
WEIGHTS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def write(source: Path, folder: Path, weights: str) -> None:
    """The skipless model folder `source` into `folder`: weights, config and model file. Raises InputError."""
    model = load_skipless(source, WEIGHTS[weights])
    check_fixed_angles(model.config)
    if model.config.hidden_act not in mlx_model.ACTIVATIONS:
        known = ", ".join(mlx_model.ACTIVATIONS)
        found = model.config.hidden_act
        raise InputError(f"config.json: hidden_act: expected one of {known} for mlx, found {found!r}")
    save(model, folder)
    (folder / "config.json").write_text(json.dumps(described(model.config), indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(MODEL_FILE, folder / MODEL_FILE.name)


def described(config: SkiplessConfig) -> dict[str, Any]:
    """The config with what follows from it, and the model file's name.

    ropes: of each kind of layers, RoPE's periods by position, in radians, and by what it multiplies what it rotates.
    """
    kinds = sorted(set(config.attention_kinds)) if config.position_type.startswith("rope") else []
    ropes = {}
    for kind in kinds:
        frequencies, factor = rotary_frequencies(config, kind, torch.device("cpu"))
        ropes[kind] = {"periods": (1 / frequencies).tolist(), "factor": factor}
    slopes = []
    if config.position_type == "alibi":
        slopes = alibi_slopes(config.num_attention_heads)
        if config.attention_shaping == "full":  # the zero query of each group asks for the mean
            group = config.num_attention_heads // (config.num_key_value_heads or 1)
            slopes = [slope for i in range(0, len(slopes), group) for slope in (*slopes[i : i + group], 0.0)]
    names = ("attention_kinds", "p_rows", "rest_width", "row", "unrotated")
    return {
        **config.to_dict(),
        **{name: getattr(config, name) for name in names},
        "ffn_inputs": ffn_inputs(config),
        "ropes": ropes,
        "alibi_slopes": slopes,
        "model_file": MODEL_FILE.name,
    }


def check_model_file(folder: Path) -> None:
    """Raise InputError for an exported folder that would have mlx_lm run other code than ours."""
    named = read_json_object(folder / "config.json").get("model_file")
    if named != MODEL_FILE.name or (folder / MODEL_FILE.name).read_bytes() != MODEL_FILE.read_bytes():
        raise InputError(
            f"{folder / MODEL_FILE.name}: expected this version's, which mlx_lm runs, found other code; export the "
            f"model again"
        )


class Runner(TokenRunner):
    """A model in MLX.

    folder: a model folder, or one that `export` wrote (with the weights it has).
    """

    def __init__(self, folder: Path, precision: str):
        with tempfile.TemporaryDirectory() as name:
            if (folder / MODEL_FILE.name).exists():
                check_model_file(folder)
            else:
                write(folder, Path(name), PRECISIONS[precision])
                folder = Path(name)
            self._model, self.config = load_model(folder, trust_remote_code=True)
        self.vocab_size, tied = self.config["vocab_size"], self.config["tie_word_embeddings"]
        weights = tree_flatten(self._model.parameters())
        tables = ("position_embeddings",) if tied else ("position_embeddings", "embed_tokens")
        read = [weight for name, weight in weights if not any(table in name for table in tables)]
        share = expert_share(self.config)  # of experts, whose matrices are one array
        sizes = (weight.nbytes * (share if weight.ndim == 3 else 1) for weight in read if weight.dtype != mx.int32)
        self.bytes_per_token = round(sum(sizes))

    def decode(self, prompt: list[int], batch: int, tokens: int) -> Iterator[list[int]]:
        """As a TokenRunner."""
        check_length(len(prompt), tokens, self.config["max_position_embeddings"])
        given, cache = mx.array([prompt] * batch), make_prompt_cache(self._model)
        for _ in range(tokens):
            given = self._model(given, cache=cache)[:, -1:].argmax(-1)
            yield given[:, 0].tolist()


def open_runner(folder: Path, precision: str, compiled: bool) -> Runner:
    """A model folder, loaded; nothing is compiled."""
    return Runner(folder, precision)
