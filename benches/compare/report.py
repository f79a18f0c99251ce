#!/usr/bin/env python3
"""The tables of a run, as Markdown: medians with the least and the greatest value, and ratios of medians."""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

OURS = "perennial"
Record = dict
Column = tuple[str, Callable[[Record], float | None], int]


def megabytes(field: str) -> Callable[[Record], float | None]:
    """A field in bytes, as MB."""
    return lambda record: record[field] / 1e6 if field in record else None


def quantile(tenths: int) -> Callable[[Record], float]:
    """A quantile of the calls' wall times, in milliseconds."""
    return lambda record: statistics.quantiles(record["walls"], n=10, method="inclusive")[tenths - 1] * 1000


def cpu(record: Record) -> float:
    """CPU seconds of the command and of the archive_command calls during it."""
    return record["cpu"] + record.get("archiving_cpu", 0)


MEMORY: list[Column] = [("memory MB", megabytes("peak_pss"), 0), ("one process MB", megabytes("peak_rss"), 0)]
STORED: list[Column] = [("stored MB", megabytes("bytes"), 1), ("objects", lambda record: record.get("objects"), 0)]
WHOLE: list[Column] = [("wall s", lambda record: record["wall"], 2), ("CPU s", cpu, 2)]
CALLS: list[Column] = [
    ("p50 ms", quantile(5), 1), ("p90 ms", quantile(9), 1),
    ("CPU ms a segment", lambda record: record["cpu"] * 1000 / len(record["walls"]), 1),
]
SCENES: list[tuple[str, str, list[Column]]] = [
    ("backup", "Full backup", [*WHOLE, *MEMORY, *STORED]),
    ("restore", "Restore of it into an empty directory", [*WHOLE, *MEMORY]),
    ("push", "WAL push, one call for each 16 MB segment", [*CALLS, *MEMORY, *STORED]),
    ("fetch", "WAL fetch, one call for each 16 MB segment", [*CALLS, *MEMORY]),
    ("replay", "Replay: server started to writable", [
        ("wall s", lambda record: record["wall"], 2),
        ("fetching CPU s", lambda record: record["cpu"], 2),
        *MEMORY,
        ("with the restore, wall s", lambda record: record.get("with_restore"), 2),
    ]),
]


def render(document: dict) -> str:
    """The whole report."""
    lines = about(document)
    for scene, title, columns in SCENES:
        records = [record for record in document["records"] if record["scene"] == scene]
        if records:
            lines += ["", f"## {title}", "", *values(records, columns), "", *ratios(records, columns)]
    return "\n".join([*lines, *failures(document), ""])


def about(document: dict) -> list[str]:
    """The table that says what was measured, with what, and where."""
    return table_head(["item", "value"]) + [table_row([name, value]) for name, value in document["about"].items()]


def failures(document: dict) -> list[str]:
    """What did not work, if anything."""
    failed = [record for record in document["records"] if "error" in record]
    lines = [f"- {where(record)}: `{brief(record['error'])}`" for record in failed]
    return ["", "## What failed", "", *lines] if lines else []


def save(document: dict, rendered: Callable[[dict], str], output: Path | None) -> None:
    """Writes what there is so far: the report, and the raw numbers beside it."""
    if output:
        output.write_text(rendered(document), encoding="utf-8")
        output.with_suffix(".json").write_text(json.dumps(document, indent=1), encoding="utf-8")


def values(records: list[Record], columns: list[Column]) -> list[str]:
    """The table of medians."""
    lines = table_head(["latency", "tool", *(name for name, *_ in columns), "runs"])
    for latency, tool, runs in groups(records):
        cells = [spread([measure(run) for run in runs], digits) for _, measure, digits in columns]
        lines.append(table_row([f"+{latency} ms", tool, *cells, str(len(runs))]))
    return lines


def ratios(records: list[Record], columns: list[Column]) -> list[str]:
    """The table of our medians as parts of each rival's."""
    lines = table_head(["latency", "ratio", *(name for name, *_ in columns)])
    grouped = groups(records)
    ours = [group for group in grouped if group[1].startswith(OURS)]
    rivals = [group for group in grouped if not group[1].startswith(OURS)]
    for latency, our_name, our_runs in ours:
        for _, rival_name, rival_runs in (rival for rival in rivals if rival[0] == latency):
            cells = [ratio(median(our_runs, measure), median(rival_runs, measure)) for _, measure, _ in columns]
            lines.append(table_row([f"+{latency} ms", f"{our_name} / {rival_name}", *cells]))
    return lines


def groups(records: list[Record]) -> list[tuple[int, str, list[Record]]]:
    """The runs that succeeded, by latency and tool."""
    runs: dict[tuple[int, str], list[Record]] = {}
    for record in records:
        if "error" not in record:
            runs.setdefault((record["latency"], record["tool"]), []).append(record)
    return [(latency, tool, runs[latency, tool]) for latency, tool in sorted(runs)]


def median(runs: list[Record], measure: Callable[[Record], float | None]) -> float | None:
    """The median of what was measured."""
    measured = [value for value in map(measure, runs) if value is not None]
    return statistics.median(measured) if measured else None


def ratio(ours: float | None, theirs: float | None) -> str:
    """Two medians as a quotient."""
    return f"{ours / theirs:.2f}" if ours is not None and theirs else ""


def spread(measured: list[float | None], digits: int) -> str:
    """Median, least and greatest."""
    known = [value for value in measured if value is not None]
    if not known:
        return ""
    middle, least, greatest = (f"{value:.{digits}f}" for value in (statistics.median(known), min(known), max(known)))
    return middle if least == greatest else f"{middle} ({least}-{greatest})"


def where(record: Record) -> str:
    """Which measurement a record is of."""
    return f"{record['scene']}, {record['tool']}, +{record['latency']} ms, round {record['round']}"


def brief(error: str) -> str:
    """An error on one line of a table."""
    return " ".join(error.split()).replace("`", "'")[:400]


def table_head(names: list[str]) -> list[str]:
    """The two first lines of a table."""
    return [table_row(names), table_row(["---"] * len(names))]


def table_row(cells: list[str]) -> str:
    """One line of a table."""
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Renders raw files once more, those of runs that measured different scenes as one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("raw", type=Path, nargs="+", help="JSON files of runs with the same settings")
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in parser.parse_args().raw]
    records = [record for document in documents for record in document["records"]]
    print(render({"about": documents[0]["about"], "records": records}), end="")


if __name__ == "__main__":
    main()
