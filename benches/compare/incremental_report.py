#!/usr/bin/env python3
"""The tables of a run with incremental backups, as Markdown, and whether its figures are within the bars."""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import report
from report import Column, Record

# What Perennial has set itself: greatest quotients of medians.
MOST_BYTES = 0.6
MOST_WALL = 1.0
MOST_RESTORE = 1.2

REQUESTS: list[Column] = [("requests", lambda record: record.get("requests"), 0)]
ADDED: list[Column] = [("added MB", report.megabytes("bytes"), 2), ("objects", lambda record: record.get("objects"), 0)]
FETCHED: list[Column] = [("fetched MB", report.megabytes("sent"), 1)]
BACKUP: list[Column] = [*report.WHOLE, *report.MEMORY, *ADDED, *REQUESTS]
RESTORE: list[Column] = [*report.WHOLE, *report.MEMORY, *FETCHED, *REQUESTS]
STATISTICS: dict[str, Callable[[list], float]] = {"median": statistics.median, "mean": statistics.mean}
WALL: Column = report.WHOLE[0]
BYTES: Column = ADDED[0]


def render(document: dict) -> str:
    """The whole report."""
    records = document["records"]
    lines = report.about(document)
    lines += section("Bars", bars(records))
    lines += section("Full backup, the base of the increments", compared(of_scene(records, "full"), BACKUP))
    lines += section("Incremental backup", touched(records) + compared(of_scene(records, "increment"), BACKUP))
    lines += section("Further increments, by one tool", report.values(of_scene(records, "chain"), BACKUP))
    lines += section("Added by each increment", one_by_one(records))
    for after in sorted({record["after"] for record in records if "after" in record}):
        restores = [record for record in records if record.get("after") == after]
        lines += section(f"Restore after {increments(after)}", compared(restores, RESTORE))
    lines += section("Restores beside the one after the first increment", growth(records))
    return "\n".join([*lines, *report.failures(document), ""])


def section(title: str, lines: list[str]) -> list[str]:
    """A part of the report, if there is more in it than the head of a table."""
    return ["", f"## {title}", "", *lines] if len(lines) > 2 else []


def compared(records: list[Record], columns: list[Column]) -> list[str]:
    """A table of medians and, where there are rivals, one of ratios."""
    ratios = report.ratios(records, columns)
    return [*report.values(records, columns), *(["", *ratios] if len(ratios) > 2 else [])]


def touched(records: list[Record]) -> list[str]:
    """How much had changed before each increment."""
    states = sorted({(record["touched"], record["pages"]) for record in records if "touched" in record})
    if not states:
        return []
    (least, _), (most, total) = states[0], states[-1]
    return [f"Changed before each: {least} to {most} of the {total} pages of all tables and indexes "
            f"({least / total:.1%} to {most / total:.1%}).", ""]


def growth(records: list[Record]) -> list[str]:
    """What a restore costs after more increments, as part of what it costs after the first one."""
    lines = report.table_head(["latency", "tool", "increments", *(name for name, *_ in RESTORE)])
    for latency, tool, after in sorted({key(record) for record in records if "after" in record}):
        first, later = (restored(records, latency, tool, number) for number in (1, after))
        if after != 1 and first and later:
            medians = [(median_of(later, column), median_of(first, column)) for column in RESTORE]
            cells = [report.ratio(grown, base) for grown, base in medians]
            lines.append(report.table_row([f"+{latency} ms", tool, f"{after} / 1", *cells]))
    return lines


def bars(records: list[Record]) -> list[str]:
    """Each bar, what was measured, and whether that is within it."""
    lines = report.table_head(["bar", "latency", "measured", ""])
    backups = of_scene(records, "increment")
    after = max((record["after"] for record in records if "after" in record), default=1)
    rows = [(f"bytes added at most {MOST_BYTES} of the smaller rival's, {name} of all increments", "all",
             best(backups, BYTES, statistic), MOST_BYTES) for name, statistic in STATISTICS.items()]
    for latency in sorted({record["latency"] for record in backups}):
        over = [record for record in backups if record["latency"] == latency]
        first, last = (restored(records, latency, report.OURS, number) for number in (1, after))
        grown = quotient(median_of(last, WALL), median_of(first, WALL)) if after > 1 else None
        rows += [
            ("wall time at most that of the faster rival", f"+{latency} ms", best(over, WALL), MOST_WALL),
            (f"restore after {increments(after)} at most {MOST_RESTORE} of the time after 1", f"+{latency} ms", grown,
             MOST_RESTORE),
        ]
    for bar, latency, measured, limit in rows:
        said = "not measured" if measured is None else f"{measured:.2f}"
        lines.append(report.table_row([bar, latency, said, verdict(measured, limit)]))
    return lines


def verdict(measured: float | None, limit: float) -> str:
    """What a figure means for a bar."""
    if measured is None:
        return ""
    return "MET" if measured <= limit else "NOT MET"


def best(backups: list[Record], column: Column, statistic: Callable[[list], float] = statistics.median) -> float | None:
    """Our figure as part of a rival's least."""
    figures = {tool: statistic([column[1](record) for record in runs]) for tool, runs in by_tool(backups).items()}
    rivals = [figure for tool, figure in figures.items() if not tool.startswith(report.OURS)]
    return quotient(figures.get(report.OURS), min(rivals, default=None))


def one_by_one(records: list[Record]) -> list[str]:
    """Each tool's increments in the order they were taken: what stays the same and what grows."""
    lines = report.table_head(["tool", "MB added, from the first increment on"])
    for tool, runs in by_tool(of_scene(records, "increment") + of_scene(records, "chain")).items():
        added = {record["round"]: f"{BYTES[1](record):.{BYTES[2]}f}" for record in runs}
        lines.append(report.table_row([tool, " ".join(added.get(number, "-") for number in range(1, max(added) + 1))]))
    return lines


def by_tool(backups: list[Record]) -> dict[str, list[Record]]:
    """The backups that succeeded, of each tool."""
    good = [record for record in backups if "error" not in record]
    tools = sorted({record["tool"] for record in good})
    return {tool: [record for record in good if record["tool"] == tool] for tool in tools}


def quotient(ours: float | None, theirs: float | None) -> float | None:
    """Two medians, if they were measured."""
    return ours / theirs if ours is not None and theirs else None


def median_of(runs: list[Record], column: Column) -> float | None:
    """The median of a column."""
    measure: Callable[[Record], float | None] = column[1]
    return report.median(runs, measure)


def restored(records: list[Record], latency: int, tool: str, after: int) -> list[Record]:
    """Restores that succeeded, of one backup."""
    wanted = (latency, tool, after)
    return [record for record in records if "after" in record and "error" not in record and key(record) == wanted]


def key(record: Record) -> tuple[int, str, int]:
    """What restores are told apart by."""
    return record["latency"], record["tool"], record["after"]


def of_scene(records: list[Record], scene: str) -> list[Record]:
    """The records of a scene."""
    return [record for record in records if record["scene"] == scene]


def increments(number: int) -> str:
    """A number of increments, in words."""
    return f"{number} increment{'' if number == 1 else 's'}"


def main() -> None:
    """Renders raw files once more."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("raw", type=Path, help="JSON file of a run")
    print(render(json.loads(parser.parse_args().raw.read_text(encoding="utf-8"))), end="")


if __name__ == "__main__":
    main()
