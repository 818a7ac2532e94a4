"""The accuracy tables at contexts, and by rules of the budget, beyond those of test_benchmarks.py."""

import dataclasses
import itertools
import json
import sys

import pytest
import test_benchmarks
import torch
from models import random_llama
from test_benchmarks import Bytes, one_token_a_step, small_documents, small_model

import quest_ops
from quest_ops.llama.rope import RotaryEmbedding, rope_frequencies, rotate

bench = test_benchmarks.bench


def plain_config(bench, **fields):
    config = small_model(bench, vocab_size=256).config
    return dataclasses.replace(config, rope_scaling=None, rope_theta=1e5, max_position_embeddings=256, **fields)


def accuracy(bench, monkeypatch, *arguments):
    """Runs accuracy.py on a small random model of 256 positions whose tokens are bytes."""
    return run(bench, monkeypatch, bench.accuracy, *arguments)


def run(bench, monkeypatch, script, *arguments):
    model = random_llama(plain_config(bench), torch.float32, "cpu")
    monkeypatch.setattr(script.Llama, "load", lambda *arguments, **options: (model, Bytes()))
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
    script.main()
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
    assert bench.policies.BEST.budget_at(1024, context) == 1024
    policies = [p for p in bench.policies.NAMED if p.equal_bytes]
    found = {(p.equal_bytes, p.metadata_bits, p.page_size): p.budget_at(1024, context) for p in policies}
    paper, best = 1.0, bench.policies.BEST.metadata_bytes
    assert found.keys() == {(paper, 8, 16), (paper, 8, 32), (paper, 4, 4), (best, 4, 4), (best, 4, 16), (best, 4, 32)}
    assert found[paper, 8, 16] == 1024 + context // 32
    assert found[paper, 8, 32] == 1024 + context * 3 // 64 // 32 * 32
    for (equal_to, bits, size), budget in found.items():
        if budget < 128:
            assert size == 4 and context > 16384, "their metadata alone is as many bytes"
            continue
        expected = cases.counted_bytes(case, "quest", cases.Pages(8, 8 if equal_to == paper else 4))
        read = cases.counted_bytes(dataclasses.replace(case, budget=budget), "quest", cases.Pages(size, bits))
        assert 0 <= expected - read < size * 2 * 3 * 64 * 2, "but for less than a page"


@torch.inference_mode()
def test_pages_larger_than_the_documents_blocks_hold_the_same_tokens(bench):
    documents, continuations = small_documents(bench)
    policy = next(policy for policy in bench.policies.NAMED if policy.page_size == 32)
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


def test_a_stitched_context_has_one_beginning_and_ends_with_its_document(bench):
    sizes = [64, 48, 80]

    def tokens(last, context):
        places = bench.stitched.places_of(sizes, last, context)
        assert [place.at for place in places] == [sum(p.size for p in places[:i]) for i in range(len(places))]
        return [(place.document, place.start, place.start + place.size) for place in places]

    assert tokens(0, 64) == [(0, 0, 64)]
    assert tokens(0, 100) == [(2, 0, 52), (0, 16, 64)]
    assert tokens(4, 170) == [(1, 0, 26), (2, 16, 80), (0, 16, 64), (1, 16, 48)]


