"""The fused kernels against float64: values, gradients, types, threads, instruction sets; and a missing library."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import types
from typing import List, Optional
from unittest import mock

import numpy as np
import pytest
import tensorflow as tf
from conftest import OUTSIDE, ROOT

from resnet_cpu import commandline
from resnet_cpu.cluster import control
from resnet_cpu.errors import FlagError
from resnet_cpu.model.ghost_batch_norm import GhostBatchNormalization
from resnet_cpu.model.kernels import build, library
from resnet_cpu.model.kernels.batch_norm import FusedBatchNormalization
from resnet_cpu.model.kernels.convolution import SinglePixelConv2D
from resnet_cpu.model.resnet import resnet
from resnet_cpu.optim.sgd import SGD
from resnet_cpu.run.provenance import instruction_sets

pytestmark = pytest.mark.training

EPSILON = 1e-5
# Height, width and channels: odd numbers of channels, one channel, and layers of ResNet-50 on 224 pixels.
SHAPES = [(9, 7, 13), (5, 5, 1), (3, 4, 100), (56, 56, 64), (28, 28, 512), (7, 7, 2048)]


class Example:
    """Inputs of a layer, the output and the gradients that float64 gives for them."""

    def __init__(
        self,
        shape: tuple,
        *,
        side: bool = False,
        relu: bool = True,
        copies: int = 1,
        groups: int = 1,
        batch: int = 4,
        dtype: tf.DType = tf.float32,
    ) -> None:
        generator = np.random.Generator(np.random.Philox(sum(shape)))

        def draw(size: list, mean: float, deviation: float) -> tf.Tensor:
            return tf.constant(mean + deviation * generator.standard_normal(size), tf.float32)

        whole = [batch, *shape]
        self.images, self.gamma, self.beta = draw(whole, 3, 2), draw([shape[-1]], 1, 0.3), draw([shape[-1]], 0, 0.3)
        self.side = [draw(whole, 0, 1)] if side else []
        self.incoming = [draw(whole, 0, 1) for _ in range(copies)]
        # Rounding the inputs to the type is not part of the error.
        self.images, *self.side = [tf.cast(tensor, dtype) for tensor in (self.images, *self.side)]
        self.incoming = [tf.cast(tensor, dtype) for tensor in self.incoming]
        self.options = {"relu": relu, "copies": copies, "groups": groups, "epsilon": EPSILON}

    @property
    def inputs(self) -> List[tf.Tensor]:
        return [self.images, self.gamma, self.beta, *self.side]

    def fused(self) -> List[np.ndarray]:
        """Return the output of the operation and the gradients of all inputs."""
        with tf.GradientTape() as tape:
            tape.watch(self.inputs)
            outputs, _, _ = library.load().ops.resnet_cpu_batch_norm(
                x=self.images, gamma=self.gamma, beta=self.beta, side=self.side, **self.options
            )
        gradients = tape.gradient(outputs, self.inputs, output_gradients=self.incoming)
        return [tf.cast(tensor, tf.float64).numpy() for tensor in (outputs[0], *gradients)]

    def exact(self) -> List[np.ndarray]:
        """Return the same in float64, from the formula."""
        inputs = [tf.cast(tensor, tf.float64) for tensor in self.inputs]
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            images, gamma, beta, *side = inputs
            groups = []
            for group in tf.split(images, self.options["groups"]):
                mean, variance = tf.nn.moments(group, [0, 1, 2])
                groups.append((group - mean) / tf.sqrt(variance + EPSILON) * gamma + beta)
            output = tf.concat(groups, 0)
            output = tf.add_n([output, *side])
            output = tf.nn.relu(output) if self.options["relu"] else output
        incoming = tf.add_n([tf.cast(gradient, tf.float64) for gradient in self.incoming])
        return [output.numpy(), *(tensor.numpy() for tensor in tape.gradient(output, inputs, incoming))]


def error(found: np.ndarray, exact: np.ndarray) -> float:
    """Return the largest difference as a share of the largest value."""
    return float(np.abs(found - exact).max() / np.abs(exact).max())


def errors(example: Example) -> List[float]:
    return [error(found, exact) for found, exact in zip(example.fused(), example.exact())]


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("side", [True, False])
@pytest.mark.parametrize("shape", SHAPES[:4])
def test_values_and_gradients(shape, side, relu, copies):
    assert max(errors(Example(shape, side=side, relu=relu, copies=copies))) < 5e-6


@pytest.mark.parametrize("shape", SHAPES[4:])
def test_values_and_gradients_of_wide_layers(shape):
    assert max(errors(Example(shape, side=True, copies=2))) < 5e-6


@pytest.mark.parametrize("side", [True, False])
@pytest.mark.parametrize("shape", SHAPES[:4])
def test_bfloat16_is_as_close_as_its_digits_allow(shape, side):
    """An element of 8 bits is off by 1/256 at most; sums over many of them are closer."""
    output, images, gamma, beta, *rest = errors(Example(shape, side=side, dtype=tf.bfloat16, batch=8))
    assert max(output, images, *rest) < 2**-8
    assert max(gamma, beta) < (2**-8 if side else 2e-3)


def test_bfloat16_is_as_close_as_tensorflows_operation():
    example = Example((28, 28, 64), dtype=tf.bfloat16)
    with tf.GradientTape() as tape:
        tape.watch(example.inputs)
        stock, *_ = tf.raw_ops.FusedBatchNormV3(
            x=example.images, scale=example.gamma, offset=example.beta, mean=[], variance=[], epsilon=EPSILON
        )
        stock = tf.nn.relu(stock)
    gradient = tf.cast(tape.gradient(stock, example.images, example.incoming[0]), tf.float64).numpy()
    exact = example.exact()
    ours, theirs = np.abs(example.fused()[1] - exact[1]), np.abs(gradient - exact[1])
    assert np.sqrt((ours**2).mean()) <= 1.05 * np.sqrt((theirs**2).mean())


def test_statistics_of_images_far_from_zero():
    """Sums of squares lose all digits here; the sums are therefore taken around a value near the mean."""
    images = 1e4 + np.random.Generator(np.random.Philox(1)).standard_normal([8, 6, 6, 5]).astype(np.float32)
    one = tf.ones([5])
    _, mean, variance = library.load().ops.resnet_cpu_batch_norm(
        x=images, gamma=one, beta=one, side=[], relu=False, epsilon=EPSILON
    )
    exact = images.astype(np.float64)
    np.testing.assert_allclose(variance.numpy()[0], exact.var((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(mean.numpy()[0], exact.mean((0, 1, 2)), rtol=1e-7)


@pytest.mark.parametrize("side", [True, False])
def test_groups_equal_separate_batches_bit_for_bit(side):
    """Thus N ranks of b images compute what one rank of N * b images in groups of b computes."""
    example = Example((6, 5, 11), side=side, groups=2, batch=6, copies=2)
    whole = example.fused()
    halves = []
    for half in range(2):
        part = Example((6, 5, 11), side=side, copies=2, batch=6)
        part.images, *part.side = [tf.split(tensor, 2)[half] for tensor in (part.images, *part.side)]
        part.incoming = [tf.split(tensor, 2)[half] for tensor in part.incoming]
        halves.append(part.fused())
    for index in (0, 1, *range(4, len(whole))):  # output, images, side
        np.testing.assert_array_equal(whole[index], np.concatenate([half[index] for half in halves]))
    for index in (2, 3):  # gamma, beta: sums over the groups
        np.testing.assert_allclose(whole[index], halves[0][index] + halves[1][index], rtol=1e-6, atol=1e-6)
    assert max(errors(example)) < 5e-6


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_passes_through(value):
    """--phase and run stop on a loss that is not finite: no operation may hide one."""
    example = Example((4, 4, 9), side=True)
    spoilt = example.images.numpy()
    spoilt[0, 0, 0, 3] = value
    example.images = tf.constant(spoilt)
    found = example.fused()
    assert np.isnan(found[0][..., 3]).all() and np.isnan(found[1][..., 3]).all()
    assert np.isfinite(np.delete(found[0], 3, -1)).all() and np.isfinite(np.delete(found[1], 3, -1)).all()
    example = Example((4, 4, 9), side=True)
    spoilt = example.side[0].numpy()
    spoilt[0, 0, 0, 3] = value
    example.side = [tf.constant(spoilt)]
    assert not np.isfinite(example.fused()[0][0, 0, 0, 3])


@pytest.mark.parametrize("lost", ["side", "second copy", "mask"])
def test_negative_control_a_lost_gradient_is_noticed(lost):
    example = Example((6, 6, 16), side=True, copies=2)
    real = library.load().ops.resnet_cpu_batch_norm_grad

    def wrong(**inputs):
        if lost == "second copy":
            inputs["dy"] = inputs["dy"][:1]
        if lost == "mask":
            inputs["y"] = [tf.abs(inputs["y"][0]) + 1.0]
        found = real(**inputs)
        return found._replace(dside=[0.0 * found.dside[0]]) if lost == "side" else found

    with mock.patch.object(library.load().ops, "resnet_cpu_batch_norm_grad", wrong):
        assert max(errors(example)) > 1e-2


@pytest.mark.parametrize("name, stats_batch", [("resnet18", None), ("resnet50", None), ("resnet18", 4)])
def test_a_network_has_the_same_variables_and_the_same_evaluation(name, stats_batch):
    options = {"width": 0.125, "stem": "small", "bn_stats_batch": stats_batch, "seed": 3}
    plain, fused = (resnet(name, 10, fused_kernels=used, **options) for used in (False, True))
    values = {variable.name: variable.numpy() for variable in plain.variables}
    assert sorted(values) == sorted(variable.name for variable in fused.variables)
    for variable in fused.variables:
        np.testing.assert_array_equal(variable.numpy(), values[variable.name])
    images = np.random.Generator(np.random.Philox(2)).standard_normal([3, 16, 16, 3]).astype(np.float32)
    np.testing.assert_array_equal(fused(images, training=False), plain(images, training=False))


@pytest.mark.parametrize("stem", ["small", "imagenet"])
def test_the_gradients_of_a_network(stem):
    """Compared with float64; the fused kernels are at least as close as TensorFlow's operations."""
    generator = np.random.Generator(np.random.Philox(4))
    images = generator.standard_normal([8, 32, 32, 3]).astype(np.float32)
    labels = generator.integers(0, 10, 8)
    weights: dict = {}  # of the first network, for all of them

    def gradients(dtype: str, fused: bool) -> dict:
        tf.keras.backend.set_floatx(dtype)
        try:
            model = resnet(
                "resnet18", 10, width=0.25, stem=stem, zero_gamma="none",
                fused_kernels=fused, seed=5,
            )  # fmt: skip
            for variable in model.variables:
                variable.assign(weights.setdefault(variable.name, variable.numpy()))
            with tf.GradientTape() as tape:
                logits = model(tf.constant(images, dtype), training=True)
                loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
            found = tape.gradient(loss, model.trainable_variables)
            return {variable.name: value.numpy() for variable, value in zip(model.trainable_variables, found)}
        finally:
            tf.keras.backend.set_floatx("float32")

    off = {fused: gradients("float32", fused) for fused in (False, True)}
    exact = gradients("float64", False)
    mean = {fused: np.mean([error(off[fused][name], exact[name]) for name in exact]) for fused in off}
    assert mean[True] < 1.5 * mean[False] and mean[True] < 1e-4


