"""Checks of the installation: packages, this machine, a backbone, prompts and a running server. Nothing is changed."""

import contextlib
import math
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import httpx2
import psutil
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from ptuning.backbone import sources
from ptuning.backbone.backbone import Backbone
from ptuning.backbone.families import families
from ptuning.backbone.loading import load_backbone
from ptuning.backbone.number_format import units
from ptuning.backbone.sources import LoadOptions
from ptuning.errors import ConfigError, PTuningError, cut
from ptuning.exchange.verify import made_record
from ptuning.files import Json, parse_json
from ptuning.names import MANIFEST_FILE, PROMPT_FOLDER
from ptuning.prompt.inputs import InferenceInputs, typed_fields
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt
from ptuning.prompt.sharing import find_prompt
from ptuning.prompt.storage import has_prompt, prompt_folders, read_prompt
from ptuning.provenance import VERSION
from ptuning.serve import PORT
from ptuning.template.segments import FILLS_MASKS

PACKAGE = "ptuning"
CGROUP = Path("/sys/fs/cgroup")  # limits of a container
MIN_FREE_BYTES = 10**9  # the default backbone takes half of it
# Norm of a slot relative to the mean norm of a token: 0.6 to 1.2 in trained prompts of the default backbone.
MIN_NORM, MAX_NORM = 0.1, 10.0
TOLERANCE = 1e-3  # of log-probabilities: rounding
TIMED_REQUESTS = 5
COMPARED_ANSWERS = 5
SECONDS, ANSWER_SECONDS = 10.0, 120.0  # of a request to a server, and of one that computes an answer
NAME_BACKBONE = "name a backbone"
READ_LOG = "see the server's log"

Status = Literal["ok", "warning", "failed"]
Progress = Callable[[str], AbstractContextManager[None]]  # shows the name of a step that takes long


@dataclass(frozen=True)
class Check:
    """Result of one check: ``detail`` and ``remedy`` are one line each; a check that is ok has no remedy."""

    group: str
    name: str
    status: Status
    detail: str
    remedy: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "detail", cut(" ".join(self.detail.split()), 500))
        object.__setattr__(self, "remedy", "" if self.status == "ok" else cut(" ".join(self.remedy.split()), 500))


@dataclass(frozen=True, eq=False)
class CheckedPrompt:
    """A prompt's name and folder, the checks of its files, and the prompt itself if they are sound."""

    name: str
    folder: str
    checks: Sequence[Check]
    prompt: Prompt | None = None


def run_checks(
    prompts: Iterable[str] = (),
    *,
    backbone: str | None = None,
    options: LoadOptions | None = None,
    server: "Server | None" = None,
    progress: Progress = lambda _: nullcontext(),
) -> Iterator[Check]:
    """Yield all checks, each as soon as it is made. The backbone is the given one, else that of the first prompt, else
    the default; it is loaded once. A failure never ends the checks.

    Raises:
        ConfigError: If a prompt is given that has no files.
    """
    read = read_prompts(prompts)
    yield from check_packages()
    yield from check_machine()
    name, options = backbone, options or LoadOptions()
    own = next((item.prompt.backbone for item in read if item.prompt is not None and item.prompt.backbone), None)
    if name is None and own is not None:
        name, options = own.name, replace(options, revision=options.revision or own.revision)
    with progress("looking for the backbone"):
        location = find_backbone(name or sources.BACKBONE, options, is_default=name is None)
    yield location
    loaded = None
    if location.status == "ok":
        with progress(f"loading {name or sources.BACKBONE}"):
            loaded, checks = check_backbone(name or sources.BACKBONE, options)
        yield from checks
    for prompt in read:
        yield from prompt.checks
        if loaded is not None:
            with progress(f"checking {prompt.name}"):
                fit = list(check_fit(prompt, loaded))
            yield from fit
    if server is not None:
        answers = check_server(server, read, loaded)
        while True:
            with progress("asking the server"):
                check = next(answers, None)
            if check is None:
                return
            yield check


