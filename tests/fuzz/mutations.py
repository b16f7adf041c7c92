"""Damage done to files, one small step after another: what is shrunk is the list of steps.

A step is (operation, place, value): any whole numbers and bytes are a step, so that any list of
them is a file. Steps work on bytes, or on what a format is made of: entries, opcodes, chunks, keys.
"""

from __future__ import annotations

import io
import json
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any

Step = Sequence[Any]  # (operation, place, value as hexadecimal text)
Mutate = Callable[[bytes, Step], bytes]

NUMBERS = (
    0, 1, -1, 2, 7, 127, 128, 255, 256, 65535, 65536, 2**31 - 1, -(2**31), 2**32 - 1, 2**33,
    2**40, 2**62, 2**63 - 1, -(2**63),
)  # fmt: skip
ODD = (
    None, True, False, 0, 1, -1, 2, 1.5, -0.0, 3.0, 2**31, 2**63, 10**30, 10**400, 1e300,
    -1e300, float("nan"), float("inf"), "", "x", "\0", "\ud800", "\x1b[31m", "x" * 5000,
    "../..", "1e9", "off", "dense", "float32", [], [1], [0] * 1000, [[]], ["x"], {}, {"a": 1},
    {"kind": []}, "8",
)  # fmt: skip
NAMES = (
    "posix system", "os system", "builtins exec", "builtins eval", "builtins print", "os mkdir",
    "subprocess Popen", "numpy load", "torch load", "torch.hub load", "shutil rmtree",
    "collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch FloatStorage",
    "builtins bytearray", "builtins getattr", "torch._utils _rebuild_parameter",
    "argparse Namespace", "numpy.core.multiarray scalar", "numpy dtype", "codecs encode",
    "_codecs encode", "pathlib Path", "tests.fuzz.canary sing",
)  # fmt: skip
"""Names a pickle may ask for: code, what PyTorch's own loader allows, and settings."""


def _value(step: Step) -> bytes:
    return bytes.fromhex(step[2])


def _place(step: Step, length: int) -> int:
    """A place in so many things; half of them near the beginning, where headers are."""
    if not length:
        return 0
    near, place = step[1] & 1, step[1] >> 1
    return place % (min(length, 256) if near else length)


def _number(step: Step) -> int:
    return NUMBERS[(step[1] >> 8) % len(NUMBERS)]


def on_bytes(content: bytes, step: Step) -> bytes:
    """Flip, set, insert, delete, cut, repeat, move and count bytes."""
    place, value = _place(step, len(content)), _value(step) or b"\0"
    operation, data = step[0] % 9, bytearray(content)
    if operation == 0 and data:
        data[place] ^= value[0] or 1
    elif operation == 1:
        data[place : place + len(value)] = value
    elif operation == 2:
        data[place:place] = value
    elif operation == 3:
        del data[place : place + max(len(value), 1)]
    elif operation == 4:
        del data[place:]
    elif operation == 5:
        data[place:place] = data[place : place + 64] * (1 + value[0] % 8)
    elif operation == 6:
        other = (step[1] >> 3) % max(len(data), 1)
        data[place : place + 16] = data[other : other + 16]
    elif operation == 7:
        size, order = ((4, "<"), (4, ">"), (8, "<"), (2, ">"))[value[0] % 4]
        mask = (1 << 8 * size) - 1
        packed = (_number(step) & mask).to_bytes(size, "little" if order == "<" else "big")
        data[place : place + size] = packed
    else:
        data[place : place + 256] = bytes(len(data[place : place + 256]))
    return bytes(data[: 1 << 22])


def on_json(content: bytes, step: Step) -> bytes:
    """Replace, drop, add, rename and nest the values of a JSON text; others are left alone."""
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        return on_bytes(content, step)
    top = [tree]
    holders = list(_walk(top))
    holder, key = holders[step[1] % len(holders)]
    value = ODD[(step[1] >> 7) % len(ODD)]
    operation = step[0] % 6
    if operation < 2:
        holder[key] = value
    elif operation == 2 and isinstance(holder, dict):
        del holder[key]
    elif operation == 3 and isinstance(holder, dict):
        holder[_value(step).decode("latin-1")] = value
    elif operation == 4 and isinstance(holder, dict):
        holder[str(value)[:200]] = holder.pop(key)
    else:
        holder[key] = [holder[key]] * 3 if step[1] & 1 else {"a": holder[key]}
    return json.dumps(top[0], ensure_ascii=bool(step[0] & 1)).encode("utf-8", "surrogatepass")


