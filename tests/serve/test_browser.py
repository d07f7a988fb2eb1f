"""The page at /: one file without requests to elsewhere; a real click in a browser gets a shaded answer."""

import re

import browser
import httpx
import pytest

pytestmark = pytest.mark.slow


def test_it_asks_for_nothing_from_elsewhere(server):
    response = httpx.get(server.url)
    assert response.status_code == 200
    assert response.headers["Content-Type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    assert not re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?(?:https?:)?//", response.text)
    for mark in ("prefers-color-scheme: dark", "max-width: 760px", "<svg", 'type="range"'):
        assert mark in response.text


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