def check_packages() -> Iterator[Check]:
    """Compare the versions of Python and of packages with those needed; an extra that is not installed is no fault."""
    try:
        wanted = metadata.metadata(PACKAGE)["Requires-Python"] or ""
        lines = [Requirement(line) for line in metadata.requires(PACKAGE) or []]
        extras = metadata.metadata(PACKAGE).get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        detail = f"{VERSION}, not installed as a package, so needed versions are unknown"
        yield Check("versions", PACKAGE, "warning", detail, "install it, from its source with: pip install -e .")
        return
    yield Check("versions", PACKAGE, "ok", VERSION)
    python = platform.python_version()
    fits = SpecifierSet(wanted).contains(python, prereleases=True)
    remedy = f"install Python {wanted}"
    yield Check("versions", "python", "ok" if fits else "failed", f"{python}; needed: {wanted}", remedy)
    for extra in ("", *extras):
        needed = [line for line in lines if line.marker is None or line.marker.evaluate({"extra": extra})]
        if extra:
            needed = [line for line in needed if line.marker and not line.marker.evaluate({"extra": ""})]
        if any(line.name == PACKAGE for line in needed):  # an extra of extras is for developers
            continue
        missing = []
        for line in needed:
            try:
                version = metadata.version(line.name)
            except metadata.PackageNotFoundError:
                missing.append(line.name)
                continue
            if not line.specifier.contains(version, prereleases=True):
                detail, remedy = f"{version}; needed: {line.specifier}", f"pip install '{line.name}{line.specifier}'"
                yield Check("extras" if extra else "versions", line.name, "failed", detail, remedy)
            elif not extra:
                yield Check("versions", line.name, "ok", version)
        if extra:
            detail = f"not installed (missing: {', '.join(missing)}): pip install '{PACKAGE}[{extra}]'"
            yield Check("extras", extra, "ok", detail if missing else "installed")
        else:
            for name in missing:
                yield Check("versions", name, "failed", "not installed", f"pip install {name}")


def check_machine() -> Iterator[Check]:
    """Check cores, threads, memory, disk, units for bfloat16 and GPUs."""
    cores, total_cores, threads = usable_cores(), os.cpu_count() or 1, torch.get_num_threads()
    yield Check("machine", "cores", "ok", f"{total_cores}" if cores >= total_cores else f"{cores:g} of {total_cores}")
    is_slow = threads > math.ceil(cores)
    detail = f"torch uses {threads} threads" + (f" on {cores:g} cores, which slows it down" if is_slow else "")
    remedy = f"export OMP_NUM_THREADS={max(1, int(cores))}"
    yield Check("machine", "threads", "warning" if is_slow else "ok", detail, remedy)
    memory = psutil.virtual_memory()
    detail = f"{_gigabytes(memory.available)} free of {_gigabytes(memory.total)}"
    remedy = "end other programs, or take a smaller backbone or dtype=bfloat16"
    yield Check("machine", "memory", "warning" if memory.available < MIN_FREE_BYTES else "ok", detail, remedy)
    cache = sources.cache_root()
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    remedy = "use another folder for the cache: export XDG_CACHE_HOME=DIR"
    try:
        free = shutil.disk_usage(existing).free
        detail, is_low = f"{_gigabytes(free)} free for the cache, {cache}", free < MIN_FREE_BYTES
        if not os.access(existing, os.W_OK):
            detail, is_low = f"{detail}, which cannot be written", True
    except OSError as error:
        detail, is_low = f"cannot read {cache}: {error.strerror}", True
    yield Check("machine", "disk", "warning" if is_low else "ok", detail, remedy)
    vectors = torch.backends.cpu.get_cpu_capability()
    yield Check("machine", "units", "ok", f"{vectors}; for products in bfloat16: {', '.join(units()) or 'none'}")
    gpus = {"gpu": "Apple's (mps)"} if torch.backends.mps.is_available() else {}
    for index in range(torch.cuda.device_count()):
        unused, size = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        gpus[f"cuda:{index}"] = f"{name}, {_gigabytes(unused)} free of {_gigabytes(size)}"
    for name, detail in (gpus or {"gpu": "none"}).items():
        yield Check("machine", name, "ok", detail)


