"""A terminal for tests: takes what progress bars write, and knows what is on its screen."""

from __future__ import annotations

import io
import re

# Rich and tqdm move the cursor by these alone; colours and the hiding of the cursor change nothing.
CONTROL = re.compile(r"\x1b\[(\??[\d;]*)([A-Za-z])|\r|\n|[^\x1b\r\n]")


class Terminal(io.StringIO):
    """What is written to it can be read as a text file's (``getvalue``) and as the rows of a screen.

    Attributes:
        seen: each row that was ever on the screen when something was written, once.
    """

    def __init__(self) -> None:
        super().__init__()
        self._rows, self._row, self._column = [""], 0, 0
        self.seen: dict[str, None] = {}

    def isatty(self) -> bool:
        return True

    @property
    def rows(self) -> list[str]:
        """What is on the screen, without empty rows."""
        return [row.rstrip() for row in self._rows if row.strip()]

    def write(self, text: str) -> int:
        for found in CONTROL.finditer(text):
            if found[2]:
                self._control(found[1], found[2])
            elif found[0] == "\r":
                self._column = 0
            elif found[0] == "\n":
                self._row, self._column = self._row + 1, 0
                if self._row == len(self._rows):
                    self._rows.append("")
            else:
                row = self._rows[self._row].ljust(self._column)
                self._rows[self._row] = row[: self._column] + found[0] + row[self._column + 1 :]
                self._column += 1
        self.seen |= dict.fromkeys(self.rows)
        return super().write(text)

    def _control(self, argument: str, kind: str) -> None:
        if kind == "A":
            self._row = max(0, self._row - int(argument or 1))
        elif kind == "K":
            row = self._rows[self._row]
            self._rows[self._row] = "" if argument == "2" else row[: self._column]
        elif kind not in "mhl":
            raise ValueError(f"This terminal does not know {argument}{kind}.")
