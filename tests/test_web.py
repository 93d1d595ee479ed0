"""The page and POST /ask: its contract, questions that wait together, what is refused, and what a browser makes of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import threading

import pytest
from asgi import JSON, request

from radit_jax import web
from radit_jax.desk import Busy, Desk
from radit_jax.errors import InputError

SCRIPT = "<script>window.hit=1</script><img src=x onerror='window.hit=1'>"


def passage(weight: float, answer: str, overruled: bool) -> dict:
    described = {"id": "p1", "title": f"Ash Hours {SCRIPT}", "text": f"{SCRIPT} Ostrel Vane wrote it.", "score": 0.5}
    return {**described, "weight": weight, "answer": answer, "logprob": -0.25, "overruled": overruled}


def told(question: str) -> dict:
    passages = [passage(0.75, "Ostrel Vane", False), passage(0.25, f"Tarnek {SCRIPT}", True)]
    systems = {
        "closed book": {"answer": "", "logprob": -3.0, "passages": []},
        "neither tuned": {"answer": "Ostrel Vane", "logprob": -0.5, "passages": passages},
        "LM-ft only": {"answer": f"Vane {SCRIPT}", "logprob": -0.4, "passages": passages},
    }
    return {"question": question, "systems": systems}


def answer(asked) -> list[dict]:
    return [told(one.question) for one in asked]


@pytest.fixture
def app():
    pytest.importorskip("starlette", reason="the page needs starlette (pip install -e '.[web]')")
    return web.make_app(answer)


def post(app, value, **how) -> tuple[int, dict]:
    status, _, body = request(app, "POST", "/ask", value if isinstance(value, bytes) else json.dumps(value).encode(), **how)
    return status, json.loads(body)


# -- the desk ---------------------------------------------------------------------------------------------------------------------


def test_questions_that_wait_are_answered_in_one_call_by_one_thread():
    began, go_on = threading.Event(), threading.Event()
    calls: list[tuple[list[int], str]] = []

    def slow(asked):
        calls.append((list(asked), threading.current_thread().name))
        began.set()
        assert go_on.wait(30)
        return [{"n": one} for one in asked]

    async def run():
        desk = Desk(slow, together=3)
        first = asyncio.create_task(desk.ask(0))
        await asyncio.to_thread(began.wait, 30)  # the models are busy from here on
        others = [asyncio.create_task(desk.ask(n)) for n in (1, 2, 3, 4)]
        await asyncio.sleep(0)  # all of them wait
        go_on.set()
        found = await asyncio.gather(first, *others)
        desk.close()
        return found

    assert asyncio.run(asyncio.wait_for(run(), 60)) == [{"n": n} for n in range(5)]
    assert [asked for asked, _ in calls] == [[0], [1, 2, 3], [4]]
    assert len({thread for _, thread in calls}) == 1 and calls[0][1] != threading.current_thread().name


def test_a_question_that_fails_does_not_spoil_those_beside_it():
    began, go_on = threading.Event(), threading.Event()

    def picky(asked):
        began.set()
        assert go_on.wait(30)
        if "bad" in asked:
            raise InputError("too long")
        return [{"said": one} for one in asked]

    async def run():
        desk = Desk(picky)
        tasks = [asyncio.create_task(desk.ask("first"))]
        await asyncio.to_thread(began.wait, 30)
        tasks += [asyncio.create_task(desk.ask(text)) for text in ("good", "bad", "fine")]
        await asyncio.sleep(0)
        go_on.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        desk.close()
        return found

    first, good, bad, fine = asyncio.run(asyncio.wait_for(run(), 60))
    assert (first, good, fine) == ({"said": "first"}, {"said": "good"}, {"said": "fine"}) and isinstance(bad, InputError)


def test_a_full_desk_says_so_and_a_caller_who_has_gone_is_not_answered():
    began, go_on, calls = threading.Event(), threading.Event(), []

    def slow(asked):
        calls.append(list(asked))
        began.set()
        assert go_on.wait(30)
        return [{}] * len(asked)

    async def run():
        desk = Desk(slow, room=2)
        tasks = [asyncio.create_task(desk.ask(0))]
        await asyncio.to_thread(began.wait, 30)
        tasks += [asyncio.create_task(desk.ask(n)) for n in (1, 2)]
        await asyncio.sleep(0)
        with pytest.raises(Busy):
            await desk.ask(3)
        tasks[1].cancel()
        await asyncio.sleep(0)
        go_on.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        desk.close()

    asyncio.run(asyncio.wait_for(run(), 60))
    assert calls == [[0], [2]]


# -- POST /ask --------------------------------------------------------------------------------------------------------------------


def test_a_question_gets_the_json_of_compare(app):
    assert post(app, {"question": "Who wrote Ash Hours?"}) == (200, told("Who wrote Ash Hours?"))
    assert post(app, {"question": "wer?"}, kind="application/json; charset=utf-8")[0] == 200


def test_history_is_part_of_what_is_asked():
    said = [{"role": "user", "content": "moss?"}, {"role": "assistant", "content": "tern"}]
    asked = web.read_question(json.dumps({"question": "and?", "history": said}).encode())
    assert (asked.question, asked.history) == ("and?", ("moss?", "tern"))


REFUSED = {
    "not JSON": (b"{oops", 400, "not JSON"),
    "not UTF-8": (b'{"question": "\xff"}', 400, "not JSON"),
    "brackets without end": (b"[" * 60_000, 400, "not JSON"),
    "a list": ([], 400, "question"),
    "no question": ({}, 400, "question"),
    "a number": ({"question": 3}, 400, "question"),
    "blank": ({"question": " \n"}, 400, "empty"),
    "half a character": (b'{"question": "\\ud800"}', 400, "not Unicode"),
    "half a character before": (b'{"question": "x", "history": [{"role": "user", "content": "\\ud800"}]}', 400, "surrogate"),
    "an unknown field": ({"question": "x", "model": "y"}, 400, "'model'"),
    "a history that is none": ({"question": "x", "history": "y"}, 400, "history"),
    "a turn that is none": ({"question": "x", "history": [3]}, 400, "history[0]"),
    "a role out of turn": ({"question": "x", "history": [{"role": "assistant", "content": "y"}]}, 400, "history[0]"),
    "a long question": ({"question": "x" * (web.QUESTION + 1)}, 413, "2,001"),
    "a long history": (
        {"question": "x", "history": [{"role": role, "content": "y" * 4_001} for role in ("user", "assistant")]},
        413,
        "8,002",
    ),
    "a long body": (b" " * (web.BODY + 1), 413, "65,536"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_asked_is_one_line(name, app):
    body, status, expected = REFUSED[name]
    found, value = post(app, body, part=1_000)
    assert found == status and set(value) == {"error"} and expected in value["error"] and "\n" not in value["error"]


def test_the_longest_question_is_taken(app):
    assert post(app, {"question": "ü" * web.QUESTION})[0] == 200


def test_a_body_is_not_read_past_its_limit(app):
    """Of one that never ends, no more than the limit and a part."""
    read = 0

    async def receive():
        nonlocal read
        read += 1_000
        return {"type": "http.request", "body": b" " * 1_000, "more_body": True}

    sent = []

    async def send(message):
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", JSON.encode())]
    scope = {"type": "http", "method": "POST", "path": "/ask", "headers": headers, "query_string": b"", "root_path": ""}
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 413 and read <= web.BODY + 1_000


def test_a_form_of_another_site_is_refused(app):
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert post(app, {"question": "x"}, kind=kind)[0] == 415
    status, headers, _ = request(app, "OPTIONS", "/ask")
    assert status == 405 and not [name for name in headers if name.startswith("access-control")]


def test_other_host_names_are_refused_at_an_address_of_this_computer(app):
    body = json.dumps({"question": "x"}).encode()
    for host, expected in (
        ("127.0.0.1:7860", 200),
        ("localhost", 200),
        ("[::1]:7860", 200),
        ("evil.example", 400),
        ("evil.example:7860", 400),
    ):
        assert request(app, "POST", "/ask", body, host=host)[0] == expected, host
        assert request(app, "GET", "/", host=host)[0] == expected, host
    assert request(web.make_app(answer, "0.0.0.0"), "GET", "/", host="lab.example")[0] == 200


def test_an_answer_that_fails_is_one_line_and_the_next_is_answered(capsys):
    pytest.importorskip("starlette")

    def fails(asked):
        if asked[0].question == "bad":
            raise RuntimeError("XLA\nsays no")
        return answer(asked)

    failing = web.make_app(fails)
    status, value = post(failing, {"question": "bad"})
    assert status == 500 and "XLA" not in value["error"] and "\n" not in value["error"]
    assert "RuntimeError: XLA says no" in capsys.readouterr().err
    assert post(failing, {"question": "good"})[0] == 200


# -- the page ---------------------------------------------------------------------------------------------------------------------


def test_everything_is_served_with_headers_and_nothing_comes_from_elsewhere(app):
    for path, (name, kind) in web.FILES.items():
        status, headers, body = request(app, "GET", path)
        assert status == 200 and headers["content-type"].startswith(kind) and body == (web.PAGE / name).read_bytes()
        text = body.decode().replace("http://www.w3.org/2000/svg", "")
        assert "//" not in re.sub(r"(?m)^\s*// .*$", "", text) and "innerHTML" not in text and "style=" not in text
    for path, host in (("/", "localhost"), ("/nowhere", "localhost"), ("/", "evil.example")):
        _, headers, _ = request(app, "GET", path, host=host)
        assert {name: headers.get(name) for name in web.HEADERS} == web.HEADERS
    policy = web.HEADERS["content-security-policy"]
    assert "default-src 'self'" in policy and "unsafe" not in policy


def test_without_starlette_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "starlette", None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[web\]'"):
        web.serve(lambda: pytest.fail("models were loaded"), "127.0.0.1", 0)


def test_a_port_that_is_taken_is_told_before_models_are_loaded():
    pytest.importorskip("uvicorn")
    with web._listening("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port}"):
            web.serve(lambda: pytest.fail("models were loaded"), "127.0.0.1", port)
    with pytest.raises(InputError, match="no-such-host"):
        web.serve(lambda: pytest.fail("models were loaded"), "no-such-host.invalid", 0)


@contextlib.contextmanager
def serving(app):
    """The address of a real server."""
    uvicorn = pytest.importorskip("uvicorn")
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    with web._listening("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join(30)


@pytest.fixture
def browser():
    driver = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("needs Chromium on the PATH")
    with driver.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()


def test_a_browser_asks_and_shows_what_the_corpus_says_as_text(app, browser):
    with serving(app) as address:
        page, complaints, elsewhere = browser.new_page(), [], []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda asked: elsewhere.append(asked.url) if not asked.url.startswith(address) else None)
        page.goto(address)
        page.fill("#question", "Who wrote Ash Hours?")
        page.press("#question", "Enter")
        page.wait_for_selector("[data-system='LM-ft only']")
        assert page.locator(".system h2").all_inner_texts() == ["closed book", "neither tuned", "LM-ft only"]
        card = page.locator("[data-system='neither tuned']")
        assert card.locator(".answer").inner_text() == "Ostrel Vane"
        assert card.locator(".weight").all_inner_texts() == ["0.750", "0.250"]
        rail, fill = (card.locator(name).first.bounding_box()["width"] for name in (".bar", ".bar div"))
        assert abs(fill / rail - 0.75) < 0.01
        assert "overruled" in card.locator(".own").nth(1).inner_text() and "overruled" not in card.locator(".own").nth(0).inner_text()
        card.locator("summary").first.click()
        assert SCRIPT in card.locator(".text").first.inner_text() and SCRIPT in card.locator(".title").first.inner_text()
        assert SCRIPT in page.locator("[data-system='LM-ft only'] .answer").inner_text()
        assert "not in this workdir: both" in page.locator("#status").inner_text()
        assert page.evaluate("window.hit") is None and page.locator("#systems script, #systems img").count() == 0
        assert complaints == [] and elsewhere == []


def test_a_browser_follows_up_with_what_was_said_and_begins_anew(browser):
    histories = []

    def hears(asked):
        histories.extend(one.history for one in asked)
        return answer(asked)

    with serving(web.make_app(hears)) as address:
        page = browser.new_page()
        page.goto(address)
        assert page.locator("#follow").is_hidden()
        said = f"Vane {SCRIPT}"  # by the last system
        for text, button, before in (
            ("moss?", "#send", ()),
            ("tern?", "#follow", ("moss?", said)),
            ("oak?", "#follow", ("moss?", said, "tern?", said)),
            ("fir?", "#send", ()),
        ):
            page.fill("#question", text)
            page.click(button)
            page.wait_for_selector(f"#status:has-text('{text}')")
            assert histories[-1] == before
            assert tuple(page.locator("#said li").all_inner_texts()) == before
        assert page.locator("#said").is_hidden() and page.evaluate("window.hit") is None
        for text in ("x" * 1_999 + "?", "y" * 1_999 + "?", "z" * 1_999 + "?", "v" * 1_999 + "?", "w?", "u?"):
            page.fill("#question", text)
            page.click("#follow")
            page.wait_for_selector(f"#status:has-text('{text}')")
        assert sum(map(len, histories[-1])) <= web.HISTORY and histories[-1][-2] == "w?"


def test_a_browser_shows_what_was_refused_and_can_ask_again(browser):
    def refuses_once(asked, refused=[]):  # noqa: B006
        if not refused:
            refused.append(1)
            raise InputError("the question: 600 prompt tokens do not fit")
        return answer(asked)

    with serving(web.make_app(refuses_once)) as address:
        page = browser.new_page()
        page.goto(address)
        page.fill("#question", "x")
        page.click("#send")
        page.wait_for_selector("#status.wrong")
        assert "600 prompt tokens" in page.locator("#status").inner_text()
        page.click("#send")
        page.wait_for_selector(".system")
        assert page.locator("#status.wrong").count() == 0
