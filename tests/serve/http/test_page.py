"""The page: what is served, and what a person does with it in a browser."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ptuning.backbone.backbone import Backbone
from ptuning.data.task_files import load_task
from ptuning.prompt.prompt import Prompt
from ptuning.serve.engine.engine import Engine
from ptuning.serve.http.app import create_app
from ptuning.serve.http.routes.page import FILES, KINDS
from ptuning.serve.server import listening, run
from tests.conftest import learned
from tests.serve.http.conftest import BASE, Asked, Shelf

CHROMIUM = Path("/usr/bin/chromium")
LACKS = [name for name in ("playwright", "axe_playwright_python") if importlib.util.find_spec(name) is None]
LACKS += [] if CHROMIUM.exists() else [str(CHROMIUM)]
in_a_browser = pytest.mark.skipif(bool(LACKS), reason=f"the page is not tried in a browser: no {', '.join(LACKS)}")
HTML = '<img src=x onerror="document.title=1">'
LABEL = "<b>good</b>"
LARGEST = 64_000  # bytes of a file of the page
PICTURES = "PTUNING_PICTURES"  # a folder that screenshots are kept in
WAIT = 20_000  # milliseconds for something that happens at once, on a machine that is busy


def texts() -> dict[str, str]:
    return {name: data.decode() for name, data in FILES.items()}


# --- without a browser ---


@pytest.mark.parametrize("name", sorted(KINDS))
def test_files_have_their_types_and_a_strict_policy(asked: Asked, name: str) -> None:
    found = asked.client.get("/" if name == "index.html" else f"/static/{name}")
    assert (found.status_code, found.headers["content-type"]) == (200, KINDS[name])
    assert found.headers["content-security-policy"].startswith("default-src 'self'; ")
    assert (found.headers["x-content-type-options"], found.headers["cache-control"]) == ("nosniff", "no-cache")
    assert found.content == FILES[name]
    assert len(found.content) < LARGEST


@pytest.mark.parametrize(
    "path", ["/static/", "/static/index.html", "/static/nope.js", "/static/..%2Fapp.py", "/static/%2e%2e/app.py"]
)
def test_other_files_are_not_there(asked: Asked, path: str) -> None:
    assert asked.client.get(path).status_code == 404


def test_the_page_is_there_while_the_service_starts(asked: Asked) -> None:
    asked.service.phase = "loading"
    assert asked.client.get("/").status_code == asked.client.get("/static/page.js").status_code == 200


def test_the_page_asks_no_other_host() -> None:
    assert not re.search(r"@import|url\(", texts()["page.css"])
    for name, text in texts().items():
        hosts = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+", re.sub(r"^\s*//.*", "", text, flags=re.MULTILINE)))
        assert hosts <= {"http://www.w3.org"}, name  # the name of a namespace


def test_nothing_is_inline_and_nothing_is_read_as_html() -> None:
    found = texts()
    html, script = found["index.html"], found["page.js"]
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:|<script(?![^>]*\ssrc=)", html)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|Function\(|Parser|setHTML", script
    )
    assert not re.search(r"localStorage|sessionStorage|indexedDB|cookie|history\.|location\.(?!origin)", script)


# --- the manual prompt of a prompt ---


def test_models_tell_the_template_in_pieces_and_the_manual_prompt(asked: Asked) -> None:
    cards = {one["id"]: one for one in asked.client.get("/v1/models").json()["data"]}
    mood = cards["mood"]
    assert mood["pieces"] == [
        {"kind": "slots", "count": 2},
        {"kind": "text", "text": " "},
        {"kind": "field", "name": "x"},
        {"kind": "text", "text": " It was "},
        {"kind": "target"},
    ]
    assert (mood["manual"]["id"], mood["manual"]["template"]) == ("mood:manual", "[X] It was [Y]")
    assert cards["pair"]["manual"] is None
    assert (cards["pair"]["columns"], cards["choose"]["answers"]) == (["x", "z"], "choices")
    assert set(cards["choose"]["columns"]) == set(load_task("copa").columns)


def test_a_prompt_without_its_slots_answers_under_a_name_of_its_own(asked: Asked) -> None:
    found = asked.post("/v1/predict", model=["mood", "mood:manual"], records=[{"x": "a b"}]).json()["predictions"]
    twin = asked.prompts["mood"].without("slots")
    for prompt, [answer] in zip((asked.prompts["mood"], twin), found, strict=True):
        [expected] = asked.model.predict([{"x": "a b"}], prompt)
        assert answer["probabilities"] == pytest.approx(expected.probabilities, abs=1e-4)
    marks = {
        asked.post("/v1/predict", model=name, records=["a"]).json()["system_fingerprint"]
        for name in ("mood", "mood:manual")
    }
    assert len(marks) == 2
    mood = asked.service.registry.get("mood")
    assert asked.service.manual(mood) is asked.service.manual(mood)
    assert {name for _, names, _ in asked.watch.requests for name in names} == {"mood"}


@pytest.mark.parametrize(
    ("name", "status", "code"),
    [("pair:manual", 400, "unsupported"), ("nope:manual", 404, "model_not_found"), (f"{BASE}:manual", 404, None),
     ("mood:manual:manual", 404, None), (":manual", 404, None)],
)  # fmt: skip
def test_names_that_have_no_manual_prompt_are_refused(asked: Asked, name: str, status: int, code: str | None) -> None:
    found = asked.post("/v1/predict", model=name, records=["a"])
    assert found.status_code == status
    assert code in (None, found.json()["error"]["code"])


# --- in a browser ---


def shelf(backbone: Backbone) -> dict[str, Prompt]:
    """Prompts of all kinds, with markup in a name, a template and a label."""
    words = Prompt.manual("{x} [Y]", label_words={LABEL: ["great"], "bad": ["terrible"]}).label_words
    return {
        "mood": dataclasses.replace(learned(backbone, "[P*2] {x} It was [Y]", seed=2), label_words=words),
        "write": dataclasses.replace(learned(backbone, "[P:good] {x} [P*3] [Y]", seed=1), target_tokens=4),
        "pair": Prompt.manual("{x} in {z} is [Y]", label_words={"yes": ["yes"], "no": ["no"]}),
        HTML: Prompt.manual(f"{HTML} {{x}} is [Y]", label_words={LABEL: ["great"], "bad": ["terrible"]}),
        "choose": Prompt.manual("{premise} so [Y]", task=load_task("copa")),
    }


@dataclass
class Opened:
    """A page in a browser, and what went wrong in it."""

    page: Any
    wrong: list[str]
    asked: list[dict[str, Any]]

    def pick(self, *names: str) -> None:
        """Choose these prompts, and no others."""
        self.page.locator("#list input").first.wait_for()
        for box in self.page.locator("#list input").all():
            box.set_checked(box.locator("xpath=..").locator("b").text_content() in names)

    def answer(self, **texts: str) -> None:
        for name, text in texts.items():
            self.field(name).fill(text)
        self.page.get_by_role("button", name="Answer").click()
        self.page.locator("#said", has_text=":").wait_for(state="attached")

    def field(self, name: str) -> Any:
        return self.page.locator(f'textarea[data-column="{name}"]')

    def card(self, name: str) -> Any:
        return self.page.get_by_role("article", name=name, exact=True)

    def check(self) -> None:
        """Look at the page as axe does, and for what a reader has to scroll sideways for."""
        from axe_playwright_python.sync_playwright import Axe

        # Rows that are measured while their colours change are measured wrongly.
        self.page.evaluate("Promise.all(document.getAnimations().map((one) => one.finished))")
        found = Axe().run(self.page)
        assert found.violations_count == 0, found.generate_report()
        assert self.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.fixture(scope="module")
def address(engine: Engine, tiny: Backbone) -> Iterator[str]:
    """One server for all tests in a browser."""
    app = create_app(engine, Shelf.of(shelf(tiny)))
    ready: queue.Queue[Callable[[], None]] = queue.Queue()
    with listening("127.0.0.1", 0) as listener:
        # The engine is that of all tests: it is not this server's to stop.
        kept = SimpleNamespace(drain=lambda seconds: True, stop=lambda: None, has_failed=False)
        closing = SimpleNamespace(close=lambda: None)
        thread = threading.Thread(
            target=run, args=(app, kept, closing, listener), kwargs={"drain": 1.0, "on_ready": ready.put}
        )
        thread.start()
        end = ready.get(timeout=WAIT / 1000)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        end()
        thread.join(WAIT / 1000)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    alone = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_playwright() as made:
        yield made.chromium.launch(executable_path=str(CHROMIUM), args=alone)


@pytest.fixture
def opened(browser: Any, address: str) -> Iterator[Callable[..., Opened]]:
    """Open the page; in the end nothing may have gone wrong in it, and nothing been asked elsewhere."""
    with contextlib.ExitStack() as ends:

        def make(width: int = 1280, scheme: str = "light", *, fails: str = "", before: Any = None) -> Opened:
            context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
            context.set_default_timeout(WAIT)
            page = context.new_page()
            made = Opened(page, [], [])

            def asking(request: Any) -> None:
                if not request.url.startswith(address):
                    made.wrong.append(f"another host: {request.url}")
                if request.url.endswith("/v1/predict"):
                    made.asked.append(request.post_data_json)

            def said(message: Any) -> None:
                if not fails or fails not in message.text:
                    made.wrong.append(message.text)

            page.on("request", asking)
            page.on("console", said)
            page.on("pageerror", lambda error: made.wrong.append(str(error)))
            if before is not None:
                before(page)
            page.goto(address)

            def end() -> None:
                title = page.title()
                context.close()
                assert (made.wrong, title) == ([], "ptuning")

            ends.callback(end)
            return made

        yield make


@in_a_browser
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_two_prompts_are_asked_in_one_request_and_seen_side_by_side(
    opened: Callable[..., Opened], tmp_path: Path, width: int, scheme: str
) -> None:
    made = opened(width, scheme)
    made.pick("mood", "write", HTML)
    made.check()
    made.answer(x="good food")
    assert made.asked == [
        {"model": [HTML, "mood", "mood:manual", "write", "write:manual"], "records": [{"x": "good food"}]}
    ]
    sides = made.card("mood").locator(".side")
    assert sides.count() == 2
    assert sides.nth(0).locator("li span:first-child").all_text_contents().count(LABEL) == 1
    assert re.search(r"\d %", sides.nth(1).locator(".share").first.text_content())
    assert made.card("write").locator(".side").nth(0).locator(".share").count() == 1
    made.check()
    folder = Path(os.environ.get(PICTURES, tmp_path))
    made.page.screenshot(path=folder / f"page-{width}-{scheme}.png", full_page=True)


@in_a_browser
def test_markup_in_names_templates_and_answers_is_text(opened: Callable[..., Opened]) -> None:
    made = opened()
    made.pick(HTML)
    made.answer(x=HTML)
    card = made.card(HTML)
    assert card.locator("h3").text_content() == HTML
    assert card.locator(".template").text_content().startswith(HTML)
    assert LABEL in card.locator("li span:first-child").all_text_contents()
    assert made.page.locator("main img, main li b, pre img").count() == 0


@in_a_browser
def test_the_keyboard_alone_is_enough(opened: Callable[..., Opened]) -> None:
    made = opened()
    page = made.page
    page.locator("#list input").first.wait_for()
    press = page.keyboard.press
    focused = "document.activeElement.getAttribute('aria-label') || document.activeElement.textContent"
    press("Tab")
    assert page.evaluate(focused) == "Skip to the answers"
    press("Tab")  # the first prompt
    assert page.evaluate("document.activeElement.type") == "checkbox"
    press("Space")
    for _ in range(4):
        press("Tab")
    press("Space")
    assert made.page.locator("#list label", has=page.locator("input:checked")).locator("b").all_text_contents() == [
        "mood",
        "write",
    ]
    for _ in range(2):
        press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "TEXTAREA"
    page.keyboard.type("good")
    press("Shift+Enter")
    page.keyboard.type("food")
    press("Enter")
    page.locator("#said", has_text=":").wait_for(state="attached")
    assert made.asked[0]["records"] == [{"x": "good\nfood"}]
    for _ in range(3):
        press("Tab")
    assert page.evaluate(focused) == "curl"
    press("ArrowRight")
    assert page.evaluate(focused) == "Python"
    assert "urllib.request" in page.locator("#code").text_content()


@in_a_browser
def test_an_error_of_one_prompt_stands_in_its_card_alone(opened: Callable[..., Opened]) -> None:
    made = opened()
    made.pick("mood", "pair")
    assert made.page.locator("label", has_text="for pair").count() == 1
    made.answer(x="good")
    assert "no text in the field 'z'" in made.card("pair").locator(".wrong").text_content()
    assert made.card("mood").locator(".wrong").count() == 0
    assert made.page.locator("#notice").is_hidden()
    made.check()


@in_a_browser
def test_rows_with_choices_are_typed_as_json(opened: Callable[..., Opened]) -> None:
    made = opened()
    made.pick("choose")
    typed = made.page.get_by_label("Record as JSON")
    assert set(json.loads(typed.input_value())) == set(load_task("copa").columns)
    row = {"premise": "good", "question": "effect", "choice1": "great", "choice2": "terrible"}
    typed.fill("{")
    made.page.get_by_role("button", name="Answer").click()
    assert "not JSON" in made.page.get_by_role("alert").text_content()
    typed.fill(json.dumps(row))
    made.page.get_by_role("button", name="Answer").click()
    made.page.locator("#said", has_text=":").wait_for(state="attached")
    assert sorted(made.card("choose").locator("li span:first-child").all_text_contents()) == ["great", "terrible"]
    made.check()


@in_a_browser
def test_the_request_runs_as_it_is_shown(opened: Callable[..., Opened]) -> None:
    made = opened()
    made.pick("mood", "write")
    made.answer(x="it's \"good\"\n'\\'' $(x)")
    shown = made.page.locator("#code")
    curl = shown.text_content()
    made.page.get_by_role("tab", name="Python").click()
    python = shown.text_content()
    done = subprocess.run([sys.executable, "-c", python], capture_output=True, text=True, timeout=60, check=True)
    first = done.stdout.splitlines()[0]
    assert first.startswith("mood ")
    assert LABEL in first
    if shutil.which("curl"):
        done = subprocess.run(["sh", "-c", f"{curl} -sS"], capture_output=True, text=True, timeout=60, check=True)
        assert json.loads(done.stdout)["predictions"][0][0]["record"] == {"x": "it's \"good\"\n'\\'' $(x)"}
    made.page.get_by_role("tab", name="OpenAI client").click()
    compile(shown.text_content(), "shown", "exec")
    made.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    made.page.get_by_role("button", name="Copy").click()
    made.page.get_by_role("button", name="Copied").wait_for()
    assert made.page.evaluate("navigator.clipboard.readText()") == shown.text_content()


@in_a_browser
def test_a_key_is_asked_for_sent_and_kept_nowhere(opened: Callable[..., Opened]) -> None:
    sent: list[str | None] = []

    def guard(page: Any) -> None:
        def answer(route: Any) -> None:
            given = route.request.headers.get("authorization")
            sent.append(given)
            if given == "Bearer the-key":
                route.continue_()
            else:
                route.fulfill(status=401, json={"error": {"message": "send a key", "code": "missing_api_key"}})

        page.route("**/v1/**", answer)

    made = opened(fails="401", before=guard)
    typed = made.page.get_by_label("API key")
    typed.wait_for()
    made.check()
    typed.fill("wrong")
    typed.press("Enter")
    made.page.get_by_role("alert").get_by_text("does not know this key").wait_for()
    typed.fill("the-key")
    typed.press("Enter")
    made.pick("mood")
    assert typed.is_hidden()
    made.answer(x="good")
    assert sent == [None, "Bearer wrong", "Bearer the-key", "Bearer the-key"]
    assert "$PTUNING_KEY" in made.page.locator("#code").text_content()
    assert "the-key" not in made.page.url + made.page.content()
    assert made.page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0


@in_a_browser
def test_a_full_queue_is_waited_for(opened: Callable[..., Opened]) -> None:
    made = opened(fails="429", before=lambda page: page.clock.install())
    made.pick("mood")
    error = {"error": {"message": "the queue is full", "code": "rate_limit_exceeded"}}
    made.page.route("**/v1/predict", lambda route: route.fulfill(status=429, headers={"Retry-After": "2"}, json=error))
    made.field("x").fill("good")
    made.field("x").press("Enter")
    made.page.get_by_role("alert").get_by_text("Ask again in 2 seconds").wait_for()
    made.field("x").press("Enter")  # too early: nothing is sent
    assert len(made.asked) == 1
    made.page.unroute("**/v1/predict")
    made.page.clock.run_for(2_000)
    made.page.get_by_role("alert").get_by_text("may have room").wait_for()
    made.answer(x="good")
    assert made.page.locator("#notice").is_hidden()


@in_a_browser
def test_a_server_that_is_gone_is_looked_for(opened: Callable[..., Opened]) -> None:
    made = opened(fails="ERR_", before=lambda page: page.clock.install())
    made.pick("mood")
    made.page.route("**/*", lambda route: route.abort())
    made.field("x").fill("good")
    made.field("x").press("Enter")
    made.page.get_by_role("alert").get_by_text("does not answer").wait_for()
    made.check()
    made.page.unroute("**/*")
    made.page.clock.run_for(3_000)
    made.page.get_by_role("alert").wait_for(state="hidden")
    assert made.field("x").input_value() == "good"
    made.answer()


@in_a_browser
def test_it_says_what_is_missing_while_nothing_is_chosen_or_there(opened: Callable[..., Opened]) -> None:
    made = opened()
    made.pick()
    assert "Nothing is chosen" in made.page.locator("#cards").text_content()
    made.check()
    made.page.get_by_role("button", name="Answer").click()
    assert made.page.get_by_role("alert").text_content() == "Choose a prompt first."
    made.pick("mood")
    made.page.get_by_role("button", name="Answer").click()
    assert "Type something" in made.page.get_by_role("alert").text_content()
    assert made.page.evaluate("document.activeElement.dataset.column") == "x"
    assert made.asked == []
    base = {"data": [{"id": "tiny", "parent": None}]}
    none = opened(before=lambda page: page.route("**/v1/models", lambda route: route.fulfill(json=base)))
    none.page.get_by_text("No prompts are in service yet.").wait_for()
    none.check()


@in_a_browser
def test_many_prompts_are_found_by_their_names(opened: Callable[..., Opened]) -> None:
    def many(page: Any) -> None:
        def answer(route: Any) -> None:
            found = route.fetch().json()
            mood = next(one for one in found["data"] if one["id"] == "mood")
            found["data"] += [{**mood, "id": f"team/mood-{number}", "manual": None} for number in range(300)]
            route.fulfill(json=found)

        page.route("**/v1/models", answer)

    made = opened(390, before=many)
    made.page.get_by_label("Find a prompt").fill("mood-27")
    shown = made.page.locator("#list .pick:visible")
    assert shown.count() == 11
    made.check()
