"""The class that lmms-eval sees as the model `dyrate`. Needs lmms-eval (the extra `lmms`)."""

from __future__ import annotations

import time
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger
from tqdm import tqdm

from ..errors import InputError
from ..loading import load_vlm
from .answering import Answerer, Question, RecordWriter, read_decoding
from .settings import build_method, read_settings


class DyRateModel(lmms):
    """A VLM under one of the library's pruning methods.

    Arguments are model_args as `settings.read_settings` takes them; batch_size and device come from lmms-eval's own options.
    Under `torchrun` or `accelerate launch` every process holds the whole model and answers its share of the documents.
    """

    is_simple = False

    def __init__(self, **args: Any) -> None:
        super().__init__()
        self.settings = read_settings(**args)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        asked = self.settings.device
        several = self._world_size > 1
        if several and asked and torch.device(asked).index is not None:
            raise InputError(f"device={asked} names one card for {self._world_size} processes: leave the number out")
        # one process a card: accelerate knows which; a single process takes what was asked for
        self._device = self.accelerator.device if several else torch.device(asked) if asked else None
        self.model, self.processor = load_vlm(self.settings.pretrained, device=self._device, dtype=self.settings.dtype)
        self._device = next(self.model.parameters()).device
        self.method = build_method(self.settings, self.model)
        self._answerer: Answerer | None = Answerer(self.model, self.processor, self.settings, self.method)
        self._records = RecordWriter(self.settings.records, self._rank) if self.settings.records else None

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self._device  # type: ignore[return-value]

    @property
    def batch_size(self) -> int:
        """Requests answered together."""
        return self.settings.batch_size

    def clean(self) -> None:
        """Give the model's memory back before replies are scored."""
        self._answerer = None
        super().clean()

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Replies in the order of `requests`, each (ctx, doc_to_messages, generation_kwargs, doc_id, task, split)."""
        results: list[GenerationResult | None] = [None] * len(requests)
        places = []
        for place, request in enumerate(requests):
            # what evens out the ranks' counts is scored by nobody
            if (request.metadata or {}).get("__padding_only__"):
                results[place] = GenerationResult("", TokenCounts(output_tokens=0))
            else:
                places.append(place)
        # the messages hold pictures: they are made batch by batch
        outline = [self._question(requests[place], pictures=False) for place in places]
        answerer, tokens, seconds, ratios = self._answerer, 0, 0.0, []
        if answerer is None:
            raise RuntimeError("the model was cleaned away: make a new one")
        with tqdm(total=len(places), desc="dyrate", unit="item", disable=self._rank != 0) as bar:
            for batch in answerer.batches(outline):
                start = time.perf_counter()
                replies = answerer.answer([self._question(requests[places[i]]) for i in batch])
                seconds += time.perf_counter() - start
                for i, reply in zip(batch, replies, strict=True):
                    count = len(reply.record["tokens"])
                    results[places[i]] = GenerationResult(
                        reply.text, TokenCounts(input_tokens=reply.record["prompt_length"], output_tokens=count)
                    )
                    tokens += count
                    ratios.append(reply.record["flops"]["paper"])
                if self._records is not None:
                    self._records.write(outline[batch[0]].key[0], [reply.record for reply in replies])
                bar.update(len(batch))
        if ratios:
            logger.info(f"{self.settings.label}: {sum(ratios) / len(ratios):.4f} of the FLOPs, rank {self._rank}")
            log_metrics(
                total_gen_tokens=tokens, total_elapsed_time=seconds, avg_speed=tokens / seconds if seconds else 0.0,
                additional_metrics={"rank": self._rank, "flops_ratio": sum(ratios) / len(ratios)},
            )  # fmt: skip
        return results  # type: ignore[return-value]

    def _question(self, request: Instance, pictures: bool = True) -> Question:
        _, to_messages, generation_kwargs, doc_id, task, split = request.args
        decoding = read_decoding(generation_kwargs, self.settings.max_new_tokens)
        messages = to_messages(self.task_dict[task][split][doc_id]) if pictures else ()
        return Question((task, split, int(doc_id)), messages, decoding)

    # what lmms-eval's interface has a model raise for a kind of request that it does not take
    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("dyrate generates replies; tasks that ask for likelihoods are not supported")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("dyrate answers one turn; tasks of several rounds are not supported")
