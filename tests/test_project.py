"""What stands in more than one file of the project agrees: versions, targets, interpreters."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import trajkern as tk

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def test_the_version_is_one() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", tk.__version__)
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == tk.__version__
    headings = re.findall(r"^## (\S+)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert headings[0] == tk.__version__ and len(headings) == len(set(headings))


def test_hooks_run_the_versions_of_make_lint() -> None:
    lock = dict(re.findall(r"^([\w-]+)==([^;\s]+)", (ROOT / "requirements/lock.txt").read_text(), flags=re.M))
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    revisions = {repo["repo"].rpartition("/")[2]: repo["rev"].removeprefix("v") for repo in repos}
    assert revisions == {"ruff-pre-commit": lock["ruff"], "mirrors-clang-format": lock["clang-format"]}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_call_what_there_is(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    called = set(re.findall(r"\bmake (\w[\w-]*)", " ".join(step.get("run", "") for step in steps)))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert called <= targets
    named = re.findall(r"\btests/[\w/]+\.py", " ".join(step.get("run", "") for step in steps))
    assert all((ROOT / name).is_file() for name in named)
    assert workflow["permissions"] == {"contents": "read"}


def test_interpreters_of_the_wheels_are_those_of_the_classifiers() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    classified = re.findall(r'"Programming Language :: Python :: 3\.(\d+)"', project)
    (wheels,) = re.findall(r'^build = "(.*)"$', project, flags=re.M)
    assert [f"cp3{minor}-*" for minor in classified] == wheels.split()
    matrix = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["test"]["strategy"]["matrix"]
    assert len(matrix["python"]) == 3 and {version.split(".")[1] for version in matrix["python"]} <= set(classified)
    (oldest,) = re.findall(r'requires-python = ">=3\.(\d+)"', project)
    assert classified[0] == oldest


def test_what_only_the_owner_knows_is_left_to_the_owner() -> None:
    """A blank says so where it stands; no address is made up."""
    files = ["pyproject.toml", "CITATION.cff", ".github/workflows/wheels.yml", ".github/ISSUE_TEMPLATE/config.yml"]
    assert all("# OWNER: " in (ROOT / name).read_text() for name in files)
    assert "project.urls" not in re.sub(r"^#.*$", "", (ROOT / "pyproject.toml").read_text(), flags=re.M)
