"""quest-ops info: what is installed, what runs where, and what is wrong."""

from __future__ import annotations

import argparse

DESCRIPTION = """\
Prints versions, devices, the architectures that were built, which kernels each device runs and why, and what is wrong.
Exit code 0 where all devices can be used (a machine without a GPU: the CPU), 1 where there is a GPU that cannot be.
"""


def add_arguments(_: argparse.ArgumentParser) -> None:
    """There are none."""


def run(_: argparse.Namespace) -> int:
    from quest_ops.info import find_problems, inspect_system, report

    system = inspect_system()
    print(report(system))
    return 1 if find_problems(system) else 0
