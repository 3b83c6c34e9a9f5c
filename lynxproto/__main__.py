"""``python -m lynxproto``: the command line."""

from lynxproto.cli import main

main(prog_name="lynxproto")
