"""A small repository of a fixed commit, and jobs of it, for the tests of submission."""

import os
import pathlib
import subprocess
import textwrap

from research.pods import chips
from research.pods.job import Job, Run

CONFIG = """
    from ml_collections import ConfigDict

    def get_config(arg):
        return ConfigDict(dict(seed=0, note="", student=dict(loss="kd"), data=dict(path="")))
"""
# Stands for the training: says how it was called, and ends as it is told to.
TRAIN = """
    import json, os, sys
    keys = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_PLATFORMS", "XLA_FLAGS")
    print(json.dumps({"argv": sys.argv[1:], "cwd": os.getcwd(), **{key: os.environ.get(key) for key in keys}}))
    sys.exit(int(os.environ.get("STATUS", 0)))
"""
NASTY = ("--config.note=two words", """--config.data.path=it's "here" $HOME `id` \\ ; & * 日""")


def repository(root: pathlib.Path) -> pathlib.Path:
    """A git repository with one commit, whose hash is always the same."""
    files = {"configs/small.py": CONFIG, "launch/train.py": TRAIN, "launch/__init__.py": "", ".gitignore": "runs/\n"}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(textwrap.dedent(text).lstrip())
    when = {"GIT_AUTHOR_DATE": "2026-01-01T00:00:00Z", "GIT_COMMITTER_DATE": "2026-01-01T00:00:00Z"}
    git(root, "init", "--quiet", "--initial-branch=main")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message=small", **when)
    return root


def git(root: pathlib.Path, *arguments: str, **environment: str) -> str:
    """Runs git as nobody in particular, without the user's own settings."""
    own = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    who = ("-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "core.autocrlf=false")
    command = ["git", "-C", str(root), *who, *arguments]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, **own, **environment}
    ).stdout.strip()


def job(topology: str, workdir: str, *, runs: int = 1, parallel: int = 0, overrides: tuple = NASTY, **options) -> Job:
    """A job of one run in `workdir`, or of several in folders below it."""
    folders = [f"{workdir}/seed={i}" for i in range(runs)] if parallel else [workdir]
    made = tuple(Run(folder, overrides) for folder in folders)
    commit = options.pop("commit", "1" * 40)
    parsed = chips.parse(topology)
    return Job("small", parsed, "configs/small.py", made, workdir, commit, parallel=parallel, **options)


def program(folder: pathlib.Path, name: str, text: str) -> pathlib.Path:
    """An executable script `name` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text("#!/bin/bash\n" + textwrap.dedent(text))
    file.chmod(0o755)
    return file
