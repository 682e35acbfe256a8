"""GKE through xpk: one JobSet a run, its manifest written by `xpk workload create`.

xpk restarts a JobSet whose process ends with status 42 or 127 and up, and fails it for any other: what `launch.train`
means by them. It passes SIGTERM on to the process. The command inside the manifest only fetches the start script and
runs it, since xpk puts it unquoted between quotes; the script lies beside the code in the work folder.
"""

import pathlib
from typing import NamedTuple

from research.core.config import suggest
from research.core.errors import RESTART, UserError
from research.pods import cloud, ship
from research.pods.job import Command, Job, Run, Step, bash, command, train
from research.pods.records import Record

# Machines with GPUs: the chip and xpk's name for the machine. The first of a chip is its usual one.
GPU_MACHINES = {
    "a3-highgpu-8g": ("h100", "h100-80gb-8"),
    "a3-megagpu-8g": ("h100", "h100-mega-80gb-8"),
    "a3-ultragpu-8g": ("h200", "h200-141gb-8"),
}
_COPY = (  # etils reads gs:// and disks alike, and is among the project's requirements
    "import pathlib, sys; from etils import epath; "
    "pathlib.Path(sys.argv[2]).expanduser().write_bytes(epath.Path(sys.argv[1]).read_bytes())"
)
_TOO_SMALL = {"v5e:1x1": "v5e:2x4", "v5e:2x2": "v5e:2x4"}  # not in xpk's table, which knows hosts of four chips


class Options(NamedTuple):
    """What only GKE needs; see `python -m launch.submit --help`."""

    cluster: str = ""
    image: str = ""
    project: str = ""
    zone: str = ""
    python: str = "python3"
    grace: int = 300
    machine_type: str = ""
    storage: str = ""
    spot: bool = False
    reservation: str = ""
    shared_filesystem: bool = False


def check(job: Job, options: Options) -> None:
    """Refuses what GKE or xpk does not offer, naming the nearest that they do."""
    for name in ("cluster", "image"):
        if not getattr(options, name):
            raise UserError(f"--{name}: needed for --engine gke")
    if not job.remote and not options.shared_filesystem:
        raise UserError(
            f"--workdir {job.workdir}: pods do not see this disk; give gs://bucket/folder, or say with "
            "--shared-filesystem that it is mounted there under the same path (xpk's --storage)"
        )
    cloud.check(job, options, options.reservation)
    device(job, options)
    if any(mark in bash(options.python) for mark in "'\"\\"):
        raise UserError(f"--python {options.python!r}: give a plain path")


def device(job: Job, options: Options) -> tuple[str, ...]:
    """xpk's options that name the machines of a topology."""
    topology = job.topology
    if topology.chip.platform == "tpu":
        if near := _TOO_SMALL.get(topology.name.partition("*")[0]):
            raise UserError(f"--topology {topology.name}: not offered through xpk; did you mean {near}?")
        _check_machine(options.machine_type, [topology.chip.machine_type], topology.name)
        shape = "x".join(map(str, topology.shape))
        return (f"--tpu-type={topology.chip.accelerator_prefix}-{shape}", f"--num-slices={topology.slices}")
    machines = {name: device for name, (chip, device) in GPU_MACHINES.items() if chip == topology.chip.name}
    if not machines:
        chips = ", ".join(dict.fromkeys(chip for chip, _ in GPU_MACHINES.values()))
        raise UserError(f"--topology {topology.name}: GKE jobs run on TPUs and on {chips}")
    devices, nodes = topology.shape
    if devices != 8:
        raise UserError(f"--topology {topology.name}: these machines have 8 GPUs; did you mean {topology.chip.name}:8?")
    _check_machine(options.machine_type, list(machines), topology.name)
    return (f"--device-type={machines[options.machine_type or next(iter(machines))]}", f"--num-nodes={nodes}")


def _check_machine(name: str, offered: list[str], topology: str) -> None:
    if name and name not in offered:
        near = suggest(name, offered) or f"; there is {' or '.join(offered)}"
        raise UserError(f"--machine-type {name}: not a machine of {topology}{near}")


