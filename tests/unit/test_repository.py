"""What stands around the code agrees with it: versions, forms, workflows, the package's metadata."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from trove_classifiers import classifiers

import skipless

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TARGETS = set(" ".join(re.findall(r"^([\w -]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)).split())

sys.path.insert(0, str(ROOT / "tools"))
import locks  # noqa: E402
import pictures  # noqa: E402
import versions  # noqa: E402


def test_the_page_of_versions_is_what_the_metadata_and_the_locks_say():
    page = versions.PAGE.read_text()
    assert page == versions.written(page), "make versions"
    release = re.search(r"^transformers==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)[1]
    assert f"| transformers | | >=5.5, <6 | {release} |" in page
    names = re.findall(r"^\| ([\w-]+) \| (?:`\w+`)? ?\|", page, re.MULTILINE)
    extras = PYPROJECT["project"]["optional-dependencies"].values()
    assert len(names) == 1 + len(PYPROJECT["project"]["dependencies"]) + sum(map(len, extras))
    assert "| - |" not in page


def test_renewed_locks_keep_what_is_changed_by_hand():
    old = "# why\ntorch==2.0+cpu \\\n    --hash=sha256:aa\nzlib==1 ; sys_platform == 'linux' \\\n    --hash=sha256:bb\n"
    new = "torch==2.0 \\\n    --hash=sha256:cc\nzlib==1 \\\n    --hash=sha256:dd\n"
    assert locks.merged(old, new, resolved=False) == old.replace("bb", "dd")
    assert locks.merged(old, new, resolved=True) == old.replace("bb", "dd").replace(" ; sys_platform == 'linux'", "")
    assert "triton" not in locks.merged(old, f"{new}triton==3 \\\n    --hash=sha256:ee\n", resolved=True)


def test_ruff_is_one_release():
    release = re.search(r"^ruff==\S+", (ROOT / "requirements.lock").read_text(), re.MULTILINE)[0]
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["additional_dependencies"] for hook in repository["hooks"]] == [[release], [release]]


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == skipless.__version__
    assert citation["license"] == PYPROJECT["project"]["license"]
    assert [author["name"] for author in citation["authors"]] == [
        each["name"] for each in PYPROJECT["project"]["authors"]
    ]


def test_the_package_is_typed_and_its_classifiers_exist():
    assert (Path(skipless.__file__).parent / "py.typed").exists()
    assert set(PYPROJECT["project"]["classifiers"]) <= classifiers


def test_workflows_run_what_there_is():
    runs = []
    for file in (ROOT / ".github" / "workflows").iterdir():
        workflow = yaml.safe_load(file.read_text())
        assert workflow["permissions"] == {"contents": "read"}
        for job in workflow["jobs"].values():
            assert job["timeout-minutes"]
            runs += [step["run"] for step in job["steps"] if "run" in step]
    assert ".ci/run" in runs
    made = {run.split()[1] for run in runs if run.startswith("make ")}
    assert {"wheel", "publish"} <= made <= TARGETS


def test_the_makefile_uses_no_variable_that_it_does_not_have():
    options = ["--warn-undefined-variables", "--dry-run", "PUSH=", "UPGRADE="]
    done = subprocess.run(["make", *options, *TARGETS], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "undefined variable" not in done.stderr


@pytest.mark.parametrize("file", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").iterdir()), ids=lambda file: file.name)
def test_an_issue_form_is_one(file):
    form = yaml.safe_load(file.read_text())
    if file.name == "config.yml":
        assert form.keys() == {"blank_issues_enabled"}
        return
    assert {"name", "description", "body"} <= form.keys()
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "CODE_OF_CONDUCT.md", "SECURITY.md", "docs/versions.md"])
def test_a_page_names_files_tests_and_targets_that_exist(page):
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert ((ROOT / page).parent / link).exists(), link
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE):
        assert target in TARGETS, target
    for file, test in re.findall(r"(tests/\w+/\w+\.py): `(\w+)`", text):
        assert f"def {test}(" in (ROOT / file).read_text()


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_a_picture_is_what_the_code_draws(name):
    drawn = pictures.PICTURES[name]()
    assert (pictures.FOLDER / name).read_text(encoding="utf-8") == drawn, "make pictures"
    assert ElementTree.fromstring(drawn).tag.endswith("svg")
    pages = {page.stem for page in (ROOT / "docs").glob("*.md") if f"(pictures/{name})" in page.read_text()}
    assert "pictures" in pages, "all of them in one place"
    assert len(pages) > 1, "and each beside what it shows"


def test_every_page_has_its_place_in_the_sites_navigation():
    listed = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert {file.name for file in (ROOT / "docs").glob("*.md")} <= set(listed)
    assert len(listed) == len(set(listed))
