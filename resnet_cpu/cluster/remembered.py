"""Keep what was measured on hosts of one type in files of the user: $XDG_CONFIG_HOME/resnet_cpu (~/.config/...).

The nodes of a cluster usually share that folder with its login node.
"""

import contextlib
import json
import os
import tempfile
from typing import Any, Dict, Mapping

from resnet_cpu.cluster.machine import Machine


def file(name: str, environ: Mapping[str, str] = os.environ) -> str:
    """Return the path of the file NAME.json."""
    folder = environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return os.path.join(folder, "resnet_cpu", f"{name}.json")


def host_type(host: Machine) -> str:
    """Return the properties for which one result holds: processor, domains, permitted cores."""
    domains = len({core[0].node for core in host.cores()})
    parts = [host.model or "unknown", f"{host.sockets} sockets", f"{domains} domains"]
    parts.append(f"{len(host.cores())} cores")
    return ", ".join(parts if host.quota is None else [*parts, f"quota {host.quota:g}"])


def read(path: str) -> Dict[str, Any]:
    """Return the records of a file by host type; a missing or damaged file has none."""
    try:
        with open(path, encoding="utf-8") as text:
            found = json.load(text)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def add(path: str, key: str, record: Any) -> None:
    """Set the record of a host type; readers see the old file or the new one.

    Raises OSError if the file cannot be written, and leaves nothing behind.
    """
    records = {**read(path), key: record}
    os.makedirs(os.path.dirname(path), exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path))
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            json.dump(records, out, indent=1, sort_keys=True)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
