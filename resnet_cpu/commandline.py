"""From the command line to frozen settings: flags, `--help` and docs/flags.md, all derived from `settings.py`.

absl parses; a layer of our own turns its errors into one line and exit code 64, shows each command only its own flags,
and keeps no flag global, so that a process can parse any number of command lines.
"""

import dataclasses
import difflib
import math
import os
import re
import shutil
import sys
import textwrap
import typing
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from absl import flags

from resnet_cpu import fields, flagfiles, settings
from resnet_cpu.command_settings import REMOVED, SOURCES
from resnet_cpu.data.datasets import DATASETS, facts_of, normalization_of
from resnet_cpu.errors import CheckpointError, FlagError
from resnet_cpu.run import files
from resnet_cpu.run.folder import read_json
from resnet_cpu.run.signature import normalised
from resnet_cpu.settings import GROUPS, Settings

_COMMENT = "a comment must be on a line of its own that starts with #"
_AFTER_FLAGS = {"launch": " -- COMMAND [ARGUMENT ...]"}


class Flag(NamedTuple):
    """A field that is a flag."""

    name: str
    field: "dataclasses.Field[Any]"
    kind: Any  # int, float, bool, str, list for texts separated by commas, `repeated` for a flag given several times
    group: str  # name in Settings
    commands: Tuple[str, ...]

    @property
    def of_a_run(self) -> bool:
        """Return whether the flag is a setting of a run, which a flagfile may hold and a run records."""
        return GROUPS[self.group][1] == settings.OF_A_RUN

    @property
    def takes(self) -> str:
        """Return what values are allowed; empty for texts without choices."""
        return fields.allowed(self.name, self.kind, self.field.metadata)

    @property
    def default(self) -> str:
        """Return the default as text, empty without a default."""
        default, shown = self.field.default, self.field.metadata["shown"]
        if shown is not None:
            return shown
        return "" if default in (None, ()) else str(default).lower() if self.kind is bool else str(default)


def all_flags() -> List[Flag]:
    """Return every flag, group by group in the order of `settings.py`."""
    found = []
    for group, (kind, commands) in GROUPS.items():
        types = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            about = field.metadata
            if "help" in about:
                name = about["flag"] or field.name
                found.append(Flag(name, field, _kind(types[field.name], about), group, (*commands, *about["also"])))
    return found


def _kind(annotation: Any, about: Any) -> Any:
    if about["flag"]:
        return "repeated"
    if typing.get_origin(annotation) is tuple and annotation == Tuple[str, ...]:
        return list
    if about["parse"] is not None:
        return str
    plain = [part for part in typing.get_args(annotation) or (annotation,) if part is not type(None)]
    return plain[0]


def _define(every: Sequence[Flag]) -> flags.FlagValues:
    """Return absl flags for `every` flag; those with a default of None have none, others theirs."""
    values = flags.FlagValues()
    for flag in every:
        about = flag.field.metadata
        default: Any = flag.field.default
        arguments = {"flag_values": values, "help": about["help"]}
        if flag.kind == "repeated":
            flags.DEFINE_multi_string(flag.name, [], **arguments)
        elif flag.kind is list:
            flags.DEFINE_list(flag.name, [], **arguments)
        elif flag.kind is bool:
            flags.DEFINE_boolean(flag.name, default, **arguments)
        elif about["choices"]:
            flags.DEFINE_enum(flag.name, default, about["choices"], **arguments)
        elif flag.kind in (int, float) and default is None:
            parser = fields.parser_of(flag.kind, about["low"], about["high"])
            flags.DEFINE(parser, flag.name, None, serializer=flags.ArgumentSerializer(), **arguments)
        elif flag.kind in (int, float):
            define = flags.DEFINE_integer if flag.kind is int else flags.DEFINE_float
            define(flag.name, default, lower_bound=about["low"], upper_bound=about["high"], **arguments)
        else:
            text = about["shown"] if about["parse"] is not None else default
            flags.DEFINE_string(flag.name, text, **arguments)
    return values


def parse(argv: Sequence[str], command: str = "train", recorded: Optional[str] = None) -> Settings:
    """Return the settings of a command line without the program's name.

    `--help` prints the flags of `command` and exits 0. With `recorded`, the folder of a run, the flags that this run
    recorded come first; its images keep their size, crop and normalisation if the command line names another data set.
    Raises FlagError with a one-line remedy for anything that is not as it should be.
    """
    if any(argument in ("-h", "--help", "--helpfull", "-help", "-helpfull") for argument in argv):
        print(help_text(command))
        sys.exit(0)
    words = flagfiles.inserted(argv)
    if recorded:
        own = recorded_flags(recorded)
        words = [*own, *_view_of(recorded, own, words), *words, f"--run_dir={recorded}"]
    with flagfiles.located(words):
        return _settings_of(words, command, recorded is not None)


