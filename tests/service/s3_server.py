"""A real S3 server with an identity of its own, on ports and in a folder of its own; it can be killed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import s3fs

from service.processes import free_ports

ACCESS_KEY, SECRET_KEY, BUCKET = "clpefttest", "a-secret-of-the-tests", "clpeft"
START_TIMEOUT_S = 60.0


@dataclass
class S3Server:
    """One server; `start` after `kill` finds what was stored."""

    folder: Path
    ports: list[int] = field(default_factory=lambda: free_ports(8))
    process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """The address of the S3 API."""
        return f"http://127.0.0.1:{self.ports[0]}"

    def environment(self, *, secret: str = SECRET_KEY) -> dict[str, str]:
        """The standard variables that lead a client here."""
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self) -> s3fs.S3FileSystem:
        """A client of its own, without caches."""
        return s3fs.S3FileSystem(
            key=ACCESS_KEY,
            secret=SECRET_KEY,
            endpoint_url=self.endpoint,
            use_listings_cache=False,
            skip_instance_cache=True,
        )

    def start(self) -> None:
        """Start the server and return when it takes objects."""
        self.folder.mkdir(parents=True, exist_ok=True)
        config = self.folder / "identities.json"
        identity = {
            "name": "tests",
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        config.write_text(json.dumps({"identities": [identity]}))
        config.chmod(0o600)
        names = ("s3.port", "s3.port.grpc", "master.port", "master.port.grpc", "volume.port")
        names += ("volume.port.grpc", "filer.port", "filer.port.grpc")
        ports = [f"-{name}={port}" for name, port in zip(names, self.ports, strict=True)]
        command = [
            str(Path(sys.executable).parent / "weed"),
            "-logtostderr",  # its default are files in /tmp that stay
            "server",
            f"-dir={self.folder}",
            "-ip=127.0.0.1",
        ]
        command += ["-ip.bind=127.0.0.1", "-s3", f"-s3.config={config}", *ports, "-s3.autoCreateBucket=false"]
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
        command += ["-master.volumeSizeLimitMB=64", "-volume.max=40", "-master.electionTimeout=1s"]
        command += ["-master.heartbeatInterval=100ms"]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=self.folder, env={"HOME": str(self.folder)}
            )
        self._wait()

    def kill(self) -> None:
        """End the server as a power cut would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
        for port in self.ports:  # sockets that it leaves wherever it may
            for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                path.unlink()

    def _wait(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        assert self.process is not None
        while True:
            try:
                client = self.client()
                if not client.exists(BUCKET):
                    client.mkdir(BUCKET)
                client.pipe_file(f"{BUCKET}/.ready", b"1")
                return
            except Exception as error:
                log = (self.folder / "server.log").read_text(errors="replace")[-2000:]
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the S3 server did not start: {error}\n{log}") from error
                time.sleep(0.1)


@contextmanager
def running_s3(folder: Path) -> Iterator[S3Server]:
    """Run a server with an empty bucket."""
    server = S3Server(folder)
    try:
        server.start()
        yield server
    finally:
        server.kill()
