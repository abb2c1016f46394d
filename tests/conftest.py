"""What must be set before anything imports ray, for all tests."""

from __future__ import annotations

import os

from hypothesis import settings

# Ray reads these once, at import: tests that join a cluster reach it on 127.0.0.1 with its token.
os.environ.update(RAY_AUTH_MODE="token", RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", RAY_USAGE_STATS_ENABLED="0")

# Hypothesis: the same cases everywhere and every time, or with --hypothesis-profile=long many and others.
settings.register_profile("quick", derandomize=True, max_examples=40, stateful_step_count=40, deadline=None)
settings.register_profile(
    "long", parent=settings.get_profile("quick"), derandomize=False, max_examples=1000, print_blob=True
)
settings.load_profile("quick")
