"""An emulator of Google Cloud Storage in memory, on this machine: `python gcs_server.py PORT BUCKET`, ends with stdin.

The emulator package leaves out object generations in two places where TensorStore, under Orbax, relies on them.
"""

import sys
from http import HTTPStatus

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

download, insert = objects.download, objects.insert


def generation(request, storage, name: str) -> str:
    """The generation of an object; "0" where there is none."""
    try:
        return storage.get_file_obj(request.params["bucket_name"], name)["generation"]
    except NotFound:
        return "0"


def download_with_generation(request, response, storage, *rest, **named):
    found = generation(request, storage, request.params["object_id"])
    if found != "0":
        response["x-goog-generation"] = found
    download(request, response, storage, *rest, **named)


def conditional_insert(request, response, storage, *rest, **named):
    wanted = request.query.get("ifGenerationMatch")
    if wanted and wanted[0] != generation(request, storage, request.query["name"][0]):
        response.status = HTTPStatus.PRECONDITION_FAILED
        return
    insert(request, response, storage, *rest, **named)


objects.download, objects.insert = download_with_generation, conditional_insert

from gcp_storage_emulator.server import create_server  # noqa: E402  (it takes the handlers as it is imported)

server = create_server("localhost", int(sys.argv[1]), True, sys.argv[2])
server.start()
print("ready", flush=True)
sys.stdin.read()
server.stop()
