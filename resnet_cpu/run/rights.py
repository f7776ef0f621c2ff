"""Which folders a run may have, and who else may write to a folder."""

import os
import pwd
import stat


def refused(path: str) -> str:
    """Return why no run can have the folder `path`, which need not exist, as a part of a message; empty if it can."""
    if os.path.realpath(path) == "/":
        return "is the root of the file system"
    if os.path.exists(os.path.join(path, "manifest.json")):
        return "is a data set or a checkpoint"
    above = os.path.abspath(path)
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above):
        return "is not a folder" if above == os.path.abspath(path) else f"{above} is not a folder"
    return ""


def others_may_write(path: str) -> str:
    """Return who besides this user and root may write to a folder, as a part of a message; empty if no one may.

    Groups are not reported: a folder that the members of a project share is meant to be shared.
    """
    about = os.stat(path)
    if about.st_mode & stat.S_IWOTH:
        return "every user of this machine may write to it"
    if about.st_uid not in (0, os.geteuid()):
        return f"it belongs to {_name(about.st_uid)}, who may write to it"
    return ""


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"
