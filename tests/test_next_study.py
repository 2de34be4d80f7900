"""What `data/next` holds is whole, and its notebooks are ready to be run, until its records take the present study's place."""

import ast
import json

import pytest

from dyrate_lib import load_vlm, paths
from dyrate_lib.checksums import check_sums
from dyrate_lib.scenes.starting import described
from dyrate_lib.scenes.tokenizer import build_tokenizer

NEXT = paths.root() / "data" / "next"
SHIPPED = {"scenes-small": 3600, "scenes-base": 2600}  # steps of the checkpoints that they were continued from


@pytest.mark.parametrize("name", SHIPPED)
def test_checkpoints_are_whole_and_speak_the_tasks_words(name):
    folder = NEXT / "checkpoints" / name
    assert check_sums(folder)
    model, processor = load_vlm(str(folder), device="cpu", dtype="float32")
    assert processor.tokenizer.get_vocab() == build_tokenizer().get_vocab()
    assert model.config.text_config.vocab_size == len(processor.tokenizer)
    legs = described(folder)["legs"]
    assert [leg["steps"] for leg in legs][0] == SHIPPED[name] and len(legs) == 2


@pytest.mark.parametrize("notebook", sorted((NEXT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_ready_to_be_run(notebook):
    cells = json.loads(notebook.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell for cell in code if "parameters" in cell["metadata"].get("tags", ())] == code[:1]
    assert not any(cell["outputs"] for cell in code)
    for cell in code:
        ast.parse("".join(cell["source"]))
    present = paths.root() / "notebooks" / notebook.name
    ours, theirs = (
        {word.split(" =")[0] for word in "".join(cells["source"]).splitlines() if " = " in word}
        for cells in (code[0], next(c for c in json.loads(present.read_text())["cells"] if c["cell_type"] == "code"))
    )
    assert ours == theirs  # the parameters that the runner knows
