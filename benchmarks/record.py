"""What a file of results says beside its rows: which GPU, torch and command, and which sources of the kernels; and the
arguments that the benchmarks share."""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import figures
import torch

ROOT = Path(__file__).resolve().parent.parent


def csrc_tree() -> str | None:
    """`git rev-parse HEAD:csrc`, "+changes" behind it where csrc differs from HEAD; None outside of a git checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD:csrc") + ("+changes" if git("status", "--porcelain", "csrc") else "")
    except (FileNotFoundError, subprocess.CalledProcessError):  # no git, no checkout
        return None


def natural(text: str, minimum: int = 0) -> int:
    """For argparse, as `positive` is."""
    number = int(text)
    if number < minimum:
        raise argparse.ArgumentTypeError(f"must be {minimum} or more, got {text}")
    return number


def positive(text: str) -> int:
    return natural(text, 1)


def add_text_argument(parser) -> None:
    def existing_file(text: str) -> Path:
        if not Path(text).is_file():
            raise argparse.ArgumentTypeError(f"no such file: {text}")
        return Path(text)

    parser.add_argument(
        "--text", nargs="+", type=existing_file, default=[], metavar="FILE",
        help="further kinds of text, UTF-8: a novel, say",
    )  # fmt: skip


def add_arguments(parser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw them here (PNG; needs matplotlib)")
    add_csrc_tree_argument(parser)


def add_csrc_tree_argument(parser) -> None:
    parser.add_argument(
        "--csrc-tree", help="`git rev-parse HEAD:csrc` of the code that runs, where this checkout cannot tell"
    )


def environment(device: str, csrc_tree_given: str | None) -> dict:
    """`device`: "cuda" or "cpu", what was timed."""
    return {
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "command": "python " + " ".join(sys.argv),
        "csrc_tree": csrc_tree_given or csrc_tree() or "unknown",
    }


def save(path: Path, record: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1)
    text = re.sub(r'\[[^][{}"]*\]', lambda numbers: " ".join(numbers[0].split()), text)  # a list of numbers: a line
    path.write_text(text + "\n")


def finish(args, device: str, results: dict) -> None:
    """Writes and draws what the arguments of `add_arguments` ask for."""
    results = environment(device, args.csrc_tree) | results
    if args.json:
        save(args.json, results)
    if args.figure:
        figures.draw(results, args.figure)
