"""TPU VMs through queued resources: Cloud runs the start-up script on every worker, again after every repair.

The script installs Python and the code, then trains until the process ends with something else than a wish to be
started again. What one worker finds out, the others read from a state file in the work folder: `done`, or which worker
failed and how. The first worker gives the machines back at the end, whatever it was.
"""

import pathlib
from typing import NamedTuple

from research.core.config import suggest
from research.core.errors import UserError
from research.pods import chips, cloud, ship
from research.pods.job import FATAL, Command, Job, Run, Step, Write, arguments, bash, command
from research.pods.records import Record

VERSIONS = (
    *("tpu-ubuntu2204-base", "v2-alpha-tpuv5", "v2-alpha-tpuv5-lite", "v2-alpha-tpuv6e"),
    *("v2-alpha-tpu7-ubuntu2404", "tpu-vm-v4-base", "tpu-vm-base"),
)
_LOG = "/var/log/stillroom.log"


class Options(NamedTuple):
    """What only TPU VMs need; see `python -m launch.submit --help`."""

    project: str = ""
    zone: str = ""
    python: str = "3.11"
    runtime_version: str = ""
    service_account: str = ""
    network: str = ""
    spot: bool = False
    reserved: bool = False


def check(job: Job, options: Options) -> None:
    """Refuses what Cloud TPU does not offer, naming the nearest that it does."""
    topology = job.topology
    if topology.chip.platform != "tpu":
        raise UserError(f"--topology {topology.name}: not a TPU; use --engine slurm or gke")
    if not job.remote:
        raise UserError(f"--workdir {job.workdir}: TPU VMs mount no disk of ours; give gs://bucket/folder")
    cloud.check(job, options, options.reserved)
    usual = chips.parse(topology.accelerator_type)
    if usual.shape != topology.shape:
        raise UserError(
            f"--topology {topology.name}: a TPU VM is asked for as {topology.accelerator_type}, which gives "
            f"{usual.name}; take that, or --engine gke"
        )
    version = options.runtime_version
    if version and version not in VERSIONS:
        near = suggest(version, VERSIONS) or f"; the usual one is {topology.chip.runtime_version}"
        raise UserError(f"--runtime-version {version}: not known{near}")


def submit(job: Job, options: Options, root: pathlib.Path) -> list[Step]:
    """The steps that submit a job from the repository at `root`."""
    steps = ship.upload(root, job)
    for name, run in zip(cloud.names(job), job.runs, strict=True):
        start = f"{job.staging}/{job.name}/jobs/{name}.sh"
        steps += [*ship.place(job, f"jobs/{name}.state", "submitted\n"), Write(start, script(job, options, name, run))]
    return [*steps, *(create(job, options, name) for name in cloud.names(job))]


def create(job: Job, options: Options, name: str) -> Command:
    """The gcloud command that asks for the machines of one run."""
    topology = job.topology
    nodes = (f"--node-count={topology.slices}", f"--node-prefix={name}") if topology.slices > 1 else ()
    return command(
        *("gcloud", "compute", "tpus", "queued-resources", "create", name),
        *_where(options._asdict()),
        f"--accelerator-type={topology.accelerator_type}",
        f"--runtime-version={options.runtime_version or topology.chip.runtime_version}",
        *(nodes or (f"--node-id={name}",)),
        "--spot" if options.spot else None,
        "--reserved" if options.reserved else None,
        f"--service-account={options.service_account}" if options.service_account else None,
        f"--network={options.network}" if options.network else None,
        f"--metadata-from-file=startup-script={job.staging}/{job.name}/jobs/{name}.sh",
        submits=True,
    )


def _where(options: dict) -> tuple[str, str]:
    return f"--project={options['project']}", f"--zone={options['zone']}"


