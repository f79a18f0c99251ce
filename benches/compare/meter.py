"""Runs commands as user postgres and measures them: wall time, CPU time of every descendant, and memory.

The process that imports this becomes the reaper of its orphans, so that helpers which a tool leaves behind end up here
with their CPU time. Memory is sampled: every process whose program lies in the directory of the measured programs.
"""

import ctypes
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

SAMPLE_SECONDS = 0.05
# Looks at a new process before it is taken for one that never becomes a tool's.
LOOKS = 4
COMMAND_LIMIT_SECONDS = 900
HELPER_PATIENCE_SECONDS = 20
PR_SET_CHILD_SUBREAPER = 36
LOG_TAIL = 3000
# Other work on the machine is waited for before a measurement, up to a limit.
IDLE_SHARE = 0.85
IDLE_LOOK_SECONDS = 0.5

# Processes that were spawned and not yet waited for; every other child of ours is an orphan that came to us.
_awaited: set[int] = set()


class CommandFailed(Exception):
    """A command that did not exit with 0; says what it printed."""


def adopt_orphans() -> None:
    """Makes this process the parent of every descendant whose own parent ends."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def spawn(command: list, *, log: Path, env: dict, cwd: Path, user: str = "postgres") -> subprocess.Popen:
    """Starts a command in a session of its own, its output appended to `log`."""
    identity = {} if user == "root" else {"user": user, "group": user, "extra_groups": []}
    with log.open("ab") as output:
        process = subprocess.Popen(
            [str(word) for word in command], env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True, **identity,
        )
    _awaited.add(process.pid)
    return process


def wait(process: subprocess.Popen, command: list, log: Path, limit: float = COMMAND_LIMIT_SECONDS):
    """Waits for a spawned command; returns its resource usage, that of the children it waited for included."""
    timer = threading.Timer(limit, process.kill)
    timer.daemon = True
    timer.start()
    try:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    finally:
        timer.cancel()
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
        _awaited.discard(process.pid)
    if process.returncode:
        tail = log.read_bytes()[-LOG_TAIL:].decode(errors="replace")
        words = " ".join(str(word) for word in command)
        raise CommandFailed(f"exit {process.returncode}: {words}\n{tail}")
    return usage


def call(command: list, *, log: Path, env: dict, cwd: Path, user: str = "postgres") -> None:
    """Runs a command that is not measured."""
    wait(spawn(command, log=log, env=env, cwd=cwd, user=user), command, log)


def stop(process: subprocess.Popen, with_signal: int = signal.SIGTERM, patience: float = 30) -> None:
    """Ends a process that was spawned, with SIGKILL for its whole session if it does not listen."""
    if process.poll() is None:
        process.send_signal(with_signal)
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    _awaited.discard(process.pid)


def orphans() -> list[int]:
    """Processes that came to us because whoever started them has ended."""
    return [pid for pid in numbers_in_proc() if pid not in _awaited and parent_of(pid) == os.getpid()]


def reap(orphan: int, patience: float):
    """Waits for an orphan, kills it when that takes too long, and returns its resource usage."""
    deadline = time.monotonic() + patience
    while True:
        ended, _, usage = os.wait4(orphan, os.WNOHANG)
        if ended:
            return usage
        if time.monotonic() > deadline:
            os.kill(orphan, signal.SIGKILL)
        time.sleep(0.005)


def wait_until_idle(limit: float) -> None:
    """Waits until the machine has little else to do, but no longer than the limit."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        idle = idle_seconds()
        time.sleep(IDLE_LOOK_SECONDS)
        if idle_seconds() - idle >= IDLE_SHARE * IDLE_LOOK_SECONDS * os.cpu_count():
            return


def idle_seconds() -> float:
    """Seconds that all processors together have been idle."""
    fields = Path("/proc/stat").read_text(encoding="ascii").split(maxsplit=6)
    return (int(fields[4]) + int(fields[5])) / os.sysconf("SC_CLK_TCK")


