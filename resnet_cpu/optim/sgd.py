"""Momentum SGD with coupled weight decay, as the authors' Caffe does it:

    v <- momentum * v + lr * (gradient + wd * w)
    w <- w - v                                                 with Nesterov momentum:
    w <- w - (momentum * v + lr * (gradient + wd * w))

The LR is inside the velocity, so lowering it does not rescale the velocity of earlier steps. Keras' own
`weight_decay` is decoupled (w -= lr * wd * w outside the velocity) and would train another model.
"""

from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple, Union

import tensorflow as tf

from resnet_cpu.model.kernels import library

Scalar = Union[float, tf.Variable]


class SGD(tf.keras.optimizers.Optimizer):
    """Momentum SGD with L2 in the gradient; LR, weight decay and momentum are variables, so that they can be assigned.

    Horovod rebuilds an optimizer from `get_config`, which therefore holds the variables themselves: the rebuilt
    optimizer uses the same ones. Options of Keras' optimizers that are not listed here are refused.
    """

    def __init__(
        self,
        learning_rate: Scalar = 0.0,
        weight_decay: Scalar = 0.0,
        momentum: Scalar = 0.0,
        exclude: Sequence[str] = (),
        nesterov: bool = False,
        fused: bool = False,
        name: Optional[str] = None,
    ) -> None:
        """Args:
        exclude: names of variables without weight decay.
        fused: update all variables in one operation of `resnet_cpu.model.kernels`, whose library must load; all
            must be float32.
        name: by default that of the class.
        """
        super().__init__(name=name or type(self).__name__, jit_compile=False)
        self._learning_rate = _variable(learning_rate, "learning_rate")
        self.decay = _variable(weight_decay, "weight_decay")
        self.momentum = _variable(momentum, "momentum")
        self.exclude, self.nesterov, self.fused = list(exclude), nesterov, fused

    def build(self, var_list: Iterable[tf.Variable]) -> None:
        super().build(var_list)
        if getattr(self, "_built", False):
            return
        self.velocities: List[tf.Variable] = [
            self.add_variable_from_reference(variable, "velocity") for variable in var_list
        ]
        self._built = True

    def apply_gradients(self, grads_and_vars: Iterable[Tuple[tf.Tensor, tf.Variable]], **options: Any) -> tf.Tensor:
        """Update all variables with their gradients; return the number of updates so far."""
        if not self.fused:
            return super().apply_gradients(grads_and_vars, **options)
        gradients, weights = zip(*grads_and_vars)
        self.build(weights)
        library.load().ops.resnet_cpu_momentum(
            weights=[weight.handle for weight in weights],
            velocities=[self._velocity(weight).handle for weight in weights],
            gradients=gradients,
            rate=self._learning_rate,
            decay=self.decay,
            momentum=self.momentum,
            decays=[weight.name not in self.exclude for weight in weights],
            nesterov=self.nesterov,
        )
        return self.iterations.assign_add(1)

    def update_step(self, gradient: tf.Tensor, variable: tf.Variable) -> None:
        """Update `variable` with its dense `gradient`, of the same shape."""
        dtype = variable.dtype.base_dtype
        velocity = self._velocity(variable)
        rate = self.rate(gradient, variable)
        if variable.name not in self.exclude:
            gradient = gradient + tf.cast(self.decay, dtype) * variable
        # One fused kernel: accum <- momentum * accum - lr * gradient; var <- var + accum, with Nesterov momentum
        # var + momentum * accum - lr * gradient. So accum is -v.
        tf.raw_ops.ResourceApplyKerasMomentum(
            var=variable.handle,
            accum=velocity.handle,
            lr=rate,
            grad=gradient,
            momentum=tf.cast(self.momentum, dtype),
            use_locking=False,
            use_nesterov=self.nesterov,
        )

    def _velocity(self, variable: tf.Variable) -> tf.Variable:
        return self.velocities[self._index_dict[self._var_key(variable)]]

    def rate(self, gradient: tf.Tensor, variable: tf.Variable) -> tf.Tensor:
        """Return the LR of `variable`, a scalar of its dtype."""
        return tf.cast(self._learning_rate, variable.dtype.base_dtype)

    def get_config(self) -> Dict[str, Any]:
        return {
            "name": self.name,
            "learning_rate": self._learning_rate,
            "weight_decay": self.decay,
            "momentum": self.momentum,
            "exclude": self.exclude,
            "nesterov": self.nesterov,
            "fused": self.fused,
        }


def _variable(value: Scalar, name: str) -> tf.Variable:
    if isinstance(value, tf.Variable):
        return value
    return tf.Variable(value, trainable=False, dtype=tf.keras.backend.floatx(), name=name)


def without_decay(model: tf.keras.Model, wd_on_bn: bool) -> List[str]:
    """Return the names of variables without weight decay: gamma and beta of batch norm, unless `wd_on_bn`.

    Biases do decay, as in the authors' train_val.prototxt (only its Scale layers have decay_mult 0).
    """
    if wd_on_bn:
        return []
    return [
        variable.name
        for layer in model.layers
        if isinstance(layer, tf.keras.layers.BatchNormalization)
        for variable in layer.trainable_variables
    ]
