"""``python -m bridge.worker.about`` prints what llama.cpp was built with, as JSON."""

from __future__ import annotations

import json
import sys

from bridge.worker.llama_about import about

if __name__ == "__main__":
    json.dump(about(), sys.stdout)
