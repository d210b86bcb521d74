"""Which facts are kept: those whose target is one token of the backbone, or in a list of words."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ptuning.backbone.backbone import Backbone
from ptuning.errors import TemplateError
from ptuning.experiment.compare import OneToken, are_listed
from ptuning.template.language import Template
from tests.conftest import bound


def test_targets_of_one_token(backbone: Backbone) -> None:
    pattern = "The capital of [X] is [Y] ."
    rows = [{"x": "Kenya", "y": y} for y in ("good", " yes", "a good film", "1234567890a")]
    keeps = OneToken(backbone, [Template.parse(pattern)])
    assert keeps(rows) == [one.own_tokens == 1 for one in bound(backbone, pattern).examples(rows)]
    assert keeps(rows)[0]
    assert not keeps(rows)[2]
    assert keeps([]) == []
    assert keeps.every(rows[:1])
    assert keeps.every([])
    assert not keeps.every([*[rows[0]] * 70, rows[2]])


def test_a_target_must_be_one_token_in_every_template(make_backbone: Callable[[str], Backbone]) -> None:
    """Byte-level tokens hold the space in front of them: at the start of a sentence a word is cut otherwise."""
    backbone = make_backbone("roberta")
    behind, front = Template.parse("[X] is [Y]"), Template.parse("[Y] is [X]")
    rows = [{"x": "Kenya", "y": "great"}, {"x": "Kenya", "y": "a"}]
    assert OneToken(backbone, [behind])(rows) == [True, True]
    assert OneToken(backbone, [front])(rows) == [False, True]
    assert OneToken(backbone, [behind, front])(rows) == OneToken(backbone, [front, behind])(rows) == [False, True]


def test_the_token_for_unknown_text_is_no_answer(masked: Backbone) -> None:
    rows = [{"x": "Kenya", "y": "\u2603"}, {"x": "Kenya", "y": "Nairobi"}]
    template = Template.parse("[X] is [Y]")
    assert [one.own_tokens for one in bound(masked, "[X] is [Y]").examples(rows)] == [1, 1]
    assert OneToken(masked, [template])(rows) == [False, True]


def test_targets_of_a_list(causal: Backbone) -> None:
    rows = [{"x": "Kenya", "y": y} for y in ("good", " yes ", "a good film")]
    assert are_listed(rows, ["yes", "a good film"]) == [False, True, True]
    keeps = OneToken(causal, [Template.parse("[X] is [Y]")], words=["yes", "a good film"])
    assert keeps([rows[0], {"x": "Kenya", "y": "yes"}, rows[2]]) == [False, True, False]


def test_a_target_that_has_no_place_is_not_kept_and_a_missing_field_is_an_error(causal: Backbone) -> None:
    """One target too long for the context must not end a run over thirty relations."""
    rows = [{"x": "Kenya", "y": "good"}, {"x": "Kenya", "y": "good " * 500}, {"x": "Peru", "y": "yes"}]
    assert OneToken(causal, [Template.parse("[X] is [Y]")])(rows) == [True, False, True]
    with pytest.raises(TemplateError, match="no field 'country' in record 1"):
        OneToken(causal, [Template.parse("{country} is [Y]")])(rows)
