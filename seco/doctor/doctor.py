"""What this machine has, what each missing part costs, and how to get it."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Protocol

import seco
from seco.doctor.distributions import BROKEN, MISSING, NOT_USED, OK, Found
from seco.doctor.libraries import CHECKS, blocked, one_line
from seco.doctor.machine import MACHINE
from seco.doctor.parts import KNOWN
from seco.pages.text import printable
from shards.errors import InputError

LIMIT_SECONDS = 180.0  # of one library: torch from a slow network disk takes a minute
# Takes no module from the current folder, and this package from where it is, whatever else is
# on the path.
_CHILD = """
import sys
sys.path[:] = [entry for entry in sys.path if entry]
import importlib.util
package = importlib.util.spec_from_file_location("seco", sys.argv[1])
sys.modules["seco"] = importlib.util.module_from_spec(package)
from seco.doctor.libraries import main
main(sys.argv[3:], float(sys.argv[2]))
"""
_WIDTHS = (15, 9)  # of the first columns of the table


class FfmpegFacts(Protocol):
    """What is known of the ffmpeg in use."""

    @property
    def binary(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def decodes(self) -> Sequence[str]: ...
    @property
    def lacks(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class Part:
    """One row. ``cost`` and ``fix`` are None where nothing is missing."""

    name: str
    state: str  # "ok", "missing", "broken" or "not used"
    version: str | None
    detail: str
    cost: str | None
    fix: str | None


@dataclass(frozen=True)
class Examination:
    """What ``seco doctor`` found."""

    parts: tuple[Part, ...]

    @property
    def faults(self) -> list[Part]:
        """The parts of the core that are missing or broken."""
        return [
            one for one in self.parts if KNOWN[one.name].core and one.state in (MISSING, BROKEN)
        ]

    def to_json(self) -> str:
        """One object."""
        parts = [dataclasses.asdict(one) for one in self.parts]
        return json.dumps({"ok": not self.faults, "parts": parts}, indent=1)

    def table(self) -> str:
        """Plain text."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        indent = " " * sum(_WIDTHS)
        for one in self.parts:
            known = ", ".join(text for text in (one.version, one.detail) if text)
            yield printable(f"{one.name:<{_WIDTHS[0]}}{one.state:<{_WIDTHS[1]}}{known}").rstrip()
            if one.cost:
                yield f"{indent}cost: {printable(one.cost)}"
            if one.fix:
                yield f"{indent}get it: {printable(one.fix)}"
        yield ""
        yield self._summary()

    def _summary(self) -> str:
        serving: dict[str, list[Part]] = {}
        for one in self.parts:
            for ability in KNOWN[one.name].serves:
                serving.setdefault(ability, []).append(one)
        ready, lacking = [], []
        for ability, parts in serving.items():
            faults = [one.name for one in parts if one.state in (MISSING, BROKEN)]
            if faults:
                lacking.append(f"{ability} ({', '.join(faults)})")
            elif any(one.state == OK for one in parts):
                ready.append(ability)
        text = f"Ready: {'; '.join(ready) or 'nothing'}."
        return f"{text} Not ready: {'; '.join(lacking)}." if lacking else text

    def require_core(self) -> None:
        """Raises InputError where a part of the core is missing or broken."""
        if self.faults:
            named = ", ".join(f"{one.name} ({one.state})" for one in self.faults)
            raise InputError(f"cannot work without {named}", fix="the report says how to get it")


def examine(ffmpeg: Callable[[], FfmpegFacts]) -> Examination:
    """Look for everything in ``KNOWN``. Takes as long as importing all libraries once.

    Args:
        ffmpeg: finds the ffmpeg in use; raises InputError if it cannot be used.
    """
    found = {name: _tried(look) for name, look in MACHINE.items()}
    found |= _ffmpeg(ffmpeg)
    found |= check_libraries(tuple(CHECKS))
    return Examination(tuple(_part(name, found[name]) for name in KNOWN))


def _part(name: str, found: Found) -> Part:
    known = KNOWN[name]
    lacking = found.state in (MISSING, BROKEN)
    return Part(
        name=name,
        state=found.state,
        version=found.version,
        detail=found.detail,
        cost=known.cost if lacking else None,
        fix=(found.fix or known.fix) if lacking else None,
    )


def _tried(look: Callable[[], Found]) -> Found:
    try:
        return look()
    except Exception as error:  # one part that cannot be looked at hides no other
        return Found(BROKEN, detail=_in_words(error))


def _in_words(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}")


def check_libraries(names: Sequence[str], limit_seconds: float = LIMIT_SECONDS) -> dict[str, Found]:
    """Import and try libraries in a process of its own; after a crash another one does the rest.

    Args:
        names: keys of ``CHECKS``.
        limit_seconds: after which a library counts as broken.
    """
    found: dict[str, Found] = {}
    left = list(names)
    while left:
        found |= _check_until_crash(left, limit_seconds)
        left = [name for name in left if name not in found]
        for name in left:
            if obstacle := blocked(name, found):
                found[name] = obstacle
        left = [name for name in left if name not in found]
    return found


def _check_until_crash(names: Sequence[str], limit_seconds: float) -> dict[str, Found]:
    """The results of one process; the one at which it ended is BROKEN."""
    script = [sys.executable, "-c", _CHILD, seco.__file__, str(limit_seconds), *names]
    # Files, not pipes, which a process that a library has left behind could hold open.
    with tempfile.TemporaryFile() as answers, tempfile.TemporaryFile() as errors:
        done = subprocess.run(
            script, stdin=subprocess.DEVNULL, stdout=answers, stderr=errors, check=False
        )
        lines = [json.loads(line) for line in _content(answers).splitlines()]
        said = _content(errors)
    found = {line["name"]: Found(*line["found"]) for line in lines if "found" in line}
    last = lines[-1] if lines else {"name": names[0]}
    if last["name"] not in found:
        ending = _ending(done.returncode, said, limit_seconds)
        found[last["name"]] = Found(BROKEN, None, ending, last.get("repair"))
    return found


def _content(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")


def _ending(code: int, said: str, limit_seconds: float) -> str:
    if code == 1 and re.search(r"^Timeout \(", said, re.MULTILINE):  # faulthandler's
        return f"no answer within {limit_seconds:g} s"
    how = f"crashes ({signal.Signals(-code).name})" if code < 0 else f"exits with code {code}"
    return one_line(f"{how}: {said}" if said.strip() else how)


def _ffmpeg(look: Callable[[], FfmpegFacts]) -> dict[str, Found]:
    try:
        facts = look()
    except InputError as error:
        state, place = (BROKEN, f"{error.where}: ") if error.where else (MISSING, "")
        found = Found(state, None, f"{place}{error.what}", error.fix)
    except Exception as error:  # of a broken imageio-ffmpeg
        found = Found(BROKEN, detail=_in_words(error))
    else:
        found = Found(OK, facts.version, f"from {facts.source}: {facts.binary}")
        state = MISSING if facts.lacks else OK
        codecs = Found(state, detail=", ".join(facts.lacks or facts.decodes))
        return {"ffmpeg": found, "video codecs": codecs}
    return {"ffmpeg": found, "video codecs": Found(NOT_USED, detail="needs ffmpeg")}
