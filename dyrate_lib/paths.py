"""Where things lie: one place that knows the layout of the project's folder.

The root is the folder above the installed package (an editable install, as `make env` does), or `$DYRATE_HOME`.
"""

from __future__ import annotations

import os
from pathlib import Path


def root() -> Path:
    """The project's folder: `$DYRATE_HOME` if set, else the folder that holds `dyrate_lib`."""
    home = os.environ.get("DYRATE_HOME")
    return Path(home).expanduser().resolve() if home else Path(__file__).resolve().parents[1]


def data() -> Path:
    """`data/`: paper values, checkpoints, predictors, committed records."""
    return root() / "data"


def checkpoints() -> Path:
    """`data/checkpoints/`: the scenes VLMs in transformers' own format."""
    return data() / "checkpoints"


def predictors() -> Path:
    """`data/predictors/`: trained rate predictors."""
    return data() / "predictors"


def results() -> Path:
    """`data/results/`: committed records of the full-scale run."""
    return data() / "results"


def figures() -> Path:
    """`figures/`: the committed figures and tables."""
    return root() / "figures"


def notebooks() -> Path:
    """`notebooks/`: the ordered notebooks."""
    return root() / "notebooks"


def build() -> Path:
    """`build/`: everything computed anew; never committed."""
    return root() / "build"
