"""Plain English: messages, docstrings, comments, names and documents hold none of the idioms listed here.

`python tests/test_english.py [FILE_OR_FOLDER ...]` lists the offences, of the whole project by default.
"""

import ast
import io
import pathlib
import re
import sys
import tokenize
from typing import Iterator, List, NamedTuple, Sequence, Tuple

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Pattern -> what to write instead. A space stands for any white space, so that an idiom is found across lines, too.
IDIOMS = {
    r"told|tells?|telling": "say, print, report, show, state; distinguish",
    r"anew": "again, from the start; rewrite, rescan",
    r"(go|goes|going|went|gone) on": "continue, resume",
    r"so (many|much)": "as many, that number of, this much",
    r"(is|are|was|were) no(?! (longer|more|less|fewer|one)\b)(?! \w+er than\b)": "is not a, has no, cannot",
    r"there (is|are|was|were) none": "there is no X, X is missing",
    r"mend(s|ed|ing)?": "correct, repair, fix",
    r"one another time": "again, a second time",
    r"of an? \w+'s own": "of its own, separate",
    r"foreign": "incompatible, of another run, third-party",
    r"at its place": "in its place",
    r"to be read": "to read, readable, can be read",
    r"hand(s|ed|ing)? on": "pass, forward",
    r"nobody": "no user, no rank, not ... by anyone; use the passive",
    r"for want of": "because X is missing",
    r"but for": "except for",
    r"(says|said|knows|know) nothing": "does not state, has no information",
}
PATTERNS = {
    re.compile(rf"\b(?<![/-])(?:{idiom})\b(?![/-]?\w)".replace(" ", r"\s+"), re.IGNORECASE): remedy
    for idiom, remedy in IDIOMS.items()
}
# "There is no network" is plain English, "it is no network" is not.
THERE = re.compile(r"\bthere\s+$", re.IGNORECASE)
# Names that explain nothing, as a whole.
NAMES = {"everything", "doubts", "doubted", "said"}

TEXT = ("*.md", "Makefile", ".ci/*", "docs/*.md", "experiments/**/*", "launch/**/*", "benchmarks/**/*", "tests/**/*")
SUFFIXES = {".md", ".sh", ".sbatch", ".flags", ".cpp", ".cc", ".def"}
TABLES = ("experiments/*.csv", "resnet_cpu/**/*.csv")  # written by hand; their captions are in the documents
SOURCES = ("resnet_cpu/**/*.py", "tests/**/*.py", "benchmarks/**/*.py", "launch/**/*.py")
THIS_FILE = pathlib.Path(__file__).resolve()


class Offence(NamedTuple):
    line: int
    text: str
    remedy: str


def offences_of_text(text: str, first_line: int = 1, last_line: int = sys.maxsize) -> Iterator[Offence]:
    """Yield the idioms in `text`, which begins on `first_line` and ends at the latest on `last_line`."""
    for pattern, remedy in PATTERNS.items():
        for match in pattern.finditer(text):
            if match.group().lower().split()[-1] == "no" and THERE.search(text, 0, match.start()):
                continue
            line = min(first_line + text.count("\n", 0, match.start()), last_line)
            start, end = max(0, match.start() - 25), match.end() + 25
            yield Offence(line, " ".join(text[start:end].split()), remedy)


def strings(tree: ast.AST) -> Iterator[Tuple[ast.expr, str]]:
    """Yield string literals with their text; the values in an f-string are shown as {}."""
    inside = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            inside.update(id(part) for part in node.values if isinstance(part, ast.Constant))
            yield node, "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node, node.value


