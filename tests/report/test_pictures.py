"""The pictures of a report."""

import re
from xml.dom.minidom import parseString

from ptuning.metrics import Confusion
from ptuning.report.pictures import curves, dots, matrices, mean_curve
from ptuning.statistics import Score


def test_a_stopped_training_stays_in_the_mean() -> None:
    trainings = [[(0, 0.1), (1, 0.3), (2, 0.5)], [(1, 0.1), (2, 0.2), (3, 0.4)]]
    assert [(epoch, round(value, 9)) for epoch, value in mean_curve(trainings)] == [(1, 0.2), (2, 0.35), (3, 0.45)]


def test_long_trainings_have_a_mean_in_linear_time() -> None:
    """A search for the score at each epoch would look at 1.6 billion points."""
    trainings = [[(epoch, 0.5) for epoch in range(40_000)], [(epoch, 0.25) for epoch in range(40_000)]]
    assert mean_curve(trainings) == [(epoch, 0.375) for epoch in range(40_000)]


def test_control_characters_in_names_leave_the_pictures_well_formed() -> None:
    name = "a\x00\x08\x0b\x1b[2J\x7f\x9b\ufffe\U0001f600<&>"
    score = Score(0.5, 0.4, 0.6, n=8)
    pictures = (
        dots([(name, score, score), ("b", score, score)], names=(name, "c"), unit=name, name="dots"),
        curves({name: [[(0, 0.5), (1, 0.25)]]}, name="curves"),
        matrices({name: Confusion((f"{name[:1]}\x00\U0001f600", "b"), ((1, 0), (0, 2)))}, name="confusion-1"),
    )
    for svg in pictures:
        shown = parseString(svg).toxml()
        assert "a\ufffd" in shown
        assert "\U0001f600" in shown


def test_the_lowest_panel_of_each_column_names_the_epochs() -> None:
    """Of three panels in two columns, that is the second, too."""
    curve = [(epoch, 0.5) for epoch in range(7)]
    drawn = curves({name: [curve] for name in ("one", "two", "three")}, name="curves")
    assert len(re.findall(r">\s*6\s*</text>", drawn)) == 2


def test_matrices_are_drawn_as_shapes_and_few_labels_beside_each_other() -> None:
    def drawn(size: int, panels: int = 3) -> str:
        matrix = Confusion(tuple(f"label {at}" for at in range(size)), tuple((at + 1,) * size for at in range(size)))
        return matrices({f"method {at}": matrix for at in range(panels)}, name="confusion-1")

    few, many = drawn(3), drawn(13)
    assert "<image" not in few + many
    assert drawn(3) == few
    heights = [float(str(re.search(r'height="([0-9.]+)pt"', svg)[1])) for svg in (few, many)]  # type: ignore[index]
    assert heights[1] > 3 * heights[0]
    assert few.count("label 0 1") == 2  # the first panel of each line
    assert few.count(">3<") >= 3 * 3


def test_long_names_of_variants_are_broken() -> None:
    """In one line, the title of a panel was cut off."""
    curve = [(0, 0.1), (1, 0.2)]
    drawn = curves({"p-tuning encoder=none": [curve], "p-tuning@random-weights": [curve]}, name="curves")
    assert re.findall(r">\s*(p-tuning|encoder\S* n = 1|@random\S* n = 1)\s*<", drawn) == [
        "p-tuning", "encoder=none, n = 1", "p-tuning", "@random-weights, n = 1",
    ]  # fmt: skip
