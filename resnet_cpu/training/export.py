"""Export of trained weights: as plain arrays, or as a SavedModel. Exports are written, never loaded as code."""

import os
import shutil

import tensorflow as tf

from resnet_cpu.data import preprocess
from resnet_cpu.errors import OutputError
from resnet_cpu.run import checkpoint


def write(model: tf.keras.Model, view: preprocess.View, path: str) -> None:
    """Write weights and statistics of `model` to `path`.

    A path NAME.npz becomes a file of arrays by name, kernels as [height, width, in, out], which `--init_from` reads.
    Any other path becomes the folder of a SavedModel. Its signature `serving_default` takes `pixels`, float32 [batch,
    size, size, 3], RGB 0..255, normalises them as in training and returns `logits`, float32 [batch, classes].
    Raises OutputError if the file system refuses.
    """
    folder = os.path.abspath(path)  # without a slash at its end
    temporary = f"{folder}.tmp{os.getpid()}"
    try:
        if path.endswith(".npz"):
            checkpoint.write_weights(path, {variable.name: variable.numpy() for variable in model.variables})
        else:
            module = tf.Module()
            module.model = model
            tf.saved_model.save(module, temporary, signatures=_serving(model, view))
            os.rename(temporary, folder)
    except (OSError, tf.errors.OpError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OutputError(f"--export={path}: not written ({error}); check the free space") from None


def _serving(model: tf.keras.Model, view: preprocess.View) -> tf.types.experimental.ConcreteFunction:
    size = view.image_size

    @tf.function(input_signature=[tf.TensorSpec([None, size, size, 3], tf.float32, name="pixels")])
    def serve(pixels: tf.Tensor) -> dict:
        return {"logits": model(preprocess.normalize(pixels, view), training=False)}

    return serve
