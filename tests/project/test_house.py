"""Rules of the source: no pickles, no private names of transformers, an inert import, public names, doctests."""

import ast
import importlib
import json
import re
import subprocess
import sys

import pytest

import ptuning
from tests.conftest import ROOT

SOURCE = ROOT / "src"
FILES = sorted((SOURCE / "ptuning").rglob("*.py"))
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def imported(node: ast.AST) -> list[str]:
    """Return the dotted names that an import statement brings in."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []


def breaches(source: str) -> list[str]:
    """Return the lines that read pickles (they run what a stranger wrote into them), import private names of
    transformers, or infer what a model can do from part of its name.
    """
    lines = []
    for node in ast.walk(ast.parse(source)):
        names = imported(node)
        is_pickle = any(name.split(".")[0] in PICKLES or name in ("torch.load", "torch.save") for name in names)
        if isinstance(node, ast.Attribute) and node.attr in ("load", "save", "serialization"):
            is_pickle = is_pickle or ast.unparse(node.value) == "torch"
        is_private = any(name.startswith("transformers.") and "._" in name for name in names)
        operands: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            operands = [node.func.value, *node.args] if node.func.attr in ("startswith", "endswith", "find") else []
        has_text = any(isinstance(value, ast.Constant) and isinstance(value.value, str) for value in operands)
        asks_name = has_text and any(
            re.search(r"\b(model_type|model_name|name_or_path|architectures?)\b|\.__name__", ast.unparse(value))
            for value in operands
        )
        if is_pickle or is_private or asks_name:
            lines.append(ast.unparse(node))
    return lines


def test_no_source_file_breaks_a_rule() -> None:
    assert {path.name: lines for path in FILES if (lines := breaches(path.read_text(encoding="utf-8")))} == {}


@pytest.mark.parametrize(
    ("line", "is_breach"),
    [
        ("import pickle", True), ("from pickle import loads", True), ("torch.load('x')", True),
        ("from torch import load", True), ("import dill as d", True), ("from transformers import _LazyModule", True),
        ("from transformers.utils._internal import x", True), ("if 'gpt' in config.model_type: pass", True),
        ("config.model_type.lower().startswith('opt')", True), ("model.eval()", False), ("model_type in known", False),
        ("__name__ == '__main__'", False), ("from transformers import AutoModel", False),
    ],
)  # fmt: skip
def test_a_rule_finds_what_it_forbids(line: str, is_breach: bool) -> None:
    assert bool(breaches(line)) is is_breach


def test_import_is_inert() -> None:
    """Importing the package prints nothing and loads nothing that takes seconds."""
    code = "import json, sys; import ptuning; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    heavy = {"torch", "transformers", "matplotlib", "typer", "rich", "numpy", "scipy", "safetensors", "accelerate"}
    assert not heavy & set(json.loads(done.stdout))
    assert done.stderr == ""


def test_public_names() -> None:
    """The type checker imports the names that are loaded on first use."""
    tree = ast.parse((SOURCE / "ptuning" / "__init__.py").read_text(encoding="utf-8"))
    (typed,) = [node for node in tree.body if isinstance(node, ast.If)]
    names = {alias.name for node in typed.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert {"train", "Prompt", "PromptModel", "load_backbone", "compare", "PTuningError"} < names
    assert names == set(ptuning.__all__)
    assert {*names, "__version__"} <= {*dir(ptuning)}  # completion in a shell asks this
    for name in names:
        value = getattr(ptuning, name)
        assert getattr(value, "__name__", name) == name  # the list of methods is an object without a name
    with pytest.raises(AttributeError, match="nothing"):
        _ = ptuning.nothing


def test_examples_in_docstrings_run() -> None:
    import doctest

    for path in FILES:
        if ">>>" in path.read_text(encoding="utf-8"):
            module = importlib.import_module(".".join(path.relative_to(SOURCE).with_suffix("").parts))
            assert doctest.testmod(module).failed == 0, path.name
