"""Checkpoints: load_checkpoint returns what the files hold, and files it cannot use are named, not guessed at."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from quest_ops.llama.config import LlamaConfig
from quest_ops.llama.weights import load_checkpoint

gguf = pytest.importorskip("gguf")
safetensors_torch = pytest.importorskip("safetensors.torch")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, eos_token_id=[2, 5]),
    "llama_tied": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama_bias": lambda: transformers.LlamaConfig(**SIZES, attention_bias=True),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=None, head_dim=32),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=32),
}
HF_CONFIG = dict(SIZES, model_type="llama", rms_norm_eps=1e-5, hidden_act="silu")


def make_model(family):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]())
    for parameter in model.parameters():  # biases and norms start out constant, which would hide a mix-up
        torch.nn.init.normal_(parameter)
    return model


def save_tokenizer(folder):
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())[:90]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    backend.save(str(folder / "tokenizer.json"))


def save_folder(model, folder, **options):
    model.save_pretrained(folder, **options)
    save_tokenizer(folder)
    return folder


def expected_state(model):
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def assert_same_state(loaded, expected):
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name


@pytest.fixture
def llama_folder(tmp_path):
    return save_folder(make_model("llama"), tmp_path / "model")


@pytest.mark.parametrize("shard_size", ["1GB", "40KB"])
@pytest.mark.parametrize("family", FAMILIES)
def test_folder_loads_every_tensor_as_saved(tmp_path, family, shard_size):
    model = make_model(family)
    save_folder(model, tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "40KB")
    seen = []
    checkpoint = load_checkpoint(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert_same_state(checkpoint.state_dict, expected_state(model))
    held = sum(tensor.nbytes for tensor in checkpoint.state_dict.values())
    assert seen[-1] == (held, held) and seen == sorted(seen)

    config, source = checkpoint.config, model.config
    assert config.head_dim == (32 if family in ("mistral", "qwen3") else 16)
    assert config.attention_bias == (family in ("qwen2", "llama_bias"))
    assert config.qk_norm == (family == "qwen3")
    assert config.tie_word_embeddings == source.tie_word_embeddings
    assert config.rms_norm_eps == source.rms_norm_eps
    assert config.model_type == source.model_type
    for key, value in SIZES.items():
        assert getattr(config, key) == value
    if family == "llama":
        assert config.eos_token_ids == checkpoint.tokenizer.eos_token_ids == (2, 5)


def test_end_tokens_of_the_generation_config_win(llama_folder):
    (llama_folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    checkpoint = load_checkpoint(llama_folder)
    assert checkpoint.config.eos_token_ids == checkpoint.tokenizer.eos_token_ids == (7, 8)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("generation_config.json", {"eos_token_id": "</s>"}),
        ("tokenizer_config.json", {"bos_token": 5}),
        ("tokenizer_config.json", {"chat_template": 5}),
        ("model.safetensors.index.json", {"weight_map": {"a": 5}}),
    ],
)
def test_values_of_another_type_are_named(llama_folder, file, content):
    (llama_folder / file).write_text(json.dumps(content))
    if "index" in file:
        (llama_folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=next(iter(content))):
        load_checkpoint(llama_folder)


def test_dtype_is_the_stored_one_unless_asked(tmp_path):
    model = make_model("llama").to(torch.bfloat16)
    save_folder(model, tmp_path)
    assert_same_state(load_checkpoint(str(tmp_path)).state_dict, expected_state(model))
    asked = load_checkpoint(tmp_path, dtype=torch.float32).state_dict
    assert_same_state(asked, {name: tensor.float() for name, tensor in expected_state(model).items()})
    with pytest.raises(ValueError, match="float64.*supported"):
        load_checkpoint(tmp_path, dtype=torch.float64)


def test_tied_head_stored_all_the_same_is_left_out(tmp_path):
    model = make_model("llama_tied")
    save_folder(model, tmp_path)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    safetensors_torch.save_file(state, tmp_path / "model.safetensors")
    assert_same_state(load_checkpoint(tmp_path).state_dict, expected_state(model))


def edit_weights(folder, edit):
    file = folder / "model.safetensors"
    state = safetensors_torch.load_file(file)
    edit(state)
    safetensors_torch.save_file(state, file)


def test_wrong_tensors_are_named_before_any_is_read(llama_folder):
    def edit(state):
        del state["model.layers.1.mlp.up_proj.weight"]
        state["model.layers.0.self_attn.q_norm.weight"] = torch.ones(16)
        state["model.norm.weight"] = torch.ones(63)

    edit_weights(llama_folder, edit)
    with pytest.raises(ValueError) as error:
        load_checkpoint(llama_folder, progress=lambda done, total: pytest.fail("read a tensor"))
    for part in (
        str(llama_folder),
        "missing tensors: model.layers.1.mlp.up_proj.weight",
        "unexpected tensors: model.layers.0.self_attn.q_norm.weight",
        "model.norm.weight is [63], expected [64]",
    ):
        assert part in str(error.value)


def test_tensors_of_an_unsupported_type_are_named(llama_folder):
    edit_weights(llama_folder, lambda state: state.update({"model.norm.weight": torch.ones(64, dtype=torch.int32)}))
    with pytest.raises(ValueError, match="model.norm.weight is stored as I32; supported: F32, F16, BF16"):
        load_checkpoint(llama_folder)


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_truncated_safetensors(llama_folder, keep):
    file = llama_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="model.safetensors .*bytes.* truncated"):
        load_checkpoint(llama_folder)


def test_missing_shard(tmp_path):
    save_folder(make_model("llama"), tmp_path, max_shard_size="40KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        load_checkpoint(tmp_path)


def test_incomplete_folders(llama_folder):
    def without(name):
        shutil.move(llama_folder / name, llama_folder / "aside")
        with pytest.raises(FileNotFoundError, match=name):
            load_checkpoint(llama_folder)
        shutil.move(llama_folder / "aside", llama_folder / name)

    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        without(name)
    (llama_folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        load_checkpoint(llama_folder)


@pytest.mark.parametrize("source", ["no such model", "./no/such/folder", "nothing.gguf", "owner/nothing.gguf"])
def test_unknown_sources(source):
    with pytest.raises(FileNotFoundError, match="supported: 'smollm2', a GGUF file, a Hugging Face folder"):
        load_checkpoint(source)


def test_hub_offline(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RuntimeError, match="no local folder 'quest-ops-test/nothing'.*Check the name, the network"):
        load_checkpoint("quest-ops-test/nothing")


def test_hub_snapshot_is_loaded_as_a_folder(monkeypatch, llama_folder):
    import huggingface_hub

    def snapshot(hub_id, allow_patterns):
        assert hub_id == "owner/name" and "config.json" in allow_patterns
        return str(llama_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert load_checkpoint("owner/name").config.hidden_size == 64


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    "scaling, expected",
    [
        ({"rope_type": "default"}, None),
        ({"type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (LLAMA3, LLAMA3),
        (
            {"type": "yarn", "factor": 4.0},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
        ),
    ],
)
def test_both_spellings_of_rope(scaling, expected):
    old = LlamaConfig.from_hf(dict(HF_CONFIG, rope_theta=5e5, rope_scaling=scaling))
    new = LlamaConfig.from_hf(
        dict(HF_CONFIG, rope_parameters={"rope_theta": 5e5, "rope_type": scaling.get("type"), **scaling})
    )
    assert old == new
    assert old.rope_theta == 5e5 and old.rope_scaling == expected


def test_rope_of_a_saved_config(tmp_path):
    config = transformers.LlamaConfig(**SIZES, rope_theta=5e5, rope_scaling=dict(LLAMA3))
    config.save_pretrained(tmp_path)
    read = LlamaConfig.from_hf(json.loads((tmp_path / "config.json").read_text()))
    assert read.rope_theta == 5e5 and read.rope_scaling == LLAMA3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'.*llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "model_type None"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"model_type": "qwen3"}, "lacks head_dim"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, got 0"),
        ({"num_attention_heads": 0}, "num_attention_heads .0."),
        ({"num_attention_heads": "4"}, "num_attention_heads .'4'."),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads .3"),
        ({"head_dim": 15}, "head_dim must be even"),
        ({"rms_norm_eps": -1}, "rms_norm_eps must be a positive number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'.*linear, llama3, yarn"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps must be a positive number"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id must be"),
        ({"rope_scaling": [1]}, "must be an object, got .1."),
        ({"rope_scaling": {"type": ["yarn"]}}, "type .'yarn'. is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "lacks factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor must be a positive number, got 0"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": "32"}}, "beta_fast must be a positive number"),
        ({"rope_scaling": dict(LLAMA3, high_freq_factor=LLAMA3["low_freq_factor"])}, "must be below high_freq_factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 0.7}}, "mscale, which is not supported"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "each layer type"),
        ({"model_type": "mistral", "sliding_window": 128}, "sliding_window 128"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 128, "max_window_layers": 1},
            "sliding_window 128",
        ),
    ],
)
def test_unsupported_configs_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_hf(dict(HF_CONFIG, **change))


def test_windows_that_cannot_matter_are_accepted():
    mistral = LlamaConfig.from_hf(dict(HF_CONFIG, model_type="mistral", sliding_window=256))
    assert mistral.sliding_window == 256
    unused = dict(HF_CONFIG, model_type="qwen2", use_sliding_window=False, sliding_window=128, max_window_layers=1)
    assert LlamaConfig.from_hf(unused).sliding_window is None


# GGUF


def interleave(weight, heads):
    """Rows as llama.cpp stores them for architecture llama: row 2i of a head is row i, row 2i + 1 is row i + D / 2."""
    dim = weight.shape[0] // heads
    order = [head * dim + half * dim // 2 + i for head in range(heads) for i in range(dim // 2) for half in range(2)]
    return weight[order]


TYPES = gguf.GGMLQuantizationType
GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
GGUF_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
QUANTIZED = {"attn_q": TYPES.Q8_0, "ffn_gate": TYPES.Q4_1, "ffn_up": TYPES.F16, "ffn_down": TYPES.BF16}


def write_gguf(path, model, architecture=None, *, tensors=None, metadata=None):
    """Writes the model as llama.cpp's converter does; returns the state dict that loading should give back."""
    config = model.config
    arch = architecture or {"mistral": "llama"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim if config.model_type in ("mistral", "qwen3") else 16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5e5)
    for key, value in (metadata or {}).items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)]
        add(key, value)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())[:94]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*alphabet, "!!", "<end>"])
    writer.add_token_types([gguf.TokenType.NORMAL] * 95 + [gguf.TokenType.CONTROL])
    writer.add_token_merges(["! !"])
    writer.add_eos_token_id(95)

    expected = expected_state(model)
    for name, tensor in expected.items():
        weight = tensor.numpy()
        stored_type = TYPES.F32
        if name in GGUF_NAMES:
            stored = GGUF_NAMES[name]
        else:
            _, _, layer, rest = name.split(".", 3)
            module, kind = rest.rsplit(".", 1)
            stored = f"blk.{layer}.{GGUF_LAYER_NAMES[module]}.{kind}"
            if kind == "weight":
                stored_type = QUANTIZED.get(GGUF_LAYER_NAMES[module], TYPES.F32)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        permuted_heads = next((n for part, n in heads.items() if part in name), None) if arch == "llama" else None
        raw = gguf.quants.quantize(interleave(weight, permuted_heads) if permuted_heads else weight, stored_type)
        writer.add_tensor(stored, raw, raw_dtype=stored_type)
        # Quantization works along rows, so it commutes with their order.
        expected[name] = torch.from_numpy(
            gguf.quants.dequantize(gguf.quants.quantize(weight, stored_type), stored_type).copy()
        )
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.mark.parametrize("family", FAMILIES)
def test_gguf_loads_with_hugging_face_names_and_rope_layout(tmp_path, family):
    model = make_model(family)
    path = tmp_path / "model.gguf"
    expected = write_gguf(path, model)
    checkpoint = load_checkpoint(path)
    assert_same_state(checkpoint.state_dict, expected)
    config = checkpoint.config
    assert config.model_type == {"mistral": "llama"}.get(model.config.model_type, model.config.model_type)
    assert config.head_dim == (32 if family in ("mistral", "qwen3") else 16)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert config.tie_word_embeddings == (family == "llama_tied")
    assert config.attention_bias == (family in ("qwen2", "llama_bias"))
    assert config.qk_norm == (family == "qwen3")
    assert (config.rms_norm_eps, config.rope_theta, config.rope_scaling) == (1e-5, 5e5, None)
    assert config.eos_token_ids == checkpoint.tokenizer.eos_token_ids == (95,)
    half = load_checkpoint(path, dtype=torch.bfloat16).state_dict
    assert_same_state(half, {name: tensor.bfloat16() for name, tensor in expected.items()})


