"""The versions of Python and of packages, against those that are needed and tested; and which extras are installed."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from ptuning.doctor.checks import Check, Group
from ptuning.provenance import VERSION

VERSIONS, EXTRAS = Group("versions"), Group("extras")
PACKAGE = "ptuning"
# The lines of constraints.txt, which is in no wheel, for the packages that are looked at; a test keeps them equal.
TESTED = (
    "torch==2.13.0",
    'transformers==5.20.2 ; python_version < "3.11"',
    'transformers==5.23.0 ; python_version >= "3.11"',
    "tokenizers==0.23.3",
    "safetensors==0.8.0",
    "peft==0.21.2",
    "huggingface-hub==2.4.0",
)
# Packages that not everything needs, and what does.
OPTIONAL = {"peft": "prompts with LoRA adapters, and exports"}
REINSTALL = "install the package, from its source with: pip install -e ."


def check_versions() -> list[Check]:
    """Look at Python and the packages that answers depend on."""
    try:
        about = metadata.metadata(PACKAGE)
    except metadata.PackageNotFoundError:
        found = f"{VERSION}, and not installed as a package, so that nobody knows which versions it needs"
        return [VERSIONS.warning(PACKAGE, found, REINSTALL), *_packages({})]
    python, wanted = platform.python_version(), SpecifierSet(about["Requires-Python"] or "")
    fits = wanted.contains(python, prereleases=True)
    return [
        VERSIONS.ok(PACKAGE, VERSION),
        VERSIONS.ok("python", python)
        if fits
        else VERSIONS.failed("python", f"{python}, and {wanted} is needed", f"install Python {wanted}"),
        *_packages(_needed()),
    ]


def check_extras() -> list[Check]:
    """Look at the optional extras. One that is not installed is no fault."""
    try:
        own = _requirements(PACKAGE)
    except metadata.PackageNotFoundError:
        return []
    # An extra that names extras of the package itself collects them for those who work on it.
    return [_extra(name, needs) for name, needs in own.items() if name and all(one.name != PACKAGE for one in needs)]


def _extra(name: str, needs: Sequence[Requirement]) -> Check:
    get = f"pip install '{PACKAGE}[{name}]'"
    found = {one.name: installed(one.name) for one in needs}
    missing = [package for package, version in found.items() if version is None]
    if missing:
        lacking = f" ({', '.join(missing)} missing)" if len(missing) < len(found) else ""
        return EXTRAS.ok(name, f"not installed{lacking}: {get}")
    wrong = [one for one in needs if not one.specifier.contains(str(found[one.name]), prereleases=True)]
    if wrong:
        told = f"{wrong[0].name} {found[wrong[0].name]}, and {wrong[0].specifier} is needed"
        return EXTRAS.warning(name, told, get)
    return EXTRAS.ok(name, ", ".join(f"{package} {version}" for package, version in found.items()))


def _packages(needed: Mapping[str, SpecifierSet]) -> Iterator[Check]:
    for name, tested in tested_versions().items():
        version = installed(name)
        wanted = needed.get(name, SpecifierSet())
        get = f"pip install '{name}=={tested}'"
        if version is None and name in OPTIONAL:
            yield VERSIONS.ok(name, f"not installed; {OPTIONAL[name]} need it")
        elif version is None:
            yield VERSIONS.failed(name, "not installed", get)
        elif not wanted.contains(version, prereleases=True):
            yield VERSIONS.failed(name, f"{version}, and {wanted} is needed", get)
        elif _series(version) > _series(tested):
            yield VERSIONS.warning(name, f"{version} is newer than {tested}, which is tested", f"if it fails: {get}")
        else:
            same = Version(version).public == tested
            yield VERSIONS.ok(name, f"{version}, as tested" if same else f"{version} (tested: {tested})")


def tested_versions() -> dict[str, str]:
    """Return the versions that are tested with this Python, by package."""
    lines = [Requirement(line) for line in TESTED]
    return {one.name: next(iter(one.specifier)).version for one in lines if one.marker is None or one.marker.evaluate()}


def installed(name: str) -> str | None:
    """Return the version of a package; None if it is not installed, or has none that can be read."""
    try:
        found = metadata.version(name)
        return str(Version(found))
    except (metadata.PackageNotFoundError, InvalidVersion, TypeError):
        return None


def _needed() -> dict[str, SpecifierSet]:
    """Return what the package and transformers need of others, by name; extras of transformers are nobody's need."""
    found: dict[str, SpecifierSet] = {}
    for own, needs in _requirements(PACKAGE).items():
        for one in needs if own in ("", "lora") else ():
            found[one.name] = found.get(one.name, SpecifierSet()) & one.specifier
    try:
        for one in _requirements("transformers")[""]:
            name = one.name.replace("_", "-")
            found[name] = found.get(name, SpecifierSet()) & one.specifier
    except metadata.PackageNotFoundError:
        pass
    return found


def _requirements(package: str) -> dict[str, list[Requirement]]:
    """Return what a package needs on this machine: for itself at the key "", and for each extra."""
    every = [Requirement(line) for line in metadata.requires(package) or []]
    extras = metadata.metadata(package).get_all("Provides-Extra") or []
    always = [one for one in every if one.marker is None or one.marker.evaluate({"extra": ""})]
    found = {"": always}
    for extra in extras:
        found[extra] = [
            one for one in every if one not in always and one.marker and one.marker.evaluate({"extra": extra})
        ]
    return found


def _series(version: str) -> tuple[int, ...]:
    """Return the numbers of a version up to the first that is not 0, whose change may change everything.

    >>> _series("5.23.0"), _series("0.21.2")
    ((5,), (0, 21))
    """
    release = Version(version).release
    first = next((at for at, number in enumerate(release) if number), 0)
    return release[: first + 1]
