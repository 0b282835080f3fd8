"""A training recipe: one TOML file that says everything a run needs."""

import dataclasses
import json
import math
import tomllib
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from skipless.dtypes import DTYPE_NAMES
from skipless.errors import InputError

BUNDLED = Path(__file__).parent / "recipes"


def option(about: str, default: Any = MISSING) -> Any:
    """A field of a recipe, and what --help and the docs say about it."""
    return dataclasses.field(default=default, metadata={"about": about})


@dataclass(frozen=True)
class Data:
    """[data]: the text. Without `files`, the running interpreter's own standard library."""

    files: tuple[str, ...] = option(
        "patterns of text, JSON lines, Parquet or token files, or of folders that datasets saved", ()
    )
    field: str = option("the field of JSON lines, Parquet files and datasets that holds the text", "text")
    held_out: float = option("fraction of the documents that is never trained on", 0.05)
    held_out_files: tuple[str, ...] = option("patterns of held-out files, instead of a fraction of `files`", ())
    held_out_tokens: int = option("held-out tokens that are evaluated at most", 2**20)


@dataclass(frozen=True)
class Tokenizer:
    """[tokenizer]: without `folder`, that of `start`, or a byte-level BPE is trained of vocab_size tokens."""

    folder: str = option("a folder with a tokenizer that transformers loads", "")


@dataclass(frozen=True)
class Start:
    """[start]: where the weights start, if not at random values."""

    folder: str = option("a skipless model folder whose weights to start from; it replaces [model]", "")
    sharpness: tuple[float, ...] = option(
        "without `folder`: K over Q in the first and the last layer; 0: uniform attention, 1: to the token itself", ()
    )


@dataclass(frozen=True)
class Schedule:
    """[schedule]: what of the model that the run starts from fades away, each from one step to another."""

    skips: tuple[int, ...] = option("two steps, between which skip connections fade to nothing", ())
    norms: tuple[int, ...] = option("two steps, between which norms fade to a constant, which matrices take in", ())