def _settings_of(words: Sequence[str], command: str, recorded: bool) -> Settings:
    every = all_flags()
    values = _define(every)
    rest = _parse(values, words)
    positional = ["source"] if command == "prepare" else []
    if len(rest) > len(positional):
        raise FlagError(
            f"'{rest[len(positional)]}' is not a flag; write --name=value. In flagfiles, a comment line starts with #"
        )
    _check_commands(values, every, command)
    for flag in every:
        _check_text(values, flag)
    # What `evaluate` is given is only whole together with the flags that the run recorded.
    whole = command in settings.OF_A_RUN and (command != "evaluate" or recorded)
    return _frozen(values, every, whole, dict(zip(positional, rest)))


def _parse(values: flags.FlagValues, argv: Sequence[str]) -> List[str]:
    """Let absl parse; return the positional arguments, and raise its errors as FlagError."""
    for word in argv:
        if re.fullmatch(r"--?undefok(=.*)?", word):  # absl would pass over unknown flags, and so over misspelt ones
            raise FlagError(f"{word}: every flag must be known; remove it, and the flags that it names")
    try:
        return values(["resnet_cpu", *argv])[1:]
    except flags.UnrecognizedFlagError as error:
        # absl passes the whole argument as the value.
        shown = error.flagvalue if str(error.flagvalue).startswith("-") else f"--{error.flagname}"
        name = error.flagname
        remedy = REMOVED.get(name) or REMOVED.get(name[2:] if name.startswith("no") else name)
        if remedy is not None:
            raise FlagError(f"{shown}: this flag was removed; {remedy}") from None
        close = difflib.get_close_matches(name, list(values), n=3)
        remedy = f"did you mean {' or '.join('--' + other for other in close)}?" if close else "see --help"
        if " " in name:
            remedy = "write --name=value"
        raise FlagError(f"{shown}: unknown flag; {remedy}") from None
    except (flags.Error, ValueError) as error:  # ValueError: a value for the no-form of a switch, as in --noquick=1
        reason = " ".join(str(error).removeprefix("ERROR:: ").split())
        wrong = [flag.takes for flag in all_flags() if reason.startswith(f"flag --{flag.name}=")]
        remedy = _COMMENT if " #" in reason else wrong[0] if wrong else ""
        if not remedy:
            raise FlagError(f"{reason}; see --help for the values that are allowed") from None
        given = [f"--{word.lstrip('-')}" for word in argv if reason.startswith(f"flag --{word.lstrip('-')}: ")]
        raise FlagError(f"{given[0] if given else reason.split(': ')[0].removeprefix('flag ')}: {remedy}") from None


def _check_commands(values: flags.FlagValues, every: Sequence[Flag], command: str) -> None:
    """Raise FlagError for a flag that `command` does not take."""
    for flag in every:
        if values[flag.name].present and command not in flag.commands:
            if command == "launch":
                raise FlagError(f"--{flag.name}: belongs to the command that is started; write it after --")
            owners = " and ".join(f"resnet_cpu.{owner}" for owner in flag.commands)
            raise FlagError(f"--{flag.name}={values[flag.name].value}: belongs to python -m {owners}; remove it here")


def _check_text(values: flags.FlagValues, flag: Flag) -> None:
    """Raise FlagError for values that no flag may have; expand `~` and `$VAR` in paths."""
    value = values[flag.name].value
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, str):
            flagfiles.check_characters(flag.name, one)
        if isinstance(one, str) and " #" in one:
            raise FlagError(f"--{flag.name}={one}: {_COMMENT}")
        if isinstance(one, float) and not math.isfinite(one):
            raise FlagError(f"--{flag.name}={one}: {flag.takes}")
    if flag.field.metadata["path"] and values[flag.name].present and value:
        expanded = [flagfiles.expanded(flag.name, one) for one in value] if isinstance(value, list) else None
        values[flag.name].value = flagfiles.expanded(flag.name, value) if expanded is None else expanded