def test_gguf_rope_scaling(tmp_path):
    path = tmp_path / "model.gguf"
    factors = np.linspace(1, 8, 8, dtype=np.float32)
    write_gguf(path, make_model("llama"), tensors={"rope_freqs.weight": factors})
    assert load_checkpoint(path).config.rope_scaling == {"rope_type": "freq_factors", "factors": tuple(factors)}
    write_gguf(
        path,
        make_model("qwen2"),
        metadata={
            "qwen2.rope.scaling.type": "yarn",
            "qwen2.rope.scaling.factor": 4.0,
            "qwen2.rope.scaling.original_context_length": 64,
        },
    )
    assert load_checkpoint(path).config.rope_scaling == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    write_gguf(path, make_model("llama"), metadata=linear)
    assert load_checkpoint(path).config.rope_scaling == {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"architecture": "gptneox"}, "architecture 'gptneox' is not supported; supported: llama, qwen2, qwen3"),
        ({"metadata": {"llama.expert_count": 8}}, "mixture of 8 experts"),
        ({"metadata": {"split.count": 2}}, "split over 2 files"),
        ({"metadata": {"llama.rope.dimension_count": 8}}, "llama.rope.dimension_count 8 differs from head_dim 16"),
        ({"metadata": {"llama.rope.scaling.type": "longrope"}}, "rope.scaling.type 'longrope'"),
        ({"metadata": {"llama.attention.sliding_window": 128}}, "sliding_window 128"),
        (
            {"tensors": {"blk.0.attn_qkv.weight": np.ones((4, 4), np.float32)}},
            "unexpected tensors: blk.0.attn_qkv.weight",
        ),
        (
            {"tensors": {"blk.2.ffn_up.weight": np.ones((4, 4), np.float32)}},
            "unexpected tensors: model.layers.2.mlp.up_proj.weight",
        ),
    ],
)
def test_unsupported_gguf_files_are_named(tmp_path, options, message):
    path = tmp_path / "model.gguf"
    write_gguf(path, make_model("llama"), **options)
    with pytest.raises(ValueError, match=message) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("share", [0.0001, 0.001, 0.01, 0.03, 0.1, 0.5, 0.999])
