"""lmms-eval's requests as batches of our loop: chat messages to prompts, generation settings, stop strings, records.

Needs no lmms-eval: a `Question` is what its requests boil down to.
"""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError, ResourceError
from ..evaluate import beam_records, output_records
from ..generation import generate
from ..images import load_image
from ..loading import prepare_inputs
from ..methods import Method
from ..models import Adapter
from ..prompts import IMAGE_TOKEN, SYSTEM_PROMPT, chat_prompt
from .settings import Settings

# What tasks write into generation_kwargs that says nothing to our loop.
_NO_MATTER = ("image_aspect_ratio", "use_cache", "max_gen_toks", "image_sizes")


@dataclass(frozen=True)
class Decoding:
    """How replies are made. until: strings at whose first occurrence a reply ends. limited: whether the task set max_new_tokens.

    do_sample False is greedy, or beams where num_beams > 1.
    """

    max_new_tokens: int
    until: tuple[str, ...] = ()
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    num_beams: int = 1
    limited: bool = True


@dataclass(frozen=True)
class Question:
    """One request. messages: chat messages as lmms-eval makes them, a list of {"role", "content": [{"type", "text" | "url"}]};
    key: (task, split, number of the document). Requests of one task and one decoding share batches."""

    key: tuple[str, str, int]
    messages: Sequence[Mapping[str, Any]] = field(repr=False)
    decoding: Decoding


def read_decoding(generation_kwargs: Mapping[str, Any] | None, default_new_tokens: int) -> Decoding:
    """A task's generation_kwargs, checked. A temperature of 0 is greedy, whatever do_sample says.

    Raises InputError for values out of range; names that mean nothing here are warned about once.
    """
    given = dict(generation_kwargs or {})
    until = given.pop("until", None)
    until = [until] if isinstance(until, str) else list(until or ())
    if not all(isinstance(text, str) for text in until):
        raise InputError(f"generation_kwargs: until={until!r} must be strings")
    longest = given.pop("max_new_tokens", None)
    limited = longest is not None
    temperature, top_p = (_number(name, given.pop(name, None)) for name in ("temperature", "top_p"))
    top_k = given.pop("top_k", None)
    sampled = bool(given.pop("do_sample", False)) and temperature != 0
    if sampled and not (temperature > 0 and 0 < top_p <= 1):
        raise InputError(
            f"generation_kwargs: temperature={temperature:g} must be above 0 (0 is greedy), top_p={top_p:g} above 0, at most 1"
        )
    beams = given.pop("num_beams", None)
    unknown = sorted(set(given) - set(_NO_MATTER))
    if unknown:
        warnings.warn(f"generation_kwargs without a meaning here: {', '.join(unknown)}", stacklevel=2)
    made = Decoding(
        _whole("max_new_tokens", longest if limited else default_new_tokens, 1), tuple(text for text in until if text), sampled,
        temperature if sampled else 1.0, top_p if sampled else 1.0, _whole("top_k", top_k or 0, 0) if sampled else 0,
        _whole("num_beams", 1 if beams is None else beams, 1), limited,
    )  # fmt: skip
    if made.do_sample and made.num_beams > 1:
        raise InputError("generation_kwargs: beams that sample are not supported: choose num_beams or do_sample")
    return made


_LARGEST = sys.float_info.max  # neither infinity, nor NaN, nor a whole number beyond any float


def _number(name: str, value: Any) -> float:
    """The value as a float, 1.0 for none."""
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
        raise InputError(f"generation_kwargs: {name}={value!r} must be a number, e.g. {name}=0.7")
    return float(value)


def _whole(name: str, value: Any, least: int) -> int:
    sound = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST
    if not sound or value != int(value) or value < least:
        raise InputError(f"generation_kwargs: {name}={value!r} must be a whole number of at least {least}")
    return int(value)


# ----------------------------------------------------------------------------------------------------------- prompts


