"""lmms-eval itself with the model dyrate: scenes, the ten benchmarks on local parquet, two processes; skipped without it."""

import functools
import io
import json
import os
import subprocess
import sys
import tomllib

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("lmms_eval", reason="lmms-eval (the extra [lmms]) is not installed")
pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402

from dyrate_lib import InputError, ResourceError, load_vlm, paths  # noqa: E402
from dyrate_lib.datasets import open_dataset  # noqa: E402
from dyrate_lib.evaluate import predict  # noqa: E402
from dyrate_lib.lmms.answering import read_records  # noqa: E402
from dyrate_lib.lmms.benchmarks import BENCHMARKS, LOCAL  # noqa: E402
from dyrate_lib.lmms.parquet import write_captions  # noqa: E402
from dyrate_lib.lmms.results import paper_tables, read_results  # noqa: E402
from dyrate_lib.lmms.settings import build_method, read_settings  # noqa: E402
from dyrate_lib.lmms.task_files import local_files, write_tasks  # noqa: E402

from .llava_folder import write_llava  # noqa: E402

N = 5


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """What the library `datasets` keeps of parquet files stays in this run's folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Some tasks write what could be submitted to a server into the current folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_llava(tmp_path_factory.mktemp("llava"))


@functools.cache
def jpeg(number):
    noise = np.random.default_rng(number).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    return {"bytes": buffer.getvalue(), "path": None}


def rows(task):
    """N documents in the columns of lmms-eval's own data sets."""
    options = {"A": "red", "B": "blue", "C": "green", "D": "nan"}
    make = {
        "gqa": lambda i: {"question": f"Is it {i}?", "answer": "yes", "imageId": str(i)},
        "vizwiz_vqa_val": lambda i: {"question": "what is it?", "answers": ["a cup"] * 10, "question_id": f"VizWiz_{i}"},
        "scienceqa_img": lambda i: {"question": "Which?", "choices": ["one", "two"], "hint": "So." * (i % 2), "answer": i % 2},
        "textvqa_val": lambda i: {"question": "what word?", "answers": ["stop"] * 10, "question_id": i, "ocr_tokens": ["stop"]},
        "pope": lambda i: {"question": "Is there a dog?", "answer": ("yes", "no")[i % 2], "question_id": str(i)},
        "mmbench_en_dev_static": lambda i: {"index": i, "question": "Which colour?", "hint": "nan", **options, "answer": "A",
                                            "category": "c", "L2-category": "l", "source": "s", "split": "dev"},
        "mme": lambda i: {"question": "Is it? Please answer yes or no.", "answer": "Yes", "category": "count",
                          "question_id": f"{i // 2}"},
        "nocaps_val": lambda i: {"image_id": i, "annotations_captions": ["A dog runs.", "One dog on grass."]},
        "flickr30k_test": lambda i: {"img_id": str(i), "caption": ["A dog runs.", "One dog on grass."]},
        "coco2017_cap_val": lambda i: {"question_id": f"{i:012d}.jpg", "id": i, "answer": ["A dog runs.", "One dog on grass."]},
    }[task]  # fmt: skip
    count = 6 if task == "mme" else N
    return [make(i) | {"image": jpeg(i)} for i in range(count)]


def write_parquet(file, table):
    """As `datasets` writes: the picture's column is told to be one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    import datasets

    found = datasets.Dataset.from_list(table)
    (found.cast_column("image", datasets.Image()) if "image" in table[0] else found).to_parquet(str(file))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The ten benchmarks as parquet, GQA with its pictures apart as published."""
    folder = tmp_path_factory.mktemp("data")
    for task, bench in BENCHMARKS.items():
        if task == "gqa":
            told = rows(task)
            write_parquet(
                folder / task / "testdev_balanced_instructions" / "testdev-0.parquet",
                [{k: v for k, v in row.items() if k != "image"} for row in told],
            )
            write_parquet(
                folder / task / "testdev_balanced_images" / "testdev-0.parquet",
                [{"id": row["imageId"], "image": row["image"]} for row in told],
            )
        else:
            write_parquet(folder / task / "data" / f"{bench.split}-00000-of-00001.parquet", rows(task))
    return folder


