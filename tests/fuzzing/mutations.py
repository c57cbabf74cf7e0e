"""Ways in which an input is wrong: values in plain data, bytes, lines of text, and files that are something else."""

from __future__ import annotations

import copy
import json
import os
import shutil

STRANGE = [
    None, True, -1, 7, 2**70, 0.5, "", "x", "STOP", "stop", "a\ud800b", "<|im_end|>", "\x00", "é" * 5000, [], {}, [None], [[]], {"": {}},
    [{"type": "text"}], [{"type": "text", "text": 7}], {"text": "x"}, [{"type": "thinking", "thinking": {"a": 1}}],
]  # fmt: skip
MORE_STRANGE = [
    0, 1, False, -0.0, 1e308, -1e-320, float("nan"), float("inf"), 2**63, 10**400, "1", "012", "1:40", "null", "no", " ", "\n", "\x1b[31mred\x07",
    "\u202egnp", "x" * 100_000, "a" * 300, "../../..", "/dev/zero", "/dev/null", "/proc/self/mem", "/", ".", "~nouser/x", "{{ 7 * 7 }}", "{% for a in b %}",
    "{x!r:>{y}}", "%s%n", "builtin/everyday", "a/b", "=1+1", "<script>", {"a": {"b": {"c": [1, {"d": None}]}}}, [1, "a", None, {}], ["x"] * 3000,
]  # fmt: skip
SCALARS = [
    "012", "0x1F", "0o17", "1_000", "1:40", ".inf", "-.NaN", "1e999", "2020-01-01", "yes", "~", "!!python/object/apply:os.system [id]", "&a [*a]", "*a",
    "{<<: {a: 1}}", "? a", "|", '"\\ud800"', "'", '"', "[" * 400 + "]" * 400, "{a: " * 300 + "1" + "}" * 300, "9" * 5000, "!!binary aGk=", "!!int x", "@", "`",
    "a: b: c", "- - -", "%YAML 1.1", "\t", "\x85", "\u2028",
]  # fmt: skip
INSERTED = [
    b"\x00",
    b"\xff",
    b"\xc3",
    b"\xed\xa0\x80",
    b"\x1b[2J",
    b"\r",
    b"\n",
    b"\t",
    b'"',
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\xef\xbb\xbf",
]
BOMB = "b0: &b0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"b{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 9)}]\n" for n in range(1, 9)
)


def places(data, path=()):
    """The paths of all values in plain data."""
    yield path
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in inner:
        yield from places(value, (*path, key))


def _near(value, rng):
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice([value + 1, 2 * value, -value, value + 10**30, float(value), str(value)])
    if isinstance(value, float):
        return rng.choice([value / 2, value * 1e9, -value, int(value)])
    if isinstance(value, str):
        return rng.choice(
            [value + "x", value.upper(), f" {value}", value[:-1], value * 2, f"{value}\n", value + "\u0301"]
        )
    if isinstance(value, list):
        return rng.choice([value[::-1], value * 2, value[:1], [*value, None]])
    return value


def strange_data(data, rng, values=STRANGE, changes=3):
    """The data with one or some values replaced, removed, renamed or repeated."""
    data = copy.deepcopy(data)
    for _ in range(rng.randint(1, changes)):
        path = rng.choice(list(places(data)))
        if not path:
            continue
        *outer, last = path
        holder = data
        for key in outer:
            holder = holder[key]
        what = rng.random()
        if what < 0.25:
            holder[last] = _near(holder[last], rng)
        elif what < 0.65:
            holder[last] = copy.deepcopy(rng.choice(values))
        elif what < 0.8:
            del holder[last]
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(holder[last]))
        else:
            name = str(last)
            holder[rng.choice([name.upper(), name + " ", name[:-1], "x" * 300, "\u0430" + name[1:], "__class__"])] = (
                holder.pop(last)
            )
    return data


