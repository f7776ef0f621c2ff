"""The training images of one rank, from the settings: of the data set, or synthetic."""

from typing import Iterator, Optional

from resnet_cpu.cluster.control import World
from resnet_cpu.data import batches as pipeline
from resnet_cpu.data import order, synthetic
from resnet_cpu.data.folders import ShardedData
from resnet_cpu.recipe.batch import Batch
from resnet_cpu.settings import Settings


def training_batches(
    settings: Settings,
    world: World,
    data: Optional[ShardedData],
    *,
    examples: int,
    batch: Batch,
    first_step: int,
    last_step: int,
    augment: str,
    image_size: int,
) -> Iterator[pipeline.Batch]:
    """Yield this rank's micro-batches for the steps first_step ... last_step - 1; without `data` they are synthetic."""
    share = order.Share(
        seed=settings.recipe.seed,
        examples=examples,
        batch_size=batch.per_rank,
        first_step=first_step,
        last_step=last_step,
        rank=world.rank,
        ranks=world.size,
        block=settings.data.order_block,
        micro_batches=batch.accumulate_steps,
    )
    classes, threads = settings.model.num_classes, settings.data.data_threads or world.cores
    if data is None:
        return synthetic.training_batches(image_size, share, num_classes=classes, threads=threads)
    view = pipeline.make_view(settings.data, data, image_size)
    return pipeline.training_batches(data, view, augment, share, num_classes=classes, threads=threads)
