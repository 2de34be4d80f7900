"""What the lmms-eval adapter does before lmms-eval: model_args, prompts, batches, stop strings, records, task files, results."""

import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dyrate_lib import DyRate, InputError, RatePredictor, ResourceError, chat_prompt
from dyrate_lib.datasets import open_dataset
from dyrate_lib.evaluate import predict
from dyrate_lib.lmms import task_files
from dyrate_lib.lmms.answering import (
    Answerer,
    Question,
    RecordWriter,
    cut,
    read_decoding,
    read_messages,
    read_records,
    write_prompt,
)
from dyrate_lib.lmms.benchmarks import BENCHMARKS
from dyrate_lib.lmms.results import paper_tables, read_results, split_args
from dyrate_lib.lmms.settings import build_method, method_classes, method_options, read_settings
from dyrate_lib.loading import load_vlm

from .llava_folder import write_llava

# ----------------------------------------------------------------------------------------------------------- settings


def test_settings_of_a_method_reach_its_fields():
    made = read_settings(pretrained="x", method="fastv", layer=3, rate="0.25", batch_size="4", device="cpu")
    assert (made.pretrained, made.batch_size, made.device) == ("x", 4, "cpu")
    method = build_method(made)
    assert (method.name, method.layer, method.rate) == ("fastv", 3, 0.25) and made.label == "fastv(layer=3, rate=0.25)"


@pytest.mark.parametrize("name", sorted(method_classes()))
def test_every_method_is_built_with_its_defaults(name, tmp_path):
    takes = method_options(name)
    args = {key: json.dumps(value) if isinstance(value, list | dict) else value for key, value in takes.items()}
    if "predictor" in {f for f in vars(method_classes()[name]).get("__dataclass_fields__", {})}:
        args["predictor"] = str(RatePredictor(4, 10, 3).save(tmp_path / "p.safetensors"))
    method = build_method(read_settings(method=name, **args))
    assert method.name == name
    assert all(getattr(method, key) == value for key, value in takes.items() if value is not None)


def test_values_with_brackets():
    staged = build_method(read_settings(method="pyramiddrop", layers="[1, 3]", ratios="[0.5, 0.25]"))
    assert (staged.layers, staged.ratios) == ((1, 3), (0.5, 0.25))
    assert build_method(read_settings(method="depth", rates='{"2": 0.2, "5": 0.6}')).rates == {2: 0.2, 5: 0.6}
    assert build_method(read_settings(method="vtw", layer="none")).layer is None


def test_a_budget_is_searched(tiny):
    method = build_method(read_settings(method="fastv", flops=0.8), tiny[0])
    assert method.layer == 2 and 0 < method.rate < 1 and method.rate != 0.5
    with pytest.raises(InputError, match="below what it can reach"):
        build_method(read_settings(method="fastv", flops=0.01), tiny[0])


def test_dyrate_needs_a_predictor(tmp_path):
    with pytest.raises(ResourceError, match="no predictor for elsewhere"):
        read_settings(pretrained="elsewhere", method="dyrate")
    file = RatePredictor(4, 10, 3).save(tmp_path / "p.safetensors")
    assert isinstance(build_method(read_settings(pretrained="x", method="dyrate", predictor=str(file))), DyRate)
    with pytest.raises(ResourceError, match="No predictor at"):
        build_method(read_settings(pretrained="x", method="dyrate", predictor=str(tmp_path / "none")))


@pytest.mark.parametrize(
    "args, message",
    [
        ({"method": "fastvv"}, "none of .*fastv"),
        ({"method": "fastv", "ratio": 0.5}, "'ratio' is no setting of method fastv, which takes layer, rate"),
        ({"method": "none", "layer": 2}, "'layer' is no setting of method none"),
        ({"method": "fastv", "rate": 2}, "rate=2"),
        ({"method": "fastv", "rate": "half"}, "rate='half'"),
        ({"method": "sparsevlm", "noise": "x"}, "'noise' is no setting"),
        ({"method": "pyramiddrop", "layers": "[1, 2"}, "is not JSON"),
        ({"method": "fastv", "flops": 1.5}, "flops=1.5"),
        ({"method": "none", "flops": 0.5}, "flops does not go with method none"),
        ({"method": "dyrate", "flops": 0.5, "predictor": "x"}, "budget is set in training"),
        ({"method": "fastv", "predictor": "x"}, "predictor goes with dyrate"),
        ({"method": "fastv", "clip": "x"}, "clip goes with cdpruner"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": "auto"}, "batch_size='auto'"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"template": "vicuna"}, "template='vicuna' is none of"),
        ({"engine": "fast"}, "engine='fast' is none of"),
        ({"pretrained": ""}, "pretrained is empty"),
    ],
)
def test_bad_settings_are_named(args, message):
    with pytest.raises(InputError, match=message):
        read_settings(**args)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["method", "layer", "rate", "layers", "flops", "seed", "batch_size", "template", "x", "counts"]),
        st.integers(-3, 9) | st.floats() | st.booleans() | st.text(max_size=8) | st.sampled_from(sorted(method_classes())),
    )
)
def test_any_arguments_give_settings_or_our_error(args):
    try:
        build_method(read_settings(**args))
    except (InputError, ResourceError) as error:
        assert str(error)