def evaluate(checkpoint, include, tasks, **args):
    """In this process, with only the tasks of `include` known (indexing lmms-eval's own takes a quarter of a minute)."""
    from lmms_eval import evaluator
    from lmms_eval.tasks import TaskManager

    from dyrate_lib.lmms.model import DyRateModel

    model = DyRateModel(pretrained=str(checkpoint), device="cpu", **args)
    manager = TaskManager("WARNING", include_path=str(include), include_defaults=False, model_name="dyrate")
    return evaluator.simple_evaluate(
        model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0, log_samples=True,
        gen_kwargs="max_new_tokens=6",
    )  # fmt: skip


@pytest.mark.parametrize(
    "args", [{}, {"method": "fastv", "layer": 2, "rate": 0.6}, {"method": "divprune", "ratio": 0.3}]
)
def test_scenes_equal_the_harness_token_for_token(checkpoint, tmp_path, args):
    write_tasks(tmp_path / "tasks", scenes_pictures=N)
    found = evaluate(
        checkpoint,
        tmp_path / "tasks",
        ["scenes_short", "scenes_questions"],
        batch_size=2,
        records=str(tmp_path / "r"),
        **args,
    )
    model, processor = load_vlm(str(checkpoint), device="cpu")
    for family in ("short", "questions"):
        data = open_dataset(f"scenes:{family}:test", N)
        expected = predict(
            model, processor, data, build_method(read_settings(**args)), max_new_tokens=6, batch_size=2, progress=False
        )
        records = read_records(tmp_path / "r", f"scenes_{family}")
        assert [r["tokens"] for r in records] == [r["tokens"] for r in expected]
        assert [r["flops"] for r in records] == [r["flops"] for r in expected]
        samples = sorted(found["samples"][f"scenes_{family}"], key=lambda s: s["doc_id"])
        assert [s["filtered_resps"][0] for s in samples] == [r["text"] for r in expected]
    assert set(found["results"]["scenes_short"]) >= {"CIDEr,none", "BLEU-4,none", "ROUGE-L,none"}
    assert found["results"]["scenes_questions"]["exact_match,none"] == 0.0


@pytest.mark.slow
def test_the_ten_benchmarks_on_local_parquet(checkpoint, data, tmp_path):
    names = write_tasks(tmp_path / "tasks", data, scenes_pictures=2)
    assert {task + LOCAL for task in BENCHMARKS} | {"dyrate_paper_local"} <= set(names)
    found = evaluate(
        checkpoint, tmp_path / "tasks", ["dyrate_paper_local"], batch_size=4, records=str(tmp_path / "r"), method="vtw"
    )
    for task, bench in BENCHMARKS.items():
        assert f"{bench.metric},none" in found["results"][task + LOCAL], task
        assert len(read_records(tmp_path / "r", task + LOCAL)) == len(rows(task))
        assert len(found["samples"][task + LOCAL]) == len(rows(task))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x_results.json").write_text(
        json.dumps(
            {"config": {"model": "dyrate", "model_args": "pretrained=a,method=vtw"}, "results": found["results"]},
            default=str,
        )
    )
    tables = paper_tables(read_results(tmp_path / "out"))
    assert tables["Table I"].iloc[-1].drop("n").notna().all() and tables["Table II"].iloc[-1].drop("n").notna().all()


