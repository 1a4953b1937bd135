"""The first instructions of ``seco``: until all is imported, Ctrl-C ends it quietly."""

from __future__ import annotations

import signal


def main() -> None:
    """Run the command line."""
    # Python would end with a traceback from the middle of an import.
    waiting = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if waiting:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    import cli

    cli.main(interruptible=waiting)


if __name__ == "__main__":
    main()
