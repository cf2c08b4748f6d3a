"""Regular expressions that others wrote: they match what `re` matches, within bounded time.

PEFT matches module names with `re`, whose backtracking a hostile pattern sends on forever. The `regex` package comes to
the same matches and stops when its time is up.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import regex

from safeshard.manifests.errors import Offence, RequestError

MAX_CHARS = 1 << 16  # of one pattern
MATCH_SECONDS = 30.0  # for all patterns of a file and all names: hundreds of times what adapters in use take
# What `regex` takes for something else than `re` does: fuzzy matching and POSIX classes.
_OTHER = re.compile(r"\{(?!\d*(?:,\d*)?\})|\[:")
_REMEDY = "simplify the pattern, or list the modules by name"


class Patterns:
    """The patterns of one file (`where`), which share its processor time: that of the process, as `regex` counts it."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._left = MATCH_SECONDS

    def compile(self, text: str) -> Pattern:
        """Compile a pattern.

        Raises:
            RequestError: it is too long, or the time is up.
            re.error, OverflowError, RecursionError: it is malformed.
        """
        if len(text) > MAX_CHARS:
            raise self._refusal(text, f"a pattern of at most {MAX_CHARS} characters", f"{len(text)} characters")
        if _OTHER.search(text):
            raise self._refusal(text, "a pattern without fuzzy matching and POSIX classes", "one of them")
        self.timed(text, lambda timeout: re.compile(text))  # what `re` refuses, PEFT does
        try:
            return Pattern(self, text, self.timed(text, lambda timeout: regex.compile(text)))
        except regex.error as error:
            raise re.error(str(error)) from None

    def timed(self, text: str, work: Callable[[float], Any]) -> Any:
        """What `work` returns, given the seconds that are left; RequestError where it takes longer."""
        start = time.process_time()
        try:
            if self._left > 0:
                return work(self._left)
        except TimeoutError:
            pass
        finally:
            self._left -= time.process_time() - start
        expected = f"patterns that match the module names within {MATCH_SECONDS:g} s"
        raise self._refusal(text, expected, "one that takes longer")

    def _refusal(self, text: str, expected: str, got: str) -> RequestError:
        return RequestError(Offence(self._where, text, expected, got, _REMEDY))


class Pattern:
    """A compiled pattern; `match` and `fullmatch` raise RequestError when the file's time is up."""

    def __init__(self, patterns: Patterns, text: str, compiled: Any) -> None:
        self._patterns, self._text, self._compiled = patterns, text, compiled

    def match(self, name: str) -> Any:
        return self._patterns.timed(self._text, lambda timeout: self._compiled.match(name, timeout=timeout))

    def fullmatch(self, name: str) -> Any:
        return self._patterns.timed(self._text, lambda timeout: self._compiled.fullmatch(name, timeout=timeout))
