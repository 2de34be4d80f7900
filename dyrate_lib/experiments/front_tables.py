"""Notebook 03: the fronts of quality against FLOPs, as tables and a figure, in both conventions of accounting."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..errors import InputError
from ..pareto import OFF, ON, PERHAPS, mean_scores, standing
from ..pareto import Point as Place
from ..plotting import METHODS, WIDTH_PAGE
from ..stats import bootstrap_means
from .benchmark_tables import cider, per_picture
from .benchmarks import remembered
from .context import Study
from .equal_budget import BY_KEY, Point, models
from .equal_tables import MISSED, TITLES, _draw, missed_rows
from .front_predictors import reach
from .fronts import points, roles, unreached
from .summaries import difference_with_interval, mean_with_interval, show_interval

CONVENTIONS = ("paper", "cached")
ALIKE = 0.01  # costs that differ by no more count as equal when a point's place is told


def label(point: Point) -> str:
    """A point's method, and the budget it was set to or trained for."""
    name = BY_KEY[point.key].label.split(" (")[0] if point.key in BY_KEY else METHODS[point.row.style][0]
    return name if point.key == "original" else f"{name} at {100 * point.level:g} %"


def quality(study: Study, point: Point, role: str) -> np.ndarray:
    """CIDEr (x 100) of each picture, averaged over seeds."""
    return cider(study, point.row, role)


def spent(point: Point, convention: str) -> float:
    """The FLOPs ratio really spent, mean over pictures."""
    return float(per_picture(point.row, "flops", convention).mean())


def standings(study: Study, key: str, role: str, convention: str) -> dict[str, str]:
    """How each point stands to the front ('on the front', 'not settled', 'dominated'), by its label.

    Differences are paired over pictures, intervals of 95 %; costs within a point of FLOPs count as equal.
    """
    return remembered(study, ("standing", key, role, convention), lambda: _standings(study, key, role, convention))


def _standings(study: Study, key: str, role: str, convention: str) -> dict[str, str]:
    draws, places = {}, []
    for point in _distinct(points(study, key, role)):
        each = quality(study, point, role)
        means = np.concatenate([[each.mean()], bootstrap_means(each, study.scale.bootstrap, study.seed)])
        draws[label(point)] = means
        lo, hi = np.quantile(means[1:], [0.025, 0.975])
        places.append(Place(label(point), spent(point, convention), float(means[0]), float(lo), float(hi)))

    def gap(a: Place, b: Place) -> tuple[float, float, float]:
        differences = draws[a.name] - draws[b.name]  # the same resamples, so these are paired
        lo, hi = np.quantile(differences[1:], [0.025, 0.975])
        return float(differences[0]), float(lo), float(hi)

    return standing(places, gap, ALIKE)


def _distinct(found: list[Point]) -> list[Point]:
    """Points whose cells differ: a method of whole layers may have one setting for two budgets."""
    seen: dict[str, Point] = {}
    for point in found:
        seen.setdefault(repr([point.key, [cell["config"]["method"] for cell in point.row.cells]]), point)
    return list(seen.values())


def front_table(study: Study) -> pd.DataFrame:
    """Every point: budget asked for, FLOPs spent in both conventions, the error, quality with interval, and its standing."""
    return remembered(study, ("front table",), lambda: pd.DataFrame(_lines(study)))


def _lines(study: Study) -> list[dict[str, Any]]:
    out = []
    for key in models(study):
        for role in roles(study):
            place = {convention: standings(study, key, role, convention) for convention in CONVENTIONS}
            for point in _distinct(points(study, key, role)):
                found = mean_with_interval(quality(study, point, role), study.scale.bootstrap, study.seed)
                cost = {convention: spent(point, convention) for convention in CONVENTIONS}
                out.append(
                    {"model": study.label(key), "set": role, "method": point.row.label, "key": point.key,
                     "asked %": round(100 * point.level, 6), **{f"FLOPs % ({name})": 100 * value for name, value in cost.items()},
                     "off by %": 100 * (cost["paper"] / point.level - 1),
                     "CIDEr": found["mean"], "lo": found["lo"], "hi": found["hi"],
                     **{f"standing ({name})": place[name][label(point)] for name in CONVENTIONS},
                     "n": found["n"], "seeds": len(point.row.cells)}
                )  # fmt: skip
    return out


def summary_table(study: Study) -> pd.DataFrame:
    """Which points are on the front beyond doubt, and for which it is not settled, by model, set and convention."""
    out = []
    for key in models(study):
        for role in roles(study):
            for convention in CONVENTIONS:
                place = standings(study, key, role, convention)
                line: dict[str, Any] = {"model": study.label(key), "set": role, "FLOPs": convention}
                for word in (ON, PERHAPS):
                    line[word] = ", ".join(name for name, found in place.items() if found == word) or "none"
                out.append(line | {OFF: sum(found == OFF for found in place.values())})
    return pd.DataFrame(out)


