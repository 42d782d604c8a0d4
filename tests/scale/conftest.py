"""Engines and formats: several processes, quantised weights, offloading, torch.compile. `tox -e scale` runs these."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("PEFT_MOE_COMPAT_SCALE") else ["test_*.py"]
