"""What the site has beside docs/: pages of the repository, reference made from the code, and what its pages run."""

import dataclasses
import io
import json
import os
import posixpath
import re
import zipfile
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from skipless import __version__

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
# Pages of the site that stand elsewhere in the repository.
ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "CODE_OF_CONDUCT.md": "conduct.md",
}
# What the public API is (skipless.__all__), and where it comes from; then what else a program may want.
API = (
    "skipless.reports.auditing.audit", "skipless.rewrite.fusion.fuse", "skipless.reports.verification.verify",
    "skipless.reports.counting.count", "skipless.serving.export.export", "skipless.serving.decoding.prepare_decoding",
    "skipless.reports.auditing.Audit", "skipless.rewrite.planning.Plan", "skipless.reports.verification.Report",
    "skipless.reports.counting.Count", "skipless.errors.InputError",
)  # fmt: skip
# What pages run in a browser; `make pages` does without, and those of its pages do not run.
FETCHED = HERE / "node_modules"
# Of the npm registry's pyodide.
PYODIDE = ("pyodide.mjs", "pyodide.asm.mjs", "pyodide.asm.wasm", "pyodide-lock.json", "python_stdlib.zip")
# Of its transformers.js, and of the ONNX Runtime that this brings.
TRANSFORMERS_JS = (
    "@huggingface/transformers/dist/transformers.min.js",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.mjs",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm",
)
# The demo's models, which make has exported.
MODELS = HERE / "models"

LINK = re.compile(r"\[([^\[\]]+)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Each page says which version it is of; where mike builds it beside others, its reader can choose another."""
    config.copyright = f"skipless {__version__}"
    if "MIKE_DOCS_VERSION" in os.environ:
        config.extra["version"] = {"provider": "mike"}
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add them to what is in docs/."""
    for source, page in ELSEWHERE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=_relinked(text, source, config)))
    for page, text in pages().items():
        files.append(File.generated(config, page, content=text))
    beside = {f"counter/{name}": FETCHED / "pyodide" / name for name in PYODIDE}
    beside |= {f"demo/{posixpath.basename(name)}": FETCHED / name for name in TRANSFORMERS_JS}
    models = (file for suffix in ("json", "onnx", "onnx_data") for file in MODELS.glob(f"*/**/*.{suffix}"))
    beside |= {f"demo/{file.relative_to(MODELS)}": file for file in models}
    beside |= {f"{name}/{name}.mjs": HERE / f"{name}.mjs" for name in ("counter", "demo")}
    beside["style.css"] = HERE / "style.css"
    for name, file in beside.items():
        if file.exists():
            files.append(File.generated(config, name, abs_src_path=str(file)))
    files.append(File.generated(config, "counter/skipless.zip", content=bundle()))
    return files


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Links from docs/ into the repository."""
    return markdown if page.file.generated_by else _relinked(markdown, f"docs/{page.file.src_uri}", config)


def _relinked(markdown: str, file: str, config: MkDocsConfig) -> str:
    """A file of the repository as a page: its links to pages lead there, others into the repository. While mkdocs.yml
    has no repo_url, words that are the end of the path stand for these, and others have the path beside them.
    """
    here = posixpath.dirname(ELSEWHERE.get(file, file.removeprefix("docs/")))

    def link(found: re.Match[str]) -> str:
        words, target, anchor = found.groups(default="")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(file), target))
        if path in ELSEWHERE or path.startswith("docs/"):
            return f"[{words}]({posixpath.relpath(ELSEWHERE.get(path, path.removeprefix('docs/')), here)}{anchor})"
        if config.repo_url:
            return f"[{words}]({config.repo_url.rstrip('/')}/blob/main/{path}{anchor})"
        return f"`{words.strip('`')}`" if path.endswith(words.strip("`/")) else f"{words}, `{path}`"

    return LINK.sub(link, markdown)


