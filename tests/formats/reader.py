#!/usr/bin/env python3
"""An independent reader of the repository format, written from docs/format.md alone.

    reader.py restore REPO_DIR TARGET_DIR [--backup ID] [--tablespace OID=DIR]...
    reader.py check REPO_DIR
    reader.py cat REPO_DIR KEY

It needs Python 3.11 and the `zstandard` module. Run `restore` as the user that will run PostgreSQL.
"""
import argparse
import contextlib
import hashlib
import json
import os
import re
import shlex
import struct
import sys

import zstandard

HEAD_MAGIC, INDEX_MAGIC = 0x184D2A50, 0x184D2A51
ENDLESS = 1 << 64


class Damage(Exception):
    """One line that begins with the key of the object that is damaged or missing."""


def demand(truth, key, complaint):
    if not truth:
        raise Damage(f"{key}: {complaint}")


@contextlib.contextmanager
def reading(key):
    """Turn whatever goes wrong while an object is read into one line about its key."""
    try:
        yield
    except FileNotFoundError:
        raise Damage(f"{key}: missing") from None
    except (OSError, KeyError, IndexError, ValueError, TypeError, struct.error, zstandard.ZstdError) as error:
        raise Damage(f"{key}: {type(error).__name__}: {error}") from error


class Repository:
    """The objects below one directory, by key."""

    def __init__(self, directory):
        self.directory = directory.removeprefix("file://")
        descriptor = document(self, "perennial.json", "perennial/repository")
        demand(descriptor["min_reader"] <= 1, "perennial.json", "needs a newer reader")
        self.id = descriptor["repository_id"]

    def read(self, key, offset=0, length=-1):
        with reading(key), open(os.path.join(self.directory, key), "rb") as file:
            file.seek(offset)
            return file.read(length)

    def keys(self, prefix=""):
        found = []
        for directory, _, names in os.walk(os.path.join(self.directory, prefix)):
            found += [os.path.relpath(os.path.join(directory, name), self.directory) for name in names]
        return sorted(found)

    def generations(self):
        """Numbers of the generations, newest first."""
        matches = (re.fullmatch(r"generations/(\d{8})/generation\.json", key) for key in self.keys("generations"))
        return sorted((int(m[1]) for m in matches if m), reverse=True)

    def backups(self):
        """Identities of the backups, newest first."""
        matches = (re.fullmatch(r"backups/([^/]+)/manifest", key) for key in self.keys("backups"))
        return sorted((m[1] for m in matches if m), reverse=True)


# --- the parts objects are made of -----------------------------------------------------------------------------------

def crc_table():
    """The table of CRC-32C (Castagnoli), bits reflected."""
    table = list(range(256))
    for _ in range(8):
        table = [(c >> 1) ^ (0x82F63B78 if c & 1 else 0) for c in table]
    return table


CRC_TABLE = crc_table()


def crc32c(data):
    crc, table = 0xFFFFFFFF, CRC_TABLE
    for byte in data:
        crc = table[(crc ^ byte) & 255] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def lsn(text):
    """`A/4000028` as a number."""
    high, low = text.split("/")
    return int(high, 16) << 32 | int(low, 16)


def document(repo, key, kind):
    """A JSON object with a `check`."""
    raw = repo.read(key)
    body, separator, tail = raw.rpartition(b',\n  "check": "')
    demand(separator and tail == b'%08x"\n}\n' % crc32c(body), key, "the check does not hold")
    with reading(key):
        content = json.loads(raw)
        demand(content["kind"] == kind, key, f"is no {kind}")
        return content


def split_head(key, raw, kind):
    """The head of an object as a dictionary, and the offset of what comes after it."""
    with reading(key):
        magic, rest = struct.unpack_from("<II", raw)
        demand(magic == HEAD_MAGIC and 8 + rest <= len(raw), key, "has no whole head")
        text, (crc,) = raw[8:4 + rest], struct.unpack_from("<I", raw, 4 + rest)
        demand(crc == crc32c(text), key, "the head's CRC does not hold")
        head = json.loads(text)
        demand(head["format"] == kind, key, f"is no {kind}")
        return head, 8 + rest


