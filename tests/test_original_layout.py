"""From original weights to tables: a tiny checkpoint in LLaVA-1.5's published layout, folders of COCO, Flickr30k and nocaps, and
every command of the README's page."""

import json
import os
import re
import shlex
import subprocess
import sys

import pandas as pd
import pytest
import torch

from dyrate_lib import (
    InputError,
    RatePredictor,
    ResourceError,
    chat_prompt,
    generate,
    load_vlm,
    model_info,
    paths,
    prepare_inputs,
)
from dyrate_lib.datasets import open_dataset
from dyrate_lib.experiments import open_study, training_runs
from dyrate_lib.experiments.context import data_specs
from dyrate_lib.lmms.settings import read_settings

from .llava_folder import IMAGE, PAD, VOCABULARY, write_llava
from .test_published import write_coco_folder, write_published


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_llava(tmp_path_factory.mktemp("llava"), size=84)


# -------------------------------------------------------------------------------------------------------- the layout


def test_the_checkpoint_is_laid_out_as_published(folder):
    """Names and tokens of llava-hf/llava-1.5-7b-hf; the sizes alone are others."""
    files = {p.name for p in folder.iterdir()}
    assert files >= {
        "config.json", "generation_config.json", "model.safetensors.index.json", "preprocessor_config.json",
        "processor_config.json", "tokenizer.json", "tokenizer_config.json", "added_tokens.json",
    }  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"] and config["image_token_index"] == IMAGE
    assert config["text_config"]["vocab_size"] == VOCABULARY and config["vision_feature_layer"] == -2
    assert config["vision_feature_select_strategy"] == "default" and config["projector_hidden_act"] == "gelu"
    assert not any(p.suffix in (".bin", ".pt", ".pkl") for p in folder.iterdir())


def test_it_loads_and_generates(folder, pictures):
    model, processor = load_vlm(str(folder), device="cpu")
    words = processor.tokenizer
    assert (model.config.image_token_id, words.pad_token_id, len(words)) == (IMAGE, PAD, PAD + 1)
    assert words.convert_tokens_to_ids("<image>") == IMAGE and words.bos_token_id == 1 and words.eos_token_id == 2
    inputs = prepare_inputs(
        processor, pictures[:2], [chat_prompt("What is it?"), chat_prompt("Tell me all about it, please.")]
    )
    assert (inputs["input_ids"] == IMAGE).sum(-1).tolist() == [36, 36] and inputs["input_ids"][:, -1].tolist() != [
        PAD,
        PAD,
    ]
    ours = generate(model, inputs, max_new_tokens=6)
    stock = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert torch.equal(ours.sequences[:, : stock.shape[1]], stock)
    assert model_info(model).vocab == VOCABULARY
    template = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}],
        add_generation_prompt=True,
    )
    assert template == "USER: <image>\nWhat is it? ASSISTANT:"  # the checkpoint's own: ours with no system prompt
    assert chat_prompt("What is it?").endswith(template)


def test_pickled_weights_and_code_are_refused(folder, tmp_path, capsys):
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_vlm(str(folder), device="cpu")[0]
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ResourceError, match="could not be loaded"):
        load_vlm(str(tmp_path), device="cpu")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "sly", "auto_map": {"AutoConfig": "sly.Config"}}))
    (tmp_path / "sly.py").write_text("raise SystemExit('foreign code ran')")
    with pytest.raises(InputError, match="without running foreign code"):
        load_vlm(str(tmp_path), device="cpu")
    assert "Do you wish" not in capsys.readouterr().out  # nobody is asked either


# ---------------------------------------------------------------------------------------------------------- the study


def test_several_published_sets_play_their_roles(tmp_path):
    parts = [
        write_coco_folder(tmp_path / "coco", ("train2017", "val2017")),
        write_published("flickr30k", tmp_path / "f"),
        write_published("nocaps", tmp_path / "n"),
    ]
    assert data_specs(",".join(parts)) == {"coco": parts[0], "nocaps": parts[2], "flickr30k": parts[1]}
    study = open_study(
        "03_benchmarks",
        scale="smoke",
        records="fresh",
        out=str(tmp_path / "out"),
        data=", ".join(parts),
        progress=False,
    )
    assert study.roles == ("coco", "nocaps", "flickr30k") and not study.on_scenes
    assert [study.dataset(role).name for role in study.roles] == ["coco", "nocaps", "flickr30k:test"]
    assert study.dataset("late").name == "coco"  # a role that none was named for
    train = training_runs.training_set(study)
    assert train.spec.endswith("#train2017") and {i.id for i in train}.isdisjoint(i.id for i in open_dataset(parts[0]))


def test_a_coco_folder_without_a_train_part_is_divided(tmp_path):
    study = open_study(
        "03_benchmarks", scale="smoke", records="fresh", out=str(tmp_path / "out"),
        data=write_coco_folder(tmp_path / "coco", n=8), progress=False,
    )  # fmt: skip
    used = {study.dataset("coco")[i].id for i in range(len(study.dataset("coco")))}
    train = training_runs.training_set(study)
    assert train.name == "coco:train" and used.isdisjoint(item.id for item in train) and len(train) == 5


