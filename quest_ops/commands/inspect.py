"""quest-ops inspect: which pages Quest chooses in a text, and what they miss."""

from __future__ import annotations

import argparse
from pathlib import Path

from quest_ops.commands.arguments import add_bound, add_budget, add_device, add_model, need_extra, read_prompt
from quest_ops.config import NARROW_METADATA, QuestConfig

DESCRIPTION = """\
Reads a prompt with dense attention, decodes greedily with Quest, and draws into a folder which pages it chooses by
layer, head and step (pages.png), which share of the true attention mass they miss, and the relative error of the
attention's output, by layer, against dense attention of the same queries to the same cache (fidelity.png). Prints a
table by layer; inspect.json has the numbers by layer and head.

  quest-ops inspect --prompt-file report.txt --out look
  quest-ops inspect --prompt-file report.txt --token-budget 256 --page-size 16 --metadata 16 --out coarser
  cat report.txt | quest-ops inspect --prompt-file - --bound minmax --out bounds
  quest-ops inspect --model ~/models/Qwen2.5-7B-Instruct --device cuda --prompt-file report.txt --out qwen
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--prompt-file", metavar="FILE", required=True, help='UTF-8 text; "-": stdin')
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder for pictures and numbers")
    add_budget(parser, 512)
    parser.add_argument(
        "--page-size", type=int, default=QuestConfig.page_size, help="tokens a page (default: %(default)s)"
    )
    add_bound(parser)
    parser.add_argument(
        "--metadata",
        choices=("16", "8", "4"),
        default="4",
        help="its bits; 16: as the cache's dtype (default: %(default)s)",
    )
    parser.add_argument("--new-tokens", type=int, default=32, help="decode steps to look at (default: %(default)s)")
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    need_extra()
    from quest_ops import inspection_report
    from quest_ops.info import choose_device

    quest = QuestConfig(
        token_budget=args.token_budget,
        page_size=args.page_size,
        bound=args.bound,
        bound_scale=args.bound_scale,
        metadata_dtype=None if args.metadata == "16" else NARROW_METADATA[int(args.metadata)],
    )
    inspection_report.run(
        model=args.model,
        text=read_prompt(args.prompt_file),
        quest=quest,
        new_tokens=args.new_tokens,
        device=choose_device(args.device),
        out=args.out,
    )
    return 0
