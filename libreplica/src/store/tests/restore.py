#!/usr/bin/python3
"""Restores a recovery point from the folder of a volume in a store: with nothing of ours, from what
docs/store.md and docs/hrl-format.md say. Checksums of frames are looked at, proofs of seals are not.
Usage: restore.py FOLDER POINT OUTPUT [KEY IN HEX]"""
import json, os, struct, sys, zlib

PAGE, PAYLOAD, WRITE, LZ4, ENCRYPTED = 4096, 4064, 1, 1, 2


def newest_catalogue(folder):
    """Of the copies that are whole, the one with the highest sequence number."""
    copies = []
    for name in ("catalogue.0", "catalogue.1"):
        try:
            with open(os.path.join(folder, name), "rb") as file:
                line, _, body = file.read().partition(b"\n")
        except FileNotFoundError:
            continue
        head, _, crc = line.rpartition(b" ")
        if crc == b"%08x" % zlib.crc32(head + body):
            magic, version, sequence, length = head.split(b" ")
            assert (magic, version, int(length)) == (b"replica-catalogue", b"1", len(body))
            copies.append((int(sequence), json.loads(body)))
    return max(copies, key=lambda copy: copy[0])[1]


class Log:
    """A sealed log, as far as its index leads."""

    def __init__(self, path, key):
        self.file, self.key = open(path, "rb"), key
        self.trailer = self.read(os.path.getsize(path) - PAGE, PAGE)
        assert self.trailer[:8] == b"\x89HRLEND\n", f"{path} has no seal"
        assert zlib.crc32(self.trailer[:-4]) == struct.unpack("<I", self.trailer[-4:])[0]
        self.size = struct.unpack_from("<Q", self.trailer, 56)[0]
        self.directory = self.section(72, 48)
        self.held = None, None

    def read(self, at, length):
        return os.pread(self.file.fileno(), length, at)

    def section(self, at, size):
        """The entries of the section that the trailer names at this place."""
        start, pages, count = struct.unpack_from("<QQQ", self.trailer, at)
        entries = []
        for number in range(pages):
            page = self.read(start + number * PAGE, PAGE)
            assert zlib.crc32(page[:-4]) == struct.unpack("<I", page[-4:])[0]
            used = size * min(PAYLOAD // size, count - len(entries))
            entries += [page[n:n + size] for n in range(0, used, size)]
        return entries

    def index(self):
        return [struct.unpack("<QQIIB7x", entry) for entry in self.section(96, 32)]

    def data(self, number):
        """The plain data of a frame."""
        if self.held[0] == number:
            return self.held[1]
        at, _, span = struct.unpack_from("<QQI", self.directory[number])
        frame = self.read(at, span)
        head_crc, data_crc = struct.unpack_from("<II", frame, 4)
        origin = frame[40:56]
        flags, _, records, plain, stored, nonce = struct.unpack_from("<IQIII12s", frame, 76)
        table_end = 128 + 32 * records
        assert head_crc == zlib.crc32(frame[8:table_end]) and data_crc == zlib.crc32(frame[table_end:])
        data = frame[table_end:table_end + stored]
        if flags & ENCRYPTED:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
            from cryptography.hazmat.primitives import hashes
            from cryptography.hazmat.primitives.kdf.hkdf import HKDF
            key = HKDF(hashes.SHA256(), 32, origin, b"hrl 3 log key").derive(self.key)
            data = AESGCM(key).decrypt(nonce, data, frame[40:table_end])
        if flags & LZ4:
            import lz4.block
            data = lz4.block.decompress(data, uncompressed_size=plain)
        self.held = number, data
        return data


def copy_base(folder, output):
    """Reads 4 MiB at a time and leaves out what is zeroes."""
    with open(os.path.join(folder, "base.img"), "rb") as base:
        at = 0
        while part := base.read(4 << 20):
            if any(part):
                os.pwrite(output, part, at)
            at += len(part)


def restore(folder, point, output, key):
    catalogue = newest_catalogue(folder)
    [point] = [known for known in catalogue["points"] if known["id"] == point]
    if catalogue["key"] is None:
        copy_base(folder, output)
        os.ftruncate(output, catalogue["base"]["size_bytes"])
    for entry in catalogue["logs"]:
        if entry["last_epoch"] > point["epoch"]:
            break
        log = Log(os.path.join(folder, "logs", f"{entry['first_epoch']:016x}-{entry['log']}.hrl"), key)
        os.ftruncate(output, log.size)
        for offset, length, frame, at, kind in log.index():
            new = log.data(frame)[at:at + length] if kind == WRITE else bytes(length)
            os.pwrite(output, new, offset)
    os.ftruncate(output, point["size_bytes"])
    os.fsync(output)


if __name__ == "__main__":
    key = bytes.fromhex(sys.argv[4]) if len(sys.argv) > 4 else None
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    restore(sys.argv[1], sys.argv[2], os.open(sys.argv[3], flags, 0o600), key)
