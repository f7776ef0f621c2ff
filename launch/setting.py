"""Print the value of one training flag, for the batch files: python launch/setting.py run_dir FLAGS."""

import sys

from resnet_cpu import commandline


def main(name: str, *flags: str) -> None:
    """Print the value of run_dir or dataset that `flags` give, without a newline; nothing if they give none."""
    settings = commandline.parse(flags, "train")
    value = {"run_dir": settings.run.run_dir, "dataset": settings.data.dataset}[name]
    print(value or "", end="")


if __name__ == "__main__":
    main(*sys.argv[1:])
