"""Which room may import which: no cycle, and each as far from the command line as what it needs."""

import ast
from pathlib import Path

import pytest

import skipless

SOURCE = Path(skipless.__file__).parent
# Each imports those before it alone; rooms in one line do not know each other.
LEVELS = (
    {"bundled", "dtypes", "errors", "quiet", "version"},
    {"architecture", "log", "model"},
    {"algebra", "checkpoint"},
    {"inference", "removals"},
    {"rewrite"},
    {"reports"},
    {"serving", "train"},
    {"cli"},
    {"__main__"},
)
# What a room keeps free of, so that counting starts at once and a checkpoint's model file runs anywhere.
WITHOUT = {
    "architecture": {"torch", "transformers", "safetensors", "pathlib"},
    "errors": {"torch"},
    "dtypes": {"torch"},
}


def imported(file):
    """The modules that a file imports, wherever in it, names from packages as modules of their own."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        if isinstance(node, ast.ImportFrom) and not node.level:  # of the model's two files, one imports the other
            yield from (f"{node.module}.{name.name}" for name in node.names)


def room(file):
    return file.relative_to(SOURCE).with_suffix("").parts[0]


FILES = sorted(file for file in SOURCE.rglob("*.py") if file != SOURCE / "__init__.py")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_a_room_imports_what_stands_below_it(file):
    (level,) = (number for number, rooms in enumerate(LEVELS) if room(file) in rooms)
    below = set().union(*LEVELS[:level], {room(file)})
    for name in imported(file):
        package, *parts = name.split(".")
        if package == "skipless" and parts and (parts[0] not in skipless.__all__ or room(file) != "cli"):
            assert parts[0] in below, name
        assert package not in WITHOUT.get(room(file), ()), name


@pytest.mark.parametrize("file", sorted((SOURCE / "model").glob("*_skipless.py")), ids=lambda file: file.name)
def test_the_files_that_travel_stand_alone(file):
    assert not [name for name in imported(file) if name.startswith("skipless.")]


def test_no_module_hides_a_public_function():
    assert not {file.stem for file in SOURCE.iterdir()} & {"audit", "count", "fuse", "verify"}


def test_no_module_imports_itself_through_others():
    files = {".".join(("skipless", *file.relative_to(SOURCE).with_suffix("").parts)): file for file in FILES}
    files = {name.removesuffix(".__init__"): file for name, file in files.items()}

    def module(name):
        """The longest part of a dotted name that is a module."""
        return max((each for each in files if f"{name}.".startswith(f"{each}.")), key=len, default=None)

    needs = {name: set(map(module, imported(file))) - {name, None} for name, file in files.items()}
    while ready := [name for name, others in needs.items() if not others & needs.keys()]:
        for name in ready:
            del needs[name]
    assert not needs


def test_every_room_says_what_it_is_for_and_the_page_about_them_names_each():
    page = (SOURCE.parents[1] / "docs" / "architecture.md").read_text()
    for rooms in LEVELS:
        for name in rooms - {"__main__"}:
            assert f"{name}/" in page or f"`{name}`" in page
            file = SOURCE / name / "__init__.py" if (SOURCE / name).is_dir() else SOURCE / f"{name}.py"
            assert ast.get_docstring(ast.parse(file.read_text()))