def strange_bytes(content, rng):
    """Bytes flipped, put in, taken out, cut, repeated, in another encoding, or none."""
    if not content:
        return rng.choice(INSERTED)
    place = rng.randrange(len(content))
    what = rng.randrange(10)
    if what < 3:
        return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
    if what == 3:
        return content[:place] + rng.choice(INSERTED) + content[place:]
    if what == 4:
        return content[:place] + content[place + rng.randint(1, 40) :]
    if what == 5:
        return content[:place]
    if what == 6:
        return content[:place] + content
    if what == 7:
        text = content.decode(errors="replace")
        return text.encode(rng.choice(["utf-16", "utf-16-le", "utf-32", "utf-8-sig", "utf-7"]))
    if what == 8:
        return rng.choice([b"", b"\x00" * 64, b"[" * 100_000, b'{"a":' * 50_000, b"x" * 300_000, b"version https://git-lfs.github.com/spec/v1\n", b"null", b"NaN", b"[]", b"{}", b"7"])  # fmt: skip
    return content[:place] + bytes(rng.randrange(256) for _ in range(rng.randint(1, 30))) + content[place + 8 :]


def strange_lines(content, rng):
    """Lines of a text taken out, repeated, moved in, exchanged, or with another scalar at their end."""
    lines = content.decode(errors="replace").split("\n")
    place = rng.randrange(len(lines))
    what = rng.randrange(7)
    if what == 0:
        del lines[place]
    elif what == 1:
        lines.insert(rng.randrange(len(lines) + 1), lines[place])
    elif what == 2:
        lines[place] = rng.choice([" ", "  ", "\t", "- "]) + lines[place]
    elif what == 3:
        other = rng.randrange(len(lines))
        lines[place], lines[other] = lines[other], lines[place]
    elif what == 4:
        lines.insert(
            place,
            rng.choice(
                [
                    "---",
                    "...",
                    BOMB,
                    "<<: {a: 1}",
                    "? x",
                    "a: 1",
                    "# x",
                    '{"a": 1, "a": 2}',
                    '{"prompt": "x", "prompt": "y"}',
                ]
            ),
        )
    else:
        head, mark, _ = lines[place].rpartition(":")
        lines[place] = f"{head}{mark} {rng.choice(SCALARS)}"
    return "\n".join(lines).encode(errors="surrogatepass")


def as_json(data, rng):
    """Plain data as JSON, sometimes with a key that stands twice, or a byte that is wrong."""
    text = json.dumps(data, ensure_ascii=rng.random() < 0.5)
    what = rng.random()
    if what < 0.08 and text.startswith('{"'):
        text = text[:-1] + ", " + json.dumps(next(iter(data))) + ": 7}"
    content = text.encode(errors="surrogatepass")
    return strange_bytes(content, rng) if what > 0.9 else content


def strange_file(path, rng, others=()):
    """Something else in the place of a file: nothing, a folder, a dangling or circular link, a file that nobody may read, a
    pipe, or another file's content. Says what was done."""
    what = rng.choice(["removed", "empty", "folder", "dangling", "circular", "unreadable", "pipe", "swapped", "device"])
    if what == "unreadable":
        path.chmod(0)
        return what
    others = [other for other in others if other != path and other.is_file()]
    content = rng.choice(others).read_bytes() if what == "swapped" and others else b""
    path.unlink()
    if what in ("empty", "swapped"):
        path.write_bytes(content)
    elif what == "folder":
        path.mkdir()
    elif what == "dangling":
        path.symlink_to(path.with_name("is-not-there"))
    elif what == "circular":
        path.symlink_to(path)
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "device":
        path.symlink_to(rng.choice(["/dev/zero", "/dev/null", "/dev/full"]))
    return what


def strange_content(path, rng):
    """Change what is in a file, by its form. Says how."""
    content = path.read_bytes()
    form = path.suffix
    what = rng.random()
    if form in (".json", ".jsonl") and what < 0.6:
        lines = [content] if form == ".json" else content.splitlines(keepends=True)
        place = rng.randrange(len(lines)) if lines else 0
        try:
            data = json.loads(lines[place])
        except (ValueError, IndexError):
            data = {}
        changed = as_json(strange_data(data, rng, STRANGE + MORE_STRANGE), rng) + b"\n"
        path.write_bytes(b"".join([*lines[:place], changed, *lines[place + 1 :]]))
        return "values"
    if form in (".safetensors", ".sqlite", ".parquet", ".gz") or what < 0.8:
        for _ in range(rng.randint(1, 3)):
            content = strange_bytes(content, rng)
        path.write_bytes(content)
        return "bytes"
    path.write_bytes(strange_lines(content, rng))
    return "lines"


def copied(source, target):
    """A copy of a folder whose files are copied only where they are large, and linked nowhere: every one may be changed."""
    shutil.copytree(source, target, symlinks=True)
    return target