# Side of the images, kernel, stride, padding: first those of ResNet-50's last stage on 32 pixels.
SINGLE = [(1, 1, 1, "same"), (1, 3, 1, "same"), (2, 1, 2, "same"), (2, 3, 2, "same"), (4, 3, 2, "valid")]
SINGLE += [(1, 7, 2, "same"), (3, 7, 4, "same"), (3, 2, 3, "same"), (2, 5, 2, "same")]


@pytest.mark.parametrize("size, kernel, stride, padding", SINGLE)
def test_convolutions_to_a_single_pixel(size, kernel, stride, padding):
    layer = SinglePixelConv2D(5, kernel, stride, padding, bias_initializer="ones")
    images = tf.constant(np.random.Generator(np.random.Philox(8)).standard_normal([3, size, size, 4]), tf.float32)

    def results(training: bool) -> List[np.ndarray]:
        with tf.GradientTape() as tape:
            tape.watch(images)
            output = layer(images, training=training)
            value = tf.reduce_sum(output * tf.sin(output))
        assert output.shape[1:3] == [1, 1]
        return [output.numpy(), *(gradient.numpy() for gradient in tape.gradient(value, [images, layer.kernel]))]

    with mock.patch.object(tf, "matmul", wraps=tf.matmul) as product:
        found = results(training=True)
    assert product.called
    for ours, theirs in zip(found, results(training=False)):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("size, kernel, stride, padding", [(3, 3, 2, "same"), (2, 3, 1, "same"), (5, 3, 2, "valid")])
