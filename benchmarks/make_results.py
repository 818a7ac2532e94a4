"""Makes the files of benchmarks/results that are timings on a GPU, one after the other, by the commands that they name.

    python benchmarks/make_results.py h100
    python benchmarks/make_results.py h200 --only end_to_end-192k
    python benchmarks/make_results.py h100 --only kernels phases --csrc-tree $(git rev-parse HEAD:csrc) --out /tmp

The name given ends the files' names: kernels-h100.json. A file of several commands has the rows of all. Where a
command fails its output is kept in the log that is named, its file stays as it was, and the exit code is 1 after all
others have run.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import record

SEVEN, EIGHT = "end_to_end.py --model llama-2-7b", "end_to_end.py --model llama-3.1-8b"
ALL_POLICIES = "--policy minmax minmax-8bit default"
PARTS = {
    "kernels": ["kernels.py"],
    "kernels-extra": ["kernels.py --extra"],
    "phases": ["kernels.py --phases"],  # with a library that notes clocks (phases.py)
    "break_even": ["break_even.py"],
    "end_to_end": [
        f"{SEVEN} --weights int4 --context 32768 98304 {ALL_POLICIES} --dense-layers 0 2",
        f"{EIGHT} --weights int4 --context 131072 {ALL_POLICIES} pages-of-16 for-context",
        f"{EIGHT} --weights bf16 --context 32768 --batch 8 {ALL_POLICIES}",
        f"{SEVEN} --weights bf16 --context 32768 {ALL_POLICIES} --dense-layers 0 2",
    ],
    "end_to_end-short": [
        f"{SEVEN} --weights int4 --context 8192 {ALL_POLICIES} --attention quest flashinfer",
        f"{EIGHT} --weights int4 --context 8192 32768 {ALL_POLICIES} --attention quest flashinfer",
    ],
    "end_to_end-192k": [  # 140 GB
        f"{SEVEN} --weights int4 --context 196608 --attention quest flashinfer "
        "--policy minmax-8bit pages-of-32-8bit pages-of-32 default for-context"
    ],
    "recorded": ["recorded.py"],
}
DEFAULT = [part for part in PARTS if part not in ("phases", "end_to_end-192k", "recorded")]
SAME = "gpu", "cpu", "torch", "csrc_tree", "what", "threads", "compiled"  # of all commands of a file
ALL = "linear", "rows"  # one after the other


def joined(records: list[dict]) -> dict:
    """One record of several commands' ones. Raises ValueError where they are not of one machine and one source."""
    first = records[0]
    if len(records) == 1:
        return first
    for other in records[1:]:
        if different := [key for key in SAME if other.get(key) != first.get(key)]:
            raise ValueError(f"{other['command']!r} has another {different[0]} than {first['command']!r}")
    commands = {"command": [one["command"] for one in records]}
    return first | commands | {key: [x for one in records for x in one[key]] for key in ALL if key in first}


def run(command: str, log: Path, csrc_tree: str | None) -> dict | None:
    """The command's record; None where it failed. It names the command without what is about files."""
    script, *arguments = command.split()
    with tempfile.TemporaryDirectory() as folder, log.open("a") as output:
        made = Path(folder, "made.json")
        tree = ["--csrc-tree", csrc_tree] if csrc_tree else []
        whole = [sys.executable, Path(__file__).parent / script, *arguments, "--json", made, *tree]
        if subprocess.run(whole, stdout=output, stderr=subprocess.STDOUT).returncode or not made.exists():
            return None
        return json.loads(made.read_text()) | {"command": f"python benchmarks/{command}"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the GPU, to end the files' names")
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=DEFAULT, metavar="PART", help=f"of {', '.join(PARTS)}; default: "
        f"without {', '.join(part for part in PARTS if part not in DEFAULT)}",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=record.ROOT / "benchmarks" / "results", metavar="FOLDER")
    record.add_csrc_tree_argument(parser)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    failed = False
    for part in args.only:
        path, log = args.out / f"{part}-{args.name}.json", args.out / f"{part}-{args.name}.log"
        log.unlink(missing_ok=True)
        records = [run(command, log, args.csrc_tree) for command in PARTS[part]]
        if None in records:
            failed = True
            print(f"{part}: {PARTS[part][records.index(None)]!r} failed, see {log}", flush=True)
            continue
        record.save(path, joined(records))
        log.unlink()
        print(f"{part}: {path}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
