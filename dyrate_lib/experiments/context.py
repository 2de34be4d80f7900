"""What the notebooks share: one `Study` with checked parameters, models, data sets, predictors, records and output folders.

A notebook opens its study, asks for records (computed where they are missing, read where they are there) and turns them
into tables and figures. With every record present neither weights nor a GPU are needed.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import paths
from ..datasets import CaptionDataset, open_dataset
from ..errors import DyRateError, InputError, ResourceError
from ..loading import SCENES, load_vlm, quietly
from ..methods import VTW, DyRate, FastV, Method, NoReduction, RandomPrune
from ..models import ModelInfo, model_info
from ..predictor import RatePredictor
from ..published import KINDS
from ..scenes.tasks import NAMES
from ..store import Store
from .cells import Record, StudyCells
from .output import StudyOutput
from .roles import ROLE_LABELS as ROLE_LABELS
from .roles import ROLE_SPECS as ROLE_SPECS
from .scales import Scale, resolve_scale

STAGES = ("all", "records", "records:small", "records:base")
MODEL_ROLES = {"small": "7B", "base": "13B"}


class StageDone(DyRateError):
    """Not a failure: all records are there, and the notebook was asked to stop at that point (stage = "records")."""

    def _render_traceback_(self) -> list[str]:  # what IPython shows instead of a traceback
        return [str(self)]


@dataclasses.dataclass
class Study(StudyCells, StudyOutput):
    """One notebook's view of the study; make it with `open_study`. `keys` names the models: "small" and "base"."""

    notebook: str
    scale: Scale
    records: str
    out: Path
    seed: int
    names: dict[str, str]
    data: str
    stage: str
    store: Store
    scores_store: Store
    progress: bool = True
    lmms: str = ""
    _models: dict[str, tuple[Any, Any]] = dataclasses.field(default_factory=dict, repr=False)
    _infos: dict[str, ModelInfo] = dataclasses.field(default_factory=dict, repr=False)
    _datasets: dict[tuple, CaptionDataset] = dataclasses.field(default_factory=dict, repr=False)
    _ids: dict[str, list[str]] = dataclasses.field(default_factory=dict, repr=False)
    _read: dict[str, Record] = dataclasses.field(default_factory=dict, repr=False)

    # -- parameters ------------------------------------------------------------------------------------------------

    @property
    def keys(self) -> tuple[str, ...]:
        """The models to work on: small and base, or small alone where both are the same model."""
        return ("small",) if self.names["small"] == self.names["base"] else ("small", "base")

    @property
    def records_only(self) -> bool:
        """Whether to stop once the records are there."""
        return self.stage.startswith("records")

    @property
    def keys_asked(self) -> tuple[str, ...]:
        """The models whose records to make sure of: all, or the one that stage = "records:small" or "records:base" names."""
        one = self.stage.partition(":")[2]
        return (one,) if one else self.keys

    @property
    def on_scenes(self) -> bool:
        """Whether the data are scenes, whose truth is known."""
        return self.data == "scenes"

    @property
    def roles(self) -> tuple[str, ...]:
        """Caption sets to work on: the three of Table II and `late`; of published sets those that were named."""
        return ("coco", "nocaps", "flickr30k", "late") if self.on_scenes else tuple(data_specs(self.data))

    # -- models ------------------------------------------------------------------------------------------------------

    def model_name(self, key: str) -> str:
        """The model's name as load_vlm takes it."""
        if key not in self.names:
            raise InputError(f"no model {key!r}: there are {', '.join(self.names)}")
        return self.names[key]

    def spec(self, role: str) -> str:
        """The specification of the published set in a caption role."""
        known = data_specs(self.data)
        return known.get(role, next(iter(known.values())))

    def label(self, key: str) -> str:
        """The model's name for a table, with the role it plays."""
        name = Path(self.model_name(key)).name
        return f"{name} (as {MODEL_ROLES[key]})" if name in SCENES else name

    def dtype(self, key: str) -> str:
        """Scenes models run in float32 everywhere, so that records do not hang on the machine; others in load_vlm's default."""
        import torch

        shipped = Path(self.model_name(key)).name in SCENES
        return "bfloat16" if torch.cuda.is_available() and not shipped else "float32"

    def model(self, key: str) -> tuple[Any, Any]:
        """(model, processor), loaded at the first call."""
        name = self.model_name(key)
        if name not in self._models:
            with quietly():  # a bar would differ from run to run
                self._models[name] = load_vlm(name, dtype=self.dtype(key))
        return self._models[name]

    def info(self, key: str) -> ModelInfo:
        """The model's dimensions, without its weights where its config lies here."""
        name = self.model_name(key)
        if name in self._models:
            return model_info(self._models[name][0])
        if name.startswith("random:"):
            return model_info(load_vlm(name, device="meta")[0])
        folder = self.weights(key)
        if not folder:
            return model_info(self.model(key)[0])
        import torch
        from transformers import AutoConfig, AutoModelForImageTextToText

        if name not in self._infos:
            with torch.device("meta"):  # the model's shape alone
                config = AutoConfig.from_pretrained(str(folder[0]), trust_remote_code=False)
                model = AutoModelForImageTextToText.from_config(config)
            model.dyrate_name = name
            self._infos[name] = model_info(model)
        return self._infos[name]

    def weights(self, key: str) -> list[Path]:
        """The folder of the model's weights, whose content enters the keys of records; [] for a hub id or random weights."""
        name = self.model_name(key)
        folder = paths.checkpoints() / name if name in SCENES else Path(name).expanduser()
        return [folder] if name in SCENES or folder.is_dir() else []

    # -- predictors and methods ----------------------------------------------------------------------------------------

    def predictor_file(self, key: str, target: float = 0.333, seed: int = 0) -> str:
        """The name of a predictor's file."""
        model = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(self.model_name(key)).name)
        return f"{model}_t{target:g}_s{seed}.safetensors"

    def predictor_path(self, key: str, target: float = 0.333, seed: int = 0) -> Path:
        """Where a trained predictor lies: what notebook 02 trained in this output folder, else the shipped one.

        Raises:
            ResourceError: there is none.
        """
        name = self.predictor_file(key, target, seed)
        shipped = Path(self.model_name(key)).name in SCENES
        folders = [paths.predictors()]
        if self.records == "fresh" or not shipped:
            folders.insert(0, self.out / "predictors")
        for folder in folders:
            if (folder / name).is_file():
                return folder / name
        raise ResourceError(f"no predictor {name} in {' or '.join(map(str, folders))}: run notebook 02 for this model first")

    def predictor(self, key: str, target: float = 0.333, seed: int = 0) -> RatePredictor:
        """A trained predictor (see `predictor_path`)."""
        return RatePredictor.load(self.predictor_path(key, target, seed))

    def method(self, kind: str, key: str = "small", *, target: float = 0.333, seed: int = 0, **options: Any) -> Method:
        """A method by its name in the paper's tables: original, fastv-2, fastv-3, vtw, random, dyrate.

        target, seed: which predictor (dyrate); options: fields of the method to override.
        """
        if kind == "dyrate":
            return DyRate(self.predictor(key, target, seed), **options)
        made: dict[str, Callable[..., Method]] = {
            "original": NoReduction, "vtw": VTW, "random": RandomPrune,
            "fastv-2": lambda **o: FastV(**{"layer": 2, "rate": 0.5, **o}),
            "fastv-3": lambda **o: FastV(**{"layer": 3, "rate": 0.5, **o}),
        }  # fmt: skip
        if kind not in made:
            raise InputError(f"no method {kind!r}: there are {', '.join(made)}, dyrate")
        return made[kind](**options)

    # -- data ------------------------------------------------------------------------------------------------------

    def dataset(self, role: str, n: int | None = None) -> CaptionDataset:
        """The set that plays a role (`ROLE_SPECS`); of published sets the first plays every caption role that has none.

        n: pictures (of questions: questions); None takes the scale's count (a folder with fewer gives all it has). A picture
            of a task has all its prompts.
        """
        if role not in ROLE_SPECS:
            raise InputError(f"no data set in the role {role!r}: there are {', '.join(ROLE_SPECS)}")
        asked = role == "questions" or role in NAMES
        if n is None:
            scale = self.scale
            n = scale.n_tasks if role in NAMES else scale.n_questions if asked else scale.n_captions
        if self.on_scenes or asked:
            place = (ROLE_SPECS[role], n)
        else:
            spec = self.spec(role)
            if (spec, None) not in self._datasets:
                self._datasets[spec, None] = open_dataset(spec, None, self.seed)
            place = (spec, min(n, len(self._datasets[spec, None])))
        if place not in self._datasets:
            self._datasets[place] = open_dataset(*place, self.seed)
        return self._datasets[place]

    def ids(self, dataset: CaptionDataset) -> list[str]:
        """The ids of a data set's items, remembered."""
        key = f"{dataset.spec}/{len(dataset)}/{dataset.seed}"
        if key not in self._ids:
            self._ids[key] = [item.id for item in dataset]
        return self._ids[key]

    # -- the end ------------------------------------------------------------------------------------------------------

    def end_of_records(self) -> None:
        """Stops the notebook here if only its records were asked for (stage = "records")."""
        if self.records_only:
            raise StageDone(f"{self.notebook}: all records are there; stopped as asked (stage = 'records')")


