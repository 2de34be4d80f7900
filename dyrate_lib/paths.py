"""Where things lie: one place that knows the layout of the project's folder.

The root is `$DYRATE_HOME`, else the folder above the package where that is a checkout (an editable install, as `make env`
does), else, for an installed wheel, the user's own data folder (`~/.local/share/dyrate` or its like). A wheel brings the
paper's values and the predictors with it; checkpoints come by `dyrate fetch`, notebooks and records by a checkout only.
"""

from __future__ import annotations

import os
from pathlib import Path

_BESIDE = Path(__file__).resolve().parents[1]
_PACKAGED = Path(__file__).resolve().parent / "_data"  # in a wheel only


def is_checkout(folder: Path | None = None) -> bool:
    """Whether a folder (default: the root) is the project's: it holds the paper's values under data/."""
    return ((folder or root()) / "data" / "paper").is_dir()


def root() -> Path:
    """The project's folder, see above."""
    home = os.environ.get("DYRATE_HOME")
    if home:
        return Path(home).expanduser().resolve()
    return _BESIDE if is_checkout(_BESIDE) else user_data()


def user_data() -> Path:
    """Where an installed wheel keeps what was fetched."""
    from platformdirs import user_data_path

    return user_data_path("dyrate", appauthor=False)


def data() -> Path:
    """`data/`: paper values, checkpoints, predictors, committed records."""
    return root() / "data"


def _small(name: str) -> Path:
    """A folder of data/ that wheels bring along: the root's own where it has one."""
    own = data() / name
    return own if own.is_dir() or not (_PACKAGED / name).is_dir() else _PACKAGED / name


def paper() -> Path:
    """`data/paper/`: the paper's tables as printed, and the criteria for each claim."""
    return _small("paper")


def checkpoints() -> Path:
    """`data/checkpoints/`: the scenes VLMs in transformers' own format."""
    return data() / "checkpoints"


def predictors() -> Path:
    """`data/predictors/`: trained rate predictors."""
    return _small("predictors")


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
    """`build/`: everything computed anew; never committed. Without a checkout it lies in the current folder."""
    return (root() if is_checkout() else Path.cwd()) / "build"
