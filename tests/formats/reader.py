#!/usr/bin/env python3
"""An independent reader of the repository format, written from docs/format.md alone.

    reader.py restore REPO_DIR TARGET_DIR [--backup ID] [--tablespace OID=DIR]...
    reader.py check REPO_DIR
    reader.py cat REPO_DIR KEY

For an encrypted repository each command takes --key-file FILE, with what `perennial key export` prints.

Needs Python 3.11 and the `zstandard` module, for an encrypted repository also `cryptography`. Run `restore` as the user that will run PostgreSQL.
"""
import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import shlex
import struct
import sys

import zstandard

HEAD_MAGIC, INDEX_MAGIC, ENDLESS = 0x184D2A50, 0x184D2A51, 1 << 64
# Of a region's patches: pages of a region, bytes of a piece, of which a page has eight.
PAGES, PIECE = 128, 1024
WAL_FRAME, IN_FLIGHT = 4 << 20, 15
CHUNK, TAG = 32 << 10, 16
CRC_TABLE = list(range(256))
for _ in range(8):
    CRC_TABLE = [(c >> 1) ^ (0x82F63B78 if c & 1 else 0) for c in CRC_TABLE]


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
    except (OSError, LookupError, ValueError, TypeError, AttributeError, struct.error, zstandard.ZstdError) as error:
        raise Damage(f"{key}: {type(error).__name__}: {error}") from error


# --- the parts objects are made of

@functools.cache
def power(n):
    """x to the n modulo the polynomial of CRC-32C, in binary; digits read in base 4 are a square."""
    result = 1
    for bit in f"{n:b}":
        result = int(f"{result:b}", 4) << int(bit)
        while result >> 32:
            result ^= 0x11EDC6F41 << result.bit_length() - 33
    return result


def crc32c(data):
    """CRC-32C. Of what is long, the first half is folded onto the second: by bits with the same remainder there."""
    crc, table, bits = 0xFFFFFFFF, CRC_TABLE, 8 * len(data)
    if bits > 4096:
        value, crc = int.from_bytes(data, "little") ^ crc, 0
        while bits > 4096:
            half = bits // 16 * 8 - 32
            bits -= half
            first, value = value & ((1 << half) - 1), value >> half
            for k in range(32):
                if power(bits) >> k & 1:
                    value ^= first << (bits - half - k)
        data = value.to_bytes(bits // 8, "little")
    for byte in data:
        crc = table[(crc ^ byte) & 255] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def lsn(text):
    """`A/4000028` as a number."""
    high, low = text.split("/")
    return int(high, 16) << 32 | int(low, 16)


def parse_document(key, raw, kind):
    """A JSON object with a `check`."""
    body, separator, tail = raw.rpartition(b',\n  "check": "')
    demand(separator and tail == b'%08x"\n}\n' % crc32c(body), key, "the check does not hold")
    content = json.loads(raw)
    demand(content["kind"] == kind, key, f"is no {kind}")
    return content


def split_head(key, raw, kind):
    """The head of an object as a dictionary, and the bytes after it."""
    magic, rest = struct.unpack_from("<II", raw)
    demand(magic == HEAD_MAGIC and 8 + rest <= len(raw), key, "has no whole head")
    demand(struct.pack("<I", crc32c(raw[8:4 + rest])) == raw[4 + rest:8 + rest], key, "the head's CRC does not hold")
    head = json.loads(raw[8:4 + rest])
    demand(head["format"] == kind, key, f"is no {kind}")
    return head, raw[8 + rest:]


def unpack(key, frame, plain=None):
    """Content of one zstd frame; zstd itself verifies its XXH64."""
    size, checksum = zstandard.frame_content_size(frame), zstandard.get_frame_parameters(frame).has_checksum
    demand(checksum and size >= 0, key, "a frame lacks its checksum or size")
    demand(plain in (None, size), key, f"a frame holds {size} bytes instead of {plain}")
    return zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)


