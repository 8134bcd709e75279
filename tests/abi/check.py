#!/usr/bin/env python3
"""check.py LIBMOE4.so MOE4.h [--write]: the binary interface is the committed one (docs/abi.md).

symbols.txt has the SONAME and every exported name; layout.txt every public struct's size and offsets and every enumerator, on 64-bit
machines. A change of either must be made on purpose: --write brings them up to date.
"""
import difflib
import os
import pathlib
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import unittest

HERE = pathlib.Path(__file__).resolve().parent
LIBRARY, HEADER = map(pathlib.Path, sys.argv[1:3])
SANITIZERS = re.compile(r"__(asan|odr_asan|ubsan|tsan|sanitizer|sancov)")


def output(*command):
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout


def exported():
    names = [line.split()[-1] for line in output("nm", "-D", "--defined-only", LIBRARY).splitlines()]
    return sorted(name for name in names if not SANITIZERS.match(name))


def symbols():
    soname = re.search(r"SONAME\s+(\S+)", output("objdump", "-p", LIBRARY))[1]
    return "".join(f"{line}\n" for line in [soname, *exported()])


def code():
    return re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.S)


def structs():
    """Of each public struct its fields' names."""
    for body, name in re.findall(r"typedef struct \w+ \{(.*?)\} (\w+);", code(), re.S):
        declarators = ",".join(body.split(";")).split(",")
        yield name, [re.search(r"(\w+)(?:\[\w+\])?\s*$", d)[1] for d in declarators if d.strip()]


def enumerators():
    for body in re.findall(r"typedef enum \w+ \{(.*?)\}", code(), re.S):
        yield from (item.split("=")[0].strip() for item in body.split(",") if item.strip())


def layout():
    lines = ['#include <stdio.h>', f'#include "{HEADER.resolve()}"', "int main(void) {"]
    for name, fields in structs():
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        lines += [f'printf("  {field} %zu\\n", offsetof({name}, {field}));' for field in fields]
    lines += [f'printf("{name} %d\\n", (int){name});' for name in enumerators()]
    with tempfile.TemporaryDirectory(prefix="moe4-abi-") as folder:
        source = pathlib.Path(folder) / "layout.c"
        source.write_text("\n".join([*lines, "return 0;", "}", ""]))
        output(os.environ.get("CC", "cc"), "-o", source.with_suffix(""), source)
        return output(source.with_suffix(""))


class Abi(unittest.TestCase):
    def same(self, committed, now):
        path = HERE / committed
        difference = list(difflib.unified_diff(path.read_text().splitlines(), now.splitlines(), committed, "now", lineterm="", n=0))
        self.assertEqual(difference, [], f"docs/abi.md says what this asks of the SONAME; then {pathlib.Path(__file__).name} --write\n"
                         + "\n".join(difference))

    @unittest.skipUnless(shutil.which("nm") and shutil.which("objdump"), "needs nm and objdump")
    def test_symbols_are_the_committed_ones(self):
        self.same("symbols.txt", symbols())

    @unittest.skipUnless(shutil.which("nm"), "needs nm")
    def test_symbols_are_the_functions_of_the_header(self):
        self.assertEqual(exported(), sorted(set(re.findall(r"\b(moe4_[a-z0-9_]+)\(", code()))))

    @unittest.skipUnless(shutil.which(os.environ.get("CC", "cc")), "needs a C compiler")
    @unittest.skipUnless(struct.calcsize("P") == 8, "the list is of 64-bit machines")
    def test_layout_is_the_committed_one(self):
        self.same("layout.txt", layout())


if sys.argv[3:] == ["--write"]:
    (HERE / "symbols.txt").write_text(symbols())
    (HERE / "layout.txt").write_text(layout())
else:
    unittest.main(argv=sys.argv[:1], verbosity=2)
