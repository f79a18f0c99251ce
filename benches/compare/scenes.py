"""What is measured. Each scene yields one record for each tool, latency and round, tools taking turns.

A record is a dictionary: scene, tool, round, latency, load, and either what the meter and the bucket say, or an error.
"""

import contextlib
import os
import random
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import meter
import store
from cluster import Server, make_directory, warm
from meter import CommandFailed, Meter
from tools import Perennial, Repository, Tool

WAIT_SECONDS = 600
SEGMENT_NAME = 24

# What Perennial keeps beside the data for its next backup.
PIECE_SUMS = "pgsql_tmp_perennial/piece-sums"


@contextlib.contextmanager
def out_of_sight(path: Path, tool: Tool) -> Iterator[None]:
    """While another tool than Perennial copies the directory, what is there for Perennial alone is not in it."""
    aside = path.parent.parent.with_name(f"{path.name}-aside")
    hidden = path.exists() and not isinstance(tool, Perennial)
    if hidden:
        path.rename(aside)
    try:
        yield
    finally:
        if hidden:
            aside.rename(path)


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    scale: int
    rounds: int
    latencies: list[int]
    segments: int
    wal_megabytes: int
    idle_wait: int


class Bench:
    """One run: a cluster, a store, the tools, and a directory for everything."""

    # How `pgbench -i` fills the cluster, beside the scale.
    filling: tuple[str, ...] = ()

    def __init__(self, directory: Path, plan: Plan, tools: list[Tool], objects: store.Store) -> None:
        self.directory = directory
        self.plan = plan
        self.tools = tools
        self.programs = tools[0].program.parent
        self.log = directory / "tools.log"
        self.segments_dir = make_directory(directory / "segments")
        self.cluster = Server(make_directory(directory / "cluster"), port=5432)
        self.recovering: Server | None = None
        self._endpoints = {latency: objects.endpoint(latency) for latency in {0, *plan.latencies}}
        self._client = store.Client(self._endpoints[0])
        self._history = ""
        self._stamp = self._program_stamp()
        self._kept: dict[str, Repository] = {}

    def prepare(self) -> None:
        """Makes the cluster and fills it."""
        self.cluster.init()
        self.cluster.start()
        self.cluster.pgbench("-i", "-q", "-s", str(self.plan.scale), *self.filling)
        self.cluster.sql("VACUUM (FREEZE, ANALYZE)")

    def stop(self) -> None:
        """Ends the servers, whatever state they are in."""
        for server in filter(None, (self.recovering, self.cluster)):
            server.stop(signal.SIGQUIT)
        for orphan in meter.orphans():
            meter.reap(orphan, patience=1)

    def backups_and_restores(self) -> Iterator[dict]:
        """Full backups, each into a fresh repository and each restored at once."""
        for number, latency, tool in self._turns(self.tools):
            turn = {"tool": tool.name, "round": number, "latency": latency}
            repository = self._repository(tool, latency, f"backup-{number}-{latency}")
            record = self._attempt({"scene": "backup", **turn}, self._backup, tool, repository)
            yield record
            if "error" not in record:
                yield self._attempt({"scene": "restore", **turn}, self._restore_once, tool, repository)

    def pushes(self) -> Iterator[dict]:
        """WAL segments one by one into a fresh repository, as the archiver would."""
        self._make_wal()
        for number, latency, tool in self._turns(self._archivers()):
            for ready in (False, True) if isinstance(tool, Perennial) else (False,):
                name = f"{tool.family}, .ready" if ready else tool.family
                turn = {"scene": "push", "tool": name, "round": number, "latency": latency}
                repository = self._repository(tool, latency, f"{'ready' if ready else 'push'}-{number}-{latency}")
                yield self._attempt(turn, self._push_all, tool, repository, ready)

    def recoveries(self) -> Iterator[dict]:
        """Replay of the WAL after a restore, then single fetches on the server that came of it."""
        self._make_wal()
        for number, latency, tool in self._turns(self._archivers()):
            if tool.name not in self._kept:
                continue
            repository = Repository(self._kept[tool.name].prefix, self._endpoints[latency])
            turn = {"tool": tool.family, "round": number, "latency": latency}
            record = self._attempt({"scene": "replay", **turn}, self._replay, tool, repository)
            yield record
            if "error" in record:
                continue
            yield self._attempt({"scene": "fetch", **turn}, self._fetch_all, tool, repository)
            if isinstance(tool, Perennial):
                turn["tool"] += ", --no-prefetch"
                yield self._attempt({"scene": "fetch", **turn}, self._fetch_all, tool, repository, "--no-prefetch")

    def floor(self) -> float:
        """Median seconds of starting and ending a program that does nothing: part of every call's wall time."""
        with Meter(self.programs) as measured:
            for _ in range(50):
                measured.run(["/bin/true"], log=self.log, env={}, cwd=self.directory)
        return sorted(measured.walls)[25]

    def _make_wal(self) -> None:
        """Once, keeps one backup of each tool and has the same WAL archived after it by all of them."""
        if self._history:
            return
        commands = [f"cp %p {self.segments_dir}/%f"]
        for tool in self._archivers():
            repository = self._repository(tool, 0, "kept")
            try:
                self._backup(tool, repository, commands)
            except CommandFailed as error:
                print(f"{tool.family} takes no part in the replay: {error}", flush=True)
                continue
            self._kept[tool.name] = repository
            commands.append(self._archive_command(tool, repository))
        self.cluster.archive_with(" && ".join(commands))
        begin = self.cluster.sql("SELECT pg_current_wal_lsn()")
        written = f"SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '{begin}')"
        while float(self.cluster.sql(written)) < self.plan.wal_megabytes << 20:
            self.cluster.pgbench("-n", "-c", "4", "-j", "2", "-T", "2")
        self._history = history_of(self.cluster)
        last = self.cluster.sql("SELECT pg_walfile_name(pg_switch_wal())")
        self._wait_until_archived(last)
        self.cluster.archive_with("/bin/true")
        self.cluster.stop()

    def _attempt(self, turn: dict, measure: Callable[..., dict], *arguments) -> dict:
        """The record of one measurement, which may fail without ending the run."""
        meter.wait_until_idle(self.plan.idle_wait)
        if self._program_stamp() != self._stamp:
            sys.exit(f"a program in {self.programs} was replaced during the run: its figures would be of two builds")
        record = turn | {"load": os.getloadavg()[0]}
        try:
            return record | measure(*arguments)
        except CommandFailed as error:
            return record | {"error": str(error)}

    def _program_stamp(self) -> list:
        stats = [path.stat() for path in sorted(self.programs.iterdir())]
        return [(stat.st_size, stat.st_mtime_ns) for stat in stats]

    def _turns(self, tools: list[Tool]) -> Iterator[tuple[int, int, Tool]]:
        """Every round, latency and tool; who begins changes by chance, the same in every run."""
        chance = random.Random(1)
        for number in range(1, self.plan.rounds + 1):
            for latency in self.plan.latencies:
                for tool in chance.sample(tools, len(tools)):
                    yield number, latency, tool

    def _archivers(self) -> list[Tool]:
        return [tool for tool in self.tools if tool.archives]

    def _repository(self, tool: Tool, latency: int, purpose: str) -> Repository:
        slug = "".join(letter if letter.isalnum() else "-" for letter in tool.name)
        return Repository(f"{slug}/{purpose}", self._endpoints[latency])

    def _environment(self, tool: Tool, repository: Repository) -> dict[str, str]:
        here = {"PATH": "/usr/bin:/bin", "HOME": str(self.directory), "USER": "postgres"}
        return here | tool.environment(repository) | tool.connection(self.cluster)

    def _call(self, tool: Tool, repository: Repository, command: list, cwd: Path) -> None:
        meter.call(command, log=self.log, env=self._environment(tool, repository), cwd=cwd)

    def _stored(self, repository: Repository) -> dict:
        objects, size = self._client.usage(repository.prefix)
        return {"objects": objects, "bytes": size}

    def _archive_command(self, tool: Tool, repository: Repository) -> str:
        script = self.directory / f"{repository.prefix.replace('/', '-')}.sh"
        return tool.archive_command(repository, self.cluster.data_dir, script)

    def _create(self, tool: Tool, repository: Repository, data_dir: Path) -> None:
        command = tool.create(repository, data_dir)
        if command:
            self._call(tool, repository, command, data_dir)

    def _backup(self, tool: Tool, repository: Repository, also_archive: list[str] | None = None) -> dict:
        """A full backup into a fresh repository."""
        self._create(tool, repository, self.cluster.data_dir)
        taken = self._take(tool, repository, tool.backup(self.cluster.data_dir), also_archive)
        return taken | self._stored(repository)

    def _take(self, tool: Tool, repository: Repository, command: list, also_archive: list[str] | None = None) -> dict:
        """An online backup by this command, with the tool's archive_command for as long as it takes."""
        data_dir = self.cluster.data_dir
        self.cluster.archive_with(" && ".join([*(also_archive or []), self._archive_command(tool, repository)]))
        self.cluster.sql("CHECKPOINT")
        warm(data_dir)
        archived = self.cluster.archiving_cpu()
        with out_of_sight(data_dir / PIECE_SUMS, tool), Meter(self.programs) as measured:
            env = self._environment(tool, repository)
            measured.run(command, log=self.log, env=env, cwd=data_dir)
        self.cluster.archive_with("/bin/true")
        archiving = self.cluster.archiving_cpu() - archived
        return measured.results() | {"archiving_cpu": archiving}

    def _restore(self, tool: Tool, repository: Repository, backup: str | None = None) -> tuple[Path, Meter]:
        data_dir = make_directory(self.directory / "restored")
        with Meter(self.programs) as measured:
            env = self._environment(tool, repository)
            measured.run(tool.restore(data_dir, backup), log=self.log, env=env, cwd=self.directory)
        return data_dir, measured

    def _restore_once(self, tool: Tool, repository: Repository) -> dict:
        data_dir, measured = self._restore(tool, repository)
        shutil.rmtree(data_dir)
        return measured.results()

    def _wait_until_archived(self, segment: str) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while self.cluster.sql("SELECT last_archived_wal FROM pg_stat_archiver") < segment:
            if time.monotonic() > deadline:
                raise CommandFailed(f"{segment} was not archived; see {self.cluster.log}")
            time.sleep(0.2)

    def _segments(self) -> list[Path]:
        """The segments that are measured: the newest but the last, which was switched from before it was full."""
        segments = [path for path in sorted(self.segments_dir.iterdir()) if len(path.name) == SEGMENT_NAME]
        return segments[-1 - self.plan.segments : -1]

    def _archive_directory(self, ready: bool) -> Path:
        """As much of a data directory as archiving needs, with the segments in pg_wal."""
        data_dir = make_directory(self.directory / "archiving")
        (data_dir / "global").mkdir()
        for name in ("PG_VERSION", "global/pg_control"):
            shutil.copy(self.cluster.data_dir / name, data_dir / name)
        status = data_dir / "pg_wal" / "archive_status"
        status.mkdir(parents=True)
        for segment in self._segments():
            shutil.copy(segment, status.parent)
            if ready:
                (status / f"{segment.name}.ready").touch()
        for path in data_dir.rglob("*"):
            shutil.chown(path, "postgres", "postgres")
        return data_dir

    def _push_all(self, tool: Tool, repository: Repository, ready: bool) -> dict:
        data_dir = self._archive_directory(ready)
        status = data_dir / "pg_wal" / "archive_status"
        self._create(tool, repository, data_dir)
        before = self._stored(repository)
        env = self._environment(tool, repository)
        with Meter(self.programs) as measured:
            for segment in self._segments():
                command = tool.push(data_dir, f"pg_wal/{segment.name}")
                measured.run(command, log=self.log, env=env, cwd=data_dir)
                if ready:
                    (status / f"{segment.name}.ready").rename(status / f"{segment.name}.done")
        shutil.rmtree(data_dir)
        after = self._stored(repository)
        return measured.results() | {name: after[name] - before[name] for name in after}

    def _replay(self, tool: Tool, repository: Repository) -> dict:
        data_dir, restored = self._restore(tool, repository)
        tool.prepare_recovery(data_dir)
        for path in data_dir.glob("*"):
            shutil.chown(path, "postgres", "postgres")
        server = Server(data_dir, port=5433, env=self._environment(tool, repository))
        self.recovering = server
        try:
            with Meter(self.programs) as measured:
                measured.walls.append(server.start(archive_mode="off"))
                measured.cpu += server.fetching_cpu
                found = history_of(server)
                server.stop()
        finally:
            server.stop(signal.SIGQUIT)
        if found != self._history:
            raise CommandFailed(f"{tool.name} recovered history '{found}' instead of '{self._history}'")
        return measured.results() | {"with_restore": restored.walls[0] + measured.walls[0]}

    def _fetch_all(self, tool: Tool, repository: Repository, *options: str) -> dict:
        server = self.recovering
        server.start(archive_mode="off")
        try:
            return self._fetch_from(server, self._environment(tool, repository), options)
        finally:
            server.stop()

    def _fetch_from(self, server: Server, env: dict[str, str], options: tuple[str, ...]) -> dict:
        """Calls what restore_command says, into a directory in which tools that look for neighbours find none."""
        template = server.sql("SHOW restore_command")
        make_directory(server.data_dir / "fetched")
        target = Path("fetched/RECOVERYXLOG")
        with Meter(self.programs) as measured:
            for segment in self._segments():
                words = template.replace("%f", segment.name).replace("%p", str(target))
                measured.run([*shlex.split(words), *options], log=self.log, env=env, cwd=server.data_dir)
                fetched = server.data_dir / target
                if fetched.read_bytes() != segment.read_bytes():
                    raise CommandFailed(f"{segment.name} came back with other content")
                fetched.unlink()
            server.stop()
        shutil.rmtree(server.data_dir / "fetched")
        return measured.results()


def history_of(server: Server) -> str:
    """What the load has left behind, to tell whether a recovered server has all of it."""
    return server.sql("SELECT count(*) || ' ' || sum(delta) FROM pgbench_history")