def test_negative_control_other_convolutions_are_tensorflows(size, kernel, stride, padding):
    layer = SinglePixelConv2D(5, kernel, stride, padding)
    with mock.patch.object(tf, "matmul", wraps=tf.matmul) as product:
        assert layer(tf.ones([3, size, size, 4]), training=True).shape[1] > 1
    assert not product.called


def moving_statistics(layer: tf.keras.layers.Layer, images: np.ndarray) -> List[np.ndarray]:
    layer(images, training=True)
    return [layer.moving_mean.numpy(), layer.moving_variance.numpy()]


@pytest.mark.parametrize("stats_batch", [None, 2])
def test_moving_statistics_are_those_of_keras(stats_batch: Optional[int]):
    images = np.random.Generator(np.random.Philox(6)).standard_normal([6, 4, 4, 3]).astype(np.float32)
    plain = (
        tf.keras.layers.BatchNormalization(momentum=0.9)
        if stats_batch is None
        else GhostBatchNormalization(stats_batch, momentum=0.9)
    )
    fused = FusedBatchNormalization(stats_batch=stats_batch, momentum=0.9)
    for found, expected in zip(moving_statistics(fused, images), moving_statistics(plain, images)):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_update_of_all_weights(nesterov):
    """Three steps against the optimizer's own operations, with a variable that is being read and a long one."""
    generator = np.random.Generator(np.random.Philox(7))
    shapes = [[3, 3, 5, 7], [13], [70_001]]
    rates = [tf.Variable(value, trainable=False) for value in (0.1, 0.02, 0.9)]
    start = [generator.standard_normal(shape).astype(np.float32) for shape in shapes]
    slopes = [[generator.standard_normal(shape).astype(np.float32) for shape in shapes] for _ in range(3)]

    def updated(fused: bool) -> List[np.ndarray]:
        variables = [tf.Variable(value, name=f"w{index}") for index, value in enumerate(start)]
        optimizer = SGD(*rates, [variables[1].name], nesterov, fused)
        optimizer.build(variables)
        held = variables[0].read_value()
        for gradients in slopes:
            optimizer.apply_gradients(zip([tf.constant(value) for value in gradients], variables))
        np.testing.assert_array_equal(held, start[0])
        assert optimizer.iterations.numpy() == 3
        return [variable.numpy() for variable in (*variables, *optimizer.velocities)]

    for found, expected in zip(updated(True), updated(False)):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


