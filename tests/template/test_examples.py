"""Worked examples as deep slots: the words that a template writes them with, and where they go."""

import pytest

from ptuning.template.examples import example_lines, manual_of, with_deep_examples
from ptuning.template.language import Template

FACTS = [{"x": "Kenya", "y": "Nairobi"}, {"x": "Peru", "y": "Lima"}]


@pytest.mark.parametrize(
    ("pattern", "manual", "causal", "masked"),
    [
        (
            "[D:examples] The capital of [X] is [Y]",
            "The capital of [X] is [Y]",
            "[D:The capital of Kenya is Nairobi\nThe capital of Peru is Lima\n]The capital of [X] is [Y]",
            "[D:The capital of Kenya is Nairobi The capital of Peru is Lima] The capital of [X] is [Y]",
        ),
        (
            "[D:examples] [P*2] [X] [P:is] [Y]",
            "[X] is [Y]",
            "[D:Kenya is Nairobi\nPeru is Lima\n][P*2] [X] [P:is] [Y]",
            "[D:Kenya is Nairobi Peru is Lima] [P*2] [X] [P:is] [Y]",
        ),
        ("[D:examples][X] - [Y]", "[X] - [Y]", "[D:Kenya - Nairobi\nPeru - Lima\n][X] - [Y]", None),
    ],
)
def test_the_rest_of_the_template_writes_the_examples(
    pattern: str, manual: str, causal: str, masked: str | None
) -> None:
    template = Template.parse(pattern)
    assert str(manual_of(template)) == manual
    for kind, expected in (("causal", causal), ("masked", masked)):
        if expected is not None:
            lines = example_lines(manual_of(template), FACTS, kind=kind)
            assert str(with_deep_examples(template, lines)) == expected
