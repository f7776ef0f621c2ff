"""The report of a run: progress on standard error."""

import sys
from typing import Any, Mapping

from resnet_cpu.report.text import duration


class Progress:
    """One line on standard error that says where the run is: rewritten on a terminal, appended elsewhere."""

    def __init__(self, total_steps: int, total_epochs: float, cores: int) -> None:
        self.total_steps, self.total_epochs, self.cores = total_steps, total_epochs, cores
        self._terminal = sys.stderr.isatty()

    def show(self, row: Mapping[str, Any], step_s: float) -> None:
        """Print one row of metrics.jsonl; `step_s` is the time a step takes, for the time left."""
        steps = row["step"] + 1
        speed = "first step"  # it traces the graph, and is not timed
        if row["images_per_second"] is not None:
            rate = row["images_per_second"]
            speed = (
                f"{rate:.1f} img/s ({rate / self.cores:.1f}/core)  "
                f"data wait {100 * row['data_wait_s'] / row['step_s']:.1f}%  "
                f"left {duration((self.total_steps - steps) * step_s)}"
            )
        line = (
            f"{row['phase']}  step {steps}/{self.total_steps}  "
            f"epoch {self.total_epochs * steps / self.total_steps:.2f}/{self.total_epochs:.2f}  "
            f"loss {row['loss']:.4f}  lr {row['lr']:.5g}  {speed}"
        )
        end = "" if self._terminal else "\n"
        print(("\r\x1b[K" if self._terminal else "") + line, end=end, file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Print a line of its own."""
        print(("\r\x1b[K" if self._terminal else "") + text, file=sys.stderr, flush=True)
