"""Print what a flagfile would do, without data, training or TensorFlow: `python -m resnet_cpu.plan --flagfile=F`."""

from typing import List

from resnet_cpu import commandline
from resnet_cpu.cluster import guard
from resnet_cpu.report import plan_table


def main(argv: List[str]) -> None:
    """Print the plan as a table or CSV, or draw it and print the name of the file."""
    print(plan_table.answer(commandline.parse(argv, "plan")))


if __name__ == "__main__":
    guard.run(main, reader_may_leave=True)
