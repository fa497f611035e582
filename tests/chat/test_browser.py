"""The chat's page in a real browser; skipped where there is none."""

import threading

import pytest
from browser import Watched

from fusion.chat.speaker import speakers
from fusion.chat.web import make_server


@pytest.fixture
def served(tiny_pivot, tiny_source):
    pair = speakers([tiny_pivot.path, tiny_source.path], max_new_tokens=12)
    server = make_server(pair, 0)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield pair, f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_talk_in_the_browser(browser, served):
    """A question with markup goes to both models, both answers appear as text, a new talk forgets them."""
    pair, address = served
    watched = Watched(browser.new_page())
    page = watched.page
    page.goto(address)
    for turn in ("1", "2"):
        page.fill("#question", "say <b>river</b>")
        page.keyboard.press("Enter")
        done = f'section[data-answers="{turn}"]'
        page.wait_for_selector(f"{done} ~ {done}")
    shown = [one.text_content().strip() for one in page.query_selector_all(".model")]
    assert page.query_selector_all(".user b") == []
    said = [message.content for one in pair for message in one.messages if message.role == "assistant"]
    assert shown == said
    page.click("#new")
    page.wait_for_selector(".model", state="detached")
    assert watched.complaints == []
    assert all(one.messages == [] for one in pair)
