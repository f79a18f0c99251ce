"""Incremental backups: what one costs after a part of the pages has changed, and what restoring it costs.

Each tool has one repository and gets all WAL. Before every increment some pages of the cluster are changed, then all
tools back up the same state, by turns. One increment goes over the first latency, the next over the second, and so on.
In the end Perennial goes on alone.
"""

import random
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import counted
import pages
from meter import CommandFailed
from scenes import SEGMENT_NAME, Bench
from tools import Perennial, Repository, Tool

TABLE = "pgbench_accounts"
# Every page gets room for new versions of its rows: an update then changes no other page and no index.
FILL_FACTOR = 90
# At this fill factor a page has 54 rows. Each increment updates another one of them, which is where it was made.
ROWS_OF_A_PAGE = 50
# WAL stays in pg_wal until every tool has got it by hand. There wal-rus looks for changed pages first, too.
WAL_KEPT_MEGABYTES = 1024
MEGABYTES_OF_A_SCALE = 16
# So much more than the share that was asked for may have changed: the pages of catalogs, of full pages' successors.
TOUCHED_TOO_MUCH = 1.1

TOUCH = f"""
SELECT setseed({{seed}});
WITH chosen AS (
    SELECT format('(%s,{{row}})', block)::tid AS place
    FROM generate_series(0, (pg_relation_size('{TABLE}') / {pages.PAGE})::int - 2) AS block WHERE random() < {{share}}
), touched AS (
    UPDATE {TABLE} SET abalance = abalance + (random() * 10000 - 5000)::int
    WHERE ctid = ANY (ARRAY(SELECT place FROM chosen)) RETURNING 1
)
SELECT count(*) FROM touched
"""


@dataclass(frozen=True)
class IncrementPlan:
    """How much is measured."""

    scale: int
    rounds: int
    latencies: list[int]
    share: float
    chain: int
    restores: int
    rival_restores: int
    idle_wait: int

    @property
    def common(self) -> int:
        """Increments that every tool takes."""
        return self.rounds * len(self.latencies)

    @property
    def marks(self) -> set[int]:
        """After how many increments backups are restored."""
        return {1, self.common, self.chain}


