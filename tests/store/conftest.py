"""Fixtures of the store's tests; the tools themselves are in tests/store_daemon.py."""

from store_daemon import run

__all__ = ["run"]
