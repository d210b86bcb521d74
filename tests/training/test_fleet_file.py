"""The file of a fleet: defaults, lists, paths beside it, and messages that name prompt and key."""

from pathlib import Path

import pytest

from ptuning.config import TrainConfig
from ptuning.errors import ConfigError, FileError
from ptuning.training.fleet_file import read_fleet
from ptuning.training.spec import FleetPrompt, TrainingInputs


def written(folder: Path, text: str) -> Path:
    path = folder / "fleet.toml"
    path.write_text(text, encoding="utf-8")
    return path


FULL = """
backbone = "somewhere"
at_once = 4

[all]
epochs = 3
manual = "The capital of [X] is [Y]"

[[prompt]]
name = "capitals"
data = "capitals:train"
seed = [0, 7]
encoder = ["lstm", "none"]

[[prompt]]
name = "mood"
data = "mood.jsonl"
dev = "folder:val"
template = "{text} [P:It was] [Y]"
labels = {good = ["great", "fine"], bad = "poor"}
fields = {y = "label"}
epochs = 9
"""


def given(prompt: FleetPrompt) -> dict[str, object]:
    """The inputs that are given."""
    return {
        name: value for name in TrainingInputs.model_fields if (value := getattr(prompt, name)) not in (None, False)
    }


def test_a_list_makes_a_prompt_of_each_value(tmp_path: Path) -> None:
    file = read_fleet(written(tmp_path, FULL))
    assert (file.backbone, file.at_once) == ("somewhere", 4)
    assert [prompt.name for prompt in file.prompts] == [
        "capitals-seed=0-encoder=lstm",
        "capitals-seed=0-encoder=none",
        "capitals-seed=7-encoder=lstm",
        "capitals-seed=7-encoder=none",
        "mood",
    ]
    one = file.prompts[1]
    assert one.settings == TrainConfig(epochs=3, seed=0, encoder="none")
    assert one.settings.model_fields_set == {"epochs", "seed", "encoder"}
    assert one.common == {"epochs"}
    assert given(one) == {"data": "capitals:train", "manual": "The capital of [X] is [Y]"}


def test_a_prompts_own_template_takes_the_place_of_the_common_one(tmp_path: Path) -> None:
    mood = read_fleet(written(tmp_path, FULL)).prompts[-1]
    assert "manual" not in given(mood)
    assert (mood.settings.epochs, mood.common) == (9, frozenset())
    assert (mood.labels, mood.fields) == ({"good": ("great", "fine"), "bad": "poor"}, {"y": "label"})


@pytest.mark.parametrize(
    ("common", "own", "wanted"),
    [
        ({"manual", "about"}, {"template"}, {"template"}),
        ({"manual", "about"}, {"manual"}, {"manual"}),
        ({"manual", "about"}, {"about"}, {"manual", "about"}),
        ({"manual", "about"}, {"task"}, {"task"}),
        ({"manual", "task"}, {"pattern"}, {"task", "pattern"}),
        ({"template"}, {"manual", "about"}, {"manual", "about"}),
        ({"template", "task"}, {"task"}, {"task"}),
        ({"template"}, {"task", "manual"}, {"task", "manual"}),
        ({"task", "pattern"}, {"manual"}, {"task", "manual"}),
        ({"task", "pattern"}, {"template"}, {"task", "template"}),
        ({"task", "pattern"}, {"task"}, {"task"}),
        ({"task", "pattern"}, {"pattern"}, {"task", "pattern"}),
        ({"template", "task"}, {"labels"}, {"template", "task", "labels"}),
    ],
)
def test_a_prompts_own_way_to_a_template_leaves_no_other(
    tmp_path: Path, common: set[str], own: set[str], wanted: set[str]
) -> None:
    """Those of ``[all]`` used to stay in part: a sentence without its template, a template without its task."""

    def lines(keys: set[str], whose: str) -> str:
        return "".join(f"{key} = {2 if key == 'pattern' else repr(f'{whose} {key}')}\n" for key in sorted(keys))

    text = f"[all]\ndata = 'rows'\n{lines(common, 'common')}[[prompt]]\nname = 'one'\n{lines(own, 'own')}"
    (prompt,) = read_fleet(written(tmp_path, text)).prompts
    assert given(prompt).keys() - {"data"} == wanted
    assert all(str(given(prompt)[key]).startswith("own") for key in own - {"pattern"})