# ------------------------------------------------------------------------------------------------ decoding and prompts


def test_generation_kwargs():
    greedy = read_decoding({"until": ["\n\n"], "temperature": 0, "do_sample": True, "top_p": 0.5}, 77)
    assert (greedy.do_sample, greedy.top_p, greedy.max_new_tokens, greedy.limited) == (False, 1.0, 77, False)
    assert greedy.until == ("\n\n",) and read_decoding({"until": "stop"}, 1).until == ("stop",)
    drawn = read_decoding({"do_sample": True, "temperature": 0.7, "top_k": 5, "max_new_tokens": 16.0}, 1)
    assert (drawn.do_sample, drawn.temperature, drawn.top_k, drawn.max_new_tokens, drawn.limited) == (
        True,
        0.7,
        5,
        16,
        True,
    )
    assert read_decoding(None, 3).max_new_tokens == 3
    with pytest.warns(UserWarning, match="without a meaning here: penalty"):
        read_decoding({"penalty": 1}, 3)
    for wrong in ({"max_new_tokens": 0}, {"max_new_tokens": 1.5}, {"num_beams": 0}, {"until": [3]}):
        with pytest.raises(InputError, match="generation_kwargs"):
            read_decoding(wrong, 3)
    with pytest.raises(InputError, match="beams that sample"):
        read_decoding({"num_beams": 2, "do_sample": True}, 3)


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": "hot"}, {"temperature": "hot", "do_sample": True}, {"temperature": "0.7", "do_sample": True},
        {"temperature": True}, {"temperature": [0.7]}, {"temperature": float("nan")}, {"temperature": -1.0, "do_sample": True},
        {"top_p": "most"}, {"top_p": 0.0, "do_sample": True}, {"top_p": 1.5, "do_sample": True},
        {"max_new_tokens": float("inf")}, {"max_new_tokens": "16"}, {"top_k": float("nan"), "do_sample": True},
    ],
)  # fmt: skip
def test_settings_of_sampling_that_are_no_numbers_or_out_of_range(given):
    with pytest.raises(InputError, match=f"generation_kwargs: .*{next(iter(given))}="):
        read_decoding(given, 5)


@given(
    st.dictionaries(
        st.sampled_from(["temperature", "top_p", "top_k", "max_new_tokens", "num_beams", "do_sample"]),
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.lists(st.integers(), max_size=2)),
    )
)
def test_any_settings_give_a_decoding_or_our_error(given):
    try:
        made = read_decoding(given, 5)
    except InputError:
        return
    assert made.max_new_tokens >= 1 and made.num_beams >= 1 and made.temperature > 0 and 0 < made.top_p <= 1
    assert made.do_sample == bool(given.get("do_sample") and given.get("temperature") != 0)


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_a_reply_ends_at_its_first_stop_string(text, until):
    found = cut(text, until)
    if any(stop in text for stop in until):
        assert text.find(found) >= 0 and not any(stop in found for stop in until if stop.strip() == stop)
        assert len(found) <= min(text.find(stop) for stop in until if stop in text)
    else:
        assert found == text


def user(text, *pictures):
    return [
        {"role": "user", "content": [*({"type": "image", "url": p} for p in pictures), {"type": "text", "text": text}]}
    ]


class FakeProcessor:
    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        return "|".join(f"{m['role']}:{[p.get('text', p['type']) for p in m['content']]}" for m in messages)


