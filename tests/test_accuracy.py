"""The accuracy tables at contexts, and by rules of the budget, beyond those of test_benchmarks.py."""

import dataclasses
import json
import sys

import pytest
import test_benchmarks
import torch
from models import random_llama
from test_benchmarks import Bytes, one_token_a_step, small_documents, small_model

from quest_ops.llama.rope import rope_frequencies

bench = test_benchmarks.bench


def plain_config(bench, **fields):
    config = small_model(bench, vocab_size=256).config
    return dataclasses.replace(config, rope_scaling=None, rope_theta=1e5, max_position_embeddings=256, **fields)


def accuracy(bench, monkeypatch, *arguments):
    """Runs accuracy.py on a small random model of 256 positions whose tokens are bytes."""
    model = random_llama(plain_config(bench), torch.float32, "cpu")
    monkeypatch.setattr(bench.accuracy.Llama, "load", lambda *arguments, **options: (model, Bytes()))
    monkeypatch.setattr(sys, "argv", ["accuracy.py", *map(str, arguments)])
    bench.accuracy.main()
    return model


def test_a_longer_context_keeps_the_fast_channels_and_stretches_the_slow_ones(bench):
    config = plain_config(bench)
    plain, _ = rope_frequencies(config)
    for method, attention_factor in (("ntk", 1.0), ("yarn", pytest.approx(1.1386, abs=1e-4))):
        longer = bench.longer.longer_config(config, method, 4.0)
        assert longer.max_position_embeddings == 1024
        found, factor = rope_frequencies(longer)
        slower = plain / found
        assert factor == attention_factor and (slower.diff() > -1e-5).all()
        assert slower[0] == pytest.approx(1) and slower[-1] == pytest.approx(4, rel=1e-5)
    with pytest.raises(ValueError, match=r"method must be one of .*, got 'linear'"):
        bench.longer.longer_config(config, "linear", 4.0)
    with pytest.raises(ValueError, match="factor must be a number above 1, got 1.0"):
        bench.longer.longer_config(config, "ntk", 1.0)
    with pytest.raises(ValueError, match="scaled already"):
        bench.longer.longer_config(small_model(bench).config, "ntk", 2.0)


def test_contexts_beyond_the_models_positions_are_measured_with_rope_alone(bench, monkeypatch, tmp_path):
    sizes = "--context", 300, "--budget", 128, "--pieces", 1, "--policy", "minmax"
    with pytest.raises(SystemExit, match="more than the model's 256 positions: see --rope"):
        accuracy(bench, monkeypatch, "perplexity", "--quick", *sizes)
    record = tmp_path / "a.json"
    model = accuracy(bench, monkeypatch, "perplexity", "--quick", *sizes, "--rope", "ntk", "2", "--json", record)
    assert model.config.max_position_embeddings == 512 and model.config.rope_theta > 2e5
    assert torch.equal(model.rope.frequencies, rope_frequencies(model.config)[0])
    record = json.loads(record.read_text())
    assert record["rope_scaling"] == {"method": "ntk", "factor": 2.0} and len(record["rows"]) == 1
    with pytest.raises(SystemExit, match="--rope: method must be one of .*, got 'linear'"):
        accuracy(bench, monkeypatch, "perplexity", "--quick", *sizes, "--rope", "linear", "2")


@pytest.mark.parametrize("context", [6656, 32768, 131072])
def test_policies_of_equal_bytes_read_what_the_defaults_read(bench, context):
    cases = bench.cases
    shape = {"kv_heads": 3, "query_heads": 9, "head_dim": 64, "dtype": torch.bfloat16}
    case = cases.Case("defaults", (context,), budget=1024, **shape)
    expected = cases.counted_bytes(case, "quest", cases.Pages(8, eight_bit=True))
    assert bench.policies.BEST.budget_at(1024, context) == 1024
    found = {p.page_size: p.budget_at(1024, context) for p in bench.policies.NAMED if p.equal_bytes}
    assert found == {16: 1024 + context // 32, 32: 1024 + context * 3 // 64 // 32 * 32}
    for size, budget in found.items():
        read = cases.counted_bytes(dataclasses.replace(case, budget=budget), "quest", cases.Pages(size, eight_bit=True))
        assert 0 <= expected - read < size * 2 * 3 * 64 * 2, "but for less than a page"


@torch.inference_mode()
def test_pages_larger_than_the_documents_blocks_hold_the_same_tokens(bench):
    documents, continuations = small_documents(bench)
    (policy,) = [policy for policy in bench.policies.NAMED if policy.page_size == 32]
    budget = policy.budget_at(128, 208)
    assert budget == 128
    for prediction, continuation in zip(documents.predict(policy, budget, continuations), continuations):
        loss, hit = one_token_a_step(documents, policy.config(budget), False, continuation)
        torch.testing.assert_close(prediction.loss, loss, rtol=1e-4, atol=1e-4)
        assert torch.equal(prediction.hit, hit) and prediction.attended.tolist() == [128] * len(loss)


@pytest.mark.parametrize("table", ["perplexity", "fidelity", "passkey"])
def test_equal_bytes_are_in_the_rows_of_every_table(bench, monkeypatch, tmp_path, table):
    names = "mean_std 1, pages of 8, 8-bit", "mean_std 1, pages of 16, 8-bit, equal bytes"
    sizes = "--context", 640, "--budget", 128, "--pieces", 1, "--rope", "yarn", 4, "--policy", *names
    if table == "passkey":  # a random model finds none
        monkeypatch.setattr(bench.tables, "agrees", lambda p, answer: torch.tensor(True))
    accuracy(bench, monkeypatch, table, "--quick", *sizes, "--json", tmp_path / "a.json")
    rows = {row["policy"]: row for row in json.loads((tmp_path / "a.json").read_text())["rows"]}
    assert [(rows[name]["budget"], rows[name]["attended"], rows[name]["read"]) for name in names] == [
        (128, 128, 128 + 40), (128, 144, 144 + 20),
    ]  # fmt: skip


def test_a_larger_budget_of_equal_bytes_must_not_cover_the_context(bench, monkeypatch, capsys):
    name = "mean_std 1, pages of 16, 8-bit, equal bytes"
    with pytest.raises(SystemExit):
        accuracy(bench, monkeypatch, "perplexity", "--quick", "--context", 256, "--budget", 250, "--policy", name)
    assert f"--budget 250 as 256 tokens of '{name}' covers a --context of 256" in capsys.readouterr().err
