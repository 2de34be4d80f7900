"""The rendered world: pictures whose truth is known, captions with known visual need, questions, and a small VLM."""

from . import tasks
from .captions import FAMILIES, NEEDS, PROMPTS, annotated_reference, references
from .clutter import edge_density
from .facts import Facts, caption_facts, fact_rates, fact_sums
from .needs import image_need, reply_needs
from .questions import QUESTION_KINDS, Question, questions
from .render import object_masks, render, render_batch
from .world import COLOR_NAMES, HELD_OUT, SHAPES, SPLITS, Scene, SceneObject, make_scene

__all__ = [
    "COLOR_NAMES",
    "FAMILIES",
    "Facts",
    "HELD_OUT",
    "NEEDS",
    "PROMPTS",
    "QUESTION_KINDS",
    "Question",
    "SHAPES",
    "SPLITS",
    "Scene",
    "SceneObject",
    "annotated_reference",
    "caption_facts",
    "edge_density",
    "fact_rates",
    "fact_sums",
    "image_need",
    "make_scene",
    "object_masks",
    "questions",
    "references",
    "render",
    "render_batch",
    "reply_needs",
    "tasks",
]
