"""Options and settings without effect are errors in Python and on the command line; explicit ones beat implied ones."""

import json
from pathlib import Path
from typing import Any

import pytest

from ptuning.backbone.backbone import Backbone
from ptuning.config import TrainConfig
from ptuning.errors import ConfigError
from ptuning.training.run import train
from tests.cli.calls import QUICK, fails, works, write_lines

ROWS = [{"x": f"city {at}", "y": ("yes", "no")[at % 2]} for at in range(6)]
SLOTS, DEEP, MANUAL = "[P*2] [X] is [Y]", "[D*2] [X] is [Y]", "[X] is [Y]"
LORA = {"train_backbone": "lora"}


@pytest.mark.parametrize(
    ("given", "settings", "names"),
    [
        ({"template": SLOTS}, {"examples": 3}, ["examples"]),
        ({"template": SLOTS}, {"lora_rank": 4, "head_lr": 0.5, "deep_lr": 3.0}, ["lora_rank", "head_lr", "deep_lr"]),
        ({"template": SLOTS, "dev": ROWS}, {"dev_fraction": 0.9}, ["dev_fraction"]),
        ({"template": MANUAL}, {"train_backbone": "full", "lr": 9.0, "encoder": "mlp"}, ["lr", "encoder"]),
        ({"template": SLOTS}, {**LORA, "cache_memory": 0.9, "cache_disk": 50.0}, ["cache_memory", "cache_disk"]),
        ({"template": SLOTS}, {"cache_memory": 0.0, "cache_disk": 2.0}, ["cache_disk"]),
        ({"template": DEEP}, {"lr": 9.0, "deep_lr": 0.1}, ["lr", "deep_lr"]),
        ({"manual": MANUAL, "method": "p-tuning-v2", "about": "capital"}, {}, ["about"]),
        ({"template": SLOTS, "alias_label": "case"}, {}, ["alias_label"]),
        (
            {"template": SLOTS},
            {**LORA, "column_dropout": 0.5, "values_only": True, "leave_one_out": False, "deep_dtype": "bfloat16"},
            ["column_dropout", "values_only", "leave_one_out", "deep_dtype"],
        ),
        ({"template": SLOTS, "resume": True, "overwrite": True, "out": "out"}, {}, ["resume", "overwrite"]),
        ({"template": SLOTS, "system": "be kind"}, {}, ["system"]),
    ],
)
def test_what_cannot_act_in_a_training_is_an_error(
    causal: Backbone, given: dict[str, Any], settings: dict[str, Any], names: list[str]
) -> None:
    config = TrainConfig.from_json({"epochs": 1, **settings})
    with pytest.raises(ConfigError) as error:
        train(data=ROWS, backbone=causal, config=config, **given)
    assert [name for name in names if name not in str(error.value)] == []
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (("--template", SLOTS, "--set", "examples=3"), ["examples"]),
        (("--template", SLOTS, "--resume", "--overwrite"), ["--resume", "--overwrite"]),
        (("--manual", MANUAL, "--method", "p-tuning-v2", "--set", "about=x"), ["about"]),
        (("--template", SLOTS, "--lr", "1", "--set", "lr=2"), ["lr"]),
        (("--template", SLOTS, "--dry-run"), ["--dry-run", "--out"]),
        (("--template", SLOTS, "--set", "epoch=2"), ["epoch", "epochs"]),
    ],
)
def test_the_command_refuses_the_same(llama: str, args: tuple[str, ...], names: list[str]) -> None:
    write_lines(Path("rows.jsonl"), ROWS)
    fails("train", "--data", "rows.jsonl", "--backbone", llama, "--out", "out", *args, says=names)


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (("predict", "manual:[X] is [Y]", "Kenya", "--field", "x=foo"), ["--field"]),
        (("inspect", "manual:[X] is [Y]", "--field", "x=foo"), ["--field"]),
        (("export", "manual:[X] is [Y]", "--as", "lora", "--out", "e", "--field", "x=foo"), []),
        (("eval", "manual:[X] is [Y]", "--data", "capitals:dev", "--num-beams", "4"), ["--num-beams"]),
        (("eval", "manual:[X] is [Y]", "--data", "capitals:dev", "--force"), ["--force"]),
        (("eval", "manual:[X] is [Y]", "--data", "capitals:dev", "--alias-label", "case"), ["--alias-label"]),
        (("predict", "manual:[X] is [Y]", "Kenya", "--resume"), ["--resume"]),
    ],
)
def test_commands_refuse_options_without_effect(llama: str, args: tuple[str, ...], names: list[str]) -> None:
    fails(*args, "--backbone", llama, says=names)


