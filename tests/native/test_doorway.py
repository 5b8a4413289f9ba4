"""The doorway itself: errors become OSError, and the type stub says what the extension has."""

import errno
from pathlib import Path

import pytest

from millpond import native
from millpond.native import build_native, check, lib


def test_check_passes_results_and_raises_errors() -> None:
    assert check(0) == 0
    assert check(2**40) == 2**40
    with pytest.raises(OSError, match="Protocol error") as caught:
        check(-errno.EPROTO)
    assert caught.value.errno == errno.EPROTO


def test_every_name_of_the_extension_is_in_the_stub() -> None:
    stub = build_native.make_stub(build_native.make_ffi())
    for name in dir(lib):
        assert f"    {name}: int\n" in stub or f"    def {name}(self" in stub, name
    written = Path(native.__file__).with_name("_native.pyi").read_text()
    assert written == stub, "build again: the headers have changed"
