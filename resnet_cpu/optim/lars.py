"""Layer-wise adaptive rate scaling (You et al., arXiv 1708.03888), in the form of MLPerf's ResNet reference:

    rate <- lr * eta * |w| / (|gradient| + wd * |w|)      of each variable; lr alone where a norm is zero
    v <- momentum * v + rate * (gradient + wd * w)
    w <- w - v

Variables of the skip list, biases and batch norm's, take lr alone and do not decay.
"""

from typing import Any, Dict, List, Sequence

import tensorflow as tf

from resnet_cpu.optim import sgd


class LARS(sgd.SGD):
    """Momentum SGD with a trust ratio per variable; `exclude` is the skip list."""

    def __init__(
        self,
        learning_rate: sgd.Scalar = 0.0,
        weight_decay: sgd.Scalar = 0.0,
        momentum: sgd.Scalar = 0.0,
        exclude: Sequence[str] = (),
        eta: float = 0.001,
        name: str = "LARS",
        **kwargs: Any,
    ) -> None:
        """Args: `eta` is the trust coefficient, dimensionless."""
        super().__init__(learning_rate, weight_decay, momentum, exclude, name, **kwargs)
        self.eta = eta

    def rate(self, gradient: tf.Tensor, variable: tf.Variable) -> tf.Tensor:
        """Return the LR of one variable: scaled by its trust ratio, unless it is on the skip list."""
        rate = super().rate(gradient, variable)
        if variable.name in self.exclude:
            return rate
        weight, slope = tf.norm(variable), tf.norm(gradient)
        ratio = self.eta * weight / (slope + tf.cast(self.decay, rate.dtype) * weight)
        return rate * tf.where((weight > 0) & (slope > 0), ratio, 1.0)

    def get_config(self) -> Dict[str, Any]:
        return {**super().get_config(), "eta": self.eta}


def skip_list(model: tf.keras.Model) -> List[str]:
    """Return the variables that take the plain LR and do not decay: batch norm's and every bias."""
    biases = [variable.name for variable in model.trainable_variables if variable.name.endswith("/bias:0")]
    return [*sgd.without_decay(model, wd_on_bn=False), *biases]
