"""The model card of a scenes VLM, from its numbers alone."""

from __future__ import annotations

from .captions import FAMILIES
from .data import SCENES_PER_SEED
from .mixes import Mix
from .packing import KINDS, layout
from .vlm import SIZES
from .world import HELD_OUT


def card(metrics: dict) -> str:
    """The model card as Markdown."""
    recipe, made, last = metrics["recipe"], metrics["provenance"], metrics["last"]
    size = SIZES[recipe["size"]]
    start, tasks = recipe.get("start"), layout(tuple(recipe["slots"])).tasks
    carries = _rows(tasks, recipe.get("mix"))
    lines = [
        "---",
        "license: mit",
        "library_name: transformers",
        "pipeline_tag: image-text-to-text",
        "---",
        f"# {size.name}",
        "",
        "A small LLaVA (`LlavaForConditionalGeneration`) trained from scratch on rendered scenes whose truth is known.",
        "It stands in for LLaVA-1.5 where no pretrained weights can be had. It knows nothing but this world: results",
        "with it are results on scenes.",
        "",
        "## Model",
        f"Vision tower (CLIP): {size.vision_layers} layers x {size.vision_width}, 336 px, patch 14, 576 image tokens, "
        "features of the last layer but one; the CLS token is trained through the last layer by a bag-of-words loss"
        f"{_reading(recipe)}.",
        f"Language model (LLaMA): {size.layers} layers x {size.width}, MLP {size.mlp}, heads 32 wide. "
        f"{metrics['parameters'] / 1e6:.2f} M parameters, stored as bfloat16 safetensors.",
        "",
        "## Training",
        f"{_begun(recipe)}{recipe['steps']} steps of {recipe['batch']} fresh pictures (split `train`, scene seeds from "
        f"{recipe['seed'] * SCENES_PER_SEED + (start['pictures'] if start else 0)} on, each seen once), {carries}; "
        f"AdamW, learning rate {recipe['lr']:g} (warm-up {recipe['warmup']}, cosine to "
        f"{recipe['final_lr']:g}), weight decay {recipe['weight_decay']}, clip {recipe['clip']}, seed {recipe['seed']}. "
        f"{metrics['train_seconds']:.0f} s at about {metrics['ms_per_step']:.0f} ms a step"
        f"{', compiled' if metrics['compiled'] else ''}; {made['device']}, torch {made['torch']}, "
        f"transformers {made['transformers']}, Python {made['python']}, {made['date']}. "
        "The curve is in `log.jsonl`.",
        "",
        f"{len(HELD_OUT)} (shape, colour) pairs never occur in training; every picture of split `novel` holds one.",
        "",
        "Losses over the last steps (cross-entropy, nats a token): "
        + ", ".join(f"{k} {last[k]:.4f}" for k in KINDS if k in last)
        + f"; CLS {last['cls']:.4f}{_texts(recipe, last)}.",
    ]
    if "val" in last:
        names = {"answer": "answers", "need_image": "tokens that need the image",
                 "need_response": "tokens that need the response", "need_none": "tokens that need neither"}  # fmt: skip
        lines += ["", "Right next tokens on held-out `val` pictures (teacher forcing): "]
        lines[-1] += ", ".join(f"{names.get(k, k)} {100 * v:.2f}%" for k, v in last["val"].items()) + "."
        lines[-1] += " The first words of a caption choose one of five wordings at random and cannot be foreseen."
    if metrics.get("scores"):
        lines += ["", "## Scores on held-out pictures (greedy, 95% bootstrap intervals)", ""]
        lines += ["| set | what | score | interval | n |", "|---|---|---|---|---|"]
        for label, s in metrics["scores"].items():
            what = "equals a reference" if label.split(":")[0] in FAMILIES else "right answer"
            interval = f"{100 * s['low']:.1f}-{100 * s['high']:.1f}"
            lines.append(f"| {label} | {what} | {100 * s['mean']:.1f}% | {interval} | {s['n']} |")
    if metrics.get("cider"):
        lines += [
            "",
            "CIDEr of the same captions. *One reference* against the other four, left out in turn. A caption is scored",
            "against a twin of itself, the reference whose wording it follows, which a left-out reference is not; the last",
            "columns score the caption and that twin alike, against the other wordings alone.",
            "",
            "| set | CIDEr | interval | one reference | caption, other wordings | twin, other wordings | ratio |",
            "|---|---|---|---|---|---|---|",
        ]
        for label, s in metrics["cider"].items():
            interval = f"{s['low']:.1f}-{s['high']:.1f}"
            others, twin = s["other_wordings"], s["followed"]
            numbers = [f"{s['cider']:.1f}", interval, *(f"{v:.1f}" for v in (s["one_reference"], others, twin))]
            lines.append(f"| {label} | {' | '.join(numbers)} | {100 * others / twin:.0f}% |")
    return "\n".join([*lines, *_task_scores(metrics.get("tasks") or {}), *_use_and_limits(size.name, metrics, tasks)]) + "\n"