def test_the_official_prompts_reach_the_model(data, tmp_path, checkpoint, monkeypatch):
    from dyrate_lib.lmms import answering

    asked = {}
    answer = answering.Answerer.answer

    def spy(self, questions):
        for q in questions:
            asked.setdefault(
                q.key[0].removesuffix(LOCAL),
                (q.messages[0]["content"][-1]["text"], q.decoding.max_new_tokens, q.messages),
            )
        return answer(self, questions)

    monkeypatch.setattr(answering.Answerer, "answer", spy)
    monkeypatch.setattr("lmms_eval.evaluator.simple_parse_args_string", lambda text: {})  # the tasks' own limits
    write_tasks(tmp_path / "tasks", data, scenes_pictures=2)
    tasks = ["gqa", "vizwiz_vqa_val", "scienceqa_img", "textvqa_val", "pope", "mme"]
    evaluate(checkpoint, tmp_path / "tasks", [t + LOCAL for t in tasks], max_new_tokens=7, method="vtw", layer=1)
    short = "\nAnswer the question using a single word or phrase."
    assert asked["gqa"][:2] == ("Is it 0?" + short, 16)
    assert asked["vizwiz_vqa_val"][:2] == (
        "What is it?\nWhen the provided information is insufficient, respond with 'Unanswerable'." + short, 7,
    )  # fmt: skip
    assert asked["scienceqa_img"][:2] == (
        "Which?\nA. one\nB. two\nAnswer with the option's letter from the given choices directly.",
        16,
    )
    assert asked["textvqa_val"][:2] == ("What word?" + short, 7)  # no OCR tokens
    assert asked["pope"][:2] == ("Is there a dog?" + short, 128) and asked["mme"][:2] == ("Is it?" + short, 16)
    assert all(message[0]["content"][0]["type"] == "image" for *_, message in asked.values())


def broken(table, change):
    change(table[1])
    return table


@pytest.mark.parametrize(
    "task, change, message",
    [
        ("pope", lambda r: r.pop("answer"), None),
        (
            "pope",
            lambda r: r.update(image={"bytes": None, "path": "x.jpg"}),
            r"test-0.parquet, row 1: the picture's bytes are not",
        ),
        ("pope", lambda r: r.update(image={"bytes": b"nonsense", "path": None}), r"row 1: .*not an image"),
        ("vizwiz_vqa_val", lambda r: r.update(answers=[]), r"row 1: 'answers' is empty"),
    ],
)
def test_broken_rows_are_named(tmp_path, task, change, message):
    table = broken(rows(task), change)
    split = BENCHMARKS[task].split
    (tmp_path / task).mkdir()
    pq.write_table(pa.Table.from_pylist(table), tmp_path / task / f"{split}-0.parquet")
    if message is None:
        local_files(tmp_path)  # a missing answer is the metric's to refuse
    else:
        with pytest.raises(InputError, match=message):
            local_files(tmp_path)


