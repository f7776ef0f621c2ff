"""Read flagfiles, and expand `~` and `$VAR` in paths, which no shell does there or behind `--name=`."""

import contextlib
import os
import re
from typing import Iterator, List, Sequence, Tuple

from resnet_cpu.errors import FlagError

_QUOTES = ("'", '"')
_DEEPEST = 50  # flagfiles within each other
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")  # in a log they would be commands to the terminal


class _Line(str):
    """A line of a flagfile, with where it stands, as in `FILE, line 3`."""

    where: str

    @classmethod
    def of(cls, text: str, path: str, number: int) -> "_Line":
        line = cls(text)
        line.where = f"{path}, line {number}"
        return line


@contextlib.contextmanager
def located(words: Sequence[str]) -> Iterator[None]:
    """Add to the message of an error about a flag in which line of which flagfile it stands, if that is certain."""
    try:
        yield
    except FlagError as error:
        wrong = _wrong(str(error), words)
        # Of several phases of one name, or several values of a flag, the message does not say which is meant.
        if len(set(wrong)) == 1 and isinstance(wrong[-1], _Line):
            error.args = (f"{error} ({wrong[-1].where})",)
        raise


def _wrong(text: str, words: Sequence[str]) -> List[str]:
    """Return the words that a message may be about: those that it begins with, else those with its flag's name."""
    # Messages begin with the flag, of --phase only with its name, or with 'WORD' is not a flag.
    begins = (text.split(": ")[0], text.split(" ")[0], text.split("' is not a flag")[0][1:])
    starts = tuple(f"{begin}:" for begin in begins)
    exact = [word for word in words if f"{word}:".startswith(starts)]
    name = re.match(r"(?:Missing value for flag )?--(\w+)", text)
    if exact or name is None:
        return exact
    return [word for word in words if word.lstrip("-").partition("=")[0] == name[1]]


def inserted(words: Sequence[str], within: Tuple[str, ...] = ()) -> List[str]:
    """Return the words of a command line with the lines of flagfiles, which may nest, in place of --flagfile=FILE.

    absl would read them in the locale's encoding and expand nothing. `within` lists the files that are being read.
    """
    found: List[str] = []
    rest = iter(words)
    for word in rest:
        if not re.fullmatch(r"--?flagfile(=.*)?", word):
            found.append(word)
            continue
        _, equals, path = word.partition("=")
        with located([word]):
            path = expanded("flagfile", path if equals else next(rest, ""))
            if os.path.abspath(path) in within:
                raise FlagError(f"--flagfile={path}: the file includes itself; remove the line")
            if len(within) == _DEEPEST:
                raise FlagError(f"--flagfile={path}: more than {_DEEPEST} flagfiles within each other; remove some")
            lines = [_Line.of(line.strip(), path, number) for number, line in enumerate(_read_lines(path), 1)]
        chosen = [line for line in lines if line and not line.startswith(("#", "//"))]
        found += inserted(chosen, (*within, os.path.abspath(path)))
    return found


def _read_lines(path: str) -> List[str]:
    try:
        with open(path, encoding="utf-8-sig") as file:  # a byte order mark is accepted
            text = file.read()
    except OSError as error:
        raise FlagError(
            f"--flagfile={path}: {error.strerror}; name an existing file, relative to the current folder "
            "(for those of experiments/, the root of the repository)"
        ) from None
    except UnicodeDecodeError as error:
        raise FlagError(f"--flagfile={path}: not UTF-8 text ({error.reason}); save the file as UTF-8") from None
    if "\0" in text:  # as in UTF-16 without a byte order mark
        raise FlagError(f"--flagfile={path}: not UTF-8 text (it has NUL bytes); save the file as UTF-8")
    return text.split("\n")


def check_characters(name: str, text: str) -> None:
    """Raise FlagError for a value on several lines, with control characters, not in UTF-8, or in quotes."""
    if "\n" in text or "\r" in text:
        raise FlagError(f"--{name}={text!r}: the value contains a newline; write it on one line")
    if _CONTROL.search(text):
        raise FlagError(f"--{name}={text!r}: the value contains a control character; remove it")
    if not _is_unicode(text):
        raise FlagError(f"--{name}={text!r}: the value is not UTF-8 text; write it in UTF-8, or rename the file")
    if text[:1] in _QUOTES or text[-1:] in _QUOTES:
        raise FlagError(
            f"--{name}={text}: the value contains quotes, which belong to the shell; write it without them in flagfiles"
        )


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # of the system's bytes that are not UTF-8, Python makes surrogates
        return False
    return True


def expanded(name: str, path: str) -> str:
    """Return `path` with `~` and `$VAR` expanded; raise FlagError for what cannot be, and for quotes."""
    check_characters(name, path)
    if path != path.strip():
        raise FlagError(f"--{name}={path}: the path begins or ends with a space; write --{name}=PATH without it")

    def value(match: "re.Match[str]") -> str:
        variable = match[1] or match[2]
        found = os.environ.get(variable)
        if found is None or (not found and match.start() == 0):  # an empty one would lead to the root folder
            state = "not defined" if found is None else "empty"
            raise FlagError(f"--{name}={path}: {match[0]} is {state}; export the variable, or write the path")
        return found

    home = os.path.expanduser(path)
    if path.startswith("~") and (home.startswith("~") or not os.environ.get("HOME", "/")):
        raise FlagError(f"--{name}={path}: the home folder {path.split('/')[0]} is not known; write the path")
    found = re.sub(r"\$(?:(\w+)|\{([^}]*)\})", value, home, flags=re.ASCII)
    check_characters(name, found)
    return found
