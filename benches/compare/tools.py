"""The tools that are compared: how each is told its repository, and its words for one and the same task."""

import json
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import store
from cluster import Server

ZSTD_LEVEL = 3
PROCESSES = 2
# More than any run takes, so that wal-rus never begins a chain anew.
DELTAS_IN_A_ROW = 1000


@dataclass(frozen=True)
class Repository:
    """A place in the bucket, and the way to it."""

    prefix: str
    endpoint: store.Endpoint


class Tool:
    """What every tool can do. Commands are lists of words, run in the data directory."""

    # The tool, and the variant of it: variants archive WAL alike, so one of them does it for all.
    family: str
    name: str
    archives = True

    def __init__(self, program: Path) -> None:
        self.program = program

    def version(self) -> list:
        """The command that tells the version."""
        return [self.program, "--version"]

    def environment(self, repository: Repository) -> dict[str, str]:
        """Everything the tool needs to find its repository."""
        raise NotImplementedError

    def create(self, repository: Repository, data_dir: Path) -> list | None:
        """The command that makes an empty repository, for tools that have one."""
        raise NotImplementedError

    def backup(self, data_dir: Path) -> list:
        """A full online backup."""
        raise NotImplementedError

    def push(self, data_dir: Path, path: str) -> list:
        """What archive_command runs."""
        raise NotImplementedError

    def increment(self, data_dir: Path) -> list:
        """An online backup of what has changed since the last one, by default what `backup` does once there is one."""
        return self.backup(data_dir)

    def listing(self) -> list:
        """The command that lists the backups, for `newest`."""
        raise NotImplementedError

    def newest(self, listed: str) -> tuple[str, bool]:
        """The newest backup in a listing, and whether it is based on another one."""
        raise NotImplementedError

    def restore(self, data_dir: Path, backup: str | None = None) -> list:
        """The newest backup, or this one, into an empty directory."""
        raise NotImplementedError

    def prepare_recovery(self, data_dir: Path) -> None:
        """What is left to do after a restore, by hand, before the server is started."""

    def connection(self, server: Server) -> dict[str, str]:
        """How the tool finds the server it backs up."""
        address = {"PGHOST": str(server.socket_dir), "PGPORT": str(server.port)}
        return address | {"PGUSER": "postgres", "PGDATABASE": "postgres"}

    def archive_command(self, repository: Repository, data_dir: Path, script: Path) -> str:
        """Writes a script that sets the environment, and returns the archive_command that calls it."""
        exports = [f"export {name}={shlex.quote(value)}\n" for name, value in self.environment(repository).items()]
        script.write_text("".join(["#!/bin/sh\n", *exports, 'exec "$@"\n']), encoding="ascii")
        script.chmod(0o755)
        return " ".join([str(script), *(str(word) for word in self.push(data_dir, '"%p"'))])


def aws_environment(repository: Repository) -> dict[str, str]:
    """The variables of Amazon's own tools, which others read too."""
    return {
        "AWS_ACCESS_KEY_ID": store.ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": store.SECRET_KEY, "AWS_REGION": store.REGION,
        "AWS_ENDPOINT_URL": repository.endpoint.url,
    }


class Perennial(Tool):
    """This project."""

    family = name = "perennial"

    def environment(self, repository: Repository) -> dict[str, str]:
        ours = {
            "PERENNIAL_REPO": f"s3://{store.BUCKET}/{repository.prefix}",
            "AWS_CA_BUNDLE": str(repository.endpoint.ca_file),
        }
        return aws_environment(repository) | ours

    def create(self, repository: Repository, data_dir: Path) -> list:
        return [self.program, "init", f"--zstd-level={ZSTD_LEVEL}"]

    def backup(self, data_dir: Path) -> list:
        return [self.program, "backup", "-D", data_dir]

    def push(self, data_dir: Path, path: str) -> list:
        return [self.program, "wal", "push", path]

    def listing(self) -> list:
        return [self.program, "list", "--json"]

    def newest(self, listed: str) -> tuple[str, bool]:
        newest = max(json.loads(listed)["backups"], key=lambda backup: backup["stopped_at"])
        return newest["id"], newest["parent"] is not None

    def restore(self, data_dir: Path, backup: str | None = None) -> list:
        return [self.program, "restore", "-D", data_dir, *(["--backup", backup, "--immediate"] if backup else [])]


