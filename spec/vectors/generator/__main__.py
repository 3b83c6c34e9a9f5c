"""Make the vectors again: ``make vectors``, or ``python spec/vectors/generator [--output FOLDER]``.

The same code makes the same bytes. ``--freeze NAME`` copies the present files to ``spec/vectors/frozen/NAME``, and from
then on they never change (spec/conformance.md, "Frozen vectors").
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from captures import captures
from codecs_ import codec_files
from frames import bodies, headers
from handshakes import handshakes
from manifests import manifests
from primitives import primitives
from transfers import transfers
from violations import violations

HERE = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--freeze", metavar="NAME", help="then keep these files for ever")
    parser.add_argument("--only", nargs="*", default=[], metavar="FILE", help="with --freeze: only these files")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    files = [primitives(), headers(), bodies(), manifests(), captures(), *codec_files()]
    files += [handshakes(), transfers(), violations()]
    for file in files:
        file.write(options.output)
    if options.freeze:
        target = HERE / "frozen" / options.freeze
        if target.exists():
            sys.exit(f"{target} exists; frozen vectors never change: choose another name")
        target.mkdir(parents=True)
        for file in files:
            if not options.only or file.name in options.only:
                shutil.copy(options.output / f"{file.name}.json", target)


if __name__ == "__main__":
    main()
