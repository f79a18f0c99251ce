"""What the runners here have in common: options, programs, a directory that is thrown away, and how a run goes."""

import argparse
import contextlib
import datetime
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import meter
from cluster import BINARIES
from report import where
from scenes import Bench
from store import Store
from tools import ZSTD_LEVEL, Tool

ROOT = Path(__file__).resolve().parents[2]
WEED = ROOT / ".tools/venv/bin/weed"
WALRUS = ROOT / ".tools/wal-rus/bin/walrus"
PGBACKREST = Path("/usr/bin/pgbackrest")


def options(description: str) -> argparse.ArgumentParser:
    """A parser that knows the options of every runner."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, help="Markdown file; raw numbers go beside it as .json (default: print)")
    parser.add_argument("--scale", type=int, default=100, help="pgbench scale factor; 100 is about 1.5 GB")
    parser.add_argument("--idle-wait", type=int, default=30, help="seconds to let other work end before a measurement")
    parser.add_argument("--work-dir", type=Path, default=Path("/tmp"), help="where the temporary directory is made")
    parser.add_argument("--perennial", type=Path, default=ROOT / "target/release/perennial", help="program to measure")
    parser.add_argument("--revision", help="what it was built from (default: git describe)")
    return parser


def begin(perennial: Path) -> dict[str, Path]:
    """Prepares this process for a run; the programs to measure. Ends it if something is missing."""
    if os.geteuid() != 0:
        sys.exit("run it as root: it starts servers as user postgres")
    programs = {"perennial": perennial, "walrus": WALRUS, "pgbackrest": PGBACKREST}
    missing = [str(path) for path in (*programs.values(), WEED, BINARIES / "postgres") if not path.exists()]
    if missing:
        sys.exit(f"missing: {', '.join(missing)}; run benches/compare/setup first")
    for ending in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(ending, end_by_signal)
    meter.adopt_orphans()
    return programs


def end_by_signal(number: int, _) -> None:
    """Ends the run as any error would, so that everything is cleaned up."""
    tell(f"ended by {signal.Signals(number).name}")
    sys.exit(128 + number)


@contextlib.contextmanager
def work_directory(parent: Path) -> Iterator[Path]:
    """A directory of user postgres for everything, thrown away afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="perennial-bench-", dir=parent))
    try:
        directory.chmod(0o755)
        shutil.chown(directory, "postgres", "postgres")
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def measure(
    objects: Store,
    make: Callable[[], Bench],
    about: Callable[[Bench], dict[str, str]],
    scenes: Callable[[Bench], list[Callable[[], Iterator[dict]]]],
    save: Callable[[dict], None],
) -> dict:
    """A whole run: starts store and bench, tells and saves each scene's records as they come, and stops all."""
    bench = None
    try:
        tell("starting SeaweedFS and PostgreSQL")
        objects.start()
        bench = make()
        bench.prepare()
        document = {"about": about(bench), "records": []}
        for scene in scenes(bench):
            for record in scene():
                document["records"].append(record)
                tell(summary(record))
                save(document)
        return document
    finally:
        if bench:
            bench.stop()
        objects.stop()


def facts(tools: list[Tool], directory: Path, scale: int, revision: str | None) -> dict[str, str]:
    """What is measured, and where."""
    versions = {tool.family: told(tool.version()) for tool in tools}
    versions["perennial"] += f", {revision or described()}"
    cores = Path("/proc/cpuinfo").read_text(encoding="ascii")
    processor = next(line for line in cores.splitlines() if "model name" in line)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30)
    filesystem = told(["findmnt", "-no", "FSTYPE", "-T", directory])
    return {
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        **versions,
        "PostgreSQL": told([BINARIES / "postgres", "--version"]),
        "store": f"SeaweedFS {told([WEED, 'version']).splitlines()[0]}, TLS on loopback, private authority",
        "machine": f"{os.cpu_count()} cores ({processor.partition(':')[2].strip()}), {memory:.0f} GiB, "
                   f"Linux {platform.release()}, {filesystem}",
        "cluster": f"pgbench scale {scale}, checksums on, shared_buffers 256 MB, max_wal_size 4 GB",
        "codec": f"zstd level {ZSTD_LEVEL} for every tool",
    }


def described() -> str:
    """The state of the work tree, in git's words."""
    return told(["git", "-C", ROOT, "describe", "--always", "--dirty", "--tags"])


def told(command: list) -> str:
    """What a command prints."""
    return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout.strip()


def summary(record: dict) -> str:
    """One line for each measurement."""
    if "error" in record:
        return f"{where(record)}: FAILED {record['error']}"
    return f"{where(record)}: {record['wall']:.2f} s, {record['cpu']:.2f} s CPU, {record['peak_pss'] / 1e6:.0f} MB"


def tell(text: str) -> None:
    """Progress, for whoever watches."""
    print(f"{datetime.datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)
