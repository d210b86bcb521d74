"""A server: whether it is alive and ready, what it serves, and whether it answers as the prompts do in process."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ptuning.backbone.backbone import Backbone
from ptuning.data.questions import Questions
from ptuning.doctor.checks import Check, Group
from ptuning.doctor.prompts import ReadPrompt
from ptuning.doctor.remote import Remote, RemoteAnswer
from ptuning.errors import PTuningError
from ptuning.files import Json, Unchecked
from ptuning.prompt.asked import ToAnswer, typed_fields
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prediction import Prediction
from ptuning.prompt.prompt import Prompt

SERVER = Group("server")
# The largest difference of two log-probabilities that is rounding.
TOLERANCE = 1e-3
TIMED_REQUESTS = 5
SHOWN_NAMES = 8
COMPARED_ANSWERS = 5
READ_LOG = "look into the server's log"
GIVE_KEY = "give the key that the server was started with: --api-key-file FILE"


@dataclass(frozen=True)
class Listed:
    """What a server lists: names of models, and whether it is vLLM."""

    names: Sequence[str]
    is_vllm: bool


def check_server(remote: Remote, prompts: Sequence[ReadPrompt], backbone: Backbone | None) -> Iterator[Check]:
    """Look at a server, and compare its answers with those of the prompts that it has."""
    health = remote.get("/health")
    yield _alive(health)
    if health.status == 0 or 300 <= health.status < 400:
        return
    yield from _ready(remote.get("/ready"))
    yield from _version(remote.get("/version"))
    listed = remote.get("/v1/models")
    served = _served(listed)
    if served is None:
        yield _unlisted(listed)
        return
    shown = ", ".join(served.names[:SHOWN_NAMES]) + (", ..." if len(served.names) > SHOWN_NAMES else "")
    yield SERVER.ok("models", f"{len(served.names)}: {shown}" if served.names else "none")
    if served.is_vllm:
        yield from _vllm(remote, served)
        return
    asked: Mapping[str, Json] | None = None
    for one in prompts:
        if one.prompt is None or backbone is None:
            continue
        if one.name not in served.names:
            yield SERVER.warning(_named(one), "the server has no prompt of this name", "load it there, or see its name")
            continue
        asking = _asking(one.name, one.prompt)
        if isinstance(asking, str):
            yield SERVER.ok(_named(one), f"not compared: {asking}")
            continue
        check, is_there = _compared(remote, one, backbone, asking)
        asked = asking.request if asked is None and check.status == "ok" else asked
        yield check
        if not is_there:  # nor will it answer the others, and each takes its time
            return
    yield _latency(remote, asked)


def _named(one: ReadPrompt) -> str:
    return f"answer of {one.name}"


def _alive(health: RemoteAnswer) -> Check:
    if health.status == 200:
        return SERVER.ok("health", "alive")
    if 300 <= health.status < 400:
        return SERVER.failed("health", health.told, "give the URL of the server itself (--url)")
    if health.status == 0:
        return SERVER.failed("health", health.told, "see whether it runs, and whether --url is its address")
    return SERVER.failed("health", health.told, "look into the server's log, and start it again")


def _ready(ready: RemoteAnswer) -> Iterator[Check]:
    if ready.status == 200:
        yield SERVER.ok("ready", "takes requests")
    elif ready.status == 503:
        yield SERVER.failed("ready", ready.told, "it is loading or ending: try again in a minute")
    elif ready.status != 404:  # vLLM has no such page
        yield SERVER.failed("ready", ready.told, READ_LOG)


def _version(version: RemoteAnswer) -> Iterator[Check]:
    told = version.value if isinstance(version.value, Mapping) else {}
    texts = [f"{name} {value}" for name, value in told.items() if isinstance(value, str)]
    if version.is_ok:
        yield SERVER.ok("version", ", ".join(texts) or "not told")
    elif version.status != 404:
        yield SERVER.failed("version", version.told, READ_LOG)


def _served(listed: RemoteAnswer) -> Listed | None:
    """Return what the server lists; None if it refuses to, or lists something else."""
    if not listed.is_ok:
        return None
    try:
        models = Unchecked(listed.value).at("data").items()
        names = [one.at("id").text() for one in models]
        return Listed(names, any(one.at("owned_by").value == "vllm" for one in models))
    except PTuningError:
        return None


def _unlisted(listed: RemoteAnswer) -> Check:
    if listed.status in (401, 403):
        return SERVER.failed("models", listed.told, GIVE_KEY)
    found = "not a list of models as OpenAI's clients read it" if listed.is_ok else listed.told
    return SERVER.failed("models", found, "see whether --url is the address of a server of language models")


@dataclass(frozen=True)
class Asking:
    """What a prompt is asked, made of its template: the question in process, and the request that says the same."""

    questions: Questions
    top_k: int
    request: Mapping[str, Json]


def _asking(name: str, prompt: Prompt) -> Asking | str:
    """Return what a prompt is asked, or why nothing can be made up."""
    if prompt.answer_space.has_choices:
        return "its rows bring choices of their own"
    fields = typed_fields(prompt)
    if prompt.task is not None and len(fields) != 1:
        return f"a row of its task {prompt.task.name} has several fields"
    texts: dict[str, Json] = {field: field for field in fields}
    most = min(len(prompt.label_words.labels), COMPARED_ANSWERS) if prompt.label_words is not None else 1
    # A text fills the one field of a task; what the columns of its files are called is its own business.
    record: Json = texts if prompt.task is None else fields[0]
    asked = ToAnswer.typed(prompt, {field: field for field in fields}, where="the template")
    return Asking(asked.questions, most, {"model": name, "records": [record], "top_k": most})


def _compared(remote: Remote, one: ReadPrompt, backbone: Backbone, asking: Asking) -> tuple[Check, bool]:
    """Return the check of a prompt's answer, and whether the server has answered at all."""
    assert one.prompt is not None
    name = _named(one)
    try:
        ours = PromptModel(backbone).predict(asking.questions, one.prompt, top_k=asking.top_k)[0]
    except PTuningError as error:
        return SERVER.failed(name, f"not answered in process: {error}", "see the checks of the prompt"), True
    answer = remote.post("/v1/predict", asking.request)
    if not answer.is_ok:
        remedy = GIVE_KEY if answer.status in (401, 403) else READ_LOG
        return SERVER.failed(name, answer.told, remedy), answer.status != 0
    try:
        found = Unchecked(answer.value).at("predictions").items()[0]
        text = found.at("prediction").text()
        theirs = [(each.at("text").text(), each.at("log_prob").number()) for each in found.at("candidates").items()]
    except (PTuningError, IndexError):
        return SERVER.failed(name, "no predictions as ptuning predict --json prints them", "update the server"), True
    return _judged(name, ours, text, theirs), True


