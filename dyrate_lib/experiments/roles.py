"""Which set plays which role in the study, and how a table names it."""

from __future__ import annotations

from ..scenes.tasks import NAMES

CAPTION_ROLES = ("coco", "nocaps", "flickr30k", "late")
# Of the paper's Table I, in its order: role -> (column of data/paper/table1.csv, the benchmark's name).
TABLE1 = {
    "gqa": ("gqa", "GQA"), "vizwiz": ("vizwiz", "VizWiz"), "scienceqa": ("sqa", "SQA"), "textvqa": ("vqa", "TextVQA"),
    "pope": ("pope", "POPE"), "mmbench": ("mmb", "MMB"), "mme": ("mme", "MME"),
}  # fmt: skip
ROLE_SPECS = {
    "coco": "scenes:short:test", "nocaps": "scenes:short:novel", "flickr30k": "scenes:narrative:test",
    "late": "scenes:late:test", "questions": "scenes:questions:test",
    **{task: f"scenes:{task}:test" for task in NAMES},
}  # fmt: skip
ROLE_LABELS = {
    "coco": "scenes short, test (as COCO2017)", "nocaps": "scenes short, unseen pairs (as Nocaps)",
    "flickr30k": "scenes narrative, test (as Flickr30k)", "late": "scenes late, test", "questions": "scenes questions, test",
    "gqa": "scenes compositional questions (as GQA)", "vizwiz": "scenes spoilt pictures (as VizWiz)",
    "scienceqa": "scenes choices with context (as ScienceQA)", "textvqa": "scenes signs (as TextVQA, no text given)",
    "textvqa-ocr": "scenes signs (as TextVQA, text given)", "pope": "scenes polling (as POPE)",
    "mmbench": "scenes choices rotated (as MMBench)", "mme": "scenes yes and no (as MME)",
}  # fmt: skip
