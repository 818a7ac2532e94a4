"""The command line: what info says is wrong, what generate and inspect write where, one-line errors, demo's answer."""

import dataclasses
import io
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from models import random_llama, small_config

from quest_ops import QuestConfig, cli, demo, info, inspection_report
from quest_ops.commands import generate as generate_command
from quest_ops.head_budgets import HeadBudgets
from quest_ops.info import Device, System
from quest_ops.llama.quantized import WEIGHTS

H100 = Device(0, "NVIDIA H100", (9, 0), 80 * 2**30)
A10 = Device(1, "NVIDIA A10", (8, 6), 24 * 2**30)
V100 = Device(0, "Tesla V100", (7, 0), 32 * 2**30)
B200 = Device(0, "NVIDIA B200", (10, 0), 180 * 2**30)

SYSTEM = System(
    quest_ops="0.1.0",
    torch="2.13.0",
    python="3.11.7",
    platform="linux x86_64",
    cpu_kernels="avx512",
    built_archs=("80-real", "90-real", "90-virtual"),
    built_cuda="13.0.88",
    torch_cuda="13.0",
    driver_cuda=(13, 0),
    devices=(H100, A10),
)


def system(**changes) -> System:
    return dataclasses.replace(SYSTEM, **changes)


@pytest.mark.parametrize(
    ("arch", "capability", "way"),
    [
        ("80-real", (8, 0), "compiled"),
        ("80-real", (8, 9), "compiled"),  # binaries run on later minor versions
        ("80-real", (9, 0), None),
        ("86-real", (8, 0), None),
        ("90-virtual", (9, 0), "PTX"),
        ("90-virtual", (12, 0), "PTX"),
        ("90-virtual", (8, 9), None),
        ("90", (9, 0), "compiled"),
        ("90", (10, 3), "PTX"),
        ("90a", (9, 0), "compiled"),
        ("90a", (10, 0), None),
        ("100f-real", (10, 3), "compiled"),
        ("120-real", (12, 1), "compiled"),
        ("all-major", (9, 0), "compiled"),
    ],
)
def test_how_an_architecture_runs_on_a_chip(arch, capability, way):
    assert info.how_arch_runs(arch, capability) == way


