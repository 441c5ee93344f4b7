"""The command as a function, and what looks like a terminal."""

import io

from hf_ctxseg.cli import main


def exit_code(*argv):
    try:
        return main(list(map(str, argv)))
    except SystemExit as error:  # argparse
        return error.code


class Terminal(io.StringIO):
    def isatty(self):
        return True
