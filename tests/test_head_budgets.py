"""Files of budgets by layer and head: what is written is read, and what is wrong with a file is named."""

import json

import pytest

from quest_ops import QuestConfig
from quest_ops.head_budgets import HeadBudgets, load_head_budgets

BUDGETS = HeadBudgets("a/model", 8, 16, 32, "mean_std", 1.5, 256, ((128, 384), (96, 416), (256, 256)))


@pytest.fixture
def path(tmp_path):
    BUDGETS.save(tmp_path / "budgets.json")
    return tmp_path / "budgets.json"


def test_what_is_saved_is_read(path):
    assert load_head_budgets(path) == BUDGETS
    fields = json.loads(path.read_text())
    assert (fields["format"], fields["version"]) == ("quest_ops head budgets", 1)
    assert len(path.read_text().splitlines()) == 16  # a field a line, a layer a line


def test_a_config_takes_what_the_budgets_were_measured_with(path):
    config = QuestConfig.with_head_budgets(str(path), sink_tokens=0, page_size=8)
    assert config == QuestConfig(
        page_size=8, bound="mean_std", bound_scale=1.5, token_budget=256, head_budgets=BUDGETS.tokens, sink_tokens=0,
        recent_tokens=32,
    )  # fmt: skip
    for settings in ({"page_size": 16}, {"bound": "minmax"}, {"bound_scale": 1.0}, {"token_budget": 512}):
        (name,) = settings
        with pytest.raises(ValueError, match=f"{name} must be .* as the budgets of .*budgets.json need it"):
            QuestConfig.with_head_budgets(path, **settings)
    with pytest.raises(ValueError, match=r"head_budgets\[1\]\[0\] is 96 tokens; .*at least 112"):
        QuestConfig.with_head_budgets(path, recent_tokens=88)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, 'its "format" must be "quest_ops head budgets"'),
        ({"version": 2}, '"version" 2 is not supported; this quest_ops reads version 1'),
        ({"tokens": None}, "tokens must be a tuple of tuples"),
        ({"tokens": [[256], [256, 256]]}, r"tokens must have .*\[1, 2\]"),
        ({"tokens": [[256, -1]]}, r"tokens\[0\]\[1\] must be at least 1, got -1"),
        ({"tokens": [[256, "1"]]}, r"tokens\[0\]\[1\] must be an int, got '1'"),
        ({"model": 3}, "model must be a string, got 3"),
        ({"page_size": 12}, "page_size must be one of .*12"),
        ({"page_size": [8]}, "page_size must be one of"),
        ({"bound": "std"}, "bound must be one of .*'std'"),
        ({"bound_scale": "1"}, "bound_scale must be a number, got '1'"),
        ({"recent_tokens": 0}, "recent_tokens must be at least 1, got 0"),
        ({"token_budget": 0}, "token_budget must be at least 1, got 0"),
        ({"heads": 3}, "'heads' is not known"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(path, changes, message):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=f"budgets.json.*{message}"):
        load_head_budgets(path)


@pytest.mark.parametrize("name", ["version", "model", "recent_tokens", "bound_scale", "tokens"])
def test_what_a_file_lacks_is_named(path, name):
    fields = json.loads(path.read_text())
    del fields[name]
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=name):
        load_head_budgets(path)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[1]", b"256"])
def test_a_file_of_another_kind_is_refused(path, text):
    path.write_bytes(text)
    with pytest.raises(ValueError, match="budgets.json (is no JSON file|has no head budgets)"):
        load_head_budgets(path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        load_head_budgets(path)
