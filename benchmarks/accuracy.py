"""What Quest's selection of pages costs in accuracy, on the kernels that a decoder runs: a table for each command.

    python benchmarks/accuracy.py perplexity --json benchmarks/results/perplexity-h100.json --figure perplexity.png
    python benchmarks/accuracy.py passkey --quick
    python benchmarks/accuracy.py needles --quick --text novel.txt

A document is prefilled with dense attention, once for all policies; what follows it goes through decode steps, the
question as well as the answer, and keys and values that it appends are its own. policies.py lists the policies;
"metadata" is their bytes of metadata a token, the paper's being 1. The model's weights are as its file has them.
"budget" is that of a fixed one; "attended" the tokens that a row and KV head may attend to on average, which is more
for "equal bytes", another number at each context for "ratio", and about the budget for "top-p". "read", in the JSON:
these and the metadata, in tokens' K and V. Of several contexts the means stand below.

- perplexity: teacher-forced on real text. Loss in nats a token of dense attention, and how much more each policy has,
  with its standard error over the windows (of the same windows' differences).
- passkey: a number hidden at 10 depths of filler and of real texts.
- needles: 8 numbers under names in one text, and numbers in long lists of numbers.
  Both: the share found, by greedy decoding, of those that dense attention finds; by depth it is in the JSON.
- fidelity: decode steps of exact attention on real text, and what each policy makes of their queries and keys: the
  relative error of its output, with its standard error over the windows, and the share of the true attention mass that
  it keeps. fidelity.py defines them; by layer and head they are in the JSON. Only of policies that choose pages in
  every step.

Contexts beyond the model's positions need --rope, which stretches its rotary frequencies (longer.py).
"""

import argparse
import itertools
import os
from collections import Counter
from pathlib import Path

# Beside other work on the machine, threads that spin make a prefill on the CPU 10 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import record
import torch
from longer import METHODS, lengthen
from policies import ALL, POLICIES, Policy, calibrated
from tables import TABLES, over_contexts, show_means
from tasks import KINDS, texts_of

from quest_ops.llama.model import Llama

# (full, quick). pieces: of each kind of text. depths: pass keys or facts in a text. tokens: that follow a document.
DEFAULTS = {
    "perplexity": {
        "context": ((6656,), (3072,)), "budget": ((256, 512, 1024), (256, 512)), "pieces": (5, 2), "tokens": (512, 128),
    },
    "fidelity": {
        "context": ((6656,), (3072,)), "budget": ((256, 512, 1024), (256, 512)), "pieces": (5, 2), "tokens": (128, 64),
    },
    "passkey": {
        "context": ((2048, 4096, 7680), (2048,)), "budget": ((128, 256, 512, 1024), (128, 256)), "pieces": (2, 1),
        "depths": (10, 5),
    },
    "needles": {
        "context": ((6656,), (2048,)), "budget": ((256, 512, 1024), (256, 512)), "pieces": (8, 1), "depths": (8, 8),
    },
}  # fmt: skip