def _reading(recipe: dict) -> str:
    if not recipe.get("text_weight"):
        return ""
    return ", and the patches of signs by the word and the letter under them, read off those features"


def _texts(recipe: dict, last: dict) -> str:
    return f"; word and letter of a sign's patches {last['texts']:.4f}" if recipe.get("text_weight") else ""


def _begun(recipe: dict) -> str:
    """What the weights come from, where they were trained before."""
    start = recipe.get("start")
    if not start:
        return ""
    parts = [
        f"{leg['steps']} steps, {leg['pictures']} pictures{_from_scene(leg)}, "
        f"sha256 `{leg['sha256'][:16]}`"
        for leg in start.get("legs", ())
    ]
    chain = f" That checkpoint was itself trained further, so these legs came before: {'; '.join(parts)}." if parts else ""
    return (
        f"Trained further from the checkpoint `{start['name']}` ({start['steps']} steps, {start['pictures']} pictures; "
        f"weights sha256 `{start['sha256'][:16]}`), the optimiser started afresh and rows of the vocabulary taken over token "
        f"by token; {start['steps'] + recipe['steps']} steps in all.{chain} Now "
    )


def _from_scene(leg: dict) -> str:
    return f" from scene {leg['first']} on" if "first" in leg else ""


def _rows(tasks: bool, mix: dict | None) -> str:
    """What a picture carries in training. mix: the recipe's, None: of a recipe older than mixes."""
    if not tasks:
        return "every picture with a caption of each family and up to four questions"
    m = Mix(**(mix or {}))
    names = {*m.long, *m.brief}
    extra = [
        *(["relation questions of all tasks"] if "relation" in names else []),
        *(["the same without options or with the right one told"] if "told" in names else []),
    ]
    prompts = "up to five prompts" if mix is None else "prompts"
    captions = "a caption of each family" if m.captions >= 1 else f"a caption of each family {100 * m.captions:.0f}% of the time"
    return (
        f"{100 * (1 - m.bad - m.signed):.0f}% of them plain, with {captions} and {prompts} of GQA, ScienceQA, "
        f"POPE, MMBench, MME or questions{''.join(f', {e}' for e in extra)}; {100 * m.signed:.0f}% with signs, with prompts of "
        "TextVQA (with and without the words "
        f"given) and, where no sign covers an object, the others; {100 * m.bad:.0f}% bad photographs, with VizWiz prompts alone"
    )


def _task_scores(tasks: dict) -> list[str]:
    """The table of short-answer tasks."""
    if not tasks:
        return []
    lines = ["", "## Short-answer tasks on held-out pictures (split `test`, greedy, 95% bootstrap intervals over pictures)", ""]
    lines += ["| task | metric | score | interval | pictures |", "|---|---|---|---|---|"]
    for name, s in tasks.items():
        lines.append(f"| {name} | {s['metric']} | {s['score']:.1f} | {s['low']:.1f}-{s['high']:.1f} | {s['n']} |")
    return lines


def _use_and_limits(name: str, metrics: dict, tasks: bool) -> list[str]:
    """How to use a model, what for, and what not for."""
    relation = (metrics.get("scores") or {}).get("relation:test")
    asked = "question\nforms and tasks" if tasks else "question\nforms"
    text = "no text but the words of a closed list on signs" if tasks else "no text"
    chance = " Relation questions are at chance." if relation and relation["low"] <= 0.5 <= relation["high"] else ""
    return [
        "",
        "## Use",
        "",
        "```python",
        "from dyrate_lib import chat_prompt, generate, load_vlm, prepare_inputs, scenes",
        "",
        f'model, processor = load_vlm("{name}")',
        'prompt = chat_prompt("Provide a one-sentence caption for the provided image.")',
        'inputs = prepare_inputs(processor, [scenes.render(scenes.make_scene(7, "test"))], [prompt])',
        "print(generate(model, inputs, processor=processor).text[0])",
        "```",
        "",
        "The folder is in transformers' own format: `LlavaForConditionalGeneration.from_pretrained` and",
        "`AutoProcessor.from_pretrained` read it too. Weights are safetensors; nothing in it is code.",
        "",
        "## Intended use and limits",
        "",
        f"For studying token reduction on pictures of the scenes world, with the three caption prompts and the {asked} it was "
        "trained on. Not for photographs, other prompts, other languages, or any decision about people: it",
        "knows about as many words as its captions and questions need and will describe anything as shapes on a ground.",
        f"Counts and unseen pairs are its weak points.{chance} Its attention and its tolerance of dropped tokens are",
        "those of a small model trained on one picture size and one layout, and need not be a large model's.",
        "",
        f"The data are described in the data sheet, `data/DATASHEET.md`. They hold no people and {text}, so there is no",
        "bias against anyone in them; what they favour is large, clear-cut things.",
        "",
        "Licence: MIT. Citation: `CITATION.cff` of this project.",
    ]
