"""`ptuning train` on a mailbox owner's file: other names of columns, and labels."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_app import QUICK, call, fails, works
from tests.messages import as_csv, messages, write_mail

TEMPLATE = "{message} [P:This is for] [Y]"


@pytest.fixture
def mail() -> tuple[Path, Path]:
    """A messy mailbox, and messages that were not learned from."""
    return write_mail(Path.cwd())


def test_the_next_command_works_as_it_is_printed(llama: str, mail: tuple[Path, Path]) -> None:
    """In another folder, too: the prompt remembers how the columns are called. What is asked for explicitly wins."""
    train, test = mail
    args = ("--data", train, "--field", "y=team", "--template", TEMPLATE, "--backbone", llama, *QUICK)
    out = works("train", *args, "--out", "m2")
    assert out.rstrip().endswith("eval m2 --data FILE")
    record = json.loads(Path("m2/run.json").read_text(encoding="utf-8"))
    assert (record["labels"], record["fields"]) == (None, {"y": "team"})
    best = record["dev_score"]
    assert f"\ndev score {best['value']:.3f} [{best['low']:.3f}, {best['high']:.3f}], n = {best['n']}\n" in out
    moved = Path("elsewhere") / "m2"
    shutil.copytree("m2/prompt", moved)
    for command in ("eval", "inspect"):
        found = json.loads(works(command, moved, "--data", test, "--backbone", llama, "--json"))
        assert found
    rows = works("predict", moved, "--data", test, "--backbone", llama, "--json").splitlines()
    assert json.loads(rows[0])["record"].keys() == {"message", "y"}
    other = Path("other.csv")
    other.write_text("message,group,team\nhello,billing,x\n", encoding="utf-8")
    asked = ("predict", moved, "--data", other, "--backbone", llama, "--json")
    assert json.loads(works(*asked))["record"] == {"message": "hello", "group": "billing", "y": "x"}
    assert json.loads(works(*asked, "--field", "y=group"))["record"] == {
        "message": "hello",
        "y": "billing",
        "team": "x",
    }
    done = call("eval", "m2", "--data", test, "--candidates", "train", "--backbone", llama)
    assert done.code == 0, done.err


LABELS = ("--field", "y=team", "--labels", "billing=good;technical=bad;shipping=great;sales=yes")


@pytest.fixture
def letters() -> Path:
    """Messages long enough for what stands in front of slots to be worth keeping."""
    rows = [f"the movie was great and terrible in {at}," + ("billing", "sales", "shipping")[at % 3] for at in range(9)]
    path = Path("letters.csv")
    path.write_text("\n".join(["message,team", *rows]) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("command", ["train", "estimate"])
def test_with_labels_a_manual_template_gets_its_slots_behind_the_text(
    command: str, llama: str, bert: str, letters: Path
) -> None:
    args = (command, "--data", letters, "--manual", "{message} This is for [Y]", *LABELS, "--epochs", "1")
    done = call(*args, "--backbone", llama, *(("--out", "out") if command == "train" else ()))
    assert done.code == 0, done.err
    assert "slots stand behind the text: it is read once, and each training pass reads" in done.err
    assert "times as many (counted on 9 records): --template '[P*3] {message} [P:This is for] [Y]'" in done.err
    if command == "train":
        assert "learned template: {message} [P:This is for] [Y]\n" in done.err
        assert json.loads(Path("out/run.json").read_text())["settings"]["template"] == "{message} [P:This is for] [Y]"
        done = call(*args, "--backbone", bert, "--out", "masked")
        assert "learned template: [P*3] {message} [P:This is for] [Y]\n" in done.err
        assert "slots stand" not in done.err


def test_a_template_comes_from_a_file(llama: str, letters: Path) -> None:
    """As it is, with its line breaks, but for those at its end; one without slots is a manual one."""
    Path("chat.txt").write_bytes(b"Message:\r\n{message}\r\n[P*2]\n[Y]\n\n")
    Path("manual.txt").write_text("{message}\nThis is for [Y]\n", encoding="utf-8")
    args = ("train", "--data", letters, *LABELS, "--epochs", "1", "--backbone", llama, "--template-file")
    for name, more, learned in (
        ("chat.txt", (), "Message:\n{message}\n[P*2]\n[Y]"),
        ("manual.txt", (), "{message}\n[P:This is for] [Y]"),
        ("manual.txt", ("--tune", "lora"), "{message}\nThis is for [Y]"),
    ):
        done = call(*args, name, *more, "--out", "out", "--overwrite")
        assert done.code == 0, done.err
        assert json.loads(Path("out/run.json").read_text())["settings"]["template"] == learned
        assert "a backslash and an n" not in done.err


def test_a_template_file_that_cannot_be_used(letters: Path) -> None:
    Path("empty.txt").write_text("\n", encoding="utf-8")
    args = ("train", "--data", letters, "--out", "out", "--template-file", "empty.txt")
    fails(*args, says=["empty.txt: a template needs one [Y]"])
    fails(*args[:-1], "missing.txt", says=["missing.txt"])
    fails(
        *args,
        "--manual",
        "{message} [Y]",
        says=["--template-file brings the template; leave --template and --manual out"],
    )


def test_letters_that_look_like_a_line_break_are_warned_of(llama: str, bert: str, letters: Path) -> None:
    """A shell passes a backslash and an n on as they are; a masked model's tokenizer knows no line breaks."""
    asked = r"{message}\nIt's for [Y]"
    args = ("train", "--data", letters, *LABELS, "--epochs", "1", "--out", "out", "--overwrite", "--backbone")
    done = call(*args, llama, "--manual", asked)
    assert "write in bash or zsh\n  $'{message}\\nIt\\'s for [Y]'\n" in done.err
    assert "a backslash and an n" in call(*args, llama, "--template", r"{message}\n[P] [Y]").err
    assert "a backslash and an n" not in call(*args, llama, "--manual", asked.replace(r"\n", "\n")).err
    assert "a backslash and an n" not in call(*args, bert, "--manual", asked).err
    scored = call("eval", rf"manual:{asked}", "--data", letters, *LABELS[:2], "--backbone", llama)
    assert "a backslash and an n" in scored.err