def test_explicit_settings_beat_those_of_a_method(causal: Backbone) -> None:
    def encoder(**settings: Any) -> object:
        config = TrainConfig(epochs=1, **settings)
        result = train(data=ROWS, manual=MANUAL, method="prompt-tuning", backbone=causal, config=config)
        found = result.record["settings"]
        assert isinstance(found, dict)
        return found["encoder"]

    assert (encoder(), encoder(encoder="lstm")) == ("none", "lstm")


def test_lr_is_that_of_what_is_trained(causal: Backbone) -> None:
    def deep(**settings: float) -> Any:
        prompt = train(DEEP, ROWS, backbone=causal, config=TrainConfig(epochs=1, **settings)).prompt  # type: ignore[arg-type]
        assert prompt.deep is not None
        return prompt.deep

    rates = [deep(lr=0.05), deep(deep_lr=0.05), deep(lr=0.5)]
    shown = [str([tensor.tolist() for tensor in vars(found).values() if hasattr(tensor, "tolist")]) for found in rates]
    assert shown[0] == shown[1] != shown[2]


def test_python_and_the_command_line_make_the_same_prompt(causal: Backbone, llama: str, tmp_path: Path) -> None:
    """The one column that the template does not read is the target, and slots are placed where they pay."""
    rows = [{"text": row["x"], "team": row["y"]} for row in ROWS]
    write_lines(tmp_path / "rows.jsonl", rows)
    for given in ({"template": "{text} This is [P*2] [Y]"}, {"manual": "{text} It was [Y]"}):
        ((name, text),) = given.items()
        result = train(data=rows, backbone=causal, config=TrainConfig(epochs=2, batch_size=4), **given)  # type: ignore[arg-type]
        works("train", "--data", "rows.jsonl", f"--{name}", text, "--backbone", llama, *QUICK, "--out", name)
        record = json.loads((tmp_path / name / "run.json").read_text(encoding="utf-8"))
        assert record["settings"]["template"] == str(result.prompt.template)
        result.prompt.save(tmp_path / "python")
        tensors = [(tmp_path / folder / "prompt.safetensors").read_bytes() for folder in ("python", f"{name}/prompt")]
        assert tensors[0] == tensors[1]
        works("predict", name, "good", "--backbone", llama)
        for file in (tmp_path / "python").iterdir():
            file.unlink()
        (tmp_path / "python").rmdir()


def test_a_file_of_settings(llama: str) -> None:
    write_lines(Path("rows.jsonl"), ROWS)
    Path("run.toml").write_text(
        'data = "rows.jsonl"\nmanual = "[X] is [Y]"\nabout = "answer"\nepochs = 9\nencoder = "mlp"\n', encoding="utf-8"
    )
    works("train", "--config", "run.toml", "--epochs", "1", "--backbone", llama, "--out", "out")
    settings = json.loads(Path("out/run.json").read_text(encoding="utf-8"))["settings"]
    assert (settings["epochs"], settings["encoder"]) == (1, "mlp")
    assert settings["template"] == "[P:The answer:] [X] [P:is] [Y]"
    Path("run.toml").write_text("epochs = 9\npatients = 3\n", encoding="utf-8")
    fails("train", "--config", "run.toml", "--out", "other", says=["patients", "patience"])