def data_specs(data: str) -> dict[str, str]:
    """Published sets by the role they play, Table II's order: "coco:/a,nocaps:/b" is {"coco": "coco:/a", "nocaps": "nocaps:/b"}.

    A parquet folder plays COCO's role. Raises InputError for other kinds, two for one role, or none for COCO's.
    """
    parts = [part.strip() for part in re.split(r",(?=\s*[a-z0-9]+:)", data)]
    found: dict[str, str] = {}
    for part in parts:
        kind, _, place = part.partition(":")
        if kind not in (*KINDS, "parquet") or not place:
            known = ", ".join(f"{name}:/folder" for name in (*KINDS, "parquet"))
            raise InputError(f"data={data!r} is unknown: choose scenes, or {known}, several separated by commas")
        role = "coco" if kind == "parquet" else kind
        if role in found:
            raise InputError(f"data={data!r} names two sets for the role of {role}")
        found[role] = part
    if "coco" not in found:
        raise InputError(f"data={data!r}: name coco:/folder or parquet:/folder too; predictors are trained on it")
    return {role: found[role] for role in ROLE_SPECS if role in found}


def open_study(
    notebook: str, *, scale: str = "full", records: str = "committed", out: str = "", seed: int = 0,
    model_small: str = "scenes-small", model_base: str = "scenes-base", data: str = "scenes", stage: str = "all",
    lmms: str = "", progress: bool = True,
) -> Study:  # fmt: skip
    """Check a notebook's parameters and open its study; nothing is loaded yet.

    scale: smoke, full, or auto (full where there is a GPU). records: "committed" reads data/results and computes what is
    missing, except at full scale without a GPU, where missing records are an error; "fresh" reads nothing committed.
    out: folder for figures, tables and new records, "" is build/. stage: "all", or "records" to stop when those are there;
    "records:small" and "records:base" make those of one model only, so that two GPUs share the work in one folder.
    lmms: a folder of lmms-eval results on the original weights, for notebook 03; "" is none.

    Raises:
        InputError: a value that is none of the known ones, before anything runs. ResourceError: no results in the folder `lmms`.
    """
    # tqdm would say once a session that Jupyter widgets are not installed; its text bars need none
    warnings.filterwarnings("ignore", message="IProgress not found")
    sized = resolve_scale(scale)
    for name, value, known in (("records", records, ("committed", "fresh")), ("stage", stage, STAGES)):
        if value not in known:
            raise InputError(f"{name}={value!r} is unknown: choose {', '.join(known[:-1])} or {known[-1]}")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InputError(f"seed={seed!r} must be a whole number, 0 or more")
    if data != "scenes":
        data_specs(data)
    if lmms:
        from ..lmms.results import read_results

        lmms = str(Path(lmms).expanduser().resolve())
        read_results(lmms)
    names = {"small": model_small, "base": model_base}
    if not all(isinstance(name, str) and name for name in names.values()):
        raise InputError(f"model_small and model_base must be names or folders of models, got {names}")
    folder = Path(out).expanduser().resolve() if out else paths.build()
    build = paths.build() if folder == paths.root() else folder
    if records == "fresh":
        store = scores = Store.fresh(build)
    else:
        shipped = data == "scenes" and set(names.values()) == set(SCENES) and seed == 0
        store = Store.committed(build, frozen=sized.name == "full" and shipped and not _has_gpu())
        scores = Store.committed(build)
    # a notebook over finished records must print the same every time, so only computing anew shows bars
    return Study(notebook, sized, records, folder, seed, names, data, stage, store, scores, progress and records == "fresh", lmms)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
