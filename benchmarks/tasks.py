"""The texts of accuracy.py, and the questions about them whose answers can be checked."""

import importlib.util
import random
from dataclasses import dataclass
from pathlib import Path

from forced import Continuation

from quest_ops.demo import default_text
from quest_ops.llama.tokenizer import Tokenizer

# Of the standard library, one after the other: code that every CPython has.
CODE = ("argparse", "inspect", "tarfile", "typing", "doctest", "difflib", "ipaddress", "pickletools")
# Of Mohtashami and Jaggi, Landmark Attention, 2023.
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
KINDS = "documentation", "code", "filler", "list"
NAMES = (
    "Amsterdam", "Berlin", "Cairo", "Denver", "Edinburgh", "Florence", "Geneva", "Havana", "Istanbul", "Jakarta",
    "Kyoto", "Lisbon", "Madrid", "Nairobi", "Oslo", "Prague", "Quebec", "Rome", "Sydney", "Tokyo",
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """depth: where in its document the fact is, 0 to 1. answer: how many tokens at the end of the continuation must
    each be the likeliest one: what greedy decoding of the question would then have said."""

    kind: str
    depth: float
    continuation: Continuation
    answer: int


def texts_of(tokenizer: Tokenizer, files: list[Path]) -> dict[str, list[int]]:
    """Tokens of each kind of text: CPython's documentation and code, and the user's files, each called by its stem.

    Raises ValueError where one is not UTF-8.
    """
    texts = {"documentation": default_text()}
    texts["code"] = "\n".join(Path(importlib.util.find_spec(name).origin).read_text() for name in CODE)
    for file in files:
        try:
            texts[file.stem] = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"--text: {file} is not UTF-8: {error}") from error
    return {kind: tokenizer.encode(text, add_special=False) for kind, text in texts.items()}


def pieces(texts: dict[str, list[int]], size: int, count: int) -> list[tuple[str, list[int]]]:
    """(kind, `size` tokens) for `count` pieces of each text, evenly spread over it and without overlap.

    Raises ValueError where a text is too short.
    """
    found = []
    for kind, tokens in texts.items():
        if len(tokens) < size * count:
            raise ValueError(f"{kind} has {len(tokens)} tokens, too few for {count} pieces of {size}")
        for i in range(count):
            start = i * (len(tokens) // count)
            found.append((kind, tokens[start : start + size]))
    return found


class Asker:
    """Makes documents with facts in them and questions about the facts."""

    def __init__(self, tokenizer: Tokenizer, context: int, seed: int):
        self.tokenizer, self.context, self.random = tokenizer, context, random.Random(seed)
        self.start = tokenizer.encode("")  # what the model expects before a text
        self.documents: list[list[int]] = []
        self.questions: list[Question] = []

    def number(self) -> str:
        return str(self.random.randint(10000, 99999))

    def hide(self, body: list[int], facts: list[tuple[float, str]]) -> list[int]:
        """A document of `context` tokens: the beginning of `body` with a text put in at each of some depths (0 to 1,
        ascending)."""
        hidden = [self.tokenizer.encode(f"\n\n{text}\n\n", add_special=False) for _, text in facts]
        space = self.context - len(self.start) - sum(map(len, hidden))
        document, place = list(self.start), 0
        for (depth, _), fact in zip(facts, hidden):
            stop = int(depth * space)
            document += body[place:stop] + fact
            place = stop
        return document + body[place:space]

    def ask(self, kind: str, depth: float, question: str, answer: str) -> None:
        """About the last document."""
        asked = self.tokenizer.encode(question, add_special=False)
        tokens = self.tokenizer.encode(f"{question} {answer}", add_special=False)
        shared = next((i for i, (a, b) in enumerate(zip(asked, tokens)) if a != b), len(asked))
        continuation = Continuation(len(self.documents) - 1, tokens)
        self.questions.append(Question(kind, depth, continuation, len(tokens) - shared))

    def passkeys(self, bodies: list[tuple[str, list[int]]], depths: int) -> None:
        """In each body, at each depth, a pass key: a document and a question each."""
        for kind, body in bodies:
            for i in range(depths):
                key = self.number()
                fact = f"The pass key is {key}. Remember it: the pass key is {key}."
                depth = (i + 0.5) / depths
                self.documents.append(self.hide(body, [(depth, fact)]))
                self.ask(kind, depth, "\n\nNow, what is the pass key? The pass key is", key)

    def needles(self, bodies: list[tuple[str, list[int]]], count: int) -> None:
        """In each body `count` facts of the same form, and a question about each."""
        for kind, body in bodies:
            codes = {name: self.number() for name in self.random.sample(NAMES, count)}
            facts = [
                ((i + 0.5) / count, f"The secret code of {name} is {code}.")
                for i, (name, code) in enumerate(codes.items())
            ]
            self.documents.append(self.hide(body, facts))
            for (name, code), (depth, _) in zip(codes.items(), facts):
                question = f"\n\nNow, what is the secret code of {name}? The secret code of {name} is"
                self.ask(kind, depth, question, code)

    def lookups(self, lists: int, count: int) -> None:
        """Long lists of numbers by numbers, and `count` questions about each, from all over the list."""
        for _ in range(lists):
            rows, tokens = [], list(self.start)
            while True:
                row = self.number(), self.number()
                line = self.tokenizer.encode(f"Item {row[0]} has the price {row[1]}.\n", add_special=False)
                if len(tokens) + len(line) > self.context:
                    break
                rows.append(row)
                tokens += line
            self.documents.append(tokens)
            for i in range(count):
                depth = (i + 0.5) / count
                item, price = rows[int(depth * len(rows))]
                self.ask("list", depth, f"\nItem {item} has the price", price)
