"""One picture captioned with a chosen method: the text, what was kept at each step, what it saved, the masks as a figure."""

from __future__ import annotations

import logging
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dyrate_lib import paths
from dyrate_lib.errors import InputError, ResourceError

log = logging.getLogger(__name__)

METHODS = (
    "none", "random", "fastv", "vtw", "dyrate", "sparsevlm", "pyramiddrop", "st3", "visionzip", "prumerge", "prumerge+",
    "divprune", "cdpruner", "merge",
)  # fmt: skip
REPLY = 20  # tokens of the reply that a budget is counted for
DEFAULT_PROMPT = "Provide a one-sentence caption for the provided image."


@dataclass(frozen=True)
class Caption:
    """text; words and kept tokens (merged ones counted) one a step; saved: share of FLOPs saved, by convention; files: the
    mask figure; method: the method as it was set."""

    text: str
    words: list[str]
    kept: list[int]
    n_image: int
    saved: dict[str, float]
    files: list[Path]
    method: Any

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON values: {text, words, kept, n_image, flops_saved, method, files}."""
        from dyrate_lib.evaluate import describe

        return {
            "text": self.text, "words": self.words, "kept": self.kept, "n_image": self.n_image, "flops_saved": self.saved,
            "method": describe(self.method), "files": [str(file) for file in self.files],
        }  # fmt: skip


class Progress:
    """A bar over the tokens of a reply on standard error; `generate` feeds it as a streamer. Nothing is drawn unless enabled."""

    def __init__(self, total: int, enabled: bool = True) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=total, unit="token", disable=not enabled, leave=False, bar_format="{desc}  {bar:24} {n} {unit}s")
        self._prompt = True

    def say(self, stage: str) -> None:
        """Name what is being done now."""
        self._bar.set_description_str(stage)
        log.info("%s", stage)

    def put(self, tokens: Any) -> None:
        """One step's token; the first call is the prompt."""
        if not self._prompt:
            self._bar.update(1)
        self._prompt = False

    def end(self) -> None:
        """The reply is complete."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def default_predictor(model_name: str) -> Path:
    """The shipped 33.3 % predictor of a scenes model. ResourceError if there is none for that model."""
    found = sorted(paths.predictors().glob(f"{Path(model_name).name}_t0.333_s*.safetensors"))
    if not found:
        raise ResourceError(
            f"no predictor for {model_name} is shipped in data/predictors: name one with --predictor, or train one (notebook 02)"
        )
    return found[0]


def make_method(name: str, model_name: str, layer: int | None, rate: float | None, predictor: str | None) -> Any:
    """The method object for command-line choices. InputError when an option does not go with the method."""
    from dyrate_lib import VTW, DyRate, FastV, MergeRate, RandomPrune, RatePredictor
    from dyrate_lib.budgets import named

    if name not in METHODS:
        raise InputError(f"the method is one of {', '.join(METHODS)}, not {name!r}")
    takes: tuple[str, ...] = {
        "vtw": ("layer",), "dyrate": ("layer", "predictor"), "fastv": ("layer", "rate"), "random": ("layer", "rate"),
        "merge": ("layer", "rate"),
    }.get(name, ())  # fmt: skip
    for option, value in (("layer", layer), ("rate", rate), ("predictor", predictor)):
        if value is not None and option not in takes:
            may = f", which takes {' and '.join('--' + t for t in takes)}" if takes else ""
            raise InputError(f"--{option} does not go with method {name}{may}")
    if name == "vtw":
        return VTW(layer=layer)
    if name == "dyrate":
        return DyRate(RatePredictor.load(predictor or default_predictor(model_name)), layer=layer)
    if name in ("fastv", "random"):
        made = {"fastv": FastV, "random": RandomPrune}[name]
        return made(layer=2 if layer is None else layer, rate=0.5 if rate is None else rate)
    if name == "merge":
        return MergeRate(layer=layer, rates=None if rate is None else (rate,))
    return named(name)  # as released


def caption(
    image: str | Path, model_name: str = "scenes-small", method: str = "none", *, layer: int | None = None,
    rate: float | None = None, flops: float | None = None, predictor: str | None = None, prompt: str = DEFAULT_PROMPT,
    max_new_tokens: int = 64, device: str | None = None, out: str | Path | None = None, engine: str | None = None,
    progress: Progress | None = None,
) -> Caption:  # fmt: skip
    """Caption one picture greedily and write its masks to `out`/masks_<picture>_<method>.pdf and .png (default build/captions).

    Methods run at their released settings; flops: a share of the unpruned FLOPs (paper's convention) that the method's
    setting is searched for instead (`budgets.budget`, for a reply of 20 tokens). engine: as in `generate`. progress: is told
    of every stage and token.

    Raises InputError for a bad picture, prompt or option and ResourceError for missing weights, before any long work.
    """
    import matplotlib.pyplot as plt
    import torch

    from dyrate_lib import budget, chat_prompt, generate, load_vlm, model_info, prepare_inputs
    from dyrate_lib.images import load_image
    from dyrate_lib.loading import quietly
    from dyrate_lib.plotting import plot_masks, save_figure

    if max_new_tokens < 1:
        raise InputError(f"--max-new-tokens is at least 1, not {max_new_tokens}")
    if flops is not None and method in ("none", "dyrate"):
        why = ": its budget is set in training, see --predictor" if method == "dyrate" else ""
        raise InputError(f"--flops does not go with method {method}{why}")
    if flops is not None and rate is not None:
        raise InputError("--flops searches the rate: give one of --flops and --rate")
    picture = load_image(image)
    chosen = make_method(method, model_name, layer, rate, predictor)
    progress, start = progress or Progress(max_new_tokens, enabled=False), time.monotonic()
    progress.say(f"loading {model_name}")
    with quietly():
        model, processor = load_vlm(model_name, device=device)
    where = next(model.parameters()).device
    log.debug("%s on %s, loaded in %.1f s", model_name, where, time.monotonic() - start)
    inputs = prepare_inputs(processor, [picture], [chat_prompt(prompt)], device=where)
    if flops is not None:
        n_image = int((inputs["input_ids"] == model.config.image_token_id).sum())
        length = inputs["input_ids"].shape[1]
        chosen = budget(chosen, model_info(model), flops=flops, prompt_length=length, steps=REPLY, n_image=n_image)
    progress.say(f"captioning by {method}")
    with torch.inference_mode():
        out_ = generate(model, inputs, chosen, max_new_tokens=max_new_tokens, processor=processor, engine=engine,
                        streamer=progress)  # fmt: skip
    log.debug("%d tokens after %.1f s", int(out_.lengths[0]), time.monotonic() - start)
    progress.say("drawing the masks")
    trace, steps = out_.trace, int(out_.trace.valid[0].sum())
    kept = [trace.kept_at(0, t).cpu().numpy() for t in range(steps)]
    words = [processor.tokenizer.decode([token]) for token in out_.new_tokens[0, :steps].tolist()]
    saved = {c: 1.0 - out_.flops(c).ratio for c in ("cached", "paper")}
    n_image = int(trace.n_image[0])
    folder = Path(out) if out else paths.build() / "captions"
    stem = re.sub(r"[^A-Za-z0-9._-]+", "_", Path(image).stem).strip("._-") or "picture"
    fig = plot_masks(picture, kept, words=words, n_image=n_image, title=f"{method}, image tokens read at layers ≥ {trace.layer}")
    files = save_figure(fig, f"masks_{stem}_{method.replace('+', '-plus')}", folder)
    plt.close(fig)
    return Caption(out_.text[0], words, trace.kept[0, :steps].tolist(), n_image, saved, files, chosen)
