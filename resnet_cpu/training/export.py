"""Trained weights for use elsewhere: as plain arrays, or as a SavedModel. Exports are written, never read as code."""

import os
import shutil

import tensorflow as tf

from resnet_cpu.data import preprocess
from resnet_cpu.errors import OutputError
from resnet_cpu.run import checkpoint


def write(model: tf.keras.Model, view: preprocess.View, path: str) -> None:
    """Write weights and statistics of `model` to `path`.

    NAME.npz holds them by name, kernels as [height, width, in, out]; `--init_from` reads it. Any other name becomes a
    SavedModel's folder, whose signature `serving_default` takes `pixels`, float32 [batch, size, size, 3], RGB 0..255,
    normalises them as in training and returns `logits`, float32 [batch, classes].
    """
    temporary = f"{path}.tmp{os.getpid()}"
    try:
        if path.endswith(".npz"):
            checkpoint.write_weights(path, {variable.name: variable.numpy() for variable in model.variables})
        else:
            module = tf.Module()
            module.model = model
            tf.saved_model.save(module, temporary, signatures=_serving(model, view))
            os.rename(temporary, path)
    except (OSError, tf.errors.OpError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OutputError(f"--export={path}: not written ({error}); see that there is space") from None


def _serving(model: tf.keras.Model, view: preprocess.View) -> tf.types.experimental.ConcreteFunction:
    size = view.image_size

    @tf.function(input_signature=[tf.TensorSpec([None, size, size, 3], tf.float32, name="pixels")])
    def serve(pixels: tf.Tensor) -> dict:
        return {"logits": model(preprocess.normalize(pixels, view), training=False)}

    return serve