def names(tree: ast.AST) -> Iterator[Tuple[int, str]]:
    """Yield the names that a module defines, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id


def comments(source: str) -> Iterator[Tuple[int, str]]:
    """Yield the comments with the lines they begin on; comments on successive lines are one."""
    block: List[str] = []
    first = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if block and token.start[0] != first + len(block):
                yield first, "\n".join(block)
                block = []
            first = first if block else token.start[0]
            block.append(token.string.lstrip("#"))
    if block:
        yield first, "\n".join(block)


def offences_of_source(source: str) -> Iterator[Offence]:
    """Yield the idioms in literals, docstrings, comments and names of a Python source."""
    tree = ast.parse(source)
    for node, text in strings(tree):
        yield from offences_of_text(text, node.lineno, node.end_lineno or node.lineno)
    for line, text in comments(source):
        yield from offences_of_text(text, line)
    for line, name in names(tree):
        for offence in offences_of_text(name.strip("_").replace("_", " "), line):
            yield offence._replace(text=name)
        if name.strip("_") in NAMES:
            yield Offence(line, name, "a name that says what it holds")
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            docstring = ast.get_docstring(node, clean=False) or ""
            if re.match(r"\s*What\b", docstring):
                yield Offence(node.body[0].lineno, docstring[:50], "begin with a verb: Return, Write, Raise, Check")


def files(chosen: Sequence[pathlib.Path] = ()) -> List[pathlib.Path]:
    """Return the files to read, those in `chosen` files and folders if any are named."""
    found = {path for pattern in (*SOURCES, *TABLES) for path in ROOT.glob(pattern)}
    for pattern in TEXT:
        found |= {path for path in ROOT.glob(pattern) if path.suffix in SUFFIXES or not path.suffix}
    found = {path for path in found if path.is_file() and path != THIS_FILE}
    if chosen:
        found = {path for path in found if any(path == one or one in path.parents for one in chosen)}
    return sorted(found)


def offences(path: pathlib.Path) -> List[Offence]:
    """Return the offences of a file, in the order of their lines."""
    text = path.read_text(encoding="utf-8")
    return sorted(set(offences_of_source(text) if path.suffix == ".py" else offences_of_text(text)))


def listing(paths: Sequence[pathlib.Path]) -> List[str]:
    return [
        f"{path.relative_to(ROOT)}:{offence.line}: ... {offence.text} ... (write: {offence.remedy})"
        for path in paths
        for offence in offences(path)
    ]


def test_messages_docstrings_comments_names_and_documents_are_plain_english():
    paths = files()
    assert len(paths) > 150  # the patterns above still find the project
    found = listing(paths)
    assert not found, f"{len(found)} places\n" + "\n".join(found)


def test_negative_control_every_idiom_is_found_wherever_it_stands():
    def found(source):
        return [(offence.line, offence.text) for offence in offences_of_source(source)]

    assert found('x = "is told"') == [(1, "is told")]
    assert found('x = (\n    f"{y} goes "\n    "on"\n)') == [(2, "{} goes on")]
    assert found('def f():\n    """Scan.\n\n    Scans\n    anew.\n    """') == [(5, "Scan. Scans anew.")]
    assert found("x = 1  # goes\n# on") == [(1, "goes on")]
    assert found("def test_rank_is_told(): pass") == [(1, "test_rank_is_told")]
    assert found("everything = doubts = 1") == [(1, "everything"), (1, "doubts")]
    assert found('def f():\n    """What is there."""') == [(2, "What is there.")]
    for text in (
        "they told it",
        "it tells",
        "starts anew",
        "went on",
        "going\non",
        "so much",
        "'x' is no flag",
        "these are no flags",
        "there is none",
        "mend it",
        "one another time",
        "of a run's own",
        "is foreign",
        "at its place",
        "to be read",
        "nobody reads it",
        "for want of ssh",
        "it hands on",
        "all but for one",
        "it says nothing",
    ):
        assert len(list(offences_of_text(text))) == 1, text


def test_plain_english_is_not_taken_for_an_idiom():
    for text in (
        "foretell",
        "recommended",
        "amend",
        "Intel",
        "there is no network",
        "where there\n    are no ranks",
        "is no longer used",
        "is no slower than before",
        "nobody/members",
        "members/nobody",
        "so many-core",
        "no flag",
        "is not a flag",
        "logo on",
        "is none",
    ):
        assert not list(offences_of_text(text)), text


if __name__ == "__main__":
    asked = [pathlib.Path(name).resolve() for name in sys.argv[1:]]
    known = files(asked)
    ignored = [one for one in asked if not any(path == one or one in path.parents for path in known)]
    lines = [*listing(known), *(f"{path}: not a file of the project that is checked" for path in ignored)]
    print("\n".join(lines) or f"{len(known)} files: no idioms found")
    sys.exit(bool(lines))
