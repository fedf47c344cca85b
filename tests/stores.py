"""The databases a server may keep its state in."""

from __future__ import annotations

import pytest

# Of a contract test whose `server` is to be tried over each.
BOTH_STORES = pytest.mark.parametrize("server", ["sqlite", "postgres"], indirect=True)
