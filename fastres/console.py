"""The terminal's text: names of users and files are printed as they are."""

import io
import sys

from rich.console import Console


def open_console(quiet: bool = False) -> Console:
    """Standard output without rich's markup, emoji codes, colours and line breaks.

    Characters that its encoding lacks are printed as backslash escapes.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a notebook's is another
        sys.stdout.reconfigure(errors="backslashreplace")
    return Console(markup=False, emoji=False, highlight=False, soft_wrap=True, quiet=quiet)
