"""The study's experiments: the half that computes records, and the half that turns records into tables and figures."""

from .context import ROLE_LABELS, ROLE_SPECS, StageDone, Study, open_study
from .scales import SCALES, Scale, resolve_scale

__all__ = ["ROLE_LABELS", "ROLE_SPECS", "SCALES", "Scale", "StageDone", "Study", "open_study", "resolve_scale"]
