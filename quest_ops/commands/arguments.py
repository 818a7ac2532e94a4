"""Arguments that several commands take, and the texts that they name."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from quest_ops.config import BOUNDS, QuestConfig


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="smollm2",
        help='"smollm2", a GGUF file, a Hugging Face folder or a hub id "owner/name" (default: %(default)s)',
    )


def add_budget(parser: argparse._ActionsContainer, default: int) -> None:
    parser.add_argument(
        "--token-budget", type=int, default=default, help="tokens a Quest step reads (default: %(default)s)"
    )


def add_bound(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bound", choices=BOUNDS, default=QuestConfig.bound, help="a page's metadata (default: %(default)s)"
    )
    scale = QuestConfig.bound_scale
    parser.add_argument("--bound-scale", type=float, default=scale, help="on its deviation (default: %(default)s)")


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help='"cpu", "cuda", "cuda:1" (default: a GPU if there is one)')


def read_prompt(file: str) -> str:
    return read_stdin() if file == "-" else read_text(Path(file))


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def read_stdin() -> str:
    if sys.stdin is None:
        raise ValueError("--prompt-file -: stdin is closed")
    sys.stdin.reconfigure(encoding="utf-8", errors="strict")  # whatever the locale
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"stdin is not UTF-8 text: {error}") from error


def need_extra() -> None:
    try:
        import gguf  # noqa: F401
        import matplotlib  # noqa: F401
        import rich  # noqa: F401
        import tokenizers  # noqa: F401
    except ImportError as error:
        raise ImportError(f'{error.name} is not installed: pip install "quest_ops[llama]"') from error
