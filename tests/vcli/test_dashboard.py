"""The page at `/`, driven in a real browser while clients load the server."""

import contextlib
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.vcli.conftest import Server, StartServer, free_port

playwright = pytest.importorskip("playwright.sync_api", reason="drives the page")
expect = playwright.expect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NAME = "gpu-box"  # of this machine
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    f"--host-resolver-rules=MAP {NAME} 127.0.0.1",
)
KEYS = '[acme]\nkeys = ["acme-key-1"]\n[ops]\nkeys = ["the-admins-key"]\nis_admin = true\n'
NUM_PLACES = 4
WATCH_ANSWERS = """() => {
    window.seen = new Set();
    const note = () => document.querySelectorAll("#chat .answer").forEach((answer) => seen.add(answer.textContent));
    new MutationObserver(note).observe(document.querySelector("#chat"), {childList: true, subtree: true});
}"""
OpenPage = Callable[..., "playwright.Page"]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    with playwright.sync_playwright() as driver:
        expect.set_options(timeout=20_000)  # ms: busy machines
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: "playwright.Browser") -> Iterator[OpenPage]:
    """open_page(server, width, scheme): the page, on which nothing may go wrong."""
    pages, complaints = [], []

    def open_page(server: Server, width: int = 1440, scheme: str = "light") -> "playwright.Page":
        page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if "Security Policy" in message.text else 0)
        page.on("request", lambda request: complaints.append(request.url) if server.url not in request.url else 0)
        page.goto(server.url)
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert not complaints


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> Server:
    return start_server("--max-num-seqs", str(NUM_PLACES), FAKE_STEP_S="0.02").wait_ready()


@contextlib.contextmanager
def load(server: Server, num_clients: int) -> Iterator[None]:
    """So many clients, each of which asks again as soon as it is answered."""
    is_over = threading.Event()

    def ask() -> None:
        body = {"prompt": [5, 6, 7], "max_tokens": 40}
        with httpx.Client(base_url=server.url, timeout=60) as client:
            while not is_over.is_set():
                client.post("/v1/completions", json=body).raise_for_status()

    clients = [threading.Thread(target=ask) for _ in range(num_clients)]
    for client in clients:
        client.start()
    try:
        yield
    finally:
        is_over.set()
        for client in clients:
            client.join()


def value(page: "playwright.Page", card: str, name: str) -> "playwright.Locator":
    return page.locator(f"#{card} [data-value={name}]")


def test_numbers_move_under_load(server, open_page):
    page = open_page(server)
    expect(page.locator("#status")).to_have_text("ready")
    with load(server, NUM_PLACES + 2):
        expect(value(page, "requests", "running")).to_have_text(str(NUM_PLACES))
        expect(value(page, "requests", "waiting")).to_have_text("2")
        for card in ("ttft", "itl"):
            for name in ("p50", "p95", "p99"):
                expect(value(page, card, name)).to_contain_text("s")
        expect(value(page, "throughput", "generated")).not_to_have_text("0")
        expect(page.locator("#kv canvas")).to_have_attribute("aria-label", "0 of 1,024 KV blocks are in use")
        expect(page.locator("#memory")).to_contain_text("weights6 GiB")
        expect(page.locator("#memory")).to_contain_text("fragmentation25 %")
        curve = page.locator("#throughput .curve")
        before = curve.get_attribute("d")
        expect(curve).not_to_have_attribute("d", before)
    expect(value(page, "requests", "running")).to_have_text("0")


def test_what_was_before_the_page_was_opened_is_on_it(server, open_page):
    with load(server, 1):
        server.wait_until(lambda: server.metric("vcli:request_success_total") > 0)
    page = open_page(server)
    expect(page.locator(".waterfalls li")).not_to_have_count(0)
    assert page.locator("#itl .curve.s0").get_attribute("d").count("L") > 0, "a line, not a point"


