#!/usr/bin/python3
"""Reads a native .hrl log: the second opinion, written from docs/hrl-format.md alone. Lists the
records, says how the log ends, and prints the SHA-256 of the image that they leave behind. The
numbers are the rules of the document's "What a reader must check". Usage: reader.py LOG [KEY]"""
import hashlib, struct, sys, zlib
from collections import namedtuple
from types import SimpleNamespace
try:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF
except ImportError as missing:
    sys.exit(f"{missing}: apt-get install python3-cryptography")

PAGE, PAYLOAD, LZ4, ENCRYPTED, MOVED, IN_ORDER = 4096, 4064, 1, 2, 4, 1
KINDS = ["none", "write", "zeroes", "discard", "tag", "resize"]
WRITE, ZEROES, DISCARD, TAG, RESIZE = range(1, 6)

class Bad(Exception):
    """The rule that the log breaks."""

def need(rule, *holds):
    if not all(holds):
        raise Bad(rule)

def attempt(rule, work, *arguments, **named):
    try:
        return work(*arguments, **named)
    except (InvalidTag, UnicodeDecodeError, IndexError):
        raise Bad(rule) from None

def structure(layout, fields):
    packed, made = struct.Struct("<" + layout), namedtuple("Structure", fields)
    return lambda data, at=0: made(*packed.unpack_from(data, at))

Header = structure("8sIIQQ16s16s16sQ16sQQQIIq16s32s16s32s3852sI", "magic version page compatible "
    "features log previous volume generation generation_id first last size block sector created key "
    "previous_seal stands_for stands_for_seal reserved crc")
Frame = structure("4sIII16sQ16s16sIIQIII12s16s", "magic head_crc data_crc number log position "
    "origin_log origin_header origin_number flags first records plain stored nonce reserved")
Record = structure("BB2sI16sq", "kind flags reserved data extent time")
TagData = structure("HH4s16s32s", "flags label reserved group root")
Footer = structure("16s4sIII", "log kind number used crc")
Index = structure("QQIIB7s", "offset length frame at kind reserved")
Section = structure("QQQ", "at pages entries")
Trailer = structure("8sII16sQQQQq24s24s24s24s32s32s3832s12s16sI", "magic version flags log frames "
    "records data size sealed directory index marks provenance digest previous_seal reserved nonce "
    "proof crc")

def derive(key, salt, info):
    return HKDF(hashes.SHA256(), 32, salt, info).derive(key)

def read_header(file, key):
    need("1: not a log, or another version", file[:12] == b"\x89HRL\r\n\x1a\n\3\0\0\0", len(file) >= PAGE)
    h = Header(file)
    need("1: checksum, features", h.crc == zlib.crc32(file[:PAGE - 4]), h.features < 8)
    need("2", h.page == PAGE, not any(h.reserved), any(h.log), h.first <= h.last)
    need("2: block, sector", h.block in [1 << n for n in range(12, 21)], h.sector in [1 << n for n in range(9, 17)])
    need("2: one epoch", h.first == h.last or not h.compatible & IN_ORDER)
    need("3", any(h.stands_for) or not any(h.stands_for_seal), any(h.key) == bool(h.features & ENCRYPTED))
    need("3: another key", key is None or derive(key, None, b"hrl 3 key id")[:16] == h.key)
    return h

