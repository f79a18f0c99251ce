"""The object store of a run: one SeaweedFS behind its own TLS, relays that add latency, and a small S3 client."""

import datetime
import hashlib
import hmac
import http.client
import json
import socket
import ssl
import subprocess
import sys
import time
import urllib.parse
import xml.etree.ElementTree
from dataclasses import dataclass
from pathlib import Path

import meter

ACCESS_KEY = "benchkey"
SECRET_KEY = "benchsecret"
REGION = "us-east-1"
BUCKET = "bench"
# SeaweedFS's gRPC ports lie this far above the ports they belong to.
GRPC_DISTANCE = 10000
START_SECONDS = 90


@dataclass(frozen=True)
class Endpoint:
    """Where tools find the store: directly, or through a relay that adds `latency` milliseconds."""

    port: int
    latency: int
    ca_file: Path

    @property
    def url(self) -> str:
        """The address as tools want it."""
        return f"https://localhost:{self.port}"


class Store:
    """SeaweedFS and relays in front of it."""

    def __init__(self, weed: Path, directory: Path) -> None:
        self.directory = directory
        self.ca_file = directory / "ca.pem"
        self._weed = weed
        self._processes: list[subprocess.Popen] = []
        self._log = directory / "store.log"
        self._port = 0

    def start(self) -> None:
        """Starts the server, makes the bucket, and waits until an object can be written."""
        self.directory.mkdir(mode=0o755)
        make_certificates(self.directory, self._log)
        ports = free_ports(4)
        self._port = ports[3]
        self._spawn(self._command(ports))
        client = Client(self.endpoint(0))
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                client.request("PUT", f"/{BUCKET}")
                client.request("PUT", f"/{BUCKET}/started", b"yes")
                return
            except (OSError, http.client.HTTPException) as error:
                if time.monotonic() > deadline:
                    raise meter.CommandFailed(f"SeaweedFS did not start: {error}; see {self._log}") from error
                time.sleep(0.5)

    def endpoint(self, latency: int) -> Endpoint:
        """A way to the store; every latency but 0 gets a relay of its own."""
        if not latency:
            return Endpoint(self._port, 0, self.ca_file)
        port = free_ports(1)[0]
        self._spawn([sys.executable, Path(__file__).with_name("delay.py"), port, self._port, latency])
        wait_for_listener(port)
        return Endpoint(port, latency, self.ca_file)

    def stop(self) -> None:
        """Ends every process of the store."""
        for process in reversed(self._processes):
            meter.stop(process)

    def _spawn(self, command: list) -> None:
        env = {"PATH": "/usr/bin:/bin", "HOME": str(self.directory)}
        self._processes.append(meter.spawn(command, log=self._log, env=env, cwd=self.directory, user="root"))

    def _command(self, ports: list[int]) -> list:
        data = self.directory / "data"
        data.mkdir()
        identity = {
            "name": "bench", "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        config = self.directory / "s3.json"
        config.write_text(json.dumps({"identities": [identity]}), encoding="ascii")
        master, volume, filer, s3 = ports
        return [
            self._weed, "server", f"-dir={data}", "-ip=127.0.0.1", "-master.telemetry=false",
            f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}",
            f"-filer.localSocket={self.directory}/filer.sock", "-volume.max=100", "-s3", f"-s3.port={s3}",
            f"-s3.localSocket={self.directory}/s3.sock", f"-s3.config={config}", "-s3.port.iceberg=0",
            "-s3.port.lance=0", f"-s3.cert.file={self.directory}/server.pem",
            f"-s3.key.file={self.directory}/server.key",
        ]


class Client:
    """The three S3 requests the harness needs, signed with AWS signature version 4."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._tls = ssl.create_default_context(cafile=str(endpoint.ca_file))

    def usage(self, prefix: str) -> tuple[int, int]:
        """Number and bytes of the objects under a prefix."""
        objects = size = 0
        token = None
        while True:
            query = {"list-type": "2", "prefix": f"{prefix}/"}
            if token:
                query["continuation-token"] = token
            answer = xml.etree.ElementTree.fromstring(self.request("GET", f"/{BUCKET}", query=query))
            sizes = [int(element.text or 0) for element in answer.findall("{*}Contents/{*}Size")]
            objects += len(sizes)
            size += sum(sizes)
            token = answer.findtext("{*}NextContinuationToken")
            if not token:
                return objects, size

    def request(self, method: str, path: str, body: bytes = b"", query: dict | None = None) -> bytes:
        """Sends one request and returns the body of its answer; any status but 200 is an error."""
        port = self._endpoint.port
        parts = sorted((query or {}).items())
        encoded = "&".join(f"{quote(name)}={quote(value)}" for name, value in parts)
        headers = signed(method, path, encoded, body, f"localhost:{port}")
        connection = http.client.HTTPSConnection("localhost", port, timeout=30, context=self._tls)
        try:
            connection.request(method, f"{path}?{encoded}" if encoded else path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        if answer.status != http.HTTPStatus.OK:
            raise http.client.HTTPException(f"{method} {path}: {answer.status} {content[:300]!r}")
        return content


def quote(text: str) -> str:
    """Percent-encodes as signatures want it."""
    return urllib.parse.quote(text, safe="-_.~")


def signed(method: str, path: str, query: str, body: bytes, host: str) -> dict[str, str]:
    """The headers of a signed request."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    scope = f"{now[:8]}/{REGION}/s3/aws4_request"
    digest = hashlib.sha256(body).hexdigest()
    headers = {"host": host, "x-amz-content-sha256": digest, "x-amz-date": now}
    names = ";".join(headers)
    lines = "".join(f"{name}:{value}\n" for name, value in headers.items())
    canonical = f"{method}\n{path}\n{query}\n{lines}\n{names}\n{digest}"
    to_sign = f"AWS4-HMAC-SHA256\n{now}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
    key = f"AWS4{SECRET_KEY}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, to_sign.encode(), "sha256").hex()
    credential = f"Credential={ACCESS_KEY}/{scope}, SignedHeaders={names}, Signature={signature}"
    return headers | {"authorization": f"AWS4-HMAC-SHA256 {credential}"}


def make_certificates(directory: Path, log: Path) -> None:
    """A certificate authority, and a certificate of it for this machine's loopback names."""
    extensions = directory / "extensions"
    extensions.write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\nextendedKeyUsage=serverAuth\n", encoding="ascii")
    authority = [
        "openssl", "req", "-x509", "-days", "7", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=bench authority",
        "-addext", "keyUsage=critical,keyCertSign", "-keyout", "ca.key", "-out", "ca.pem",
    ]
    request = [
        "openssl", "req", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-keyout", "server.key",
        "-out", "server.csr",
    ]
    certificate = [
        "openssl", "x509", "-req", "-days", "7", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key",
        "-CAcreateserial", "-extfile", extensions, "-out", "server.pem",
    ]
    for command in (authority, request, certificate):
        meter.call(command, log=log, env={"PATH": "/usr/bin:/bin"}, cwd=directory, user="root")


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, nor on their gRPC siblings."""
    found = []
    for port in range(21000, 30000):
        if is_free(port) and is_free(port + GRPC_DISTANCE):
            found.append(port)
        if len(found) == count:
            return found
    raise meter.CommandFailed("no free ports between 21000 and 30000")


def is_free(port: int) -> bool:
    """Whether a port of the loopback address can be listened on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def wait_for_listener(port: int) -> None:
    """Returns once somebody accepts connections on the port."""
    deadline = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