_BODY = """\
# Google's metadata server answers on every machine; tpu-env holds lines such as NODE_ID: 'kd-0'.
metadata() { curl -sf -H "Metadata-Flavor: Google" "http://metadata.google.internal/computeMetadata/v1/instance/$1"; }
from_env() { metadata attributes/tpu-env | grep "^$1:" | cut -d "'" -f 2; }
worker=$(metadata attributes/agent-worker-number)
slice=$(from_env MEGASCALE_SLICE_ID)
slice=${slice:-0}

log=/var/log/stillroom.log
exec > >(tee -a "$log") 2>&1
export HOME=/root PYTHONUNBUFFERED=1 PIP_BREAK_SYSTEM_PACKAGES=1
ulimit -n 1048576
upload_log() { gcloud storage cp "$log" "$work/logs/$name-$slice-$worker.log"; }
state() { gcloud storage cat "$work/jobs/$name.state" 2>/dev/null; }
end() {  # the word for the others; the first worker gives the machines back
  case "$(state)" in submitted|"") echo "$1" | gcloud storage cp - "$work/jobs/$name.state" ;; esac
  echo "$(date -Is) slice $slice, worker $worker: $1"
  upload_log
  if [ "$slice" = 0 ] && [ "$worker" = 0 ]; then
    sleep "${GOODBYE:-120}"  # for the others to say theirs
    gcloud compute tpus queued-resources delete "$name" "--project=$project" "--zone=$zone" --force --quiet --async
  fi
  exit 0
}

echo "$(date -Is) slice $slice, worker $worker: start"
code=/opt/stillroom/$commit
if [ ! -f "$code/.ready" ]; then
  mkdir -p "$code" && cd "$code" || end "failed: cannot make $code"
  retry gcloud storage cp "$work/code/$commit.tar.gz" code.tar.gz \\
    || end "failed: cannot fetch the code"
  tar -xzf code.tar.gz || end "failed: cannot unpack the code"
  retry python3 -m pip install --quiet uv || end "failed: cannot install uv"
  retry python3 -m uv venv --quiet --python "$python" .venv || end "failed: cannot make an environment"
  retry python3 -m uv pip install --quiet --python .venv/bin/python -e '.[tpu,gcs]' \\
    || end "failed: cannot install the code"
  touch .ready
fi
cd "$code" || end "failed: $code is gone"

for attempt in $(seq 0 "$restarts"); do
  case "$(state)" in failed*) end "stopped" ;; done*) end "done" ;; esac
  .venv/bin/python -m launch.train --distributed "${run[@]}" &
  child=$!
  trap 'kill -TERM $child' TERM
  # A preempted machine has half a minute left: enough to be told, not to be waited for.
  (metadata "preempted?wait_for_change=true" | grep -q TRUE && kill -USR1 $child) &
  watcher=$!
  wait $child
  status=$?
  while kill -0 $child 2>/dev/null; do wait $child; status=$?; done
  pkill -P $watcher; kill $watcher 2>/dev/null
  upload_log
  [ $status = 0 ] && end "done"
  if FATAL; then end "failed: slice $slice, worker $worker, status $status"; fi
  echo "$(date -Is) status $status after start $attempt: starting again"
done
end "failed: given up after $restarts restarts"
"""


def script(job: Job, options: Options, name: str, run: Run) -> str:
    """The start-up script of one run's workers."""
    values = {
        "name": name,
        "work": job.workdir,
        "commit": job.commit,
        "restarts": job.restarts,
        "python": options.python,
        "project": options.project,
        "zone": options.zone,
    }
    lines = ["#!/bin/bash", f"# {job.topology.name}", *(f"{key}={bash(str(value))}" for key, value in values.items())]
    words = " ".join(map(bash, ["--config", job.config, *arguments(run)]))
    return "\n".join([*lines, f"run=({words})", "", cloud.RETRY, _BODY.replace("FATAL", FATAL.format("$status"))])


def identifiers(job: Job, said: str) -> list[str]:
    """The names of the queued resources."""
    return cloud.names(job)


def status(record: Record, identifier: str) -> list[Command]:
    """Commands that tell the state: of the machines or, once they are given back, what the job left."""
    where = _where(record.options)
    shown = "--format=value(state.state)"
    return [
        command("gcloud", "compute", "tpus", "queued-resources", "describe", identifier, *where, shown),
        command("gcloud", "storage", "cat", f"{record.workdir}/jobs/{identifier}.state"),
    ]


def logs(record: Record, identifier: str, *, run: int, task: int, lines: int, follow: bool) -> list[Command]:
    """Commands that show a worker's log: on the machine, then in the work folder, where it is put at the end."""
    slices = chips.parse(record.topology).slices
    workers = chips.parse(record.topology).hosts // slices
    node = f"{identifier}-{task // workers}" if slices > 1 else identifier
    tail = f"sudo tail -n {lines}{' -F' if follow else ''} {_LOG}"
    ssh = ("gcloud", "compute", "tpus", "tpu-vm", "ssh", node, f"--worker={task % workers}", f"--command={tail}")
    file = f"{record.workdir}/logs/{identifier}-{task // workers}-{task % workers}.log"
    return [command(*ssh, *_where(record.options)), command("gcloud", "storage", "cat", file)]


def cancel(record: Record, identifier: str) -> Command:
    """The command that gives the machines back, whatever runs on them."""
    delete = ("gcloud", "compute", "tpus", "queued-resources", "delete", identifier)
    return command(*delete, *_where(record.options), "--force", "--quiet", "--async")