@dataclass(frozen=True)
class Recipe:
    """One run. `model` has the fields of SkiplessConfig."""

    steps: int = option("optimizer steps")
    batch_size: int = option("sequences that a process computes at once")
    sequence_length: int = option("tokens of a sequence")
    muon_lr: float = option("learning rate of the layers' matrices (Muon)")
    adamw_lr: float = option("learning rate of embeddings, head, gains and biases (AdamW)")
    accumulate: int = option("batches whose gradients make one step", 1)
    warmup: float = option("fraction of the steps in which the learning rates rise", 0.05)
    decay: float = option("fraction of the steps, at the end, in which they fall to 0", 0.4)
    gradient_clip: float = option("largest norm of all gradients together; 0: any", 1.0)
    bf16: bool = option("matrix products in bfloat16; weights stay in float32", False)
    checkpointing: bool = option("compute each layer's activations again backwards: less memory, more time", False)
    fsdp: bool = option("spread weights, gradients and optimizer over the processes (FSDP2; needs GPUs)", False)
    log_every: int = option("steps between two lines of the log", 10)
    eval_every: int = option("steps between two evaluations on held-out text", 500)
    save_every: int = option("steps between two checkpoints", 250)
    seed: int = option("of the starting values and the order of the data", 0)
    dtype: str = option("in which the weights are saved at the end", "float32")
    model: dict[str, Any] | None = option("fields of config.json", None)
    data: Data = option("what is trained on", Data())
    tokenizer: Tokenizer = option("how text becomes tokens", Tokenizer())
    start: Start = option("where the weights start", Start())
    schedule: Schedule = option("what fades away", Schedule())

    @classmethod
    def read(cls, name: str, model: Path | None = None) -> "Recipe":
        """Read a TOML file, or a recipe that comes with skipless by its name; `model`, a config.json, replaces [model].

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
        if model is not None:
            fields["model"] = _read_model(model)
        recipe = _read(cls, fields, f"{path}: ")
        if recipe.model is None and not recipe.start.folder:
            raise InputError(f"{path}: model: expected a value, found none")
        if recipe.model is not None and recipe.start.folder:
            raise InputError(f"{path}: model: expected none beside start.folder, which brings its own; found one")
        if recipe.warmup + recipe.decay > 1 or recipe.data.held_out >= 1:
            raise InputError(f"{path}: warmup, decay, held_out: expected fractions, warmup + decay at most 1")
        if recipe.dtype not in DTYPE_NAMES:
            raise InputError(f"{path}: dtype: expected one of {', '.join(DTYPE_NAMES)}, found {recipe.dtype!r}")
        return recipe

    def __post_init__(self) -> None:
        """Raise InputError for fields that do not go together, and for a fade that does not end."""
        if self.data.held_out_files and not self.data.files:
            raise InputError("data.held_out_files: expected data.files beside them, found none")
        if self.start.folder and self.start.sharpness:
            raise InputError("start.sharpness: expected none beside start.folder, whose weights it would replace")
        for name, steps in dataclasses.asdict(self.schedule).items():
            if not steps:
                continue
            if len(steps) != 2 or not 0 <= steps[0] < steps[1] <= self.steps:
                raise InputError(
                    f"schedule.{name}: expected two steps, the second later than the first and at most "
                    f"{self.steps}, found {list(steps)}"
                )
            if not self.start.folder or self.fsdp:
                raise InputError(
                    f"schedule.{name}: expected start.folder, a model to start from, and no fsdp; found "
                    f"{'fsdp' if self.start.folder else 'none'}"
                )

    def to_json(self) -> dict[str, Any]:
        """Its fields as JSON has them, those of a section as section.field."""
        fields: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        sections = [name for name, value in fields.items() if isinstance(value, dict) and name != "model"]
        for section in sections:
            fields |= {f"{section}.{name}": value for name, value in fields.pop(section).items()}
        return fields


def _read(cls: type[Any], values: dict[str, Any], where: str) -> Any:
    """A recipe, or a section of one, from what TOML gives."""
    known = {field.name: field for field in dataclasses.fields(cls)}
    for name in values:
        if name not in known:
            raise InputError(f"{where}{name}: expected one of {', '.join(known)}; remove it")
    for name, field in known.items():
        if field.default is MISSING and name not in values:
            raise InputError(f"{where}{name}: expected a value, found none")
    checked = {name: _checked(known[name], value, where) for name, value in values.items()}
    try:
        return cls(**checked)
    except InputError as error:  # of fields that do not go together
        raise InputError(f"{where}{error}") from error


def _checked(field: "dataclasses.Field[Any]", value: Any, where: str) -> Any:
    """A value of a field, of the field's type."""
    expected, name = field.type, field.name
    if isinstance(expected, type) and dataclasses.is_dataclass(expected) and isinstance(value, dict):
        return _read(expected, value, f"{where}{name}.")
    if expected == tuple[str, ...]:
        patterns = [value] if isinstance(value, str) else value
        if not isinstance(patterns, list) or not all(isinstance(each, str) for each in patterns):
            raise InputError(f"{where}{name}: expected a pattern or a list of them, found {value!r}")
        return tuple(patterns)
    if expected in (tuple[int, ...], tuple[float, ...]):
        kinds = (int,) if expected == tuple[int, ...] else (int, float)
        if not isinstance(value, list) or len(value) != 2 or any(type(each) not in kinds for each in value):
            raise InputError(f"{where}{name}: expected two numbers{' of steps' * (len(kinds) == 1)}, found {value!r}")
        return tuple(value)
    expected = dict if name == "model" else expected
    if expected is float and type(value) is int:
        value = float(value)
    if type(value) is not expected:
        raise InputError(f"{where}{name}: expected {getattr(expected, '__name__', expected)}, found {value!r}")
    smallest, largest = (0, 2**32 - 1) if name == "seed" else (int(expected is int), math.inf)
    if isinstance(value, int | float) and not (smallest <= value <= largest and value < math.inf):
        to = "on" if largest == math.inf else f"to {largest}"
        raise InputError(f"{where}{name}: expected a number from {smallest} {to}, found {value!r}")
    return value


def _read_model(file: Path) -> dict[str, Any]:
    """The fields of a config.json. Raises InputError when it is not one of a skipless model."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: expected a config.json, found {error}") from error
    if not isinstance(config, dict) or config.get("model_type") != "skipless":
        raise InputError(f'{file}: model_type: expected "skipless", found another or none')
    return {name: value for name, value in config.items() if name not in ("model_type", "architectures", "auto_map")}


def described(cls: type[Any] = Recipe, section: str = "") -> Iterator[tuple[str, str, str]]:
    """Name, default ("" where there is none) and meaning of every field, those of sections as section.field."""
    for field in dataclasses.fields(cls):
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            yield from described(field.type, f"{field.name}.")
            continue
        default = "" if field.default in (MISSING, None, (), "") else json.dumps(field.default)
        yield f"{section}{field.name}", default, field.metadata["about"]
