"""What must be set before anything imports ray, for all tests."""

from __future__ import annotations

import os

# Ray reads these once, at import: tests that join a cluster reach it on 127.0.0.1 with its token.
os.environ.update(RAY_AUTH_MODE="token", RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", RAY_USAGE_STATS_ENABLED="0")
