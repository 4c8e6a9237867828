"""Operators with several backends are tested with each."""

from collections.abc import Iterator

import pytest

from freqfusion.ops import available_backends, use_backend


@pytest.fixture(scope="module", params=["native", "torch"])
def each_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Its name; a test that uses this runs once a backend, which is preferred meanwhile.

    Those that compute in float64, as these tests do; ``test_triton.py`` has the third.
    """
    reason = available_backends()[request.param]
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    with use_backend(request.param):
        yield request.param
