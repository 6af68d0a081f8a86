"""The README keeps its word: its code runs, its commands and files exist, its counts are right."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_house import PACKAGE, code_lines

from minisimclr.cli import COMMANDS
from minisimclr.compare import markdown

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.S))
def test_python_blocks_run(code):
    exec(compile(code, "README.md", "exec"), {})


def test_commands_exist():
    named = set(re.findall(r"(?:`|&& |^|reference )minisimclr ([a-z]+)", README, re.M))
    assert {"train", "report", "compare"} <= named <= set(COMMANDS), named


def test_linked_files_exist():
    links = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_counts_of_code_lines_are_right():
    rows = re.findall(r"^\| \[`(\S+)`\]\S+ \|.*\| (\d+) \|$", README, re.M)
    assert len(rows) >= 8
    for name, said in rows:
        path = PACKAGE / name
        files = sorted(path.glob("*.py")) if path.is_dir() else [path]
        count = sum(code_lines(f.read_text("utf-8")) for f in files)
        assert count == int(said), name


def test_results_are_those_of_the_file():
    results = json.loads((ROOT / "docs" / "results.json").read_text())
    page = (ROOT / "docs" / "results.md").read_text("utf-8")
    blocks = markdown(results).split("\n\n")
    assert len(blocks) == 3 and all(block in page for block in blocks)
    shown = re.findall(r"^\| (.*?) \| (\w+) \| .* \| ([\d.]+)% \|$", README, re.M)
    rows = {(r["system"], r["method"]): r for r in results["rows"] if r["status"] == "measured"}
    assert len(shown) >= 6
    for system, method, top1 in shown:
        assert f"{rows[system, method]['top1']:.1%}" == f"{top1}%", (system, method)


@pytest.mark.skipif(os.name == "nt" or not shutil.which("bash"), reason="has no shell to run it")
def test_the_test_command_is_the_one_that_ci_runs():
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    (line,) = re.findall(r"^test_command=.*", script, re.M)
    assert re.search(r'^bash .*-c "\$test_command --numprocesses=2"$', script, re.M)
    command = ["bash", "-euo", "pipefail", "-c", f'{line}; echo "$test_command"']
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert found == 'pip install -e ".[test]" && python -m pytest\n'
