"""Regular expressions from recipes and from other people's files, matched in bounded time.

Python's own matcher has no time limit, and a pattern such as `(a+)+b` keeps it busy for ever.
"""

import re
import time
import warnings
from collections.abc import Iterable
from typing import Any

SECONDS = 2.0  # for all names together; a pattern that does not backtrack takes microseconds
LONGEST = 100_000  # characters: more than the names of all modules of the largest models take


def full_matches(pattern: str, names: Iterable[str]) -> dict[str, Any]:
    """The names that a regular expression matches as a whole, each with its match.

    Raises:
        ValueError: If it is no regular expression of Python's, or takes too long.
    """
    import regex  # Has a time limit, which `re` lacks. Here, since few programs match anything.

    shown = repr(pattern if len(pattern) <= 80 else f"{pattern[:77]}...")
    if len(pattern) > LONGEST:
        raise ValueError(f"{shown} has {len(pattern)} characters, more than {LONGEST}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of sets like `[[`
            re.compile(pattern)  # `regex` takes more than `re`
            compiled = regex.compile(pattern)
    except (re.error, regex.error, RecursionError, OverflowError, ValueError) as error:
        raise ValueError(f"{shown} is no regular expression: {error}") from None
    deadline = time.monotonic() + SECONDS
    matches = {}
    for name in names:
        try:
            matches[name] = compiled.fullmatch(name, timeout=max(deadline - time.monotonic(), 1e-6))
        except TimeoutError:
            raise ValueError(
                f"{shown} is too slow to match: nested repeats, as in (a+)+, try every split of "
                "a name. Write it without them, or as a list of names"
            ) from None
    return {name: match for name, match in matches.items() if match}