DIGEST = """
import hashlib, sys
import tensorflow as tf
tf.config.threading.set_intra_op_parallelism_threads(int(sys.argv[1]))
import test_kernels
found = test_kernels.Example((28, 28, 67), side=True, copies=2, groups=2).fused()
print(test_kernels.library.load().isa, hashlib.sha256(b"".join(array.tobytes() for array in found)).hexdigest())
"""


def digest(threads: int, limit: str = "") -> List[str]:
    """Return the instruction set and a digest of all results of a process with that many threads."""
    environment = {
        **OUTSIDE,
        library.ISA_LIMIT: limit,
        "PYTHONPATH": f"{OUTSIDE['PYTHONPATH']}:{os.path.dirname(__file__)}",
    }
    output = subprocess.check_output([sys.executable, "-c", DIGEST, str(threads)], env=environment, text=True)
    return output.split()


def test_the_bits_do_not_depend_on_threads_and_instruction_set():
    """Every instruction set that this processor has; a limit that it does not have means the next one below."""
    chosen, bits = digest(1)
    assert digest(2) == [chosen, bits]
    has = {"avx512_bf16": "avx512_bf16", "avx512": "avx512dq", "avx2": "avx2"}
    below = [name for name, flag in has.items() if flag in instruction_sets() or name == "avx2"]
    for limit in below:
        if limit != chosen:
            assert digest(1, limit) == [limit, bits]
    assert hashlib.sha256(b"other").hexdigest() != bits


