"""A directory whose files do not open is refused in one line: it is not a damaged store."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from millpond.store.directory import SUPERBLOCK_NAME, OpenStore
from millpond.store.errors import Code, StoreError
from millpond.store.fsck import Trouble, fsck


def told(trouble: Trouble) -> None:
    raise AssertionError(trouble)


def test_store_is_clean_and_then_is_served_again(tmp_path: Path) -> None:
    for _ in range(2):
        OpenStore(str(tmp_path), format_when_empty=True).close()
        report = fsck(str(tmp_path), told)
        assert report.clean and report.summary.compared


def test_directory_that_is_served_is_left_alone(tmp_path: Path) -> None:
    store = OpenStore(str(tmp_path), format_when_empty=True)
    with pytest.raises(StoreError, match="served by another process") as caught:
        fsck(str(tmp_path), told)
    assert caught.value.code == Code.BUSY
    store.close()


@pytest.mark.parametrize(
    ("error", "code"),
    [(errno.EACCES, Code.PERMISSION), (errno.EROFS, Code.IO), (errno.ENOENT, Code.NOT_FOUND)],
    ids=["no permission", "read-only file system", "no store"],
)
def test_files_that_do_not_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, code: Code
) -> None:
    OpenStore(str(tmp_path), format_when_empty=True).close()
    really_open = os.open

    def fail(path: Any, *arguments: Any, **more: Any) -> int:
        if os.path.basename(path) == SUPERBLOCK_NAME:
            raise OSError(error, os.strerror(error))
        return really_open(path, *arguments, **more)

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(StoreError) as caught:
        fsck(str(tmp_path), told)
    assert caught.value.code == code and "\n" not in str(caught.value)
    monkeypatch.undo()
    OpenStore(str(tmp_path), format_when_empty=False).close()  # the lock was given back