def compared(policies: list[Policy], budgets: list[int], files: list[Path]) -> list[tuple[Policy, int]]:
    """Policies and budgets, those of one cache layout together. Raises as `calibrated`, and for other budgets."""
    pairs = [(policy, budget) for policy in policies for budget in budgets]
    for file in files:
        policy, budget = calibrated(file)
        if budget not in budgets:
            raise ValueError(f"--head-budgets {file} is for a budget of {budget}, not of --budget {budgets}")
        pairs.append((policy, budget))
    for policy, budget in pairs:
        policy.config(budget)
    return sorted(pairs, key=lambda pair: (pair[0].page_size, pair[0].metadata_bits), reverse=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--quick", action="store_true", help="a small table on the CPU, within 5 minutes")
    parser.add_argument("--model", default="smollm2", help="a Hugging Face folder or hub id, or a .gguf file")
    record.add_text_argument(parser)
    parser.add_argument("--context", nargs="+", type=record.positive, metavar="TOKENS", help="of a document")
    parser.add_argument("--budget", nargs="+", type=record.positive, metavar="TOKENS")
    parser.add_argument(
        "--policy", nargs="+", choices=[p.name for p in ALL], metavar="NAME",
        help="default: all of POLICIES; with --quick those that choose pages in every step",
    )  # fmt: skip
    parser.add_argument("--pieces", type=record.positive, metavar="N", help="documents of each kind of text")
    parser.add_argument("--depths", type=record.positive, metavar="N", help="pass keys or facts of a text")
    parser.add_argument(
        "--rope", nargs=2, metavar=("METHOD", "FACTOR"),
        help=f"for FACTOR times the positions of the model, by {' or '.join(METHODS)}",
    )  # fmt: skip
    parser.add_argument(
        "--head-budgets", nargs="+", type=Path, default=[], metavar="FILE",
        help="rows with budgets by layer and head, of quest-ops calibrate, each for one --budget",
    )  # fmt: skip
    record.add_arguments(parser)
    args = parser.parse_args()

    args.device = "cpu" if args.quick else "cuda"
    if not args.quick and not torch.cuda.is_available():
        parser.error("needs a CUDA device; --quick makes a small table on the CPU")
    for name, choices in DEFAULTS[args.table].items():
        if getattr(args, name, None) is None:
            setattr(args, name, choices[args.quick])
    short = args.quick or args.table == "fidelity"
    names = args.policy or [policy.name for policy in POLICIES if policy.fixed or not short]
    by_name = {policy.name: policy for policy in ALL}
    if args.table == "fidelity" and (others := [name for name in names if not by_name[name].fixed]):
        parser.error(f"fidelity is of policies that choose as many pages in every step, not of {others[0]!r}")
    policies = [policy for policy in ALL if policy.name in names]
    for context, budget, policy in itertools.product(args.context, args.budget, policies):
        if (tokens := policy.budget_at(budget, context)) >= context:
            as_many = "" if tokens == budget else f" as {tokens} tokens of {policy.name!r}"
            parser.error(f"--budget {budget}{as_many} covers a --context of {context}")
    try:
        pairs = compared(policies, args.budget, args.head_budgets)
        args.compared = [(policy.over(args.context, budget), budget) for policy, budget in pairs]
    except (OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    if args.rope:
        try:
            args.rope = args.rope[0], float(args.rope[1])
        except ValueError:
            parser.error(f"--rope: FACTOR must be a number, got {args.rope[1]}")
    names = Counter([*KINDS, *(file.stem for file in args.text)])
    if twice := [name for name, count in names.items() if count > 1]:
        parser.error(f"--text: a kind of text is called as its file, and there would be two of {', '.join(twice)}")
    return args


@torch.inference_mode()
def main() -> None:
    args = parse()
    model, tokenizer = Llama.load(args.model, device=args.device)
    if args.rope:
        try:
            lengthen(model, *args.rope)
        except ValueError as error:
            raise SystemExit(f"--rope: {error}") from error
    longest = model.config.max_position_embeddings
    tail = getattr(args, "tokens", 64)  # of a question and its answer: fewer
    if max(args.context) + tail > longest:
        raise SystemExit(
            f"--context {max(args.context)} and what follows are more than the model's {longest} positions: see --rope"
        )
    try:
        texts = texts_of(tokenizer, args.text)
        print(f"texts: {', '.join(f'{kind} ({len(tokens)} tokens)' for kind, tokens in texts.items())}")
        rows = TABLES[args.table](args, model, tokenizer, texts)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    contents = {"what": f"accuracy: {args.table}", "model": Path(args.model).name, "dtype": str(model.dtype)}
    contents["rope_scaling"] = dict(zip(("method", "factor"), args.rope)) if args.rope else None
    contents["texts"] = {kind: len(tokens) for kind, tokens in texts.items()}
    contents |= {"rows": rows, "over_contexts": over_contexts(rows)}
    show_means(contents["over_contexts"])
    record.finish(args, args.device, contents)


if __name__ == "__main__":
    main()
