"""PyTorch's side of a bench, in a process of its own that answers one line of JSON to each line it is sent."""

import argparse
import json
import pathlib
import subprocess
import sys
from collections.abc import Sequence


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that choose the peer's interpreter, as `python`; None compares with nothing."""
    parser.add_argument(
        "--torch-python",
        dest="python",
        default=sys.executable,
        metavar="PYTHON",
        help="interpreter that has torch and timm (this one)",
    )
    parser.add_argument(
        "--no-torch", dest="python", action="store_const", const=None, help="do not compare with PyTorch"
    )


class Peer:
    """A running peer.

    Attributes:
      ready: its first answer; `error` in it says why there is no comparison.
    """

    def __init__(self, python: str, script: str, words: Sequence):
        """Starts `script` of this folder with an interpreter that has torch and timm."""
        command = [python, pathlib.Path(__file__).with_name(script), *words]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            map(str, command), stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )
        self.ready = self._read()

    @property
    def reason(self) -> str:
        """Why it cannot be compared with; empty where it can."""
        return self.ready.get("error", "")

    @property
    def version(self) -> str:
        return self.ready.get("version", "")

    def _read(self) -> dict:
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"error": f"its process ended with status {self._process.wait()}"}

    def ask(self, *words) -> dict:
        """Its answer to a line of words; raises ValueError where it fails."""
        self._process.stdin.write(" ".join(map(str, words)) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        if "error" in answer:
            raise ValueError(f"PyTorch's side failed: {answer['error']}")
        return answer

    def close(self) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
