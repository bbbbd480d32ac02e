"""No type or constant of csrc is defined twice. Two files that define a name differently each compile; linked together,
a template over it is one function with the layout of only one of them, chosen by the order of linking."""

from __future__ import annotations

import re
from collections import defaultdict

from repository import CSRC, name, sources

FILES = sources(".h", ".cpp", ".cu", under=CSRC)
TYPE = re.compile(r"(?:struct|class|enum class) (?:alignas\(\w+\) )?(\w+)\b[^;]*\{")
CONSTANTS = re.compile(r"(?:inline )?constexpr [\w:<>]+ (\w+ ?[={[].*)")
CONSTANT = re.compile(r"(?:^|, )(\w+)(?:\[\w*\])? ?[={]")


def shared_names(source: str) -> set[str]:
    """Full names of what stands in named namespaces alone, where other files see the same name."""
    found, inside = set(), []
    for line in source.splitlines():
        if opened := re.match(r"(?:inline )?namespace ?([\w:]*) ?\{", line):
            inside.append(opened[1])
        elif line.startswith("}  // namespace"):
            inside.pop()
        elif "" not in inside:
            names = [match[1]] if (match := TYPE.match(line)) else []
            if constants := CONSTANTS.match(line):
                names = CONSTANT.findall(constants[1])
            found.update("::".join([*inside, own]) for own in names)
    return found


def doubles(texts: dict[str, str]) -> dict[str, list[str]]:
    """Name -> files that define it, of those with more than one."""
    places = defaultdict(list)
    for file, source in texts.items():
        for own in shared_names(source):
            places[own].append(file)
    return {own: files for own, files in places.items() if len(files) > 1}


def test_no_name_is_defined_twice() -> None:
    texts = {name(path): path.read_text() for path in FILES}
    assert len(set().union(*map(shared_names, texts.values()))) > 300
    assert doubles(texts) == {}


def inside(namespaces: str, text: str) -> str:
    return f"namespace {namespaces} {{\n{text}}}  // namespace {namespaces}\n"


def test_a_double_is_noticed() -> None:
    first = inside("dsv4::sm80", "inline constexpr int kA = 1, kB[2] = {1, 2};\nstruct X {\n};\n")
    assert shared_names(first) == {"dsv4::sm80::kA", "dsv4::sm80::kB", "dsv4::sm80::X"}
    other = inside("dsv4::sm80", "constexpr int64_t kB = 3;\nstruct X : Y {\n  int kA;\n};\n")
    assert set(doubles({"a": first, "b": other})) == {"dsv4::sm80::kB", "dsv4::sm80::X"}
    hidden = inside("dsv4::sm80", "namespace {\nstruct X {\n};\n}  // namespace\n")
    elsewhere = first.replace("sm80", "avx512")
    assert doubles({"a": first, "b": hidden, "c": elsewhere, "d": "struct X;\n"}) == {}
