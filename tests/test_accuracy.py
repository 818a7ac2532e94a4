"""The accuracy tables at contexts, and by rules of the budget, beyond those of test_benchmarks.py."""

import dataclasses
import json
import sys

import pytest
import test_benchmarks
import torch
from models import random_llama
from test_benchmarks import Bytes, small_model

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
