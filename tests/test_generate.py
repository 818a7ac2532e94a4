"""Generation: the same tokens whatever the chunks and the company; sampling, streaming, stops, pages, bad input."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from models import pages_of_16, random_llama
from test_compile import INDUCTOR
from torch._dynamo.testing import CompileCounterWithBackend

from quest_ops import ops
from quest_ops.config import QuestConfig
from quest_ops.llama.batch import split_prompts
from quest_ops.llama.config import LlamaConfig
from quest_ops.llama.generate import Generator
from quest_ops.llama.model import PARTS, Llama, default_dtype
from quest_ops.llama.sampling import Sampler, keep_nucleus
from quest_ops.llama.watch import kv_tokens_read
from quest_ops.llama.weights import Checkpoint

CONFIG = LlamaConfig(
    model_type="llama",
    vocab_size=500,
    hidden_size=96,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=512,
    eos_token_ids=(7, 9),
)
QUEST = pages_of_16(token_budget=64, sink_tokens=16, recent_tokens=16, dense_below=64)
DENSE_TO_100 = pages_of_16(token_budget=64, sink_tokens=16, recent_tokens=16, dense_below=100)
COVERING = QuestConfig(token_budget=256, dense_below=0)
QUEST_FROM_THE_START = pages_of_16(token_budget=64, sink_tokens=16, recent_tokens=16, dense_below=0)


def random_model(dtype=torch.float32, device="cpu") -> Llama:
    return random_llama(CONFIG, dtype, device)


@pytest.fixture(scope="module")
def model():
    return random_model()


def random_prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(10, 500, (n,), generator=generator).tolist() for n in lengths]


def make(model, **settings) -> Generator:
    defaults = {"quest": QUEST, "max_batch_size": 4, "max_sequence_tokens": 256, "compile": False}
    return Generator(model, **defaults | settings)


def greedy_by_hand(model, prompt: list[int], count: int) -> list[int]:
    """Dense causal attention over the whole text again for every token, with no cache."""

    class FullAttention:
        def run(self, layer, query, key, value):
            q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return out[0].transpose(0, 1)

    text = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            logits = model(torch.tensor(text), torch.arange(len(text)), FullAttention(), torch.tensor([len(text) - 1]))
            text.append(int(logits.argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("attention", ["quest", "dense", "sdpa"])
@pytest.mark.parametrize("chunk", [512, 37, 1])
def test_greedy_tokens_do_not_depend_on_chunks_or_backend(model, attention, chunk):
    prompt = random_prompts(150)[0]
    generator = make(model, attention=attention, quest=COVERING, prefill_chunk=chunk)
    result = generator.generate([prompt], 12, stop_tokens=())[0]
    assert result.tokens == greedy_by_hand(model, prompt, 12)
    assert result.finish_reason == "length"
    assert generator.cache.free_blocks == generator.cache.num_blocks


@pytest.mark.parametrize("quest", [QuestConfig(token_budget=256), QUEST_FROM_THE_START])
def test_a_ragged_batch_gives_each_prompt_what_it_gets_alone(model, quest):
    prompts = random_prompts(1, 200, 30, 64)
    together = make(model, quest=quest, prefill_chunk=50).generate(prompts, 20, stop_tokens=())
    for prompt, result in zip(prompts, together):
        alone = make(model, quest=quest, max_batch_size=1).generate([prompt], 20, stop_tokens=())
        assert result.tokens == alone[0].tokens and len(result.tokens) == 20


def test_a_sequence_that_ends_leaves_and_the_others_go_on(model):
    prompts = random_prompts(20, 90, 40)
    generator = make(model, quest=QUEST_FROM_THE_START)
    free = generator.generate(prompts, 16, stop_tokens=())
    stop = free[1].tokens[4]  # the second sequence ends at its fifth token or before
    freed = []
    results = generator.generate(
        prompts,
        16,
        stop_tokens={stop},
        progress=lambda phase, done, total: freed.append(generator.cache.free_blocks),
    )
    for result, unstopped in zip(results, free):
        expected = unstopped.tokens
        if stop in expected:
            expected = expected[: expected.index(stop)]
            assert result.finish_reason == "stop"
        else:
            assert result.finish_reason == "length"
        assert result.tokens == expected
    assert results[1].finish_reason == "stop"
    assert max(freed[:-1]) > freed[0]  # its blocks came back before the end
    assert freed[-1] == generator.cache.num_blocks


def test_the_models_end_tokens_stop_by_default(model):
    # Make one of the two end tokens the likeliest after any text.
    rigged = random_model()
    rigged.lm_head.weight[9] = 50 * rigged.lm_head.weight[9].abs()
    prompt = random_prompts(25)[0]
    wanted = greedy_by_hand(rigged, prompt, 40)
    assert 9 in wanted
    generator = make(rigged, quest=QuestConfig(token_budget=256))
    result = generator.generate([prompt], 40)[0]
    assert result.tokens == wanted[: wanted.index(9)] and result.finish_reason == "stop"
    assert generator.generate([prompt], 40, stop_tokens=())[0].tokens == wanted


def test_streaming_shows_every_token_in_order(model):
    prompts = random_prompts(100, 5)
    seen = []
    results = make(model).generate(prompts, 6, stop_tokens=(), on_token=lambda i, token: seen.append((i, token)))
    assert seen == [(i, results[i].tokens[step]) for step in range(6) for i in range(2)]


def test_an_interrupted_call_gives_its_cache_back(model):
    generator = make(model)

    def interrupt(index, token):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generator.generate(random_prompts(50, 60), 4, on_token=interrupt, stop_tokens=())
    assert generator.cache.free_blocks == generator.cache.num_blocks
    assert len(generator.generate(random_prompts(50), 4, stop_tokens=())[0].tokens) == 4


def test_progress_counts_prompt_tokens_and_new_tokens(model):
    seen = []
    make(model, prefill_chunk=40).generate(
        random_prompts(70, 20), 4, stop_tokens=(), progress=lambda *args: seen.append(args)
    )
    assert seen == [("prefill", 40, 90), ("prefill", 80, 90), ("prefill", 90, 90)] + [
        ("decode", tokens, 6) for tokens in (2, 4, 6)
    ]


def test_a_sequence_ends_where_its_room_ends(model):
    generator = make(model, max_sequence_tokens=100, quest=QUEST_FROM_THE_START)
    results = generator.generate(random_prompts(90, 100, 10), 30, stop_tokens=())
    # The last token is not put into the cache: 100 places hold a prompt of 90, and its answer of 11 but for the last.
    assert [len(r.tokens) for r in results] == [11, 1, 30]
    assert {r.finish_reason for r in results} == {"length"}
    assert results[1].decode_steps == 0 and results[1].kv_read_share is None


def test_a_seed_reproduces_and_another_does_not(model):
    prompts = random_prompts(30, 80)
    generator = make(model)

    def run(seed, **kw):
        results = generator.generate(prompts, 20, temperature=1.0, seed=seed, stop_tokens=(), **kw)
        return [result.tokens for result in results]

    assert run(5) == run(5) != run(6)
    assert run(5, top_p=0.8) == run(5, top_p=0.8)
    assert make(model).generate(prompts, 20, temperature=1.0, seed=5, stop_tokens=())[1].tokens == run(5)[1]
    assert run(None) != run(None)
    greedy = generator.generate(prompts, 20, stop_tokens=())
    assert run(1, top_p=1e-6) == [result.tokens for result in greedy]


@pytest.mark.parametrize("others", [(10,), (200,), (5, 150)])
def test_a_sample_does_not_depend_on_the_company(model, others):
    """With as many steps of prefill as the others need, and however they are shared out."""
    generator = make(model, prefill_chunk=32)
    settings = {"temperature": 1.5, "seed": 5, "stop_tokens": ()}
    first, *rest = random_prompts(60, *others)
    alone = generator.generate([first], 12, **settings)[0]
    assert generator.generate([first, *rest], 12, **settings)[0].tokens == alone.tokens


def test_samples_have_the_probabilities_asked_for():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -9.0])
    rows, draws = 500, 40
    for temperature, top_p in ((1.0, 1.0), (2.0, 1.0), (0.5, 1.0), (1.0, 0.8), (1.0, 0.9)):
        expected = torch.softmax(logits / temperature, -1)
        if top_p < 1:
            kept = 1 + int((expected.cumsum(-1) < top_p).sum())  # logits are descending
            assert kept == {0.8: 2, 0.9: 3}[top_p]
            expected[kept:] = 0
            expected /= expected.sum()
        sampler = Sampler(rows, 5, torch.device("cpu"))
        generator = torch.Generator().manual_seed(sampler.start(temperature, top_p, seed=0))
        counts = torch.zeros(5)
        for _ in range(draws):
            for row in range(rows):
                sampler.draw(row, generator)
            counts += torch.bincount(sampler.sample(logits.expand(rows, -1)), minlength=5)
        deviation = (counts / (rows * draws) - expected).abs()
        assert (deviation <= 4 * (expected * (1 - expected) / (rows * draws)).sqrt()).all()


def test_the_nucleus_is_the_fewest_tokens_with_the_mass():
    probabilities = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.25, 0.25, 0.25, 0.25]])
    kept = keep_nucleus(probabilities, 0.7)
    assert torch.equal(kept, torch.tensor([[0, 0.5, 0, 0.25], [0.25, 0.25, 0.25, 0]]))
    assert torch.equal(keep_nucleus(probabilities, 0.01) > 0, torch.tensor([[0, 1, 0, 0], [1, 0, 0, 0]]).bool())


def test_prompts_are_split_into_full_steps():
    assert list(split_prompts([5, 1, 9], 4)) == [
        [(0, 0, 4)],
        [(0, 4, 5), (1, 0, 1), (2, 0, 2)],
        [(2, 2, 6)],
        [(2, 6, 9)],
    ]


def test_kv_read_share_counts_metadata_and_chosen_pages(model):
    quest = pages_of_16(token_budget=64, sink_tokens=16, recent_tokens=16, dense_layers=(0,))
    assert kv_tokens_read(64, quest) == 64  # 4 pages fit the budget
    assert kv_tokens_read(65, quest) == 5 + 64
    assert kv_tokens_read(160, quest, metadata_scale=0.5) == 5 + 64
    per_head = pages_of_16(token_budget=64, sink_tokens=16, recent_tokens=16, head_reduction="none")
    assert kv_tokens_read(160, per_head, group=3) == 10 + 3 * 64

    growing = replace(quest, budget_ratio=0.5)
    assert kv_tokens_read(65, growing) == 5 + 64 and kv_tokens_read(160, growing) == 10 + 80
    by_head = replace(quest, token_budget=80, head_budgets=((112, 48), (48, 160), (64, 48)))
    heads = 10 + 48, 160, 10 + 64, 10 + 48  # of layers 1 and 2; 160 tokens fit the second
    assert kv_tokens_read(160, by_head) == sum(heads) / 4
    grown = replace(by_head, budget_ratio=0.6)  # 96 tokens: 6 pages instead of 5
    assert kv_tokens_read(160, grown) == (2 * (10 + 48) + 160 + 10 + 64) / 4
    assert kv_tokens_read(160, replace(by_head, dense_layers=(0, 1, 2))) == 0  # no layer that chooses

    prompt = random_prompts(160)[0]
    result = make(model, quest=quest).generate([prompt], 17, stop_tokens=())[0]
    assert result.decode_steps == 16  # lengths 161 to 176: 11 pages
    assert result.kv_read_share == pytest.approx((176 + 2 * (11 + 64)) / (3 * 176))
    assert make(model, attention="dense").generate([prompt], 17, stop_tokens=())[0].kv_read_share == 1.0
    assert make(model, quest=quest).generate([prompt[:40]], 17, stop_tokens=())[0].kv_read_share == 1.0
    beside = make(model, quest=replace(quest, dense_below=168)).generate([prompt[:90], prompt], 17, stop_tokens=())
    assert beside[0].kv_read_share == 1.0  # though its neighbour's steps 8 to 16 choose pages
    assert beside[1].kv_read_share == pytest.approx((8 * 3 * 176 + 8 * (176 + 2 * (11 + 64))) / (16 * 3 * 176))


def test_profiling_measures_a_part_of_the_time(model):
    result = make(model).generate(random_prompts(200), 10, profile_attention=True, stop_tokens=())[0]
    assert 0 < result.prefill_attention_seconds < result.prefill_seconds
    assert 0 < result.decode_attention_seconds < result.decode_seconds
    assert result.decode_steps == 9
    plain = make(model).generate(random_prompts(200), 10, stop_tokens=())[0]
    assert plain.decode_attention_seconds is None and plain.tokens == result.tokens


def test_recorded_pages_are_the_pages_attended_to(model):
    quest = pages_of_16(token_budget=64, sink_tokens=16, recent_tokens=16, dense_layers=(1,))
    generator = make(model, quest=quest)
    attention, run, last = generator.attention, generator.attention.run, {}

    def remember(layer, query, key, value):
        out = run(layer, query, key, value)
        last[layer] = (query.clone(), out.clone())
        return out

    attention.run = remember
    result = generator.generate(random_prompts(50, 201), 9, record_pages=(0, 7), stop_tokens=())[1]
    assert set(result.pages) == {(step, layer) for step in (0, 7) for layer in (0, 2)}
    for (step, _), pages in result.pages.items():
        assert pages.shape == (2, 4) and pages.dtype == torch.int32
        assert (pages[:, 0] == 0).all() and (pages[:, -1] == (201 + step) // 16).all()
    # Freed blocks keep their contents: attend to the recorded pages of the last step once more.
    for layer in (0, 2):
        query, out = last[layer]
        again, _ = ops.sparse_decode_attention(
            query[1:],
            generator.cache.k_cache(layer),
            generator.cache.v_cache(layer),
            attention.block_table[1:2],
            attention.seq_lens[1:2],
            result.pages[7, layer][None],
        )
        torch.testing.assert_close(again, out[1:])


def test_bad_requests_are_refused_before_anything_runs(model, monkeypatch):
    generator = make(model, max_batch_size=2)
    monkeypatch.setattr(generator, "model", SimpleNamespace(config=CONFIG))  # a forward pass would fail
    prompt = random_prompts(10)[0]
    for prompts, settings, message in [
        ([], {}, "prompts"),
        ([prompt, []], {}, r"prompts\[1\] has 0 tokens"),
        ([[1] * 257], {}, "has 257 tokens; supported: 1 to 256"),
        ([[1, 500]], {}, "token ids 1 to 500"),
        ([[-1]], {}, "token ids -1"),
        ([prompt], {"temperature": -0.1}, "temperature"),
        ([prompt], {"temperature": float("nan")}, "temperature"),
        ([prompt], {"temperature": 1.0, "top_p": 0.0}, "top_p"),
        ([prompt], {"temperature": 1.0, "top_p": 1.1}, "top_p"),
        ([prompt], {"seed": 2**64}, "seed must be below"),
        ([prompt], {"max_new_tokens": 0}, "max_new_tokens"),
    ]:
        with pytest.raises(ValueError, match=message):
            generator.generate(prompts, **{"max_new_tokens": 4, **settings})
    for settings, message in [
        ({"seed": 1.5}, "seed must be an int"),
        ({"stop_tokens": 7}, "stop_tokens must be"),
        ({"stop_tokens": ["</s>"]}, "stop_tokens must be"),
    ]:
        with pytest.raises(TypeError, match=message):
            generator.generate([prompt], 4, **settings)
    for prompts in (None, 5, ["some text"], prompt, [[1.0, 2.0]], [torch.tensor(prompt)]):
        with pytest.raises((TypeError, ValueError), match="prompts"):
            generator.generate(prompts, 4)
    assert generator.cache.free_blocks == generator.cache.num_blocks


def test_bad_generators_are_refused(model):
    with pytest.raises(ValueError, match="513 is more than this model's 512 positions"):
        make(model, max_sequence_tokens=513)
    with pytest.raises(ValueError, match="max_batch_size"):
        make(model, max_batch_size=0)
    with pytest.raises(ValueError, match="prefill_chunk"):
        make(model, prefill_chunk=0)
    with pytest.raises(ValueError, match="backend"):
        make(model, attention="sparse")
    with pytest.raises(TypeError, match="quest must be a QuestConfig"):
        make(model, quest="paper")
    with pytest.raises(TypeError, match="compile must be None, True or False, got 'yes'"):
        make(model, compile="yes")
    with pytest.raises(TypeError, match="model must be a Llama"):
        make("smollm2")


def test_smollm2_agrees_with_transformers(smollm2_checkpoint):
    transformers = pytest.importorskip("transformers")
    # The published config of SmolLM2-135M-Instruct, not what our reader made of the GGUF.
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        hf = transformers.LlamaForCausalLM(config)
    smollm2 = smollm2_checkpoint
    state_dict = {**smollm2.state_dict, "lm_head.weight": smollm2.state_dict["model.embed_tokens.weight"]}
    hf.load_state_dict(state_dict, assign=True)
    hf.model.rotary_emb = type(hf.model.rotary_emb)(config)  # its buffers are not in a state dict
    hf.eval()
    text = (
        "The three laws of motion were published by Isaac Newton in 1687. The first law says that a body at rest " * 2
    )
    prompt = smollm2.tokenizer.encode(text)
    with torch.inference_mode():
        theirs = hf.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, pad_token_id=2)
        their_logits = hf(torch.tensor([prompt])).logits[0]

    model = Llama.from_checkpoint(Checkpoint(smollm2.config, dict(smollm2.state_dict), smollm2.tokenizer))
    generator = Generator(model, quest=COVERING, max_sequence_tokens=256, prefill_chunk=24)
    result = generator.generate([prompt], 8, stop_tokens=())[0]
    assert result.tokens == theirs[0, len(prompt) :].tolist()

    attention = generator.attention
    attention.plan([generator.cache.add()], len(prompt), prefill=True)
    with torch.inference_mode():
        ours = model(torch.tensor(prompt), attention.positions, attention)
    assert (ours - their_logits).abs().max() <= 1e-4 * their_logits.abs().max()


def test_smollm2_loads_and_knows_a_capital():
    model, tokenizer = Llama.load("smollm2")
    assert model.dtype == default_dtype("cpu")
    generator = Generator(model, max_sequence_tokens=64)
    prompt = tokenizer.encode("Question: What is the capital of France?\nAnswer: The capital of France is")
    assert "Paris" in tokenizer.decode(generator.generate([prompt], 3)[0].tokens)


@pytest.mark.parametrize("backend", ["eager", INDUCTOR])
def test_compiled_steps_give_the_tokens_of_eager_ones(model, backend, monkeypatch):
    """With one compilation for all layers and attentions, for the first number of slots and for all others."""
    torch._dynamo.reset()
    frames = CompileCounterWithBackend(backend)
    parts = tuple(torch.compile(part, backend=frames, fullgraph=True) for part in PARTS)
    monkeypatch.setattr("quest_ops.llama.model.compiled_parts", lambda linear: parts)
    for attention in ("quest", "dense"):
        for lengths in ((90,), (60, 7, 90), (90, 30)):  # from dense steps into Quest steps while it runs
            prompts = random_prompts(*lengths)
            compiled, eager = (
                make(model, attention=attention, compile=compile).generate(prompts, 12, stop_tokens=())
                for compile in (True, False)
            )
            assert [result.tokens for result in compiled] == [result.tokens for result in eager]
    assert frames.frame_count == 2 * len(PARTS)


def test_only_cuda_graphs_are_compiled_by_default(model):
    assert not Generator(model).compile and Generator(model, compile=True).compile


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["quest", "dense"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 1}])
def test_graph_replays_give_the_tokens_of_eager_steps(attention, sampling):
    model = random_model(torch.bfloat16, "cuda")
    prompts = random_prompts(40, 7, 3)  # from dense steps into Quest steps while it runs
    graphed = make(model, attention=attention)
    results = graphed.generate(prompts, 60, stop_tokens=(), **sampling)
    assert len(graphed._graphs) == (2 if attention == "quest" else 1)
    eager = make(model, attention=attention)
    eager._use_graphs = False
    expected = eager.generate(prompts, 60, stop_tokens=(), **sampling)
    assert [r.tokens for r in results] == [r.tokens for r in expected]
    again = graphed.generate(prompts, 60, stop_tokens=(), **sampling)
    assert [r.tokens for r in again] == [r.tokens for r in expected]
    assert len(graphed._graphs) == (2 if attention == "quest" else 1)


@pytest.mark.gpu
@pytest.mark.parametrize("weights", [None, "int8", "int4"])
def test_compiled_graphs_are_close_to_eager_steps(weights):
    """In bfloat16, where rounding may decide between two tokens: logits, up to the first choice that differs."""
    torch._dynamo.reset()
    model = random_llama(CONFIG, torch.bfloat16, "cuda", weights)
    for lengths in ((90,), (60, 7, 90)):
        prompts, steps = random_prompts(*lengths), {}
        for compile in (None, False):
            generator = make(model, quest=COVERING, compile=compile)  # where rounding does not decide on pages
            assert generator.compile == (compile is None)
            steps[compile] = generate_with_logits(generator, prompts, 20)
        for compiled, eager in zip(steps[None], steps[False]):
            assert_same_choices(compiled, eager)


def generate_with_logits(generator: Generator, prompts: list, count: int) -> list[list[tuple[int, torch.Tensor]]]:
    """The tokens of each prompt, each with the logits that it was chosen by; all prompts have slots at once.

    Of a generator that has no CUDA graphs yet: logits are noted as a graph is captured.
    """
    sample, last = generator.sampler.sample, {}

    def noted(logits, rows=None):
        # Within a CUDA graph this is the tensor that every replay writes.
        last.update({row: logits[i] for i, row in enumerate(rows if rows is not None else range(len(logits)))})
        return sample(logits, rows)

    generator.sampler.sample = noted
    steps = [[] for _ in prompts]
    generator.generate(
        prompts, count, stop_tokens=(), on_token=lambda i, token: steps[i].append((token, last[i].clone()))
    )
    return steps


def assert_same_choices(steps: list, expected: list, tolerance: float = 0.06) -> None:
    """Logits agree to a part of their norm until a token differs; there the two were as likely, up to rounding."""
    for at, ((token, logits), (expected_token, expected_logits)) in enumerate(zip(steps, expected)):
        assert (logits - expected_logits).norm() <= tolerance * expected_logits.norm(), f"step {at}"
        if token != expected_token:
            gap = expected_logits[expected_token] - expected_logits[token]
            assert gap <= tolerance * expected_logits.abs().max(), f"step {at}: {token}, not {expected_token}"
            return


@pytest.mark.gpu
def test_profiling_and_recording_work_on_a_gpu():
    model = random_model(torch.bfloat16, "cuda")
    generator = make(model, quest=QUEST_FROM_THE_START)
    plain = generator.generate(random_prompts(100), 8, stop_tokens=())[0]
    result = generator.generate(random_prompts(100), 8, stop_tokens=(), profile_attention=True, record_pages=(0,))[0]
    assert result.tokens == plain.tokens
    assert 0 < result.decode_attention_seconds < result.decode_seconds
    assert result.pages[0, 2].device.type == "cpu"
