"""A training recipe: one TOML file that says everything a run needs."""

import dataclasses
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipless.dtypes import DTYPE_NAMES
from skipless.errors import InputError

BUNDLED = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Recipe:
    """model: fields of SkiplessConfig. held_out: fraction of the files. batch_size: sequences per step.

    sequence_length in tokens; warmup and decay are fractions of `steps`; learning rates are per step; dtype is that of
    the weights when they are saved at the end.
    """

    model: dict[str, Any]
    steps: int
    batch_size: int
    sequence_length: int
    muon_lr: float
    adamw_lr: float
    warmup: float = 0.05
    decay: float = 0.4
    held_out: float = 0.05
    gradient_clip: float = 1.0
    bf16: bool = False
    eval_every: int = 500
    save_every: int = 250
    seed: int = 0
    dtype: str = "float32"

    @classmethod
    def read(cls, name: str) -> "Recipe":
        """Read a TOML file, or a recipe that comes with skipless by its name.

        Raises InputError naming the field for anything missing, unknown, of the wrong type or out of range.
        """
        path = Path(name)
        if not path.is_file():
            path = BUNDLED / f"{name}.toml"
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in BUNDLED.glob("*.toml")))
            raise InputError(f"{name}: expected a recipe file or one of {known}; found neither")
        try:
            fields = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: expected TOML, found {error}") from error
        known_fields = {field.name: field for field in dataclasses.fields(cls)}
        for field_name, value in fields.items():
            if field_name not in known_fields:
                raise InputError(f"{path}: {field_name}: expected one of {', '.join(known_fields)}; remove it")
            expected = {"model": dict, "bf16": bool}.get(field_name) or known_fields[field_name].type
            if expected is float and type(value) is int:
                value = fields[field_name] = float(value)
            if type(value) is not expected:
                raise InputError(
                    f"{path}: {field_name}: expected {getattr(expected, '__name__', expected)}, found {value!r}"
                )
            smallest = 1 if expected is int and field_name != "seed" else 0
            if expected in (int, float) and not smallest <= fields[field_name] < math.inf:
                raise InputError(f"{path}: {field_name}: expected a number from {smallest} on, found {value!r}")
        for field_name, field in known_fields.items():
            if field.default is dataclasses.MISSING and field_name not in fields:
                raise InputError(f"{path}: {field_name}: expected a value, found none")
        recipe = cls(**fields)
        if recipe.warmup + recipe.decay > 1 or recipe.held_out >= 1:
            raise InputError(f"{path}: warmup, decay, held_out: expected fractions, warmup + decay at most 1")
        if recipe.dtype not in DTYPE_NAMES:
            raise InputError(f"{path}: dtype: expected one of {', '.join(DTYPE_NAMES)}, found {recipe.dtype!r}")
        return recipe