def unpack(key, frame, plain=None):
    """Content of one zstd frame; zstd itself verifies its XXH64."""
    with reading(key):
        size, checksum = zstandard.frame_content_size(frame), zstandard.get_frame_parameters(frame).has_checksum
        demand(checksum and size >= 0, key, "a frame lacks its checksum or size")
        demand(plain in (None, size), key, f"a frame holds {size} bytes instead of {plain}")
        return zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)


def frames(key, body, lengths, digest):
    """The frames of a body, once their total length and SHA-256 proved right."""
    demand(sum(lengths) == len(body), key, f"{len(body)} bytes of frames, but the head lists {sum(lengths)}")
    demand(sha256(body) == digest, key, "the SHA-256 of the frames does not hold")
    offset = 0
    for length in lengths:
        yield body[offset:offset + length]
        offset += length


# --- objects ---------------------------------------------------------------------------------------------------------

def generation(repo, number):
    key = f"generations/{number:08d}/generation.json"
    claim = document(repo, key, "perennial/generation")
    demand(claim["generation"] == number and (claim["parent"] or 0) < number, key, "its number or parent is wrong")
    return claim


def wal_file(repo, key):
    """Head and content of a WAL object."""
    raw = repo.read(key)
    head, start = split_head(key, raw, "perennial/wal/1")
    with reading(key):
        demand(head["name"] + ".zst" == os.path.basename(key), key, f"holds {head['name']}")
        parts = [unpack(key, frame) for frame in frames(key, raw[start:], head["frames"], head["stored_sha256"])]
        content = b"".join(parts)
        demand(all(len(part) == head["frame_size"] for part in parts[:-1]), key, "a frame's length is wrong")
        demand(len(content) == head["size"] and sha256(content) == head["sha256"], key, "the content is not the file's")
        return head, content


def manifest(repo, backup):
    """Head of a manifest, and its lines but the last as pairs of kind and value."""
    key = f"backups/{backup}/manifest"
    raw = repo.read(key)
    head, start = split_head(key, raw, "perennial/backup/1")
    with reading(key):
        demand(head["backup_id"] == backup and head["repository_id"] == repo.id, key, "belongs elsewhere")
        stored = frames(key, raw[start:], [length for length, _ in head["frames"]], head["frames_sha256"])
        text = b"".join(unpack(key, frame, plain) for frame, (_, plain) in zip(stored, head["frames"]))
        *lines, last = [next(iter(json.loads(line).items())) for line in text.splitlines()]
        demand(last == ("end", len(lines)), key, "the end line is wrong or missing")
        files = values(lines, "file")
        demand(len(files) == head["files"] and len(values(lines, "pack")) == head["packs"], key, "a count is wrong")
        demand(sum(file["size"] for file in files) == head["bytes"], key, "the number of bytes is wrong")
        return head, lines


def values(lines, kind):
    return [value for name, value in lines if name == kind]


def region(repo, packs, entry, path, with_crc=False):
    """Content of one region of a file."""
    number, offset, stored, plain, crc, digest = entry
    key = f"packs/{packs[number]}"
    where = f"{key} (offset {offset}, {path})"
    frame = repo.read(key, offset, stored)
    demand(sha256(frame) == digest, where, "the frame's SHA-256 does not hold")
    content = unpack(where, frame, plain)
    demand(not with_crc or crc32c(content) == crc, where, "the content's CRC-32C does not hold")
    return content