def read_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[Any]]:
    """Messages with each picture replaced by a bare {"type": "image"}, and the pictures in order.

    Raises InputError for video, audio, unknown parts, or content that is neither text nor a list of parts.
    """
    out, images = [], []
    for message in messages:
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if message.get("role") not in ("system", "user", "assistant") or not isinstance(parts, list | tuple):
            raise InputError(f"a chat message needs a role and a list of parts, not {message!r:.200}")
        kept = []
        for part in parts:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind == "image":
                images.append(part.get("url", part.get("image")))
                kept.append({"type": "image"})
            elif kind == "text" and isinstance(part.get("text"), str):
                kept.append({"type": "text", "text": part["text"]})
            else:
                raise InputError(f"a message holds {kind!r}: this model reads text and images only")
        out.append({"role": message["role"], "content": kept})
    return out, images


def write_prompt(messages: Sequence[Mapping[str, Any]], settings: Settings, processor: Any, family: str) -> str:
    """The full chat string of checked messages (`read_messages`) under the template of `settings`.

    family: the model_type; under "auto" LLaVA-1.5 gets the project's prompt. That one takes a single user turn.
    """
    template = settings.template
    if template == "auto":
        template = "dyrate" if family == "llava" else "processor"
    system = settings.system_prompt
    if template == "processor":
        messages = list(messages)
        if system is not None:
            messages = [m for m in messages if m["role"] != "system"]
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
        try:
            return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (ValueError, TypeError) as error:  # no template in the checkpoint
            raise InputError(f"template=processor: {error}; use template=dyrate") from error
    if system is None:
        system = next((_text(m) for m in messages if m["role"] == "system"), None)
    turns = [m for m in messages if m["role"] != "system"]
    if len(turns) != 1 or turns[0]["role"] != "user":
        raise InputError("template=dyrate takes one user turn; use template=processor for conversations")
    count = sum(part["type"] == "image" for part in turns[0]["content"])
    text = chat_prompt(_text(turns[0]), image=count)
    if system is None or system == SYSTEM_PROMPT:
        return text
    return (system.strip() + " " if system.strip() else "") + text.removeprefix(SYSTEM_PROMPT + " ")


def _text(message: Mapping[str, Any]) -> str:
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


# ------------------------------------------------------------------------------------------------------------ replies


@dataclass(frozen=True)
class Reply:
    """text: what the task scores (cut at its stop strings). record: as `evaluate.predict` makes it, id "task/split/number"."""

    text: str
    record: dict[str, Any]


def cut(text: str, until: Sequence[str]) -> str:
    """A reply up to the first of its stop strings."""
    ends = [at for at in (text.find(stop) for stop in until) if at >= 0]
    return text[: min(ends)].strip() if ends else text