@pytest.mark.parametrize(
    "data, message",
    [
        ("nocaps:/x", "name coco:/folder or parquet:/folder too"),
        ("coco:/x,coco:/y", "two sets for the role of coco"),
        ("coco:/x,parquet:/y", "two sets for the role of coco"),
        ("coco:", "is unknown"),
        ("imagenet:/x", "is unknown: choose scenes, or coco:/folder"),
    ],
)
def test_sets_that_fit_no_role(data, message):
    with pytest.raises(InputError, match=message):
        data_specs(data)
    assert data_specs("coco:/a folder, with a comma") == {"coco": "coco:/a folder, with a comma"}


# ----------------------------------------------------------------------------------------------------- the README's page


PAGE = paths.root() / "README.md"


def commands():
    """The commands of the README's page on original weights, in order, continued lines joined."""
    text = PAGE.read_text(encoding="utf-8")
    found = re.search(r"<!-- original weights -->(.*?)<!-- /original weights -->", text, re.S)
    assert found, "README.md has no page between <!-- original weights --> and <!-- /original weights -->"
    lines = "\n".join(line[4:] for line in found[1].splitlines() if line.startswith("    ")).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in lines.splitlines() if shlex.split(line, comments=True)]


def substituted(words, places):
    """A command with this machine's places in the stead of the page's, one process a GPU with one on the CPU."""
    out = []
    for word in words:
        for theirs, here in places.items():
            word = word.replace(theirs, here)
        out.append(word)
    return out


def runnable(words):
    """`make reproduce A=..` as the command that it is, at smoke scale and up to the predictors; torchrun with two processes."""
    python = [sys.executable, "-m"]
    if words[:2] == ["make", "reproduce"]:
        options = dict(word.split("=", 1) for word in words[2:])
        # the notebooks after this one are the study's own tests' matter and would take ten minutes here
        made = [*python, "dyrate_lib", "reproduce", "--scale", "smoke", "--only", "02_training"]
        return made + [
            w for key in ("MODEL", "DATA", "OUT") if key in options for w in (f"--{key.lower()}", options[key])
        ]
    if words[0] == "torchrun":
        rest = words[words.index("-m") + 1 :]
        return [*python, "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", *rest]
    assert words[:2] == ["python", "-m"], words
    return [*python, *words[2:]]


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_every_command_of_the_page_runs(tmp_path_factory):
    pytest.importorskip("lmms_eval", reason="lmms-eval (the extra [lmms]) is not installed")
    work = tmp_path_factory.mktemp("page")
    model = write_llava(work / "llava-1.5-7b-hf", size=84)
    write_coco_folder(work / "coco", ("train2017", "val2017"), n=6)
    write_published("flickr30k", work / "flickr30k")
    write_published("nocaps", work / "nocaps")
    places = {
        "llava-hf/llava-1.5-7b-hf": str(model), "/data/": f"{work}/", "build/": f"{work}/build/",
        "results": str(work / "results"),
    }  # fmt: skip
    env = {
        **os.environ, "PYTHONPATH": str(paths.root()), "DYRATE_HOME": str(paths.root()), "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "LMMS_EVAL_DATASETS_CACHE": str(work / "cache"),
    }  # fmt: skip
    ran, said = [], {}
    for words in commands():
        if words[:2] in (["make", "lmms"], ["make", "env"]):
            continue  # downloads
        command = runnable(substituted(words, places))
        if "reproduce" in command and "--out" not in command:
            command += ["--out", str(work / "build")]
        if "eval" in command:
            if any("dyrate_paper" in w and not w.endswith("_local") for w in command):
                # the hub's data sets are not here: the same tasks from local files
                command = [w.replace("dyrate_paper", "dyrate_paper_local") for w in command]
                command += ["--data", f"{work}/parquet"]
            command += ["--gen_kwargs", "max_new_tokens=4"]
        if command[2:4] == ["dyrate_lib", "run"]:
            command += ["-p", "out", str(work / "shown"), "--out", str(work / "shown")]
        done = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True, timeout=500, check=False)
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
        ran.append(" ".join(words))
        said[words[-2]] = done.stdout
    assert (
        any("reproduce" in r for r in ran)
        and any("method=dyrate" in r for r in ran)
        and any("tables" in r for r in ran)
    )
    assert "Table II" in said["tables"] and "dyrate" in said["tables"]
    shown = pd.read_csv(work / "shown" / "tables" / "tab2_lmms.csv")  # notebook 03's, with what lmms-eval gave here
    ours = shown[shown["source"] == "here"]
    assert len(ours) == 3 and ours[["nocaps", "flickr30k", "coco2017"]].notna().all(axis=None)
    assert RatePredictor.load(work / "build" / "predictors" / "llava-1.5-7b-hf_t0.333_s0.safetensors").layer == 2


def test_the_page_names_what_exists():
    """Options of the page's commands are known; runs without lmms-eval."""
    found = commands()
    assert any(words[:2] == ["make", "reproduce"] for words in found)
    for words in found:
        if "--model_args" in words:
            args = dict(part.split("=", 1) for part in words[words.index("--model_args") + 1].split(","))
            args.pop("predictor", None)
            if args.get("method") == "dyrate":
                args["predictor"] = "x"
            read_settings(**args)
