"""The options of ``moesaic fit|validate|test|predict`` that are the command line's own, and their help."""

from __future__ import annotations

from apps.registry import MODELS
from apps.train.checkpoint_paths import MEANING, NAMES

TRAINING = {
    "fit": "train a model; --ckpt_path last goes on where a run was stopped",
    "validate": "the metrics of a checkpoint on the validation data",
    "test": "the metrics of a checkpoint on the test data, and a report as one HTML file",
    "predict": "the outputs of a checkpoint, into a file",
}
"""The commands that train and use a model, with what they do."""

RUN_OPTIONS = (
    ("config FILE", "", "a configuration; may be given again: a later file overrides an earlier one"),
    ("KEY.SUBKEY VALUE", "", "any value in it, such as --data.batch_size 64 or --model.moe.num_experts 4"),
    ("run_dir DIR", "runs/<config name>", "where logs, checkpoints and the configuration go"),
    ("ckpt_path WHICH", "", f"{', '.join(NAMES)}, or {MEANING}; fit goes on from it"),
    ("weights RUN", "", "fit begins anew with the weights of another run; --run_dir is the new one's"),
    ("seed_everything N", "0", "seed of weights, order and transforms"),
    ("trainer.max_epochs N", "", "and whatever else Lightning's Trainer takes"),
    ("print_config", "", "print the whole configuration, with the defaults in force, and run nothing"),
    (
        "help_all [SECTION]",
        "",
        "every option, or those of run, trainer, model or data; --config FILE says of which model",
    ),
    ("model.help [CLASS]", "", f"the options of a model, such as {next(iter(MODELS))}; --data.help likewise"),
    ("traceback", "", "in case of an error, show where in the code"),
)
"""Options of the training commands: their names without the dashes, their defaults, what they mean."""
_QUANTIZE = (
    "quantize int8|int4[:GROUP]",
    "",
    "quantise the experts; GROUP inputs share a scale, else all",
)
_OFFLOAD = (
    "offload SIZE[:FILE]",
    "",
    "keep the experts in memory or FILE, and SIZE of them on the device: 64MB, or a share such as 0.5",
)
_PREDICT_OPTIONS = (
    ("output FILE", "predictions.jsonl in the run's folder", ".jsonl, .csv, .parquet, or .txt for lines of text"),
    ("overwrite", "", "replace an earlier FILE"),
    ("raw_csv", "", "write no apostrophe before text that a spreadsheet would compute, such as =1+1"),
    ("onnx PATH", "", "an ONNX file or folder of moesaic export in place of --ckpt_path"),
    _QUANTIZE,
    _OFFLOAD,
)
_FIT_OPTIONS = (("overwrite", "", "remove the run in the folder, which else moves to a numbered folder in earlier"),)
_TEST_OPTIONS = (
    ("open", "", "show the report in the browser"),
    ("sweep", "", "test cheaper forms of the model as well: quality against latency and memory"),
    ("rounds N", "11", "rounds in which --sweep times a form and the trained model in turn"),
    ("batches N", "8", "validation batches in which --sweep counts the use of the experts"),
    _QUANTIZE,
    _OFFLOAD,
)


def training_help(command: str) -> str:
    """Return the help of a training command."""
    own = {"fit": _FIT_OPTIONS, "predict": _PREDICT_OPTIONS, "test": _TEST_OPTIONS}.get(command, ())
    rows = [*RUN_OPTIONS[:4], *own, *RUN_OPTIONS[4:]]
    lines = [f"usage: moesaic {command} --config FILE [options]", "", TRAINING[command], "", "options:"]
    for name, default, meaning in rows:
        lines.append(f"  --{name:<22}{meaning}{f' (default: {default})' if default else ''}")
    return "\n".join(lines)