def unpack_all(key, body, frames, digest):
    """Content of a body of frames of these stored and plain lengths, once all and their SHA-256 proved right."""
    ends = [0, *itertools.accumulate(stored for stored, _ in frames)]
    demand(ends[-1] == len(body), key, f"has {len(body)} bytes of frames instead of {ends[-1]}")
    demand(sha256(body) == digest, key, "the SHA-256 of the frames does not hold")
    return b"".join(unpack(key, body[at:at + stored], plain) for at, (stored, plain) in zip(ends, frames))


def segment_name(timeline, number, size):
    """Name of the segment with this number, counted from the beginning of all WAL."""
    log, place = divmod(number, (1 << 32) // size)
    return f"{timeline:08X}{log:08X}{place:08X}"


def numbered(generation, kind, number):
    """Key of a `log` entry or `collected` bound."""
    return f"generations/{generation:08d}/{kind}/{number:012d}"


def advance(key, head, at, size):
    """Where a log stands after an entry, as timeline and position, if it stood `at` before."""
    if head["kind"] not in ("open", "wal", "heartbeat"):
        return at
    here = head["timeline"], lsn(head["start" if head["kind"] == "wal" else "lsn"])
    begins = head["kind"] == "open" and at is None
    demand(begins or here == at, key, "does not continue the entry before")
    demand(not begins or here[1] % size == 0, key, "does not begin with a segment")
    if head["kind"] != "wal":
        return here
    end = lsn(head["end"])
    demand((end - 1) // size == here[1] // size, key, "lies in more than one segment")
    return here[0], end


# --- encryption

class Vault:
    """Opens the chunks of encrypted objects."""

    def __init__(self, key, key_id):
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF
        self.derive = lambda purpose, length: HKDF(hashes.SHA256(), length, None, purpose).derive(key)
        demand(self.derive(b"perennial key id 1", 8).hex() == key_id, "perennial.json", "is encrypted with another key")

    @functools.lru_cache(maxsize=64)
    def sealed(self, name):
        from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV
        return AESGCMSIV(self.derive(b"perennial object 1 " + name.encode(), 32))

    def read(self, name, file, offset, length):
        from cryptography.exceptions import InvalidTag
        size = os.fstat(file.fileno()).st_size
        last, number, plain = max(-(-size // (CHUNK + TAG)), 1) - 1, offset // CHUNK, b""
        file.seek(number * (CHUNK + TAG))
        behind = ENDLESS if length < 0 else offset + length
        begin = number * CHUNK
        while number <= last and begin + len(plain) < behind:
            nonce = number.to_bytes(8, "big") + bytes([0, 0, 0, number == last])
            try:
                plain += self.sealed(name).decrypt(nonce, file.read(CHUNK + TAG), None)
            except InvalidTag:
                raise Damage(f"{name}: chunk {number} does not prove right: altered, cut or moved here") from None
            number += 1
        return plain[offset - begin:behind - begin]


# --- objects

class Repository:
    """The objects below one directory."""

    def __init__(self, directory, key_file=None):
        self.directory = directory.removeprefix("file://")
        self.vault = None
        with reading("perennial.json"):
            descriptor = parse_document("perennial.json", self.read("perennial.json"), "perennial/repository")
            demand(descriptor["min_reader"] <= 2, "perennial.json", "needs a newer reader")
            self.id = descriptor["repository_id"]
            if encryption := descriptor.get("encryption"):
                demand(encryption["cipher"] == "aes-256-gcm-siv/1", "perennial.json", "another cipher")
                demand(key_file, "perennial.json", "is encrypted: --key-file is needed")
                with open(key_file, encoding="ascii") as file:
                    self.vault = Vault(bytes.fromhex(file.read()), encryption["key_id"])

    def read(self, key, offset=0, length=-1):
        with reading(key), open(os.path.join(self.directory, key), "rb") as file:
            if self.vault and key != "perennial.json" and not key.startswith(("keys/", "perennial.probe/")):
                return self.vault.read(key, file, offset, length)
            file.seek(offset)
            return file.read(length)

    def has(self, key):
        return os.path.exists(os.path.join(self.directory, key))

    def keys(self, prefix=""):
        walk = os.walk(os.path.join(self.directory, prefix))
        return sorted(os.path.relpath(f"{at}/{name}", self.directory) for at, _, names in walk for name in names)

    def found(self, pattern):
        """What the pattern's group matches in the keys that match it, newest first."""
        matches = (re.fullmatch(pattern, key) for key in self.keys())
        return sorted({match[1] for match in matches if match}, reverse=True)

    def backups(self):
        """Ids of the backups that exist: with a manifest and not deleted, newest first."""
        return [id for id in self.found("backups/([^/]+)/manifest") if not self.has(f"backups/{id}/deleted")]

    def generations(self):
        return [int(number) for number in self.found(r"generations/(\d{8})/.*")]

    def generation(self, number):
        key = f"generations/{number:08d}/generation.json"
        with reading(key):
            claim = parse_document(key, self.read(key), "perennial/generation")
            demand((claim["parent"] or 0) < number == claim["generation"], key, "its number or parent is wrong")
            return claim

    def lineage(self, number):
        """A generation and its ancestors, newest first."""
        line = []
        while number is not None:
            line.append(number)
            number = self.generation(number)["parent"]
        return line

    def wal_index(self, line):
        """A lineage's WAL files by name: up to where they hold their content, and the keys it is joined from.

        A newer generation's file goes before an older's, any file before what logs hold, and the longest of that.
        Logs are read first: what is collected from one has become a file by then."""
        index = {}
        for number in line:
            for name, (length, keys) in self.log_parts(number).items():
                index[name] = max(index.get(name, (0, [])), (length, keys), key=lambda part: part[0])
        for key in (key for number in reversed(line) for key in self.keys(f"generations/{number:08d}/wal")):
            index[os.path.basename(key).removesuffix(".zst")] = ENDLESS, [key]
        return index

    def wal_content(self, part):
        """What `wal_index` tells of a name, read."""
        return b"".join((self.wal_file if key.endswith(".zst") else self.entry)(key)[1] for key in part[1])

    def wal_file(self, key, with_crc=False):
        """Head and content of a WAL object."""
        with reading(key):
            head, body = split_head(key, self.read(key), "perennial/wal/1")
            demand(head["name"] + ".zst" == os.path.basename(key), key, f"holds {head['name']}")
            demand(all(plain <= WAL_FRAME for _, plain in head["frames"]), key, "a frame is too long")
            content = unpack_all(key, body, head["frames"], head["stored_sha256"])
            demand(len(content) == head["size"], key, "is not the file's content")
            demand(not with_crc or crc32c(content) == head["crc32c"], key, "the content's CRC-32C does not hold")
            return head, content

    def entry(self, key, with_crc=False):
        """Head and content of a log entry, and the SHA-256 of all of it."""
        with reading(key):
            raw = self.read(key)
            head, body = split_head(key, raw, "perennial/log/1")
            demand(numbered(head["generation"], "log", head["number"]) == key, key, "belongs elsewhere")
            if head["kind"] != "wal":
                demand(not body, key, "has more than a head")
                return head, b"", sha256(raw)
            length = lsn(head["end"]) - lsn(head["start"])
            demand(0 < length <= WAL_FRAME, key, f"is about {length} bytes")
            content = unpack(key, body, length)
            demand(not with_crc or crc32c(content) == head["crc32c"], key, "the content's CRC-32C does not hold")
            return head, content, sha256(raw)

    def numbers(self, generation, kind):
        """Numbers of the `log` entries or `collected` bounds of a generation."""
        found = (re.fullmatch(r".*/(\d{12})", key) for key in self.keys(f"generations/{generation:08d}/{kind}"))
        return sorted(int(match[1]) for match in found if match)

    def bound(self, generation):
        return max(self.numbers(generation, "collected"), default=1)

    def collected(self, generation, number):
        """Where the WAL of a bound's entry begins, as timeline and position."""
        key = numbered(generation, "collected", number)
        with reading(key):
            content = parse_document(key, self.read(key), "perennial/collected")
            demand(content["number"] == number, key, f"is number {content['number']}")
            return content["position"]["timeline"], lsn(content["position"]["lsn"])

    def log(self, generation, with_crc=False):
        """Heads of the entries of a log that count; from the start whenever the bound has moved meanwhile."""
        while True:
            bound = self.bound(generation)
            try:
                heads = list(self.follow(generation, bound, with_crc))
            except Damage:
                if bound == self.bound(generation):
                    raise
            else:
                if bound == self.bound(generation):
                    return heads

    def follow(self, generation, bound, with_crc):
        """Heads of a log's entries from the bound to the first hole or seal, each proved to follow the one before."""
        size, at, before = self.generation(generation)["segment_size"], None, None
        if self.has(numbered(generation, "collected", bound)):
            at = self.collected(generation, bound)
        for number in itertools.count(bound):
            key = numbered(generation, "log", number)
            if not self.has(key):
                return
            head, _, digest = self.entry(key, with_crc)
            with reading(key):
                sealed = head["kind"] == "seal"
                foreign = sealed and head["by"] != generation
                demand(not foreign or head["by"] > generation and not head["released"], key, "is a seal by none newer")
                expected = None if number == 1 or foreign else before or head["previous"]
                demand(head.get("previous") == expected, key, "`previous` is not the entry before")
                at, before = advance(key, head, at, size), digest
            yield head
            if sealed:
                return

    def log_parts(self, generation):
        """Segments that a log holds from their beginning, by name: how many bytes, and the keys of the entries."""
        size, parts = self.generation(generation)["segment_size"], {}
        for head in self.log(generation):
            if head["kind"] == "wal":
                start, end = lsn(head["start"]), lsn(head["end"])
                name = segment_name(head["timeline"], start // size, size)
                keys = parts.get(name, (0, []))[1] + [numbered(generation, "log", head["number"])]
                if start % size == 0 or name in parts:
                    parts[name] = end - start // size * size, keys
        return parts

    def manifest(self, backup):
        """Head and text of a manifest, and its lines by kind, as lists of values."""
        return self.listed(f"backups/{backup}/manifest", "perennial/backup/1")

    def beside(self, key):
        """The same of a snapshot of a directory beside the database."""
        head, text, lines = self.listed(key, "perennial/beside/1")
        demand([head["name"], head["write_id"]] == key.split("/")[3:], key, "belongs elsewhere")
        return head, text, lines

    def listed(self, key, kind):
        """An object that lists files."""
        with reading(key):
            head, body = split_head(key, self.read(key), kind)
            backup = key.split("/")[1]
            demand(head["backup_id"] == backup and head["repository_id"] == self.id, key, "belongs elsewhere")
            text = unpack_all(key, body, head["frames"], head["frames_sha256"])
            lines = {"pack": [], "dir": [], "link": [], "file": [], "end": []}
            for count, line in enumerate(text.splitlines()):
                for kind, value in json.loads(line).items():
                    lines.setdefault(kind, []).append(value)
            demand(lines["end"] == [count] == [value], key, "the end line is wrong or missing")
            counted = [len(lines["file"]), sum(file["size"] for file in lines["file"])]
            demand(counted == [head["files"], head["bytes"]], key, "a count is wrong")
            demand(len(lines["pack"]) == head.get("packs", len(lines["pack"])), key, "a count is wrong")
            return head, text, lines

    def file_content(self, packs, file, with_crc=False):
        """The regions of a manifest's file, one by one."""
        def frame(number, offset, stored, digest, plain):
            key = f"packs/{packs[number]}"
            frame, where = self.read(key, offset, stored), f"{key} at {offset} ({file['path']})"
            demand(sha256(frame) == digest, where, "the frame's SHA-256 does not hold")
            with reading(where):
                return unpack(where, frame, plain)

        for number, offset, stored, plain, crc, digest, *patches in file["regions"]:
            content = bytearray(frame(number, offset, stored, digest, plain))
            where = f"{packs[number]} at {offset} ({file['path']})"
            for patch_number, patch_offset, stored, all_patches, digest, begin, length in patches[0] if patches else []:
                patch = frame(patch_number, patch_offset, stored, digest, all_patches)[begin:begin + length]
                demand(len(patch) == length > PAGES, where, "a patch is longer than its frame")
                at = PAGES
                for piece in range(PAGES * 8):
                    if patch[piece // 8] >> piece % 8 & 1:
                        content[piece * PIECE:(piece + 1) * PIECE] = patch[at:at + PIECE]
                        at += PIECE
                demand(at == length, where, "a patch has another length than its masks say")
            demand(len(content) == plain, where, "a patch replaces what is not there")
            demand(not (with_crc or patches) or crc32c(content) == crc, where, "the content's CRC-32C does not hold")
            yield content

    def pack_frames(self, key):
        """Stored frames of a pack by its index, which must list all that lies between head and index."""
        with reading(key):
            raw = self.read(key)
            head, body = split_head(key, raw, "perennial/pack/1")
            demand(head["pack_id"] == os.path.basename(key), key, f"is pack {head['pack_id']}")
            crc, length, mark = struct.unpack("<II4s", raw[-12:])
            index, end = raw[-length:], len(raw) - len(body)
            whole = mark == b"PIDX" and index[:8] == struct.pack("<II", INDEX_MAGIC, length - 8)
            demand(whole and crc32c(index[8:-12]) == crc, key, "has no whole index")
            for offset, stored, digest in json.loads(index[8:-12]):
                frame = raw[offset:offset + stored]
                demand(offset == end and sha256(frame) == digest, key, f"the frame at {offset} is not the index's")
                end += stored
                yield frame
            demand(end + length == len(raw), key, f"the bytes at {end} are in no frame")


# --- which backup, which WAL

def timelines(repo, index):
    """The timelines that lead to the newest one, as pairs of number and end, oldest first.

    One that was left behind the point where a later one was counts up to that point."""
    newest, path = max((int(name[:8], 16) for name in index), default=1), []
    if newest > 1:
        name = f"{newest:08X}.history"
        demand(name in index, f"generations/*/wal/{name}.zst", "missing")
        for line in repo.wal_content(index[name]).decode().splitlines():
            if match := re.match(r"\s*(\d+)\s+([0-9A-Fa-f]+/[0-9A-Fa-f]+)", line):
                path.append((int(match[1]), lsn(match[2])))
    path.append((newest, ENDLESS))
    ends = [*itertools.accumulate((end for _, end in reversed(path)), min)]
    return [(timeline, end) for (timeline, _), end in zip(path, reversed(ends))]


def plan(repo, backup=None):
    """Choose what to restore: a backup's head and lines, the lineage's WAL, the timelines to follow, the segments.

    A backup can be used if its generation is in the lineage and it ended before the newest timeline left the backup's.
    Without `backup` only the newest generation's lineage counts, with it also one that was left behind."""
    for number in repo.generations() if backup else repo.generations()[:1]:
        line = repo.lineage(number)
        index = repo.wal_index(line)
        path = timelines(repo, index)
        for candidate in [backup] if backup else repo.backups():
            head, _, lines = repo.manifest(candidate)
            if head["generation"] in line and lsn(head["stop_lsn"]) <= dict(path).get(head["timeline"], 0):
                return head, lines, index, path, segments(index, path, head)
    raise Damage(f"backups/{backup or '*'}/manifest: missing, or of no use for the newest state")


def segments(index, path, head):
    """Names of the segments to replay, each with the number of bytes that count; refuses holes."""
    size, on, chosen, later = head["segment_size"], {}, [], False
    first, stop = lsn(head["start_lsn"]) // size, lsn(head["stop_lsn"])
    for name in filter(re.compile("[0-9A-F]{24}").fullmatch, index):
        number = int(name[8:16], 16) * ((1 << 32) // size) + int(name[16:], 16)
        on.setdefault(int(name[:8], 16), {})[number] = number * size + min(size, index[name][0])
    start = [timeline for timeline, _ in path].index(head["timeline"])
    for place in reversed(range(start, len(path))):
        timeline, end = path[place]
        since = path[place - 1][1] if place > start else first * size
        begin = max(first, since // size)
        have = {n: reach for n, reach in on.get(timeline, {}).items()
                if n >= begin and reach >= since and n * size < end}
        # All must be there up to the last one, and what the backup needs; the next timeline repeats an unfinished one.
        goal = end // size * size if later else max(max(have, default=0) * size, stop if place == start else 0)
        for n in range(begin, -(-goal // size)):
            name = segment_name(timeline, n, size)
            key = f"generations/*/wal/{name[:8]}/{name[8:16]}/{name}.zst"
            demand(n in have, key, "missing")
            switched = later and (n + 1) * size == end
            demand(switched or have[n] >= min(goal, (n + 1) * size), key, "missing, and logs hold only a part of it")
        chosen += [(segment_name(timeline, n, size), min(reach, end) - n * size) for n, reach in have.items()]
        later = later or bool(have)
    return sorted(chosen)


# --- commands

def write(path, content, mode=0o600):
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.writelines(content)
        os.fchmod(file.fileno(), mode)


def empty_directory(path):
    os.makedirs(path, mode=0o700, exist_ok=True)
    demand(not os.listdir(path), path, "is not empty")
    os.chmod(path, 0o700)


def make_directories(lines, below, moved):
    """Make directories and links, parents first: directories of a tablespace lie behind its link."""
    for entry in sorted(lines["dir"] + lines["link"], key=lambda entry: entry["path"]):
        path = below(entry["path"])
        if "target" in entry:
            place = moved.get(os.path.basename(path), entry["target"])
            empty_directory(place)
            os.symlink(place, path)
        else:
            os.mkdir(path)
            os.chmod(path, entry["mode"])


def configure(target, timeline, in_place):
    """Have PostgreSQL replay the archive; settings that the backup brought along must not stand in the way."""
    settings = {f"recovery_target{name}": "" for name in ("", "_time", "_xid", "_lsn", "_name")}
    archive = shlex.quote(os.path.join(os.path.abspath(target), "pg_wal_archive")).replace("%", "%%")
    settings |= {"recovery_target_timeline": timeline, "restore_command": f'cp {archive}/%f "%p"'}
    settings["archive_mode"] = "off"
    if in_place:
        settings["allow_in_place_tablespaces"] = "on"
    with open(os.path.join(target, "postgresql.auto.conf"), "a", encoding="utf-8") as file:
        for name, value in settings.items():
            file.write("\n{} = '{}'\n".format(name, str(value).replace("\\", "\\\\").replace("'", "''")))
    write(os.path.join(target, "recovery.signal"), [])


def restore(repo, target, backup, moved):
    """Restore a backup and the WAL after it, the latter below `pg_wal_archive`."""
    head, lines, index, path, needed = plan(repo, backup)

    def below(path):
        demand(not os.path.isabs(path) and ".." not in path.split("/"), path, "is no path below the data directory")
        return os.path.join(target, path)

    for oid in moved:
        demand(f"pg_tblspc/{oid}" in [link["path"] for link in lines["link"]], f"--tablespace {oid}", "no such link")
    empty_directory(target)
    make_directories(lines, below, moved)
    for name, count in needed:
        content = repo.wal_content(index[name])[:count]
        write(below(f"pg_wal_archive/{name}"), [content.ljust(head["segment_size"], b"\0")])
    for name in (f"{timeline:08X}.history" for timeline, _ in path):
        if name in index:
            write(below(f"pg_wal_archive/{name}"), [repo.wal_content(index[name])])
    for file in sorted(lines["file"], key=lambda file: file["path"] == "global/pg_control"):
        if file.get("outside"):
            print(f"note: {file['outside']} is now outside/{file['path']} in the data directory", file=sys.stderr)
            file["path"] = f"outside/{file['path']}"
        write(below(file["path"]), repo.file_content(lines["pack"], file), file["mode"])
    write(below("backup_label"), [head["backup_label"].encode()])
    if text := head.get("tablespace_map"):
        for oid, place in moved.items():  # PostgreSQL makes the links anew from this file
            text = re.sub(rf"^{oid} .*$", lambda _: f"{oid} {place}", text, flags=re.MULTILINE)
        write(below("tablespace_map"), [text.encode()])
    configure(target, path[-1][0], any("location" not in space for space in head["tablespaces"]))
    print(f"restored {head['backup_id']}: {head['files']} files, WAL {needed[0][0]} to {needed[-1][0]}")


def put_back(repo, key, target):
    """Put back a directory beside the database from one snapshot."""
    head, _, lines = repo.beside(key)
    empty_directory(target)
    for entry in sorted(lines["dir"] + lines["file"] + lines["link"], key=lambda entry: entry["path"]):
        path = os.path.join(target, entry["path"])
        demand(".." not in entry["path"].split("/") and not os.path.isabs(entry["path"]), key, "a path leads outside")
        if "target" in entry:
            os.symlink(entry["target"], path)
        elif "regions" in entry:
            write(path, repo.file_content(lines["pack"], entry), entry["mode"])
        else:
            os.mkdir(path)
    for entry in sorted(lines["dir"], key=lambda entry: entry["path"], reverse=True):
        os.chmod(os.path.join(target, entry["path"]), entry["mode"])
    print(f"{head['name']}: {head['files']} files, not ahead of {head['lsn']}")


def check_log(repo, generation):
    """Verify a log and its bounds. Entries that never counted may be anything, but few can lie behind a hole."""
    for number in repo.numbers(generation, "collected"):
        if repo.has(numbered(generation, "collected", number)):
            repo.collected(generation, number)
    bound, heads, behind = repo.bound(generation), repo.log(generation, with_crc=True), []
    if heads and heads[-1]["kind"] == "seal":
        return
    hole = heads[-1]["number"] + 1 if heads else bound
    for number in repo.numbers(generation, "log"):
        if number > hole:
            with contextlib.suppress(Damage):
                behind.append(repo.entry(numbered(generation, "log", number))[0])
    key = numbered(generation, "log", hole)
    if not repo.has(key) and repo.bound(generation) == bound:  # else it was only just written
        for head in behind:  # what its writer had on its way, and seals that others put ahead
            seal = head["kind"] == "seal"
            explained = not head["released"] if seal else head["number"] <= hole + IN_FLIGHT
            demand(explained, key, f"missing, and entry {head['number']} shows that it was there")


def check_key(repo, key):
    """Verify one object; the descriptor was verified when the repository was opened."""
    parts = key.split("/")
    if re.fullmatch(r"generations/\d{8}/generation\.json", key):
        repo.generation(int(parts[1]))
        check_log(repo, int(parts[1]))
    elif re.fullmatch(r"generations/\d{8}/wal/(([0-9A-F]{8})/([0-9A-F]{8})/\2\3.*|[0-9A-F]{8}\.history)\.zst", key):
        same = repo.wal_file(key, with_crc=True)[0]["system_id"] == repo.generation(int(parts[1]))["system_id"]
        demand(same, key, "is of another cluster")
    elif re.fullmatch(r"backups/[^/]+/(begun|deleted|pins/[0-9a-f]{32})", key):
        kind = {"begun": "begun", "deleted": "tombstone", "pins": "pin"}[parts[2]]
        parse_document(key, repo.read(key), f"perennial/{kind}")
    elif re.fullmatch(r"(prunes|drills|verifications)/[0-9a-f]{16}-[0-9a-f]{32}", key):
        parse_document(key, repo.read(key), f"perennial/{parts[0][:-1]}")
    elif parts[0] == "backups" and parts[1] not in repo.backups():
        pass  # what a deleted backup names may be gone
    elif re.fullmatch(r"backups/[^/]+/beside/[a-z0-9_-]{1,60}/[0-9a-f]{32}", key):
        head, _, lines = repo.beside(key)
        for file in lines["file"]:
            size = sum(map(len, repo.file_content(lines["pack"], file, with_crc=True)))
            demand(size == file["size"], key, f"{file['path']} has {size} bytes in its regions")
    elif re.fullmatch(r"backups/[^/]+/manifest", key):
        head, _, lines = repo.manifest(parts[1])
        for file in lines["file"]:
            size = sum(map(len, repo.file_content(lines["pack"], file, with_crc=True)))
            demand(size == file["size"], key, f"{file['path']} has {size} bytes in its regions")
        segments(repo.wal_index(repo.lineage(head["generation"])), [(head["timeline"], lsn(head["stop_lsn"]))], head)
    elif re.fullmatch(r"packs/[0-9a-f]{32}", key):
        list(map(len, repo.pack_frames(key)))
    elif re.fullmatch(r"keys/[0-9a-f]{16}/\d{8}", key):
        demand(repo.read(key).startswith(b"-----BEGIN AGE ENCRYPTED FILE-----"), key, "is no armored age file")
    elif key != "perennial.json" and not re.fullmatch(r"generations/\d{8}/(log|collected)/\d{12}", key):
        print(f"note: {key} is no object of this format", file=sys.stderr)


def check(repo):
    """Verify all objects, and that there is a way to the newest state. Print one line per damage."""
    keys, damages = repo.keys(), {}
    newest = max(repo.generations(), default=0)
    claims = [f"generations/{number:08d}/generation.json" for number in range(1, newest + 1)]
    tasks = [(check_key, repo, key) for key in sorted({*keys, *claims})]
    tasks += [(plan, repo)] if repo.backups() else []
    for task, *arguments in tasks:
        try:
            with reading(arguments[-1]):
                task(*arguments)
        except Damage as damage:
            damages[str(damage)] = True
    for damage in damages:
        print(f"reader.py: {damage}", file=sys.stderr)
    print(f"{len(keys)} objects, {len(damages)} damages")
    return 1 if damages else 0


def cat(repo, key):
    """Print an object as `zstd -d` would, once it proved right."""
    if key.endswith(".zst"):
        content = [repo.wal_file(key)[1]]
    elif "/log/" in key:
        content = [repo.entry(key)[1]]
    elif key.endswith("/manifest"):
        content = [repo.manifest(key.split("/")[1])[1]]
    elif "/beside/" in key:
        content = [repo.beside(key)[1]]
    elif key.startswith("packs/"):
        content = (unpack(key, frame) for frame in repo.pack_frames(key))
    else:
        content = [repo.read(key)]
        names = {"begun": "begun", "deleted": "tombstone"}
        places = {"/collected/": "collected", "/pins/": "pin", "prunes/": "prune", "drills/": "drill",
                  "verifications/": "verification", "generations/": "generation"}
        kind = names.get(key.split("/")[-1]) or next((places[part] for part in places if part in key), "repository")
        parse_document(key, content[0], f"perennial/{kind}")
    sys.stdout.buffer.writelines(content)


def main():
    parser = argparse.ArgumentParser(description="Read a repository as docs/format.md describes it")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("restore", "beside", "check", "cat"):
        commands.add_parser(name).add_argument("repo")
        commands.choices[name].add_argument("--key-file", metavar="FILE")
    commands.choices["restore"].add_argument("target")
    commands.choices["restore"].add_argument("--backup", metavar="ID")
    commands.choices["restore"].add_argument("--tablespace", metavar="OID=DIR", action="append", default=[])
    commands.choices["cat"].add_argument("key")
    commands.choices["beside"].add_argument("key")
    commands.choices["beside"].add_argument("target")
    args = parser.parse_args()
    try:
        repo = Repository(args.repo, args.key_file)
        if args.command == "check":
            return check(repo)
        if args.command == "cat":
            return cat(repo, args.key)
        if args.command == "beside":
            return put_back(repo, args.key, args.target)
        moved = {oid: os.path.abspath(place) for oid, place in (item.split("=", 1) for item in args.tablespace)}
        return restore(repo, args.target, args.backup, moved)
    except (Damage, OSError) as problem:
        return f"reader.py: {problem}"


if __name__ == "__main__":
    sys.exit(main())