def pages() -> dict[str, str]:
    """The pages that are made from the code, by name."""
    return {
        "reference/command-line.md": "\n".join(command_line()),
        "reference/config.md": "\n".join(config_fields()),
        "reference/python.md": "\n".join(python()),
        "reference/families.md": "\n".join(families()),
    }


def command_line() -> Iterator[str]:
    """Every command's own help."""
    from skipless.cli import main

    yield "# Command line\n"
    widths = {"terminal_width": 76, "max_content_width": 76}  # as wide as a block of a page
    context = click.Context(main, info_name="skipless", **main.context_settings, **widths)
    yield f"```text\n{main.get_help(context)}\n```\n"
    for name in main.list_commands(context):
        command = main.commands[name]
        inside = click.Context(command, parent=context, info_name=name, **widths)
        yield f"## skipless {name}\n\n```text\n{command.get_help(inside)}\n```\n"


def config_fields() -> Iterator[str]:
    """The fields of a skipless config.json: type, default, values."""
    from skipless.architecture.config import BOOKKEEPING, FOREIGN, VALUES, Architecture

    yield "# Fields of config.json\n"
    yield "What each means: [the model](../model.md). A field or value that is not here is an error.\n"
    yield "| field | type | default | values |\n|---|---|---|---|"
    for field in dataclasses.fields(Architecture):
        if field.name not in FOREIGN:
            several = field.default if field.default and isinstance(field.default, tuple) else (field.default,)
            default = "" if field.default is dataclasses.MISSING else _values(several)
            yield f"| `{field.name}` | {_type(field.type)} | {default} | {_values(VALUES.get(field.name, ()))} |"
    yield "\n## Fields that change neither tensors nor seams\n\n| field | type |\n|---|---|"
    for name, kind in BOOKKEEPING.items():
        yield f"| `{name}` | {_type(kind)} |"


def _values(values: Iterable[Any]) -> str:
    return ", ".join(f"`{json.dumps(value)}`" for value in values)


def _type(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return _values(get_args(kind))
    return f"`{getattr(kind, '__name__', kind) if not getattr(kind, '__args__', ()) else kind}`"


def python() -> Iterator[str]:
    """The public functions and what they give, by their docstrings."""
    yield "# Python\n\n`import skipless` gives `audit`, `count`, `fuse`, `verify` and `InputError`.\n"
    yield from (f"::: {name}\n" for name in API)


def families() -> Iterator[str]:
    """Every family that is described, and the known models of each."""
    from skipless.checkpoint import family
    from skipless.reports.counting import count, table

    yield "# Families\n\nWhat `count` and `audit` read ([more](../families.md)); and the names that `count` knows.\n"
    yield "| family | known names |\n|---|---|"
    known: dict[str, list[str]] = {}
    for name in table()["models"]:
        known.setdefault(count(name).family, []).append(name)
    described = {name for each in family.every() for name in each.model_types}
    for name in sorted({*known, *described}):
        yield f"| `{name}` | {', '.join(known.get(name, []))} |"


def bundle() -> bytes:
    """What counts, without torch: skipless's own modules, click and rich, for a Python in the browser."""
    found = io.BytesIO()
    with zipfile.ZipFile(found, "w", zipfile.ZIP_DEFLATED) as archive:
        for package, skipped in (("skipless", ("stdlib", "page")), ("click", ()), ("rich", ())):
            folder = Path(import_module(package).__file__ or "").parent
            for file in sorted([*folder.rglob("*.py"), *folder.rglob("models.json")]):
                if not {*skipped} & {*file.parts}:
                    archive.writestr(zipfile.ZipInfo(f"{package}/{file.relative_to(folder)}"), file.read_bytes())
        archive.writestr(zipfile.ZipInfo("safetensors.py"), STAND_IN)
    return found.getvalue()


# A config.json has no tensors: headers are never read in a browser.
STAND_IN = '''class SafetensorError(Exception):
    """What is never raised."""


def safe_open(*arguments, **options):
    """What is never called."""
    raise NotImplementedError
'''
