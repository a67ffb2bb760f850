"""The commands' parser of flags."""

from __future__ import annotations

import argparse
import re
from typing import NoReturn

from trajkern._start import say
from trajkern._suggest import did_you_mean


class Parser(argparse.ArgumentParser):
    """argparse's, which says in one line what is wrong with a flag, and takes no abbreviation for it."""

    def __init__(self, prog: str, **options: object) -> None:
        super().__init__(prog=prog, allow_abbrev=False, **options)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        message = " ".join(message.split()) + self._meant(message)
        say(f"{self.prog}: {message}{'' if message.endswith('?') else ';'} --help lists what there is")
        self.exit(2)

    def _meant(self, message: str) -> str:
        """What was meant by a misspelt flag or choice that the message names."""
        if unknown := re.search(r"unrecognized arguments: (-[^\s=]+)", message):
            return did_you_mean(unknown[1], self._option_string_actions)
        choice = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        return did_you_mean(choice[1], re.findall(r"[^\s',]+", choice[2])) if choice else ""