def test_truncated_gguf(tmp_path, share):
    path = tmp_path / "model.gguf"
    write_gguf(path, make_model("llama"))
    content = path.read_bytes()
    path.write_bytes(content[: max(4, int(len(content) * share))])
    with pytest.raises(ValueError, match="model.gguf .* is truncated, damaged"):
        load_checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 a zip file", b"ggml an ancestor"])
def test_foreign_file(tmp_path, content):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="model.gguf is not a GGUF file"):
        load_checkpoint(path)


OPTIONAL = ["gguf", "tokenizers", "safetensors", "huggingface_hub", "jinja2"]


def test_importing_needs_no_optional_package():
    code = f"import sys, quest_ops.llama.weights; print([name for name in {OPTIONAL} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    # torch itself may bring jinja2 along
    assert done.returncode == 0 and set(eval(done.stdout)) <= {"jinja2"}, done.stderr


@pytest.mark.parametrize("missing", ["gguf", "tokenizers", "safetensors", "huggingface_hub"])
def test_a_missing_optional_package_is_named_with_its_remedy(monkeypatch, llama_folder, missing):
    path = llama_folder / "model.gguf"
    write_gguf(path, make_model("llama"))
    monkeypatch.setitem(sys.modules, missing, None)
    source = {"gguf": path, "huggingface_hub": "owner/name"}.get(missing, llama_folder)
    with pytest.raises(ImportError, match=rf'{missing} is needed.*pip install "quest_ops\[llama\]"'):
        load_checkpoint(source)