def pack_frames(repo, key):
    """Stored frames of a pack by its index, which must list all that lies between head and index."""
    raw = repo.read(key)
    head, end = split_head(key, raw, "perennial/pack/1")
    demand(head["pack_id"] == os.path.basename(key), key, f"is pack {head['pack_id']}")
    with reading(key):
        crc, length, mark = struct.unpack("<II4s", raw[-12:])
        magic, rest = struct.unpack_from("<II", raw, len(raw) - length)
        text = raw[len(raw) - length + 8:-12]
        demand(mark == b"PIDX" and magic == INDEX_MAGIC and rest + 8 == length, key, "has no whole index")
        demand(crc32c(text) == crc, key, "the index's CRC does not hold")
        for offset, stored, digest in json.loads(text):
            frame = raw[offset:offset + stored]
            demand(offset == end and sha256(frame) == digest, key, f"the frame at {offset} is not the index's")
            yield frame
            end += stored
        demand(end + length == len(raw), key, f"bytes at {end} are in no frame")


# --- which backup, which WAL -----------------------------------------------------------------------------------------

def lineage(repo, number):
    """A generation and its ancestors, newest first."""
    line = []
    while number is not None:
        line.append(number)
        number = generation(repo, number)["parent"]
    return line


def wal_index(repo, line):
    """Keys of a lineage's WAL files by name; a newer generation's file goes before an older's."""
    return {os.path.basename(key).removesuffix(".zst"): key
            for number in reversed(line) for key in repo.keys(f"generations/{number:08d}/wal")}


def timelines(repo, index):
    """Timelines that lead to the newest one, as pairs of number and end, oldest first."""
    newest = max((int(name[:8], 16) for name in index), default=1)
    path = []
    if newest > 1:
        name = f"{newest:08X}.history"
        demand(name in index, f"generations/*/wal/{name}.zst", "missing")
        for line in wal_file(repo, index[name])[1].decode().splitlines():
            if match := re.match(r"\s*(\d+)\s+([0-9A-Fa-f]+/[0-9A-Fa-f]+)", line):
                path.append((int(match[1]), lsn(match[2])))
    return path + [(newest, ENDLESS)]


def plan(repo, backup=None):
    """Choose what to restore: head and lines of a backup, the WAL index, and the timelines to follow.

    A backup can be used if its generation is in the lineage and its end is not behind the point where the newest
    timeline left the backup's. Without `backup`, only the newest generation's lineage counts."""
    for number in repo.generations() if backup else repo.generations()[:1]:
        line = lineage(repo, number)
        index = wal_index(repo, line)
        path = timelines(repo, index)
        for candidate in [backup] if backup else repo.backups():
            head, lines = manifest(repo, candidate)
            if head["generation"] in line and lsn(head["stop_lsn"]) <= dict(path).get(head["timeline"], 0):
                return head, lines, index, path
    raise Damage(f"backups/{backup or ''}: no usable backup in the lineage of generation {max(repo.generations())}")


