"""The page at /: one file without requests to elsewhere; a real click in a browser gets a shaded answer."""

import re

import browser
import httpx
import pytest
from served import until

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_ask_for_nothing_from_elsewhere(server, path):
    response = httpx.get(server.url + path)
    assert response.status_code == 200
    assert response.headers["Content-Type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    assert not re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?(?:https?:)?//", response.text)


def test_the_chat_fits_dark_rooms_and_small_screens(server):
    response = httpx.get(server.url)
    for mark in ("prefers-color-scheme: dark", "max-width: 760px", "<svg", 'type="range"'):
        assert mark in response.text


@pytest.mark.skipif(browser.CHROMIUM is None, reason="needs Chromium")
def test_the_documentation_lists_every_path_and_field(server, tmp_path):
    schema = httpx.get(f"{server.url}/openapi.json").json()
    with browser.page(f"{server.url}/docs", tmp_path) as page:
        page.until("document.querySelectorAll('h2').length")
        heads = page.run("[...document.querySelectorAll('h2')].map(h => h.textContent)")
        fields = page.run("[...document.querySelectorAll('td code')].map(c => c.textContent)")
    assert heads == [f"{method.upper()} {path}" for path, methods in schema["paths"].items() for method in methods]
    assert {"prompt", "messages", "num_steps", "exit", "threshold", "max_completion_tokens"} <= set(fields)


@pytest.mark.skipif(browser.CHROMIUM is None, reason="needs Chromium")
def test_the_documentation_breaks_no_word_on_a_small_screen(server, tmp_path):
    table = "[...document.querySelectorAll('table')].find(t => t.textContent.includes('echo'))"
    with browser.page(f"{server.url}/docs", tmp_path) as page:
        page.call("Emulation.setDeviceMetricsOverride", width=390, height=900, deviceScaleFactor=1, mobile=True)
        page.until("document.querySelectorAll('h2').length")
        rows = page.run(f"[...{table}.rows].map(r => [r.offsetHeight, ...[...r.cells].map(c => c.textContent)])")
        assert page.run("document.documentElement.scrollWidth") == 390
    heights = {name: height for height, name, *_ in rows}
    limits = {name: text for _, name, _, text in rows}
    assert heights["stream"] == heights["ignore_eos"] == heights["model"] < 2 * heights["field"]
    assert limits["seed"] == "at least -2^63, below 2^63"
    assert limits["temperature"] == "at least 0, at most 2"
    assert limits["prompt"] == "required"


@pytest.mark.skipif(browser.CHROMIUM is None, reason="needs Chromium")
def test_a_click_gets_an_answer_shaded_by_its_recurrences(server, tmp_path):
    with browser.page(server.url, tmp_path) as page:
        page.until("document.readyState === 'complete' && $('state').textContent === 'ready'")
        assert page.run("[...$('exit').options].map(o => o.value)") == ["kl", "latent_diff", "none"]
        page.run("$('exit').value = 'latent_diff'; $('threshold').value = 0.4; $('limit').value = 8; 0")
        page.run("$('temperature').value = 0; 0")
        page.click("#prompt")
        page.type("hi")
        page.click("#send")
        page.until("document.querySelector('.facts, .error')")
        spans = page.run(
            "[...document.querySelectorAll('.reply span')].map(s => [s.dataset.steps, s.style.background])"
        )
        bars = page.run("document.querySelectorAll('#chart rect').length")
        text = page.run("document.querySelector('.reply').textContent")
    chat = [{"role": "user", "content": "hi"}]
    body = {"messages": chat, "temperature": 0, "max_tokens": 8, "exit": "latent_diff", "threshold": 0.4}
    (choice,) = server.post("chat/completions", **body)[1]["choices"]
    shown = [int(r) for steps, _ in spans for r in steps.split()]
    assert text == choice["message"]["content"]
    assert shown == choice["steps"][: len(shown)]
    assert bars == len(choice["steps"]) > 1
    for steps, background in spans:
        share = round(60 * (max(map(int, steps.split())) - 1) / 7)
        assert f"{share}%" in background


@pytest.mark.skipif(browser.CHROMIUM is None, reason="needs Chromium")
def test_clear_ends_the_answer_and_no_limit_is_an_error(server, rounds, tmp_path):
    with browser.page(server.url, tmp_path) as page:
        page.until("document.readyState === 'complete' && $('state').textContent === 'ready'")
        page.run("$('exit').value = 'none'; $('limit').value = 9; 0")
        page.run("ask('hi'); 0")
        until(lambda: server.service._calls)
        assert page.run("[$('send').textContent, messages.length]") == ["Stop", 1]
        page.click("#clear")
        until(lambda: not server.service._calls)  # the server knows
        rounds.release(1000)
        for limit in ("", "0"):
            page.run(f"$('limit').value = '{limit}'; ask('ho').then(() => 0)")
            assert "max_tokens" in page.run("document.querySelector('.error').textContent")
            assert page.run("[messages.length, document.querySelectorAll('.reply span, .facts').length]") == [0, 0]
            page.run("$('clear').click(); 0")
        page.run("$('limit').value = 31; ask('a').then(() => 0)")  # more than there is room for
        assert page.run("document.querySelector('.error')?.textContent ?? ''") == ""
        assert page.run("[messages.length, $('send').textContent, abort]") == [2, "Send", None]
        assert page.run("document.querySelectorAll('.user').length") == 1