def _walk(value: Any):
    """(holder, key) of every value inside."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in list(items):
        yield value, key
        yield from _walk(inner)


def on_safetensors(content: bytes, step: Step) -> bytes:
    """The header as JSON, its length kept right."""
    (length,) = struct.unpack("<Q", content[:8].ljust(8, b"\0"))
    if not 0 < length < len(content):
        return on_bytes(content, step)
    header = on_json(content[8 : 8 + length], step)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def on_pickle(content: bytes, step: Step) -> bytes:
    """Opcodes deleted, doubled, exchanged and given other arguments; names that are code put in."""
    try:
        places = [place for _, _, place in pickletools.genops(content)]
    except Exception:
        return on_bytes(content, step)
    ends = [*places[1:], len(content)]
    index = _place(step, len(places))
    start, end = places[index], ends[index]
    code = content[start:end]
    other = places[(step[1] >> 5) % len(places)]
    name = NAMES[(step[1] >> 9) % len(NAMES)].encode().replace(b" ", b"\n") + b"\n"
    new = (
        b"",
        code * 2,
        content[other : ends[places.index(other)]],
        b"c" + name,
        b"c" + name + b"(tR",
        b"c" + name + b"(X\x01\x00\x00\x00atR" + code,
        code + _value(step),
        b"\x8a\x08" + struct.pack("<q", _number(step)),
        b"K\x01" + code,
        b"(" + code,
        code + b"b",
    )
    return content[:start] + new[step[0] % len(new)] + content[end:]


def on_zip(content: bytes, step: Step) -> bytes:
    """Entries dropped, doubled, renamed, packed, filled with zeros, and damaged inside."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
        assert entries
    except Exception:
        return on_bytes(content, step)
    index, operation, packing = step[1] % len(entries), step[0] % 9, zipfile.ZIP_STORED
    name, inner = entries[index]
    if operation == 0:
        del entries[index]
    elif operation == 1:
        entries.insert(index, (name, inner))
    elif operation == 2:
        odd = str(ODD[(step[1] >> 7) % len(ODD)]).encode("ascii", "replace").decode()
        entries[index] = (f"archive/{odd}"[:300].replace("\0", "0"), inner)
    elif operation == 3:
        packing = zipfile.ZIP_DEFLATED
    elif operation == 4:
        entries[index], packing = (name, bytes(1 << 24)), zipfile.ZIP_DEFLATED
    elif operation == 5:
        entries[index] = (name, on_bytes(inner, (step[1] >> 3, step[1] >> 4, step[2])))
    else:  # mostly the pickle that says what the rest is
        where = next((i for i, (n, _) in enumerate(entries) if n.endswith("data.pkl")), index)
        name, inner = entries[where]
        entries[where] = (name, on_pickle(inner, (step[1] >> 3, step[1] >> 4, step[2])))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", packing) as archive:
        for name, inner in entries:
            with archive.open(zipfile.ZipInfo(name), "w") as stream:
                stream.write(inner)
    return out.getvalue()


def on_png(content: bytes, step: Step) -> bytes:
    """Chunks dropped, doubled, exchanged and damaged inside, their checksums kept right."""
    chunks, place = [], 8
    while content[:4] == b"\x89PNG" and place + 12 <= len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        chunks.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + length]))
        place += 12 + length
    if not chunks:
        return on_bytes(content, step)
    index, operation = step[1] % len(chunks), step[0] % 6
    name, inner = chunks[index]
    if operation == 0:
        del chunks[index]
    elif operation == 1:
        chunks.insert(index, chunks[index])
    elif operation == 2:
        other = (step[1] >> 6) % len(chunks)
        chunks[index], chunks[other] = chunks[other], chunks[index]
    elif operation == 3:
        extra = (b"eXIf", b"tRNS", b"PLTE", b"iCCP", b"acTL", b"fcTL", b"fdAT", b"zTXt", b"gAMA")
        chunks.insert(1, (extra[(step[1] >> 6) % len(extra)], _value(step) * 40))
    else:
        chunks[index] = (name, on_bytes(inner, (step[1] >> 3, step[1] >> 4, step[2])))
    packed = (
        struct.pack(">I", len(inner)) + name + inner + struct.pack(">I", zlib.crc32(name + inner))
        for name, inner in chunks
    )
    return content[:8] + b"".join(packed)


def mutated(content: bytes, steps: Sequence[Step], structure: Mutate) -> bytes:
    """The content after all steps: those of its structure first, then those of its bytes."""
    for kind, mutate in ((1, structure), (0, on_bytes)):
        for step in steps:
            if step[0] & 1 == kind:
                content = mutate(content, (step[0] >> 1, *step[1:]))
    return content
