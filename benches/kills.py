"""Kill every verb that writes at random moments, start it again, and compare its files with those of a whole run.

    python -m benches.kills                                   # all verbs, 2 or 3 kills each
    python -m benches.kills --only build score --kills 10 --seed 1
    python -m benches.kills --output benches/results/kills.txt

Every verb runs once to its end on a model of two layers. Then the same command is started in an empty folder, its
process alone gets SIGKILL, and the command is started again until it ends. Most kills fall between the first file
that appears and the end, because nothing can be half written before. Every file is compared byte by byte, names of
files included; `VOLATILE` lists what holds times, and what of it is compared.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benches import environment

OUTPUT = Path("out")
POLL = 0.002
TRIES = 8  # to hit a process before it ends by itself
ORPHANS = 20.0  # seconds that children of a killed process have to end

RUN = {
    "model": {"path": "model"},
    "data": {"pool": "pool.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"},
    "training": {"epochs": 6, "learning_rate": 5e-3, "batch_size": 8},
    "lora": {"r": 4, "alpha": 8},
    "gradients": {"dim": 4},
    "influence": {"fallback": "reference", "fisher_examples": 16},
    "pruning": {"strategies": ["random", "combined"], "fractions": [0.25]},
    "evaluation": {"max_new_tokens": 6},
    "validate": {
        "methods": ["cosine", "loss"],
        "default": "cosine",
        "subsets": 3,
        "seeds": [0],
        "leave_out_sets": 0,
        "remove": [0.25],
        "removal_methods": ["loss"],
        "draws": 50,
    },
}

# The demo's own world takes minutes: the verb is the same, its world smaller.
SMALL_DEMO = """
import dataclasses, sys
from influence_fast.cli import main
from influence_fast.run import demo
small = demo.WorldConfig(pool_size=24, validation_size=8, test_size=8, hidden_size=32, layers=2, pretrain_steps=60)
whole = demo.demo_config
def config(*args, **more):
    made = whole(*args, **more, config=small)
    return dataclasses.replace(made, influence=dataclasses.replace(made.influence, fallback="reference"))
demo.demo_config = config
sys.exit(main(sys.argv[1:]))
"""


@dataclasses.dataclass(frozen=True)
class Verb:
    """One command that writes, and a verb whose files it starts from."""

    command: str
    after: str | None = None

    @property
    def arguments(self) -> list[str]:
        """The command, word by word."""
        return self.command.split()


MODEL = "--model model --adapter adapter"
SCORE = f"score {MODEL} --data pool.jsonl --validation validation.jsonl --dim 4"
BUILD = f"build {MODEL} --dim 4 --shard-rows 4"
TRAIN = "train --model model --data pool.jsonl --epochs 6 --learning-rate 5e-3 --batch-size 8 --rank 4"
PRUNE = "prune --data pool.jsonl --scores scores.csv --strategy low_benefit --fraction 0.25"
VERBS = {
    "train": Verb(f"{TRAIN} --save-checkpoints --output out/adapter"),
    "eval": Verb(f"eval {MODEL} --data test.jsonl --max-new-tokens 6 --output out/answers.jsonl"),
    "eval --export-lm-eval": Verb("eval --data test.jsonl --export-lm-eval out/task"),
    "build": Verb(f"{BUILD} --data pool.jsonl --output out/store"),
    "build --width": Verb(f"{BUILD} --data pool.jsonl --width 64 --sketch eigen --store-dtype int8 --output out/store"),
    "merge": Verb("merge store/a store/b --output out/joined"),
    "import": Verb("import rows.npy --output out/store --dtype int8"),
    "score": Verb(f"{SCORE} --fallback reference --max-new-tokens 6 --explain 2 --output out/scores.parquet"),
    "prune": Verb(f"{PRUNE} --output out/kept.jsonl"),
    "run": Verb("run run.yaml --output out/run"),
    "validate": Verb("validate run.yaml --output out/run", after="run"),
    "report": Verb("report out/run", after="run"),
    "demo": Verb("demo --output out/demo"),
}

Files = dict[str, bytes]


def _without(*names: str) -> Callable[[bytes], bytes]:
    """JSON without the values of these keys, at any depth."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(inner) for key, inner in value.items() if key not in names}
        return [clean(inner) for inner in value] if isinstance(value, list) else value

    return lambda data: json.dumps(clean(json.loads(data)), sort_keys=True).encode()


