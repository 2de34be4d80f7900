"""The study's jobs through SLURM: a cluster of this machine, where one can be had, and stand-ins for what that cannot show."""

import os
import subprocess
import threading
import time

import pytest

from dyrate_lib import jobs

from . import slurm_node, soak_study

pytestmark = pytest.mark.slow
plugin = pytest.importorskip("snakemake_executor_plugin_slurm", reason="needs the jobs extra")
TRAINED = ["train-small-0.5-0", "train-small-0.333-0"]


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        try:
            with slurm_node.cluster() as env:
                for name, value in env.items():
                    patch.setenv(name, value)
                yield
        except slurm_node.NoCluster as why:
            pytest.skip(f"no cluster: {why}")  # .ci/run lets no other skip pass


def queue(*options):
    """SLURM's own words on the jobs it still knows: number and state."""
    command = ["squeue", "--me", "--states=all", "-h", "-o", "%i %T", *options]
    return dict(line.split() for line in subprocess.check_output(command, text=True, timeout=60).splitlines())


def cancel_one(known, stop, cancelled):
    """Cancels the first new job that runs, as an operator or a dying node would."""
    while not stop.is_set():
        running = [job for job, state in queue().items() if state == "RUNNING" and job not in known]
        if running:
            subprocess.run(["scancel", running[0]], check=True, timeout=60)
            cancelled.append(running[0])
            return
        time.sleep(0.2)


def test_jobs_of_a_cluster_make_the_records_of_one_process_and_a_cancelled_one_is_done_again(cluster, tmp_path):
    known, stop, cancelled = queue(), threading.Event(), []
    watcher = threading.Thread(target=cancel_one, args=(known, stop, cancelled))
    watcher.start()
    try:
        jobs.reproduce("slurm", "smoke", tmp_path / "slurm", model=soak_study.TINY, only=TRAINED)
    finally:
        stop.set()
        watcher.join(60)
    ended = {job: state for job, state in queue().items() if job not in known}
    assert len(ended) == 3 and ended.pop(*cancelled) == "CANCELLED" and set(ended.values()) == {"COMPLETED"}
    alone = soak_study.train_alone(tmp_path / "alone", TRAINED)
    assert len(alone) == 2 and soak_study.contents(tmp_path / "slurm") == alone


def test_a_job_that_the_cluster_refuses_is_an_error_that_says_why(cluster, tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(jobs.NEEDS, "smoke", {**jobs.NEEDS["smoke"], "mem_mb": 10**9})
    with pytest.raises(jobs.JobsFailed):
        jobs.reproduce("slurm", "smoke", tmp_path, model=soak_study.TINY, only=TRAINED[:1])
    said = "".join(capfd.readouterr())
    assert "sbatch" in said and ("Memory specification" in said or "not available" in said)


# ---------------------------------------------------------------------------------------------------------- stand-ins
# A cluster with accounts, which a node of its own has not.

SBATCH = """#!/bin/bash
echo "$@" >> "$CLUSTER/submitted"
[[ -e "$CLUSTER/closed" ]] && { echo "no such partition today" >&2; exit 1; }
for word in "$@"; do case "$word" in --wrap=*) command="${word#--wrap=}";; esac; done
( bash -c "$command" > "$CLUSTER/out" 2>&1 && state=COMPLETED || state=FAILED
  echo "1000|$state" > "$CLUSTER/state" ) > /dev/null 2>&1 &
echo 1000
"""
STANDINS = {
    "sbatch": SBATCH,
    "srun": '#!/bin/bash\nwhile [[ $1 == -* ]]; do shift; done\nexec "$@"\n',
    "sacct": '#!/bin/bash\ncat "$CLUSTER/state" 2> /dev/null || true\n',
    **{name: "#!/bin/bash\nexit 0\n" for name in ("squeue", "sinfo", "scontrol", "scancel", "sacctmgr")},
}


@pytest.fixture
def standins(tmp_path, monkeypatch):
    """SLURM's commands, which run here what is submitted; the folder of what they note."""
    folder = tmp_path / "commands"
    folder.mkdir()
    for name, text in STANDINS.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CLUSTER", str(folder))
    return folder


PROFILE = """
slurm-init-seconds-before-status-checks: 3
set-resources:
  train_small_0_5_0:
    slurm_partition: night
    runtime: 17
"""


def test_where_accounts_are_kept_they_say_what_is_done_and_a_profile_what_is_asked_for(standins, tmp_path, monkeypatch):
    (standins / "config.yaml").write_text(PROFILE)
    monkeypatch.setenv("SNAKEMAKE_PROFILE", str(standins))
    jobs.reproduce("slurm", "smoke", tmp_path / "s", model=soak_study.TINY, only=TRAINED[:1])
    asked = (standins / "submitted").read_text()
    assert "--gpus" not in asked and "-p night -t 17 --mem {mem_mb} ".format(**jobs.NEEDS["smoke"]) in asked
    assert soak_study.contents(tmp_path / "s") == soak_study.train_alone(tmp_path / "alone", TRAINED[:1])


def test_a_full_study_asks_for_a_gpu_a_job(standins, tmp_path, capfd):
    (standins / "closed").touch()
    with pytest.raises(jobs.JobsFailed):
        jobs.reproduce("slurm", "full", tmp_path / "s", model=soak_study.TINY, only=TRAINED[:1])
    limits = "-t {minutes} --mem {mem_mb} ".format(**jobs.NEEDS["full"])
    asked = (standins / "submitted").read_text().splitlines()
    assert len(asked) == 3 and all("--gpus=1" in line and limits in line for line in asked)
    assert "no such partition today" in "".join(capfd.readouterr())


@pytest.mark.parametrize("sacct, asks_squeue", [("exit 0", False), ("echo disabled >&2; exit 1", True), (None, True)])
def test_the_queue_is_asked_where_no_accounts_are_kept(sacct, asks_squeue, tmp_path, monkeypatch):
    if sacct:
        (tmp_path / "sacct").write_text(f"#!/bin/sh\n{sacct}\n")
        (tmp_path / "sacct").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ("squeue" in jobs._through("slurm")) is asks_squeue
    assert "squeue" not in jobs._through("kubernetes")