def test_all_is_well():
    assert info.find_problems(SYSTEM) == []
    text = info.report(SYSTEM)
    for part in ("13.0.88", "driver: 13.0", "80-real, 90-real, 90-virtual", "avx512", "NVIDIA H100", "8.6", "24 GiB"):
        assert part in text
    assert "problem" not in text
    usable, why = info.describe_device(H100, SYSTEM)
    assert usable and "in one launch (fused) up to 8 query heads a KV head, else portable" in why
    assert "code for 90-real" in why
    usable, why = info.describe_device(A10, SYSTEM)
    assert usable and "fused" not in why and "portable" in why and "code for 80-real" in why
    assert "PTX" in info.describe_device(B200, SYSTEM)[1]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"driver_cuda": (12, 8)}, "the driver runs CUDA 12.8, older than nvcc 13.0.88"),
        ({"built_archs": ("80-real",), "devices": (H100,)}, "cuda:0 .* rebuild with QUEST_OPS_CUDA_ARCHS=90"),
        ({"built_archs": ()}, "CPU kernels only: install with QUEST_OPS_DEVICE=cuda"),
        ({"devices": (V100,)}, "compute capability 8.0 or later"),
        ({"devices": (B200,), "built_cuda": "13.2.1"}, "only PTX .*90-virtual.* QUEST_OPS_CUDA_ARCHS=100"),
        ({"devices": (), "torch": "2.13.0+cpu", "torch_cuda": None}, r"torch 2.13.0\+cpu is a CPU build"),
        ({"devices": (), "driver_cuda": (12, 4)}, "torch sees no GPU: the driver runs CUDA 12.4"),
        ({"devices": ()}, "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_what_is_wrong_is_named(changes, problem):
    problems = info.find_problems(system(**changes))
    assert problems
    assert all(re.search(problem, found) for found in problems)
    assert "problem" in info.report(system(**changes))


def test_no_gpu_is_no_problem():
    without = system(driver_cuda=None, devices=(), torch_cuda=None, built_archs=(), built_cuda=None)
    assert info.find_problems(without) == []
    assert "none: CPU kernels only" in info.report(without)


def test_a_missing_pybind_module_is_named_and_no_problem():
    without = system(built_archs=None, built_cuda=None)
    assert "quest_ops._C is missing" in info.report(without)
    assert info.find_problems(without) == []


def run_process(*arguments, stdin="", **environment):
    """In a process of its own, which takes seconds to import torch: for what depends on one."""
    command = [sys.executable, "-m", "quest_ops.cli", *map(str, arguments)]
    env = os.environ | environment
    return subprocess.run(command, check=False, capture_output=True, text=True, input=stdin, env=env)


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of a command, in this process."""
    capsys.readouterr()
    return cli.main(list(map(str, arguments))), *capsys.readouterr()


def assert_refused(result, message):
    """result: (exit code, stdout, stderr) of a command that says in one line what is wrong; message: a pattern."""
    code, out, error = result
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert re.search(f"^quest-ops [a-z]+: error: .*{message}", error)


def test_info_of_this_machine():
    done = run_process("info", QUEST_OPS_CPU_CAPABILITY="")
    problems = info.find_problems(info.inspect_system())
    assert done.returncode == (1 if problems else 0) and done.stderr == ""
    assert torch.__version__ in done.stdout
    assert all(problem in done.stdout for problem in problems)
    assert re.search("CPU kernels: (avx512|avx2|plain)\n", done.stdout)


def test_info_names_the_cpu_kernels_that_are_asked_for():
    assert "CPU kernels: plain" in run_process("info", QUEST_OPS_CPU_CAPABILITY="plain").stdout
    refused = run_process("info", QUEST_OPS_CPU_CAPABILITY="mmx").stdout
    assert re.search(
        'CPU kernels: .*QUEST_OPS_CPU_CAPABILITY is "mmx"; this machine and build support .*plain', refused
    )


@pytest.mark.parametrize("arguments", [(), *((name,) for name in cli.COMMANDS)])
def test_help_explains_by_examples(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*arguments, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert arguments == ("info",) or "  quest-ops " in shown
    assert arguments or all(f"  quest-ops {name} " in shown for name in cli.COMMANDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder with a random Llama and a tokenizer of single bytes."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=300,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=64,
            max_position_embeddings=300,
            eos_token_id=None,
            bos_token_id=None,
        )
    )
    model.save_pretrained(folder)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


PROMPT = "A prompt that is longer than the budget of a hundred tokens. " * 3
GENERATE = ("--token-budget", 112, "--max-new-tokens", 12, "--device", "cpu", "--dtype", "float32")


def generate(capsys, folder, *arguments):
    return run(capsys, "generate", "--model", folder, *GENERATE, *arguments)


def test_generate_writes_text_to_stdout_and_statistics_to_stderr(folder, capsys, tmp_path):
    code, text, statistics = generate(capsys, folder, "--prompt", PROMPT)
    assert code == 0 and text.endswith("\n") and len(text) > 1
    assert f"{len(PROMPT)} prompt tokens" in statistics and "12 new ones, ended by length" in statistics
    assert "quest attention, float32 on cpu" in statistics and "100% of the KV" not in statistics
    (tmp_path / "prompt.txt").write_text(PROMPT)
    assert generate(capsys, folder, "--prompt-file", tmp_path / "prompt.txt")[:2] == (0, text)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_weights_are_rounded_as_asked_for(folder, capsys, weights):
    arguments = ("generate", "--model", str(folder), "--prompt", PROMPT, "--max-new-tokens", "4", "--device", "cpu")
    assert cli.main([*arguments, "--weights", weights]) == 0
    assert generate_command.WEIGHTS == WEIGHTS  # which it repeats, to be as quick as it is without the decoder
    assert f"attention, {weights} on cpu" in capsys.readouterr().err
    assert cli.main([*arguments, "--weights", weights, "--dtype", "float32"]) == 2
    assert f"weights '{weights}' go with dtype bfloat16, got torch.float32" in capsys.readouterr().err


def test_the_attentions_agree_where_the_budget_covers_the_prompt(folder, capsys):
    texts = {
        attention: generate(capsys, folder, "--prompt", PROMPT, "--token-budget", 512, "--attention", attention)[:2]
        for attention in ("quest", "dense", "sdpa")
    }
    assert len(set(texts.values())) == 1 and texts["dense"][0] == 0


def test_choosing_pages_less_often_reads_less(folder, capsys):
    shares = []
    for every in (1, 8):
        code, _, statistics = generate(capsys, folder, "--prompt", PROMPT, "--select-every", every)
        shares.append(int(re.search(r"(\d+)% of the KV bytes", statistics)[1]))
        assert code == 0
    assert shares[1] < shares[0] < 100


def test_a_seed_fixes_the_sample(folder, capsys):
    def sample(seed):
        return generate(capsys, folder, "--prompt", "A", "--temperature", 2, "--top-p", 0.95, "--seed", seed)[1]

    assert sample(1) == sample(1) != sample(2)


def test_stdin_is_a_prompt_whatever_the_locale_and_only_text_comes_out(folder, capsys):
    """A locale does not change what is read, nor stop what is written."""
    _, given, _ = generate(capsys, folder, "--prompt", "caf\u00e9")
    arguments = ("generate", "--model", folder, *GENERATE, "--prompt-file", "-")
    piped = run_process(*arguments, stdin="caf\u00e9", PYTHONIOENCODING="ascii")
    assert piped.returncode == 0, piped.stderr
    assert piped.stdout == re.sub(r"[^\x00-\x7f]", "?", given)
    assert "ms a token" in piped.stderr


def give_stdin(monkeypatch, content, encoding="utf-8"):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding=encoding))


def test_stdin_that_is_no_text_is_one_error(folder, capsys, monkeypatch):
    give_stdin(monkeypatch, b"a\xff")
    assert_refused(generate(capsys, folder, "--prompt-file", "-"), "stdin is not UTF-8 text")


def test_a_reader_that_has_enough_ends_it_quietly(folder):
    command = [sys.executable, "-m", "quest_ops.cli", "generate", "--model", str(folder), *map(str, GENERATE)]
    writer = subprocess.Popen([*command, "--prompt", "A"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    writer.stdout.close()
    with writer.stderr:
        assert b"error" not in writer.stderr.read().lower()
    assert writer.wait() == 141


@pytest.mark.parametrize("when", ["prefill", "decode"])
def test_ctrl_c_ends_it_without_a_traceback(folder, when, monkeypatch, capsys):
    from quest_ops.llama.generate import Generator

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Generator, f"_{when}", interrupt)
    code, _, error = generate(capsys, folder, "--prompt", "A")
    assert code == 130 and "error" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", PROMPT * 2), "the prompt has 366 tokens; this model takes 1 to 300"),
        (("--prompt", ""), "the prompt has 0 tokens"),
        (("--prompt", "A", "--token-budget", 64), "token_budget 64 is 8 pages"),
        (("--prompt", "A", "--budget-ratio", 1.5), "budget_ratio must be between 0 and 1"),
        (("--prompt", "A", "--select-every", 9), "select_every must be 1 to page_size = 8, got 9"),
        (("--prompt", "A", "--max-new-tokens", 0), "--max-new-tokens must be at least 1, got 0"),
        (("--prompt", "A", "--temperature", -1), "temperature must be"),
        (("--prompt", "A", "--top-p", 0), "top_p must be"),
        (("--prompt", "A", "--seed", 2**64), "seed must be below"),
        (("--prompt", "A", "--device", "tpu"), "--device must be"),
        (("--prompt", "A", "--device", "cuda:99"), "torch sees .* CUDA devices"),
        (("--prompt", "A", "--chat"), "no chat template"),
        (("--prompt", "A", "--attention", "flashinfer"), "needs a cache on a CUDA GPU"),
        (("--prompt-file", "no/such/file"), "No such file"),
        (("--prompt", "A", "--model", "no-such-model"), "there is no model at 'no-such-model'"),
    ],
)
def test_generate_errors_are_one_line(folder, capsys, arguments, message):
    assert_refused(generate(capsys, folder, *arguments), message)


def test_calibrated_budgets_are_written_and_read(folder, capsys, tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "budgets.json"
    text.write_text("".join(chr(33 + i * i % 90) for i in range(900)))
    settings = "--token-budget", 112, "--recent-tokens", 16
    sizes = "--windows", 3, "--steps", 16, "--device", "cpu"  # 284 tokens and 16: the model's 300 positions
    code, shown, _ = run(capsys, "calibrate", "--model", folder, "--text", text, *settings, *sizes, "--out", out)
    assert code == 0
    assert "tokens for 2 heads, 112 on average\nerror of a layer's attention output after 284 tokens" in shown
    config = QuestConfig.with_head_budgets(out)
    assert (config.page_size, config.bound, config.bound_scale) == (8, "principal", 1.0)
    assert (config.token_budget, config.recent_tokens) == (112, 16)
    (first,), (second,) = config.head_budgets
    assert first + second == 224

    def generated(*budget):
        arguments = "--prompt", PROMPT, "--max-new-tokens", 4, "--device", "cpu"
        return run(capsys, "generate", "--model", folder, *arguments, *budget)

    shares = []
    for every in (1, 4):
        code, _, statistics = generated("--head-budgets", out, "--select-every", every)
        assert code == 0
        shares.append(int(re.search(r"(\d+)% of the KV", statistics)[1]))
    assert shares[1] < shares[0] < 100
    message = r"text.txt is no JSON file: Expecting value: line 1 column 1 \(char 0\)$"
    assert_refused(generated("--head-budgets", text), message)
    HeadBudgets("another", 8, 16, 64, "minmax", 1.0, 256, ((256, 256),)).save(out)
    message = "config.head_budgets has 1 layers of 2 KV heads, the cache has 2 of 1"
    assert_refused(generated("--head-budgets", out), message)
    with pytest.raises(SystemExit):
        generated("--head-budgets", out, "--token-budget", 112)
    assert "not allowed with argument" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "page_size"),
    [
        (("--token-budget", 256), 4),  # 187 tokens are less than 8 budgets
        (("--token-budget", 256, "--select-every", 8), 8),
        (("--token-budget", 256, "--budget-ratio", 0.1), 8),
        ((), 8),  # too few tokens for pages of 4
    ],
)
def test_pages_suit_the_context(folder, capsys, monkeypatch, arguments, page_size):
    from quest_ops.llama import generate as module

    made, init = [], module.Generator.__init__
    monkeypatch.setattr(module.Generator, "__init__", lambda *a, **k: (made.append(k["quest"]), init(*a, **k))[1])
    code, _, _ = generate(capsys, folder, "--prompt", PROMPT, *arguments)
    assert code == 0 and [quest.page_size for quest in made] == [page_size]


def test_more_of_the_cache_is_read_with_a_ratio(folder, capsys):
    shares = []
    for ratio in ((), ("--budget-ratio", 0.8)):
        code, _, statistics = generate(capsys, folder, "--prompt", PROMPT, *ratio)
        assert code == 0
        shares.append(int(re.search(r"(\d+)% of the KV", statistics)[1]))
    assert shares[0] < 75 < shares[1] < 95


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--text", "no/such/file"), "No such file"),
        (("--text", "latin.txt"), "latin.txt is not UTF-8 text"),
        (("--out", "no/such/budgets.json"), "--out no/such/budgets.json: there is no folder no/such"),
        (("--windows", 0), "--windows must be at least 1, got 0"),
        (("--steps", 0), "--steps must be at least 1, got 0"),
        (("--token-budget", 64), "token_budget 64 is 8 pages"),
        (("--page-size", 12), "page_size must be one of"),
        (("--bound", "minmax", "--bound-scale", 2), "bound_scale must be 1 for bound 'minmax', got 2.0"),
        (("--device", "tpu"), "--device must be"),
        (("--context", 100), "context must be more than the token budget, 112, got 100"),
        (("--context", 400), "context 400 and steps 16 are more than the model's 300 positions"),
        (("--windows", 100), "context must be more than the token budget, 112, got 1"),
        (("--context", 200, "--windows", 9), "the text has 900 tokens, too few for 9 windows of 200"),
        (("--model", "no-such-model"), "there is no model at 'no-such-model'"),
    ],
)
def test_calibrate_errors_are_one_line(folder, capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("a" * 900)
    (tmp_path / "latin.txt").write_bytes(b"\xff")
    given = "--model", folder, "--text", "text.txt", "--token-budget", 112, "--steps", 16, "--device", "cpu"
    assert_refused(run(capsys, "calibrate", *given, *arguments), message)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latin.txt", "text.txt"]


def test_a_model_of_another_kind_is_one_error(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert_refused(generate(capsys, tmp_path, "--prompt", "A"), "gpt2")


@pytest.mark.parametrize("arguments", [[], ["paint"], ["generate"], ["generate", "--prompt", "A", "--attention", "no"]])
def test_usage_errors_are_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


INSPECT = ("--token-budget", 112, "--new-tokens", 5, "--device", "cpu")


def inspect(capsys, folder, tmp_path, *arguments, prompt=PROMPT):
    (tmp_path / "prompt.txt").write_text(prompt)
    given = ("--model", folder, "--prompt-file", tmp_path / "prompt.txt", "--out", tmp_path / "a/look", *INSPECT)
    return run(capsys, "inspect", *given, *arguments)


def test_inspect_draws_writes_and_prints(folder, tmp_path, capsys):
    code, out, _ = inspect(capsys, folder, tmp_path)
    look = tmp_path / "a/look"
    assert code == 0 and {file.name for file in look.iterdir()} == {"pages.png", "fidelity.png", "inspect.json"}
    assert all((look / name).read_bytes().startswith(b"\x89PNG") for name in ("pages.png", "fidelity.png"))
    found = json.loads((look / "inspect.json").read_text())
    assert found["prompt_tokens"] == len(PROMPT) == 183 and found["steps"] == 5 and found["pages"] == 24
    assert f"5 decode steps after {len(PROMPT)} tokens, 14 of 24 pages each" in out
    defaults = {"page_size": 8, "bound": "principal", "bound_scale": 1.0, "metadata_dtype": "torch.uint8"}
    assert found["quest"].items() >= defaults.items()
    assert [row["layer"] for row in found["layers"]] == [0, 1]
    for row in found["layers"]:
        assert 0 < row["missed_mass"] < 1
        assert row["missed_mass"] == pytest.approx(sum(row["missed_mass_by_head"]) / 2, abs=1e-4)
        assert 0 < row["output_error_of_steps"][0] <= row["output_error"] <= row["output_error_of_steps"][1]
        assert len(row["output_error_by_head"]) == 2 and 14 <= row["distinct_pages_by_head"][0] <= 24
        assert re.search(f"│ +{row['layer']} │ +{row['missed_mass']:.1%} │.*│ +{row['output_error']:.1%} │", out)


@pytest.mark.parametrize("bits, metadata_dtype", [(16, None), (4, "torch.uint8")])
def test_inspect_reads_stdin_and_takes_settings(folder, tmp_path, monkeypatch, capsys, bits, metadata_dtype):
    give_stdin(monkeypatch, PROMPT.encode(), "ascii")
    settings = ("--prompt-file", "-", "--page-size", 16, "--bound", "cuboid", "--bound-scale", 2, "--metadata", bits)
    assert inspect(capsys, folder, tmp_path, *settings, prompt="Not this one")[0] == 0
    found = json.loads((tmp_path / "a/look/inspect.json").read_text())
    expected = {"token_budget": 112, "page_size": 16, "bound": "cuboid", "bound_scale": 2}
    expected |= {"metadata_dtype": metadata_dtype}
    assert found["prompt_tokens"] == len(PROMPT) and found["quest"].items() >= expected.items()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--token-budget", 184), "the prompt has 183 tokens, which the token budget of 184 holds"),
        (("--new-tokens", 118), "the prompt has 183 tokens, and with 118 new ones 301; this model has 300 positions"),
        (("--new-tokens", 0), "--new-tokens must be at least 1, got 0"),
        (("--token-budget", 64), "token_budget 64 is 8 pages"),
        (("--page-size", 12), "page_size must be one of"),
        (("--out", "prompt.txt"), "--out prompt.txt: .*prompt.txt is a file"),
        (("--out", "prompt.txt/look"), "--out prompt.txt/look: .*prompt.txt is a file"),
        (("--prompt-file", "no/such/file"), "No such file"),
        (("--model", "no-such-model"), "there is no model at 'no-such-model'"),
        (("--device", "tpu"), "--device must be"),
    ],
)
def test_inspect_errors_are_one_line_and_leave_nothing(folder, tmp_path, arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert_refused(inspect(capsys, folder, tmp_path, *arguments), message)
    assert [file.name for file in tmp_path.iterdir()] == ["prompt.txt"]


def test_inspect_leaves_what_was_there_when_it_cannot_write(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"old")
    write_bytes = type(tmp_path).write_bytes

    def full(path, content):
        write_bytes(path, content[:1])
        if path.name == "b":
            raise OSError("No space left on device")

    monkeypatch.setattr(type(tmp_path), "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        inspection_report.write(tmp_path, {"a": b"new", "b": b"new"})
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a", b"old")]


def test_the_demos_answer(smollm2, tmp_path, capsys):
    """SmolLM2 finds the key with both attentions; Quest reads little more than a third of the KV cache."""
    out = tmp_path / "pages.png"
    sizes = ("--tokens", 900, "--token-budget", 304, "--new-tokens", demo.MIN_NEW_TOKENS)
    code, shown, _ = run(capsys, "demo", *sizes, "--out", out)
    shown = " ".join(shown.split())
    assert code == 0
    assert "the key is │ right │ right" in shown
    share = "36%" if "float32" in shown else "37%"  # 4.5 bits of metadata beside 32 or 16 of the cache
    assert f"KV bytes read │ 100% │ {share}" in shown
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tokens", 8170), "8192 positions: --tokens must be at most 8160"),
        (("--tokens", 40), "--tokens must be at least"),
        (("--token-budget", 32), "token_budget 32"),
        (("--new-tokens", 3), "--new-tokens must be at least"),
        (("--text", "no/such/file"), "No such file"),
        (("--out", "no/such/folder.png"), "there is no folder no/such"),
        (("--text", "short.txt"), "the text has 2 tokens; --tokens 4000 needs"),
    ],
)
def test_demo_errors(smollm2, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("Too short")
    assert_refused(run(capsys, "demo", *arguments), message)


def test_the_key_lies_in_the_middle_of_the_prompt(smollm2_checkpoint):
    tokenizer = smollm2_checkpoint.tokenizer
    prompt = demo.make_prompt(tokenizer, demo.default_text(), 1500)
    assert len(prompt.tokens) == 1500
    assert tokenizer.decode(prompt.tokens).endswith(demo.QUESTION)
    marked = [prompt.tokens[i] for i in prompt.key_tokens]
    assert tokenizer.decode(marked) == demo.KEY_PARAGRAPH
    assert 600 < prompt.key_tokens[0] < prompt.key_tokens[-1] < 900


def test_the_picture_counts_heads_and_ignores_padding():
    generation = demo.Generation(
        pages={
            (0, 0): torch.tensor([[0, 2, -1], [0, 1, 2]], dtype=torch.int32),
            (1, 1): torch.tensor([[3, -1, -1], [3, -1, -1]], dtype=torch.int32),
        }
    )
    shares = demo.page_shares(generation, 4)
    assert shares[0, 0].tolist() == [1, 0.5, 1, 0] and shares[1, 1].tolist() == [0, 0, 0, 1]
    assert shares[0, 1].sum() == shares[1, 0].sum() == 0


def test_an_answer_is_timed_and_its_pages_recorded(device):
    config = small_config(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    model = random_llama(config, torch.bfloat16, device)

    class Letters:
        def decode(self, tokens):
            return "".join(map(chr, tokens))

    prompt = demo.Prompt(torch.randint(128, (300,)).tolist(), range(100, 120))
    quest = QuestConfig(token_budget=112, dense_below=112)
    dense, sparse = (
        demo.answer(model, Letters(), prompt, attention, quest, demo.MIN_NEW_TOKENS) for attention in ("dense", "quest")
    )
    for answer in (dense, sparse):
        assert len(answer.text) == demo.MIN_NEW_TOKENS and not answer.right
        assert 0 < answer.attention_seconds and 0 < answer.step_seconds
        assert (answer.graph_step_seconds is not None) == (device == "cuda")
    assert dense.generation.pages == {}
    assert set(sparse.generation.pages) == {(step, layer) for step in range(demo.RECORDED_STEPS) for layer in (0, 1)}
    assert demo.page_shares(sparse.generation, 40).sum(-1).eq(14).all()  # of the 38 or 39 pages, 14 a layer and step
    assert len(demo.table_rows(dense, sparse)) == (7 if device == "cuda" else 6)
