"""What every test gets: hypothesis without deadlines, and no unexpected warning in the log."""

import logging
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# A busy machine is not a bug: no deadlines. A failure prints how to run it again.
settings.register_profile(
    "millpond",
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("millpond")


@pytest.fixture(autouse=True)
def no_unexpected_warning(
    request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> Iterator[None]:
    """A warning of ours that the test did not announce fails it (marker: expects_warnings)."""
    yield
    if request.node.get_closest_marker("expects_warnings"):
        return
    unexpected = [
        record.getMessage()
        for record in caplog.get_records("call")
        if record.levelno >= logging.WARNING and record.name.startswith("millpond")
    ]
    assert not unexpected, f"unexpected warnings in the log: {unexpected}"