class IncrementBench(Bench):
    """One run."""

    filling = ("-F", str(FILL_FACTOR))
    plan: IncrementPlan

    def __init__(self, directory: Path, plan: IncrementPlan, tools: list[Tool], objects: counted.CountedStore) -> None:
        super().__init__(directory, plan, tools, objects)
        self._objects = objects
        self._chance = random.Random(1)
        self._relation = ""
        # The last segment that each tool has got.
        self._through: dict[str, str] = {}
        self._names: dict[tuple[str, int], str] = {}
        self._checksums: dict[int, int] = {}

    def prepare(self) -> None:
        """Makes the cluster and fills it, and has it keep the WAL between two increments."""
        super().prepare()
        kept = WAL_KEPT_MEGABYTES + int(2 * MEGABYTES_OF_A_SCALE * self.plan.scale * self.plan.share)
        self.cluster.sql(f"ALTER SYSTEM SET wal_keep_size = '{kept}MB'")
        self.cluster.sql("SELECT pg_reload_conf()")
        self._archive_all()
        self._relation = self.cluster.sql(f"SELECT pg_relation_filepath('{TABLE}')")

    def full_backups(self) -> Iterator[dict]:
        """What the increments are based on."""
        latency = self.plan.latencies[0]
        for tool in self._mixed(self.tools):
            turn = {"scene": "full", "tool": tool.name, "round": 1, "latency": latency}
            yield self._attempt(turn, self._full, tool, self._home(tool, latency))

    def increments(self) -> Iterator[dict]:
        """Every tool's increments, all of the same states."""
        for number, latency in enumerate(self.plan.latencies * self.plan.rounds, start=1):
            touched = self._touch(number)
            for tool in self._mixed(self.tools):
                turn = {"scene": "increment", "tool": tool.name, "round": number, "latency": latency} | touched
                yield self._attempt(turn, self._increment, tool, self._home(tool, latency), number)

    def chain(self) -> Iterator[dict]:
        """More increments, by Perennial alone."""
        latency = self.plan.latencies[0]
        for tool in self.tools:
            for number in range(self.plan.common + 1, self.plan.chain + 1) if isinstance(tool, Perennial) else ():
                touched = self._touch(number)
                turn = {"scene": "chain", "tool": tool.name, "round": number, "latency": latency} | touched
                yield self._attempt(turn, self._increment, tool, self._home(tool, latency), number)

    def restores(self) -> Iterator[dict]:
        """Restores of a tool's first increment and of later ones, by turns; the first of each is compared."""
        choices = [(tool, after) for tool in self.tools for after in self._restored_after(tool)]
        for number in range(1, self.plan.restores + 1):
            for latency in self.plan.latencies:
                for tool, after in self._mixed(choices):
                    if number > self.plan.rival_restores and not isinstance(tool, Perennial):
                        continue
                    turn = {"scene": f"restore after {after}", "tool": tool.name, "round": number, "latency": latency}
                    turn["after"] = after
                    yield self._attempt(turn, self._restore_after, tool, latency, after, number == 1)

    def _restored_after(self, tool: Tool) -> list[int]:
        """After how many increments a tool's backups are restored: those it has taken without an error."""
        return [after for after in sorted(self.plan.marks) if (tool.name, after) in self._names]

    def _mixed(self, choices: list) -> list:
        """Everything once; who begins changes by chance, the same in every run."""
        return self._chance.sample(choices, len(choices))

    def _home(self, tool: Tool, latency: int) -> Repository:
        return self._repository(tool, latency, "increments")

    def _touch(self, number: int) -> dict[str, int]:
        """Changes one row in each of many pages, chosen by chance, and writes them out; how many there are."""
        before = self.cluster.sql("SELECT pg_current_wal_insert_lsn()")
        touch = TOUCH.format(seed=number / 1000, row=number, share=self.plan.share)
        rows = int(self.cluster.sql(touch))
        self._archive_all()
        touched, total = pages.changed(self.cluster.data_dir, before)
        if not 0 < rows <= touched <= max(TOUCHED_TOO_MUCH * rows, rows + 100):
            raise CommandFailed(f"{rows} rows were updated, and {touched} pages changed")
        if number in self.plan.marks:
            self._checksums[number] = pages.checksum(self.cluster.data_dir, self._relation)
        return {"touched": touched, "pages": total}

    def _archive_all(self) -> str:
        """Writes everything out and leaves the archiver nothing to do; the last segment it has had."""
        self.cluster.sql("CHECKPOINT")
        last = self.cluster.sql("SELECT pg_walfile_name(pg_switch_wal())")
        self._wait_until_archived(last)
        return last

    def _catch_up(self, tool: Tool) -> None:
        """Gives a tool the WAL that was written while other tools had their turns, as archive_command would have."""
        data_dir, home = self.cluster.data_dir, self._home(tool, 0)
        through = self._archive_all()
        for segment in sorted(path.name for path in (data_dir / "pg_wal").iterdir()):
            if len(segment) == SEGMENT_NAME and self._through[tool.name] < segment <= through:
                self._call(tool, home, tool.push(data_dir, f"pg_wal/{segment}"), data_dir)
        self._through[tool.name] = through

    def _full(self, tool: Tool, repository: Repository) -> dict:
        self._through[tool.name] = self._archive_all()
        self._create(tool, repository, self.cluster.data_dir)
        return self._taken(tool, repository, tool.backup(self.cluster.data_dir))

    def _taken(self, tool: Tool, repository: Repository, command: list) -> dict:
        """A backup by this command, with what it has added to the repository and asked of the store."""
        stored, asked = self._stored(repository), self._objects.counters()
        record = self._take(tool, repository, command)
        record |= difference(asked, self._objects.counters())
        return record | difference(stored, self._stored(repository))

    def _increment(self, tool: Tool, repository: Repository, number: int) -> dict:
        self._catch_up(tool)
        record = self._taken(tool, repository, tool.increment(self.cluster.data_dir))
        name, based = tool.newest(self._listed(tool, repository))
        if not based:
            raise CommandFailed(f"{name} of {tool.name} is a full backup, not an increment")
        self._names[tool.name, number] = name
        return record | {"backup": name}

    def _restore_after(self, tool: Tool, latency: int, after: int, compared: bool) -> dict:
        asked = self._objects.counters()
        data_dir, measured = self._restore(tool, self._home(tool, latency), self._names[tool.name, after])
        record = measured.results() | difference(asked, self._objects.counters())
        same = not compared or pages.checksum(data_dir, self._relation) == self._checksums[after]
        shutil.rmtree(data_dir)
        if not same:
            raise CommandFailed(f"{TABLE} came back with other content than it had at increment {after}")
        return record

    def _listed(self, tool: Tool, repository: Repository) -> str:
        answer = subprocess.run(
            [str(word) for word in tool.listing()], env=self._environment(tool, repository), cwd=self.directory,
            user="postgres", group="postgres", extra_groups=[], check=False, capture_output=True, text=True,
        )
        if answer.returncode:
            raise CommandFailed(f"{tool.name} does not list its backups: {answer.stderr}")
        return answer.stdout


def difference(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    """What has been added to each of the numbers."""
    return {name: after[name] - before[name] for name in after}
