"""What GKE and TPU VMs have in common: zones, addresses, and the shell functions of start scripts."""

import re
from typing import NamedTuple

from research.core.config import suggest
from research.core.errors import UserError
from research.pods.job import Job

# Where TPUs or large GPUs are offered, to name the nearest; any zone of the right form is taken.
ZONES = (
    *("us-central1-a", "us-central1-b", "us-central1-c", "us-central2-b", "us-east1-c", "us-east1-d", "us-east4-a"),
    *("us-east5-a", "us-east5-b", "us-east5-c", "us-south1-a", "us-west1-c", "us-west4-a", "us-west4-b"),
    *("europe-west1-b", "europe-west4-a", "europe-west4-b", "asia-east1-c", "asia-northeast1-b", "asia-southeast1-b"),
    *("southamerica-east1-c", "southamerica-west1-a"),
)

RETRY = """\
retry() {
  for pause in 5 10 20 40 80 0; do
    "$@" && return 0
    sleep "$pause"
  done
  return 1
}"""


def check(job: Job, options: NamedTuple, reserved: object) -> None:
    """Refuses a missing project, a malformed zone, and a work folder or limit that the cloud cannot serve.

    `options` is an engine's, with `project`, `zone` and `spot`; `reserved` says whether it asks for reserved machines.
    """
    if not options.project:
        raise UserError("--project: needed; `gcloud config get project` tells the usual one")
    check_zone(options.zone)
    if odd := re.sub(r"[\w.,:/=+@-]", "", job.workdir):
        raise UserError(f"--workdir {job.workdir!r}: {odd[0]!r} is not allowed here; use letters, digits and ._-,:=+@/")
    if options.spot and reserved:
        raise UserError("--spot: reserved machines are not spot machines; ask for one of them")
    if job.parallel and job.parallel < len(job.runs):
        raise UserError(
            f"--parallel {job.parallel}: only SLURM can hold runs back; here every run is a job of its own, which "
            "starts when there is capacity: leave it out"
        )


def check_zone(zone: str) -> None:
    """Refuses what is not a zone, naming the nearest: `us-west4` lacks its letter."""
    if not re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z]", zone):
        given = zone or "(none)"
        near = suggest(zone, ZONES) or "; write it as us-central2-b"
        raise UserError(f"--zone {given}: not a zone{near}")


def names(job: Job) -> list[str]:
    """The names of the jobs that the runs become: that of the submission, numbered where it is a sweep."""
    return [f"{job.name}-{index}" for index in range(len(job.runs))] if job.parallel else [job.name]
