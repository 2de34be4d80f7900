"""What to run where LLaVA-1.5's weights and data lie, to settle what scenes cannot: for each claim's `beyond` the exact commands.

Folders are placeholders (`/data/..`), as in the README; every command is tried against the real argument parsers in the tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ..compare import Verdict
from .contradictions import N_IMAGE, llava_info, prefill_ratio
from .paper_verdicts import all_claims

MODEL_7B, MODEL_13B = "llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-13b-hf"
DATA = "coco:/data/coco,flickr30k:/data/flickr30k,nocaps:/data/nocaps"
PREDICTOR = "build/predictors/llava-1.5-7b-hf_t0.333_s0.safetensors"
CAPTIONS = "coco2017_cap_val,nocaps_val,flickr30k_test"
QUARTER, BETTER_LAYER = 0.25, 1


@dataclass(frozen=True)
class Settling:
    """How the rest of a claim can be settled.

    commands: one a line, in order; none where no run can settle anything. note: what they leave open.
    """

    commands: tuple[str, ...]
    note: str = ""


def study_run(notebook: str, data: str = DATA) -> str:
    """One notebook of the study on both sizes of LLaVA-1.5."""
    return (
        f"python -m dyrate_lib run {notebook} -p scale full -p model_small {MODEL_7B} -p model_base {MODEL_13B} -p data {data}"
    )


def lmms(method: str = "", tasks: str = CAPTIONS) -> str:
    """One evaluation by lmms-eval, into the folder results."""
    args = ",".join(part for part in (f"pretrained={MODEL_7B}", method) if part)
    args = f"'{args}'" if "[" in args else args  # a shell would look for files
    return f"python -m dyrate_lib.lmms eval --tasks {tasks} --batch_size 16 --output_path results --model_args {args}"


def quarter_rate() -> float:
    """The constant rate from layer 1 on at which a pass of LLaVA-1.5-7B with 64 text tokens takes a quarter of the FLOPs."""
    kept = np.linspace(0, 1, N_IMAGE + 1)
    ratios = [float(prefill_ratio(llava_info("7b"), BETTER_LAYER, 1 - share, 64)) for share in kept]
    return round(float(1 - np.interp(QUARTER, ratios, kept)), 3)


TABLES = "python -m dyrate_lib.lmms tables results"
TRAIN = study_run("02_training")
FASTV, VTW, DYRATE = "method=fastv,layer=2,rate=0.5", "method=vtw", f"method=dyrate,predictor={PREDICTOR}"
TRAIN_07 = (
    'python -c "from dyrate_lib import load_vlm; from dyrate_lib.datasets import open_dataset; '
    "from dyrate_lib.training import train_predictor; "
    f"train_predictor(*load_vlm('{MODEL_7B}'), open_dataset('coco:/data/coco', 2400), target=0.7, steps=200, batch_size=12)"
    ".predictor.save('t0.7.safetensors')\""
)


def settlings() -> dict[str, Settling]:
    """By claim; every claim that says what it leaves open has an entry."""
    every = "python -m dyrate_lib bench --model {} --batch 1 --new-tokens 64 --repeats 20 --methods original fastv-2 vtw dyrate"
    merge = f"method=merge,layer={BETTER_LAYER},rates=[{quarter_rate()}]"
    return {
        "C1": Settling((study_run("01_attention_analysis"),)),
        "C2": Settling((lmms(), lmms(FASTV), lmms(VTW), TABLES)),
        "C3": Settling((TRAIN, lmms(), lmms(DYRATE), TABLES)),
        "C4": Settling(
            (every.format(MODEL_7B), every.format(MODEL_13B)),
            "On an RTX 4090 (13B needs two). What the printed latency spans, only its authors can say.",
        ),
        "C5": Settling((TRAIN, TRAIN_07), "The other run trains for a saving of 30 %."),
        "C6": Settling((), "There is no printed figure that a run could meet."),
        "C7": Settling((TRAIN, study_run("05_ablations")), "Both top_p and top_k = 6 are among Table IVa's strategies."),
        "C8": Settling((TRAIN, study_run("05_ablations")), "R' as read in DEVIATIONS.md; what it was, only the authors can say."),
        "C9": Settling((TRAIN, study_run("06_visualization"), f"{study_run('06_visualization')} -p image /data/picture.jpg")),
        "C10": Settling((TRAIN, *(lmms(m, "dyrate_paper") for m in ("", FASTV, DYRATE)), TABLES)),
        "C11": Settling((TRAIN, study_run("05_ablations")), "Without an oracle: nobody knows what a word of COCO needs."),
        "C12": Settling((), "The need of each word would have to be annotated; correlations with the step are in notebook 06."),
        "C13": Settling((TRAIN, study_run("05_ablations")), "Captions only: the study has no conversations."),
        "C14": Settling((TRAIN, study_run("06_visualization")), "What there is to see would have to be counted."),
        "C15": Settling((lmms(), lmms(merge), TABLES), f"{quarter_rate()} is a quarter of the FLOPs at 64 text tokens."),
        "F3": Settling((), "The appendix was not published."),
    }  # fmt: skip


def commands() -> list[str]:
    """Every command once, in the order of the claims; their numbers in the table count from 1."""
    made = settlings()
    return list(dict.fromkeys(c for key, claim in all_claims().items() if claim.beyond for c in made[key].commands))


def settling_table(found: Mapping[str, Verdict] | None = None) -> pd.DataFrame:
    """One row for each claim with something left open: claim, verdict here, what is open, numbers of the commands, note."""
    made, numbers = settlings(), {command: str(i) for i, command in enumerate(commands(), 1)}
    rows: list[dict[str, Any]] = []
    for key, claim in all_claims().items():
        if claim.beyond:
            here = {"verdict here": found[key].verdict} if found else {}
            run = ", ".join(numbers[command] for command in made[key].commands) or "nothing can"
            rows.append({"claim": key, **here, "left open": claim.beyond, "run": run, "note": made[key].note})
    return pd.DataFrame(rows)


def settling_text() -> str:
    """The numbered commands as Markdown."""
    return "\n\n".join(f"{i}.\n\n        {command}" for i, command in enumerate(commands(), 1))
