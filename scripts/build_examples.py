"""Build the files in ``examples/`` that the pages of the docs work with.

    python scripts/build_examples.py [--out DIR]

The messages of a shop's mailbox are invented: what a customer says (CORES, by team), between an opening and a closing.
The test part has its own cores, so that no message of it is a variation of one that was learned from. mail.csv is as
untidy as an export: a misspelt team, two empty messages, and one message twice. The facts are the shipped ones, in
somebody's own layout. The same bytes each time: all choices come from one hash.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SEED = "ptuning-examples-1"
TRAIN_CORES, VARIATIONS = 10, 3

CORES = {
    "billing": (
        "I was charged twice for the same order",
        "the invoice shows a wrong amount",
        "my credit card was declined although there is money on it",
        "please send me a receipt with my company's tax number",
        "you took the yearly fee but I had cancelled in March",
        "why is the price on the bill higher than in the shop",
        "I would like to pay by bank transfer instead of card",
        "the discount code was not taken off the total",
        "when will I get my money back for the returned kettle",
        "there are two payments of 39.90 on my statement",
        "the refund has not arrived on my account",
        "I need last year's invoices for my accountant",
        "your reminder says I owe 12 euros, but I have paid",
        "can I change the card that the subscription is paid with",
    ),
    "technical": (
        "the app crashes whenever I open the camera",
        "I cannot log in, it says the password is wrong",
        "the update stops at 80 percent and starts again",
        "my speaker does not connect to the wifi any more",
        "the screen stays black after the last update",
        "your website shows an error 500 when I save my profile",
        "the confirmation code never reaches my phone",
        "the device gets very hot while charging",
        "sound and picture are out of step when I stream a film",
        "how do I reset the thermostat, the button does nothing",
        "the printer is not found by my laptop",
        "the app keeps signing me out every few minutes",
        "bluetooth drops the connection all the time",
        "the search on your page finds nothing, whatever I type",
    ),
    "shipping": (
        "my parcel has not arrived, it should have been here on Monday",
        "the tracking page says delivered but nothing is here",
        "can you send the order to my office instead",
        "the box was open and wet when the driver brought it",
        "where is my package, the link has not moved for a week",
        "I would like to have it delivered after 6 pm",
        "half of the order is missing in the parcel",
        "the courier left the packet with a neighbour whom I don't know",
        "do you deliver to Norway, and what does it take",
        "please hold the delivery until I am back from holiday",
        "the driver never rang and took the package away again",
        "I gave a wrong street number, can it still be corrected",
        "how long does express delivery take to the islands",
        "the parcel went back to the sender by mistake",
    ),
    "sales": (
        "do you have the blue jacket in size L",
        "is there a discount if we order fifty lamps for our hotel",
        "which of your two coffee machines is better for an office",
        "when will the new headphones be on sale",
        "could you make us an offer for 20 desks",
        "is the table also available in oak",
        "do you sell spare batteries for the older drill",
        "I am looking for a present for a child of six, what do you suggest",
        "what is the difference between the basic and the pro plan",
        "can I try the mattress before I buy it",
        "does the bag fit a 15 inch laptop",
        "will the red bicycle be in stock again before summer",
        "do you offer a lower price for schools",
        "I want to order a larger quantity, whom do I talk to",
    ),
}
OPENINGS = ("", "Hello, ", "Hi there, ", "Dear team, ", "Good morning, ", "Hey! ")
CLOSINGS = ("", ".", ". Thanks!", ". Please help.", ", thank you", ". Best regards, Kim", ' (order no. "4711")')
TYPO = ("billing", "biling")
TEMPLATES = {"currencies": "The currency of [X] is called [Y]", "continents": "[X] is a country in [Y]"}
WORDINGS = {"currencies": ("In [X], people pay with the [Y]", "The money of [X] is the [Y]")}

Row = tuple[str, str]


def draw(options: Sequence[str], *purpose: object) -> str:
    """Return one of the options, by the hash of a purpose."""
    return options[rank(*purpose) % len(options)]


def rank(*purpose: object) -> int:
    """Return the number by which rows are put in order, and options are drawn."""
    text = "/".join(map(str, (SEED, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def said(core: str, number: int) -> str:
    """Return a message: a core with the opening and closing of one variation."""
    text = draw(OPENINGS, core, "opening", number) + core + draw(CLOSINGS, core, "closing", number)
    return text[0].upper() + text[1:]


def messages(*, test: bool) -> list[Row]:
    """Return messages and their teams, in an order without meaning, each once."""
    rows = {
        said(core, number): team
        for team, cores in CORES.items()
        for core in (cores[TRAIN_CORES:] if test else cores[:TRAIN_CORES])
        for number in range(VARIATIONS)
    }
    return sorted(rows.items(), key=lambda row: rank(*row))


def untidy(rows: Sequence[Row]) -> list[Row]:
    """Return rows as an export has them: one team misspelt, two messages empty, one message twice."""
    found, (right, wrong) = list(rows), TYPO
    at = next(number for number, (_, team) in enumerate(found) if team == right)
    found[at] = (found[at][0], wrong)
    for team, number in (("shipping", 33), ("sales", 71)):
        found.insert(number, ("", team))
    found.insert(90, found[12])
    return found


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Write messages and teams."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("message", "team"))
        writer.writerows(rows)


def own_facts(relation: str, part: str) -> str:
    """Return shipped facts with other names of their fields."""
    path = ROOT / "src" / "ptuning" / "data" / "facts" / relation / f"{part}.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return "".join(json.dumps({"subject": row["x"], "object": row["y"]}, ensure_ascii=False) + "\n" for row in rows)


def build(out: Path) -> None:
    """Write all files."""
    (out / "facts").mkdir(parents=True, exist_ok=True)
    write_csv(out / "mail.csv", untidy(messages(test=False)))
    write_csv(out / "mail-test.csv", messages(test=True))
    unseen = [said(cores[-1], VARIATIONS) for cores in CORES.values()]
    (out / "new-mail.txt").write_text("".join(f"{line}\n" for line in unseen), encoding="utf-8")
    for relation in TEMPLATES:
        text = own_facts(relation, "train") + own_facts(relation, "test")
        (out / "facts" / f"{relation}.jsonl").write_text(text, encoding="utf-8")
    (out / "facts" / "paraphrases").mkdir(exist_ok=True)
    for relation, wordings in WORDINGS.items():
        text = "".join(json.dumps({"pattern": pattern}) + "\n" for pattern in wordings)
        (out / "facts" / "paraphrases" / f"{relation}.jsonl").write_text(text, encoding="utf-8")
    lines = [json.dumps({"relation": relation, "template": template}) for relation, template in TEMPLATES.items()]
    (out / "facts" / "relations.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "examples", help="folder to write to")
    build(parser.parse_args().out)
