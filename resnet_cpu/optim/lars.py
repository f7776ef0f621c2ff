"""Layer-wise adaptive rate scaling (You et al., arXiv 1708.03888), in the form of MLPerf's ResNet reference:

    rate <- lr * eta * |w| / (|gradient| + wd * |w|)      for each variable; lr alone where a norm is zero
    v <- momentum * v + rate * (gradient + wd * w)
    w <- w - v

Variables on the skip list, biases and those of batch norm, use lr alone and do not decay.
"""

from typing import List

import tensorflow as tf

from resnet_cpu.optim import sgd

ETA = 0.001  # trust coefficient, dimensionless; that of MLPerf's reference


class LARS(sgd.SGD):
    """Momentum SGD with a trust ratio per variable; `exclude` is the skip list."""

    def rate(self, gradient: tf.Tensor, variable: tf.Variable) -> tf.Tensor:
        """Return the LR of `variable`: scaled by its trust ratio, unless it is on the skip list."""
        rate = super().rate(gradient, variable)
        if variable.name in self.exclude:
            return rate
        weight, slope = tf.norm(variable), tf.norm(gradient)
        ratio = ETA * weight / (slope + tf.cast(self.decay, rate.dtype) * weight)
        return rate * tf.where((weight > 0) & (slope > 0), ratio, 1.0)


def skip_list(model: tf.keras.Model) -> List[str]:
    """Return the names of variables with the plain LR and without weight decay: those of batch norm and all biases."""
    biases = [variable.name for variable in model.trainable_variables if variable.name.endswith("/bias:0")]
    return [*sgd.without_decay(model, wd_on_bn=False), *biases]