def wal_needed(index, path, head):
    """Names of the segments to replay, each with its key and with how many of its bytes count; refuses holes."""
    size = head["segment_size"]
    per_log = (1 << 32) // size
    first, must = lsn(head["start_lsn"]) // size, (lsn(head["stop_lsn"]) - 1) // size
    on = {}
    for name in filter(re.compile("[0-9A-F]{24}").fullmatch, index):
        number = int(name[8:16], 16) * per_log + int(name[16:], 16)
        on.setdefault(int(name[:8], 16), {})[number] = name
    chosen, later = [], False
    start = [timeline for timeline, _ in path].index(head["timeline"])
    for place in range(len(path) - 1, start - 1, -1):
        timeline, end = path[place]
        begin = max(first, path[place - 1][1] // size) if place > start else first
        have = {n: name for n, name in on.get(timeline, {}).items() if n >= begin and n * size < end}
        last = end // size - 1 if later else max(have, default=-1)
        for n in range(begin, max(last, must if place == start else -1) + 1):
            name = f"{timeline:08X}{n // per_log:08X}{n % per_log:08X}"
            demand(n in have, f"generations/*/wal/{name[:8]}/{name[8:16]}/{name}.zst", "missing")
        chosen += [(name, index[name], min(size, end - n * size)) for n, name in have.items()]
        later = later or bool(have)
    return sorted(chosen)


# --- commands --------------------------------------------------------------------------------------------------------

def inside(target, path):
    """The place of a manifest's path below the target."""
    demand(path and not os.path.isabs(path) and ".." not in path.split("/"), path, "is no path below the data directory")
    return os.path.join(target, path)


def write(path, content, mode=0o600):
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        for part in content:
            file.write(part)
        os.fchmod(file.fileno(), mode)


def empty_directory(path):
    os.makedirs(path, mode=0o700, exist_ok=True)
    demand(not os.listdir(path), path, "is not empty")


def make_directories(lines, target, moved):
    """Make directories and links, parents first: directories of a tablespace lie behind its link."""
    empty_directory(target)
    os.chmod(target, 0o700)
    for kind, value in sorted(((k, v) for k, v in lines if k in ("dir", "link")), key=lambda pair: pair[1]["path"]):
        path = inside(target, value["path"])
        if kind == "dir":
            os.makedirs(path, exist_ok=True)
            os.chmod(path, value["mode"])
        else:
            place = moved.get(os.path.basename(path), value["target"])
            empty_directory(place)
            os.symlink(place, path)


def restore_wal(repo, head, index, path, target):
    """Put the WAL and the history files beside the data; the archive lies in the target, below `pg_wal_archive`."""
    needed = wal_needed(index, path, head)
    archive = os.path.join(target, "pg_wal_archive")
    os.mkdir(archive, 0o700)
    for name, key, count in needed:
        content = wal_file(repo, key)[1]
        write(os.path.join(archive, name), [content[:count].ljust(head["segment_size"], b"\0")])
    for name in (f"{timeline:08X}.history" for timeline, _ in path):
        if name in index:
            write(os.path.join(archive, name), [wal_file(repo, index[name])[1]])
    return archive, [name for name, _, _ in needed]


def configure(head, path, target, archive):
    """Have PostgreSQL replay the archive; settings that the backup brought along must not stand in the way."""
    settings = {f"recovery_target{name}": "" for name in ("", "_time", "_xid", "_lsn", "_name")}
    source = shlex.quote(os.path.abspath(archive)).replace("%", "%%")
    settings |= {"recovery_target_timeline": path[-1][0], "restore_command": f'cp {source}/%f "%p"', "archive_mode": "off"}
    if any("location" not in tablespace for tablespace in head["tablespaces"]):
        settings["allow_in_place_tablespaces"] = "on"
    with open(os.path.join(target, "postgresql.auto.conf"), "a", encoding="utf-8") as file:
        for name, value in settings.items():
            file.write("\n{} = '{}'".format(name, str(value).replace("\\", "\\\\").replace("'", "''")))
        file.write("\n")
    write(os.path.join(target, "recovery.signal"), [])


def restore(repo, target, backup, moved):
    head, lines, index, path = plan(repo, backup)
    packs = values(lines, "pack")
    wal_needed(index, path, head)  # refuse holes before anything is written
    make_directories(lines, target, moved)
    archive, names = restore_wal(repo, head, index, path, target)
    for file in sorted(values(lines, "file"), key=lambda file: file["path"] == "global/pg_control"):
        content = (region(repo, packs, entry, file["path"]) for entry in file["regions"])
        write(inside(target, file["path"]), content, file["mode"])
        if file.get("outside"):
            print(f"note: {file['path']} lay at {file['outside']}", file=sys.stderr)
    write(os.path.join(target, "backup_label"), [head["backup_label"].encode()])
    if text := head.get("tablespace_map"):
        for oid, place in moved.items():  # PostgreSQL makes the links anew from this file
            text = re.sub(rf"^{oid} .*$", lambda _: f"{oid} {place}", text, flags=re.MULTILINE)
        write(os.path.join(target, "tablespace_map"), [text.encode()])
    configure(head, path, target, archive)
    print(f"restored {head['backup_id']}: {head['files']} files, WAL {names[0]} to {names[-1]}")


def check_backup(repo, backup):
    """Verify every region of a backup, and that the WAL it needs is there."""
    head, lines = manifest(repo, backup)
    for file in values(lines, "file"):
        parts = [region(repo, values(lines, "pack"), entry, file["path"], True) for entry in file["regions"]]
        demand(sum(map(len, parts)) == file["size"], f"backups/{backup}/manifest", f"{file['path']}: wrong size")
    line = lineage(repo, head["generation"])
    wal_needed(wal_index(repo, line), [(head["timeline"], lsn(head["stop_lsn"]))], head)


def check_key(repo, key):
    """Verify one object; the document at the root was verified when the repository was opened."""
    if match := re.fullmatch(r"generations/(\d{8})/generation\.json", key):
        generation(repo, int(match[1]))
    elif match := re.fullmatch(r"generations/(\d{8})/wal/(?:([0-9A-F]{8})/([0-9A-F]{8})/\2\3.*|[0-9A-F]{8}\.history)\.zst", key):
        claim, (head, _) = generation(repo, int(match[1])), wal_file(repo, key)
        demand(head["system_id"] == claim["system_id"], key, "is of another cluster")
    elif match := re.fullmatch(r"backups/([^/]+)/manifest", key):
        check_backup(repo, match[1])
    elif re.fullmatch(r"packs/[0-9a-f]{32}", key):
        for _ in pack_frames(repo, key):
            pass
    elif key != "perennial.json":
        print(f"note: {key} is no object of this format", file=sys.stderr)


def check(repo):
    """Verify all objects, then that there is a way to the newest state. Print one line per damage."""
    keys, damages = repo.keys(), {}
    holes = set(range(1, max(repo.generations(), default=0) + 1)) - set(repo.generations())
    tasks = [lambda key=key: check_key(repo, key) for key in keys]
    tasks += [lambda number=number: generation(repo, number) for number in sorted(holes)]
    if repo.backups():
        tasks.append(lambda: (found := plan(repo)) and wal_needed(found[2], found[3], found[0]))
    for task in tasks:
        try:
            task()
        except Damage as damage:
            damages[str(damage)] = True
    for damage in damages:
        print(f"reader.py: {damage}", file=sys.stderr)
    print(f"{len(keys)} objects, {len(damages)} damages")
    return 1 if damages else 0


def cat(repo, key):
    """Content of an object, as `zstd -d` would print it."""
    if key.endswith(".json"):
        parts = [repo.read(key)]
    elif key.startswith("packs/"):
        parts = (unpack(key, frame) for frame in pack_frames(repo, key))
    elif key.startswith("backups/"):
        head, lines = manifest(repo, key.split("/")[1])
        lines.append(("end", len(lines)))
        parts = (json.dumps({k: v}, separators=(",", ":"), ensure_ascii=False).encode() + b"\n" for k, v in lines)
    else:
        parts = [wal_file(repo, key)[1]]
    for part in parts:
        sys.stdout.buffer.write(part)


def main():
    parser = argparse.ArgumentParser(description="Read a repository as docs/format.md describes it")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("restore", "check", "cat"):
        commands.add_parser(name).add_argument("repo")
    commands.choices["restore"].add_argument("target")
    commands.choices["restore"].add_argument("--backup", metavar="ID")
    commands.choices["restore"].add_argument("--tablespace", metavar="OID=DIR", action="append", default=[])
    commands.choices["cat"].add_argument("key")
    args = parser.parse_args()
    try:
        repo = Repository(args.repo)
        if args.command == "check":
            return check(repo)
        if args.command == "cat":
            return cat(repo, args.key)
        return restore(repo, args.target, args.backup, dict(item.split("=", 1) for item in args.tablespace))
    except (Damage, OSError) as problem:
        return f"reader.py: {problem}"


if __name__ == "__main__":
    sys.exit(main())