def settings(*flags: str):
    return commandline.parse(["--dataset=synthetic", "--train_examples=64", *flags], "benchmark")


def test_a_library_that_is_missing_or_of_another_build(tmp_path, monkeypatch):
    """TensorFlow's own operations are used then, and the run says so; --fused_kernels=yes is an error."""
    path = tmp_path / "kernels.so"
    monkeypatch.setattr(library, "file", lambda: path)
    monkeypatch.setattr(library, "load", library.load.__wrapped__)  # not what this process has loaded
    for content, expected in (
        (None, "does not exist; build it with python -m resnet_cpu.model.kernels.build"),
        (b"no library", "does not load"),
    ):
        if content:
            path.write_bytes(content)
        choice = library.choose(settings())
        assert not choice.used and expected in choice.text
        with pytest.raises(FlagError, match=f"--fused_kernels=yes: .*{expected}"):
            library.choose(settings("--fused_kernels=yes"))


def test_a_library_that_does_not_load_is_built_again_and_a_cache_is_not_needed(tmp_path, monkeypatch, capsys):
    """Faults: the same file came back from the cache; a folder that cannot be written ended it with a traceback."""
    path, cache = tmp_path / "environment" / "kernels.so", tmp_path / "cache"
    monkeypatch.setattr(library, "file", lambda: path)
    monkeypatch.setattr(build, "_loads", lambda file: file.exists() and file.read_bytes() == b"loads")
    monkeypatch.setattr(build.shutil, "which", lambda name: name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))

    def made(compiler, target):
        (tmp_path / "new.so").write_bytes(b"loads")
        build._publish(tmp_path / "new.so", target)

    monkeypatch.setattr(build, "_build", made)
    cached = cache / "resnet_cpu" / "kernels.so"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"of newer system libraries")
    build.main()
    assert path.read_bytes() == cached.read_bytes() == b"loads" and "kernels built" in capsys.readouterr().err
    path.write_bytes(b"broken")
    build.main()
    assert path.read_bytes() == b"loads" and not capsys.readouterr().err  # from the cache
    path.unlink()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new.so"))  # a file, where no folder can be made
    build.main()
    assert path.read_bytes() == b"loads" and "kernels built" in capsys.readouterr().err
    monkeypatch.setattr(library, "file", lambda: tmp_path / "new.so" / "kernels.so")
    build.main()
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and "could not be stored" in errors[0] and "TensorFlow's own operations" in errors[0]


