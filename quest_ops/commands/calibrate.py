"""quest-ops calibrate: a budget for each layer and KV head, measured on a text."""

from __future__ import annotations

import argparse
from pathlib import Path

from quest_ops.commands.arguments import add_bound, add_device, add_model, need_extra, read_text
from quest_ops.config import QuestConfig

DESCRIPTION = """\
Shares out a token budget among the layers and KV heads of a model: as many bytes in all, given where they lower the
error of the attention output most, as measured on a text. Writes JSON, for `generate --head-budgets FILE` and
QuestConfig.with_head_budgets.

  quest-ops calibrate --text book.txt --token-budget 512 --out budgets.json
  quest-ops calibrate --text book.txt --token-budget 512 --page-size 16 --bound minmax
  quest-ops calibrate --model ~/models/Qwen2.5-7B-Instruct --device cuda --text book.txt --context 16384
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="UTF-8; like what will be read")
    parser.add_argument(
        "--token-budget", type=int, default=QuestConfig.token_budget, help="of a head on average (default: %(default)s)"
    )
    parser.add_argument("--page-size", type=int, default=QuestConfig.page_size, help="default: %(default)s")
    add_bound(parser)
    parser.add_argument(
        "--recent-tokens", type=int, default=QuestConfig.recent_tokens, help="always attended to (default: %(default)s)"
    )
    parser.add_argument(
        "--context", type=int, metavar="TOKENS", help="before what is decoded (default: 8 budgets, or what there is)"
    )
    parser.add_argument("--windows", type=int, default=4, help="pieces of the text (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=64, help="tokens decoded in each (default: %(default)s)")
    add_device(parser)
    parser.add_argument("--out", type=Path, default=Path("budgets.json"), help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    need_extra()
    from quest_ops.calibration import calibrate
    from quest_ops.head_budgets import HeadBudgets
    from quest_ops.info import choose_device
    from quest_ops.llama.model import Llama
    from quest_ops.progress import ProgressBars

    quest = QuestConfig(
        page_size=args.page_size,
        token_budget=args.token_budget,
        recent_tokens=args.recent_tokens,
        bound=args.bound,
        bound_scale=args.bound_scale,
    )
    for name in ("windows", "steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    text = read_text(args.text)
    if not args.out.parent.is_dir():
        raise FileNotFoundError(f"--out {args.out}: there is no folder {args.out.parent}")
    with ProgressBars() as bars:
        progress = bars.bytes("loading the model")
        model, tokenizer = Llama.load(args.model, device=choose_device(args.device), progress=progress)
        tokens = tokenizer.encode(text)
        context = args.context
        if context is None:
            longest = min(model.config.max_position_embeddings, len(tokens) // args.windows) - args.steps
            context = max(min(8 * args.token_budget, longest), 1)
        sizes = {"context": context, "windows": args.windows, "steps": args.steps}
        found = calibrate(model, tokens, quest, **sizes, progress=bars.phases("attention"))
    budget = quest.page_budget * quest.page_size
    HeadBudgets(
        model=Path(args.model).name,
        page_size=quest.page_size,
        sink_tokens=quest.sink_tokens,
        recent_tokens=quest.recent_tokens,
        bound=quest.bound,
        bound_scale=quest.bound_scale,
        token_budget=budget,
        tokens=found.tokens,
    ).save(args.out)
    every = [tokens for heads in found.tokens for tokens in heads]
    print(
        f"{args.out}: {min(every)} to {max(every)} tokens for {len(every)} heads, {budget} on average\n"
        f"error of a layer's attention output after {context} tokens: {found.uniform_error:.3f} with {budget} tokens "
        f"for each head, {found.error:.3f} expected with these"
    )
    return 0
