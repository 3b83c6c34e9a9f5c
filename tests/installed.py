"""The C library as a C or C++ program gets it: built and installed by `make install`, found by pkg-config."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).parent.parent


def program(name: str, package: str) -> str:
    """Path of a system program. Skips the test without it; in CI, where .ci/run installs it, that is a failure."""
    path = shutil.which(name)
    if path is None:
        need(f"this test needs {name}: apt-get install {package}")
    return path


def need(missing: str) -> NoReturn:
    """Skip the test for want of something; in CI, where .ci/run installs it, that is a failure."""
    if os.environ.get("CI"):
        pytest.fail(missing)
    pytest.skip(missing)


def run(*command: object, cwd: Path | None = None, **environment: str) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True,
        check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class Installed:
    """An installation below ``root``: what DESTDIR is for."""

    root: Path
    prefix: str = "/usr/local"

    @property
    def lib(self) -> Path:
        return self.root / self.prefix.lstrip("/") / "lib"

    @property
    def include(self) -> Path:
        return self.root / self.prefix.lstrip("/") / "include"

    def pkg_config(self, *arguments: str) -> list[str]:
        """What pkg-config answers, as a cross-building distribution would ask it: with a sysroot."""
        path = f"{self.lib / 'pkgconfig'}"
        return run(
            program("pkg-config", "pkg-config"), *arguments,
            PKG_CONFIG_PATH=path, PKG_CONFIG_SYSROOT_DIR=str(self.root),
        ).split()  # fmt: skip


SANITIZED = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all"


@cache
def examples(root: Path, *, sanitized: bool = False) -> Path:
    """The folder of the example programs, built with an installed library; ``sanitized``: both under ASan and UBSan."""
    flags = SANITIZED if sanitized else "-O2"
    library = install(root, flags=flags)
    if sanitized:  # the linker takes the archive, and the sanitizers' runtime is the program's
        for path in library.lib.glob("*.so*"):
            path.unlink()
    build = root / "examples"
    build.mkdir()
    settings = (f"BUILD={build}", f"CFLAGS={flags}", f"CXXFLAGS={flags}", f"LDFLAGS=-Wl,-rpath,{library.lib}")
    found = {"PKG_CONFIG_PATH": f"{library.lib / 'pkgconfig'}", "PKG_CONFIG_SYSROOT_DIR": str(root)}
    program("g++", "g++")
    if subprocess.run([program("pkg-config", "pkg-config"), "--exists", "libxxhash"], check=False).returncode:
        need("this test needs libxxhash: apt-get install libxxhash-dev")
    run("make", "-s", "-j2", "-C", ROOT / "examples" / "c", "WERROR=-Werror", *settings, **found)
    return build


@cache
def install(root: Path, compiler: str = "gcc", flags: str = "-O2") -> Installed:
    """Build with ``compiler`` and install below ``root``, once."""
    arguments = (f"CC={program(compiler, compiler)}", f"CFLAGS={flags}", "WERROR=-Werror", f"BUILD={root / 'build'}")
    run(program("make", "make"), "-s", "-j2", "-C", ROOT / "native", *arguments, f"DESTDIR={root}", "install")
    return Installed(root)
