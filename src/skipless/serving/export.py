"""Write a skipless model for another engine: a new folder, whole or not at all."""

import os
import shutil
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from skipless.checkpoint.headers import Folder
from skipless.checkpoint.others import tell_left_out
from skipless.checkpoint.staging import LocalDestination, beside
from skipless.dtypes import SAFETENSORS_NAMES
from skipless.errors import InputError, extra
from skipless.log import logger
from skipless.rewrite.model_files import OURS
from skipless.serving.engines import FORMATS

# The dtypes, as safetensors calls them, that each way to store weights keeps as they are. (fp64 in f32 is near enough.)
KEPT = {"f32": {"F64", "F32", "BF16", "F16"}, "bf16": {"BF16"}, "f16": {"F16"}}


@dataclass(frozen=True)
class Exported:
    """What was written: to where, in which format, with weights stored how, and how many bytes of all files."""

    destination: str
    to: str
    weights: str
    bytes: int


def export(source: str | Path, destination: str | Path, *, to: str, weights: str = "f32") -> Exported:
    """Write the skipless model folder `source` for the engine `to` (of FORMATS) into the new folder `destination`.

    weights: how to store them, one of the format's WEIGHTS. To 16 bits it is a plain cast, so store in half precision
    with `fuse` first. What else fuse copies along - config.json, tokenizer, licence - is copied, too.
    Logs a warning where rounding may cost more than it would cost the original. Raises InputError for anything that
    stands in the way; `destination` then does not exist.
    """
    if to not in FORMATS:
        raise InputError(f"to: expected one of {', '.join(FORMATS)}, found {to!r}")
    with extra(to):
        room = import_module(f"skipless.serving.{FORMATS[to]}")
    if weights not in room.WEIGHTS:
        raise InputError(f"weights: expected one of {', '.join(room.WEIGHTS)} for {to}, found {weights!r}")
    source, destination = Path(source), Path(destination)
    if Path(os.path.realpath(destination)).is_relative_to(os.path.realpath(source)):
        raise InputError(f"{destination}: expected a folder outside the source {source}, which stays as it is")
    dst = LocalDestination(destination)
    dst.check()
    opened = Folder(source)
    others = [file for file in opened.other_files() if str(file) not in OURS]
    tell_left_out([name for name in opened.left_out() if name not in OURS], advice="")
    with beside(dst) as scratch:
        folder = scratch / "model"
        folder.mkdir()
        for file in (*others, Path("config.json")):
            (folder / file.parent).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / file, folder / file)
        room.write(source, folder, weights)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        dst.publish(folder)
    warn_of_rounding(opened, weights)
    return Exported(str(destination), to, weights, size)


def warn_of_rounding(model: Folder, weights: str) -> None:
    """Log that a model fused by q, k or v may multiply what rounding adds (docs/half-precision.md)."""
    basis = model.config.get("stream_basis")
    stored = {header.dtype for header in model.headers.values()} & SAFETENSORS_NAMES.keys()
    if basis in ("q", "k", "v") and not stored <= KEPT.get(weights, set()):
        logger.warning(
            "stream_basis: fused by %s, this model may multiply what rounding to %s adds until it is lost; fuse the "
            "original with %s",
            basis,
            weights,
            "--dtype, which makes up for rounding, or with --basis pivoted" if weights in KEPT else "--basis pivoted",
        )
