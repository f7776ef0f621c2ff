"""The batch: from flags to micro-batches."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resnet_cpu.errors import FlagError
from resnet_cpu.recipe.batch import resolve_batch


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ((None, None, 4), (32, 1, 128)),
        ((8, None, 4, 3), (8, 3, 96)),
        ((8, None, 4, 0), (8, 1, 32)),
        ((None, 256, 4), (64, 1, 256)),
        ((None, 256, 4, 2), (32, 2, 256)),
        ((16, 14336, 896, 0), (16, 1, 14336)),
        ((16, 14336, 2, 0), (16, 448, 14336)),
        ((None, 4096, 2, 0), (32, 64, 4096)),
        ((None, 20, 1, 0), (20, 1, 20)),
        ((None, 66, 1, 0), (22, 3, 66)),  # the largest batch up to 32 that fits
    ],
)
def test_batches(arguments, expected):
    assert tuple(resolve_batch(*arguments)) == expected


@pytest.mark.parametrize(
    "arguments, part",
    [
        ((None, 10, 4), "not divisible by 4 ranks"),
        ((None, 12, 2, 4), "not divisible by 2 ranks x 4 accumulated"),
        ((32, 4096, 2), "--accumulate_steps=0"),
        ((48, 4096, 2, 0), "cannot be divided into 2 ranks x 48 images"),
        ((None, 3, 2, 0), "not divisible by 2 ranks; use 1 or 3 ranks, or a multiple of 2 as the global batch"),
        ((32, 4096, 126, 0), "not divisible by 126 ranks; use 64 or 128 ranks,"),
        ((None, 4096, 126, 1), "use 64 or 128 ranks,"),
        ((None, 4096, 10**9, 0), "use 4096 ranks,"),  # at once
        ((None, 1000000, 7, 1), "use 16 ranks,"),  # 5 and 8 ranks would have more images than are allowed
        ((None, 10, 3, 4), "4 accumulated batches; use a multiple of 12"),  # 4 never divides 10
        ((204, 1632, 16, 0), "cannot be divided into 16 ranks x 204 images at a time; .* or use 8 ranks"),
        ((None, 74, 2, 0), "2 ranks x 8 to 32 images at a time; give another --batch_size$"),  # 37 is prime
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_the_remedy(arguments, part):
    with pytest.raises(FlagError, match=part):
        resolve_batch(*arguments)


@given(st.integers(1, 64) | st.none(), st.integers(1, 5000) | st.none(), st.integers(1, 64), st.integers(0, 9))
def test_the_parts_make_up_the_global_batch_or_it_is_refused(batch_size, total, ranks, accumulate):
    try:
        batch = resolve_batch(batch_size, total, ranks, accumulate)
    except FlagError:
        return
    assert batch.per_rank * batch.accumulate_steps * ranks == batch.total > 0
    assert total in (None, batch.total) and batch_size in (None, batch.per_rank)
