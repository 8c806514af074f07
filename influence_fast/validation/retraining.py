"""Fine-tune on many parts of the pool, and measure the queries' losses: the ground truth of `validate`.

Every retraining is a file of its own, so that a run goes on where it was interrupted; a file of other data, queries or
settings is never taken for this run's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from influence_fast.atomic import replacing
from influence_fast.config import RunConfig
from influence_fast.data.examples import Example, tokenize
from influence_fast.errors import DataError, InfluenceFastError, one_line
from influence_fast.isolation import current_folder_off_path
from influence_fast.progress import bar
from influence_fast.run.workdir import RunFolder, portable
from influence_fast.settings import to_dict

if TYPE_CHECKING:
    from influence_fast.run.pipeline import Pipeline

FOLDER = "retrained"
# what numpy raises for a file of arrays that is empty or cut
UNREADABLE = (ValueError, KeyError, EOFError, zipfile.BadZipFile)


@dataclass(frozen=True)
class Retraining:
    """One fine-tuning on the pool's rows `keep` (int64, ascending); `seed` is that of initialisation and data order."""

    name: str
    keep: np.ndarray
    seed: int
    # Whether to answer the test questions too.
    accuracy: bool = False


@dataclass(frozen=True)
class Outcome:
    """The outcome of a retraining: each query's loss ([Q] float64), and the accuracy on the test questions or NaN."""

    losses: np.ndarray
    accuracy: float
    seconds: float


