"""The README tells the truth about the example, the commands and the environment variables."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from quest_ops.cli import COMMANDS as COMMAND_MODULES
from quest_ops.cli import build_parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLE = ROOT / "examples/decode_loop.py"


def test_the_example_is_the_file():
    assert re.findall(r"```python\n(.*?)```", README, re.DOTALL) == [EXAMPLE.read_text()]


COMMANDS = re.findall(r"^quest-ops (.*?)(?: +#.*)?$", README, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_exist(command):
    build_parser().parse_args(shlex.split(command))


def test_it_names_commands():
    assert {command.split()[0] for command in COMMANDS} == set(COMMAND_MODULES)


def test_every_environment_variable_is_in_its_table():
    table = set(re.findall(r"`([A-Z_]{6,})(?:=1)?`", README))
    sources = [ROOT / "setup.py", *ROOT.glob("csrc/**/*.cpp"), *ROOT.glob("quest_ops/**/*.py")]
    calls = r"""(?:environ(?:\.get\(|\[)|getenv\()["']([A-Z_]+)["']"""
    read = {name for source in sources for name in re.findall(calls, source.read_text())}
    assert "QUEST_OPS_DEVICE" in read and "QUEST_OPS_CPU_CAPABILITY" in read
    assert read - {"PATH"} <= table, f"not in the README: {read - table}"
    assert {name for name in table if name.startswith("QUEST_OPS_")} <= read


def test_its_links_lead_somewhere():
    links = re.findall(r"\]\(((?!https?:)[^)]+)\)", README)
    assert links and [link for link in links if not (ROOT / link).exists()] == []


def test_make_help_names_every_target():
    if not (make := next((p for p in os.get_exec_path() if os.access(f"{p}/make", os.X_OK)), None)):
        pytest.skip("needs make")
    shown = subprocess.run([f"{make}/make", "help"], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert set(re.findall(r"^make (\w+)", shown, re.MULTILINE)) == set(targets) - {"help"}
