"""How large a run is: `full` is what the committed records were made at, `smoke` proves on two cores that all works."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InputError


@dataclass(frozen=True)
class Scale:
    """Sizes of one scale. Counts are of pictures unless said otherwise.

    n_captions, n_questions: per cell of a table. n_ablation: per cell of the ablations. n_attention: per size and
    caption family. n_visual: pictures whose masks are drawn. n_validation: for schedules of a trained predictor.
    n_refresh: for FastV without a cache, whose cost is that of a prefill a token. n_search: VTW's layer search.
    n_masked: random rate paths of the masked-equals-discarded check. batch_size: pictures generated together.
    train_steps, train_batch: predictor training; ablation_steps: the same for predictors of the ablations only.
    targets, predictor_seeds: what is trained and compared; sampling_seeds: draws of top-p and top-k.
    n_pareto, pareto_levels: pictures and FLOPs budgets of the curves of quality against FLOPs on the short captions;
    family_levels: budgets on the long ones and the questions. equal_level: the budget of the tables at equal cost.
    one_budget: "model:set" of curves that have that one point only, for want of device time.
    n_tasks: pictures of each cell of the seven short-answer tasks, with all their prompts. n_front, front_levels,
    front_family_levels, front_targets: pictures and FLOPs budgets of the fronts from 10 to 80 % on the short captions and on the
    long ones, and the budgets that predictors are trained for there.
    n_controls: per cell of the controls and of what hangs on them; control_steps, control_seeds: their predictors' training;
    control_models, control_roles: which are run; control_levels: budgets of the constant rates beside them, which tell what a
    little more cost would gain; conditions: names in `generality.CONDITIONS`.
    bootstrap: resamples of an interval. latency_repeats, latency_warmup: timed runs. max_new_tokens: longest caption.
    """

    name: str
    n_captions: int
    n_questions: int
    n_ablation: int
    n_attention: int
    n_visual: int
    n_validation: int
    n_refresh: int
    n_search: int
    n_masked: int
    batch_size: int
    train_steps: int
    train_batch: int
    ablation_steps: int
    targets: tuple[float, ...]
    predictor_seeds: tuple[int, ...]
    sampling_seeds: tuple[int, ...]
    bootstrap: int
    latency_repeats: int
    latency_warmup: int
    max_new_tokens: int = 64
    n_pareto: int = 3
    pareto_levels: tuple[float, ...] = (0.333, 0.65)
    family_levels: tuple[float, ...] = ()
    equal_level: float = 0.333
    one_budget: tuple[str, ...] = ()
    n_tasks: int = 2
    n_front: int = 2
    front_levels: tuple[float, ...] = (0.333, 0.65)
    front_family_levels: tuple[float, ...] = (0.333,)
    front_targets: tuple[float, ...] = (0.2, 0.333, 0.5)
    n_controls: int = 2
    control_steps: int = 2
    control_seeds: tuple[int, ...] = (0,)
    control_models: tuple[str, ...] = ("small",)
    control_roles: tuple[str, ...] = ("late",)
    control_levels: tuple[float, ...] = (0.4,)
    conditions: tuple[str, ...] = ("P = 3", "other scenes")


SCALES = {
    "smoke": Scale(
        "smoke", n_captions=3, n_questions=8, n_ablation=3, n_attention=3, n_visual=2, n_validation=3, n_refresh=2,
        n_search=2, n_masked=2, batch_size=8, train_steps=20, train_batch=2, ablation_steps=2, targets=(0.5, 0.333, 0.2),
        predictor_seeds=(0,), sampling_seeds=(0,), bootstrap=200, latency_repeats=3, latency_warmup=1,
    ),
    "full": Scale(
        "full", n_captions=500, n_questions=1000, n_ablation=500, n_attention=250, n_visual=6, n_validation=200,
        n_refresh=200, n_search=20, n_masked=20, batch_size=250, train_steps=200, train_batch=12, ablation_steps=120,
        targets=(0.5, 0.333, 0.2), predictor_seeds=(0, 1, 2), sampling_seeds=(0, 1, 2), bootstrap=1000,
        latency_repeats=8, latency_warmup=1, n_pareto=250, pareto_levels=(0.15, 0.2, 0.333, 0.5, 0.8),
        family_levels=(0.2, 0.333, 0.5), one_budget=("base:questions",), n_tasks=1000, n_front=500,
        front_levels=(0.1, 0.2, 0.333, 0.4, 0.5, 0.6, 0.7, 0.8), front_family_levels=(0.1, 0.2, 0.333, 0.5, 0.8),
        front_targets=(0.1, 0.2, 0.333, 0.4, 0.5, 0.6, 0.7, 0.8),
        n_controls=1000, control_steps=200,
        control_seeds=(0, 1, 2), control_models=("small", "base"), control_roles=("coco", "flickr30k", "late"),
        control_levels=(0.28, 0.4), conditions=("5 rates", "10 rates", "P = 1", "P = 3", "P = 4", "other scenes"),
    ),
}  # fmt: skip


def resolve_scale(name: str = "auto") -> Scale:
    """The scale of that name; "auto" is full where there is a GPU and smoke elsewhere.

    Raises:
        InputError: an unknown name.
    """
    if name == "auto":
        import torch

        name = "full" if torch.cuda.is_available() else "smoke"
    if name not in SCALES:
        raise InputError(f"scale={name!r} is unknown: choose auto, {' or '.join(SCALES)}")
    return SCALES[name]
