"""`make -C native install`: headers, libraries and pkg-config file, for gcc and clang, C11 and C++17."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import pytest
from installed import ROOT, Installed, install, program, run

USER = """
#include <lynxproto.h>
#include <stdio.h>
#include <string.h>

int main(void) {
    uint16_t words[2 * 70 * 64], back[2 * 70 * 64];
    for (int i = 0; i < 2 * 70 * 64; i++) {
        words[i] = (uint16_t)(0x3f00 + i * 7 % 500);
    }
    lynx_view view;
    memset(&view, 0, sizeof view);
    view.words = words;
    view.head_stride = 70 * 64;
    view.token_stride = 64;
    uint8_t planes[16 * 2 * 70 * 64 / 8];
    uint8_t *to[16];
    const uint8_t *at[16];
    for (int p = 0; p < 16; p++) {
        at[p] = to[p] = planes + p * (2 * 70 * 64 / 8);
    }
    if (lynx_bitplane_pack(&view, 2, 2, 70, 64, to) != LYNX_OK) {
        return 1;
    }
    view.words = back;
    if (lynx_bitplane_unpack(at, &view, 2, 2, 70, 64) != LYNX_OK || memcmp(words, back, sizeof words) != 0) {
        return 2;
    }
    if (lynx_crc32c(0, "123456789", 9) != 0xe3069283u) {
        return 3;
    }
    printf("%d %d %s\\n", LYNX_ABI_VERSION, lynx_abi_version(), lynx_strerror(LYNX_ERR_CODE));
    return 0;
}
"""
PACKAGES = {"gcc": "gcc", "clang": "clang", "g++": "g++", "clang++": "clang"}
STANDARDS = {"gcc": ("-xc", "-std=c11"), "clang": ("-xc", "-std=c11"), "g++": ("-xc++", "-std=c++17"),
             "clang++": ("-xc++", "-std=c++17")}  # fmt: skip
STRICT = ("-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Werror")


@pytest.fixture(scope="module", params=["gcc", "clang"])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    program(request.param, request.param)
    return install(tmp_path_factory.mktemp(request.param), request.param, "-O1")


def test_shared_library(library: Installed) -> None:
    """Its name has the ABI's number, it needs the C library alone, and it shows the functions of the headers only."""
    header = "".join(path.read_text() for path in (ROOT / "native" / "include").glob("*.h"))
    abi = re.search(r"#define LYNX_ABI_VERSION (\d+)", header)[1]  # type: ignore[index]  # it is there
    shared = library.lib / f"liblynxproto.so.{abi}"
    assert (library.lib / "liblynxproto.so").resolve() == shared.resolve()
    dynamic = run(program("readelf", "binutils"), "-d", shared)
    assert f"soname: [liblynxproto.so.{abi}]" in dynamic
    assert set(re.findall(r"NEEDED.*\[(.*)\]", dynamic)) <= {"libc.so.6"}
    defined = run(program("nm", "binutils"), "-D", "--defined-only", shared)
    exported = {line.split()[-1] for line in defined.splitlines()}
    assert exported == set(re.findall(r"LYNX_API [\w ]+?\*?(lynx_\w+)\(", header))
    static = run("nm", "-g", "--defined-only", library.lib / "liblynxproto.a")
    assert all(name.startswith("lynx_") for name in re.findall(r"^\w+ [A-Z] (\S+)", static, re.MULTILINE))


def test_pkg_config(library: Installed) -> None:
    assert library.pkg_config("--modversion", "lynxproto") == [version("lynxproto")]
    assert library.pkg_config("--cflags", "lynxproto") == [f"-I{library.include}"]
    assert library.pkg_config("--libs", "lynxproto") == [f"-L{library.lib}", "-llynxproto"]
    assert library.pkg_config("--static", "--libs", "lynxproto") == [f"-L{library.lib}", "-llynxproto"]


@pytest.mark.parametrize("compiler", STANDARDS)
@pytest.mark.parametrize("linking", ["shared", "static"])
def test_a_program_in_c_and_cpp(library: Installed, compiler: str, linking: str, tmp_path: Path) -> None:
    source, binary = tmp_path / "user.c", tmp_path / "user"
    source.write_text(USER)
    command = [
        program(compiler, PACKAGES[compiler]),
        *STANDARDS[compiler],
        *STRICT,
        *library.pkg_config("--cflags", "lynxproto"),
    ]
    libraries = library.pkg_config("--libs", "lynxproto")
    if linking == "static":
        libraries = [library.lib / "liblynxproto.a" if word == "-llynxproto" else word for word in libraries]
    run(*command, source, "-xnone", "-o", binary, *libraries)
    said = run(binary, LD_LIBRARY_PATH=str(library.lib)).split(maxsplit=2)
    assert said[0] == said[1]
    assert said[2].strip() == "a code is outside the range of its width"


def test_uninstall_leaves_nothing(tmp_path: Path, library: Installed) -> None:
    make = (
        "make",
        "-s",
        "-C",
        ROOT / "native",
        f"BUILD={library.root / 'build'}",
        f"DESTDIR={tmp_path}",
        "PREFIX=/opt/x",
    )
    run(*make, "install")
    assert (tmp_path / "opt/x/lib/pkgconfig/lynxproto.pc").read_text().startswith("prefix=/opt/x\n")
    run(*make, "uninstall")
    assert not [path for path in tmp_path.rglob("*") if not path.is_dir()]
