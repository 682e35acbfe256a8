"""A bucket in memory that speaks the part of Google Cloud Storage's JSON interface that reading shards needs."""

import contextlib
import email
import http.server
import json
import os
import re
import threading
import urllib.parse
from collections.abc import Iterator

NAME = "test-bucket"


class Bucket(http.server.ThreadingHTTPServer):
    """Objects by name; `reads` lists (object, Range header) of every download, `most` the most under way at once."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("localhost", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.reads: list[tuple[str, str | None]] = []
        self.now, self.most, self.lock = 0, 0, threading.Lock()
        self.pause = threading.Event()  # set: downloads of records wait until four are under way, or a second

    def handle_error(self, request, client_address):
        """Clients hang up in the middle of an answer once they have what they need."""

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a process for which `gs://test-bucket` is this bucket."""
        address = f"http://localhost:{self.server_address[1]}"
        return os.environ | {
            "STORAGE_EMULATOR_HOST": address,
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": address,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "FSSPEC_GCS_TOKEN": "anon",
            "FSSPEC_GS_TOKEN": "anon",
            "JAX_PLATFORMS": "cpu",
        }


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        url = urllib.parse.urlparse(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        _, _, name = url.path.partition(f"/b/{NAME}/o")
        name, objects = urllib.parse.unquote(name).removeprefix("/"), self.server.objects
        if not name:
            self._answer(200, json.dumps(_listing(objects, query.get("prefix", ""))).encode())
        elif name not in objects:
            self._answer(404, b'{"error": {"code": 404, "message": "no such object"}}')
        elif query.get("alt") == "media":
            self._download(name, objects[name])
        else:
            self._answer(200, json.dumps(_item(name, objects[name])).encode())

    def _download(self, name: str, data: bytes) -> None:
        asked, server = self.headers.get("Range"), self.server
        first, last = 0, len(data)
        if asked:
            low, high = re.fullmatch(r"bytes=(\d*)-(\d*)", asked).groups()
            first = int(low) if low else max(0, last - int(high))
            last = min(last, int(high) + 1) if low and high else last
        with server.lock:
            server.reads.append((name, asked))
            server.now += 1
            server.most = max(server.most, server.now)
        if server.pause.is_set():
            for _ in range(100):
                if server.most >= 4:
                    break
                threading.Event().wait(0.01)
        more = {"Content-Range": f"bytes {first}-{last - 1}/{len(data)}"} if asked else {}
        self._answer(206 if asked else 200, data[first:last], more)
        with server.lock:
            server.now -= 1

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        message = email.message_from_bytes(b"Content-Type: " + self.headers["Content-Type"].encode() + b"\n\n" + body)
        about, _ = message.get_payload()
        name = json.loads(about.get_payload())["name"]
        # The mail parser changes line ends in binary parts: the content is cut out of the body itself.
        part = body.split(b"--" + message.get_boundary().encode())[2]
        data = part.partition(b"\n\n")[2] or part.partition(b"\r\n\r\n")[2]
        self.server.objects[name] = data.removesuffix(b"\n").removesuffix(b"\r")
        self._answer(200, json.dumps(_item(name, data)).encode())

    def do_DELETE(self):
        name = urllib.parse.unquote(self.path.partition(f"/b/{NAME}/o/")[2].partition("?")[0])
        self._answer(204 if self.server.objects.pop(name, None) is not None else 404, b"")

    def _answer(self, status: int, data: bytes, more: dict | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), "x-goog-generation": "1", **(more or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # array_record hangs up once it has its record
            self.wfile.write(data)


def _item(name: str, data: bytes) -> dict:
    times = {"timeCreated": "2026-01-01T00:00:00Z", "updated": "2026-01-01T00:00:00Z"}
    return {"name": name, "bucket": NAME, "size": str(len(data)), "generation": "1", **times}


def _listing(objects: dict[str, bytes], prefix: str) -> dict:
    below = {name: name[len(prefix) :] for name in sorted(objects) if name.startswith(prefix)}
    folders = {prefix + rest.partition("/")[0] + "/" for rest in below.values() if "/" in rest}
    items = [_item(name, objects[name]) for name, rest in below.items() if "/" not in rest]
    return {"kind": "storage#objects", "items": items, "prefixes": sorted(folders)}


@contextlib.contextmanager
def serving() -> Iterator[Bucket]:
    """A bucket that answers on localhost while the context lasts."""
    bucket = Bucket()
    thread = threading.Thread(target=bucket.serve_forever, daemon=True)
    thread.start()
    try:
        yield bucket
    finally:
        bucket.shutdown()
        bucket.server_close()
        thread.join()
