"""Servers that speak as S3, Google's storage and the Hugging Face hub do, behind a line that can be cut."""

import http.server
import json
import os
import re
import selectors
import socket
import socketserver
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from urllib.parse import parse_qs

import fsspec
import pytest

from anymal.data import object_store

BUCKETS = {"s3": "s3://bucket/d", "gs": "gs://bucket/d", "hf": "hf://datasets/me/data/d"}
KEY, SECRET, TOKEN = "AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "hf_QjWsXcDeRfVbGtYhNu"


class Line(socketserver.ThreadingTCPServer):
    """Passes bytes on to a server. `ranges` are the first bytes of the ranges that were asked of it."""

    allow_reuse_address = daemon_threads = True

    def __init__(self, port: int):
        super().__init__(("127.0.0.1", 0), _Passing)
        self.port, self.ranges, self.connections = port, [], set()
        self.left, self.outage, self.then = None, 0, None
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def cut_after(self, size: int, *, outage: int = 1, then: Callable[[], object] | None = None) -> None:
        """Break off after so many bytes of answers, call `then`, and break off so many connections more at once."""
        self.left, self.outage, self.then = size, outage, then

    def cut(self) -> None:
        """Break off all connections."""
        self.left = None
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        if self.then is not None:
            self.then()


class _Passing(socketserver.BaseRequestHandler):
    def handle(self):
        line, here = self.server, self.request
        if line.left is None and line.outage > 0:
            line.outage -= 1
            return
        with socket.create_connection(("127.0.0.1", line.port)) as there, selectors.DefaultSelector() as ready:
            line.connections.add(here)
            for end in (here, there):
                ready.register(end, selectors.EVENT_READ)
            with suppress(OSError):
                while True:
                    for key, _ in ready.select():
                        data = key.fileobj.recv(4096)
                        if not data:
                            return
                        if key.fileobj is here:
                            line.ranges += [int(first) for first in re.findall(rb"(?i)\nrange: bytes=(\d+)-", data)]
                            there.sendall(data)
                            continue
                        rest = len(data) if line.left is None else line.left
                        here.sendall(data[:rest])
                        if line.left is not None:
                            line.left -= len(data)
                            if line.left <= 0:
                                line.cut()
                                return

    def finish(self):
        self.server.connections.discard(self.request)


class Hub(http.server.BaseHTTPRequestHandler):
    """Of the hub's answers, those that reading a file of a dataset takes."""

    files: dict[str, bytes]

    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self._answer(401, b"{}", **{"X-Error-Code": "RepoNotFound"})
        if re.fullmatch(r"/api/datasets/me/data(/revision/main)?", self.path):
            return self._answer(200, b'{"id": "me/data", "sha": "0"}')
        data = self.files.get(self.path.removeprefix("/datasets/me/data/resolve/main/"))
        if data is None:
            return self._answer(404, b"{}", **{"X-Error-Code": "EntryNotFound"})
        first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
        self._answer(206, data[first : last + 1])

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        commit = {"id": "0", "title": "", "date": "2026-02-02T10:00:00.000Z"}
        found = [
            {"type": "file", "path": name, "size": len(data), "oid": sha256(data).hexdigest(), "lastCommit": commit}
            for name, data in self.files.items()
            if name in parse_qs(body)["paths"]
        ]
        self._answer(200, json.dumps(found).encode())

    def _answer(self, status: int, data: bytes, **headers: str):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


@dataclass(kw_only=True)
class Store:
    """A store with one folder."""

    url: str
    """The folder's address."""
    line: Line
    put: Callable[[str, bytes], object]
    """Place an object in the folder, or replace it."""


@contextmanager
def serving(scheme: str, patch: pytest.MonkeyPatch) -> Iterator[Store]:
    """An empty store of this scheme. What reads it finds its address and credentials in the environment."""
    with {"s3": _s3, "gs": _gs, "hf": _hf}[scheme](patch) as (port, put), Line(port) as line:
        threading.Thread(target=line.serve_forever, daemon=True).start()
        patch.setenv("AWS_ENDPOINT_URL", line.url)
        patch.setenv("STORAGE_EMULATOR_HOST", line.url)
        patch.setitem(fsspec.config.conf, "hf", {"endpoint": line.url})  # HF_ENDPOINT is read at import only
        object_store.require(scheme)
        fsspec.get_filesystem_class(scheme).clear_instance_cache()  # what another test's server was asked with
        yield Store(url=BUCKETS[scheme], line=line, put=put)
        line.shutdown()


@contextmanager
def _s3(patch: pytest.MonkeyPatch) -> Iterator[tuple[int, Callable]]:
    import boto3
    from moto.server import ThreadedMotoServer

    patch.setattr("s3fs.S3FileSystem.retries", 1)
    patch.delenv("AWS_PROFILE", raising=False)
    more = {"AWS_DEFAULT_REGION": "us-east-1", "AWS_MAX_ATTEMPTS": "1", "AWS_EC2_METADATA_DISABLED": "true"}
    more |= dict.fromkeys(("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"), os.devnull)
    for name, value in {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, **more}.items():
        patch.setenv(name, value)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    _send(port, "/moto-api/reset", "POST")
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}")
    client.create_bucket(Bucket="bucket")
    yield port, lambda name, data: client.put_object(Bucket="bucket", Key=f"d/{name}", Body=data)
    server.stop()


@contextmanager
def _gs(patch: pytest.MonkeyPatch) -> Iterator[tuple[int, Callable]]:
    from gcp_storage_emulator.server import create_server

    patch.setitem(fsspec.config.conf, "gs", {"token": "anon"})  # fsspec reads the environment at import
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    server.start()
    address = "/upload/storage/v1/b/bucket/o?uploadType=media&name=d%2F"
    yield port, lambda name, data: _send(port, address + name, "POST", data)
    server.stop()


@contextmanager
def _hf(patch: pytest.MonkeyPatch) -> Iterator[tuple[int, Callable]]:
    patch.setenv("HF_TOKEN", TOKEN)
    files: dict[str, bytes] = {}
    handler = type("Serving", (Hub,), {"files": files})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port, lambda name, data: files.update({f"d/{name}": data})
        server.shutdown()


def _send(port: int, path: str, method: str, data: bytes = b"") -> None:
    headers = {"Content-Type": "application/octet-stream"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers, method=method)
    urllib.request.urlopen(request, timeout=30).close()
