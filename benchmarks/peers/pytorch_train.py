"""Time ResNet-50 v1.5 in PyTorch, with the usual loop on synthetic images. Last line `total images/sec: X`.

    python benchmarks/peers/pytorch_train.py                                    one process, as installed
    torchrun --nproc_per_node=2 benchmarks/peers/pytorch_train.py --tuned       DistributedDataParallel over gloo

The memory format is channels_last, which PyTorch's documentation recommends for convolutions on CPUs. `--tuned` adds
the fused update, flushed denormals, gradients as views of DDP's buckets, a static graph, and one core per process if
there are several. Batch norm's statistics are those of rank 0, as DDP handles them.
"""

import argparse
import os
import time

import torch
from torch import nn

PARAMETERS = 25_557_032  # of the network with its 1,000 classes


class Bottleneck(nn.Module):
    """Residual block of 1x1, 3x3 (strided, as in v1.5) and 1x1 convolutions with a shortcut."""

    def __init__(self, inputs: int, inner: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * inner
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += self.shortcut(x)
        return self.relu(y)


def resnet50() -> nn.Sequential:
    """Return the network from [batch, 3, height, width] to logits [batch, 1000], with He's initial weights."""
    blocks, inputs = [], 64
    for stage, count in enumerate((3, 4, 6, 3)):
        for block in range(count):
            inner = 64 * 2**stage
            blocks.append(Bottleneck(inputs, inner, 2 if stage > 0 and block == 0 else 1))
            inputs = 4 * inner
    model = nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(inputs, 1000),
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4, help="timed steps, after --warmup_steps that are not timed")
    parser.add_argument("--warmup_steps", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=32, help="per process")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--tuned", action="store_true")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="bfloat16: autocast")
    arguments = parser.parse_args()
    processes, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    torch.manual_seed(0)
    if arguments.tuned:
        torch.set_flush_denormal(True)
    model = resnet50().to(memory_format=torch.channels_last).train()
    trained = model
    if processes > 1:
        if arguments.tuned:
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, cores[rank * len(cores) // processes : (rank + 1) * len(cores) // processes])
        torch.distributed.init_process_group("gloo")
        trained = nn.parallel.DistributedDataParallel(
            model, gradient_as_bucket_view=arguments.tuned, static_graph=arguments.tuned
        )
    if arguments.compile:
        trained = torch.compile(trained)
    # None: the default of PyTorch, which on CPUs is a loop over the weights.
    optimizer = torch.optim.SGD(
        model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4, fused=True if arguments.tuned else None
    )
    size = arguments.image_size
    images = torch.randn(arguments.batch_size, 3, size, size).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(1000, (arguments.batch_size,))
    cross_entropy = nn.CrossEntropyLoss()
    ends = []
    for _ in range(arguments.warmup_steps + arguments.steps):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.precision == "bfloat16"):
            loss = cross_entropy(trained(images), labels)
        loss.backward()
        optimizer.step()
        loss.item()
        ends.append(time.perf_counter())
    seconds = torch.tensor(ends[-1] - ends[arguments.warmup_steps - 1])
    if processes > 1:
        torch.distributed.all_reduce(seconds, torch.distributed.ReduceOp.MAX)
        torch.distributed.destroy_process_group()
    if rank == 0:
        steps = " ".join(f"{after - before:.2f}" for before, after in zip(ends, ends[1:]))
        print(f"threads {torch.get_num_threads()}, seconds of steps after the first: {steps}")
        print(f"total images/sec: {processes * arguments.steps * arguments.batch_size / float(seconds):.3f}")


if __name__ == "__main__":
    main()
