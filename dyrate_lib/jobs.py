"""The study as independent jobs for Snakemake: processes of this machine (`--jobs 2`), or of a SLURM cluster (`--jobs slurm`).

A job is one command that makes some records in the study's output folder; what two jobs both need is made once, by whichever
comes first (`claims`). So jobs may be killed, doubled or started again anywhere: the records are those of a single process.
The last job runs the notebooks, which then find every record there but notebook 04's timings, for which the machine is quiet.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import paths
from .claims import claimed
from .errors import DyRateError, InputError, ResourceError
from .notebooks import NotebookFailed

SHARED = "03"  # the notebook with most replies: several jobs share its batches
# What a job on a cluster asks for at most, by scale; a Snakemake profile overrides it (set-resources, by job).
NEEDS = {"full": {"gpu": 1, "mem_mb": 32_000, "minutes": 240}, "smoke": {"gpu": 0, "mem_mb": 6_000, "minutes": 60}}


class JobsFailed(NotebookFailed):
    """A job failed; the message says where its log lies."""


@dataclass(frozen=True)
class Job:
    """One command (arguments of this Python) and the jobs it comes after."""

    name: str
    arguments: tuple[str, ...]
    after: tuple[str, ...] = ()


def plan(options: Mapping[str, str], at_once: int) -> list[Job]:
    """The jobs of a study: every predictor by itself, the records of each notebook, the notebooks.

    options: scale, out, and optionally model and data, as `reproduce` takes them. at_once: jobs that may run at a time, which
    says how many share the benchmarks.

    Raises:
        InputError: a scale, model or data set that is none.
    """
    from .experiments.context import open_study
    from .experiments.training_runs import wanted

    small, _, base = options.get("model", "").partition(",")
    named = {"model_small": small, "model_base": base or small} if small else {}
    study = open_study(
        "02_training", scale=options["scale"], records="fresh", out=options["out"], data=options.get("data", "scenes"),
        **named,  # type: ignore[arg-type]
    )  # fmt: skip
    common = ["--scale", options["scale"], "--out", options["out"], "--data", options.get("data", "scenes")]
    for name, value in named.items():
        common += [f"--{name.replace('_', '-')}", value]
    records = ("-m", "dyrate_lib.experiments")
    jobs = [Job("records-01", (*records, "01", *common))]
    for key in study.keys:
        trained = []
        for _, target, seed in wanted(study, (key,)):
            trained.append(f"train-{key}-{target:g}-{seed}")
            cell = ("-m", "dyrate_lib.jobs", "train", key, f"{target:g}", str(seed))
            jobs.append(Job(trained[-1], (*cell, *common)))
        jobs.append(Job(f"records-02-{key}", (*records, "02", *common, "--stage", f"records:{key}"), tuple(trained)))
    trained = [f"records-02-{key}" for key in study.keys]
    for key in study.keys:
        for share in range(max(1, at_once // len(study.keys))):
            command = (*records, SHARED, *common, "--stage", f"records:{key}")
            jobs.append(Job(f"records-{SHARED}-{key}-{share}", command, tuple(trained)))
    jobs += [Job(f"records-{number}", (*records, number, *common), tuple(trained)) for number in ("05", "06")]
    last = [arg for name, value in options.items() for arg in (f"--{name}", value)]
    jobs.append(Job("notebooks", ("-m", "dyrate_lib", "reproduce", *last), tuple(job.name for job in jobs)))
    return jobs


def reproduce(
    jobs: str, scale: str, out: str | Path, model: str | None = None, data: str | None = None, only: Sequence[str] | None = None
) -> Path:
    """Run the study's jobs and return the output folder; what is done is not done again. Snakemake must be installed.

    jobs: how many at a time on this machine (each takes a GPU of its own while there are any), or the name of a Snakemake
    executor, "slurm" (`snakemake-executor-plugin-slurm`), whose account, partition and limits a Snakemake profile gives
    (SNAKEMAKE_PROFILE). Nodes must see the output folder and this Python under the same paths; a job that fails or is
    cancelled is submitted again, twice at most. only: names of jobs, which are then run with those they come after.

    Raises:
        InputError: jobs that are no number or name. ResourceError: Snakemake or the executor is not installed.
        JobsFailed: a job failed, after the others were tried.
    """
    local = jobs.isdecimal()
    if (local and int(jobs) < 1) or not re.fullmatch(r"[0-9]+|[a-z][a-z0-9-]*", jobs):
        raise InputError(f"jobs={jobs!r} must be a number, 1 or more, or the name of a Snakemake executor such as slurm")
    plugin = f"snakemake_executor_plugin_{jobs.replace('-', '_')}"
    for module in ("snakemake", *(() if local else (plugin,))):
        if importlib.util.find_spec(module) is None:
            raise ResourceError(f"jobs={jobs} needs {module}: pip install 'dyrate[jobs]', or make reproduce JOBS={jobs}")
    snakefile = paths.root() / "workflow" / "Snakefile"
    if not snakefile.is_file():
        raise ResourceError(f"there is no {snakefile}: the study needs a checkout of the project")
    folder = Path(out).expanduser().resolve()
    options = {"scale": scale, "out": str(folder), **({"model": model} if model else {}), **({"data": data} if data else {})}
    planned = plan(options, int(jobs) if local else 8)
    unknown = set(only or ()) - {job.name for job in planned}
    if unknown:
        raise InputError(f"no job {sorted(unknown)[0]!r}; there are: {', '.join(job.name for job in planned)}")
    place = folder / "jobs" / _fingerprint(options)
    written = {job.name: _as_json(job, place, local, scale) for job in planned}
    try:
        place.mkdir(parents=True, exist_ok=True)
        (place / "plan.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ResourceError(f"cannot write into {place}: {error.strerror or error}") from error
    command = [
        sys.executable, "-m", "snakemake", "--snakefile", str(snakefile), "--directory", str(place), "--config", "plan=plan.json",
        *(("--cores", jobs, "--quiet", "rules") if local else _through(jobs)),
        # marks are of one state of the library; records, not marks, say what is done; a node may die
        "--rerun-triggers", "mtime", "--rerun-incomplete", "--nolock", "--keep-going", "--retries", "2", "--",
        *(f"{name}.done" for name in only or ()),
    ]  # fmt: skip
    print(f"{len(planned)} jobs, {jobs} {'at a time' if local else '(executor)'}; logs and marks in {place}", flush=True)
    if subprocess.run(command, check=False, env=_environment()).returncode:
        begun = [job.name for job in planned if (place / f"{job.name}.log").is_file()]
        failed = ", ".join(name for name in begun if not (place / f"{name}.done").is_file()) or "see above"
        raise JobsFailed(f"jobs failed: {failed}; their logs are in {place}, *.log; what was made is kept")
    return folder


def _through(executor: str) -> tuple[str, ...]:
    """Snakemake's options for a cluster. They are loud: why a job was refused stands in no log but Snakemake's."""
    options: tuple[str, ...] = ("--executor", executor, "--jobs", "100", "--latency-wait", "120")
    if executor == "slurm" and not _has_accounting():
        # whether a job has ended is asked of the accounts; without any it would be waited for for ever. The queue knows too, for
        # MinJobAge after the end, which must be three times the first interval
        options += ("--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "10", "--slurm-no-account")
    return options


def _has_accounting() -> bool:
    """Whether this cluster's SLURM keeps accounts: `sacct` is there, and does not refuse."""
    try:
        return subprocess.run(["sacct", "-X", "-n"], capture_output=True, timeout=60, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return True  # slow, not absent
    except OSError:
        return False


def _as_json(job: Job, place: Path, local: bool, scale: str) -> dict[str, Any]:
    arguments = ["-m", "dyrate_lib.jobs", "on-a-gpu", str(place), *job.arguments] if local else list(job.arguments)
    return {"command": shlex.join([sys.executable, *arguments]), "after": list(job.after), "threads": 1, **NEEDS[scale]}


def _environment() -> dict[str, str]:
    """For jobs to find this copy of the library, and to share the processor: each has one thread's worth of it."""
    here = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(p for p in (here, os.environ.get("PYTHONPATH", "")) if p)
    return {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path}


def _fingerprint(options: Mapping[str, str]) -> str:
    from .study import _everything_read

    return hashlib.sha256(json.dumps([dict(options), _everything_read("fresh")], sort_keys=True).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------- inside a job


def on_a_gpu(folder: Path, arguments: Sequence[str]) -> int:
    """Run this Python with arguments on a GPU that no other job of the folder has, waiting for one; on none if there is none."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    known = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    if not known or not torch.cuda.is_available():
        return subprocess.run([sys.executable, *arguments], check=False).returncode
    while True:
        for gpu in known:
            with claimed(folder / f".gpu-{gpu}.lock", f"GPU {gpu}", wait=False) as mine:
                if mine:
                    env = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
                    return subprocess.run([sys.executable, *arguments], check=False, env=env).returncode
        time.sleep(1)


def train(arguments: Sequence[str]) -> int:
    """One predictor's record: KEY TARGET SEED and the options of `dyrate_lib.experiments`."""
    from . import distributed
    from .experiments import training_runs
    from .experiments.context import open_study

    parser = argparse.ArgumentParser(prog="python -m dyrate_lib.jobs train")
    parser.add_argument("key", choices=("small", "base"))
    parser.add_argument("target", type=float)
    parser.add_argument("seed", type=int)
    for name, default in (("scale", "auto"), ("out", ""), ("data", "scenes")):
        parser.add_argument(f"--{name}", default=default)
    for size in ("small", "base"):
        parser.add_argument(f"--model-{size}", default=f"scenes-{size}")
    args = vars(parser.parse_args(arguments))
    cell = args.pop("key"), args.pop("target"), args.pop("seed")
    distributed.start()
    study = open_study("02_training", records="fresh", **args)
    training_runs.save_predictors(study, {cell: training_runs.train(study, *cell)})
    distributed.stop()
    return 0


def main(arguments: Sequence[str]) -> int:
    """`train ...` or `on-a-gpu FOLDER ARGUMENTS`, as the plan writes them."""
    try:
        if arguments[:1] == ["train"]:
            return train(arguments[1:])
        if arguments[:1] == ["on-a-gpu"] and len(arguments) > 2:
            return on_a_gpu(Path(arguments[1]), arguments[2:])
        raise InputError("this is for the jobs of a study: `python -m dyrate_lib reproduce --jobs N` starts them")
    except DyRateError as error:
        print(f"dyrate: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
