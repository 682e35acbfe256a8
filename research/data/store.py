"""Where shards lie: a folder on a disk, or one in an object store such as `gs://bucket/folder`.

A disk is read through the operating system. Stores are listed and copied through fsspec (`gs://` needs the `gcs`
extra), and single records of `gs://` shards are read in place by the array_record library, which asks for the byte
range it needs. It finds Google's credentials by itself (GOOGLE_APPLICATION_CREDENTIALS or the machine's own).
"""

import functools
import os
import pathlib
import secrets

from research.core.errors import UserError

IN_PLACE = ("gs",)  # schemes that array_record opens itself


class Store:
    """A folder of files, local or remote; names are relative to it. May be pickled.

    Args:
      root: a path, or an address with a scheme that fsspec knows.
      key: the option that named it, for messages.
    """

    def __init__(self, root: str | os.PathLike, key: str = "data.path"):
        self.root, self.key = os.fspath(root).rstrip("/") or "/", key
        scheme, mark, _ = self.root.partition("://")
        self.local = not mark
        self.in_place = self.local or scheme in IN_PLACE
        if self.local:
            self.root = str(pathlib.Path(self.root).expanduser())

    @functools.cached_property
    def _remote(self):
        """(fsspec file system, path of the folder in it)."""
        import fsspec

        try:
            return fsspec.core.url_to_fs(self.root)
        except (ValueError, ImportError) as error:
            raise UserError(f"{self.key}: {self.root} cannot be reached: {_line(error)}") from None

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_remote"}

    def where(self, name: str) -> str:
        """The whole path or address of a file."""
        return f"{self.root}/{name}"

    def sizes(self) -> dict[str, int]:
        """Bytes of each file of the folder itself; {} where there is no such folder."""
        try:
            if self.local:
                return {entry.name: entry.stat().st_size for entry in os.scandir(self.root) if entry.is_file()}
            fs, root = self._remote
            fs.invalidate_cache()
            found = fs.ls(root, detail=True)
            return {item["name"].rpartition("/")[2]: item["size"] for item in found if item["type"] == "file"}
        except FileNotFoundError:
            return {}
        except NotADirectoryError:
            raise UserError(f"{self.key}: {self.root} is a file, not a folder") from None
        except Exception as error:
            raise self._failure("cannot be listed", error) from None

    def read(self, name: str) -> bytes:
        """A file's content; raises FileNotFoundError."""
        if self.local:
            return pathlib.Path(self.root, name).read_bytes()
        fs, root = self._remote
        return fs.cat_file(f"{root}/{name}")

    def write(self, name: str, data: bytes) -> None:
        """Writes a small file whole or not at all."""
        if self.local:
            target = pathlib.Path(self.root, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
            try:
                draft.write_bytes(data)
                os.replace(draft, target)
            finally:
                draft.unlink(missing_ok=True)
        else:
            fs, root = self._remote
            fs.pipe_file(f"{root}/{name}", data)

    def put(self, file: pathlib.Path, name: str) -> None:
        """Moves a finished file of this machine in, whole or not at all; on a disk it must be on the same one."""
        if self.local:
            os.replace(file, os.path.join(self.root, name))
        else:
            fs, root = self._remote
            fs.put_file(str(file), f"{root}/{name}")
            file.unlink()

    def get(self, name: str, file: pathlib.Path) -> None:
        """Copies a file to this machine, whole or not at all."""
        fs, root = self._remote
        draft = file.with_name(f".{file.name}.{secrets.token_hex(4)}.partial")
        try:
            fs.get_file(f"{root}/{name}", str(draft))
            os.replace(draft, file)
        finally:
            draft.unlink(missing_ok=True)

    def remove(self, names: list[str]) -> None:
        """Removes files, those that are there."""
        for name in names:
            if self.local:
                pathlib.Path(self.root, name).unlink(missing_ok=True)
            elif self._remote[0].exists(f"{self._remote[1]}/{name}"):
                self._remote[0].rm_file(f"{self._remote[1]}/{name}")

    def _failure(self, what: str, error: Exception) -> Exception:
        return error if isinstance(error, UserError) else UserError(f"{self.key}: {self.root} {what} ({_line(error)})")


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
