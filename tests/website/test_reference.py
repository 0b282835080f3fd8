"""The site's reference has what the code has."""

import dataclasses
import html
from pathlib import Path

import pytest

import skipless
from skipless import cli
from skipless.architecture.config import FOREIGN, Architecture
from skipless.checkpoint import family
from tests.browser import pages

SITE = Path(__file__).parents[2] / "site"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not SITE.exists(), reason="needs the site: make test-site")]


def page(name):
    return html.unescape((SITE / "reference" / f"{name}.html").read_text())


def test_every_command_and_option():
    text = page("command-line")
    for name, command in cli.main.commands.items():
        assert f"skipless {name}" in text
        for parameter in command.params:
            assert all(option in text for option in parameter.opts if option.startswith("-"))


def test_every_field_of_a_config():
    text = page("config")
    for field in dataclasses.fields(Architecture):
        assert (f"<code>{field.name}</code>" in text) == (field.name not in FOREIGN)
    assert "<code>float | int | None</code>" in text


def test_every_public_function_and_its_arguments():
    text = page("python")
    for name in {*skipless.__all__} - {"__version__"}:
        assert f".{name}" in text
    assert "parallel_removes" in text


def test_each_page_says_which_version_it_is_of():
    for file in pages(SITE):
        assert f"skipless {skipless.__version__}" in file.read_text(), file


def test_every_family():
    text = page("families")
    assert all(f"<code>{name}</code>" in text for each in family.every() for name in each.model_types)
    assert "mistral-nemo-12b" in text
