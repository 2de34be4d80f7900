"""The scenes' own tokenizer and the processor around it.

A byte-level BPE (as GPT-2's: any text at all can be encoded and decoded) whose merges are learned on everything the
scenes world can say, until each of its words is a single token. So a caption has exactly as many tokens as it has words
and punctuation marks, and what a word needs is what its token needs.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import chain

from ..prompts import IMAGE_TOKEN, SYSTEM_PROMPT, chat_prompt
from .captions import FAMILIES, N_REFERENCES, NUMBERS, PROMPTS, TEMPLATES, annotated_reference, spell
from .questions import questions
from .tasks import NAMES, examples
from .tasks import lines as task_lines
from .world import make_scene

BOS, EOS, PAD, UNK = "<s>", "</s>", "<pad>", "<unk>"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGE_SIZE, PATCH_SIZE = 336, 14
MAX_RESPONSE = 64  # tokens, the end-of-sequence token included


def corpus() -> list[str]:
    """Every word the scenes world can say, in running text: prompts, templates, captions, questions and tasks of scenes."""
    lines = [chat_prompt(p) for p in PROMPTS.values()]
    scenes = [make_scene(seed, split) for split in ("train", "novel") for seed in range(300)]
    for scene in scenes:
        lines += [" " + spell(annotated_reference(scene, f, i)) for f in FAMILIES for i in range(N_REFERENCES)]
        lines += list(chain.from_iterable((chat_prompt(q.prompt), f" {q.answer}") for q in questions(scene)))
    lines += [f" {n}" for n in NUMBERS] + [f" {n}" for n in range(10)] + [" yes no left right above below"]
    for name in NAMES:
        asked = chain.from_iterable(examples(name, scene, variant) for variant, scene in enumerate(scenes[::4]))
        lines += chain.from_iterable((chat_prompt(e.prompt), f" {e.answer}") for e in asked)
    lines += chain.from_iterable((chat_prompt(line), f" {line}") for line in task_lines())
    templates = chain.from_iterable(TEMPLATES.values())
    return lines + [" " + t.split("{")[0].strip() for t in templates] + [SYSTEM_PROMPT]


@lru_cache(maxsize=1)
def build_tokenizer():
    """Train the tokenizer (a second or two, deterministic): a ``PreTrainedTokenizerFast`` with left padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=1,
        special_tokens=[UNK, BOS, EOS, PAD, IMAGE_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos_id)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        additional_special_tokens=[IMAGE_TOKEN],
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    return fast


def build_processor():
    """A real ``LlavaProcessor``: the tokenizer above and CLIP's image processor at 336 px, patches of 14 px."""
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    image_processor = CLIPImageProcessorPil(
        do_resize=True,
        size={"shortest_edge": IMAGE_SIZE},
        do_center_crop=True,
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(CLIP_MEAN),
        image_std=list(CLIP_STD),
        do_convert_rgb=True,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(),
        patch_size=PATCH_SIZE,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    )
