"""Budgets by layer and KV head as a file: what `quest-ops calibrate` writes and QuestConfig.with_head_budgets reads."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from quest_ops.config import BOUNDS, PAGE_SIZES, check_head_budgets, check_int

FORMAT, VERSION = "quest_ops head budgets", 1


@dataclass(frozen=True)
class HeadBudgets:
    """tokens: [layers][KV heads], whole pages; their mean is token_budget. model: its name, for the reader. The others:
    as in QuestConfig, what the budgets were measured with."""

    model: str
    page_size: int
    sink_tokens: int
    recent_tokens: int
    bound: str
    bound_scale: float
    token_budget: int
    tokens: tuple[tuple[int, ...], ...]

    def save(self, path: str | Path) -> None:
        """Writes them as JSON, a layer a line. Raises OSError."""
        fields = {"format": FORMAT, "version": VERSION} | asdict(self)
        layers = ",\n  ".join(json.dumps(heads) for heads in fields.pop("tokens"))
        head = json.dumps(fields, indent=1).removesuffix("\n}")
        Path(path).write_text(f'{head},\n "tokens": [\n  {layers}\n ]\n}}\n', encoding="utf-8")


def load_head_budgets(path: str | Path) -> HeadBudgets:
    """Reads a file that `HeadBudgets.save` wrote.

    Raises OSError, or ValueError that names the file and what in it is missing, unknown or out of range.
    """
    try:
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # of UTF-8, too
        raise ValueError(f"{path} is no JSON file: {error}") from error
    if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT:
        raise ValueError(f'{path} has no head budgets: its "format" must be "{FORMAT}" (quest-ops calibrate writes it)')
    if (version := fields.pop("version", None)) != VERSION:
        raise ValueError(f'{path}: "version" {version!r} is not supported; this quest_ops reads version {VERSION}')
    if wrong := sorted(fields.keys() ^ HeadBudgets.__dataclass_fields__.keys()):
        missing = [name for name in wrong if name not in fields]
        raise ValueError(f"{path}: " + (f"{missing[0]!r} is missing" if missing else f"{wrong[0]!r} is not known"))
    try:
        if not isinstance(fields["model"], str):
            raise TypeError(f"model must be a string, got {fields['model']!r}")
        if fields["page_size"] not in PAGE_SIZES:
            raise ValueError(f"page_size must be one of {PAGE_SIZES}, got {fields['page_size']!r}")
        if fields["bound"] not in BOUNDS:
            raise ValueError(f"bound must be one of {BOUNDS}, got {fields['bound']!r}")
        if isinstance(fields["bound_scale"], bool) or not isinstance(fields["bound_scale"], (int, float)):
            raise TypeError(f"bound_scale must be a number, got {fields['bound_scale']!r}")
        for name, least in (("sink_tokens", 0), ("recent_tokens", 1), ("token_budget", 1)):
            check_int(name, fields[name], least)
        fields["tokens"] = check_head_budgets("tokens", fields["tokens"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    return HeadBudgets(**fields)
