"""What records say about versions and data."""

from ptuning.provenance import VERSION, described, versions
from ptuning.records import Records


def test_a_part_of_the_data_is_described_in_one_way() -> None:
    part = Records([{"x": "a", "y": "b"}], name="facts:dev", digest="00")
    assert list(described(part, kept=1).items()) == [
        ("name", "facts:dev"), ("sha256", "00"), ("rows", 1), ("kept", 1)
    ]  # fmt: skip


def test_versions_begin_with_our_own() -> None:
    assert next(iter(versions().items())) == ("ptuning", VERSION)


def test_what_is_done_to_the_versions_found_changes_no_later_ones() -> None:
    versions().clear()
    assert versions()["ptuning"] == VERSION
