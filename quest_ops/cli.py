"""The command `quest-ops`, whose commands are in quest_ops/commands/."""

from __future__ import annotations

import argparse
import io
import os
import sys

from quest_ops.commands import calibrate, demo, generate, info, inspect

COMMANDS = {"info": info, "demo": demo, "generate": generate, "inspect": inspect, "calibrate": calibrate}

DESCRIPTION = """\
Query-aware sparse decode attention (QUEST) for long contexts.

  quest-ops info                                          versions, devices, what runs where, what is wrong
  quest-ops demo                                          dense and Quest attention side by side on a long text
  quest-ops generate --prompt "Once upon a time"          text from SmolLM2-135M, with Quest attention
  quest-ops inspect --prompt-file report.txt --out look   which pages Quest chooses there, and what they miss
  quest-ops calibrate --text book.txt                     a budget for each layer and KV head, measured on a text
"""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    shape = argparse.RawDescriptionHelpFormatter
    parser = Parser("quest-ops", description=DESCRIPTION, formatter_class=shape)
    commands = parser.add_subparsers(dest="command", required=True, metavar=" | ".join(COMMANDS))
    for name, module in COMMANDS.items():
        sub = commands.add_parser(name, description=module.DESCRIPTION, formatter_class=shape, allow_abbrev=False)
        sub.set_defaults(run=module.run)
        module.add_arguments(sub)
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


if __name__ == "__main__":
    sys.exit(main())
