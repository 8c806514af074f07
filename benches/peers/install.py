"""Makes each peer its own virtual environment, with pinned versions, outside the repository.

    python -m benches.peers.install [--venvs DIR] [--peer NAME ...]

The versions are in requirements/PEER.txt, all of them, and are installed without their dependencies: some peers ask
for packages that they do not need here and that break them (torchvision and torchaudio of another build of torch).
torch is installed first and by itself, so that pip takes the CPU wheel where there is one. A peer that cannot be
installed is told with its reason and left out; `compare` then does without it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from influence_fast.atomic import replacing

REQUIREMENTS = Path(__file__).parent / "requirements"
TORCH = "torch=="
# Imported to see whether the environment works; a package that installs may still not load.
IMPORTS = {
    "bergson": "bergson",
    "dattri": "dattri.task",
    "traker": "trak",
    "kronfluence": "kronfluence",
    "logix": "logix",
}
# Only on request: there is no CPU wheel of torch for the Python it needs, so several gigabytes are fetched.
ON_REQUEST = {"logix": "needs Python 3.10, for which torch comes with CUDA (several GB); ask for it with --peer logix"}


def default_venvs() -> Path:
    """The cache folder that the environments are kept in."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "influence-fast" / "peers"


def peer_names() -> list[str]:
    """Peers that have a file of requirements."""
    return sorted(path.stem for path in REQUIREMENTS.glob("*.txt"))


def python_of(peer: str, venvs: Path) -> Path:
    """The interpreter of a peer's environment."""
    return venvs / peer / "bin" / "python"


def is_installed(peer: str, venvs: Path) -> bool:
    """Whether the peer's environment is finished and of the versions that its requirements name now."""
    mark = venvs / peer / "installed.json"
    return mark.is_file() and json.loads(mark.read_text())["requirements"] == fingerprint(peer)


def fingerprint(peer: str) -> str:
    """Of the peer's file of requirements."""
    return hashlib.sha256((REQUIREMENTS / f"{peer}.txt").read_bytes()).hexdigest()[:16]


def requirements_of(peer: str) -> tuple[str, list[str], str | None]:
    """(torch's pin, the other pins, the Python version asked for or None) of a peer's file."""
    lines = (REQUIREMENTS / f"{peer}.txt").read_text().splitlines()
    wanted = next((line.split()[-1] for line in lines if line.startswith("# python ")), None)
    pins = [line for line in lines if line and not line.startswith("#")]
    return next(p for p in pins if p.startswith(TORCH)), [p for p in pins if not p.startswith(TORCH)], wanted


def interpreter(wanted: str | None) -> str | None:
    """An interpreter of the version `wanted`, this one where none is asked for, None where there is none."""
    if wanted is None:
        return sys.executable
    candidates = [shutil.which(f"python{wanted}"), *map(str, _pyenv().glob(f"{wanted}.*/bin/python"))]
    for candidate in candidates:
        command = [candidate or "", "-I", "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        if candidate and subprocess.run(command, capture_output=True, text=True).stdout.strip() == wanted:
            return candidate
    return None


def _pyenv() -> Path:
    return Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"


def install(peer: str, venvs: Path) -> str | None:
    """Installs a peer unless that is done; returns None, or the reason why it could not be."""
    if is_installed(peer, venvs):
        return None
    torch, others, wanted = requirements_of(peer)
    python = interpreter(wanted)
    if python is None:
        return f"needs Python {wanted}, which is not here"
    folder = venvs / peer
    shutil.rmtree(folder, ignore_errors=True)
    pip = [str(python_of(peer, venvs)), "-I", "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    for command in (
        [python, "-I", "-m", "venv", str(folder)],
        [*pip, torch],
        [*pip, "--no-deps", *others],
        [str(python_of(peer, venvs)), "-I", "-c", f"import {IMPORTS[peer]}, peft, transformers"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            errors = [line for line in lines if line.startswith("ERROR")]
            return f"{' '.join(command[1:4])} failed: {(errors or lines)[-1]}"
    with replacing(folder / "installed.json") as temporary:
        temporary.write_text(json.dumps({"requirements": fingerprint(peer)}) + "\n")
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venvs", type=Path, default=default_venvs())
    parser.add_argument("--peer", nargs="*", choices=peer_names(), help="by default all but those on request")
    args = parser.parse_args()
    for peer in peer_names():
        if peer in ON_REQUEST and not is_installed(peer, args.venvs) and peer not in (args.peer or []):
            reason: str | None = ON_REQUEST[peer]
        elif args.peer and peer not in args.peer:
            continue
        else:
            reason = install(peer, args.venvs)
        print(f"{peer}: {'ready' if reason is None else f'skipped: {reason}'}", flush=True)


if __name__ == "__main__":
    main()
