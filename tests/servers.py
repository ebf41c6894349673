"""Object stores for tests: an S3 server, a GCS emulator, a proxy that injects faults."""

import contextlib
import http.client
import os
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import pytest

BUCKET = "bucket"  # both servers have it
# What a machine of its own might have set, and would reach other servers by.
_FOREIGN = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "GOOGLE_APPLICATION_CREDENTIALS")


@dataclass(frozen=True)
class ObjectStore:
    """A server that runs, and how its clients find it.

    Attributes:
        url: Of its one bucket: `s3://bucket` or `gs://bucket`.
        endpoint: `http://127.0.0.1:port`.
    """

    url: str
    endpoint: str

    def environment(self, endpoint: str | None = None) -> dict[str, str]:
        """The variables by which clients reach it, at another endpoint if a proxy stands before."""
        endpoint = endpoint or self.endpoint
        if self.url.startswith("gs://"):
            return {
                "STORAGE_EMULATOR_HOST": endpoint,  # gcsfs, google-cloud-storage
                "TENSORSTORE_GCS_HTTP_URL": endpoint,
                "GOOGLE_AUTH_TOKEN_FOR_TESTING": "test",  # TensorStore
                "NO_GCE_CHECK": "true",  # no search for the account of a machine of Google's
                "FSSPEC_GCS_TOKEN": "anon",  # gcsfs would search, and log that it found nothing
                # Without a look at the kind of bucket, which asks Google itself.
                "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            }
        return {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def reach(self, monkeypatch: pytest.MonkeyPatch, endpoint: str | None = None) -> None:
        """Sets the variables for this process, and forgets clients that were made before."""
        import fsspec
        from etils.epath import backend

        for name in _FOREIGN:
            monkeypatch.delenv(name, raising=False)
        for name, value in self.environment(endpoint).items():
            monkeypatch.setenv(name, value)
        fsspec.get_filesystem_class(self.url.split(":")[0]).clear_instance_cache()
        backend._FileSystemSpecBackend._get_filesystem.cache_clear()
        if known := sys.modules.get("genlora_jax.training.checkpoint_storage"):
            known._s3_server.cache_clear()


@contextlib.contextmanager
def s3_server() -> Iterator[ObjectStore]:
    """moto's S3 server with a bucket; it keeps objects in memory and honours conditional writes."""
    port = _free_port()
    command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)]
    with _serving(command, port) as endpoint:
        request = urllib.request.Request(f"{endpoint}/{BUCKET}", method="PUT")
        urllib.request.urlopen(request).close()
        yield ObjectStore(f"s3://{BUCKET}", endpoint)


@contextlib.contextmanager
def gcs_server() -> Iterator[ObjectStore]:
    """An emulator of GCS with a bucket, in memory; it ignores preconditions on generations."""
    port = _free_port()
    command = [sys.executable, "-m", "gcp_storage_emulator", "start", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--in-memory", "--quiet", "--default-bucket", BUCKET]
    with _serving(command, port) as endpoint:
        yield ObjectStore(f"gs://{BUCKET}", endpoint)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@contextlib.contextmanager
def _serving(command: list[str], port: int) -> Iterator[str]:
    """Runs a server until the block ends; its endpoint."""
    quiet = subprocess.DEVNULL
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "STORAGE_"))}
    process = subprocess.Popen(command, stdout=quiet, stderr=quiet, env=environment)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            assert process.poll() is None, f"{' '.join(command)} ended with {process.returncode}"
            time.sleep(0.1)
        else:
            raise TimeoutError(" ".join(command))
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@dataclass
class Faults:
    """What goes wrong between a client and its server; it may be changed at any time.

    Attributes:
        slow: Share of requests that are answered `delay` seconds late.
        unavailable: Share answered 503, and not passed on.
        cut: Share whose connection ends halfway: half of them before the server hears of it, half
            after it did what was asked, amid its answer.
        refused: Methods that are answered 403, such as `{"PUT", "POST"}`.
        passed: After so many requests all others are refused, as if their sender were killed.
    """

    slow: float = 0.0
    unavailable: float = 0.0
    cut: float = 0.0
    delay: float = 0.3
    refused: set[str] = field(default_factory=set)
    passed: int | None = None