def children_cpu(pid: int) -> float:
    """CPU seconds of those children of a live process that have ended."""
    fields = stat_of(pid)
    return (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")


def parent_of(pid: int) -> int | None:
    """The parent of a process, if it is there."""
    try:
        return int(stat_of(pid)[1])
    except OSError:
        return None


def stat_of(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()


def numbers_in_proc() -> list[int]:
    """Every process there is."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def runs_from(pid: int, programs: Path) -> bool:
    """Whether a process's program lies in the directory."""
    try:
        return os.readlink(f"/proc/{pid}/exe").startswith(f"{programs}/")
    except OSError:
        return False


def memory_of(pid: int) -> tuple[int, int]:
    """Proportional set size and highest resident set size of a process, in bytes."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0, 0
    return kilobytes(rollup, "Pss:") * 1024, kilobytes(status, "VmHWM:") * 1024


def kilobytes(text: str, name: str) -> int:
    """The value of a line like `Pss:  123 kB`; 0 when there is none, as in a process that is ending."""
    _, found, rest = text.partition(f"\n{name}")
    return int(rest.split(maxsplit=1)[0]) if found else 0


class Sampler(threading.Thread):
    """Looks at the memory of the measured programs' processes until it is told to stop."""

    def __init__(self, programs: Path) -> None:
        super().__init__(daemon=True)
        self.peak_pss = 0
        self.peak_rss = 0
        self._programs = programs
        self._looks: dict[int, int] = dict.fromkeys(numbers_in_proc(), LOOKS)
        self._tools: set[int] = set()
        self._end = threading.Event()

    def run(self) -> None:
        """The thread."""
        while not self._end.wait(SAMPLE_SECONDS):
            self._sample()

    def finish(self) -> None:
        """Ends the thread."""
        self._end.set()
        self.join()

    def _sample(self) -> None:
        alive = set(numbers_in_proc())
        self._tools &= alive
        for pid in alive - self._tools:
            looks = self._looks.get(pid, 0)
            if looks < LOOKS:
                self._looks[pid] = looks + 1
                if runs_from(pid, self._programs):
                    self._tools.add(pid)
        sizes = [memory_of(pid) for pid in self._tools]
        self.peak_pss = max(self.peak_pss, sum(pss for pss, _ in sizes))
        self.peak_rss = max(self.peak_rss, max((rss for _, rss in sizes), default=0))


class Meter:
    """Measures what runs between entering and leaving it, helpers that end soon after included."""

    def __init__(self, programs: Path) -> None:
        self.walls: list[float] = []
        self.cpu = 0.0
        self._programs = programs
        self._sampler = Sampler(programs)

    def __enter__(self) -> "Meter":
        os.sync()
        self._sampler.start()
        return self

    def __exit__(self, *_) -> None:
        try:
            self._reap_helpers()
        finally:
            self._sampler.finish()

    def run(self, command: list, *, log: Path, env: dict, cwd: Path) -> None:
        """Runs one command and adds it to what was measured."""
        begin = time.perf_counter()
        usage = wait(spawn(command, log=log, env=env, cwd=cwd), command, log)
        self.walls.append(time.perf_counter() - begin)
        self.add_usage(usage)

    def add_usage(self, usage) -> None:
        """Adds the CPU time of a process that was waited for."""
        self.cpu += usage.ru_utime + usage.ru_stime

    def results(self) -> dict:
        """What was measured: seconds and bytes."""
        return {
            "wall": sum(self.walls), "walls": self.walls, "cpu": self.cpu,
            "peak_pss": self._sampler.peak_pss, "peak_rss": self._sampler.peak_rss,
        }

    def _reap_helpers(self) -> None:
        """Adds what helpers have used that a tool left behind and that end by themselves."""
        while left := orphans():
            for orphan in left:
                self.add_usage(reap(orphan, HELPER_PATIENCE_SECONDS))
