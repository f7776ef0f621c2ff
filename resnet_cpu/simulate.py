"""Predict the speed of N nodes: `python -m resnet_cpu.simulate --flagfile=F`. Trains nothing, imports no TensorFlow."""

from typing import List

from resnet_cpu import commandline
from resnet_cpu.cluster import guard
from resnet_cpu.simulator import answers


def main(argv: List[str]) -> None:
    """Print the curve and the answers that follow from it as a table or CSV, or draw it and print the file."""
    print(answers.answer(commandline.parse(argv, "simulate")))


if __name__ == "__main__":
    guard.run(main, reader_may_leave=True)