@pytest.mark.parametrize("method", ["ntk", "yarn"])
def test_keys_and_queries_are_turned_to_their_places(bench, method):
    """As if they had been rotated there, by the frequencies of a model for so long a context."""
    config = plain_config(bench)
    generator = torch.Generator().manual_seed(0)
    own = RotaryEmbedding(config)
    plain, documents = [], []
    for size in (100, 140):
        keys, values = torch.randn(2, size, 2, 64, generator=generator)
        queries = torch.randn(3, 4, 64, generator=generator)
        turned = rotate(keys, *own(torch.arange(size))), values, rotate(queries, *own(size - 1 - 13 * torch.arange(3)))
        plain.append((keys, values, queries))
        documents.append(bench.recordings.Recording(*turned))
    for context, first in ((140, 0), (264, 16)):
        stitch = bench.stitched.Stitch(config, method, [100, 140], 1, context, 3, "cpu")
        there = RotaryEmbedding(bench.longer.longer_config(config, method, 264 / 256) if context > 256 else config)
        query, keys, values = stitch.of(documents)
        assert len(keys) == len(values) == context and stitch.seq_lens.tolist() == [context - 13 * b for b in range(3)]
        expected = rotate(plain[1][0][first:], *there(torch.arange(context - 140 + first, context)))
        torch.testing.assert_close(keys[context - 140 + first :], expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(values[context - 140 + first :], plain[1][1][first:])
        expected = rotate(plain[1][2], *there(stitch.seq_lens.long() - 1))
        torch.testing.assert_close(query, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bound", ["mean_std", "principal"])
@pytest.mark.parametrize("size", [8, 16, 32])
def test_a_long_context_is_attended_to_by_the_pages_that_a_policy_chooses(bench, size, bound):
    policy = next(p for p in bench.policies.ALL if (p.page_size, p.bound, p.metadata_bits) == (size, bound, 8))
    policy = dataclasses.replace(policy, metadata_bits=16)
    generator = torch.Generator().manual_seed(0)
    query, (keys, values) = torch.randn(2, 4, 64, generator=generator), torch.randn(2, 384, 2, 64, generator=generator)
    lengths = torch.tensor([384, 379], dtype=torch.int32)
    context = bench.long_fidelity.Context(0, query, keys, values, lengths)
    out, lse = context.attend(policy, 160)
    config = policy.config(160)
    of_pages = keys.unflatten(0, (-1, size))
    mean, deviation = of_pages.mean(1), of_pages.std(1, correction=0)  # [P, Hkv, D]
    points = torch.zeros(384 // size, 2, 1, 2, 64)
    table, lens = torch.arange(384 // size, dtype=torch.int32)[None], lengths[:1]
    quest_ops.reference.update_page_metadata(of_pages, points, table, lens, torch.zeros_like(lens), bound="principal")
    always = torch.zeros(384 // size, dtype=torch.bool)
    always[: config.sink_pages], always[-config.recent_pages :] = True, True
    for row, head in itertools.product(range(2), range(4)):
        group = query[row].view(2, 2, 64)[head // 2]
        if bound == "principal":
            scores = torch.einsum("gd,ped->gpe", group, points[:, head // 2, 0]).amax((0, 2))
        else:
            scores = (group @ mean[:, head // 2].T + group.abs() @ deviation[:, head // 2].T).amax(0)
        chosen = scores.masked_fill(always, torch.inf).topk(160 // size).indices
        keys_of_head, values_of_head = (x[: lengths[row], head // 2] for x in (keys, values))
        logits, kept = keys_of_head @ query[row, head] / 8, torch.isin(torch.arange(lengths[row]) // size, chosen)
        expected = logits[kept].softmax(0) @ values_of_head[kept]
        torch.testing.assert_close(out[row, head], expected, rtol=1e-4, atol=1e-4)
        mass = (lse - context.exact[1])[row, head].exp()
        assert mass == pytest.approx(logits.softmax(0)[kept].sum().item(), abs=1e-4) and mass < 0.9


def test_fidelity_at_long_contexts_is_of_equal_bytes(bench, monkeypatch, tmp_path, capsys):
    names = "oracle", "mean_std 1, pages of 8, 8-bit", "mean_std 1, pages of 32, 8-bit, equal bytes"
    sizes = "--document", 256, "--documents", 3, "--context", 512, 1024, "--budget", 96, "--layers", 0, 2
    monkeypatch.setattr(bench.long_fidelity, "QUERIES", 4)
    arguments = "--quick", *sizes, "--policy", *names, "--json", tmp_path / "f.json"
    run(bench, monkeypatch, bench.long_fidelity, *arguments)
    record = json.loads((tmp_path / "f.json").read_text())
    assert record["rope"] == "ntk" and record["measured_layers"] == [0, 2] and len(record["rows"]) == 6
    for row in record["rows"]:
        assert row["windows"] == 3 and 0 < row["mass"] < 1 and len(row["error_by_head"]) == 2
    assert [row["attended"] for row in record["rows"]] == [96, 96, 96, 96, 96, 128]
    with pytest.raises(SystemExit):
        run(bench, monkeypatch, bench.long_fidelity, "--quick", *sizes[:4], "--context", 500)
    assert "--context must be a multiple of 128 and at least --document, got 500" in capsys.readouterr().err


def policy_named(bench, name):
    return next(policy for policy in bench.policies.NAMED if policy.name.endswith(name))


@torch.inference_mode()
def test_top_p_takes_the_fewest_pages_that_hold_the_share(bench):
    documents, _ = small_documents(bench)
    policy = policy_named(bench, "top-p")
    attention = documents.attention_of(policy, 80)
    attention.plan([attention.cache.fork(0)], 8)  # 218 tokens after it: 28 pages
    generator = torch.Generator().manual_seed(0)
    query, (key, value) = torch.randn(8, 4, 64, generator=generator), torch.randn(2, 8, 2, 64, generator=generator)
    bounded = bench.top_p.BoundedMasses(attention)
    bounded.append(1, key, value)
    shares = torch.tensor([0.2, 0.5, 0.9, 0.999])
    found = bounded.counts(1, query, shares)
    scores = quest_ops.estimate_page_scores(
        query, attention.cache.page_metadata(1), attention.request_table, attention.seq_lens, 8, "max",
        bound=attention.config.bound,
    )  # fmt: skip
    assert bounded.least == 2 + 4 + 1 and bounded.most == 40
    for row, head, (i, share) in itertools.product(range(8), range(2), enumerate(shares)):
        length = int(attention.seq_lens[row])
        pages = -(-length // 8)
        tokens = torch.tensor([8.0] * (pages - 1) + [length - 8 * (pages - 1)])
        masses = tokens * (scores[row, head, :pages].double() / 8).exp()
        always = [0, 1, *range(pages - 4, pages)]
        others = sorted((m for page, m in enumerate(masses.tolist()) if page not in always), reverse=True)
        held, count = masses[always].sum().item(), 6
        while held < share * masses.sum() and others:
            held, count = held + others.pop(0), count + 1
        assert found[row, head, i] == max(count, 7)
    assert found[..., 0].float().mean() < found[..., 2].float().mean() < 28


@torch.inference_mode()
def test_top_p_meets_a_budget_on_average_and_each_row_has_its_own(bench):
    documents, continuations = small_documents(bench)
    policy = documents.tuned(policy_named(bench, "top-p"), 96, continuations)
    predictions = documents.predict(policy, 96, continuations)
    attended = torch.cat([prediction.attended for prediction in predictions])
    assert attended.mean() == pytest.approx(96, rel=0.1) and attended.std() > 1
    for prediction, continuation in zip(predictions, continuations):
        runs = []

        def top_p(attention, runs=runs):
            runs.append(bench.top_p.TopPAttention(attention, policy.p))
            return runs[-1]

        loss, _ = one_token_a_step(documents, policy.config(96), False, continuation, top_p)
        torch.testing.assert_close(prediction.loss, loss, rtol=1e-4, atol=1e-4)
        expected = torch.tensor([8 * float(step.pages) for step in runs])
        torch.testing.assert_close(prediction.attended, expected, rtol=1e-3, atol=1e-3)
    assert documents.tuned(bench.policies.BEST, 96, continuations) is bench.policies.BEST


def test_ratio_and_top_p_are_compared_with_a_fixed_budget_at_an_equal_average(bench, monkeypatch, tmp_path):
    best = bench.policies.BEST.name
    names = [best, f"{best}, ratio", f"{best}, top-p"]
    sizes = "--context", 192, 320, 448, "--budget", 128, "--pieces", 1, "--rope", "ntk", 4, "--policy", *names
    accuracy(bench, monkeypatch, "perplexity", "--quick", *sizes, "--json", tmp_path / "a.json")
    record = json.loads((tmp_path / "a.json").read_text())
    rows = {(row["policy"], row["context"]): row for row in record["rows"]}
    assert [rows[names[0], n]["attended"] for n in (192, 320, 448)] == [128] * 3
    grown = [rows[names[1], n]["attended"] for n in (192, 320, 448)]
    assert grown == pytest.approx([0.4 * (n + 64) for n in (192, 320, 448)], abs=8)  # a window follows
    assert 0 < rows[names[2], 320]["p"] < 1
    for mean in record["over_contexts"]:
        found = [rows[mean["policy"], n] for n in mean["contexts"]]
        assert mean["contexts"] == [192, 320, 448] and mean["budget"] == 128
        for name in ("attended", "added_loss"):
            assert mean[name] == pytest.approx(sum(row[name] for row in found) / 3)
    assert [mean["policy"] for mean in record["over_contexts"]] == names
    config = bench.policies.BEST.config(128)
    ratio = dataclasses.replace(policy_named(bench, "ratio"), budget_ratio=0.4).config(128)
    assert (ratio.sink_pages, ratio.recent_pages) == (config.sink_pages, config.recent_pages)
