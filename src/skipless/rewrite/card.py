"""The model card of what fuse writes, README.md: what was done to which model; below it, the source's own card.

What verify has found stands between the two, once somebody has asked for that.
"""

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import ModelCardData, RepoCard

from skipless.checkpoint import files
from skipless.checkpoint.headers import check_file
from skipless.errors import InputError, printable
from skipless.quiet import errors_only
from skipless.rewrite.planning import Plan
from skipless.rewrite.record import RECORD, read_record, replace_record
from skipless.version import __version__

CARD = "README.md"
# Bytes of a source's card that are taken over.
MOST = 2**20
# Of its metadata, what holds for the new model, too; numbers, above all, need not.
KEPT = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag")
# Sections after what fuse says itself: what verify has found, and the source's card.
VERIFIED, SOURCE = "## Verified", "## The card of"
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^()\s]+)(\s+\"[^\"]*\")?\)")


def named(source: str) -> str:
    """What a source is called, by its path or URL: a folder's name, or, in HuggingFace's cache, the model's."""
    path = Path(source).resolve()
    if path.parent.name == "snapshots" and path.parents[1].name.startswith("models--"):
        return path.parents[1].name.removeprefix("models--").replace("--", "/")
    return path.name


def card(plan: Plan, options: Mapping[str, Any], name: str, source: str | None, copied: Collection[str]) -> str:
    """The card of a plan's result. name: of the source; source: its card, if it has one; copied: files beside it."""
    metadata, text = _parsed(source or "")
    kept = {key: metadata[key] for key in KEPT if key in metadata}
    front = ModelCardData(base_model=printable(name), library_name="transformers", tags=["skipless"], **kept)
    lines = ["---", front.to_yaml(), "---", "", *_own(plan, options, name)]
    if source is not None:
        lines += ["", f"{SOURCE} {plain(name)}", "", _linked(text, copied).strip()]
    return "\n".join(lines) + "\n"


def put_verified(folder: Path, lines: Iterable[str]) -> None:
    """Put what verify has found into a folder's card, in the place of what it had found before.

    The record gets the new card's SHA-256 first: stopped between the two, the same call goes on. Raises InputError for
    a card that neither fuse nor this function has written, OSError where files cannot be replaced.
    """
    file, record = folder / CARD, read_record(folder)
    if record is None or not file.exists():
        raise InputError(f"{file}: expected the card that fuse has written, with {RECORD} beside it, found none")
    if (size := check_file(file, "a model card", folder)) > 2 * MOST:
        raise InputError(f"{file}: expected the card that fuse has written, found {size:,} bytes; it stays as it is")
    with files.opened(file) as stream:
        before = stream.read(size)
    after = _with_section(before.decode(errors="replace"), lines).encode()
    entry = {"bytes": len(after), "sha256": hashlib.sha256(after).hexdigest()}
    known = record["files"].get(CARD, {}).get("sha256")
    if known not in (hashlib.sha256(before).hexdigest(), entry["sha256"]):
        raise InputError(f"{file}: expected the card that fuse has written, found another; it stays as it is")
    new = files.beside(file)
    try:
        files.write(new, [after])  # a full disk is noticed before the record changes
        files.sync(new)
        replace_record(folder, {**record, "files": {**record["files"], CARD: entry}})
        files.rename(new, file)
    except BaseException:
        files.remove(new)
        raise


def _with_section(card: str, lines: Iterable[str]) -> str:
    """The card with these lines as its section on what verify has found."""
    own, heading, source = card.partition(f"\n{SOURCE} ")
    own = own.partition(f"\n{VERIFIED}\n")[0]
    return "\n".join([own.rstrip("\n"), "", VERIFIED, "", *lines, ""]) + heading + source


