"""What Quest's selection of pages costs in accuracy, on the kernels that a decoder runs: a table for each command.

    python benchmarks/accuracy.py perplexity --json benchmarks/results/perplexity-h100.json --figure perplexity.png
    python benchmarks/accuracy.py passkey --quick
    python benchmarks/accuracy.py needles --quick --text novel.txt

A document is prefilled with dense attention, once for all policies; what follows it goes through decode steps, the
question as well as the answer, and keys and values that it appends are its own. policies.py lists the policies;
"metadata" is their bytes of metadata a token, the paper's being 1. The model's weights are as its file has them.

- perplexity: teacher-forced on real text. Loss in nats a token of dense attention, and how much more each policy has,
  with its standard error over the windows (of the same windows' differences).
- passkey: a number hidden at 10 depths of filler and of real texts.
- needles: 8 numbers under names in one text, and numbers in long lists of numbers.
  Both: the share found, by greedy decoding, of those that dense attention finds; by depth it is in the JSON.
- fidelity: decode steps of exact attention on real text, and what each policy makes of their queries and keys: the
  relative error of its output, with its standard error over the windows, and the share of the true attention mass that
  it keeps. fidelity.py defines them; by layer and head they are in the JSON. Only of policies that choose pages in
  every step.
"""

import argparse
import math
import os
import sys
import time
from collections import Counter
from pathlib import Path

# Beside other work on the machine, threads that spin make a prefill on the CPU 10 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import record
import torch
from fidelity import Probe, summary
from forced import MOST_SEQUENCES, Continuation, Documents
from policies import POLICIES, Policy, calibrated
from tasks import FILLER, KINDS, Asker, pieces, texts_of

from quest_ops.llama.model import Llama
from quest_ops.llama.tokenizer import Tokenizer

SEED = 1
Texts = dict[str, list[int]]  # tokens of each kind of text
HEADER = f"{'policy':40}{'metadata':>9}{'context':>9}{'budget':>8}"


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def prefilled(model: Llama, documents: list[list[int]], tail: int) -> Documents:
    started = time.perf_counter()

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\rprefill: {done} of {total} tokens", end="\n" if done == total else "", file=sys.stderr)

    made = Documents(model, documents, tail, progress)
    note(f"{len(documents)} documents, {sum(map(len, documents))} tokens: {time.perf_counter() - started:.0f} s")
    return made


def settings_of(policy, budget: int, context: int) -> dict:
    return {"policy": policy.name, "metadata": policy.metadata_bytes, "context": context, "budget": budget}


def continued(args, model: Llama, start: list[int], texts: Texts, context: int):
    """Prefilled documents, their continuations, and the kind of text of each."""
    cut = context - len(start)
    windows = pieces(texts, cut + args.tokens + 1, args.pieces)
    documents = prefilled(model, [start + tokens[:cut] for _, tokens in windows], args.tokens + 1)
    continuations = [Continuation(i, tokens[cut:]) for i, (_, tokens) in enumerate(windows)]
    return documents, continuations, [kind for kind, _ in windows]


def perplexity(args, model: Llama, tokenizer: Tokenizer, texts: Texts) -> list[dict]:
    rows = []
    for context in args.context:
        documents, continuations, kinds = continued(args, model, tokenizer.encode(""), texts, context)

        def losses(policy=None, budget=0, documents=documents, continuations=continuations) -> torch.Tensor:
            return torch.stack([p.loss.double().mean() for p in documents.predict(policy, budget, continuations)])

        dense = losses()
        print(f"dense: {dense.mean():.4f} nats a token, {len(kinds)} windows of {args.tokens} tokens after {context}")
        print(f"{HEADER}{'added loss':>12}{'+-':>8}{columns(dict.fromkeys(kinds))}")
        for policy, budget in args.compared:
            added = losses(policy, budget) - dense
            row = settings_of(policy, budget, context) | {
                "dense_loss": dense.mean().item(),
                "added_loss": added.mean().item(),
                "standard_error": added.std().item() / math.sqrt(len(added)),
                "windows": len(added),
                "tokens": args.tokens,
                "added_by_kind": {k: added[[x == k for x in kinds]].mean().item() for k in dict.fromkeys(kinds)},
            }
            rows.append(row)
            by_kind = {kind: f"{loss:.4f}" for kind, loss in row["added_by_kind"].items()}
            show(row, f"{row['added_loss']:12.4f}{row['standard_error']:8.4f}{columns(by_kind)}")
    return rows