def retrain(
    config: RunConfig,
    queries: Sequence[Example],
    work: Sequence[Retraining],
    *,
    processes: int = 1,
    verbose: bool = True,
    pipeline: Pipeline | None = None,
) -> dict[str, Outcome]:
    """Run all of `work` that is not done yet in `processes` processes, and return the outcomes by name.

    config: the run whose pool is trained on, whose `training` and `lora` say how, and in whose folder `retrained/`
    everything is kept. queries: texts whose completions' losses are the outcome. pipeline: of `config`, where it is
    open already; other processes open their own.

    Raises DataError where a process was killed (finished retrainings stay), and what `finetune` raises.
    """
    folder = Path(config.output) / FOLDER
    stamp = _stamp(config, queries)
    done = {job.name: found for job in work if (found := _read(folder, job, stamp)) is not None}
    todo = [job for job in work if job.name not in done]
    if not todo:
        return done
    threads = max(1, len(os.sched_getaffinity(0)) // processes) if hasattr(os, "sched_getaffinity") else 1
    with _progress(len(todo), len(work), verbose) as advance:
        if processes == 1:
            world = _World(config, queries, pipeline)
            for job in todo:
                done[job.name] = world.run(job, folder, stamp)
                advance()
            return done
        context = multiprocessing.get_context("spawn")
        setup = (config, list(queries), threads)
        # Created here, since one of several processes that open it at once might find it incomplete.
        RunFolder(config)
        with ProcessPoolExecutor(processes, context, initializer=_open, initargs=setup) as pool:
            # A process starts when a job is submitted.
            with current_folder_off_path():
                waiting = {pool.submit(_work, job, folder, stamp): job for job in todo}
            started = list(pool._processes.values())
            try:
                for future in as_completed(waiting):
                    done[waiting[future].name] = future.result()
                    advance()
            except BrokenProcessPool:
                raise DataError(
                    f"{_end_of(started)}; {len(done)} of {len(work)} retrainings are done and kept: run the same "
                    "command again, with fewer processes if memory is short"
                ) from None
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return done


class _World:
    """The model, tokens and data that a retraining needs, loaded once a process."""

    def __init__(self, config: RunConfig, queries: Sequence[Example], pipeline: Pipeline | None = None) -> None:
        from influence_fast.run.pipeline import Pipeline

        self.pipeline = pipeline or Pipeline(config, progress=False)
        self.queries = tokenize(queries, self.pipeline.tokenizer).examples

    def run(self, job: Retraining, folder: Path, stamp: str) -> Outcome:
        from influence_fast.evaluation.evaluate import evaluate
        from influence_fast.gradients.per_example import per_example_losses
        from influence_fast.training.fine_tuning import finetune, finetuned

        start = time.perf_counter()
        p, config = self.pipeline, self.pipeline.config
        training = dataclasses.replace(config.training, seed=job.seed, save_checkpoints=False)
        adapter = folder / f".{job.name}.adapter"
        shutil.rmtree(adapter, ignore_errors=True)
        examples = [p.splits.tokenized.examples[i] for i in job.keep]
        finetune(p.base, p.tokenizer, examples, adapter, config=training, lora=config.lora, progress=False)
        with finetuned(p.base, adapter) as model:
            losses = per_example_losses(model, self.queries).double().numpy()
            accuracy = float("nan")
            if job.accuracy:
                # The model is in memory, which vLLM cannot use.
                here = dataclasses.replace(config.evaluation, engine="transformers")
                accuracy = evaluate(model, p.tokenizer, p.splits.test, config=here).accuracy
        shutil.rmtree(adapter)
        outcome = Outcome(losses, accuracy, time.perf_counter() - start)
        with replacing(folder / f"{job.name}.npz") as partial, partial.open("wb") as file:
            np.savez(file, digest=_digest(job, stamp), **dataclasses.asdict(outcome))
        return outcome


def _end_of(processes: Sequence[BaseProcess]) -> str:
    """Return how a process ended that broke the pool; the pool ends the others by SIGTERM."""
    for process in processes:
        process.join(10)
    codes = [process.exitcode for process in processes if process.exitcode not in (None, 0, -signal.SIGTERM)]
    failed = [code for code in codes if code is not None and code > 0]
    if failed:
        return (
            f"a retraining process ended with exit code {failed[0]} and the traceback above (a script of your own "
            "needs if __name__ == '__main__': around its calls)"
        )
    killed = f" by signal {-codes[0]}" if codes and codes[0] is not None else ""
    return f"a retraining process was killed{killed} (out of memory?)"


_world: _World | InfluenceFastError | None = None


def _open(config: RunConfig, queries: list[Example], threads: int) -> None:
    """Open the world of this process; what goes wrong is raised by its work, since here it would only end the pool."""
    global _world
    import torch

    torch.set_num_threads(threads)
    try:
        _world = _World(config, queries)
    except InfluenceFastError as error:
        _world = error
    except Exception as error:
        traceback.print_exc()
        _world = DataError(
            f"a retraining process could not open its model and data ({type(error).__name__}: {one_line(error)})"
        )


def _work(job: Retraining, folder: Path, stamp: str) -> Outcome:
    assert _world is not None
    if isinstance(_world, InfluenceFastError):
        raise _world
    return _world.run(job, folder, stamp)


def _stamp(config: RunConfig, queries: Sequence[Example]) -> str:
    """Return a digest of all that every outcome depends on beside its own rows and seed."""
    settings = portable(to_dict(config), Path(config.output))
    parts = {key: value for key, value in settings.items() if key in ("model", "data", "training", "lora")}
    texts = [[query.id, query.prompt, query.completion] for query in queries]
    return hashlib.sha256(json.dumps([parts, texts], sort_keys=True).encode()).hexdigest()


def _digest(job: Retraining, stamp: str) -> str:
    rows = np.ascontiguousarray(job.keep, np.int64).tobytes()
    return hashlib.sha256(f"{stamp}/{job.seed}/{job.accuracy}/".encode() + rows).hexdigest()


def _read(folder: Path, job: Retraining, stamp: str) -> Outcome | None:
    path = folder / f"{job.name}.npz"
    if not path.exists():
        return None
    try:
        with np.load(path) as found:
            digest = str(found["digest"])
            outcome = Outcome(found["losses"], float(found["accuracy"]), float(found["seconds"]))
    except UNREADABLE:
        warnings.warn(f"{path} is damaged, and is made again", stacklevel=2)
        return None
    if digest != _digest(job, stamp):
        raise DataError(
            f"{path} is a retraining on other rows, queries or settings: give another output folder, or delete {folder}"
        )
    return outcome


@contextmanager
def _progress(todo: int, total: int, verbose: bool) -> Iterator[Callable[[], None]]:
    """Yield a function that advances a bar on a terminal, and elsewhere prints a line every tenth of the work."""
    if verbose and sys.stderr.isatty():
        with bar("retraining") as shown:
            task = shown.add_task("retraining", total=total, completed=total - todo)
            yield lambda: shown.advance(task)
        return
    count = total - todo

    def advance() -> None:
        nonlocal count
        count += 1
        if verbose and (count == total or (count - total + todo) % max(1, todo // 10) == 0):
            print(f"retraining: {count} of {total} done", file=sys.stderr, flush=True)

    yield advance


def losses_of(outcomes: dict[str, Outcome], names: Sequence[Sequence[str]]) -> np.ndarray:
    """Return the losses [S, R, Q] of the named retrainings; `names` are indexed [subset][seed]."""
    return np.stack([np.stack([outcomes[name].losses for name in row]) for row in names])


def subset_work(subsets: np.ndarray, seeds: Sequence[int], prefix: str) -> tuple[list[Retraining], list[list[str]]]:
    """Return a retraining for each subset ([S, N] bool) and seed, and their names [subset][seed]."""
    work, names = [], []
    for i, mask in enumerate(subsets):
        row = [Retraining(f"{prefix}-{i:04d}-seed{seed}", np.flatnonzero(mask), seed) for seed in seeds]
        work += row
        names.append([job.name for job in row])
    return work, names
