"""A SLURM of two nodes on this machine: its own daemons, ports, state and logs in a folder, gone with the `with` block.

Needs `slurmctld`, `slurmd` and the client commands (Debian: slurmctld slurmd slurm-client) and the rights of root. No
authentication, accounting or cgroups: what is tested is scheduling, signals, requeueing and the loss of a node.
"""

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable

import psutil

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
NODES = ("n0", "n1")
CONF = """
ClusterName=onebox
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
SlurmctldPort={control}
StateSaveLocation={root}/state
SlurmctldPidFile={root}/ctld.pid
SlurmdPidFile={root}/%n.pid
SlurmdSpoolDir={root}/spool.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=1,sched_interval=5
ReturnToService=2
KillWait=20
SlurmdTimeout=20
OverTimeLimit=0
NodeName=n[0-1] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{second}] CPUs=2 RealMemory=2000 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=60:00 State=UP
"""


def missing() -> list[str]:
    """What keeps this machine from running a SLURM: programs, or the rights."""
    return [name for name in PROGRAMS if not shutil.which(name)] + ["root"] * (os.geteuid() != 0)


def wait(condition: Callable[[], object], seconds: float, what: str):
    """The condition's value once it is true; SLURM announces nothing, so it is asked again and again."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.2)
    return found


class Onebox:
    """The cluster; `env` lets the client commands find it."""

    def __init__(self, root: pathlib.Path):
        self.root = root
        self.env = os.environ | {"SLURM_CONF": str(root / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> "Onebox":
        (self.root / "state").mkdir(parents=True)
        control, first = _free(1), _free(2)
        text = CONF.format(
            host=socket.gethostname().split(".")[0], root=self.root, control=control, first=first, second=first + 1
        )
        (self.root / "slurm.conf").write_text(text)
        self._start("ctld", "slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)
        wait(lambda: self.run("sinfo", "-h", "-o", "%t %D").split() == ["idle", "2"], 60, "two idle nodes")
        return self

    def __exit__(self, *_) -> None:
        if "ctld" in self._daemons:
            subprocess.run(["scancel", "--user=root"], env=self.env, capture_output=True)
            wait(lambda: not self._processes(*NODES), 60, "jobs to end")
        for daemon in self._daemons.values():
            daemon.kill()
            daemon.wait()

    def run(self, *command: str) -> str:
        """What a client command prints."""
        return subprocess.run(command, env=self.env, capture_output=True, text=True, check=True).stdout.strip()

    def state(self, job: str) -> str:
        """The state of a job as SLURM calls it."""
        shown = self.run("scontrol", "show", "job", job)
        return shown.partition("JobState=")[2].split()[0]

    def restarts(self, job: str) -> int:
        return int(self.run("scontrol", "show", "job", job).partition("Restarts=")[2].split()[0])

    def release(self, job: str) -> None:
        """Starts a requeued job now: SLURM holds it back for two minutes, for daemons that lag."""

        def started() -> bool:
            if self.state(job) == "PENDING":  # the delay is set when the last process has gone, maybe after this
                self.run("scontrol", "update", f"JobId={job}", "StartTime=now")
            return self.restarts(job) > 0 and self.state(job) in ("RUNNING", "COMPLETED")

        wait(started, 120, f"job {job} to run again")

    def start_node(self, node: str) -> None:
        self._start(node, "slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """Kills everything of a node at once, as a power cut would, and waits until SLURM has noticed."""
        tasks = self._processes(node)
        keepers = {p.ppid() for p in tasks} - {os.getpid(), 1}
        self._daemons[node].kill()
        for number in keepers | {p.pid for p in tasks}:
            os.kill(number, signal.SIGKILL)
        self._daemons[node].wait()
        wait(lambda: "down" in self.run("sinfo", "-h", "-n", node, "-o", "%t"), 120, f"{node} to be found down")

    def _processes(self, *nodes: str) -> list[psutil.Process]:
        """What jobs of this cluster run on some of its nodes."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                env = process.environ()
                own = env.get("SLURM_CONF", "").startswith(str(self.root))
                if own and env.get("SLURMD_NODENAME") in nodes:
                    found.append(process)
        return found

    def _start(self, name: str, *command: str) -> None:
        with (self.root / f"{name}.log").open("a") as log:
            words = [*command, "-f", str(self.root / "slurm.conf")]
            self._daemons[name] = subprocess.Popen(words, env=self.env, stdout=log, stderr=subprocess.STDOUT)


def _free(count: int) -> int:
    """The first of `count` ports in a row that nobody listens on."""
    while True:
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            first = one.getsockname()[1]
        try:
            for port in range(first, first + count):
                with socket.socket() as each:
                    each.bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
