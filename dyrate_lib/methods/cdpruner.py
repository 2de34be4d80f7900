"""CDPruner: image tokens that are diverse given the instruction, by a determinantal point process.

Source: Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs"
(arXiv 2506.10967), and the facts of its repository (Theia-4869/CDPruner at 9541616).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from ..encoder import conditional_kernel, cosine, greedy_dpp, unit_range
from ..errors import InputError
from .before import BeforeLLM, EncoderView, Reduction
from .divprune import check_ratio

# what benchmarks append to a question to fix the answer's form; released code leaves it out of the relevance
ANSWER_FORMATS = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
    "Please answer yes or no.",
)


@dataclass
class CDPruner(BeforeLLM):
    """Keep round(ratio N) image tokens by greedy MAP of the kernel r_i cos(f_i, f_j) r_j, in raster order.

    ratio: share kept (released settings: 64 [default], 128 and 192 of 576); tokens: a number instead.
    f: tokens after the projector, [N, D]; r: relevance to the instruction, stretched to (0, 1] per picture.
    text, image_projection: with a CLIP text tower, r is MINUS the mean cosine (the authors' sign) between the patches
        (feature layer, the tower's last norm, `image_projection`) and the segments of the text's embedding. text: a
        function from the question to [S, E] (`clip_text`), one tensor [S, E] for all pictures, or one for each picture
        of the batch (with beams or several sequences: of prompts with one picture each); image_projection: CLIP's visual
        projection, a weight [E, C] or a module. Without them, r is the cosine between f and the mean of the instruction's
        embeddings in the language model, not negated.
    The instruction is the text after the prompt's first picture. Pictures of several crops (LLaVA-NeXT): with CLIP a budget
    for each crop, as released; without it for the whole picture.
    """

    ratio: float = 64 / 576
    tokens: int | None = None
    text: Tensor | Sequence[Tensor] | Callable[[str], Tensor] | None = field(default=None, repr=False, compare=False)
    image_projection: Tensor | Callable[[Tensor], Tensor] | None = field(default=None, repr=False, compare=False)
    name: ClassVar[str] = "cdpruner"

    def __post_init__(self) -> None:
        check_ratio(self, self.ratio)
        tokens = self.tokens
        if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, Integral) or tokens < 1):
            raise InputError(f"CDPruner: tokens={self.tokens!r} must be a whole number of image tokens, at least 1, or None.")
        if (self.text is None) != (self.image_projection is None):
            raise InputError("CDPruner: text and image_projection belong together: give both of a CLIP model, or neither.")
        self.tower = self.text is not None  # the vision tower is read for CLIP's relevance only

    def check(self, adapter: Any, inputs: Mapping[str, Any] | None = None) -> None:
        super().check(adapter, inputs)
        if callable(self.text) and getattr(adapter.model, "dyrate_processor", None) is None:
            raise InputError(
                "CDPruner: no processor to read the question with: load the model by load_vlm(), or give `text` as tensors."
            )

    def kept_count(self, n_image: int) -> int:
        if self.tokens is not None and self.tokens > n_image:
            raise InputError(f"CDPruner: tokens={self.tokens} is more than the {n_image} of a picture: choose fewer.")
        return self.tokens if self.tokens is not None else max(round(self.ratio * n_image), 1)

    def relevance(self, view: EncoderView) -> Tensor:
        """How much each token has to do with the instruction, before stretching: [M, N] float32."""
        if self.text is None:
            # without a word of instruction the sum is zero, so is every cosine, and all tokens count alike
            means = torch.stack([words.float().sum(0) / max(len(words), 1) for words in view.instruction])
            return cosine(view.embeds, means[:, None])[..., 0]
        patches, projection = view.adapter.vision_norm(view.features), cast(Any, self.image_projection)
        patches = patches @ projection.to(patches).T if isinstance(projection, Tensor) else projection(patches)
        texts = [text.to(patches.device) for text in self._texts(view)]
        return torch.cat([-cosine(row[None], text[None]).mean(-1) for row, text in zip(patches, texts, strict=True)])

    def _texts(self, view: EncoderView) -> list[Tensor]:
        """[S, E] for each picture of the view."""
        n, model = view.embeds.shape[0], cast(Any, view.adapter.model)
        if isinstance(self.text, Tensor):
            return [self.text] * n
        if callable(self.text):
            tokenizer = model.dyrate_processor.tokenizer
            read = [tokenizer.decode(ids, skip_special_tokens=True) for ids in view.instruction_ids]
            known = {words: self.text(question(words)) for words in dict.fromkeys(read)}
            return [known[words] for words in read]
        texts = list(self.text or ())
        if not texts or view.n_pictures % len(texts):
            raise InputError(
                f"CDPruner: {len(texts)} text embeddings for {view.n_pictures} pictures: give one for each, or one for all."
            )
        repeats = view.n_pictures // len(texts)  # beams, several sequences
        return [texts[picture // repeats] for picture in view.picture]

    def reduce(self, view: EncoderView) -> Reduction:
        kernel = conditional_kernel(view.embeds, unit_range(self.relevance(view)))
        return Reduction.picked(view, greedy_dpp(kernel, self.kept_count(view.embeds.shape[1])))


def question(text: str) -> str:
    """A chat prompt's text after the picture without the assistant's turn and a benchmark's answer format."""
    text = text.removesuffix("</s>").strip().removesuffix("ASSISTANT:").strip()
    for suffix in ANSWER_FORMATS:
        text = text.removesuffix(suffix).strip()
    return text


def clip_text(model: Any, tokenizer: Any, length: int = 77) -> Callable[[str], Tensor]:
    """A function from a text to CLIP embeddings [S, E], for `CDPruner(text=...)`.

    model: a CLIPTextModelWithProjection; tokenizer: its own. A text of more than `length` tokens is padded to whole
    segments of that many, each embedded apart.
    """

    @torch.no_grad()
    def embed(text: str) -> Tensor:
        ids = list(tokenizer(text)["input_ids"])
        mask = [1] * len(ids)
        if len(ids) > length:
            fill = -len(ids) % length
            ids, mask = ids + [tokenizer.pad_token_id] * fill, mask + [0] * fill
        shape = (-1, min(len(ids), length))
        device = next(model.parameters()).device
        segments, mask_ = (torch.tensor(part, device=device).view(shape) for part in (ids, mask))
        return model(input_ids=segments, attention_mask=mask_).text_embeds

    return embed
