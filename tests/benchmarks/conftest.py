"""One thread, as in the tests of attention itself."""

from tests.attention.conftest import one_thread

__all__ = ["one_thread"]