def area_table(study: Study, convention: str = "paper") -> pd.DataFrame:
    """CIDEr averaged over a range of budgets that all methods shown reach, and minus random removal's, paired.

    Methods without two settings of different cost around the range are left out, as nothing is extrapolated.
    """
    out = []
    for key in models(study):
        for role in roles(study):
            curves = _curves(study, key, role, convention)
            low, high = _range(curves)
            options = (study.scale.bootstrap, study.seed)
            if not low < high or "random" not in curves:
                continue
            control = mean_scores(*curves["random"], low, high)
            for name, (costs, table) in curves.items():
                if costs[0] > low or costs[-1] < high:
                    continue
                each = mean_scores(costs, table, low, high)
                gap = difference_with_interval(each, control, *options)
                out.append(
                    {"model": study.label(key), "set": role, "method": _name(name),
                     "budgets %": f"{100 * low:.1f} to {100 * high:.1f}",
                     "mean CIDEr [95%]": show_interval(mean_with_interval(each, *options), 1),
                     "minus random [95%]": "" if name == "random" else show_interval(gap, 1), "n": each.size}
                )  # fmt: skip
    return pd.DataFrame(out)


def _name(key: str) -> str:
    return BY_KEY[key].label if key in BY_KEY else METHODS[key][0]


def _curves(study: Study, key: str, role: str, convention: str) -> dict[str, tuple[list[float], np.ndarray]]:
    """Of each method with two costs at least: costs, rising, and the scores [settings, pictures] there."""
    found: dict[str, dict[float, np.ndarray]] = {}
    for point in points(study, key, role):
        found.setdefault(point.key, {})[spent(point, convention)] = quality(study, point, role)
    return {
        name: (sorted(some), np.stack([some[cost] for cost in sorted(some)]))
        for name, some in found.items()
        if len(some) > 1
    }


def _range(curves: dict[str, tuple[list[float], np.ndarray]]) -> tuple[float, float]:
    """The budgets that DyRate's curve and random removal's share: what others do not reach is no reason to cut these."""
    ends = [(curves[name][0][0], curves[name][0][-1]) for name in ("random", "dyrate") if name in curves]
    return (max(low for low, _ in ends), min(high for _, high in ends)) if ends else (0.0, 0.0)


def unreached_table(study: Study) -> pd.DataFrame:
    """Budgets out of a method's reach, what its settings reach, and DyRate's own reach on each set."""
    rows = missed_rows(study, unreached(study))
    for key in models(study):
        ends = [reach(study, key, role) for role in roles(study)]
        missed = [t for t in study.scale.front_targets if t < min(low for low, _ in ends)]
        rows.append(
            {"model": study.label(key), "method": "DyRate", "asked for, %": ", ".join(f"{100 * t:g}" for t in missed) or "–",
             "from %": 100 * min(low for low, _ in ends), "to %": 100 * max(high for _, high in ends)}
        )  # fmt: skip
    return pd.DataFrame(rows, columns=MISSED)


# ----------------------------------------------------------------------------------------------------------- figure


def front_figure(study: Study, convention: str) -> Figure:
    """CIDEr over the FLOPs really spent in a convention: rows are models, columns sets; rings are points on the front."""
    if convention not in CONVENTIONS:
        raise InputError(f"no convention {convention!r}: there are {', '.join(CONVENTIONS)}")
    table, keys, columns = front_table(study), models(study), roles(study)
    cost = f"FLOPs % ({convention})"
    fig, axes = plt.subplots(
        len(keys), len(columns), figsize=(WIDTH_PAGE, 2.2 * len(keys) + 0.8), squeeze=False, sharex=True
    )
    handles: dict[str, Any] = {}
    for i, key in enumerate(keys):
        for j, role in enumerate(columns):
            ax, some = axes[i, j], table[(table.model == study.label(key)) & (table.set == role)]
            base = some[some.key == "original"].iloc[0]
            ax.axhspan(base.lo, base.hi, color="#000000", alpha=0.08, linewidth=0)
            handles.setdefault("Original", ax.axhline(base.CIDEr, color="#000000", linewidth=0.8))
            for name, lines in some[some.key != "original"].groupby("key", sort=False):
                style = BY_KEY[name].style if name in BY_KEY else str(name)
                drawn = lines.rename(columns={"CIDEr": "quality"}).sort_values("asked %")
                handle = _draw(ax, drawn.assign(**{"FLOPs % (paper)": drawn[cost]}), style)
                handles.setdefault(_name(str(name)).split(" (")[0], handle)
            best = some[(some[f"standing ({convention})"] == ON) & (some.key != "original")]
            (ring,) = ax.plot(
                best[cost], best.CIDEr, "o", color="#000000", markersize=8, markerfacecolor="none", linewidth=0
            )
            handles.setdefault("on the front", ring)
            if i == 0:
                ax.set_title(TITLES[role])
            if i == len(keys) - 1:
                ax.set_xlabel(f"FLOPs % ({convention})")
        axes[i, 0].set_ylabel(f"{study.label(key).split(' (')[0]}\nCIDEr")
    fig.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=7, columnspacing=1.2)
    return fig


def front_findings(study: Study) -> str:
    """Stable lines: how DyRate's points stand, by model, set and convention."""
    lines = []
    for key in models(study):
        for role in roles(study):
            for convention in CONVENTIONS:
                mine = {n: w for n, w in standings(study, key, role, convention).items() if n.startswith("DyRate")}
                said = "; ".join(
                    f"{word}: {', '.join(name.removeprefix('DyRate at ') for name, found in mine.items() if found == word)}"
                    for word in (ON, PERHAPS, OFF)
                    if word in mine.values()
                )
                lines.append(f"{study.label(key)}, {TITLES[role]}, {convention}: DyRate's points: {said}")
    return "\n".join(lines)
