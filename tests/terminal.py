"""A terminal that a program writes to and is interrupted from, and what a person sees on it."""

import os
import pty
import re
import termios
import threading
from collections.abc import Callable
from contextlib import suppress

import pytest

from kdad_dist.runtime.progress import CONSOLE
from tests.kdad import Launched, until

TOKEN = re.compile(r"\x1b\[[\d;?]*[A-Za-z]|\x1b|[^\x1b]")
COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3\d|4\d|9\d|10\d)[;m]")
"""The beginning of what sets one."""
NAME = "TEST_TERMINAL"


class Terminal:
    """Programs whose `first` is `on_terminal` have it, from now on to its end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, height: int = 24, width: int = 80) -> None:
        self.height, self.width, self.text = height, width, ""
        self._ours, self._theirs = pty.openpty()
        termios.tcsetwinsize(self._theirs, (height, width))
        for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "COLORTERM"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv(NAME, os.ttyname(self._theirs))
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        data = b""
        with suppress(OSError):  # nobody holds the other end any more
            while part := os.read(self._ours, 1 << 16):
                data += part
                self.text = data.decode(errors="replace")

    def until(
        self, launched: Launched, condition: Callable[[list[str]], bool], timeout: float = 120
    ) -> list[str]:
        """The lines once they are so."""
        seen: list[str] = []

        def are_so() -> bool:
            seen[:] = self.lines()
            return condition(seen)

        try:
            until(launched, are_so, timeout)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.text[-2000:]!r}") from None
        return seen

    def press(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def close(self) -> None:
        """Takes what was written last; all programs have ended."""
        os.close(self._theirs)
        self._reader.join(60)
        os.close(self._ours)

    def lines(self) -> list[str]:
        """All lines, also those that have left the screen, as a person reads them in the end."""
        lines, row, column = [""], 0, 0
        for token in TOKEN.findall(self.text):
            if up := re.fullmatch(r"\x1b\[(\d*)A", token):
                row = max(row - int(up[1] or 1), len(lines) - self.height, 0)
            elif token == "\x1b[2K":
                lines[row] = ""
            elif token == "\r":
                column = 0
            elif token == "\n" or (not token.startswith("\x1b") and column == self.width):
                row += 1
                lines += [""] * (row == len(lines))
                column *= token == "\n"
            if token[0] not in "\x1b\r\n":
                lines[row] = lines[row][:column].ljust(column) + token + lines[row][column + 1 :]
                column += 1
        return [line.rstrip() for line in lines]


def on_terminal() -> None:
    """Has the terminal, for input and messages, as a shell gives it to a program; for `first` of
    tests/kdad.py.
    """
    os.setsid()
    terminal = os.open(os.environ.pop(NAME), os.O_RDWR)  # the first: Ctrl-C on it is ours
    for stream in (0, 2):
        os.dup2(terminal, stream)
    os.close(terminal)
    CONSOLE.__init__(stderr=True)  # it was made where there was none