def usable_cores() -> float:
    """Return the number of cores that this process may use, by its affinity and the quota of its container."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = float(len(affinity(0)) if affinity is not None else os.cpu_count() or 1)
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = (CGROUP / "cpu.max").read_text(encoding="utf-8").split()
        return min(cores, int(quota) / int(period))
    return cores


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


def find_backbone(name: str, options: LoadOptions, *, is_default: bool = False) -> Check:
    """Check where a backbone comes from; one of the hub is downloaded. A missing default is only a warning."""
    try:
        weights = sources.gguf_weights(name)
        if weights is None:
            folder, revision = sources.find_backbone(name, options)
            place = "the folder" if revision is None else f"from the hub, commit {revision[:12]}, in {folder}"
        else:
            sources.check_no_revision(name, options)
            is_cached = sources.is_cached(weights)
            place = f"cached in {sources.cache_root() / weights.copy}" if is_cached else f"{weights.find()}"
    except PTuningError as error:
        return Check("backbone", "found", "warning" if is_default else "failed", str(error), NAME_BACKBONE)
    return Check("backbone", "found", "ok", f"{name}: {place}")


def check_backbone(name: str, options: LoadOptions) -> tuple[Backbone | None, list[Check]]:
    """Load a backbone, and describe it."""
    began = time.perf_counter()
    try:
        backbone = load_backbone(name, **vars(options))
    except (MemoryError, RuntimeError) as error:  # of a device, too
        remedy = "free memory, or take a smaller backbone, dtype=bfloat16 or device_map=auto"
        detail = f"it does not fit: {str(error) or type(error).__name__}"
        return None, [Check("backbone", "loads", "failed", detail, remedy)]
    except PTuningError as error:
        return None, [Check("backbone", "loads", "failed", str(error), f"mend its files, or {NAME_BACKBONE}")]
    head = type(backbone.model).__name__
    family = next((family for family in families() if family.head == head), None)
    either = "on either side" if backbone.kind == "encoder-decoder" else "anywhere"
    slots = f"{either}; not a tested family" if family is None else family.slots
    reason = f" ({backbone.dtype_reason})" if backbone.dtype_reason else ""
    details = {
        "loads": f"in {time.perf_counter() - began:.1f} s on {backbone.device}: "
        f"{', '.join(backbone.loaded.values())}{reason}",
        "fingerprint": backbone.fingerprint,
        "kind": f"{backbone.kind}, {head}, {backbone.parameters / 1e6:,.1f} M weights",
        "sizes": f"width {backbone.width:,}, vocabulary {backbone.vocabulary:,}, "
        f"rows of {backbone.tokenizer.max_tokens:,} tokens at most",
        "slots": f"{'fills masks' if backbone.kind in FILLS_MASKS else 'generates answers'}; slots {slots}",
    }
    return backbone, [Check("backbone", check, "ok", detail) for check, detail in details.items()]


def read_prompts(folders_or_parents: Iterable[str]) -> list[CheckedPrompt]:
    """Read prompts, each source being the folder of one or of many."""
    folders: list[tuple[str, str]] = []
    for source in folders_or_parents:
        if source.startswith("manual:"):
            raise ConfigError(f"'{source}' has no files to check; name folders of prompts")
        folder = Path(source)
        inner: list[Path] = []
        if os.path.isdir(source) and not has_prompt(folder):
            with contextlib.suppress(OSError):
                inner = list(prompt_folders(folder))
        folders += [(path.relative_to(folder).as_posix(), str(path)) for path in inner]
        if not inner:
            path = Path(os.path.abspath(source))
            folders.append(((path.parent if path.name == PROMPT_FOLDER else path).name or source, source))
    names = [name for name, _ in folders]
    return [_read_one(name if names.count(name) == 1 else folder, folder) for name, folder in folders]


def _read_one(name: str, folder: str) -> CheckedPrompt:
    group, checks = f"prompt {name}", list[Check]()
    try:
        stored = read_prompt(find_prompt(folder, LoadOptions()))
        weights = stored.manifest.weights
        hashes = [stored.manifest.vectors_sha256, *(weights.sha256.values() if weights is not None else ())]
        listed = ", ".join(digest[:12] for digest in hashes)
        checks.append(Check(group, "files", "ok", f"{folder}: sha256 {listed} as in {MANIFEST_FILE}"))
        prompt = Prompt.from_stored(stored)
    except PTuningError as error:
        remedy = "name the folder of a prompt, of its run, or of many prompts"
        if has_prompt(Path(folder)):
            remedy = "copy the whole folder again, or train the prompt again"
        check = Check(group, MANIFEST_FILE if checks else "files", "failed", str(error), remedy)
        return CheckedPrompt(name, folder, [*checks, check])
    checks.append(Check(group, MANIFEST_FILE, "ok", f"{prompt.slots} slots, template {prompt.template}"))
    return CheckedPrompt(name, folder, checks, prompt)


def check_fit(read: CheckedPrompt, backbone: Backbone) -> Iterator[Check]:
    """Check that a prompt belongs to a backbone, and how its tokenizer reads it."""
    prompt, group = read.prompt, f"prompt {read.name}"
    if prompt is None:
        return
    own = prompt.backbone
    try:
        bound = prompt.bind(prompt.adapt(backbone))
    except PTuningError as error:
        if own is not None and own.fingerprint != backbone.fingerprint:
            detail = f"trained on {own.described} ({own.fingerprint}), not on {backbone.name} ({backbone.fingerprint})"
            remedy = f"check it with its own: ptuning doctor {read.folder} --backbone {own.name}"
            yield Check(group, "backbone", "failed", detail, remedy)
        else:
            remedy = "take the tokenizer that it was trained with, or train it again"
            yield Check(group, "tokenizer", "failed", str(error), remedy)
        return
    yield Check(group, "backbone", "ok", "any: it has no slots" if own is None else f"this one ({own.fingerprint})")
    deep = "" if prompt.deep is None else f", and {prompt.deep.count} deep slots"
    yield Check(group, "tokenizer", "ok", f"{bound.slots} slots, as it has vectors{deep}")
    if prompt.slot_vectors is not None and prompt.slots:
        ratios = prompt.slot_vectors.norm(dim=-1) / backbone.table_statistics.norm  # (P,)
        detail = f"{float(ratios.min()):.2f} to {float(ratios.max()):.2f} times the mean norm of a token"
        is_odd = bool(ratios.min() < MIN_NORM or ratios.max() > MAX_NORM)
        remedy = f"{MIN_NORM:g} to {MAX_NORM:g} is usual: score it (ptuning eval), or train with a lower rate"
        yield Check(group, "norm", "warning" if is_odd else "ok", detail, remedy)
    words = prompt.label_words
    if prompt.answer_space.has_choices:
        yield Check(group, "answers", "ok", "the choices that each row brings")
    elif words is None:
        detail = f"generated; the longest target had {prompt.target_tokens} tokens"
        yield Check(group, "answers", "ok", detail)
    else:
        try:
            with torch.no_grad():
                count = len(words.check_known(words.examples(bound, made_record(prompt)[0])))
            detail = f"{len(words.labels)} labels with {count} words, all distinguishable"
            yield Check(group, "answers", "ok", detail)
        except PTuningError as error:
            yield Check(group, "answers", "failed", str(error), "train it again with other label words")


@dataclass(frozen=True)
class Answer:
    """Answer of a server: ``status`` 0 if there is none, and ``problem`` says why there is no JSON."""

    status: int
    body: Any = None
    problem: str = ""
    seconds: float = math.nan

    @property
    def is_ok(self) -> bool:
        """Whether the server answered with status 200 and JSON."""
        return self.status == 200 and not self.problem

    @property
    def description(self) -> str:
        """Status and message of an answer that is not ok."""
        if self.status in (0, 200):
            return self.problem
        error = self.body.get("error") if isinstance(self.body, Mapping) else None
        message = error.get("message") if isinstance(error, Mapping) else None
        return f"status {self.status}" + (f": {message}" if isinstance(message, str) else f" {self.problem}".rstrip())


class Server:
    """Client of a server. Proxies and redirects are not followed.

    Raises:
        ConfigError: If the URL is none, or holds a password.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        try:
            parsed = httpx2.URL(url)
        except (httpx2.InvalidURL, UnicodeError):
            parsed = httpx2.URL("")
        if parsed.userinfo:
            raise ConfigError("the URL holds a password; keys are read from a file")
        is_address = parsed.scheme in ("http", "https") and parsed.host and not (parsed.query or parsed.fragment)
        if not is_address or not 0 < (parsed.port or 80) < 65536:
            raise ConfigError(f"'{url}' is not the URL of a server, such as http://127.0.0.1:{PORT}")
        # The address that OpenAI's clients are given ends in /v1.
        self.url = str(parsed.copy_with(path=parsed.path.rstrip("/").removesuffix("/v1"))).rstrip("/")
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}

    def request(self, path: str, body: Mapping[str, Json] | None = None) -> Answer:
        """Read a page, or post a request that takes a computation."""
        began, seconds = time.perf_counter(), SECONDS if body is None else ANSWER_SECONDS
        try:
            with httpx2.Client(timeout=seconds, trust_env=False, headers=self._headers) as client:
                response = client.request("GET" if body is None else "POST", self.url + path, json=body)
            took = time.perf_counter() - began
            if response.is_redirect:
                problem = f"redirects to {response.headers.get('location')}, which is not followed"
                return Answer(response.status_code, problem=problem)
            return Answer(response.status_code, parse_json(response.text) if response.text else None, seconds=took)
        except httpx2.TimeoutException:
            return Answer(0, problem=f"no answer in {seconds:g} s")
        except (httpx2.HTTPError, httpx2.InvalidURL, UnicodeError) as error:
            return Answer(0, problem=f"no answer: {error or type(error).__name__}")
        except ValueError:
            return Answer(response.status_code, problem="and the answer is no JSON")