def test_files_beside_it_are_found_and_other_names_stay(tmp_path: Path) -> None:
    (tmp_path / "mood.jsonl").write_text("{}")
    (tmp_path / "folder").mkdir()
    found = read_fleet(written(tmp_path, FULL))
    assert found.prompts[-1].data == str(tmp_path / "mood.jsonl")
    assert found.prompts[-1].dev == f"{tmp_path / 'folder'}:val"
    assert found.prompts[0].data == "capitals:train"


def test_values_that_can_be_no_folder_are_numbered(tmp_path: Path) -> None:
    text = '[[prompt]]\nname = "a"\ndata = "d"\ntemplate = ["[P] [X] [Y]", "[P*2] [X] [Y]"]\nlr = [0.001, 0.002]\n'
    names = [prompt.name for prompt in read_fleet(written(tmp_path, text)).prompts]
    assert names == ["a-template=1-lr=0.001", "a-template=1-lr=0.002", "a-template=2-lr=0.001", "a-template=2-lr=0.002"]


PROMPT = '[[prompt]]\nname = "a"\ndata = "d"\n'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name = x y", ["line 1"]),
        ("", ["[[prompt]]"]),
        ("prompt = 3", ["prompt", "3"]),
        ("[al]\n" + PROMPT, ["'al'"]),
        ("backbone = 3\n" + PROMPT, ["'backbone'", "3"]),
        ("at_once = 0\n" + PROMPT, ["'at_once'", "0"]),
        ("at_once = true\n" + PROMPT, ["'at_once'", "true"]),
        ('[[prompt]]\ndata = "d"\n', ["prompt 1"]),
        ('[[prompt]]\nname = "a"\n', ["prompt 'a'", "data"]),
        ('[all]\nname = "b"\n' + PROMPT, ["[all]"]),
        (PROMPT + "epoch = 3\n", ["prompt 'a'", "'epoch'", "'epochs'"]),
        (PROMPT + "epochs = 0\n", ["prompt 'a'", "'epochs'", "0"]),
        (PROMPT + "seed = []\n", ["prompt 'a'", "'seed'"]),
        (PROMPT + "manual = 3\n", ["prompt 'a'", "'manual'", "3"]),
        (PROMPT + "pattern = true\n", ["'pattern'", "true"]),
        (PROMPT + "labels = 3\n", ["'labels'", "3"]),
    ],
)
def test_bad_files(tmp_path: Path, text: str, says: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        read_fleet(written(tmp_path, text))
    for part in says:
        assert part in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"fleet\.toml"):
        read_fleet(tmp_path / "fleet.toml")


def test_lists_whose_product_is_too_large_are_refused_before_it_is_made(tmp_path: Path) -> None:
    """Six lists of 30 values are 729 million prompts."""
    values = ", ".join(map(str, range(1, 31)))
    keys = ("epochs", "seed", "batch_size", "patience", "num_restarts", "accumulation_steps")
    lists = "\n".join(f"{key} = [{values}]" for key in keys)
    with pytest.raises(ConfigError, match=r"prompt 'a': its lists make 729,000,000 prompts.*has 10,000 at most"):
        read_fleet(written(tmp_path, f'[[prompt]]\nname = "a"\ndata = "d.jsonl"\n{lists}\n'))


def test_the_prompts_of_a_file_are_counted_together(tmp_path: Path) -> None:
    seeds = ", ".join(map(str, range(4000)))
    one = '[[prompt]]\nname = "{}"\ndata = "d.jsonl"\nseed = [{}]\n'
    with pytest.raises(ConfigError, match="prompt 'c': its lists make 4,000 prompts"):
        read_fleet(written(tmp_path, "".join(one.format(name, seeds) for name in "abc")))


@pytest.mark.parametrize("source", ["a" * 5000, f"{'a' * 5000}:train"])
def test_a_name_that_cannot_be_a_path_stays_as_it_is(tmp_path: Path, source: str) -> None:
    (prompt,) = read_fleet(written(tmp_path, f'[[prompt]]\nname = "a"\ndata = "{source}"\n')).prompts
    assert prompt.data == source
