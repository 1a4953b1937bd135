"""What a program calls: the commands as functions, the parts of a training loop of one's own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from seco.config import PretrainConfig
from shards.errors import InputError

REPORT = "report.html"


def pretrain(config: PretrainConfig) -> Path:
    """Run or resume a pre-training on the processes there are, and write its report.

    Returns:
        the last checkpoint.

    Raises:
        InputError: settings, shards, checkpoint or output folder cannot be used; the loss is no
            longer finite; too many samples cannot be read.
        Stopped: a signal came; everything is saved.
        PeerLost: another process ended, and has said why.
    """
    from seco.training.pretrain import pretrain as train

    last = train(config)
    if os.environ.get("RANK", "0") == "0":
        _report(last.parent)
    return last


def _report(run: Path) -> None:
    """The run's curves as a page in its folder; a page that fails costs no run."""
    from seco.report.report import write_report

    try:
        found = write_report([run], run / REPORT)
    except InputError as error:
        print(f"seco pretrain: no report was written: {error}", file=sys.stderr)
        return
    for item in found.unread:
        print(
            f"seco pretrain: could not be read for the report: {item.path}: {item.reason}",
            file=sys.stderr,
        )
