"""A SLURM cluster of one node for a test: munge, controller and node of this machine, on its loopback interface, in one folder.

Where a cluster answers already, that one is used. Else slurmctld, slurmd and munged must be installed (Debian: slurmctld, slurmd,
slurm-client, munge) and this process be root's. Nothing outside the folder is read or written, and no accounts are kept.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

CLIENTS, DAEMONS = ("sbatch", "srun", "squeue", "scancel", "sinfo", "scontrol"), ("slurmctld", "slurmd", "munged")
CONF = """ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
KillWait=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=16000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


class NoCluster(Exception):
    """There is none, and none can be started here: the message says why."""


def _answers(env: dict[str, str]) -> bool:
    """Whether a controller answers and a node of it takes jobs."""
    try:
        asked = subprocess.run(["sinfo", "-h", "-o", "%t"], env=env, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return asked.returncode == 0 and bool({"idle", "mix"} & set(asked.stdout.split()))


def _free_ports(n: int) -> list[int]:
    taken = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [each.getsockname()[1] for each in taken]
    for each in taken:
        each.close()
    return ports


def _until(true: Callable[[], bool], what: str, *logs: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            ends = [f"{log.name} ends: {' '.join(log.read_text(errors='replace')[-600:].split())}" for log in logs]
            raise NoCluster(f"{what}; {'; '.join(ends)}")  # in one line, as a skipped test's reason is printed
        time.sleep(0.2)


@contextmanager
def cluster() -> Iterator[dict[str, str]]:
    """What the environment must say besides for SLURM's commands to find the cluster; one started here ends with the block.

    Raises:
        NoCluster: commands are missing, this is not root, or a daemon does not start.
    """
    missing = [name for name in CLIENTS if not shutil.which(name)]
    if missing:
        raise NoCluster(f"SLURM is not installed: no {', '.join(missing)}")
    if _answers(dict(os.environ)):
        yield {}
        return
    paths = {name: shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin") for name in DAEMONS}
    missing = [name for name, path in paths.items() if not path]
    if missing or os.geteuid():
        raise NoCluster(f"no cluster answers, and starting one needs {', '.join(missing) or 'root'}")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: a socket's path has at most 107 characters
    started: list[subprocess.Popen[bytes]] = []

    def start(name: str, *options: str) -> Path:
        log = folder / f"{name}.log"
        with log.open("wb") as file:
            command = [str(paths[name]), *options]
            started.append(subprocess.Popen(command, stdout=file, stderr=file, env=env, start_new_session=True))
        return log

    try:
        for name in ("state", "spool"):
            (folder / name).mkdir()
        host = socket.gethostname().partition(".")[0]
        (folder / "slurm.conf").write_text(CONF.format(host=host, folder=folder, ports=_free_ports(2)))
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        own = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        log = start("munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *own)
        _until((folder / "munge.socket").exists, "munged does not start", log)
        logs = start("slurmctld", "-D", "-i", "-f", env["SLURM_CONF"]), start("slurmd", "-D", "-f", env["SLURM_CONF"])
        _until(lambda: _answers(env), "slurmctld or slurmd does not start", *logs)
        # inside a job the executor takes every SLURM_* variable from srun, the one that says where the cluster is among them
        (folder / "bin").mkdir()
        (folder / "bin" / "srun").write_text(f'#!/bin/sh\nSLURM_CONF={env["SLURM_CONF"]} exec {shutil.which("srun")} "$@"\n')
        (folder / "bin" / "srun").chmod(0o755)
        yield {"SLURM_CONF": env["SLURM_CONF"], "PATH": f"{folder}/bin{os.pathsep}{os.environ['PATH']}"}
    finally:
        for process in reversed(started):
            process.send_signal(signal.SIGTERM)
        for process in reversed(started):
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(folder, ignore_errors=True)
