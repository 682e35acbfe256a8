"""Getting the code to the pod: a commit, archived by git, unpacked beside the runs or uploaded there."""

import os
import pathlib
import secrets
import subprocess

from research.core.errors import UserError
from research.pods.job import Job, Step, Write, command


def _git(repository: str | os.PathLike, *arguments: str) -> str | None:
    """Output of a git command; None where it fails."""
    done = subprocess.run(["git", "-C", os.fspath(repository), *arguments], capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else None


def repository(folder: str | os.PathLike = ".") -> pathlib.Path:
    """The root of the git repository that holds `folder`; raises UserError where there is none."""
    found = _git(folder, "rev-parse", "--show-toplevel")
    if found is None:
        raise UserError(f"{pathlib.Path(folder).resolve()}: not in a git repository; jobs run the code of a commit")
    return pathlib.Path(found.strip())


def commit(root: pathlib.Path, revision: str = "HEAD") -> str:
    """The full hash of a revision; raises UserError where there is no such commit."""
    found = _git(root, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    if not found:
        raise UserError(f"--commit {revision}: no such commit in {root}; `git log --oneline` lists them")
    return found.strip()


def changed(root: pathlib.Path) -> list[str]:
    """Files that differ from the last commit, or are not in it and not ignored."""
    lines = (_git(root, "status", "--porcelain", "--untracked-files=all", "-z") or "").split("\0")
    return [line[3:] for line in lines if line[2:3] == " "]


def check_clean(root: pathlib.Path) -> None:
    """Refuses uncommitted changes, naming the files: what runs could not be told from the commit."""
    if files := changed(root):
        named = ", ".join(files[:5]) + (f" and {len(files) - 5} more" if len(files) > 5 else "")
        raise UserError(
            f"uncommitted changes would not be shipped: {named}; commit them, or leave them behind with --dirty-ok"
        )


def config(root: pathlib.Path, revision: str, argument: str) -> str:
    """The config argument as it is found in the shipped code: its file from the root of the repository.

    Raises UserError where the file is outside the repository or not in the commit.
    """
    path, colon, rest = argument.partition(":")
    file = next((f for f in (pathlib.Path.cwd() / path, root / path) if f.is_file()), None)
    if file is None:  # a dotted module, as research.core.config takes it
        file = root / (path.removesuffix(".py").replace(".", "/") + ".py")
    file = file.resolve()
    if not file.is_relative_to(root.resolve()):
        raise UserError(f"--config {path}: is outside of {root}, so it would not be shipped; move it there")
    inside = file.relative_to(root.resolve()).as_posix()
    if _git(root, "cat-file", "-e", f"{revision}:{inside}") is None:
        raise UserError(f"--config {path}: {inside} is not in commit {revision[:12]}; commit it")
    return inside + colon + rest


def archive(root: pathlib.Path, revision: str, file: str | os.PathLike) -> Step:
    """Writes the tree of a commit as a tarball: the same bytes for the same commit."""
    return command("git", "-C", root, "archive", "--format=tar.gz", "-o", file, revision)


def folder(job: Job) -> str:
    """Where the code of a job lies in its work folder, unpacked; with `.tar.gz`, packed."""
    return f"{job.workdir}/code/{job.commit}"


def unpack(root: pathlib.Path, job: Job) -> list[Step]:
    """Steps that put the code into a shared work folder, ready to run; none where it is there already."""
    code = folder(job)
    if pathlib.Path(code).is_dir():
        return []
    draft = f"{code}.draft"  # renamed when whole, so that no job finds half of it
    return [
        command("mkdir", "-p", draft),
        archive(root, job.commit, f"{code}.tar.gz"),
        command("tar", "-xzf", f"{code}.tar.gz", "-C", draft),
        command("mv", "-T", draft, code),
    ]


def upload(root: pathlib.Path, job: Job) -> list[Step]:
    """Steps that put the packed code into the work folder; in an object store this shows that it can be written to."""
    packed = f"{folder(job)}.tar.gz"
    if not job.remote:
        return [command("mkdir", "-p", f"{job.workdir}/code"), archive(root, job.commit, packed)]
    local = f"{job.staging}/{job.commit}.tar.gz"
    return [
        command("mkdir", "-p", job.staging),
        archive(root, job.commit, local),
        command("gcloud", "storage", "cp", local, packed),
    ]


def place(job: Job, name: str, text: str) -> list[Step]:
    """Steps that write a file into the work folder."""
    target = f"{job.workdir}/{name}"
    if not job.remote:
        return [Write(target, text)]
    local = f"{job.staging}/{job.name}/{name}"
    return [Write(local, text), command("gcloud", "storage", "cp", local, target)]


def probe(workdir: str | os.PathLike) -> None:
    """Makes a local work folder and writes to it; raises UserError naming what stands in the way."""
    path = pathlib.Path(workdir)
    file = path / f".probe.{secrets.token_hex(4)}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        file.write_text("")
        file.unlink()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"--workdir {path}: cannot be written to: {error.filename or path}: {reason}") from None