def test_a_waterfall_opens_and_holds_still(server, open_page):
    page = open_page(server)
    with load(server, NUM_PLACES + 2):
        first = page.locator(".waterfalls li").first
        first.locator("button").click()
        expect(first.locator("button")).to_have_attribute("aria-expanded", "true")
        expect(first.locator(".detail")).to_contain_text("prefill")
        expect(first.locator(".detail")).to_contain_text("3 tokens, 1 of them cached")
        sizes = [bar.bounding_box()["width"] for bar in first.locator(".track i").all()]
        assert sum(sizes) > 0.9 * first.locator(".track").bounding_box()["width"], "the slowest fills its row"
        first.locator("button").click()
        expect(first.locator(".detail")).to_be_hidden()


def test_the_chat_streams_and_can_be_stopped(server, open_page):
    page = open_page(server)
    page.evaluate(WATCH_ANSWERS)
    words = "one two three four five six"
    page.fill("#chat textarea", words)
    page.keyboard.press("Enter")
    answer = page.locator("#chat .answer")
    expect(answer).to_contain_text(words)
    assert page.evaluate("seen.size") > 3, "it comes piece by piece"
    expect(page.locator("#chat .log")).to_contain_text("first token after")

    page.get_by_role("button", name="Clear").click()
    expect(answer).to_have_count(0)
    page.fill("#chat textarea", "again " * 40)
    page.keyboard.press("Enter")
    expect(answer).to_contain_text("again")
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    server.wait_until(lambda: server.metric("vcli:num_requests_running") == 0)


@pytest.mark.parametrize("width", [390, 1440])
def test_light_and_dark_on_a_phone_and_on_a_desk(server, open_page, width):
    backgrounds = set()
    for scheme in ("light", "dark"):
        page = open_page(server, width, scheme)
        expect(page.locator("#status")).to_have_text("ready")
        assert page.evaluate("document.documentElement.scrollWidth") == width, "nothing sticks out"
        backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(backgrounds) == 2


def test_an_engine_that_ends_is_seen(server, open_page):
    page = open_page(server)
    restarts = page.locator("#memory li", has_text="engine restarts").locator("b")
    expect(restarts).to_have_text("0")
    server.engine.send_signal(signal.SIGKILL)
    expect(restarts).to_have_text("1")
    expect(page.locator("#status")).to_have_text("ready")


def test_by_a_name_the_page_shows_and_does_not_ask(server, open_page):
    """Whose name it is nobody knows (DNS rebinding), unless --allowed-origins says so."""
    page = open_page(Server(server.process, server.url.replace("127.0.0.1", NAME), server.log_file))
    expect(page.locator("#status")).to_have_text("ready")
    page.fill("#chat textarea", "hello")
    page.keyboard.press("Enter")
    expect(page.locator("#chat .failed")).to_contain_text("--allowed-origins")


def test_the_page_asks_for_a_key_and_tells_an_admins_figures_to_admins(start_server, open_page, tmp_path: Path):
    keys = tmp_path / "keys.toml"
    keys.write_text(KEYS)
    admin_port = free_port()
    server = start_server("--api-key-file", str(keys), "--admin-address", str(admin_port)).wait_ready()
    page = open_page(server)

    def give(page: "playwright.Page", key: str) -> None:
        page.fill("#key-input", key)
        page.keyboard.press("Enter")

    expect(page.locator("#key")).to_contain_text("asks for an API key")
    expect(page.locator("main")).to_be_hidden()
    give(page, "acme-key-1")
    expect(page.locator("#key")).to_contain_text("shown to admins")
    expect(page.locator("#throughput")).to_be_hidden()
    page.fill("#chat textarea", "hello")
    page.keyboard.press("Enter")
    expect(page.locator("#chat .answer")).to_contain_text("hello")
    give(page, "the-admins-key")
    expect(page.locator("#status")).to_have_text("ready")
    expect(page.locator("#key")).to_be_hidden()

    admins = open_page(Server(server.process, f"http://127.0.0.1:{admin_port}", server.log_file))
    give(admins, "the-admins-key")
    expect(admins.locator("#status")).to_have_text("ready")
    admins.reload()
    expect(admins.locator("#throughput")).to_be_visible()
    expect(admins.locator("#chat")).to_be_hidden()
    assert server.end() == 0, "an open page holds nothing up"
    expect(page.locator("#status")).to_have_text("no connection")