class PgBackRest(Tool):
    """pgBackRest with synchronous WAL transfer; one object for each file unless `bundle`.

    With `blocks`, its increments store blocks instead of files.
    """

    family = "pgbackrest"

    def __init__(self, program: Path, *, bundle: bool, blocks: bool = False) -> None:
        super().__init__(program)
        kinds = {"bundles": bundle, "blocks": blocks}
        self.name = ", ".join(["pgbackrest", *(kind for kind, used in kinds.items() if used)])
        self.archives = bundle
        self._bundle = bundle
        self._blocks = blocks

    @staticmethod
    def knows_blocks(program: Path) -> bool:
        """Whether this version has block incremental backups (2.45 has them as a beta feature)."""
        helped = subprocess.run([program, "help", "backup"], check=True, capture_output=True, text=True)
        return "--repo-block " in helped.stdout

    def version(self) -> list:
        return [self.program, "version"]

    def environment(self, repository: Repository) -> dict[str, str]:
        options = {
            "stanza": "main", "repo1-type": "s3", "repo1-path": f"/{repository.prefix}",
            "repo1-s3-bucket": store.BUCKET, "repo1-s3-endpoint": "localhost", "repo1-s3-region": store.REGION,
            "repo1-s3-uri-style": "path",
            "repo1-s3-key": store.ACCESS_KEY, "repo1-s3-key-secret": store.SECRET_KEY,
            "repo1-storage-host": "localhost", "repo1-storage-port": str(repository.endpoint.port),
            "repo1-storage-ca-file": str(repository.endpoint.ca_file), "repo1-bundle": "y" if self._bundle else "n",
            "compress-type": "zst", "compress-level": str(ZSTD_LEVEL), "process-max": str(PROCESSES), "start-fast": "y",
            "log-level-file": "off", "log-level-console": "warn", "lock-path": str(self.program.parent.parent / "lock"),
        }
        if self._blocks:
            options |= {"repo1-block": "y", "beta": "y"}
        return {f"PGBACKREST_{name.replace('-', '_').upper()}": value for name, value in options.items()}

    def connection(self, server: Server) -> dict[str, str]:
        options = {"SOCKET_PATH": str(server.socket_dir), "PORT": str(server.port), "USER": "postgres"}
        return {f"PGBACKREST_PG1_{name}": value for name, value in options.items()}

    def create(self, repository: Repository, data_dir: Path) -> list:
        return [self.program, "--no-config", f"--pg1-path={data_dir}", "--no-online", "stanza-create"]

    def backup(self, data_dir: Path) -> list:
        return [self.program, "--no-config", f"--pg1-path={data_dir}", "--type=full", "backup"]

    def increment(self, data_dir: Path) -> list:
        return [self.program, "--no-config", f"--pg1-path={data_dir}", "--type=incr", "backup"]

    def listing(self) -> list:
        return [self.program, "--no-config", "--output=json", "info"]

    def newest(self, listed: str) -> tuple[str, bool]:
        newest = json.loads(listed)[0]["backup"][-1]
        return newest["label"], newest["type"] == "incr"

    def push(self, data_dir: Path, path: str) -> list:
        return [self.program, "--no-config", f"--pg1-path={data_dir}", "archive-push", path]

    def restore(self, data_dir: Path, backup: str | None = None) -> list:
        which = [f"--set={backup}"] if backup else []
        return [self.program, "--no-config", f"--pg1-path={data_dir}", "--archive-mode=off", *which, "restore"]


class WalRus(Tool):
    """wal-rus (WAL-G's commands in Rust), its own defaults but for the codec, and for `deltas`: increments in a row."""

    family = name = "wal-rus"

    def __init__(self, program: Path, *, deltas: int = 0) -> None:
        super().__init__(program)
        self._deltas = deltas

    def environment(self, repository: Repository) -> dict[str, str]:
        ours = {
            "WALG_S3_PREFIX": f"s3://{store.BUCKET}/{repository.prefix}", "AWS_S3_FORCE_PATH_STYLE": "true",
            "WALG_COMPRESSION_METHOD": "zstd", "WALG_COMPRESSION_LEVEL": str(ZSTD_LEVEL), "WALG_LOG_LEVEL": "warn",
            # It knows no option for a certificate authority, but its TLS library takes the system's from here.
            "SSL_CERT_FILE": str(repository.endpoint.ca_file),
        }
        if self._deltas:
            ours["WALG_DELTA_MAX_STEPS"] = str(self._deltas)
        return aws_environment(repository) | ours

    def create(self, repository: Repository, data_dir: Path) -> None:
        return None

    def backup(self, data_dir: Path) -> list:
        return [self.program, "backup-push", data_dir]

    def push(self, data_dir: Path, path: str) -> list:
        return [self.program, "wal-push", path]

    def listing(self) -> list:
        return [self.program, "backup-list", "--json"]

    def newest(self, listed: str) -> tuple[str, bool]:
        name = json.loads(listed)[-1]["name"]
        return name, "_D_" in name

    def restore(self, data_dir: Path, backup: str | None = None) -> list:
        return [self.program, "backup-fetch", data_dir, backup or "LATEST"]

    def prepare_recovery(self, data_dir: Path) -> None:
        with (data_dir / "postgresql.auto.conf").open("a", encoding="ascii") as settings:
            settings.write(f"restore_command = '{self.program} wal-fetch \"%f\" \"%p\"'\n")
        (data_dir / "recovery.signal").touch()


def copies(programs: dict[str, Path], directory: Path) -> list[Tool]:
    """The tools of full backups, run from copies."""
    copy_programs(programs, directory)
    return [
        Perennial(directory / "perennial"), PgBackRest(directory / "pgbackrest", bundle=False),
        PgBackRest(directory / "pgbackrest", bundle=True), WalRus(directory / "walrus"),
    ]


def incremental_copies(programs: dict[str, Path], directory: Path) -> list[Tool]:
    """The tools of incremental backups, each at the setting that stores least, run from copies."""
    copy_programs(programs, directory)
    pgbackrest = directory / "pgbackrest"
    return [
        Perennial(directory / "perennial"),
        PgBackRest(pgbackrest, bundle=True, blocks=PgBackRest.knows_blocks(pgbackrest)),
        WalRus(directory / "walrus", deltas=DELTAS_IN_A_ROW),
    ]


def copy_programs(programs: dict[str, Path], directory: Path) -> None:
    """Copies the programs: no compiler replaces those meanwhile, and their paths tell their processes."""
    directory.mkdir(mode=0o755)
    for name, program in programs.items():
        shutil.copy(program, directory / name)
        (directory / name).chmod(0o755)
