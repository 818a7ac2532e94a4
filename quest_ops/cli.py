"""The command `quest-ops`: info, demo, generate and inspect."""

from __future__ import annotations

import argparse
import io
import os
import sys
from pathlib import Path

DTYPES = ("auto", "float32", "bfloat16", "float16")
WEIGHTS = ("bf16", "int8", "int4")
ATTENTIONS = ("quest", "dense", "sdpa", "flashinfer")
BOUNDS = ("minmax", "cuboid", "mean_std")

DESCRIPTION = """\
Query-aware sparse decode attention (QUEST) for long contexts.

  quest-ops info                                          versions, devices, what runs where, what is wrong
  quest-ops demo                                          dense and Quest attention side by side on a long text
  quest-ops generate --prompt "Once upon a time"          text from SmolLM2-135M, with Quest attention
  quest-ops inspect --prompt-file report.txt --out look   which pages Quest chooses there, and what they miss
"""
INFO = """\
Prints versions, devices, the architectures that were built, which kernels each device runs and why, and what is wrong.
Exit code 0 where all devices can be used (a machine without a GPU: the CPU), 1 where there is a GPU that cannot be.
"""
GENERATE = """\
Continues a prompt: text to stdout as it comes, statistics to stderr.

  quest-ops generate --prompt "Once upon a time" --max-new-tokens 64
  quest-ops generate --chat --prompt "What is a KV cache?" --temperature 0.7 --top-p 0.9 --seed 1
  quest-ops generate --prompt-file report.txt --token-budget 512
  cat report.txt | quest-ops generate --prompt-file - --attention dense
  quest-ops generate --model ~/models/Qwen2.5-7B-Instruct --device cuda --weights int4 --prompt-file report.txt
"""
DEMO = """\
SmolLM2-135M reads the beginning of a long text (Python's language reference) with a pass key hidden in the
middle and is asked for the key, with dense and with Quest attention. Prints a table, and draws which pages Quest chose.

  quest-ops demo
  quest-ops demo --tokens 7000 --token-budget 512         a longer text, a smaller budget: see when it fails
  quest-ops demo --text book.txt --out book.png
"""
INSPECT = """\
Reads a prompt with dense attention, decodes greedily with Quest, and draws into a folder which pages it chooses by
layer, head and step (pages.png), which share of the true attention mass they miss, and the relative error of the
attention's output, by layer, against dense attention of the same queries to the same cache (fidelity.png). Prints a
table by layer; inspect.json has the numbers by layer and head.

  quest-ops inspect --prompt-file report.txt --out look
  quest-ops inspect --prompt-file report.txt --token-budget 256 --page-size 8 --metadata 8 --out finer
  cat report.txt | quest-ops inspect --prompt-file - --bound mean_std --out deviations
  quest-ops inspect --model ~/models/Qwen2.5-7B-Instruct --device cuda --prompt-file report.txt --out qwen
"""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser("quest-ops", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="info | demo | generate | inspect")

    def command(name: str, run, description: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        sub.set_defaults(run=run)
        return sub

    def add_model(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--model",
            default="smollm2",
            help='"smollm2", a GGUF file, a Hugging Face folder or a hub id "owner/name" (default: %(default)s)',
        )

    def add_budget(sub: argparse.ArgumentParser, default: int) -> None:
        sub.add_argument(
            "--token-budget", type=int, default=default, help="tokens a Quest step reads (default: %(default)s)"
        )

    def add_device(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--device", default="auto", help='"cpu", "cuda", "cuda:1" (default: a GPU if there is one)')

    command("info", run_info, INFO)

    demo = command("demo", run_demo, DEMO)
    demo.add_argument("--tokens", type=int, default=4000, help="length of the prompt (default: %(default)s)")
    add_budget(demo, 1024)
    demo.add_argument("--text", type=Path, metavar="FILE", help="another text, UTF-8")
    demo.add_argument("--new-tokens", type=int, default=32, help="tokens to generate (default: %(default)s)")
    add_device(demo)
    demo.add_argument("--out", type=Path, default=Path("demo.png"), help="the picture (default: %(default)s)")

    generate = command("generate", run_generate, GENERATE)
    add_model(generate)
    prompt = generate.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT")
    prompt.add_argument("--prompt-file", metavar="FILE", help='UTF-8 text; "-": stdin')
    generate.add_argument("--chat", action="store_true", help="the prompt is a user's message: use the chat template")
    generate.add_argument("--attention", choices=ATTENTIONS, default="quest", help="default: %(default)s")
    add_budget(generate, 2048)
    generate.add_argument("--max-new-tokens", type=int, default=128, help="default: %(default)s")
    generate.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    generate.add_argument("--top-p", type=float, default=1.0, help="default: %(default)s")
    generate.add_argument("--seed", type=int, help="of sampling (default: another one each time)")
    add_device(generate)
    generate.add_argument("--dtype", choices=DTYPES, default="auto", help="default: what is fast on the device")
    generate.add_argument("--weights", choices=WEIGHTS, help="of the layers, rounded at load (default: as --dtype)")
    generate.add_argument(
        "--compile", action="store_true", help="torch.compile decode steps: worth its seconds for many tokens on a GPU"
    )

    inspect = command("inspect", run_inspect, INSPECT)
    add_model(inspect)
    inspect.add_argument("--prompt-file", metavar="FILE", required=True, help='UTF-8 text; "-": stdin')
    inspect.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder for pictures and numbers")
    add_budget(inspect, 512)
    inspect.add_argument("--page-size", type=int, default=16, help="tokens a page (default: %(default)s)")
    inspect.add_argument("--bound", choices=BOUNDS, default="minmax", help="a page's metadata (default: %(default)s)")
    inspect.add_argument("--metadata", choices=("16", "8"), default="16", help="its bits; 16: as the cache's dtype")
    inspect.add_argument("--new-tokens", type=int, default=32, help="decode steps to look at (default: %(default)s)")
    add_device(inspect)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs a command. Returns its exit code: 2 after an error, which is one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a model writes any character, whatever the locale
    args = build_parser().parse_args(argv)
    try:
        code = args.run(args)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of stdout, such as `head`, has enough
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())  # for the flush at exit
        return 141  # as of a process that SIGPIPE ended
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"quest-ops {args.command}: error: {message}", file=sys.stderr)
        return 2