# ------------------------------------------------------------------------------------------------------------ labels


def quick(data: object, llama: str, *more: object) -> tuple[object, ...]:
    return ("--data", data, "--template", TEMPLATE, "--backbone", llama, "--epochs", "1", "--batch-size", "16", *more)


def test_labels_are_found_in_a_messy_file(llama: str, mail: tuple[Path, Path]) -> None:
    """Without a word about columns: the target is the one that the template does not read."""
    train, test = mail
    done = call("train", *quick(train, llama), "--labels", "auto", "--out", "mail")
    assert done.code == 0, done.err
    for said in (
        "target: the column 'team' (--field y=NAME for another)",
        "train: 4 labels in 87 records: account 22, billing 21, shipping 22, technical 22",
        f"warning: train: the field 'message' is empty in 2 rows: {train}, lines 13, 58",
        f"warning: train: 'biling' looks like 'billing' ({train}, line 35); left out.",
    ):
        assert done.err.count(said) == 1, done.err
    record = json.loads(Path("mail/run.json").read_text(encoding="utf-8"))
    assert record["labels"] == ["account", "billing", "shipping", "technical"]
    assert record["fields"] == {"y": "team"}
    assert [line.partition(": ")[0] for line in record["left_out"]] == [f"{train}, line {at}" for at in (13, 58, 35)]
    scored = json.loads(works("eval", "mail", "--data", test, "--backbone", llama, "--json"))
    assert (scored["data"]["rows"], *scored["scores"]) == (30, "accuracy")
    assert works("predict", "mail", "my parcel never came", "--backbone", llama).strip() in record["labels"]