def _without_times(page: bytes) -> bytes:
    """A report without dates, seconds, and the rows of the table of seconds."""
    rows = [row for row in page.split(b"\n") if b'class="bar"' not in row]
    return re.sub(rb"<time.*?</time>|\d[\d.,]* (s|min|h|epochs?)\b", b"", b"\n".join(rows))


def _without_numbers(page: bytes) -> bytes:
    return re.sub(rb"<svg.*?</svg>|[\d.,]+", b"", page, flags=re.DOTALL)


def _arrays(*but: str) -> Callable[[bytes], bytes]:
    """The arrays of an .npz but those named: shapes, kinds and bytes. Its archive holds the hour of writing."""

    def part(data: bytes) -> bytes:
        with np.load(io.BytesIO(data), allow_pickle=False) as held:
            kept = {name: held[name] for name in held.files if name not in but}
        return b"".join(f"{name} {a.dtype} {a.shape}".encode() + a.tobytes() for name, a in sorted(kept.items()))

    return part


_JSON = _without("seconds", "created", "train_runtime", "train_tokens_per_second")
#: Pattern of a path -> why it may differ, and the part that is compared (None: only that the file is there).
VOLATILE: dict[str, tuple[str, Callable[[bytes], bytes] | None]] = {
    r".*/seconds\.json": ("seconds of a training so far", None),
    r".*/(trainer_state|training)\.json": ("seconds", _JSON),
    r".*/(adapter|own_answers|explained_count|results)\.json": ("seconds and the date", _JSON),
    r".*/(cells|evaluations)/.*\.json": ("seconds", _JSON),
    r".*/scoring_seconds\.json": ("seconds", None),
    r".*\.metrics/rank-.*\.jsonl": ("a log of speed, which a second process adds to", None),
    r".*/report\.html": ("seconds and the date", _without_times),
    r".*/validation\.json": ("seconds", _without("seconds", "epochs", "retraining_seconds")),
    r".*/validation\.html": ("seconds, which it draws too", _without_numbers),
    r".*/retrained/.*\.npz": ("seconds", _arrays("seconds")),
    r".*/validate/.*\.npz": ("seconds", _arrays("seconds")),
}


def stable(name: str, data: bytes) -> bytes:
    """The part of a file that two runs of one command must share."""
    for pattern, (_, part) in VOLATILE.items():
        if re.fullmatch(pattern, name):
            return part(data) if part else b""
    return data