def run_info(_: argparse.Namespace) -> int:
    from quest_ops.info import find_problems, inspect_system, report

    system = inspect_system()
    print(report(system))
    return 1 if find_problems(system) else 0


def run_demo(args: argparse.Namespace) -> int:
    need_extra()
    from quest_ops import demo
    from quest_ops.info import choose_device

    text = demo.default_text() if args.text is None else read_text(args.text)
    demo.run(
        tokens=args.tokens,
        token_budget=args.token_budget,
        text=text,
        new_tokens=args.new_tokens,
        device=choose_device(args.device),
        out=args.out,
    )
    return 0


def run_generate(args: argparse.Namespace) -> int:
    need_extra()
    import torch
    from rich.console import Console

    from quest_ops.config import QuestConfig
    from quest_ops.info import choose_device
    from quest_ops.llama.generate import Generator
    from quest_ops.llama.model import Llama
    from quest_ops.llama.sampling import check_sampling
    from quest_ops.progress import ProgressBars

    quest = QuestConfig(token_budget=args.token_budget)
    text = read_prompt(args.prompt_file) if args.prompt is None else args.prompt
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")
    check_sampling(args.temperature, args.top_p, args.seed)
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    with ProgressBars() as bars:
        model, tokenizer = Llama.load(
            args.model,
            dtype=dtype,
            weights=args.weights,
            device=choose_device(args.device),
            progress=bars.bytes("loading the model"),
        )
        if args.chat:
            prompt = tokenizer.encode(tokenizer.chat([{"role": "user", "content": text}]), add_special=False)
        else:
            prompt = tokenizer.encode(text)
        positions = model.config.max_position_embeddings
        if not 1 <= len(prompt) <= positions:
            raise ValueError(f"the prompt has {len(prompt)} tokens; this model takes 1 to {positions}")
        generator = Generator(
            model,
            attention=args.attention,
            quest=quest,
            max_sequence_tokens=min(len(prompt) + args.max_new_tokens, positions),
            compile=args.compile,
        )
        stream = tokenizer.stream()

        def write(_: int, token: int) -> None:
            bars.stop()
            print(stream.step(token), end="", flush=True)

        result = generator.generate(
            [prompt],
            args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed,
            on_token=write,
            progress=bars.phases(args.attention),
        )[0]
    print(stream.flush())
    lines = [
        f"{len(prompt)} prompt tokens in {result.prefill_seconds:.2f} s; {len(result.tokens)} new ones, ended by "
        f"{result.finish_reason}"
    ]
    if result.decode_steps:
        weights = args.weights or str(model.dtype).removeprefix("torch.")
        lines.append(
            f"{result.decode_seconds / result.decode_steps * 1e3:.2f} ms a token, {result.kv_read_share:.0%} of the KV "
            f"bytes read; {args.attention} attention, {weights} on {model.device}"
        )
    Console(stderr=True, highlight=False).print("\n".join(lines), style="dim", soft_wrap=True)
    return 0


def run_inspect(args: argparse.Namespace) -> int:
    need_extra()
    import torch

    from quest_ops import inspection_report
    from quest_ops.config import QuestConfig
    from quest_ops.info import choose_device

    quest = QuestConfig(
        token_budget=args.token_budget,
        page_size=args.page_size,
        bound=args.bound,
        metadata_dtype=torch.float8_e4m3fn if args.metadata == "8" else None,
    )
    inspection_report.run(
        model=args.model,
        text=read_prompt(args.prompt_file),
        quest=quest,
        new_tokens=args.new_tokens,
        device=choose_device(args.device),
        out=args.out,
    )
    return 0


def read_prompt(file: str) -> str:
    return read_stdin() if file == "-" else read_text(Path(file))


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def read_stdin() -> str:
    if sys.stdin is None:
        raise ValueError("--prompt-file -: stdin is closed")
    sys.stdin.reconfigure(encoding="utf-8", errors="strict")  # whatever the locale
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"stdin is not UTF-8 text: {error}") from error


def need_extra() -> None:
    try:
        import gguf  # noqa: F401
        import matplotlib  # noqa: F401
        import rich  # noqa: F401
        import tokenizers  # noqa: F401
    except ImportError as error:
        raise ImportError(f'{error.name} is not installed: pip install "quest_ops[llama]"') from error


if __name__ == "__main__":
    sys.exit(main())