def submit(job: Job, options: Options, root: pathlib.Path) -> list[Step]:
    """The steps that submit a job from the repository at `root`."""
    steps = ship.upload(root, job)
    for name, run in zip(cloud.names(job), job.runs, strict=True):
        steps += ship.place(job, f"jobs/{name}.sh", script(job, options, run))
    return [*steps, *(create(job, options, name) for name in cloud.names(job))]


def create(job: Job, options: Options, name: str) -> Command:
    """The xpk command that makes one JobSet."""
    return command(
        *("xpk", "workload", "create", f"--workload={name}", *_where(options._asdict())),
        *(*device(job, options), f"--docker-image={options.image}"),
        f"--max-restarts={job.restarts}",
        f"--termination-grace-period-seconds={options.grace}",
        f"--storage={options.storage}" if options.storage else None,
        "--spot" if options.spot else None,
        f"--reservation={options.reservation}" if options.reservation else None,
        f"--command={_bootstrap(job, options, name)}",
        submits=True,
    )


def _where(options: dict) -> tuple[str, ...]:
    return tuple(f"--{name}={options[name]}" for name in ("cluster", "project", "zone"))


def _bootstrap(job: Job, options: Options, name: str) -> str:
    """One line without double quotes or backslashes that fetches the start script and becomes it."""
    fetch = f"{options.python} -c '{_COPY}' {job.workdir}/jobs/{name}.sh ~/{name}.sh"
    return f"for pause in 5 10 20 40 80 0; do {fetch} && break; sleep $pause; done; exec bash ~/{name}.sh"


def script(job: Job, options: Options, run: Run) -> str:
    """The script that a pod runs: fetches the code and becomes the training process, which so gets the signals."""
    lines = [
        "#!/bin/bash",
        f"# {job.topology.name}, commit {job.commit}",
        cloud.RETRY,
        f"code=~/code/{job.commit}",
        'mkdir -p "$code" && cd "$code" || exit 1',
        f"fetch=({bash(options.python)} -c {bash(_COPY)})",
        f'retry "${{fetch[@]}}" {bash(ship.folder(job))}.tar.gz code.tar.gz || exit {RESTART}',
        "tar -xzf code.tar.gz || exit 1",
        "export PYTHONUNBUFFERED=1",
    ]
    if job.topology.chip.platform == "cuda":  # xpk names the first pod and the port apart; TPU pods JAX finds by itself
        lines += [
            'export JAX_COORDINATOR_ADDRESS="${JAX_COORDINATOR_ADDRESS%:*}:$JAX_COORDINATOR_PORT"',
            'export JAX_NUM_PROCESSES="$NNODES" JAX_PROCESS_ID="$NODE_RANK"',
        ]
    words = " ".join(map(bash, train(options.python, job, run)))
    return "\n".join([*lines, f"exec {words}", ""])


def identifiers(job: Job, said: str) -> list[str]:
    """The names of the JobSets."""
    return cloud.names(job)


def status(record: Record, identifier: str) -> list[Command]:
    """The command that tells the state of a JobSet."""
    return [command("xpk", "workload", "list", *_where(record.options), f"--filter-by-job=^{identifier}$")]


def logs(record: Record, identifier: str, *, run: int, task: int, lines: int, follow: bool) -> list[Command]:
    """The command that shows the end of a pod's log, newest line first; `task` counts the hosts of the first slice."""
    if follow:
        raise UserError("--follow: GKE's logs are read from Cloud Logging, which does not follow; leave it out")
    query = f'resource.type="k8s_container" AND resource.labels.cluster_name="{record.options["cluster"]}"'
    query += f' AND resource.labels.pod_name:"{identifier}-slice-job-0-{task}-"'
    shown = ("--order=desc", f"--limit={lines}", "--format=value(timestamp,textPayload)")
    return [command("gcloud", "logging", "read", query, f"--project={record.options['project']}", *shown)]


def cancel(record: Record, identifier: str) -> Command:
    """The command that ends a JobSet; its processes may save first."""
    return command("xpk", "workload", "delete", f"--workload={identifier}", *_where(record.options), "--quiet")