def files_of(folder: Path) -> Files:
    """Relative path -> bytes of every file under `folder`."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def differences(whole: Files, again: Files) -> list[str]:
    """What the folder of a killed and resumed run has otherwise, a phrase each."""
    found = [f"{name} is missing" for name in sorted(whole.keys() - again.keys())]
    found += [f"{name} is left over" for name in sorted(again.keys() - whole.keys())]
    both = sorted(whole.keys() & again.keys())
    for name in both:
        one, other = stable(name, whole[name]), stable(name, again[name])
        if one != other:
            found.append(f"{name} differs{_first_difference(one, other) if name.endswith('.json') else ''}")
    return found


def _first_difference(one: bytes, other: bytes) -> str:
    """Where two JSON documents differ first, and both values."""

    def search(left: Any, right: Any, place: str) -> str | None:
        if isinstance(left, dict) and isinstance(right, dict) and left.keys() == right.keys():
            inner = [search(left[key], right[key], f"{place}.{key}") for key in left]
        elif isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
            inner = [search(*pair, f"{place}[{i}]") for i, pair in enumerate(zip(left, right, strict=True))]
        else:
            return None if left == right else f" at {place}: {str(left)[:80]} against {str(right)[:80]}"
        return next(filter(None, inner), None)

    return search(json.loads(one), json.loads(other), "") or ""


def write_inputs(folder: Path) -> None:
    """Model, data, configuration and gradients of another tool, under `folder`."""
    import torch
    import yaml

    from benches.models import qwen2_model, train_tokenizer

    rng = np.random.default_rng(0)
    texts = []
    for name, count in (("pool", 40), ("validation", 12), ("test", 12)):
        rows = []
        for i in range(count):
            a, b = (int(v) for v in rng.integers(0, 3, 2))
            wrong = i % 4 == 0
            row = {
                "id": f"{name}-{i}",
                "prompt": f"what is {a} plus {b}",
                "completion": f" The answer is {a + b + wrong}",
            }
            rows.append(row | {"answer": str(a + b), "label": "wrong_answer" if wrong else "clean"})
            texts.append(row["prompt"] + row["completion"])
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = train_tokenizer(texts, vocab_size=300)
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    model = qwen2_model(len(tokenizer), tokenizer.eos_token_id, layers=2, width=64)
    model.save_pretrained(folder / "model")
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN | {"output": "out/run"}))
    np.save(folder / "rows.npy", rng.standard_normal((5000, 400)).astype(np.float32))


def write_derived(folder: Path) -> None:
    """The adapter, the stores and the score table that other verbs read, each by the verb that makes it."""
    run_whole(folder, VERBS["train"])
    (folder / OUTPUT / "adapter").rename(folder / "adapter")
    _finish(_start(folder, f"{SCORE} --queries reference --output out/scores.csv".split()))
    (folder / OUTPUT / "scores.csv").rename(folder / "scores.csv")
    for name, first in (("a", 0), ("b", 20)):
        rows = (folder / "pool.jsonl").read_text().splitlines(keepends=True)[first : first + 20]
        (folder / f"{name}.jsonl").write_text("".join(rows))
        _finish(_start(folder, f"{BUILD} --data {name}.jsonl --output store/{name}".split()))
    shutil.rmtree(folder / OUTPUT)


def _start(folder: Path, arguments: Sequence[str]) -> subprocess.Popen[str]:
    """Start the verb in a process group of its own, whose members are found after its death."""
    program = ["-c", SMALL_DEMO] if arguments[0] == "demo" else ["-m", "influence_fast"]
    settings = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    here = str(Path(__file__).parent.parent)
    return subprocess.Popen(
        [sys.executable, "-P", *program, *arguments],
        cwd=folder,
        env=os.environ | settings | {"PYTHONPATH": here},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _finish(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=600)
    if process.returncode:
        raise RuntimeError(f"{process.args!r} ended with {process.returncode}:\n{said}")
    return said


@dataclasses.dataclass(frozen=True)
class Whole:
    """An uninterrupted run: its files, and seconds to the first written file and to the end."""

    files: Files
    first: float
    seconds: float


def run_whole(folder: Path, verb: Verb, start_from: Path | None = None) -> Whole:
    """Run a verb to its end in an empty output folder, or in a copy of `start_from`."""
    _empty(folder, start_from)
    before = _state(folder / OUTPUT)
    start, first = time.perf_counter(), None
    process = _start(folder, verb.arguments)
    while process.poll() is None:
        if first is None and _state(folder / OUTPUT) != before:
            first = time.perf_counter() - start
        time.sleep(POLL)
    seconds = time.perf_counter() - start
    _finish(process)
    return Whole(files_of(folder / OUTPUT), seconds if first is None else first, seconds)


def kill_once(folder: Path, verb: Verb, whole: Whole, rng: random.Random, start_from: Path | None) -> list[str]:
    """Kill the verb at a random moment, run it again to its end, and return what differs from the whole run."""
    for trial in range(TRIES):
        _empty(folder, start_from)
        process = _start(folder, verb.arguments)
        # The whole run may have been slowed down by other work: waits shrink until one ends before the process.
        if _killed(process, folder / OUTPUT, whole, rng, 0.75**trial):
            break
        _finish(process)
    else:
        raise RuntimeError(f"{verb.command} ended by itself before each of {TRIES} kills")
    process.communicate()
    found = [f"process {name} outlived it by {ORPHANS:.0f} s" for name in _orphans(process.pid)]
    return found + _resumed(folder, verb, whole)


def _resumed(folder: Path, verb: Verb, whole: Whole) -> list[str]:
    process = _start(folder, verb.arguments)
    said, _ = process.communicate(timeout=600)
    if process.returncode:
        lines = said.strip().splitlines() or [""]
        return [f"started again it ended with {process.returncode}: {lines[-1]}"]
    return differences(whole.files, files_of(folder / OUTPUT))


def _killed(process: subprocess.Popen[str], output: Path, whole: Whole, rng: random.Random, share: float) -> bool:
    """Kill the process at a moment that `rng` draws from the first `share` of the whole run's time.

    Returns False where the process ended by itself before.
    """
    before = _state(output)
    if rng.random() < 0.2:
        wait = share * rng.random() * whole.first
    else:
        # counted from the first file of this very run, as starting takes longer on a busy machine
        while process.poll() is None and _state(output) == before:
            time.sleep(POLL)
        wait = share * rng.random() * (whole.seconds - whole.first)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(wait)
        return False
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def _state(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of all that is under `folder`."""
    found = []
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                status = os.stat(os.path.join(place, name))
                found.append((os.path.join(place, name), status.st_size, status.st_mtime_ns))
    return sorted(found)


