"""Where a study's figures, tables and measured quantities go, and how a notebook shows them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import paths
from ..errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from .scales import Scale

NOT_DRAWN = "*Left out here: this needs scenes, whose truth is known word by word.*"


class StudyOutput:
    """The half of a `Study` that writes: what it needs is the notebook's name, the scale, the seed and the folder."""

    notebook: str
    scale: Scale
    seed: int
    out: Path

    @property
    def project(self) -> bool:
        """Whether output goes into the project itself (figures and tables then share one folder)."""
        return self.out == paths.root()

    @property
    def figures(self) -> Path:
        return self.out / "figures"

    @property
    def tables(self) -> Path:
        return self.figures if self.project else self.out / "tables"

    def save_figure(
        self, fig: Figure | None, name: str, data: pd.DataFrame | None = None, otherwise: str = NOT_DRAWN
    ) -> Any:
        """Write the figure (pdf, png, csv of `data`), close it, and return it as a picture for the notebook to show.

        fig: None where there is nothing to draw; then the text `otherwise` is shown, and what an earlier run left is gone.
        """
        import matplotlib.pyplot as plt
        from IPython.display import Image, Markdown

        from ..plotting import save_figure

        if fig is None:
            _remove(self.figures, name, ("pdf", "png", "csv"))
            return Markdown(otherwise)

        save_figure(fig, name, self.figures, data)
        shown = io.BytesIO()
        fig.savefig(shown, format="png", dpi=120, metadata={"Software": None})
        plt.close(fig)
        return Image(data=shown.getvalue(), format="png")

    def save_table(
        self, df: pd.DataFrame, name: str, caption: str = "", digits: int = 2, otherwise: str = NOT_DRAWN
    ) -> Any:
        """Write the table (csv, md, tex) and return it as Markdown for the notebook to show.

        An empty one shows `otherwise`, and what an earlier run left of it is gone.
        """
        from IPython.display import Markdown

        from ..plotting import markdown_table, save_table

        if not len(df):
            _remove(self.tables, name, ("csv", "md", "tex"))
            return Markdown(otherwise)
        save_table(df, name, self.tables, caption, digits)
        return Markdown(markdown_table(df, digits))

    def save_quantities(self, quantities: Mapping[str, Any]) -> Path:
        """Write what this notebook measured for the claims, for notebook 07 to judge."""
        from ..compare import save_quantities

        return save_quantities(quantities, self.notebook, self.tables)

    def provenance(self, records: Sequence[dict[str, Any]]) -> str:
        """Where records come from, in lines that depend on the records alone."""
        made = [record["provenance"] for record in records]
        if not made:
            raise InputError("there is no record to tell the provenance of")

        def distinct(field: str) -> str:
            return ", ".join(sorted({str(entry[field]) for entry in made if entry.get(field)})) or "not known"

        seconds = sum(float(entry["seconds"]) for entry in made)
        versions = "; ".join(f"{field} {distinct(field)}" for field in ("python", "torch", "transformers"))
        return (
            f"{len(made)} records, scale {self.scale.name}, seed {self.seed}\n"
            f"made on {distinct('device')} in {distinct('dtype')}\n"
            f"{versions}; {seconds:.0f} s of computing, last on {max(str(entry['date']) for entry in made)[:10]}"
        )


def _remove(folder: Path, name: str, kinds: Sequence[str]) -> None:
    """Take away a figure or table of an earlier run, which the present records do not bear out."""
    for kind in kinds:
        (folder / f"{name}.{kind}").unlink(missing_ok=True)