def test_labels_by_name_alone_and_labels_that_count_as_others(llama: str, mail: tuple[Path, Path]) -> None:
    """The prompt remembers what counts as what, so a test file with the same slip can be scored."""
    train, test = mail
    named = ("--labels", "billing;shipping;technical;account")
    fails("train", *quick(train, llama), *named, "--out", "a", says=[f"{train}, line 35: 'biling' is not one of"])
    fails("train", *quick(train, llama), *named, "--merge", "x", "--out", "a", says=["'x' is no merge", "WRONG=RIGHT"])
    works("train", *quick(train, llama), *named, "--merge", "biling=billing", "--out", "a")
    assert json.loads(Path("a/run.json").read_text(encoding="utf-8"))["merge"] == ["biling=billing"]
    test.write_text(test.read_text(encoding="utf-8") + "one more invoice,biling\nanother,Shipping\n", encoding="utf-8")
    args = ("eval", "a/prompt", "--data", test, "--backbone", llama, "--json")
    fails(*args, says=[f"{test}, line 33: 'Shipping' is not one of the labels", '--merge "Shipping=shipping"'])
    assert json.loads(works(*args, "--merge", "case"))["data"]["rows"] == 32
    assert json.loads(works(*args, "--labels", "auto"))["data"]["rows"] == 31  # the rare look-alike is left out


def test_strict_refuses_what_may_be_a_mistake(llama: str, mail: tuple[Path, Path]) -> None:
    train, _ = mail
    says = [f"{train}, lines 13, 58", f"'biling' looks like 'billing' ({train}, line 35)"]
    fails("train", *quick(train, llama), "--labels", "auto", "--strict", "--out", "mail", says=says)


def test_few_targets_are_named_where_no_labels_are_asked_for(llama: str, mail: tuple[Path, Path]) -> None:
    train, _ = mail
    done = call("estimate", *quick(train, llama))
    assert "5 distinct targets in 88 records: shipping 22, technical 22, account 22, billing 21, biling 1." in done.err
    assert '--labels auto, or --labels "shipping;technical;account;billing"' in done.err


@pytest.mark.parametrize(
    ("text", "labels", "says"),
    [
        ("message,team\na,x,y\n", "auto", ["mail.csv, line 2: 3 cells, and the header has 2 columns"]),
        ("message,team,id\na,billing,1\n", "auto", ["mail.csv, line 2: no target", "id, message, team", "y=NAME"]),
        ("message,price\n" + "".join(f"m{at},{at}.5\n" for at in range(9)), "auto", ["numbers", "a few classes"]),
        ("message,team\n" + "".join(f"m{at},t{at // 2}\n" for at in range(20_000)), "auto", ["10,000 different"]),
        ("message,team\n" + "a,Sales\nb,sales\n" * 9, "auto", ["'Sales' (9) and 'sales' (9)", "--merge case"]),
        ("message,team\n" + "a,sales\nb,  \n" * 9, "auto", ["mail.csv, line 3: no target", "fill it in"]),
        ("message,team\n" + "a,sales\n" * 9, "auto", ["one label only (sales)", "--labels"]),
    ],
)
def test_files_that_give_no_labels_say_what_to_do(llama: str, text: str, labels: str, says: list[str]) -> None:
    Path("mail.csv").write_text(text, encoding="utf-8")
    fails("train", *quick("mail.csv", llama), "--labels", labels, "--out", "out", says=says)


def test_labels_in_the_spelling_of_a_file_and_spaces_around_them(llama: str) -> None:
    Path("mail.csv").write_text("message,team\n" + "".join(f"a{n}, sales\nb{n},Help \n" for n in range(9)))
    done = call("train", *quick("mail.csv", llama), "--labels", "auto", "--out", "out")
    assert "18 records: Help 9, sales 9" in done.err


def test_manual_prompts_are_scored_with_labels(llama: str, mail: tuple[Path, Path]) -> None:
    train, test = mail
    args = ("eval", "manual:{message} This is for [Y]", "--data", test, "--backbone", llama, "--json")
    found = json.loads(works(*args, "--labels", "auto"))
    assert [*found["scores"]] == ["accuracy"]
    assert json.loads(works(*args, "--labels", "account;billing;shipping;technical")) == found
    done = call(*args)
    assert [*json.loads(done.out)["scores"]] == ["exact_match"]
    assert "give --labels auto" in done.err
    fails(*args, "--labels", "auto", "--candidates", train, says=["has label words, which are all its answers"])