def test_broken_files_are_named(tmp_path):
    folder = tmp_path / "mme"
    folder.mkdir()
    with pytest.raises(ResourceError, match="mme/ holds no .parquet files"):
        local_files(tmp_path)
    (folder / "train-0.parquet").write_bytes(b"PAR1")
    with pytest.raises(ResourceError, match="no files of split test"):
        local_files(tmp_path)
    (folder / "test-0.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(InputError, match="test-0.parquet is not a sound parquet file"):
        local_files(tmp_path)
    pq.write_table(pa.Table.from_pylist([{"image": jpeg(0), "question": 3}]), folder / "test-0.parquet")
    with pytest.raises(InputError, match="'question' holds int64, not text"):
        local_files(tmp_path)
    pq.write_table(pa.Table.from_pylist([{"question": "x"}]), folder / "test-0.parquet")
    with pytest.raises(InputError, match="no column 'image', which mme needs"):
        local_files(tmp_path)
    folder.rename(tmp_path / "other")
    with pytest.raises(ResourceError, match="has a folder for none of gqa"):
        local_files(tmp_path)


def test_captions_become_parquet_that_the_task_reads(tmp_path, checkpoint):
    from .test_published import write_coco_folder

    spec = write_coco_folder(tmp_path / "coco")
    dataset = open_dataset(spec)
    file = write_captions(
        dataset, "coco2017_cap_val", tmp_path / "data" / "coco2017_cap_val" / "val.parquet", rows_a_group=2
    )
    assert pq.ParquetFile(file).num_row_groups == 2
    again = open_dataset(f"parquet:{file}")
    assert [i.references for i in again] == [i.references for i in dataset]
    for ours, theirs in zip(dataset, again, strict=True):
        assert np.array_equal(np.asarray(ours.image), np.asarray(theirs.image))
    write_tasks(tmp_path / "tasks", tmp_path / "data", scenes_pictures=2)
    evaluate(checkpoint, tmp_path / "tasks", ["coco2017_cap_val_local"], batch_size=2, records=str(tmp_path / "r"))
    model, processor = load_vlm(str(checkpoint), device="cpu")
    expected = predict(model, processor, dataset, max_new_tokens=6, batch_size=2, progress=False)
    assert [r["tokens"] for r in read_records(tmp_path / "r", "coco2017_cap_val_local")] == [
        r["tokens"] for r in expected
    ]


def launch(arguments, tmp_path, processes=1):
    command = ["-m", "dyrate_lib.lmms", "eval", *arguments]
    if processes > 1:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *command]
    env = {
        **os.environ, "PYTHONPATH": str(paths.root()), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=500, check=False
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_command_and_two_processes_give_the_same(checkpoint, tmp_path):
    """Each item once, the same replies, and the scores of all of them; five items do not divide by two."""
    replies = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        args = f"pretrained={checkpoint},method=fastv,layer=2,rate=0.5,records={out}/records"
        done = launch(
            ["--tasks", "scenes_short,scenes_questions", "--scenes_pictures", str(N), "--model_args", args, "--batch_size", "1",
             "--output_path", str(out), "--log_samples", "--gen_kwargs", "max_new_tokens=5"], tmp_path, processes,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert "scenes_questions" in done.stdout
        files = sorted((out / "records").iterdir())
        assert [f.name for f in files] == [
            f"scenes_{t}.{r}.jsonl" for t in ("questions", "short") for r in range(processes)
        ]
        records = read_records(out / "records", "scenes_short")
        samples = [
            json.loads(line) for f in out.rglob("*samples_scenes_short.jsonl") for line in f.read_text().splitlines()
        ]
        assert sorted(s["doc_id"] for s in samples) == list(range(N)) == [int(r["id"].rsplit("/")[-1]) for r in records]
        replies.append([(r["id"], r["tokens"], r["kept"]) for r in records])
    assert replies[0] == replies[1]


@pytest.mark.slow
def test_a_failure_is_told_by_the_exit_code(checkpoint, tmp_path):
    done = launch(
        ["--tasks", "scenes_short", "--model_args", f"pretrained={checkpoint},method=fastv,ratio=1"], tmp_path
    )
    assert done.returncode == 2 and "'ratio' is no setting of method fastv" in done.stderr


def test_bad_commands_are_refused(tmp_path, capsys):
    from dyrate_lib.lmms.__main__ import main

    for arguments, message in (
        (["--model", "x"], "--model is dyrate here"),
        (["--trust_remote_code"], "would run code"),
        (["--tasks", "gqa_local"], "gqa_local needs --data FOLDER"),
        (["--tasks", "pope,dyrate_paper_local"], "the group dyrate_paper_local needs --data FOLDER"),
        (["--tasks=vqa_local"], "there is no task vqa_local"),
        (["--data", str(tmp_path / "none")], "there is no folder"),
    ):
        assert main(["eval", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_the_entry_point_registers_the_model(tmp_path):
    """lmms-eval finds `dyrate` by what pyproject.toml says, and nothing else."""
    points = tomllib.loads((paths.root() / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]
    info = tmp_path / "dyrate-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dyrate\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[lmms_eval.models]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()))
    code = "from lmms_eval.models import get_model; print(get_model('dyrate').__module__)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(paths.root())])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.split()[-1:] == ["dyrate_lib.lmms.model"], done.stderr[-2000:]