def fidelity(args, model: Llama, tokenizer: Tokenizer, texts: Texts) -> list[dict]:
    rows = []
    for context in args.context:
        documents, continuations, kinds = continued(args, model, tokenizer.encode(""), texts, context)
        print(f"{len(kinds)} windows of {args.tokens} tokens after {context}; by kind of text: error")
        print(f"{HEADER}{'error':>12}{'+-':>8}{'mass':>8}{columns(dict.fromkeys(kinds))}")
        for policy, budget in args.compared:
            attention, sums = documents.attention_of(policy, budget), []
            for first in range(0, len(continuations), MOST_SEQUENCES):
                some = continuations[first : first + MOST_SEQUENCES]
                probe = Probe(attention, policy.oracle, len(some))
                documents.decode(attention, probe, some)
                sums.append(probe.sums)
            row = settings_of(policy, budget, context) | summary(torch.cat(sums, 1), args.tokens, kinds)
            rows.append(row)
            by_kind = {kind: f"{error:.3f}" for kind, error in row["error_by_kind"].items()}
            show(row, f"{row['error']:12.3f}{row['standard_error']:8.3f}{row['mass']:8.3f}{columns(by_kind)}")
    return rows


def passkey(args, model: Llama, tokenizer: Tokenizer, texts: Texts) -> list[dict]:
    rows = []
    for context in args.context:
        asker = Asker(tokenizer, context, SEED)
        for _ in range(args.pieces):
            asker.passkeys([("filler", filler(tokenizer, context))], args.depths)
        asker.passkeys(pieces(texts, context, args.pieces), args.depths)
        rows += found(args, model, asker)
    return rows


def needles(args, model: Llama, tokenizer: Tokenizer, texts: Texts) -> list[dict]:
    rows = []
    for context in args.context:
        asker = Asker(tokenizer, context, SEED)
        bodies = [("filler", filler(tokenizer, context))] * args.pieces
        asker.needles(bodies + pieces(texts, context, args.pieces), args.depths)
        asker.lookups(args.pieces, args.depths)
        rows += found(args, model, asker)
    return rows


