"""The library as a model of lmms-eval, so that the paper's benchmarks are asked and scored by their official code.

    python -m dyrate_lib.lmms eval --tasks dyrate_paper --batch_size 8 --output_path results \\
        --model_args pretrained=llava-hf/llava-1.5-7b-hf,method=fastv,layer=2,rate=0.5
    lmms-eval --model dyrate --include_path FOLDER ...      # the same, after `python -m dyrate_lib.lmms tasks FOLDER`

`settings` reads model_args, `answering` turns lmms-eval's requests into batches of our loop, `model` is the class that
lmms-eval sees, `task_files` writes tasks (the ten official ones as a group, local variants, scenes), `results` reads what came
out. Only `model`, `scenes_task` and `launch` import lmms-eval, which is an extra.
"""

from __future__ import annotations

from typing import Any

VERSION = "0.7.3"  # of lmms-eval, which this is tried with


def manifest() -> Any:
    """What the entry point `lmms_eval.models` gives lmms-eval: the model `dyrate`, asked by chat messages."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="dyrate", chat_class_path="dyrate_lib.lmms.model.DyRateModel")
