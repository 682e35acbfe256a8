"""One line for a mistake of the user, a traceback for a mistake of the code."""

import errno
import functools
import os
import pathlib
import sys
import sysconfig
import traceback
from collections.abc import Callable

ENVIRONMENT = "STILLROOM_TRACEBACK"
RESTART = 42  # exit status of a job that asks its launcher to start it again: it has saved, or lost another process
FILE_ERRORS = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_OWN = pathlib.Path(__file__).resolve().parents[2]
_FOREIGN = [pathlib.Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "purelib", "platlib")]


class UserError(ValueError):
    """Something the user can mend: the message names the key or file, and the fix."""


def deliberate(error: BaseException) -> bool:
    """Whether `error` was raised for the user to read, rather than by a bug.

    Errors about files, a full disk and `UserError` are; a plain ValueError is when the statement that raised it is a
    `raise` of this project or of the user's own files. One from inside JAX, NumPy or a built-in is a bug and keeps its
    traceback.
    """
    if isinstance(error, (*FILE_ERRORS, UserError)):
        return True
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return True
    if not isinstance(error, ValueError) or error.__traceback__ is None:
        return False
    frame = traceback.extract_tb(error.__traceback__)[-1]
    path = pathlib.Path(frame.filename).resolve()
    own = any(path.is_relative_to(_OWN / package) for package in ("research", "configs", "launch"))
    foreign = any(path.is_relative_to(root) for root in _FOREIGN)
    return (own or not foreign) and "raise " in (frame.line or "")


def message(error: BaseException) -> str:
    """The text for the user; operating-system errors as `file: reason`."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror.lower()}"
    return str(error).strip() or type(error).__name__


def cli(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wraps a launcher's `main(argv) -> exit status` so that deliberate errors end it with one line and status 1.

    The line is `program: message` on stderr. `--traceback` anywhere among the arguments, or STILLROOM_TRACEBACK=1 in
    the environment, shows the whole traceback instead. Other exceptions keep theirs. An interrupt from the keyboard
    gives 130.
    """
    program = main.__module__.rpartition(".")[2]

    @functools.wraps(main)
    def run(argv: list[str] | None = None, **options) -> int:
        arguments = list(sys.argv[1:] if argv is None else argv)
        whole = "--traceback" in arguments or os.environ.get(ENVIRONMENT, "") not in ("", "0")
        name = pathlib.Path(sys.argv[0]).stem if program == "__main__" else program
        try:
            return main([a for a in arguments if a != "--traceback"], **options) or 0
        except KeyboardInterrupt:
            print(f"{name}: interrupted", file=sys.stderr)
            return 130
        except Exception as error:
            if whole or not deliberate(error):
                traceback.print_exception(error)
            else:
                print(f"{name}: {message(error)}", file=sys.stderr)
            return 1

    return run
