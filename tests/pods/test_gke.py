"""GKE: what xpk is asked for, and that its one-line command ends in the training with every word in place."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from research.core.errors import UserError
from research.pods import chips, gke, job, ship
from research.pods.records import Record
from tests.pods import make

OPTIONS = gke.Options(cluster="c", image="i:1", project="p", zone="us-west4-b")


def test_the_command_in_the_manifest_fetches_and_becomes_the_training(tmp_path):
    root = make.repository(tmp_path / "code")
    found = make.job("h200:8x2", str(tmp_path / "w"), commit=ship.commit(root))
    options = OPTIONS._replace(python=sys.executable, shared_filesystem=True)
    gke.check(found, options)
    *steps, create = gke.submit(found, options, root)
    job.carry_out(steps)
    line = create.arguments[-1].removeprefix("--command=")
    assert not set('"\\\n') & set(line)  # xpk writes it between double quotes
    pod = {"JAX_COORDINATOR_ADDRESS": "kd-0.kd", "JAX_COORDINATOR_PORT": "6002", "NNODES": "2", "NODE_RANK": "1"}
    env = {**os.environ, "HOME": str(tmp_path / "home"), **pod, "STATUS": "42"}
    (tmp_path / "home").mkdir()
    done = subprocess.run(["bash", "-c", f"({line})"], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 42, done.stderr
    said = json.loads(done.stdout)
    assert said["argv"] == [
        *("--distributed", "--config", "configs/small.py", "--workdir", str(tmp_path / "w"), *make.NASTY)
    ]
    assert said["JAX_COORDINATOR_ADDRESS"] == "kd-0.kd:6002"
    assert (said["JAX_NUM_PROCESSES"], said["JAX_PROCESS_ID"]) == ("2", "1")
    assert said["cwd"] == str(tmp_path / "home/code" / found.commit)


def test_tpu_pods_are_found_by_jax_itself():
    found = make.job("v5e:4x4", "gs://b/w")
    assert "JAX_COORDINATOR" not in gke.script(found, OPTIONS, found.runs[0])
    assert gke.device(found, OPTIONS) == ("--tpu-type=v5litepod-4x4", "--num-slices=1")


@pytest.mark.parametrize(
    ("topology", "options", "says"),
    [
        ("v5e:2x2", {}, "did you mean v5e:2x4?"),
        ("v5e:1x1*2", {}, "did you mean v5e:2x4?"),
        ("cpu:2", {}, "TPUs and on h100, h200"),
        ("a100:8", {}, "TPUs and on h100, h200"),
        ("h100:4x2", {}, "did you mean h100:8?"),
        ("h100:8x2", {"machine_type": "a3-megagpu-8"}, "did you mean a3-megagpu-8g?"),
        ("v5e:4x4", {"machine_type": "ct5l-hightpu-4t"}, "did you mean ct5lp-hightpu-4t?"),
        ("v5e:4x4", {"zone": "us-west4"}, "--zone us-west4: not a zone; did you mean us-west4-a?"),
        ("v5e:4x4", {"zone": ""}, "--zone (none): not a zone; write it as"),
        ("v5e:4x4", {"cluster": ""}, "--cluster: needed"),
        ("v5e:4x4", {"project": ""}, "--project: needed"),
        ("v5e:4x4", {"spot": True, "reservation": "r"}, "--spot"),
        ("v5e:4x4", {"python": "a'b"}, "plain path"),
    ],
)
def test_what_is_not_offered_is_refused_with_the_nearest(topology, options, says):
    with pytest.raises(UserError) as error:
        gke.check(make.job(topology, "gs://b/w"), OPTIONS._replace(**options))
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("job_options", "says"),
    [
        ({"workdir": "/disk"}, "--shared-filesystem"),
        ({"workdir": "gs://b/it's"}, '"\'" is not allowed'),
        ({"workdir": "gs://b/w", "runs": 3, "parallel": 2}, "only SLURM can hold runs back"),
    ],
)
def test_work_folders_and_limits_that_pods_cannot_have_are_refused(job_options, says):
    with pytest.raises(UserError) as error:
        gke.check(make.job("v5e:4x4", **job_options), OPTIONS)
    assert says in str(error.value)


def test_a_sweep_is_a_workload_a_run():
    found = make.job("v5e:4x4", "gs://b/w", runs=2, parallel=2, staging="s")
    gke.check(found, OPTIONS)
    steps = gke.submit(found, OPTIONS, "/code")
    written = {step.path: step.text for step in steps if isinstance(step, job.Write)}
    created = [step.arguments[3] for step in steps if isinstance(step, job.Command) and step.arguments[0] == "xpk"]
    assert created == [f"--workload={name}" for name in gke.identifiers(found, "")]
    assert created == ["--workload=small-0", "--workload=small-1"]
    assert "gs://b/w/seed=1" in written["s/small/jobs/small-1.sh"]


@pytest.fixture
def xpk():
    """The xpk program, on the PATH or named by STILLROOM_XPK."""
    found = os.environ.get("STILLROOM_XPK") or shutil.which("xpk")
    if not found:
        pytest.skip("xpk is not installed: pip install xpk, or name it by STILLROOM_XPK")
    return found


def run(command, home):
    """Runs xpk where it finds no account, and no way out of this machine."""
    (home / ".config/xpk").mkdir(parents=True)
    (home / ".config/xpk/config.yaml").write_text('version: v1\nconfigs:\n  send-telemetry: "false"\n')
    proxy = {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
    env = {**os.environ, **proxy, "HOME": str(home), "CLOUDSDK_CONFIG": str(home / "gcloud")}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)


@pytest.mark.parametrize("topology", ["v5e:4x4*2", "h200:8x2"])
def test_xpk_makes_the_manifest_of_the_golden_file(xpk, golden, tmp_path, topology):
    command = gke.create(make.job(topology, "gs://bucket/small"), OPTIONS, "small")
    file = tmp_path / "manifest.yaml"
    offline = ("--dry-run", "--skip-validation", f"--output-manifest-file={file}")
    done = run([xpk, *command.arguments[1:], *offline], tmp_path / "home")
    assert done.returncode == 0, done.stdout + done.stderr
    expected = golden / "submit" / f"manifest_{chips.parse(topology).chip.name}.yaml"
    if os.environ.get("STILLROOM_GOLDEN"):
        expected.write_text(file.read_text())
    assert file.read_text() == expected.read_text()


def test_xpk_takes_the_questions(xpk, tmp_path):
    options = json.loads(json.dumps(OPTIONS._asdict()))
    record = Record("kd", "gke", ["kd"], "v5e:4x4", "c", "gs://b/w", ["gs://b/w"], 0, "", "", options, [])
    for number, question in enumerate((*gke.status(record, "kd"), gke.cancel(record, "kd"))):
        done = run([xpk, *question.arguments[1:], "--dry-run", "--skip-validation"], tmp_path / f"home{number}")
        assert done.returncode == 0, done.stdout + done.stderr


def test_xpk_knows_every_tpu_that_we_offer(xpk, tmp_path):
    """Its own table, read by its own Python."""
    code = (
        "import json; from xpk.core.system_characteristics import UserFacingNameToSystemCharacteristics as t;"
        "print(json.dumps(list(t)))"
    )
    python = os.path.join(os.path.dirname(os.path.realpath(xpk)), "python")
    done = run([python, "-c", code], tmp_path / "home")
    known = set(json.loads(done.stdout.splitlines()[-1]))
    for name in ("v4", "v5e", "v5p", "v6e", "7x"):
        chip = chips.chip(name)
        for shape in chips.offered(chip):
            found = make.job("cpu:1", "gs://b/w")._replace(topology=chips.Topology(chip, shape))
            try:
                device = gke.device(found, OPTIONS)[0].removeprefix("--tpu-type=")
            except UserError as error:
                assert "did you mean" in str(error)
            else:
                assert device in known, device
    assert {device for _, device in gke.GPU_MACHINES.values()} <= known