def _frozen(values: flags.FlagValues, every: Sequence[Flag], whole: bool, positional: Dict[str, str]) -> Settings:
    """Return the settings of parsed flags, filled in from the data set; checked if they are the `whole` of a run."""
    groups: Dict[str, Dict[str, Any]] = {name: {} for name in GROUPS}
    for flag in every:
        value, convert = values[flag.name].value, flag.field.metadata["parse"]
        if convert is not None and value is not None:
            try:
                value = convert(value)
            except ValueError as error:
                raise FlagError(f"--{flag.name}={values[flag.name].value}: {error}") from None
        elif value in ("", [], None) and values[flag.name].present and flag.field.default in (None, ()):
            if not flag.of_a_run:  # an empty one of a run overrides that of a flagfile
                raise FlagError(f"--{flag.name}=: the value is empty; give one, or remove the flag")
            value = None
        elif flag.kind is list:
            value = tuple(value or ())
        groups[flag.group].update(value if isinstance(value, dict) else {flag.field.name: value})
    groups["prepare"].update(positional)
    _fill_in(groups, whole)
    found = Settings(
        **{name: kind(**groups[name]) for name, (kind, _) in GROUPS.items()},
        given=frozenset(flag.name for flag in every if values[flag.name].present),
        resolved_flags=_resolved(values, every),
    )
    if whole:
        settings.check(found)
    return found


def _fill_in(groups: Dict[str, Dict[str, Any]], whole: bool) -> None:
    """Replace what was left open by what is known of the data set; raise an error if that does not fix the classes."""
    data, model = groups["data"], groups["model"]
    dataset = data["dataset"]
    if dataset not in DATASETS and not re.fullmatch(r"tfds:[A-Za-z0-9_]+(/[A-Za-z0-9_.-]+)*", dataset):
        raise FlagError(f"--dataset={dataset}: unknown; use one of {', '.join(DATASETS)} or tfds:NAME")
    facts = facts_of(dataset, data["data_dir"])
    data["image_size"] = data["image_size"] or facts.image_size
    data["eval_crop"] = data["eval_crop"] or facts.eval_crop
    model["num_classes"] = model["num_classes"] or facts.num_classes
    if whole and not model["num_classes"]:
        if dataset == "folder" and data["data_dir"]:
            from resnet_cpu.data import folders  # not needed otherwise, and slow to load

            folders.describe(data["data_dir"], dataset)  # raises what is wrong with the manifest
        remedy = "give it, or --data_dir with a folder that `prepare` made"
        if dataset != "folder":
            remedy = f"--dataset={dataset} does not fix the number of classes"
        raise FlagError(f"--num_classes is missing; {remedy}")


def _resolved(values: flags.FlagValues, every: Sequence[Flag]) -> str:
    """Return a flagfile that gives the settings of a run again, one flag a line, group by group."""
    lines: List[str] = []
    for group, (kind, _) in GROUPS.items():
        chosen = [values[flag.name] for flag in every if flag.group == group and flag.of_a_run]
        given = [flag.serialize() for flag in chosen if flag.value is not None and flag.value != []]
        lines += [f"# {kind.__doc__}", *given] if given else []
    return "\n".join(lines) + "\n"


def recorded_flags(run_dir: str) -> List[str]:
    """Return the flags that the run in `run_dir` recorded, those of an earlier version translated.

    Raises CheckpointError if the run does not exist.
    """
    path = os.path.join(run_dir, files.FLAGS)
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.rstrip("\n") for line in file if line.startswith("--")]
    except (OSError, UnicodeDecodeError):
        raise CheckpointError(f"{run_dir}: {files.FLAGS} is missing or unreadable; name the folder of a run") from None
    kept = []
    area: Optional[str] = None
    for line in lines:
        name, _, value = line[2:].partition("=")
        if name == "crop_area":
            area = value
        elif name not in REMOVED:  # none of the others changes how a run is evaluated
            kept.append(line)
    if area is not None:  # version 0.1 had the name in --crop alone
        kept = [f"{line}:{area}" if line.startswith("--crop=") else line for line in kept]
    return kept