def filler(tokenizer: Tokenizer, context: int) -> list[int]:
    line = tokenizer.encode(FILLER, add_special=False)
    return line * (context // len(line) + 1)


def found(args, model: Llama, asker: Asker) -> list[dict]:
    """A row for each policy and budget: how many of the answers that dense attention gives it gives."""
    continuations = [question.continuation for question in asker.questions]
    documents = prefilled(model, asker.documents, max(len(c.tokens) for c in continuations))

    def right(policy=None, budget=0) -> torch.Tensor:
        predictions = documents.predict(policy, budget, continuations)
        answers = [p.hit[-question.answer :].all() for p, question in zip(predictions, asker.questions)]
        return torch.stack(answers)

    dense, rows = right(), []
    trials = int(dense.sum())
    print(f"dense: {trials} of {len(dense)} after {asker.context} tokens")
    if trials == 0:
        note("dense attention answers nothing here, so there is nothing to compare")
        return []
    kinds = [question.kind for question in asker.questions]
    depths = [f"{question.depth:.3g}" for question in asker.questions]
    print(f"{HEADER}{'found':>10}{'of':>5}{columns(dict.fromkeys(kinds))}")
    for policy, budget in args.compared:
        kept = right(policy, budget)[dense].double()
        by_kind, by_depth = (tally(kept, labels, dense) for labels in (kinds, depths))
        row = settings_of(policy, budget, asker.context) | {
            "found": kept.mean().item(),
            "standard_error": math.sqrt(kept.mean().item() * (1 - kept.mean().item()) / trials),
            "trials": trials,
            "dense": [trials, len(dense)],
            "found_by_kind": by_kind,
            "found_by_depth": by_depth,
        }
        rows.append(row)
        shares = {kind: f"{of_kind[0]}/{of_kind[1]}" for kind, of_kind in by_kind.items()}
        show(row, f"{row['found']:10.0%}{trials:5}{columns(shares)}")
    return rows


def tally(kept: torch.Tensor, labels: list[str], dense: torch.Tensor) -> dict[str, list[int]]:
    """Of each label how many answers are kept, and of how many; dense [questions] says which dense attention gives,
    kept is of those alone."""
    counts = {}
    for label in dict.fromkeys(labels):
        chosen = torch.tensor([x == label for x in labels])[dense]
        counts[label] = [int(kept[chosen].sum()), int(chosen.sum())]
    return counts


def columns(by_kind: dict) -> str:
    """A column for each kind of text, headed by its name; without values, the heads."""
    return "".join(f"{kind if value is None else value:>{max(len(kind), 8) + 2}}" for kind, value in by_kind.items())


def show(row: dict, result: str) -> None:
    metadata = "-" if row["metadata"] is None else f"{row['metadata']:g}"
    settings = f"{row['policy']:40}{metadata:>9}{row['context']:9}{row['budget']:8}"
    print(settings + result, flush=True)


TABLES = {"perplexity": perplexity, "passkey": passkey, "needles": needles, "fidelity": fidelity}
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
    return sorted(pairs, key=lambda pair: (pair[0].page_size, pair[0].eight_bit), reverse=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--quick", action="store_true", help="a small table on the CPU, within 3 minutes")
    parser.add_argument("--model", default="smollm2", help="a Hugging Face folder or hub id, or a .gguf file")
    parser.add_argument(
        "--text", nargs="+", type=Path, default=[], metavar="FILE", help="further kinds of text, UTF-8: a novel, say"
    )
    parser.add_argument("--context", nargs="+", type=record.positive, metavar="TOKENS", help="of a document")
    parser.add_argument("--budget", nargs="+", type=record.positive, metavar="TOKENS")
    parser.add_argument(
        "--policy", nargs="+", choices=[p.name for p in POLICIES], metavar="NAME",
        help="default: all; with --quick those that choose pages in every step",
    )  # fmt: skip
    parser.add_argument("--pieces", type=record.positive, metavar="N", help="documents of each kind of text")
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
    every_step = [policy.name for policy in POLICIES if policy.select_every == 1]
    short = args.quick or args.table == "fidelity"
    names = args.policy or (every_step if short else [policy.name for policy in POLICIES])
    if args.table == "fidelity" and (others := [name for name in names if name not in every_step]):
        parser.error(f"fidelity is of policies that choose pages in every step, not of {others[0]!r}")
    policies = [policy for policy in POLICIES if policy.name in names]
    if max(args.budget) >= min(args.context):
        parser.error(f"--budget {max(args.budget)} covers a --context of {min(args.context)}")
    try:
        args.compared = compared(policies, args.budget, args.head_budgets)
    except (OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    if missing := [str(file) for file in args.text if not file.is_file()]:
        parser.error(f"--text: no such file: {', '.join(missing)}")
    names = Counter([*KINDS, *(file.stem for file in args.text)])
    if twice := [name for name, count in names.items() if count > 1]:
        parser.error(f"--text: a kind of text is called as its file, and there would be two of {', '.join(twice)}")
    return args


@torch.inference_mode()
def main() -> None:
    args = parse()
    model, tokenizer = Llama.load(args.model, device=args.device)
    longest = model.config.max_position_embeddings
    tail = getattr(args, "tokens", 64)  # of a question and its answer: fewer
    if max(args.context) + tail > longest:
        raise SystemExit(
            f"--context {max(args.context)} and what follows are more than the model's {longest} positions"
        )
    try:
        texts = texts_of(tokenizer, args.text)
        print(f"texts: {', '.join(f'{kind} ({len(tokens)} tokens)' for kind, tokens in texts.items())}")
        rows = TABLES[args.table](args, model, tokenizer, texts)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    contents = {"what": f"accuracy: {args.table}", "model": Path(args.model).name, "dtype": str(model.dtype)}
    contents["texts"] = {kind: len(tokens) for kind, tokens in texts.items()}
    record.finish(args, args.device, contents | {"rows": rows})


if __name__ == "__main__":
    main()
