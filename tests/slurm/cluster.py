"""A SLURM of its own on this machine: two nodes of two CPUs, private ports, sockets and files."""

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.launcher import free_port, wait_for
from tests.needs import require_or_skip

NODES = ("n1", "n2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")


class Cluster:
    """A running cluster; its commands find it through SLURM_CONF."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *words: object, **variables: str) -> str:
        """What a command of SLURM printed."""
        done = subprocess.run(
            [str(word) for word in words],
            env=self.environment | variables,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def wait(self, *jobs: str, timeout: float = 300) -> None:
        """Returns when these jobs have ended, however."""

        def ended() -> bool:
            return not self.run("squeue", "-h", "-o", "%i", "-j", ",".join(jobs))

        wait_for(ended, timeout, lambda: self.run("squeue"))

    def state(self, job: str) -> str:
        """Of an ended job: COMPLETED, FAILED, ..."""
        facts = self.run("scontrol", "show", "job", job)
        return facts.partition("JobState=")[2].split()[0]


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Starts munged, slurmctld and a slurmd for each node; ends them, and what they started."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        require_or_skip(
            "slurm", f"not installed: {', '.join(missing)} (apt-get install slurm-wlm munge)"
        )
    if os.geteuid() != 0:
        require_or_skip("slurm", "only root can start SLURM's daemons")
    # Paths of sockets are short: not in the folder of the test.
    folder = Path(tempfile.mkdtemp(prefix="kdad-slurm-"))
    folder.chmod(0o755)
    found = Cluster(folder)
    configure(folder)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        munge = ["--foreground", "--force", f"--socket={folder}/munge.sock"]
        munge += [f"--key-file={folder}/munge.key", f"--pid-file={folder}/munged.pid"]
        munge += [f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed"]
        stack.enter_context(daemon(found, "munged", *munge))
        wait_for((folder / "munge.sock").exists)
        stack.enter_context(daemon(found, "slurmctld", "-D", "-c"))
        for node in NODES:
            (folder / f"spool-{node}").mkdir()
            stack.enter_context(daemon(found, "slurmd", "-D", "-N", node))
        stack.callback(cancel_all, found)

        def idle() -> bool:
            try:
                return found.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N") == "n1\nn2"
            except AssertionError:
                return False

        wait_for(idle, 120, lambda: (folder / "slurmctld.log").read_text()[-2000:])
        yield found


@contextmanager
def daemon(found: Cluster, *words: str) -> Iterator[None]:
    """A process that ends with the block."""
    with open(found.folder / "daemons.log", "a") as messages:
        process = subprocess.Popen(
            words, env=found.environment, stdout=messages, stderr=messages, cwd=found.folder
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def cancel_all(found: Cluster) -> None:
    found.run("scancel", "--user=root")
    wait_for(lambda: not found.run("squeue", "-h"), 120, lambda: found.run("squeue"))


def configure(folder: Path) -> None:
    """Writes munge.key and slurm.conf: no accounting, no control groups, no shared state."""
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    host = socket.gethostname().partition(".")[0]
    control, *ports = (free_port() for _ in range(1 + len(NODES)))
    lines = f"""
        ClusterName=kdad
        SlurmctldHost={host}(127.0.0.1)
        SlurmUser=root
        SlurmdUser=root
        AuthType=auth/munge
        AuthInfo=socket={folder}/munge.sock,cred_expire=5
        CredType=cred/munge
        SlurmctldPort={control}
        SlurmctldPidFile={folder}/slurmctld.pid
        SlurmdPidFile={folder}/slurmd-%n.pid
        SlurmctldLogFile={folder}/slurmctld.log
        SlurmdLogFile={folder}/slurmd-%n.log
        StateSaveLocation={folder}/state
        SlurmdSpoolDir={folder}/spool-%n
        ProctrackType=proctrack/linuxproc
        TaskPlugin=task/none
        JobAcctGatherType=jobacct_gather/none
        AccountingStorageType=accounting_storage/none
        JobCompType=jobcomp/none
        MpiDefault=none
        SwitchType=switch/none
        SchedulerType=sched/backfill
        SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
        SelectType=select/cons_tres
        SelectTypeParameters=CR_CPU
        JobRequeue=1
        ReturnToService=2
        SlurmdParameters=config_overrides
        KillWait=15
        MinJobAge=3600
        PropagateResourceLimits=NONE
        PartitionName=main Nodes={",".join(NODES)} Default=YES MaxTime=INFINITE State=UP
    """
    for node, port in zip(NODES, ports, strict=True):
        lines += f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2\n"
    (folder / "state").mkdir()
    text = "\n".join(line.strip() for line in lines.splitlines())
    (folder / "slurm.conf").write_text(f"{text}\n")
