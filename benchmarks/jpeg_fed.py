"""Training on JPEG records against training on synthetic images: the cost of reading and decoding.

    python benchmarks/jpeg_fed.py --rounds 7 --out benchmarks/results/jpeg_fed.csv

ResNet-50 at 224x224 on two ranks with one core and batch 32 each. The records are photographs of 110 kB (photos.py);
each is read with its checksum, cropped at random, resized bicubically and flipped.
"""

import os
import pathlib
import sys
import tempfile

import paired
import photos


def main() -> None:
    parser = paired.parser(__doc__)
    parser.add_argument("--steps", type=int, default=8, help="steps per run; all but the first are timed")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--examples", type=int, default=1024)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data_dir = pathlib.Path(folder) / "photos"
        print(f"records: {photos.write(data_dir, arguments.examples)}", flush=True)
        runs = iter(range(10_000))

        def train(*data: str) -> float:
            command = [
                "launch/local.sh", 2, sys.executable, "-m", "resnet_cpu.train", *data, "--resize=bicubic",
                "--batch_size=32", f"--phase=main:steps={arguments.steps},lr=0.01", "--log_every_steps=1000",
                "--checkpoint_every_steps=0", "--eval_every_epochs=0", f"--precision={arguments.precision}",
                f"--run_dir={folder}/{next(runs)}",
            ]  # fmt: skip
            return paired.rate_of_training(paired.start(command))

        sides = {
            "jpeg": lambda: train("--dataset=imagenet", f"--data_dir={data_dir}"),
            "synthetic": lambda: train("--dataset=synthetic", f"--train_examples={arguments.examples}"),
        }
        paired.compare(sides, [("jpeg", "synthetic")], arguments.rounds, arguments.out)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    main()
