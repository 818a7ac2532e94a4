"""The decoder gives the logits of `transformers`, for every family and RoPE variant."""

import dataclasses

import pytest
import torch

from quest_ops.attention import QuestAttention
from quest_ops.cache import PagedKVCache
from quest_ops.config import QuestConfig
from quest_ops.llama.config import LlamaConfig
from quest_ops.llama.model import Llama
from quest_ops.llama.rope import rope_frequencies
from quest_ops.llama.weights import Checkpoint

transformers = pytest.importorskip("transformers")

SMALL = dict(vocab_size=300, intermediate_size=112, num_hidden_layers=3, head_dim=64, max_position_embeddings=512)
GQA3 = dict(hidden_size=96, num_attention_heads=6, num_key_value_heads=2)
MHA = dict(hidden_size=128, num_attention_heads=2, num_key_value_heads=2)
LLAMA3_ROPE = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=128)
LINEAR = dict(rope_type="linear", factor=4.0)

CASES = {
    "llama1": ("Llama", dict(MHA, tie_word_embeddings=False)),
    "llama_gqa3_tied": ("Llama", dict(GQA3, tie_word_embeddings=True)),
    "llama_all_attention_biases": ("Llama", dict(GQA3, attention_bias=True)),
    "llama_linear": ("Llama", dict(GQA3, rope=LINEAR)),
    "llama3_rope": ("Llama", dict(GQA3, rope=LLAMA3_ROPE, rope_theta=500000.0)),
    "llama_yarn": ("Llama", dict(GQA3, rope=YARN)),
    "mistral": ("Mistral", dict(GQA3, sliding_window=None)),
    "qwen2_tied": ("Qwen2", dict(GQA3, tie_word_embeddings=True, use_sliding_window=False)),
    "qwen2_yarn": ("Qwen2", dict(GQA3, rope=dict(YARN, attention_factor=1.5, beta_fast=16.0), rope_theta=1000000.0)),
    "qwen3": ("Qwen3", dict(GQA3, rope_theta=1000000.0)),
    "qwen3_yarn_bias": ("Qwen3", dict(GQA3, attention_bias=True, rope=YARN)),
}


def random_hf_model(family: str, settings: dict):
    settings = {**SMALL, **settings}
    rope = {"rope_type": "default", **settings.pop("rope", {}), "rope_theta": settings.pop("rope_theta", 10000.0)}
    config = getattr(transformers, f"{family}Config")(**settings, rope_parameters=rope)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval().float()
    with torch.no_grad():  # as initialised, biases are zero and norms one: neither would be seen
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * (0.5 if name.endswith("bias") else 0.15))
    return model


def our_model(hf, **config_changes) -> Llama:
    state_dict = {name: tensor.clone() for name, tensor in hf.state_dict().items()}
    config = dataclasses.replace(LlamaConfig.from_hf(hf.config.to_dict()), **config_changes)
    if config.tie_word_embeddings:
        state_dict.pop("lm_head.weight", None)
    return Llama.from_checkpoint(Checkpoint(config, state_dict, tokenizer=None))


def attention_for(model: Llama, batch: int = 1, tokens: int = 256, **quest) -> QuestAttention:
    """A covering budget, and no step so short that it would skip the Quest op."""
    quest = QuestConfig(**{"token_budget": tokens, "dense_below": 0, **quest})
    c = model.config
    cache = PagedKVCache(
        c.num_hidden_layers, c.num_key_value_heads, c.head_dim, batch * tokens // quest.block_size, dtype=model.dtype
    )
    return QuestAttention(quest, cache, c.num_attention_heads, max_batch_size=batch, max_sequence_tokens=tokens)


def step(model, attention, seqs, pieces, *, prefill, last=None):
    attention.plan(seqs, [len(piece) for piece in pieces], prefill=prefill)
    with torch.inference_mode():
        return model(torch.cat(pieces), attention.positions, attention, last)