def _judged(name: str, ours: Prediction, text: str, theirs: Sequence[tuple[str, float]]) -> Check:
    remedy = "serve this folder with this backbone, as it was loaded here (--dtype), and the same version of ptuning"
    if text != ours.text:
        return SERVER.failed(name, f"{text!r} there, and {ours.text!r} in process", remedy)
    mine = {each.text: each.log_prob for each in ours.candidates}
    if set(mine) != {each for each, _ in theirs}:
        return SERVER.failed(name, f"the same text {text!r}, and other candidates beside it", remedy)
    apart = max(abs(value - mine[each]) for each, value in theirs)
    if not apart <= TOLERANCE:  # also if it is NaN
        return SERVER.failed(name, f"{text!r}, and log-probabilities {apart:.2g} apart from those in process", remedy)
    return SERVER.ok(name, f"{text!r} as in process; log-probabilities differ by {apart:.1g} at most")


def _latency(remote: Remote, request: Mapping[str, Json] | None) -> Check:
    """Look how long answers take, of a prompt if there is one to ask, else of the page of the health."""
    what = "GET /health" if request is None else f"one record of {request['model']}"
    taken = []
    for _ in range(TIMED_REQUESTS):
        answer = remote.get("/health") if request is None else remote.post("/v1/predict", request)
        if answer.status != 200:
            return SERVER.failed("latency", f"{what}: {answer.told}", READ_LOG)
        taken.append(1000 * answer.seconds)
    found = f"{what}: median {statistics.median(taken):.1f} ms, worst {max(taken):.1f} ms of {TIMED_REQUESTS} requests"
    return SERVER.ok("latency", found) if math.isfinite(max(taken)) else SERVER.ok("latency", f"{what}: not measured")


def _vllm(remote: Remote, served: Listed) -> Iterator[Check]:
    """Look what a server of vLLM takes of a prompt. Nothing is loaded there."""
    loads = remote.get("/v1/load_lora_adapter").status != 404  # of another method, so that it only says that it exists
    yield SERVER.ok(
        "LoRA",
        "loaded on request (/v1/load_lora_adapter), as ptuning export --as lora writes it"
        if loads
        else "not loaded on request; start vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True for that",
    )
    model = served.names[0] if served.names else ""
    body: dict[str, Json] = {"model": model, "prompt_embeds": "!", "max_tokens": 1}
    refused = remote.post("/v1/completions", body)
    off = refused.status == 404 or "enable-prompt-embeds" in refused.told
    yield SERVER.ok(
        "prompt_embeds",
        "not taken; start vLLM with --enable-prompt-embeds for that"
        if off
        else "seem to be taken, as ptuning export --as embeds writes them",
    )
    yield _latency(remote, None)