def lz4_block(block, size):
    """Decompresses an LZ4 block into at most `size` bytes. Decoders differ in what they let pass."""
    out, at = bytearray(), 0
    def length(nibble, at):
        more = nibble == 15
        while more:
            nibble, more, at = nibble + block[at], block[at] == 255, at + 1
        return nibble, at
    while True:
        token = block[at]
        literals, at = length(token >> 4, at + 1)
        need("11: LZ4", at + literals <= len(block), len(out) + literals <= size)
        out += block[at:at + literals]
        at += literals
        if at == len(block):
            return bytes(out)
        back = block[at] + 256 * block[at + 1]
        match, at = length(token & 15, at + 2)
        need("11: LZ4", 0 < back <= len(out), len(out) + match + 4 <= size)
        piece = out[-back:]
        out += (piece * ((match + 4) // back + 1))[:match + 4]

def tag_text(data):
    tag, label = TagData(data), data[56:]
    need("11: tag", tag.flags < 4, not any(tag.reserved), tag.label == len(label) <= 1024,
         tag.flags & 1 or not any(tag.group), tag.flags & 2 or not any(tag.root))
    attempt("11: label", label.decode)
    return f" {tag.group.hex()} {tag.root.hex()} {label.hex()}"

def check_table(table, plain, encrypted, size):
    """Returns each record with its offset, its length and its data's place; the size behind them."""
    shapes, regions, at = [], set(), 0
    for r in table:
        offset, length = struct.unpack("<QQ", r.extent)
        need("7: kind", 1 <= r.kind <= RESIZE, not any(r.reserved), r.flags <= (2 if r.kind == TAG else 0))
        need("7: data", r.data >= 56 if r.kind == TAG else r.data == (length if r.kind == WRITE else 0))
        need("7, 10", r.kind > DISCARD or length > 0 and offset + length <= size, r.kind != RESIZE or length == 0)
        regions |= {offset >> 16, (offset + length - 1) >> 16} if r.kind == WRITE else set()
        size = offset if r.kind == RESIZE else size
        shapes.append((r, offset, length, at))
        at += r.data
    need("7: sum", at == plain <= (65536 if encrypted else 1 << 20), not encrypted or len(regions) <= 1)
    return shapes, size

def read_frame(file, at, log):
    """Returns the frame, its records, its data (None if locked), and where it ends."""
    need("4: cut", len(file) - at >= PAGE)
    h, f, number = log.header, Frame(file, at), len(log.directory)
    table_end = at + 128 + 32 * f.records
    stored_end = table_end + f.stored
    end = -(-stored_end // PAGE) * PAGE
    need("4: lengths, cut", 1 <= f.records <= 4096, f.stored <= (1 << 20) + 16, end <= len(file))
    need("5: checksum", f.head_crc == zlib.crc32(file[at + 8:table_end]))
    own = (f.origin_log, f.origin_number, f.origin_header) == (h.log, number, log.digest)
    foreign = h.features & MOVED and f.origin_log != h.log
    need("5: place, origin", (f.log, f.number, f.position) == (h.log, number, at), own or foreign)
    encrypted, packed = f.flags & ENCRYPTED, f.flags & LZ4
    inner = f.stored - (16 if encrypted else 0)
    need("6: flags", f.flags < 4, encrypted == h.features & ENCRYPTED, packed <= h.features & LZ4)
    need("6", 0 <= inner, inner < f.plain if packed else inner == f.plain)
    apart = h.features & MOVED and not h.compatible & IN_ORDER
    need("6, 9", encrypted or not any(f.nonce), not any(f.reserved), apart or f.first == log.records)
    shapes, size = check_table([Record(file, n) for n in range(at + 128, table_end, 32)], f.plain, encrypted, log.size)
    need("8", f.data_crc == zlib.crc32(file[table_end:end]), not any(file[stored_end:end]))
    data, proof = file[table_end:stored_end], b""
    if encrypted:
        cipher, proof = log.key and AESGCM(derive(log.key, f.origin_log, b"hrl 3 log key")), data[-16:]
        data = cipher and attempt("11: proof", cipher.decrypt, f.nonce, data, file[at + 40:table_end])
    if packed and data is not None:
        data = attempt("11: LZ4", lz4_block, data, f.plain)
        need("11: LZ4", len(data) == f.plain)
    texts = ["" if data is None or r.kind != TAG else tag_text(data[at:at + r.data]) for r, _, _, at in shapes]
    log.directory.append(struct.pack("<QQIIII16s", at, f.first, end - at, f.records, f.head_crc, f.data_crc, proof))
    log.plain.append(data)
    log.size, log.records, log.bytes = size, log.records + f.records, log.bytes + f.plain
    return f, shapes, texts, data, end

def apply(f, shapes, texts, data, log):
    """Does what the records say. `kinds` remembers of each byte what it is; 0 is untouched."""
    for n, (r, offset, length, at) in enumerate(shapes):
        told = f"{offset} {length}"
        if r.kind <= DISCARD:
            new = data[at:at + length] if r.kind == WRITE and data is not None else bytes(length)
            told += " " + hashlib.sha256(new).hexdigest() if r.kind == WRITE and data is not None else ""
            log.image[offset:offset + length], log.kinds[offset:offset + length] = new, bytes([r.kind]) * length
        else:
            detail, told = (r.extent, r.extent.hex()) if r.kind == TAG else (struct.pack("<QQ", offset, 0), offset)
            log.marks.append(struct.pack("<BB2xII4xQq", r.kind, r.flags, f.number, n, f.first + n, r.time) + detail)
        if r.kind == RESIZE:
            grown = max(0, offset - len(log.image))
            log.image, log.kinds = log.image[:offset] + bytes(grown), log.kinds[:offset] + b"\3" * grown
        print(f"record {f.number} {f.first + n} {KINDS[r.kind]} {r.flags} {r.time} {told}{texts[n]}")

def entries(file, log, where, kind, size):
    """The entries of a section, each as it lies there."""
    per_page, found = PAYLOAD // size, []
    need("14: counts", where.pages == -(-where.entries // per_page) < 1 << 32)
    for number in range(where.pages):
        page = file[where.at + number * PAGE:][:PAGE]
        used = size * min(per_page, where.entries - len(found))
        footer = (log.header.log, kind, number, used, zlib.crc32(page[:-4]))
        need("16", Footer(page, PAYLOAD) == footer, not any(page[used:PAYLOAD]))
        found += [page[n:n + size] for n in range(0, used, size)]
    return found

def check_index(index, log):
    kinds, end, joins = bytearray(log.size), 0, None
    for e in map(Index, index):
        need("18", e.length, end <= e.offset, not any(e.reserved), e.frame < len(log.directory), 1 <= e.kind <= DISCARD)
        end, ends_at = e.offset + e.length, e.at + e.length if e.kind == WRITE else 0
        need("18: joined, within", (e.offset, e.kind, e.frame, e.at) != joins, end <= log.size, ends_at <= 1 << 20)
        kinds[e.offset:end], joins = bytes([e.kind]) * e.length, (end, e.kind, e.frame, ends_at)
        plain = log.plain[e.frame]
        written = plain is None or plain[e.at:ends_at] == log.image[e.offset:end]
        need("18: data", written if e.kind == WRITE else e.at == 0)
    need("18: what the records come to", kinds == log.kinds)

def read_seal(file, at, log):
    """Rules 12 to 20. Returns the seal digest."""
    h, n = log.header, at
    while file[n:n + 8] != b"\x89HRLEND\n" or file[n + 16:n + 32] != h.log:
        need("12: no seal", n < len(file))
        n += PAGE
    page, t = file[n:], Trailer(file[n:].ljust(PAGE))
    need("12, 20: last page", len(page) == PAGE, t.crc == zlib.crc32(page[:-4]), t.version == 3, not any(t.reserved))
    need("13", h.features & ENCRYPTED if t.flags else h.features & (ENCRYPTED | MOVED) != ENCRYPTED,
         t.flags == 1 or t.flags == 0 and not any(t.nonce + t.proof))
    if t.flags and log.key:
        cipher = AESGCM(derive(log.key, h.log, b"hrl 3 seal key"))
        attempt("13: proof", cipher.decrypt, t.nonce, t.proof, page[:4076])
    directory, index, marks, provenance = map(Section, (t.directory, t.index, t.marks, t.provenance))
    ends = [where.at + where.pages * PAGE for where in (directory, index, marks, provenance)]
    need("14: places", [directory.at, index.at, marks.at, provenance.at, n] == [at, *ends])
    need("14", provenance.entries == provenance.pages, provenance.pages == 0 or h.features & MOVED and not t.flags)
    need("14, 15", t.previous_seal == h.previous_seal, t.digest == hashlib.sha256(file[:PAGE] + file[at:n]).digest())
    need("17", entries(file, log, directory, b"DIRY", 48) == log.directory)
    check_index(entries(file, log, index, b"INDX", 32), log)
    listed = entries(file, log, marks, b"MARK", 48)
    need("19", listed == [mark for mark in log.marks if mark in listed or mark[0] != TAG or not h.features & MOVED])
    need("20", (t.frames, t.records, t.data, t.size) == (len(log.directory), log.records, log.bytes, log.size))
    return f"{hashlib.sha256(page).hexdigest()} {'authenticated' if t.flags else 'plain'}"

key = bytes.fromhex(sys.argv[2]) if len(sys.argv) > 2 else None
with open(sys.argv[1], "rb") as opened:
    file, at = opened.read(), PAGE
h = read_header(file, key)
log = SimpleNamespace(
    header=h, digest=hashlib.sha256(file[:PAGE]).digest()[:16], key=key, size=h.size, directory=[], plain=[],
    marks=[], records=0, bytes=0, image=bytearray(h.size), kinds=bytearray(h.size))
print(f"log {h.log.hex()} volume {h.volume.hex()} epochs {h.first} {h.last} size {h.size} key {h.key.hex()}"
      + " in order" * (h.compatible & IN_ORDER))
try:
    while file[at:at + 4] == b"\x89HFR":
        *frame, end = read_frame(file, at, log)
        apply(*frame, log)
        at = end
    print("sealed", read_seal(file, at, log))
except Bad as bad:
    print(f"torn {at}: rule {bad}")
print(f"image {log.size} {'locked' if None in log.plain else hashlib.sha256(log.image).hexdigest()}")