def check_server(server: Server, prompts: Sequence[CheckedPrompt], backbone: Backbone | None) -> Iterator[Check]:
    """Check a server, and compare its answers with those of the prompts in this process."""

    def page(name: str, answer: Answer, detail: str, remedy: str = READ_LOG) -> Check:
        status: Status = "ok" if answer.is_ok or (name == "health" and answer.status == 200) else "failed"
        if answer.status in (401, 403):
            remedy = "give the key that the server was started with"
        return Check("server", name, status, detail if status == "ok" else answer.description, remedy)

    health = server.request("/health")
    remedy = READ_LOG if health.status >= 400 else "check that it runs, and the URL"
    yield page("health", health, "alive", remedy)
    if health.status < 400 and health.status != 200:
        return
    ready, version, models = (server.request(path) for path in ("/ready", "/version", "/v1/models"))
    if ready.status != 404:  # other servers have no such page
        yield page("ready", ready, "takes requests", "it is loading or ending: try again in a minute")
    if version.status != 404:
        number = version.body.get("version") if isinstance(version.body, Mapping) else None
        yield page("version", version, f"{number}")
    names: list[str] = []
    try:
        names = [str(model["id"]) for model in models.body["data"]] if models.is_ok else []
    except (KeyError, TypeError):
        models = replace(models, problem="not a list of models, as OpenAI's clients read it")
    detail = f"{len(names)}: {', '.join(names[:8])}{', ...' * (len(names) > 8)}"
    yield page("models", models, detail, "check that the URL is the address of a model server")
    if not models.is_ok:
        return
    timed: Mapping[str, Json] | None = None
    for read in prompts:
        name = f"answer of {read.name}"
        if read.prompt is None or backbone is None:
            continue
        if read.name not in names:
            remedy = "load it there, or check its name"
            yield Check("server", name, "warning", "the server has no prompt of this name", remedy)
            continue
        fields = () if read.prompt.answer_space.has_choices else typed_fields(read.prompt)
        if not fields or (read.prompt.task is not None and len(fields) != 1):
            yield Check("server", name, "ok", "not compared: no row of its task can be made up")
            continue
        words = read.prompt.label_words
        top_k = 1 if words is None else min(len(words.labels), COMPARED_ANSWERS)
        texts = {field: field for field in fields}
        # A text fills the one field of a task, whatever the column of its files is called.
        record: Json = {**texts} if read.prompt.task is None else fields[0]
        request: Mapping[str, Json] = {"model": read.name, "records": [record], "top_k": top_k}
        try:
            questions = InferenceInputs.typed(read.prompt, texts, where="the template").questions
            expected = PromptModel(backbone).predict(questions, read.prompt, top_k=top_k)[0]
        except PTuningError as error:
            detail = f"not answered in process: {error}"
            yield Check("server", name, "failed", detail, "see the checks of the prompt")
            continue
        answer = server.request("/v1/predict", request)
        if not answer.is_ok:
            yield page(name, answer, "")
            if answer.status == 0:  # nor will it answer the others, and each takes its time
                return
            continue
        own = {candidate.text: candidate.log_prob for candidate in expected.candidates}
        remedy = "serve this folder with this backbone, as it was loaded here, and the same version of ptuning"
        try:
            row = answer.body["predictions"][0]
            text, log_probs = row["prediction"], {each["text"]: float(each["log_prob"]) for each in row["candidates"]}
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            detail = "no predictions as ptuning predict --json prints them"
            yield Check("server", name, "failed", detail, "update the server")
            continue
        gaps = [abs(log_probs.get(each, math.nan) - own[each]) for each in own]
        if text != expected.text:
            yield Check("server", name, "failed", f"{text!r} there, {expected.text!r} in process", remedy)
        elif len(own) != len(log_probs) or not all(gap <= TOLERANCE for gap in gaps):  # a NaN is a fault
            detail = f"{text!r} in both; other candidates, or log-probabilities that differ by {max(gaps):.2g}"
            yield Check("server", name, "failed", detail, remedy)
        else:
            timed = timed or request
            detail = f"{text!r} as in process; log-probabilities differ by {max(gaps):.1g} at most"
            yield Check("server", name, "ok", detail)
    name = "GET /health" if timed is None else f"one record of {timed['model']}"
    path = "/health" if timed is None else "/v1/predict"
    timings = [server.request(path, timed) for _ in range(TIMED_REQUESTS)]
    failed = next((answer for answer in timings if answer.status != 200), None)
    if failed is not None:
        yield Check("server", "latency", "failed", f"{name}: {failed.description}", READ_LOG)
        return
    seconds = [answer.seconds for answer in timings]
    detail = f"{name}: median {1000 * statistics.median(seconds):.1f} ms, worst {1000 * max(seconds):.1f} ms"
    yield Check("server", "latency", "ok", f"{detail} of {TIMED_REQUESTS} requests")