def _orphans(group: int) -> list[str]:
    """Names of the processes of `group` that are still alive after `ORPHANS` seconds; they are killed then."""
    until = time.perf_counter() + ORPHANS
    while (alive := dict(_members(group))) and time.perf_counter() < until:
        time.sleep(0.05)
    for number in alive:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    return sorted(alive.values())


def _members(group: int) -> Iterator[tuple[int, str]]:
    for place in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = place.read_text().partition("(")[2].rpartition(")")
            state, _, its_group = rest.split()[:3]
            if int(its_group) == group and state != "Z":
                yield int(place.parent.name), name


def _empty(folder: Path, start_from: Path | None) -> None:
    shutil.rmtree(folder / OUTPUT, ignore_errors=True)
    if start_from is None:
        (folder / OUTPUT).mkdir()
    else:
        shutil.copytree(start_from, folder / OUTPUT)


def try_verb(folder: Path, name: str, kills: int, rng: random.Random) -> tuple[Whole, list[list[str]]]:
    """The whole run of a verb, and what differed after each of `kills` kills."""
    verb, start_from = VERBS[name], None
    if verb.after is not None:
        start_from = folder / "before"
        shutil.rmtree(start_from, ignore_errors=True)
        run_whole(folder, VERBS[verb.after])
        (folder / OUTPUT).rename(start_from)
    whole = run_whole(folder, verb, start_from)
    return whole, [kill_once(folder, verb, whole, rng, start_from) for _ in range(kills)]


def main() -> None:
    """Try the verbs asked for and print, or write, a table of kills, identical and differing results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--only", nargs="+", default=list(VERBS), choices=list(VERBS), metavar="VERB")
    parser.add_argument("--kills", type=int, default=3, help="of each verb")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the table here too")
    args = parser.parse_args()
    lines = [f"{'verb':<24} {'seconds':>8} {'files':>6} {'kills':>6} {'identical':>10} {'differing':>10}"]
    print(lines[0], flush=True)
    total = [0, 0]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_inputs(folder)
        write_derived(folder)
        for name in args.only:
            whole, found = try_verb(folder, name, args.kills, random.Random(f"{args.seed} {name}"))
            differing = sum(map(bool, found))
            total = [total[0] + len(found), total[1] + differing]
            row = f"{name:<24} {whole.seconds:>8.1f} {len(whole.files):>6} {len(found):>6}"
            lines.append(f"{row} {len(found) - differing:>10} {differing:>10}")
            print(lines[-1], flush=True)
            for phrase in sorted({phrase for one in found for phrase in one}):
                lines.append(f"    {phrase}")
                print(lines[-1], flush=True)
    lines.append(f"{'all':<24} {'':>8} {'':>6} {total[0]:>6} {total[0] - total[1]:>10} {total[1]:>10}")
    print(lines[-1])
    if args.output:
        args.output.write_text(_page(args, lines))


def _page(args: argparse.Namespace, lines: Sequence[str]) -> str:
    """The table with what was run, on what, and which files are compared in part."""
    about = environment.describe()
    asked = "" if args.only == list(VERBS) else f" --only {' '.join(args.only)}"
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    head = [
        f"python -m benches.kills --seed {args.seed} --kills {args.kills}{asked}",
        f"commit {about['commit']}, {about['measured']}, {about['machine']['cpu']}, {about['machine']['cores']} cores",
        versions,
        "",
    ]
    parts = [
        f"{name}: {why}; {'the rest' if part else 'its presence'} is compared" for name, (why, part) in VOLATILE.items()
    ]
    return "\n".join([*head, *lines, "", "compared in part:", *parts]) + "\n"


if __name__ == "__main__":
    main()
