"""The ten benchmarks of the paper as lmms-eval knows them: task names, splits, the columns of their data, the figure reported."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InputError

GROUP, LOCAL_GROUP, SCENES_GROUP = "dyrate_paper", "dyrate_paper_local", "dyrate_scenes"
LOCAL = "_local"  # ends the name of a task's offline variant


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    task: lmms-eval's name. page: the task's file below lmms_eval/tasks. split: the one it evaluates. columns: those that its code
    reads, with the kind of value: text, texts, whole, image, any. table, column: of the paper. metric: lmms-eval's name of the
    figure reported there; factor: what it is multiplied by for the paper's scale. label: for tables. items: documents of the
    split as published (of Flickr30k Karpathy's test part; lmms-eval's own task reads the hub's data set, which holds all).
    """

    task: str
    page: str
    split: str
    columns: tuple[tuple[str, str], ...]
    table: int
    column: str
    metric: str
    factor: float
    label: str
    items: int


def _columns(**kinds: str) -> tuple[tuple[str, str], ...]:
    return tuple((name.replace("L2_category", "L2-category"), kind) for name, kind in kinds.items())


BENCHMARKS: dict[str, Benchmark] = {
    b.task: b
    for b in (
        Benchmark(
            "gqa", "gqa/gqa.yaml", "testdev", _columns(image="image", question="text", answer="text"),
            1, "gqa", "exact_match", 100.0, "GQA", 12_578,
        ),
        Benchmark(
            "vizwiz_vqa_val", "vizwiz_vqa/vizwiz_vqa_val.yaml", "val",
            _columns(image="image", question="text", answers="texts", question_id="any"),
            1, "vizwiz", "exact_match", 100.0, "VizWiz", 4_319,
        ),
        Benchmark(
            "scienceqa_img", "scienceqa/scienceqa_img.yaml", "test",
            _columns(image="image", question="text", choices="texts", hint="text", answer="whole"),
            1, "sqa", "exact_match", 100.0, "ScienceQA", 2_017,
        ),
        Benchmark(
            "textvqa_val", "textvqa/textvqa_val.yaml", "validation",
            _columns(image="image", question="text", answers="texts", question_id="any"),
            1, "vqa", "exact_match", 100.0, "TextVQA", 5_000,
        ),
        Benchmark(
            "pope", "pope/pope.yaml", "test",
            _columns(image="image", question="text", answer="text", question_id="any"),
            1, "pope", "pope_f1_score", 100.0, "POPE", 9_000,
        ),
        Benchmark(
            "mmbench_en_dev_static", "mmbench/mmbench_en_dev_static.yaml", "dev",
            _columns(
                image="image", index="whole", question="text", hint="text", A="text", B="text", C="text", D="text",
                answer="text", category="text", L2_category="text", source="text", split="text",
            ),
            1, "mmb", "gpt_eval_score", 1.0, "MMBench", 4_329,
        ),
        Benchmark(
            "mme", "mme/mme.yaml", "test",
            _columns(image="image", question="text", answer="text", category="text", question_id="any"),
            1, "mme", "mme_perception_score", 1.0, "MME", 2_374,
        ),
        Benchmark(
            "nocaps_val", "nocaps/nocaps_val.yaml", "validation",
            _columns(image="image", image_id="any", annotations_captions="texts"),
            2, "nocaps", "nocaps_CIDEr", 100.0, "NoCaps", 4_500,
        ),
        Benchmark(
            "flickr30k_test", "flickr30k/flickr30k_test.yaml", "test",
            _columns(image="image", img_id="any", caption="texts"),
            2, "flickr30k", "flickr_CIDEr", 100.0, "Flickr30k", 1_000,
        ),
        Benchmark(
            "coco2017_cap_val", "coco_cap/coco2017_cap_val.yaml", "val",
            _columns(image="image", question_id="text", id="any", answer="texts"),
            2, "coco2017", "coco_CIDEr", 100.0, "COCO2017", 5_000,
        ),
    )
}  # fmt: skip


def benchmark(name: str) -> Benchmark:
    """A benchmark by its task's name, that of the local variant too. InputError where there is none."""
    found = BENCHMARKS.get(name.removesuffix(LOCAL))
    if found is None:
        raise InputError(f"{name!r} is none of the paper's benchmarks: {', '.join(BENCHMARKS)}")
    return found