def test_a_comparison_has_the_labels_and_the_development_part_of_training(llama: str, mail: tuple[Path, Path]) -> None:
    train, test = mail
    more = ("--labels", "auto", "--out")
    works("train", *quick(train, llama), *more, "mail")
    manual = ("--manual", "{message} This is for [Y]", "--template", TEMPLATE, "--backbone", llama, "--epochs", "1")
    args = ("compare", "--data", train, *manual, "--set", "batch_size=16")
    out = call(*args, "--test", test, *more, "both")
    assert out.code == 0, out.err
    assert "warning: train: 'biling' looks like 'billing'" in out.err
    found: dict[str, Any] = json.loads(Path("both/results.json").read_text(encoding="utf-8"))
    (task,) = found["tasks"].values()
    assert [*task] == ["majority", "manual", "in-context", "p-tuning"]
    assert {name for scores in task.values() for name in scores} == {"accuracy", "macro_f1"}
    (info,) = found["task_info"].values()
    trained = json.loads(Path("mail/run.json").read_text(encoding="utf-8"))
    for part in ("train", "dev"):
        assert info["data"][part]["sha256"] == trained["data"][part]["sha256"]
    assert (info["labels"], info["left_out"]) == (trained["labels"], trained["left_out"])
    cell = json.loads(Path("both/cells/mail/p-tuning/seed-0/try-1/run.json").read_text(encoding="utf-8"))
    assert cell["history"][0]["dev_score"] == trained["history"][0]["dev_score"]
    scored = json.loads(works("eval", "both/cells/mail/p-tuning/seed-0/try-1", "--data", test, "--backbone", llama,
                              "--field", "y=team", "--json"))  # fmt: skip
    assert scored["scores"]["accuracy"]["value"] == pytest.approx(task["p-tuning"]["accuracy"]["value"])
    assert "slots stand behind" not in out.err  # they stand where --template has them
    alone = call(*args, "--methods", "majority,manual", *more, "alone")
    assert alone.code == 0, alone.err
    (info,) = json.loads(Path("alone/results.json").read_text(encoding="utf-8"))["task_info"].values()
    assert info["data"]["dev"]["sha256"] == trained["data"]["dev"]["sha256"]
    assert "20% of the rest set aside to report on" in info["split"]


def test_a_comparison_says_where_the_slots_are(llama: str, mail: tuple[Path, Path]) -> None:
    """As ``train`` does with the same data; the text is read once, and that is why it is fast."""
    manual = ("--manual", "{message} This is for [Y]", "--labels", "auto", "--backbone", llama)
    args = ("--data", mail[0], *manual, "--epochs", "1")
    told = [call(*command, *args, "--out", command[0]).err.splitlines()
            for command in (("train",), ("compare", "--methods", "majority", "--dry-run"))]  # fmt: skip
    for beginning in ("slots stand behind the text: it is read once", "learned template: {message} [P:This is for]"):
        (first,), (second,) = ([line for line in lines if line.startswith(beginning)] for lines in told)
        assert first.partition("a record")[0] == second.partition("a record")[0]


