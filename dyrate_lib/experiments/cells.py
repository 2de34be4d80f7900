"""Cells of the study's tables as records: replies of a model to a set under a method, and the scores of such replies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..datasets import CaptionDataset
from ..evaluate import MethodFor, describe, predict
from ..methods import Method
from ..scenes.tasks import NAMES
from ..store import Store, get_or_run, run_items
from .scales import Scale

if TYPE_CHECKING:
    from ..metrics import CaptionScores

Record = dict[str, Any]


class StudyCells:
    """The half of a `Study` that computes and finds records; models, sets and stores are the study's."""

    notebook: str
    scale: Scale
    store: Store
    scores_store: Store
    progress: bool
    _ids: dict[str, list[str]]
    _read: dict[str, Record]
    # of the other half
    model_name: Callable[[str], str]
    dtype: Callable[[str], str]
    model: Callable[[str], tuple[Any, Any]]
    weights: Callable[[str], list[Path]]
    dataset: Callable[..., CaptionDataset]
    ids: Callable[[CaptionDataset], list[str]]

    def each(self, items: Iterable[Any], what: str) -> Iterable[Any]:
        """The items, under a progress bar that shows itself only where the work takes a while."""
        from tqdm import tqdm

        return tqdm(list(items), desc=f"{self.notebook}: {what}", delay=2, disable=not self.progress)

    def record(
        self, name: str, config: Mapping[str, Any], fn: Callable[[], Any], *, models: Sequence[str] = (),
        inputs: Sequence[str | Path] = (), about: Mapping[str, Any] | None = None, store: Store | None = None,
        together: bool = False,
    ) -> Record:  # fmt: skip
        """get_or_run in this study's store (or `store`); names and weights of `models` enter the key, `inputs` too."""
        config = {**config, "models": [Path(self.model_name(key)).name for key in models]}
        files = [folder for key in models for folder in self.weights(key)] + list(inputs)
        about = {**({"dtype": self.dtype(models[0])} if models else {}), **(about or {})}
        return self._once(
            [name, config, files],
            lambda: get_or_run(name, config, fn, store=store or self.store, inputs=files, about=about, together=together),
        )

    def _once(self, what: list[Any], get: Callable[[], Record]) -> Record:
        """A record read once per study: tables and figures ask for the same ones again and again."""
        key = json.dumps(what, sort_keys=True, default=str)
        if key not in self._read:
            self._read[key] = get()
        return self._read[key]

    def captions(
        self, key: str, role: str, method: Method | None = None, *, decoding: Mapping[str, Any] | None = None,
        n: int | None = None, max_new_tokens: int | None = None,
    ) -> Record:  # fmt: skip
        """Replies of a model to the set in a role, under a method; payload: the list of `evaluate.predict`.

        The same cell asked for by another notebook is the same record.
        """
        return self._cell(key, role, method, describe(method), decoding, n, max_new_tokens)

    def per_picture(
        self, key: str, role: str, factory: MethodFor, config: Mapping[str, Any], *, n: int | None = None,
        max_new_tokens: int | None = None,
    ) -> Record:  # fmt: skip
        """As `captions`, for a method that differs by picture: factory(indices of a batch) -> Method; config says what it is."""
        return self._cell(key, role, factory, dict(config), None, n, max_new_tokens)

    def _cell(
        self, key: str, role: str, method: Method | MethodFor | None, description: dict[str, Any],
        decoding: Mapping[str, Any] | None, n: int | None, max_new_tokens: int | None,
    ) -> Record:  # fmt: skip
        dataset = self.dataset(role, n)
        longest = max_new_tokens or (4 if role == "questions" or role in NAMES else self.scale.max_new_tokens)
        config = {
            "model": Path(self.model_name(key)).name, "data": dataset.identity, "method": description,
            "decoding": dict(decoding or {}), "max_new_tokens": longest,
        }  # fmt: skip
        if (decoding or {}).get("do_sample"):
            config["batch_size"] = self.scale.batch_size  # a draw depends on the batch it is made in

        def run(indices: list[int]) -> list[dict[str, Any]]:
            model, processor = self.model(key)
            return predict(
                model, processor, dataset, method, max_new_tokens=longest, batch_size=self.scale.batch_size,
                decoding=decoding, indices=indices, progress=False,
            )  # fmt: skip

        def get() -> Record:
            record = run_items(
                "captions", config, list(range(len(dataset))), run, store=self.store, batch_size=self.scale.batch_size,
                inputs=self.weights(key), ids=self.ids(dataset), about={"dtype": self.dtype(key)},
                progress=self.progress and len(dataset) > 4 * self.scale.batch_size,
            )  # fmt: skip
            return {**record, "payload": record["payload"]["results"]}

        return self._once(["captions", config, self.weights(key)], get)

    def scores(self, record: Record, role: str) -> CaptionScores:
        """CIDEr, BLEU-4 and ROUGE-L of a record of captions. Kept in the store, so Java is needed the first time only."""
        said = {entry["id"]: entry["text"] for entry in record["payload"]}
        dataset = self.dataset(role, len(said))

        def fn() -> dict[str, Any]:
            from ..metrics import caption_scores, ptb_tokenize

            # all replies known so far in one go: to start Java takes as long as thousands of sentences
            ptb_tokenize([*self._replies(), *(line for lines in dataset.references().values() for line in lines)])
            return _plain_scores(caption_scores(said, dataset.references()))

        config = {"predictions": _digest(said), "data": dataset.identity}
        found = self._once(["scores", config], lambda: get_or_run("scores", config, fn, store=self.scores_store))
        return _as_scores(found["payload"])

    def of_replies(self, name: str, record: Record, role: str, fn: Callable[[], Any], **settings: Any) -> Record:
        """What `fn()` makes of the replies in a record of captions, kept in the store of scores under `name`.

        settings: what the result depends on besides, as JSON values.
        """
        said = {entry["id"]: entry["text"] for entry in record["payload"]}
        config = {"predictions": _digest(said), "data": self.dataset(role, len(said)).identity, **settings}
        return self._once([name, config], lambda: get_or_run(name, config, fn, store=self.scores_store))

    def _replies(self) -> list[str]:
        """The replies of every record of captions that was read."""
        captions = [record for key, record in self._read.items() if key.startswith('["captions"')]
        return [entry["text"] for record in captions for entry in record["payload"]]

    def reference_scores(self, role: str, n: int | None = None) -> CaptionScores:
        """What one reference scores against the others of its picture (leave one out): the level of human agreement."""
        dataset = self.dataset(role, n)

        def fn() -> dict[str, Any]:
            from ..metrics import leave_one_out

            return _plain_scores(leave_one_out(dataset.references()))

        config = {"predictions": "leave one out", "data": dataset.identity}
        return _as_scores(get_or_run("scores", config, fn, store=self.scores_store)["payload"])


def _digest(said: Mapping[str, str]) -> str:
    """What names a set of replies."""
    return hashlib.sha256(json.dumps(sorted(said.items())).encode()).hexdigest()


def _plain_scores(scores: CaptionScores) -> dict[str, Any]:
    return {
        "cider": scores.cider, "bleu4": scores.bleu4, "rouge_l": scores.rouge_l, "ids": list(scores.ids),
        "per_image_cider": [round(value, 6) for value in scores.per_image_cider.tolist()],
    }  # fmt: skip


def _as_scores(payload: Mapping[str, Any]) -> CaptionScores:
    import numpy as np

    from ..metrics import CaptionScores

    return CaptionScores(
        payload["cider"], payload["bleu4"], payload["rouge_l"], tuple(payload["ids"]), np.asarray(payload["per_image_cider"])
    )
