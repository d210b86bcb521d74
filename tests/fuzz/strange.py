"""Strategies for texts, bytes, JSON and files with something strange in them."""

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

from hypothesis import strategies as st

# Stand-ins for what json.dumps cannot write.
HUGE, DEEP = "@huge@", "@deep@"
LITERALS = {f'"{HUGE}"': "9" * 5000, f'"{DEEP}"': "[" * 3000 + "]" * 3000}
PIECES = (
    "", " ", "\n", "\r", "\t", "\0", "\x1b[2J", "\x7f", "\x85", "\u202e", "\u2028", "\ud800", "\ufeff", "\U0001f600",
    "é", "[X]", "[Y]", "[P]", "[P*3]", "[P*99999999]", "[P:words of]", "[P: ]", "[>]", "[[", "]]", "{{", "}}", "{x}",
    "{x!}", "[D]", "[D*2]", "[D*99999999]", "[D:words of]", "[D:examples]", "[C]", "{messages}", "{%", "%}",
    "{text}", "{", "}", "[", "]", ".", "?", "!", "'", '"', "\\", "/", "../", "|", ",", ";", "=", "_", "<", "&", "#",
    "$", "<mask>", "</s>", "[MASK]", "<|endoftext|>", "word", "Nairobi", "0", "-1", "1e400", "NaN", "null", "true",
    "9" * 5000, "a" * 300, "." * 3000, " " * 3000, "[" * 500, "{" * 500, "\u0301" * 200, "x y " * 300,
)  # fmt: skip
VALUES: Sequence[Any] = (
    None, True, False, 0, 1, -1, 7, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e308, 1e-320, float("inf"), float("nan"),
    HUGE, DEEP, [], {}, [1], ["a", "b"], {"a": 1}, {"": {"": ""}}, [[["a"]]], {"a": [{"b": None}]}, *PIECES,
)  # fmt: skip

texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=8), max_size=9).map("".join)
values = st.sampled_from(VALUES).map(copy.deepcopy) | texts


@st.composite
def changed_text(draw: st.DrawFn, text: str) -> str:
    """Return a text in which a few pieces were put in, taken out or written over."""
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.sampled_from((0, 0, 1, 2, 5, 20, 10**9))))
        text = text[:start] + draw(st.sampled_from(PIECES) | st.text(max_size=3)) + text[end:]
    return text


@st.composite
def changed_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """Return bytes of which a few were put in, taken out, written over or cut off, perhaps in another encoding."""
    pieces = st.sampled_from(PIECES).map(lambda piece: piece.encode("utf-8", "surrogatepass"))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.sampled_from((0, 0, 1, 1, 4, 20, 10**9))))
        data = data[:start] + draw(st.binary(max_size=4) | pieces) + data[end:]
    encoding = draw(st.sampled_from(("", "", "", "", "", "utf-16", "utf-32", "latin-1", "utf-8-sig", "utf-7")))
    return data.decode("utf-8", "replace").encode(encoding, "replace") if encoding else data


@st.composite
def changed_json(draw: st.DrawFn, value: Any) -> Any:
    """Return JSON in which a few values were replaced, left out, doubled or renamed, at any depth."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(0, 4))):
        inside: Any = value
        last: tuple[Any, Any] | None = None
        while isinstance(inside, dict | list) and inside:
            keys: Sequence[Any] = list(inside) if isinstance(inside, dict) else range(len(inside))
            last = inside, keys[draw(st.integers(0, len(keys) - 1))]
            inside = last[0][last[1]]
            if draw(st.integers(0, 3)) == 0:
                break
        if last is None:
            value = draw(values)
            continue
        holder, key = last
        what = draw(st.integers(0, 9))
        if what == 0:
            del holder[key]
        elif what == 1 and isinstance(holder, dict):
            holder[draw(texts)] = holder.pop(key)
        elif what == 2 and isinstance(holder, list):
            holder.append(copy.deepcopy(inside))
        else:
            holder[key] = draw(values)
    return value


@st.composite
def changed_file(draw: st.DrawFn, name: str, data: bytes) -> bytes:
    """Return a file with broken bytes, or with strange values where its ending says what it holds."""
    if draw(st.integers(0, 3)) == 0:
        return draw(changed_bytes(data))
    if name.endswith(".json"):
        return as_json(draw(changed_json(json.loads(data)))).encode()
    if name.endswith(".jsonl"):
        lines = data.decode().splitlines()
        at = draw(st.integers(0, len(lines) - 1))
        lines[at] = as_json(draw(changed_json(json.loads(lines[at]))))
        return "\n".join(lines).encode()
    if name.endswith(".safetensors"):
        size = int.from_bytes(data[:8], "little")
        header = as_json(draw(changed_json(json.loads(data[8 : 8 + size])))).encode()
        return len(header).to_bytes(8, "little") + header + data[8 + size :]
    return draw(changed_bytes(data))


@st.composite
def changed_folder(draw: st.DrawFn, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return the files of a folder, of which one is changed."""
    name = draw(st.sampled_from(sorted(files)))
    return {**files, name: draw(changed_file(name, files[name]))}


def as_json(value: Any) -> str:
    """Return JSON text, with numbers and nesting that Python itself would not write."""
    text = json.dumps(value)
    for name, literal in LITERALS.items():
        text = text.replace(name, literal)
    return text


def as_python(value: Any) -> Any:
    """Return a value as a caller in Python may have it, with huge numbers and deep nesting."""
    if value == HUGE:
        return 10**5000
    if value == DEEP:
        deep: list[Any] = []
        for _ in range(3000):
            deep = [deep]
        return deep
    if isinstance(value, dict):
        return {name: as_python(item) for name, item in value.items()}
    return [as_python(item) for item in value] if isinstance(value, list) else value


def as_toml(value: Any) -> str:
    """Return TOML text of JSON: values as TOML has them, in tables of one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(name)} = {as_toml(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    if value is None or isinstance(value, str):
        return LITERALS.get(f'"{value}"', json.dumps(value or ""))
    return {"Infinity": "inf", "-Infinity": "-inf", "NaN": "nan"}.get(json.dumps(value), json.dumps(value))


def as_toml_file(value: Any) -> str:
    """Return a TOML file of JSON, a key on each line."""
    if not isinstance(value, Mapping):
        return as_json(value)
    return "".join(f"{json.dumps(name)} = {as_toml(item)}\n" for name, item in value.items())