def _view_of(run_dir: str, own: Sequence[str], words: Sequence[str]) -> List[str]:
    """Return flags that fix what the data set of a run decided for it, if `words` name another set; [] if they do not.

    A network has to see the images of another set as it saw those that it was trained on.

    Args:
        own: the flags that the run in `run_dir` recorded.
    """
    recorded, now = _define(all_flags()), _define(all_flags())
    _parse(recorded, own)
    _parse(now, [*own, *words])
    evaluated, dataset = now["dataset"].value, str(recorded["dataset"].value)
    if evaluated == dataset:
        return []
    try:
        signature = normalised((read_json(os.path.join(run_dir, files.RECORD)) or {})["signature"])
        of_data, of_model = signature["data"], signature["model"]
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"{run_dir}: {files.RECORD} is missing or damaged, which says how the images of --dataset={dataset} were "
            "seen; evaluate on that data set"
        ) from None
    facts = facts_of(dataset)
    found = {
        "image_size": facts.image_size,
        "eval_crop": of_data.get("eval_crop", facts.eval_crop),
        "num_classes": of_model.get("num_classes", facts.num_classes),
        "normalization": normalization_of("auto", dataset, of_data.get("pixels") is not None),
    }
    chosen = {name: recorded[name].value for name in found}
    return [
        f"--{name}={value}" for name, value in found.items() if value is not None and chosen[name] in (None, "auto")
    ]


def help_text(command: str) -> str:
    """Return what `--help` of a command prints: its flags with their defaults, wrapped to the terminal's width."""
    width = max(60, min(shutil.get_terminal_size((100, 24)).columns, 120))
    source = f" {'|'.join(SOURCES)}" if command == "prepare" else ""
    usage = (
        f"usage: python -m resnet_cpu.{command}{source} [--flagfile=FILE] [--flag=value ...]"
        f"{_AFTER_FLAGS.get(command, '')}"
    )
    lines = textwrap.wrap(usage, width, subsequent_indent="    ", break_on_hyphens=False)
    note = "A later flag overrides an earlier one, so overrides go after --flagfile. Switches are --name and --noname."
    lines += textwrap.wrap(note, width)
    every = [flag for flag in all_flags() if command in flag.commands]
    groups = sorted(GROUPS, key=lambda name: GROUPS[name][1] == settings.OF_A_RUN)  # the command's own first
    for group in groups:
        chosen = [flag for flag in every if flag.group == group]
        if chosen:
            lines += ["", f"{GROUPS[group][0].__doc__}"]
        for flag in chosen:
            choices = "|".join(flag.field.metadata["choices"])
            shown = (
                f"  --{flag.name}" + (f"={choices}" if choices else "") + (f" [{flag.default}]" if flag.default else "")
            )
            lines.append(shown)
            lines += textwrap.wrap(
                flag.field.metadata["help"],
                width,
                initial_indent="      ",
                subsequent_indent="      ",
                break_on_hyphens=False,
            )
    return "\n".join(lines)


def reference() -> str:
    """Return docs/flags.md: every flag with its default and its commands, a Markdown table per group."""
    lines = [
        "# Flags",
        "",
        "Generated by `make docs` from `resnet_cpu/settings.py`. `python -m resnet_cpu.COMMAND --help` shows the flags",
        "of one command. Flags are given on the command line or in a flagfile (`--flagfile=FILE`: UTF-8 text, one flag",
        "per line without quotes; a comment line starts with `#`). A later flag overrides an earlier one. Switches are",
        "`--name` and `--noname`. An empty value, as in `--batch_size=`, unsets that of a flagfile, for settings of a",
        "run (recipe to machine, below) without a default, other than `--phase`. A command refuses the flags of other",
        "commands. In paths, `~` and `$VAR` are expanded.",
    ]
    every = all_flags()
    for group, (kind, commands) in GROUPS.items():
        title = str(kind.__doc__)
        lines += [
            "",
            f"## {title[0].upper()}{title[1:]}",
            "",
            f"Commands: {', '.join(f'`{name}`' for name in commands)}.",
        ]
        lines += ["", "| flag | default | meaning |", "|---|---|---|"]
        for flag in (flag for flag in every if flag.group == group):
            about = flag.field.metadata
            text = f"`{'`, `'.join(about['choices'])}`. {about['help']}" if about["choices"] else about["help"]
            if about["also"]:
                text += f" Also of {' and '.join(f'`{name}`' for name in about['also'])}."
            default = f"`{flag.default}`" if flag.default else ""
            lines.append(f"| `--{flag.name}` | {default} | {text.replace('|', chr(92) + '|')} |")
    lines += ["", "## Removed flags", "", "Each is refused with exit code 64.", "", "| flag | instead |", "|---|---|"]
    lines += [f"| `--{name}` | {remedy} |" for name, remedy in REMOVED.items()]
    return "\n".join(lines) + "\n"


def required(value: Optional[str], flag: str, remedy: str) -> str:
    """Return the value of a flag that a command requires; raise FlagError if it is missing."""
    if not value:
        raise FlagError(f"--{flag} is missing; {remedy}")
    return value