class Answerer:
    """Answers questions with a model under a method.

    model, processor: as `load_vlm` gives them. Sampling draws by the seed and the question's number, so it holds for one
    batch size.
    """

    def __init__(self, model: Any, processor: Any, settings: Settings, method: Method) -> None:
        self.model, self.processor, self.settings, self.method = model, processor, settings, method
        self.adapter = Adapter(model)
        self.family = str(model.config.model_type)

    def batches(self, questions: Sequence[Question]) -> Iterator[list[int]]:
        """Positions of the questions that are answered together: one task, one decoding, in the order given."""
        groups: dict[Any, list[int]] = {}
        for position, question in enumerate(questions):
            groups.setdefault((question.key[:2], question.decoding), []).append(position)
        for (_, decoding), positions in groups.items():
            size = max(1, self.settings.batch_size // decoding.num_beams)
            yield from (positions[i : i + size] for i in range(0, len(positions), size))

    def answer(self, questions: Sequence[Question]) -> list[Reply]:
        """Replies to a batch: questions of one task and decoding.

        Raises InputError, naming task and document, for a question that cannot be read.
        """
        prompts, pictures = [], []
        for question in questions:
            try:
                messages, images = read_messages(question.messages)
                prompts.append(write_prompt(messages, self.settings, self.processor, self.family))
                pictures.append([load_image(image) for image in images] or None)
                self._check_placeholders(prompts[-1], len(images))
            except InputError as error:
                task, split, number = question.key
                raise InputError(f"{task}, split {split}, document {number}: {error}") from error
        device, decoding = next(self.model.parameters()).device, questions[0].decoding
        inputs = prepare_inputs(self.processor, pictures, prompts, device)
        room = self.adapter.max_length - inputs["input_ids"].shape[1]
        longest = decoding.max_new_tokens if decoding.limited else max(1, min(decoding.max_new_tokens, room))
        ids = ["/".join(map(str, question.key)) for question in questions]
        if decoding.num_beams > 1:
            records = self._beams(inputs, decoding, longest, ids)
        else:
            records = self._loop(inputs, decoding, longest, ids, questions[0].key[2])
        return [Reply(cut(record["text"], decoding.until), record) for record in records]

    def _check_placeholders(self, prompt: str, images: int) -> None:
        token = getattr(self.processor, "image_token", IMAGE_TOKEN)
        if prompt.count(token) != images:
            raise InputError(f"the prompt holds {prompt.count(token)} {token} for {images} pictures: {prompt[:200]!r}")

    def _loop(self, inputs: Any, decoding: Decoding, longest: int, ids: list[str], number: int) -> list[dict[str, Any]]:
        options: dict[str, Any] = {"engine": self.settings.engine}
        if decoding.do_sample:
            options |= {k: getattr(decoding, k) for k in ("do_sample", "temperature", "top_p", "top_k")}
            options["seed"] = self.settings.seed * 1_000_003 + number
        with torch.inference_mode():
            out = generate(self.model, inputs, self.method, longest, processor=self.processor, **options)
        return output_records(out, ids)

    def _beams(self, inputs: Any, decoding: Decoding, longest: int, ids: list[str]) -> list[dict[str, Any]]:
        return beam_records(self.model, self.processor, inputs, self.method, longest, {"num_beams": decoding.num_beams}, ids)


# ------------------------------------------------------------------------------------------------------------ records


def record_file(folder: str | Path, task: str, rank: int) -> Path:
    """Where a process writes the records of a task: FOLDER/TASK.RANK.jsonl."""
    return Path(folder).expanduser() / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', task)}.{rank}.jsonl"


class RecordWriter:
    """Appends records as lines of JSON, one file a task and process; a file of an earlier run is replaced.

    Raises ResourceError where the folder cannot be written.
    """

    def __init__(self, folder: str | Path, rank: int = 0) -> None:
        self.folder, self.rank = Path(folder).expanduser(), rank
        self._begun: set[str] = set()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResourceError(f"records={folder} is no folder that can be made: {error}") from error

    def write(self, task: str, records: Sequence[Mapping[str, Any]]) -> None:
        file = record_file(self.folder, task, self.rank)
        mode = "a" if task in self._begun else "w"
        self._begun.add(task)
        try:
            with file.open(mode, encoding="utf-8") as out:
                out.writelines(json.dumps(dict(record), sort_keys=True) + "\n" for record in records)
                out.flush()
                os.fsync(out.fileno())
        except OSError as error:
            raise ResourceError(f"the records of {task} could not be written to {file}: {error}") from error


def read_records(folder: str | Path, task: str) -> list[dict[str, Any]]:
    """The records of a task from all processes, sorted by document.

    Raises:
        ResourceError: there are none. InputError: a line that is no record, or a document twice, named.
    """
    first = record_file(folder, task, 0)
    files = sorted(first.parent.glob(first.name.removesuffix("0.jsonl") + "*.jsonl"))
    if not files:
        raise ResourceError(f"no records of {task} in {folder}")
    found: dict[int, dict[str, Any]] = {}
    for file in files:
        for line, text in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            try:
                record = json.loads(text)
                number = int(record["id"].rsplit("/", 1)[1])
            except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
                raise InputError(f"{file.name}, line {line} is not a record: {error}") from error
            if number in found:
                raise InputError(f"{file.name}, line {line}: document {number} of {task} occurs more than once")
            found[number] = record
    return [found[number] for number in sorted(found)]