def test_prompts_by_template():
    picture = Image.new("RGB", (4, 4))
    messages, images = read_messages(user("What?", picture))
    assert images == [picture]
    ours, theirs = read_settings(), read_settings(template="processor", system_prompt="Be brief.")
    assert write_prompt(messages, ours, None, "llava") == chat_prompt("What?")
    assert write_prompt(messages, ours, FakeProcessor(), "qwen2_5_vl") == "user:['image', 'What?']"
    assert write_prompt(messages, theirs, FakeProcessor(), "llava") == "system:['Be brief.']|user:['image', 'What?']"
    vicuna = write_prompt(
        messages, read_settings(system_prompt="A chat between a curious user and a machine."), None, "llava"
    )
    assert vicuna == "A chat between a curious user and a machine. USER: <image>\nWhat? ASSISTANT:"
    assert write_prompt(messages, read_settings(system_prompt=""), None, "llava").startswith("USER: <image>")
    assert "<image>" not in write_prompt(read_messages(user("What?"))[0], ours, None, "llava")
    two = read_messages([*user("What?", picture), {"role": "assistant", "content": "This."}])[0]
    with pytest.raises(InputError, match="one user turn"):
        write_prompt(two, ours, None, "llava")


@pytest.mark.parametrize(
    "messages", [[{"role": "user", "content": [{"type": "video", "url": "x"}]}], [{"role": "boss", "content": "x"}],
                 [{"role": "user"}], [{"role": "user", "content": ["x"]}], [{"role": "user", "content": [{"type": "text"}]}]]
)  # fmt: skip
def test_messages_that_cannot_be_read(messages):
    with pytest.raises(InputError, match="message"):
        read_messages(messages)


