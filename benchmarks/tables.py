"""The tables of accuracy.py: rows of how policies do beside dense attention, printed as they come."""

import math
import sys
import time

import torch
from fidelity import Probe, summary
from forced import MOST_SEQUENCES, Continuation, Documents, Prediction
from policies import Policy
from tasks import FILLER, Asker, pieces

from quest_ops.llama.model import Llama
from quest_ops.llama.tokenizer import Tokenizer

SEED = 1
Texts = dict[str, list[int]]  # tokens of each kind of text
VALUES = "added_loss", "found", "error"  # of a table, one of them: its result
HEADER = f"{'policy':44}{'metadata':>9}{'context':>9}{'budget':>8}{'attended':>10}"


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


def settings_of(policy: Policy, budget: int, context: int, attended: float) -> dict:
    """attended: tokens that a row and KV head may attend to, on average. read: these and the metadata, in units of a
    token's K and V, which are as many bytes as 16 tokens of the paper's metadata."""
    metadata = policy.metadata_bytes
    return {
        "policy": policy.name,
        "metadata": metadata,
        "context": context,
        "budget": budget,
        "attended": round(attended, 1),
        "read": None if metadata is None else round(attended + context * metadata / 16, 1),
    } | ({"p": policy.p} if policy.top_p else {})


def attended_by(predictions: list[Prediction]) -> float:
    return torch.cat([prediction.attended for prediction in predictions]).double().mean().item()


def decoded(
    documents: Documents, policy: Policy, budget: int, context: int, continuations: list[Continuation]
) -> tuple[dict, list[Prediction]]:
    """Settings and predictions of a policy at the defaults' budget."""
    tokens = policy.budget_at(budget, context)
    policy = documents.tuned(policy, tokens, continuations)
    predictions = documents.predict(policy, tokens, continuations)
    return settings_of(policy, budget, context, attended_by(predictions)), predictions


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

        def mean_losses(predictions: list[Prediction]) -> torch.Tensor:
            return torch.stack([p.loss.double().mean() for p in predictions])

        dense = mean_losses(documents.predict(None, 0, continuations))
        print(f"dense: {dense.mean():.4f} nats a token, {len(kinds)} windows of {args.tokens} tokens after {context}")
        print(f"{HEADER}{'added loss':>12}{'+-':>8}{columns(dict.fromkeys(kinds))}")
        for policy, budget in args.compared:
            settings, predictions = decoded(documents, policy, budget, context, continuations)
            added = mean_losses(predictions) - dense
            row = settings | {
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
            attention = documents.attention_of(policy, policy.budget_at(budget, context))
            sums, predictions = [], []
            for first in range(0, len(continuations), MOST_SEQUENCES):
                some = continuations[first : first + MOST_SEQUENCES]
                probe = Probe(attention, policy.oracle, len(some))
                predictions += documents.decode(attention, probe, some)
                sums.append(probe.sums)
            settings = settings_of(policy, budget, context, attended_by(predictions))
            row = settings | summary(torch.cat(sums, 1), args.tokens, kinds)
            rows.append(row)
            show_fidelity(row)
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

    def right(predictions: list[Prediction]) -> torch.Tensor:
        return torch.stack([agrees(p, question.answer) for p, question in zip(predictions, asker.questions)])

    dense, rows = right(documents.predict(None, 0, continuations)), []
    trials = int(dense.sum())
    print(f"dense: {trials} of {len(dense)} after {asker.context} tokens")
    if trials == 0:
        note("dense attention answers nothing here, so there is nothing to compare")
        return []
    kinds = [question.kind for question in asker.questions]
    depths = [f"{question.depth:.3g}" for question in asker.questions]
    print(f"{HEADER}{'found':>10}{'of':>5}{columns(dict.fromkeys(kinds))}")
    for policy, budget in args.compared:
        settings, predictions = decoded(documents, policy, budget, asker.context, continuations)
        kept = right(predictions)[dense].double()
        by_kind, by_depth = (tally(kept, labels, dense) for labels in (kinds, depths))
        row = settings | {
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


def agrees(prediction: Prediction, answer: int) -> torch.Tensor:
    """Whether each of the last `answer` tokens was the likeliest one."""
    return prediction.hit[-answer:].all()


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
    settings = f"{row['policy']:44}{metadata:>9}{row['context']:9}{row['budget']:8}{row['attended']:10.0f}"
    print(settings + result, flush=True)


def show_fidelity(row: dict) -> None:
    by_kind = {kind: f"{error:.3f}" for kind, error in row["error_by_kind"].items()}
    show(row, f"{row['error']:12.3f}{row['standard_error']:8.3f}{row['mass']:8.3f}{columns(by_kind)}")


def over_contexts(rows: list[dict]) -> list[dict]:
    """The mean over contexts, each counting alike, of the rows of a policy and budget, where there are several: of a
    policy whose budget grows with the context, what to compare with a fixed one."""
    means = []
    for policy, budget in dict.fromkeys((row["policy"], row["budget"]) for row in rows):
        found = [row for row in rows if (row["policy"], row["budget"]) == (policy, budget)]
        if len(found) == 1:
            continue
        error = math.sqrt(sum(row["standard_error"] ** 2 for row in found)) / len(found)
        names = [name for name in ("attended", *VALUES) if name in found[0]]
        values = {name: sum(row[name] for row in found) / len(found) for name in names}
        means.append({"policy": policy, "budget": budget, "contexts": [row["context"] for row in found]} | values)
        means[-1]["standard_error"] = error
    return means


def show_means(means: list[dict]) -> None:
    for row in means:
        value = next(row[name] for name in VALUES if name in row)
        settings = f"{row['policy']:53}{'all':>9}{row['budget']:8}{row['attended']:10.0f}"
        print(f"{settings}{value:12.4f}{row['standard_error']:8.4f}")


TABLES = {"perplexity": perplexity, "passkey": passkey, "needles": needles, "fidelity": fidelity}
