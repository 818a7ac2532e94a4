"""quest-ops generate: text from a model, with any attention."""

from __future__ import annotations

import argparse
from pathlib import Path

from quest_ops.commands.arguments import add_budget, add_device, add_model, need_extra, read_prompt
from quest_ops.config import QuestConfig

DTYPES = ("auto", "float32", "bfloat16", "float16")
WEIGHTS = ("bf16", "int8", "int4")
ATTENTIONS = ("quest", "dense", "sdpa", "flashinfer")

DESCRIPTION = """\
Continues a prompt: text to stdout as it comes, statistics to stderr.

  quest-ops generate --prompt "Once upon a time" --max-new-tokens 64
  quest-ops generate --chat --prompt "What is a KV cache?" --temperature 0.7 --top-p 0.9 --seed 1
  quest-ops generate --prompt-file report.txt --token-budget 512
  cat report.txt | quest-ops generate --prompt-file - --attention dense
  quest-ops generate --model ~/models/Qwen2.5-7B-Instruct --device cuda --weights int4 --prompt-file report.txt

Quest's pages have the size that suits prompt and new tokens together, and the budget is smaller or larger as their
metadata takes more or fewer bytes (QuestConfig.for_context); with --budget-ratio or --select-every they are of 8.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT")
    prompt.add_argument("--prompt-file", metavar="FILE", help='UTF-8 text; "-": stdin')
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's message: use the chat template")
    parser.add_argument("--attention", choices=ATTENTIONS, default="quest", help="default: %(default)s")
    budget = parser.add_mutually_exclusive_group()
    add_budget(budget, QuestConfig.token_budget)
    budget.add_argument("--head-budgets", type=Path, metavar="FILE", help="by layer and head, from quest-ops calibrate")
    parser.add_argument(
        "--budget-ratio", type=float, metavar="SHARE", help="of the context, where that is more than the budget"
    )
    parser.add_argument(
        "--select-every", type=int, default=1, metavar="N", help="choose pages in every N-th step (default: in each)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="default: %(default)s")
    parser.add_argument("--seed", type=int, help="of sampling (default: another one each time)")
    add_device(parser)
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="default: what is fast on the device")
    parser.add_argument(
        "--weights",
        choices=WEIGHTS,
        help="of the layers, rounded at load (default: as --dtype, or a checkpoint's own 4 bits)",
    )
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile decode steps: worth its seconds for many tokens on a GPU"
    )


def run(args: argparse.Namespace) -> int:
    need_extra()
    import torch
    from rich.console import Console

    from quest_ops.info import choose_device
    from quest_ops.llama.generate import Generator
    from quest_ops.llama.model import Llama
    from quest_ops.llama.sampling import check_sampling
    from quest_ops.progress import ProgressBars

    settings = {"budget_ratio": args.budget_ratio, "select_every": args.select_every}
    if args.head_budgets is None:
        quest = QuestConfig(token_budget=args.token_budget, **settings)
    else:
        quest = QuestConfig.with_head_budgets(args.head_budgets, **settings)
    text = read_prompt(args.prompt_file) if args.prompt is None else args.prompt
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")
    check_sampling(args.temperature, args.top_p, args.seed)
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    with ProgressBars() as bars:
        model, tokenizer = Llama.load(
            args.model,
            dtype=dtype,
            weights=args.weights,
            device=choose_device(args.device),
            progress=bars.bytes("loading the model"),
        )
        if args.chat:
            prompt = tokenizer.encode(tokenizer.chat([{"role": "user", "content": text}]), add_special=False)
        else:
            prompt = tokenizer.encode(text)
        positions = model.config.max_position_embeddings
        if not 1 <= len(prompt) <= positions:
            raise ValueError(f"the prompt has {len(prompt)} tokens; this model takes 1 to {positions}")
        tokens = min(len(prompt) + args.max_new_tokens, positions)
        if args.head_budgets is None and args.budget_ratio is None and args.select_every == 1:
            quest = QuestConfig.for_context(tokens, args.token_budget)
        generator = Generator(
            model,
            attention=args.attention,
            quest=quest,
            max_sequence_tokens=tokens,
            compile=args.compile,
        )
        stream = tokenizer.stream()

        def write(_: int, token: int) -> None:
            bars.stop()
            print(stream.step(token), end="", flush=True)

        result = generator.generate(
            [prompt],
            args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed,
            on_token=write,
            progress=bars.phases(args.attention),
        )[0]
    print(stream.flush())
    lines = [
        f"{len(prompt)} prompt tokens in {result.prefill_seconds:.2f} s; {len(result.tokens)} new ones, ended by "
        f"{result.finish_reason}"
    ]
    if result.decode_steps:
        weights = args.weights or model.weights
        lines.append(
            f"{result.decode_seconds / result.decode_steps * 1e3:.2f} ms a token, {result.kv_read_share:.0%} of the KV "
            f"bytes read; {args.attention} attention, {weights} on {model.device}"
        )
    Console(stderr=True, highlight=False).print("\n".join(lines), style="dim", soft_wrap=True)
    return 0
