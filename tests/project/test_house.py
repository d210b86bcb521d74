"""House rules that a reader of the source can check: no dangerous calls, inert import, errors used, all documented."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

import ptuning
from ptuning import errors

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src"
FILES = sorted((SOURCE / "ptuning").rglob("*.py"))
Finder = Callable[[ast.AST], bool]


def nodes(source: str) -> Iterator[ast.AST]:
    yield from ast.walk(ast.parse(source))


def imported(node: ast.AST) -> list[str]:
    """Dotted names that an import statement brings in."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def imports_private(node: ast.AST) -> bool:
    """Only public names of transformers are used, so that its next release breaks nothing."""
    return any(
        name.split(".")[0] == "transformers" and any(part.startswith("_") for part in name.split("."))
        for name in imported(node)
    )


def asks_the_name(node: ast.AST) -> bool:
    """What a model can do is never read from part of its name ("gpt" in model_type)."""

    def is_name(value: ast.AST) -> bool:
        return (
            re.search(r"\b(model_type|model_name|name_or_path|architectures?)\b|\.__name__", ast.unparse(value))
            is not None
        )

    def is_text(value: ast.AST) -> bool:
        return isinstance(value, ast.Constant) and isinstance(value.value, str)

    if isinstance(node, ast.Compare):
        operands = [node.left, *node.comparators]
        return any(map(is_text, operands)) and any(map(is_name, operands))
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("startswith", "endswith", "find", "count")
        and is_name(node.func.value)
    )


def reads_pickles(node: ast.AST) -> bool:
    """What comes from outside is JSON, TOML or safetensors: a pickle runs what a stranger wrote into it."""
    banned = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    if isinstance(node, ast.Attribute) and node.attr in ("load", "save", "serialization"):
        return ast.unparse(node.value) == "torch"
    return any(name.split(".")[0] in banned or name in ("torch.load", "torch.save") for name in imported(node))


RULES: list[tuple[Finder, list[str]]] = [
    (
        reads_pickles,
        ["import pickle", "from pickle import loads", "torch.load('x')", "from torch import load", "import dill as d"],
    ),
    (imports_private, ["from transformers.utils._internal import x", "from transformers import _LazyModule"]),
    (
        asks_the_name,
        ["if 'gpt' in config.model_type: pass", "model_type == 'bert'", "config.model_type.lower().startswith('opt')"],
    ),
]
by_rule = pytest.mark.parametrize(("rule", "breaches"), RULES, ids=[rule.__name__ for rule, _ in RULES])


@cache
def broken() -> dict[Finder, list[str]]:
    """Return where rules are broken; one reading of the files serves all."""
    found: dict[Finder, list[str]] = {rule: [] for rule, _ in RULES}
    for path in FILES:
        for node in nodes(path.read_text(encoding="utf-8")):
            for rule, places in found.items():
                if rule(node):
                    places.append(f"{path.name}:{getattr(node, 'lineno', 0)}")
    return found


@by_rule
def test_no_source_file_breaks_a_rule(rule: Finder, breaches: list[str]) -> None:
    found = broken()[rule]
    assert not found, f"{rule.__doc__} Found at {', '.join(found)}"


@by_rule
def test_a_rule_finds_what_it_forbids(rule: Finder, breaches: list[str]) -> None:
    for breach in breaches:
        assert any(rule(node) for node in nodes(breach)), breach
    for harmless in (
        "model.eval()",
        "typer.echo('x')",
        "model_type in known",
        "__name__ == '__main__'",
        "from transformers import AutoModel",
    ):
        assert not any(rule(node) for node in nodes(harmless)), harmless


def test_import_is_inert() -> None:
    """Importing the package prints nothing and loads nothing that takes seconds."""
    code = "import json, sys; import ptuning; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    heavy = {"torch", "transformers", "matplotlib", "typer", "rich", "numpy", "scipy", "safetensors", "accelerate"}
    assert not heavy & set(json.loads(done.stdout))
    assert done.stderr == ""


PUBLIC = {
    "Backbone",
    "FleetPrompt", "GenerationSettings", "LabelWords", "PTuningError", "Prompt", "PromptModel", "Solution", "Template",
    "TrainConfig", "TrainingLog",
    "chat_template", "compare", "estimate", "lama", "load_backbone", "load_conversations", "load_records",
    "load_task", "methods", "superglue", "train", "train_fleet",
}  # fmt: skip


def test_the_public_names_are_these() -> None:
    """What `import ptuning` offers: a name that goes would break users, and a new one is a promise."""
    assert sorted(ptuning.__all__) == sorted(PUBLIC)
    assert {*PUBLIC, "__version__"} <= {*dir(ptuning)}  # completion in a shell asks this
    for name in ptuning.__all__:
        value = getattr(ptuning, name)
        assert getattr(value, "__name__", name) == name  # the list of methods is an object without a name
    with pytest.raises(AttributeError, match="module 'ptuning' has no attribute 'nothing'"):
        _ = ptuning.nothing


def test_every_error_has_a_stage_that_raises_it() -> None:
    """Each stage has one kind of error; all are one level below the base."""
    kinds = {
        name: kind
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and issubclass(kind, Exception) and name != "PTuningError"
    }
    assert all(kind.__bases__ == (errors.PTuningError,) for kind in kinds.values())
    made = set()
    for path in FILES:
        if path.stem == "errors":
            continue
        made |= {
            node.func.id
            for node in nodes(path.read_text(encoding="utf-8"))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
    assert kinds.keys() - made == set()


def test_examples_in_docstrings_run() -> None:
    """What a docstring shows is what happens."""
    import doctest

    for path in FILES:
        if ">>>" in path.read_text(encoding="utf-8"):
            found = doctest.testmod(importlib.import_module(".".join(path.relative_to(SOURCE).with_suffix("").parts)))
            assert found.failed == 0, path.name