def test_a_library_is_tried_before_it_is_used(tmp_path):
    junk = tmp_path / "kernels.so"
    junk.write_bytes(b"no library")
    assert not build._loads(junk) and not build._loads(tmp_path / "missing.so")
    assert build._loads(library.file())


def test_kernels_have_changed_only_if_others_compute():
    plain = ["TensorFlow's operations (--fused_kernels=no)", "TensorFlow's operations: k.so does not exist"]
    assert not library.changed(*plain) and not library.changed("fused, avx2", "fused, avx2")
    assert not library.changed("fused, avx2", "fused, avx512")  # the same bits
    assert library.changed(plain[0], "fused, avx2") and library.changed("fused, avx2", plain[1])


class Others(control.World):
    """Rank 0 of as many ranks as `choices`, which are what the ranks can use."""

    def __init__(self, *choices):
        super().__init__(len(choices), 0)
        object.__setattr__(self, "choices", choices)

    def on_all(self, work):
        return self.choices[0]

    def gather(self, message):
        assert message == self.choices[0]
        return json.loads(json.dumps(self.choices))


def test_all_ranks_use_the_kernels_or_none_does():
    """Fault: each chose alone; updates that differ in the last bits ended the run at its first checkpoint."""
    lacks = library.Choice(False, "TensorFlow's operations: k.so does not exist")
    avx2, avx512 = library.Choice(True, "fused, avx2"), library.Choice(True, "fused, avx512")
    assert library.agree(settings(), Others(avx2, avx512)) == (True, ["fused, avx2", "fused, avx512"])
    assert library.agree(settings(), Others(lacks, lacks)) == (False, [lacks.text] * 2)
    used, texts = library.agree(settings(), Others(avx2, avx2, lacks))
    assert not used and texts == [f"{lacks.text} (on rank 2; either all ranks use the fused kernels or none does)"] * 3


def test_each_tensorflow_has_its_own_library(monkeypatch, tmp_path):
    """Also those that a site has built, which have no metadata: another file, or another time, is another one."""

    def key(version, origin=None):
        monkeypatch.setattr(library, "version", lambda package: version)
        monkeypatch.setattr(
            library.importlib.util, "find_spec", lambda name: origin and types.SimpleNamespace(origin=origin)
        )
        return library.key.__wrapped__()

    ours, file = library.key(), tmp_path / "__init__.py"
    file.write_text("")
    keys = [ours, key("2.99.0"), key(None), key(None, str(file))]
    os.utime(file, (1, 1))
    assert len({*keys, key(None, str(file))}) == 5


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_program_for_sanitizers_still_compiles():
    flags = ["-std=c++17", "-fsyntax-only", "-mavx2", "-mfma", f"-I{library.FOLDER}"]
    subprocess.run(["g++", *flags, ROOT / "tests" / "kernels_sanitized.cc"], check=True)


def test_the_choice_can_be_made_by_a_flag():
    assert library.choose(settings("--fused_kernels=yes")).used
    assert library.choose(settings("--fused_kernels=no")) == (False, "TensorFlow's operations (--fused_kernels=no)")
    tf.keras.backend.set_floatx("float64")
    try:
        assert not library.choose(settings()).used
    finally:
        tf.keras.backend.set_floatx("float32")


@pytest.mark.parametrize("wrong", ["rank", "side", "two sides", "gamma", "groups"])
def test_inputs_that_do_not_fit_are_errors(wrong):
    example = Example((4, 4, 8), side=True, batch=3)
    if wrong == "rank":
        example.images = example.images[0]
    elif wrong == "side":
        example.side = [example.side[0][:2]]
    elif wrong == "two sides":
        example.side *= 2
    elif wrong == "gamma":
        example.gamma = example.gamma[:3]
    else:
        example.options["groups"] = 2
    with pytest.raises((tf.errors.InvalidArgumentError, ValueError)):
        example.fused()
