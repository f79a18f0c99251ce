"""A PostgreSQL server of the run: made, started, asked and stopped, always as user postgres."""

import shutil
import signal
import subprocess
import time
from pathlib import Path

import meter

BINARIES = Path("/usr/lib/postgresql/15/bin")
READY = "database system is ready to accept connections"
START_SECONDS = 600
SETTINGS = {
    "archive_mode": "on", "archive_command": "/bin/true", "shared_buffers": "256MB", "max_wal_size": "4GB",
    "checkpoint_timeout": "1h", "autovacuum": "off", "synchronous_commit": "off", "listen_addresses": "",
}


class Server:
    """One data directory and, while it runs, its postmaster."""

    def __init__(self, data_dir: Path, port: int, env: dict[str, str] | None = None) -> None:
        self.data_dir = data_dir
        self.port = port
        self.socket_dir = data_dir.parent
        self.log = data_dir.parent / f"{data_dir.name}.log"
        self._env = {"PATH": f"{BINARIES}:/usr/bin:/bin", "LC_ALL": "C.UTF-8"} | (env or {})
        self._process: subprocess.Popen | None = None
        self._fetching_cpu = 0.0

    def init(self) -> None:
        """Makes the cluster."""
        options = ["--data-checksums", "-A", "trust", "-U", "postgres", "-D", self.data_dir]
        self._call(["initdb", *options], self.socket_dir)
        lines = [f"{name} = '{value}'\n" for name, value in SETTINGS.items()]
        with (self.data_dir / "postgresql.conf").open("a", encoding="ascii") as config:
            config.writelines(lines)

    def start(self, **settings: str) -> float:
        """Starts the server, waits until it takes writes, and returns how long that took."""
        settings = {"port": str(self.port), "unix_socket_directories": str(self.socket_dir), **settings}
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        told_before = self.log.stat().st_size if self.log.exists() else 0
        begin = time.perf_counter()
        command = [BINARIES / "postgres", "-D", self.data_dir, *options]
        self._process = meter.spawn(command, log=self.log, env=self._env, cwd=self.data_dir)
        self._fetching_cpu = 0.0
        startup = None
        with self.log.open(encoding="utf-8", errors="replace") as log:
            log.seek(told_before)
            told = ""
            while READY not in told:
                startup = startup or self.child("startup")
                self._note_fetching(startup)
                if self._process.poll() is not None or time.perf_counter() - begin > START_SECONDS:
                    raise meter.CommandFailed(f"the server in {self.data_dir} did not start:\n{told[-3000:]}")
                time.sleep(0.01)
                told += log.read()
        return time.perf_counter() - begin

    def stop(self, how: int = signal.SIGINT) -> None:
        """Stops the server, fast unless told otherwise."""
        if self._process:
            meter.stop(self._process, how, patience=120)
            self._process = None

    @property
    def fetching_cpu(self) -> float:
        """CPU seconds of the restore_command calls of the last start."""
        return self._fetching_cpu

    def archiving_cpu(self) -> float:
        """CPU seconds of the archive_command calls so far."""
        archiver = self.child("archiver")
        return meter.children_cpu(archiver) if archiver else 0.0

    def archive_with(self, command: str) -> None:
        """Sets archive_command, from the next segment on."""
        quoted = command.replace("'", "''")
        self.sql(f"ALTER SYSTEM SET archive_command = '{quoted}'")
        self.sql("SELECT pg_reload_conf()")
        while self.sql("SHOW archive_command") != command:
            time.sleep(0.02)
        # The archiver has its own copy of the settings and reads it on its next round.
        time.sleep(0.3)

    def sql(self, query: str) -> str:
        """One query's answer."""
        command = [BINARIES / "psql", "-XAtq", *self._connection(), "-c", query]
        answer = subprocess.run(command, env=self._env, check=False, capture_output=True, text=True)
        if answer.returncode:
            raise meter.CommandFailed(f"{query}: {answer.stderr}")
        return answer.stdout.strip()

    def pgbench(self, *options: str) -> None:
        """Runs pgbench."""
        self._call(["pgbench", *self._connection(), *options, "postgres"], self.data_dir)

    def child(self, title: str) -> int | None:
        """The server's child process with this title."""
        if not self._process:
            return None
        for pid in meter.numbers_in_proc():
            if meter.parent_of(pid) == self._process.pid and title_of(pid).startswith(f"postgres: {title}"):
                return pid
        return None

    def _connection(self) -> list:
        return ["-h", self.socket_dir, "-p", str(self.port), "-U", "postgres"]

    def _note_fetching(self, startup: int | None) -> None:
        try:
            self._fetching_cpu = meter.children_cpu(startup) if startup else 0.0
        except OSError:
            pass  # Recovery is over; the last look counts.

    def _call(self, command: list, cwd: Path) -> None:
        program, *arguments = command
        meter.call([BINARIES / program, *arguments], log=self.log, env=self._env, cwd=cwd)


def title_of(pid: int) -> str:
    """The command line of a process, or what it has put there."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def warm(directory: Path) -> None:
    """Reads every file, so that no tool finds a colder page cache than another."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(1 << 20):
                    pass


def make_directory(path: Path) -> Path:
    """A directory of user postgres, with nothing in it."""
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(mode=0o700)
    shutil.chown(path, "postgres", "postgres")
    return path