# ------------------------------------------------------------------------------------------------------------ replies


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny checkpoint in the published layout, as load_vlm reads it."""
    return load_vlm(str(write_llava(tmp_path_factory.mktemp("llava"))), device="cpu")


def ask(dataset, limit=6, task="t"):
    decoding = read_decoding({"max_new_tokens": limit, "until": []}, 9)
    return [Question((task, "test", i), user(item.prompt, item.image), decoding) for i, item in enumerate(dataset)]


@pytest.mark.parametrize("args", [{}, {"method": "fastv", "rate": 0.7}, {"method": "visionzip", "dominant": 8, "contextual": 2},
                                  {"method": "dyrate"}, {"method": "st3", "first": 1, "every": 1}])  # fmt: skip
def test_replies_equal_those_of_the_harness(saved, tmp_path, args):
    model, processor = saved
    if args.get("method") == "dyrate":
        predictor = RatePredictor(4, 10, 2)
        predictor.linear.weight.data.normal_(0, 5)
        args = {**args, "predictor": str(predictor.save(tmp_path / "p.safetensors"))}
    settings_ = read_settings(batch_size=3, **args)
    method = build_method(settings_, model)
    data = open_dataset("scenes:short:test", 5)
    answerer = Answerer(model, processor, settings_, method)
    questions = ask(data)
    found = [
        reply.record
        for batch in answerer.batches(questions)
        for reply in answerer.answer([questions[i] for i in batch])
    ]
    expected = predict(model, processor, data, method, max_new_tokens=6, batch_size=3, progress=False)
    assert [r["tokens"] for r in found] == [r["tokens"] for r in expected]
    assert [r["kept"] for r in found] == [r["kept"] for r in expected]
    assert [r["flops"] for r in found] == [r["flops"] for r in expected]
    assert found[4]["id"] == "t/test/4" and len({tuple(r["tokens"]) for r in found}) > 1


def test_batches_keep_tasks_and_decodings_apart(saved):
    model, processor = saved
    answerer = Answerer(model, processor, read_settings(batch_size=4), build_method(read_settings()))
    kinds = [("a", 5), ("b", 5), ("a", 5), ("a", 6), ("a", 5), ("b", 5)]
    questions = [
        Question((t, "test", i), (), read_decoding({"max_new_tokens": n}, 9)) for i, (t, n) in enumerate(kinds)
    ]
    assert list(answerer.batches(questions)) == [[0, 2, 4], [1, 5], [3]]
    beams = [Question(("a", "test", i), (), read_decoding({"num_beams": 3}, 9)) for i in range(3)]
    assert list(answerer.batches(beams)) == [[0], [1], [2]]


def test_beams_and_sampling(saved):
    model, processor = saved
    data = open_dataset("scenes:short:test", 2)
    settings_ = read_settings(batch_size=4, method="fastv")
    answerer = Answerer(model, processor, settings_, build_method(settings_))
    beams = [Question(q.key, q.messages, read_decoding({"num_beams": 2, "max_new_tokens": 4}, 9)) for q in ask(data)]
    expected = predict(
        model, processor, data, answerer.method, max_new_tokens=4, decoding={"num_beams": 2}, progress=False
    )
    assert [r.record["tokens"] for r in answerer.answer(beams)] == [r["tokens"] for r in expected]
    drawn = [Question(q.key, q.messages, read_decoding({"do_sample": True, "max_new_tokens": 6}, 9)) for q in ask(data)]
    first, again = ([r.text for r in answerer.answer(drawn)] for _ in range(2))
    assert first == again and first != [r.text for r in answerer.answer(ask(data))]


def test_a_task_without_a_limit_gets_what_the_context_holds(saved):
    model, processor = saved
    answerer = Answerer(model, processor, read_settings(max_new_tokens=100_000), build_method(read_settings()))
    model.generation_config.eos_token_id, before = list(range(32_064)), model.generation_config.eos_token_id
    try:
        reply = answerer.answer(
            [Question(("t", "s", 0), user("Hi", Image.new("RGB", (9, 9))), read_decoding({}, 100_000))]
        )
    finally:
        model.generation_config.eos_token_id = before
    assert reply[0].record["steps"] == 1  # any token ends here: no error for a limit beyond the context


def test_a_question_that_cannot_be_read_is_named(saved):
    model, processor = saved
    answerer = Answerer(model, processor, read_settings(), build_method(read_settings()))
    with pytest.raises(InputError, match="vqa, split test, document 7: .*is not an image"):
        answerer.answer([Question(("vqa", "test", 7), user("Hi", b"nonsense"), read_decoding({}, 4))])
    with pytest.raises(InputError, match="document 7: the prompt holds 2 <image> for 1 pictures"):
        answerer.answer(
            [Question(("vqa", "test", 7), user("See <image>", Image.new("RGB", (9, 9))), read_decoding({}, 4))]
        )


# ------------------------------------------------------------------------------------------------------------ records


def record(number, **more):
    return {"id": f"t/test/{number}", "text": "x", **more}


def test_records_of_several_processes_are_one_list(tmp_path):
    for rank, numbers in ((0, (0, 2)), (1, (1, 3))):
        writer = RecordWriter(tmp_path / "r", rank)
        for number in numbers:
            writer.write("a task", [record(number)])
    assert [r["id"] for r in read_records(tmp_path / "r", "a task")] == [f"t/test/{i}" for i in range(4)]
    RecordWriter(tmp_path / "r", 0).write("a task", [record(8)])  # a new run replaces its own file
    assert [r["id"] for r in read_records(tmp_path / "r", "a task")] == ["t/test/1", "t/test/3", "t/test/8"]
    RecordWriter(tmp_path / "r", 2).write("a task", [record(8)])
    with pytest.raises(InputError, match=r"a_task.2.jsonl, line 1: document 8 .* more than once"):
        read_records(tmp_path / "r", "a task")
    (tmp_path / "r" / "a_task.2.jsonl").write_text('{"id": "t/test/9"}\n{"id": "t/te')
    with pytest.raises(InputError, match=r"a_task.2.jsonl, line 2 is not a record"):
        read_records(tmp_path / "r", "a task")
    with pytest.raises(ResourceError, match="no records of b"):
        read_records(tmp_path / "r", "b")
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="no folder that can be made"):
        RecordWriter(tmp_path / "file" / "below")


# --------------------------------------------------------------------------------------------------------- task files


def test_the_group_names_the_ten():
    name, text = task_files.group_file()
    content = yaml.safe_load(text)
    assert (name, content["group"]) == ("dyrate_paper.yaml", "dyrate_paper") and len(content["task"]) == 10
    assert content["task"] == list(BENCHMARKS) and {b.table for b in BENCHMARKS.values()} == {1, 2}


def test_scenes_files_follow_what_there_is():
    from dyrate_lib import scenes

    files = task_files.scenes_files(5, seed=2)
    names = {*scenes.FAMILIES, "questions", *scenes.tasks.NAMES}
    assert set(files) == {f"scenes_{n.replace('-', '_')}.yaml" for n in names} | {
        "scenes_short_novel.yaml",
        "dyrate_scenes.yaml",
    }
    short = yaml.safe_load(files["scenes_short.yaml"].replace("!function ", ""))
    assert short["metadata"] == {"version": 1.0, "spec": "scenes:short:test", "n": 5, "seed": 2}
    assert set(yaml.safe_load(files["dyrate_scenes.yaml"])["task"]) == {f.removesuffix(".yaml") for f in files} - {
        "dyrate_scenes"
    }
    with pytest.raises(InputError, match="at least one picture"):
        task_files.scenes_files(0)


def test_without_lmms_eval_the_error_names_the_cure(monkeypatch, tmp_path):
    monkeypatch.setattr(task_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match="lmms-eval is not installed"):
        task_files.local_files(tmp_path)
    with pytest.raises(ResourceError, match="there is no folder"):
        task_files.local_files(tmp_path / "nowhere")


def test_writing_task_files(tmp_path):
    names = task_files.write_tasks(tmp_path / "a" / "b", scenes_pictures=3)
    assert "dyrate_paper" in names and "scenes_short" in names
    assert sorted(p.stem for p in (tmp_path / "a" / "b").iterdir()) == names
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="could not be written"):
        task_files.write_tasks(tmp_path / "file", scenes_pictures=3)


# ------------------------------------------------------------------------------------------------------------ results


def write_result(folder, date, results, model_args, limit=None):
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "config": {"model": "dyrate", "model_args": model_args, "limit": limit}, "results": results,
        "n-samples": {task: {"original": 9000, "effective": 5000} for task in results},
    }  # fmt: skip
    (folder / f"{date}_results.json").write_text(json.dumps(content))


def test_results_become_the_papers_tables(tmp_path):
    model = "llava-hf/llava-1.5-7b-hf"
    write_result(
        tmp_path / "x", "20260101_000000",
        {"gqa": {"alias": "gqa", "exact_match,none": 0.5, "exact_match_stderr,none": 0.01},
         "coco2017_cap_val_local": {"coco_CIDEr,none": 1.104, "coco_Bleu_4,none": 0.3}, "other": {"acc,none": 1}},
        f"pretrained={model},method=fastv,layer=2,rate=0.5",
    )  # fmt: skip
    write_result(
        tmp_path / "x",
        "20260102_000000",
        {"gqa": {"exact_match,none": 0.61}},
        f"pretrained={model},method=fastv,layer=2,rate=0.5",
    )
    write_result(
        tmp_path / "y", "20260103_000000", {"mme": {"mme_perception_score,none": 1500.5}}, f"pretrained={model}"
    )
    (tmp_path / "submissions").mkdir()
    (tmp_path / "submissions" / "coco_captions_val2014_alg_results.json").write_text("[]")
    frame = read_results(tmp_path)
    assert len(frame) == 3
    newest = frame[frame["task"] == "gqa"].iloc[0]
    assert (newest["score"], newest["method"], newest["n"], newest["local"]) == (
        61.0,
        "fastv(layer=2, rate=0.5)",
        5000,
        False,
    )
    assert frame[frame["task"] == "coco2017_cap_val"].iloc[0][["score", "local", "column"]].tolist() == [
        pytest.approx(110.4),
        True,
        "coco2017",
    ]
    tables = paper_tables(frame)
    assert list(tables) == ["Table I", "Table II"]
    ours = tables["Table I"][tables["Table I"]["source"] == "here"].set_index("method")
    assert ours.loc["fastv(layer=2, rate=0.5)", "gqa"] == 61.0 and ours.loc["none", "mme"] == 1500.5
    paper = tables["Table II"][
        (tables["Table II"]["source"] == "paper") & (tables["Table II"]["method"] == "DyRate(ours)")
    ]
    assert paper["coco2017"].tolist() == [110.54, 115.72]


def test_results_that_are_none(tmp_path):
    with pytest.raises(ResourceError, match="no \\*_results.json"):
        read_results(tmp_path)
    (tmp_path / "a_results.json").write_text("{")
    with pytest.raises(InputError, match="a_results.json is not a result of lmms-eval"):
        read_results(tmp_path)
    write_result(tmp_path, "a", {"gqa": {"other,none": 1}}, "pretrained=x")
    with pytest.raises(InputError, match="exact_match is there 0 times"):
        read_results(tmp_path)
    (tmp_path / "a_results.json").write_text(
        json.dumps({"config": {"model": "llava_hf", "model_args": ""}, "results": {}})
    )
    with pytest.raises(ResourceError, match="none of the model dyrate"):
        read_results(tmp_path)


def test_arguments_are_split_outside_brackets():
    assert split_args('pretrained=a,layers=[1, 2],rates={"2": 0.1, "3": 0.2},batch_size=4') == {
        "pretrained": "a", "layers": "[1, 2]", "rates": '{"2": 0.1, "3": 0.2}',
    }  # fmt: skip
    with pytest.raises(InputError, match="name=value"):
        split_args("pretrained")