def assert_close(ours, theirs):
    assert ours.dtype == torch.float32 and ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_cases_are_told_apart():
    """Random weights show every option: logits of the cases with the same weights differ by far more than tolerated."""
    tokens = torch.arange(200)[None]
    with torch.inference_mode():
        logits = [random_hf_model(*CASES[name])(tokens).logits for name in CASES if CASES[name][0] == "Llama"]
    tied_apart = [x for x in logits if x.shape == logits[0].shape]
    for i, one in enumerate(tied_apart):
        for other in tied_apart[:i]:
            assert (one - other).abs().max() > 0.01 * one.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_logits_agree_with_transformers(case):
    hf = random_hf_model(*CASES[case])
    tokens = torch.randint(300, (200,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        theirs = hf(tokens[None]).logits[0].float()
    model = our_model(hf)
    attention = attention_for(model)
    seq = attention.cache.add()
    ours, start = [], 0
    for size in (1, 16, 100, 63):  # chunks that end inside pages and at their edges
        ours.append(step(model, attention, [seq], [tokens[start : start + size]], prefill=True))
        start += size
    for position in range(start, len(tokens)):
        ours.append(step(model, attention, [seq], [tokens[position : position + 1]], prefill=False))
        assert attention.step_kind == "quest"
    assert_close(torch.cat(ours), theirs)


def test_ragged_sequences_do_not_see_each_other():
    hf = random_hf_model(*CASES["llama_gqa3_tied"])
    model = our_model(hf)
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(300, (n,), generator=generator) for n in (40, 3, 97)]
    attention = attention_for(model, batch=4)
    seqs = [attention.cache.add() for _ in prompts]
    step(model, attention, seqs, [p[:-2] for p in prompts], prefill=True)
    with_gap = [seqs[0], None, seqs[1], seqs[2]]
    for back in (2, 1):
        now = [p[len(p) - back :][:1] for p in prompts]
        logits = step(model, attention, with_gap, [now[0], torch.tensor([0]), *now[1:]], prefill=False)
    for row, prompt in zip((0, 2, 3), prompts):
        with torch.inference_mode():
            assert_close(logits[row], hf(prompt[None]).logits[0, -1])


def test_last_gives_the_logits_of_those_rows_alone():
    model = our_model(random_hf_model(*CASES["mistral"]))
    tokens = torch.arange(50)
    logits = []
    for last in (None, torch.tensor([49, 7]), torch.empty(0, dtype=torch.int64)):
        attention = attention_for(model)
        logits.append(step(model, attention, [attention.cache.add()], [tokens], prefill=True, last=last))
    assert_close(logits[1], logits[0][[49, 7]])
    assert logits[2].shape == (0, 300)


def test_frequency_factors_give_what_they_were_made_from():
    hf = random_hf_model(*CASES["llama3_rope"])
    config = LlamaConfig.from_hf(hf.config.to_dict())
    plain, _ = rope_frequencies(dataclasses.replace(config, rope_scaling=None))
    scaled, _ = rope_frequencies(config)
    factors = tuple((plain / scaled).tolist())
    model = our_model(hf, rope_scaling={"rope_type": "freq_factors", "factors": factors})
    tokens = torch.arange(180)
    attention = attention_for(model)
    ours = step(model, attention, [attention.cache.add()], [tokens], prefill=True)
    with torch.inference_mode():
        assert_close(ours, hf(tokens[None]).logits[0])


def test_bfloat16_stays_near_float32():
    hf = random_hf_model(*CASES["qwen3"])
    exact = our_model(hf)
    rounded = our_model(hf).to(torch.bfloat16)
    assert rounded.rope.frequencies.dtype == torch.float32
    tokens = torch.arange(200)
    logits = []
    for model in (exact, rounded):
        attention = attention_for(model)
        logits.append(step(model, attention, [attention.cache.add()], [tokens], prefill=True))
    assert logits[1].dtype == torch.float32
    assert (logits[1] - logits[0]).abs().max() < 0.1 * logits[0].abs().max()


def test_from_checkpoint_takes_all_tensors_and_refuses_others():
    hf = random_hf_model(*CASES["qwen2_tied"])
    config = LlamaConfig.from_hf(hf.config.to_dict())
    state_dict = {name: t for name, t in hf.state_dict().items() if name != "lm_head.weight"}
    checkpoint = Checkpoint(config, dict(state_dict), tokenizer=None)
    model = Llama.from_checkpoint(checkpoint)
    assert checkpoint.state_dict == {}
    assert not any(p.requires_grad or p.is_meta for p in model.parameters())
    assert model.lm_head.weight.data_ptr() == model.embedding.weight.data_ptr()
    for name in ("model.norm.weight", "model.layers.1.self_attn.k_proj.bias", "model.layers.2.mlp.down_proj.weight"):
        with pytest.raises(ValueError, match=name):
            Llama.from_checkpoint(Checkpoint(config, {k: v for k, v in state_dict.items() if k != name}, None))
    with pytest.raises(ValueError, match="odd.weight"):
        Llama.from_checkpoint(Checkpoint(config, {**state_dict, "odd.weight": torch.ones(1)}, None))