@dataclass
class Proxy:
    """A proxy that stands before a server.

    Attributes:
        endpoint: Where clients reach it.
        faults: What it does to requests from now on.
        requests: Method and target of each that it got.
        unheard: By upload session of GCS, the answer that was cut, for the next who asks: GCS knows
            what it has completed, the emulator forgets it.
        injected: How many faults of each kind it injected.
        transferred: Bytes of bodies that the server sent, which clients got whole or in part.
    """

    endpoint: str
    faults: Faults
    requests: list[str] = field(default_factory=list)
    unheard: dict[str, Any] = field(default_factory=dict)
    injected: dict[str, int] = field(default_factory=dict)
    transferred: int = 0


@contextlib.contextmanager
def faulty_proxy(
    store: ObjectStore, faults: Faults | None = None, seed: int = 0
) -> Iterator[Proxy]:
    """A proxy before a server, until the block ends; without faults it counts and passes on."""
    generator, lock = random.Random(seed), threading.Lock()
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    server.daemon_threads = True
    proxy = Proxy(f"http://127.0.0.1:{server.server_port}", faults or Faults())

    class Handler(_Forward):
        upstream = urlsplit(store.endpoint).netloc
        state = proxy

        def draw(self) -> float:
            with lock:
                return generator.random()

        def count(self, fault: str) -> None:
            with lock:
                proxy.injected[fault] = proxy.injected.get(fault, 0) + 1

    server.RequestHandlerClass = Handler
    # Clients hang up in the middle, also of their own accord: no reason to print a traceback.
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()


class _Forward(BaseHTTPRequestHandler):
    """Passes requests on to a server, or has them fail."""

    protocol_version = "HTTP/1.1"
    upstream: str
    state: Proxy

    def draw(self) -> float:
        raise NotImplementedError

    def count(self, fault: str) -> None:
        raise NotImplementedError

    def log_message(self, *_: object) -> None:
        pass

    def _forward(self) -> None:
        faults = self.state.faults
        body = self._body()
        self.state.requests.append(f"{self.command} {self.path}")
        if self.draw() < faults.slow:
            self.count("slow")
            time.sleep(faults.delay)
        if faults.passed is not None:
            faults.passed -= 1
        if self.command in faults.refused or (faults.passed or 0) < 0:
            self.count("refused")
            return self._answer(403, "Forbidden", {}, _error("AccessDenied", "Access Denied"))
        if self.draw() < faults.unavailable:
            self.count("unavailable")
            return self._answer(503, "Slow Down", {}, _error("SlowDown", "Reduce your rate."))
        cut = self.draw()
        if cut < faults.cut / 2:
            self.count("cut before")
            return self._hang_up()
        answer = self.state.unheard.pop(self.path, None) or self._upstream(body)
        content = answer[-1]
        self.state.transferred += len(content)
        if cut < faults.cut:
            self.count("cut after")
            if "upload_id=" in self.path:
                self.state.unheard[self.path] = answer
            self._answer(*answer, sent=len(content) // 2)
            return self._hang_up()
        self._answer(*answer)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = _forward

    def _upstream(self, body: bytes) -> tuple[int, str, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.upstream, timeout=60)
        try:
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        headers = {k: v for k, v in answer.getheaders() if k.lower() not in _HOP_BY_HOP}
        if self.command == "HEAD":
            headers["Content-Length"] = answer.getheader("Content-Length") or "0"
        return answer.status, answer.reason, headers, content

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        del self.headers["Transfer-Encoding"]
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        self.headers["Content-Length"] = str(len(body))
        return body

    def _answer(
        self,
        status: int,
        reason: str,
        headers: dict[str, str],
        content: bytes,
        sent: int | None = None,
    ) -> None:
        self.send_response_only(status, reason)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:sent])
        self.wfile.flush()

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


def _error(code: str, message: str) -> bytes:
    """An error as S3 writes it; clients of GCS go by the status."""
    return f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
