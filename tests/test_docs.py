"""The documents: links and commands in them are valid, README is short, and the index lists every page."""

import re
from typing import Dict, Iterator, List, NamedTuple, Set

import pytest
from conftest import ROOT

from resnet_cpu import commandline

PAGES = [
    path
    for pattern in ("*.md", "docs/*.md", "experiments/*.md")
    for path in sorted(ROOT.glob(pattern))
    if not path.name.startswith(".")
]
NAMED = [path.relative_to(ROOT).as_posix() for path in PAGES]
WORDS_OF_README = 1500
# Batch files hand their arguments to a command.
COMMAND_OF_BATCH_FILE = {
    "train": "train",
    "scaling": "train",
    "lr_scaling": "train",
    "collapsed_ensemble": "train",
    "evaluate": "evaluate",
    "benchmark": "benchmark",
    "prepare": "prepare",
}
# Removed flags whose names other programs use, too: Slurm, mpirun.
NAMES_OF_OTHERS = {"output", "oversubscribe"}
STARTS = re.compile(r"python -m resnet_cpu\.(?P<module>[a-z_]+(?:\.[a-z_]+)*)|launch/(?P<batch>\w+)\.sbatch")
ENDS = re.compile(r"`|\s(?:&&?|;|>|\||#)(?:\s|$)|\$\(")


class Command(NamedTuple):
    line: int
    name: str
    arguments: str


def commands(text: str) -> Iterator[Command]:
    """Yield the commands of this package in fenced blocks and in inline code, with the text of their arguments."""
    joined = re.sub(r"\\\n", lambda match: "  ", text)  # same length: the positions stay those of `text`
    for line_start, line in lines(joined):
        starts = list(STARTS.finditer(line))
        for start, following in zip(starts, [*starts[1:], None]):
            rest = line[start.end() : following.start() if following else len(line)]
            end = ENDS.search(rest)
            number = text.count("\n", 0, line_start) + 1
            if start["module"] or start["batch"] in COMMAND_OF_BATCH_FILE:
                name = start["module"] or COMMAND_OF_BATCH_FILE[start["batch"]]
                own, _, others = (rest[: end.start()] if end else rest).partition(" -- ")
                yield Command(number, name, own)
                if "--tune" in own:  # the rest is handed to the benchmark
                    yield Command(number, "benchmark", others)


def lines(text: str) -> Iterator[tuple]:
    position = 0
    for line in text.splitlines(keepends=True):
        yield position, line
        position += len(line)


def flags_of(command: str) -> Dict[str, tuple]:
    """Return the flags that a command takes with the values that are allowed (none: any)."""
    found = {"flagfile": (), "help": ()}
    for flag in commandline.all_flags():
        if command in flag.commands:
            found[flag.name] = flag.field.metadata["choices"]
            if flag.kind is bool:
                found[f"no{flag.name}"] = ()
    return found


def faults(text: str) -> List[str]:
    """Return what is wrong with the commands in `text`: unknown commands, flags and values, missing flagfiles."""
    known = {path.stem for path in (ROOT / "resnet_cpu").glob("*.py")}
    found = []
    for line, name, arguments in commands(text):
        if "." in name and (ROOT / "resnet_cpu" / (name.replace(".", "/") + ".py")).is_file():
            continue
        if name not in known:
            found.append(f"{line}: python -m resnet_cpu.{name} does not exist")
            continue
        allowed = flags_of(name)
        for flag, value in re.findall(r"(?<![\w-])--(\w+)(?:=([^\s`\]]*))?", arguments):
            if flag not in allowed:
                found.append(f"{line}: --{flag} is not a flag of {name}")
            elif allowed[flag] and re.fullmatch(r"[a-z0-9_|\\]+", value):
                wrong = set(value.replace("\\", "").split("|")) - set(allowed[flag])
                found += [f"{line}: --{flag}={one} is not allowed" for one in sorted(wrong)]
            elif flag == "flagfile" and re.fullmatch(r"experiments/[\w/]+\.flags", value):
                found += [] if (ROOT / value).is_file() else [f"{line}: {value} does not exist"]
    return found


def anchors(text: str) -> Set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(folder, text: str) -> List[str]:
    """Return the relative links of a page in `folder` that lead to no file or to no heading of it."""
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = folder / name if name else None
        missing = target is not None and not target.exists()
        if missing or (anchor and anchor not in anchors(target.read_text(encoding="utf-8") if target else text)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", NAMED)
def test_relative_links_lead_somewhere(page):
    path = ROOT / page
    assert not dead_links(path.parent, path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", NAMED)
def test_commands_are_valid(page):
    assert not faults((ROOT / page).read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", NAMED)
def test_targets_of_make_exist(page):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = re.findall(r"(?:^|`|&& )make ([a-z]+)", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    assert set(named) <= targets


@pytest.mark.parametrize("page", [page for page in NAMED if page not in ("CHANGELOG.md", "docs/flags.md")])
def test_removed_flags_are_not_documented(page):
    removed = "|".join(set(commandline.REMOVED) - NAMES_OF_OTHERS)
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(rf"(?<![\w-])--({removed})\b", text)
    assert not found


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= WORDS_OF_README


def test_the_index_lists_every_page():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"\]\(([\w.-]+\.md)\)", index))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"} == listed


def test_negative_control_wrong_commands_are_found():
    text = (
        "```\npython -m resnet_cpu.train --no_such_flag=1\n"
        "launch/local.sh 2 python -m resnet_cpu.plan \\\n  --dry_run # comment --hosts\n"
        "python -m resnet_cpu.launch --hosts=a,b -- python -m resnet_cpu.train --seed=1 --hosts=c\n"
        "sbatch --nodes=2 launch/train.sbatch --nodes=3 --flagfile=experiments/none.flags\n```\n"
        "`python -m resnet_cpu.plan --format=table\\|pdf` and `python -m resnet_cpu.fly`\n"
    )
    assert faults(text) == [
        "2: --no_such_flag is not a flag of train",
        "3: --dry_run is not a flag of plan",
        "5: --hosts is not a flag of train",
        "6: --nodes is not a flag of train",
        "6: experiments/none.flags does not exist",
        "8: --format=pdf is not allowed",
        "8: python -m resnet_cpu.fly does not exist",
    ]


def test_negative_control_dead_links_are_found():
    text = "[a](README.md) [b](docs/none.md) [c](#here) [d](#there) [e](https://x.org/none)\n# Here\n"
    assert dead_links(ROOT, text) == ["docs/none.md", "#there"]


def test_the_line_that_the_readme_adds_to_tables_csv_has_a_cell_for_each_column():
    (line,) = re.findall(r"^echo '(.*)' >>experiments/tables\.csv$", (ROOT / "README.md").read_text(), re.MULTILINE)
    columns = (ROOT / "experiments" / "tables.csv").read_text().splitlines()[0]
    assert line.count(",") == columns.count(",")