def test_a_comparison_takes_a_task_file(llama: str) -> None:
    Path("teams.toml").write_text(
        'name = "teams"\nversion = "1"\nlabel = "team"\n[labels]\nbilling = ["bill"]\nshipping = ["ship"]\n'
        'technical = ["help"]\naccount = ["name"]\n[[patterns]]\nmanual = "{message} This is for [Y]"\n'
        'learned = "{message} [P:This is for] [Y]"\n',
        encoding="utf-8",
    )
    rows = list(messages())
    Path("mail.csv").write_text(as_csv(rows[:40]), encoding="utf-8")
    Path("test.csv").write_text(as_csv(rows[40:60]), encoding="utf-8")
    args = ("compare", "--task", "teams.toml", "--data", "mail.csv", "--test", "test.csv", "--backbone", llama)
    works(*args, "--methods", "majority,manual,p-tuning", "--epochs", "1", "--out", "out")
    found = json.loads(Path("out/results.json").read_text(encoding="utf-8"))
    (task,) = found["tasks"].values()
    assert [*task] == ["majority", "manual", "p-tuning"]
    assert [*task["manual"]] == ["score", "accuracy"]
    assert found["task_info"]["mail"]["template"] == "{message} [P:This is for] [Y]"
    fails(*args, "--pattern", "2", "--out", "no", says=["the task teams has the patterns 1 to 1, not 2"])
    fails(*args, "--vocabulary", "objects", "--out", "no", says=["a vocabulary (--vocabulary) is for answers as text"])
    fails("compare", "--data", "mail.csv", "--backbone", llama, "--out", "no", says=["--manual", "--task"])


KIND_TEMPLATES = {
    "prompt-tuning": "[P*20] [X] is [Y]",
    "prefix-tuning": "[D*10] [X] is [Y]",
    "p-tuning-v2": "[D*20] [X] is [Y]",
    "context-tuning": "[D:{shown}][X] is [Y]",
    "hybrid": "[D:{shown}][X] [P:is] [Y]",
}


@pytest.mark.parametrize("kind", KIND_TEMPLATES)
def test_a_kind_of_prompt_makes_its_template_of_a_manual_one(llama: str, kind: str) -> None:
    facts = [{"x": name, "y": city} for name, city in (("Kenya", "yes"), ("Peru", "no"), ("a", "good"), ("b", "bad"))]
    for part in ("train", "dev"):
        rows = [json.dumps({**one, "x": f"{part} {one['x']}"}) for one in facts]
        Path(f"{part}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    args = ("--data", "train.jsonl", "--dev", "dev.jsonl", "--backbone", llama, "--manual", "[X] is [Y]")
    works("train", *args, "--method", kind, "--examples", "1", "--epochs", "1", "--out", "run")
    record = json.loads(Path("run/run.json").read_text(encoding="utf-8"))
    template = json.loads(Path("run/prompt/prompt.json").read_text(encoding="utf-8"))["template"]
    shown = [f"train {one['x']} is {one['y']}\n" for one in facts]
    assert record["method"] == kind
    assert template in [KIND_TEMPLATES[kind].format(shown=line) for line in shown]
    assert record["settings"]["encoder"] == ("lstm" if kind == "hybrid" else "none")
    assert ("deep" in record) == (kind != "prompt-tuning")


def test_what_is_asked_for_goes_before_the_settings_of_a_kind(llama: str) -> None:
    for kind, more, asked in (
        ("prefix-tuning", ("--set", "deep_encoder=none"), {"deep_encoder": "none", "encoder": "none"}),
        ("prefix-tuning", (), {"deep_encoder": "mlp", "encoder": "none"}),
        ("prompt-tuning", ("--encoder", "mlp"), {"encoder": "mlp", "start": "vocabulary"}),
    ):
        args = ("--method", kind, *more, "--epochs", "1", "--out", "run", "--overwrite")
        works("train", "--data", "capitals:train", "--manual", "[X] is [Y]", "--backbone", llama, *args)
        settings = json.loads(Path("run/run.json").read_text(encoding="utf-8"))["settings"]
        assert {name: settings[name] for name in asked} == asked


def test_a_kind_of_prompt_that_cannot_be_made(llama: str) -> None:
    args = ("train", "--data", "capitals:train", "--backbone", llama, "--out", "run")
    fails(*args, "--method", "prefix-tunig", "--manual", "[X] is [Y]", says=["Did you mean 'prefix-tuning'?"])
    fails(*args, "--method", "hybrid", "--template", "[P] [X] is [Y]", says=["--method makes its template"])
    fails(*args, "--method", "hybrid", "--manual", "[P] [X] is [Y]", says=["a manual template has no slots"])