def _own(plan: Plan, options: Mapping[str, Any], name: str) -> Iterator[str]:
    (before, after), (bytes_before, bytes_after) = plan.parameters, plan.bytes
    if plan.in_place:
        yield from _moved(plan, options, name)
        return
    if any(kind != "first_layer" for kind in plan.kinds):
        yield f"# {plain(name)}, less weights that carry no information"
        yield ""
        yield f"Written by skipless {__version__}: the same function, of fewer weights (arXiv:2404.12362)."
    else:
        yield f"# {plain(name)}, its first layer precomputed"
        yield ""
        yield f"Written by skipless {__version__}: the same function, of other weights (arXiv:2402.13388)."
    yield ""
    yield "| | before | after | less |"
    yield "|---|---|---|---|"
    yield f"| parameters | {before:,} | {after:,} | {1 - after / before:.1%} |"
    yield f"| bytes of tensors | {bytes_before:,} | {bytes_after:,} | {1 - bytes_after / bytes_before:.1%} |"
    yield ""
    for kind, closed in plan.kinds.items():
        ways = ", ".join(dict.fromkeys(seam.way(plan.basis) for seam in closed))
        saved = sum(seam.saves for seam in closed)
        much = f"{abs(saved):,} weights {'less' if saved >= 0 else 'more'}"
        if kind == "first_layer":
            yield f"- layer 0 precomputed (arXiv:2402.13388), in the rows of the token table: {much}"
        else:
            yield f"- {len(closed)} {kind} seams closed by {ways}: {much}"
    yield from (f"- {plain(line)}" for line in plan.note.splitlines() if plan.layout)
    yield f"- asked for: {_asked(options)}"
    yield ""
    yield (
        "Expected errors by seam, versions, and the SHA-256 of all that was read and written are in skipless.json. "
        "`skipless verify SOURCE THIS` compares both models (`--card`: and writes here what it has found), `skipless "
        "verify THIS` the bytes with that record."
    )
    yield ""
    yield (
        "To load it: `import skipless.model`, then `AutoModelForCausalLM.from_pretrained(...)`; or, without skipless, "
        "`trust_remote_code=True`, for which the model's two Python files are here."
    )


def _moved(plan: Plan, options: Mapping[str, Any], name: str) -> Iterator[str]:
    """Of a family's model, in whose layout nothing goes."""
    assert plan.layout is not None
    family, (count, _) = plan.layout.family.model_types[0], plan.parameters
    yield f"# {plain(name)}, its norms and biases folded"
    yield ""
    yield (
        f"Written by skipless {__version__}: the same function, and the same tensors by name and shape, so that it "
        f"loads as any {family} model does. {plan.neutral:,} of {count:,} numbers have moved into the matrices beside "
        f"them: gains that are now 1, biases that are now 0."
    )
    yield ""
    for kind, seams in plan.kinds.items():
        moved = sum(seam.saves for seam in seams)
        yield f"- {kind}: {moved:,} numbers, in {len(seams)} places"
    yield from (f"- {plain(line)}" for line in plan.note.splitlines())
    yield f"- asked for: {_asked(options)}"
    yield ""
    yield (
        "Versions, and the SHA-256 of all that was read and written are in skipless.json. `skipless verify SOURCE "
        "THIS` compares both models (`--card`: and writes here what it has found), `skipless verify THIS` the bytes "
        "with that record."
    )


def _asked(options: Mapping[str, Any]) -> str:
    """The options that say something."""
    return ", ".join(f"{key} {_shown(value)}" for key, value in options.items() if value not in (None, (), ""))


def _shown(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def plain(name: str) -> str:
    """A name that is no markup."""
    return re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", printable(name))


def _parsed(text: str) -> tuple[dict[str, Any], str]:
    """A card's metadata, none if they cannot be read, and the rest."""
    try:
        with errors_only("huggingface_hub.repocard"):
            card = RepoCard(text, ignore_metadata_errors=True)
    except Exception:  # of many libraries; whatever a card says, it stops nothing
        return {}, text
    return card.data.to_dict(), card.text


def _linked(text: str, copied: Collection[str]) -> str:
    """The same text without links to files that are not there."""

    def link(match: re.Match[str]) -> str:
        target = match[3].partition("#")[0]
        stays = not target or "://" in target or target.startswith("mailto:") or _normal(target) in copied
        return match[0] if stays else match[2]

    return LINK.sub(link, text)


def _normal(path: str) -> str:
    return PurePosixPath(path.removeprefix("./")).as_posix()
