"""quest-ops demo: dense and Quest attention side by side on a long text."""

from __future__ import annotations

import argparse
from pathlib import Path

from quest_ops.commands.arguments import add_budget, add_device, need_extra, read_text

DESCRIPTION = """\
SmolLM2-135M reads the beginning of a long text (Python's language reference) with a pass key hidden in the
middle and is asked for the key, with dense and with Quest attention. Prints a table, and draws which pages Quest chose.

  quest-ops demo
  quest-ops demo --tokens 7000 --token-budget 512         a longer text, a smaller budget: see when it fails
  quest-ops demo --text book.txt --out book.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=4000, help="length of the prompt (default: %(default)s)")
    add_budget(parser, 1024)
    parser.add_argument("--text", type=Path, metavar="FILE", help="another text, UTF-8")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens to generate (default: %(default)s)")
    add_device(parser)
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="the picture (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    need_extra()
    from quest_ops import demo
    from quest_ops.info import choose_device

    text = demo.default_text() if args.text is None else read_text(args.text)
    demo.run(
        tokens=args.tokens,
        token_budget=args.token_budget,
        text=text,
        new_tokens=args.new_tokens,
        device=choose_device(args.device),
        out=args.out,
    )
    return 0
