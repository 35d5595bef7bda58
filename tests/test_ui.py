"""The chat page in a real Chromium, against a server with scripted replies."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers import ROOT

from nanochat.pages import html_page

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (uv pip install playwright)")
expect = playwright.expect
pytestmark = pytest.mark.slow

UI = ROOT / "nanochat" / "serve" / "ui.html"
HTML = html_page("ui.html")
PHONE = {"viewport": {"width": 375, "height": 667}, "is_mobile": True, "has_touch": True}
LAST = "#log article:last-child "


def inline_source(tag):
    (source,) = re.findall(f"<{tag}>(.*?)</{tag}>", HTML, re.S)
    return source


def csp():
    def sha256(tag):
        return base64.b64encode(hashlib.sha256(inline_source(tag).encode()).digest()).decode()

    return (
        f"default-src 'none'; script-src 'sha256-{sha256('script')}'; style-src 'sha256-{sha256('style')}'; "
        "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def sse(data):
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


def delta(content=None, finish=None, **fields):
    fields |= {} if content is None else {"content": content}
    return sse({"choices": [{"index": 0, "delta": fields, "finish_reason": finish}], "usage": None})


def ending(finish="stop", tokens=12):
    usage = {"prompt_tokens": 30, "completion_tokens": tokens, "total_tokens": 30 + tokens}
    return [delta(finish=finish), sse({"choices": [], "usage": usage}), b"data: [DONE]\n\n"]


def says(*pieces):
    return [delta("", role="assistant"), *map(delta, pieces), *ending()]


class Server(ThreadingHTTPServer):
    """Answers every chat with the pieces that `reply(body)` yields, one write for each, and records the requests."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/"
        self.ready, self.key, self.refusals, self.headers = True, None, [], {}
        self.models = [{"id": "nanochat-d4-sft", "context_length": 512}]
        self.chats = []  # bodies of the chat requests
        self.go, self.gone = threading.Event(), threading.Event()  # the reply may go on; the client has disconnected
        self.reply = lambda body: says(f"Answer {len(self.chats)}.")


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def send(self, status, body, content_type="application/json", headers=()):
        self.send_response(status)
        for name, value in {"Content-Type": content_type, **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

    def refused(self):
        if self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            self.send(401, {"error": {"message": "no key", "type": "authentication_error"}})
        elif not self.server.ready:
            self.send(503, {"error": {"message": "loading"}}, headers={"Retry-After": "1"})
        else:
            return False
        return True

    def do_GET(self):
        if self.path == "/":
            page_headers = {"Content-Security-Policy": csp()}
            self.send(200, HTML.encode(), "text/html; charset=utf-8", page_headers)
        elif self.path == "/logo.svg":
            self.send(200, UI.with_name("logo.svg").read_bytes(), "image/svg+xml")
        elif self.path == "/health":
            ready = self.server.ready
            state = {"status": "ok" if ready else "loading", "ready": ready}
            self.send(200 if ready else 503, state, headers={"Retry-After": "1"})
        elif not self.refused():
            self.send(200, {"object": "list", "data": self.server.models})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.chats.append(body)
        if self.refused():
            return
        if self.server.refusals:
            status, error = self.server.refusals.pop(0)
            self.send(status, {"error": error}, headers={"Retry-After": "1"})
            return
        try:
            self.send(200, b"", "text/event-stream", self.server.headers)
            for piece in self.server.reply(body):
                self.wfile.write(piece)
        except (BrokenPipeError, ConnectionResetError):
            self.server.gone.set()


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.go.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def new_context(browser, server):
    """new_context(**options) opens a browser context; fails on script errors, dialogs and requests to other origins."""
    contexts, problems, addresses = [], [], []

    def watch(page):
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda line: "Content Security" in line.text and problems.append(line.text))

        def refuse(dialog):
            problems.append(f"dialog: {dialog.message}")
            dialog.dismiss()

        page.on("dialog", refuse)

    def new_context(**options):
        context = browser.new_context(**options)
        context.set_default_timeout(10_000)
        context.on("page", watch)
        context.on("request", lambda request: addresses.append(request.url))
        contexts.append(context)
        return context

    yield new_context
    for context in contexts:
        context.close()
    assert problems == []
    assert [url for url in addresses if not url.startswith((server.url, f"blob:{server.url}"))] == []


@pytest.fixture
def open_page(new_context, server):
    def open_page(wait=True, **options):
        page = new_context(**options).new_page()
        page.goto(server.url)
        if wait:
            expect(page.locator("#server")).to_have_attribute("data-state", "ready")
        return page

    return open_page


@pytest.fixture
def page(open_page):
    return open_page()


def ask(page, text, wait=True):
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_role("button", name="Send").click()
    if wait:
        finished(page)


def finished(page):
    expect(page.get_by_role("log")).to_have_attribute("aria-busy", "false")


def messages(page):
    return page.locator("#log article .body").all_inner_texts()


def chat_titles(page):
    return page.locator("#chats button").all_inner_texts()


def render(page, text):
    """The HTML of an answer with this Markdown."""
    return page.evaluate("content => { const b = el('div'); renderAnswer(b, {content}); return b.innerHTML }", text)


def tab_to(page, name):
    """Press Tab until the button `name` has the focus."""
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.ariaLabel || document.activeElement.textContent") == name:
            return
    raise AssertionError(f"Tab never reaches {name!r}")


# ---- The file


def test_the_page_is_one_file_without_external_resources():
    assert HTML.count("<script") == HTML.count("<style") == 1
    assert inline_source("script") and inline_source("style")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", HTML)
    markup = re.sub(r"<(script|style)>.*?</\1>", "", HTML, flags=re.S)
    assert not re.search(r"\s(on\w+|style)\s*=", markup)
    assert set(re.findall(r'(?:src|href)="([^"]*)"', markup)) == {"logo.svg"}


# ---- Streaming


def test_an_answer_appears_while_it_streams(server, page):
    def reply(body):
        yield from [delta("", role="assistant"), delta("Hel"), b": keepalive\n\n", delta("lo **wor")]
        server.go.wait(10)
        yield from [delta("ld**"), *ending()]

    server.reply = reply
    ask(page, "hi", wait=False)
    expect(page.locator(LAST + ".body")).to_have_text("Hello **wor")
    expect(page.get_by_role("log")).to_have_attribute("aria-busy", "true")
    expect(page.get_by_role("status")).to_have_text("Answering")
    expect(page.get_by_role("button", name="Send")).to_be_hidden()
    server.go.set()
    expect(page.locator(LAST + "strong")).to_have_text("world")
    expect(page.get_by_role("status")).to_have_text("Done")
    expect(page.locator(LAST + ".note")).to_have_text(re.compile(r"12 tokens · [\d.]+ tokens/s · context 8 % full"))
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    assert server.chats == [
        {
            "messages": [{"role": "user", "content": "hi"}],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]


@pytest.mark.parametrize("way", ["button", "Escape"])
def test_stop_disconnects_and_the_answer_can_be_continued(way, server, page):
    def endless(body):
        yield delta("Once upon")
        while True:
            server.go.wait(0.01)
            yield b": keepalive\n\n"

    server.reply = endless
    ask(page, "a story", wait=False)
    expect(page.locator(LAST + ".body")).to_have_text("Once upon")
    page.get_by_role("button", name="Stop").click() if way == "button" else page.keyboard.press("Escape")
    finished(page)
    assert server.gone.wait(10)
    expect(page.get_by_role("status")).to_have_text("Stopped")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    server.reply = lambda body: says(" a time.")
    page.get_by_role("button", name="Continue").click()
    expect(page.locator(LAST + ".body")).to_have_text("Once upon a time.")
    assert server.chats[1]["messages"][-1] == {"role": "assistant", "content": "Once upon"}


def test_a_stream_may_arrive_byte_by_byte(server, page):
    text = "Grüße 👩‍🚀🎉 — 你好, data: not a frame\nend"
    stream = b": hello\r\n\r\n" + b"".join(says(text[:9], text[9:])).replace(b"\n", b"\r\n")
    server.reply = lambda body: (stream[i : i + 1] for i in range(len(stream)))
    ask(page, "hi")
    expect(page.locator(LAST + ".body")).to_have_text(text)
    alone = page.evaluate(
        """async bytes => {
            const body = new ReadableStream({start(controller) {
                for (const byte of bytes) controller.enqueue(new Uint8Array([byte]));
                controller.close();
            }});
            return Array.fromAsync(events(body));
        }""",
        list(stream),
    )
    content = [json.loads(data)["choices"] for data in alone[:-1]]
    assert "".join(choices[0]["delta"].get("content", "") for choices in content if choices) == text
    assert alone[-1] == "[DONE]"


def test_an_answer_goes_on_while_another_chat_is_open(server, page):
    def reply(body):
        yield delta("slow")
        server.go.wait(10)
        yield from [delta(" answer"), *ending()]

    server.reply = reply
    ask(page, "first", wait=False)
    expect(page.locator(LAST + ".body")).to_have_text("slow")
    page.keyboard.press("Control+Shift+O")
    server.reply = lambda body: says("quick answer")
    ask(page, "second")
    assert messages(page) == ["second", "quick answer"]
    server.go.set()
    page.get_by_role("button", name="first").click()
    expect(page.locator(LAST + ".body")).to_have_text("slow answer")
    finished(page)


# ---- Conversations


def test_conversations_survive_a_reload_and_a_server_that_is_down(server, page):
    ask(page, "one")
    page.get_by_role("button", name="New chat").click()
    ask(page, "two")
    page.reload()
    assert messages(page) == ["two", "Answer 2."] and chat_titles(page) == ["two", "one"]
    page.context.set_offline(True)
    page.get_by_role("button", name="one").click()
    assert messages(page) == ["one", "Answer 1."]
    ask(page, "more")
    expect(page.get_by_role("alert").filter(has_text="cannot be reached")).to_be_visible()
    expect(page.locator("#server")).to_contain_text("cannot be reached")
    page.context.set_offline(False)
    page.get_by_role("button", name="Retry").click()
    expect(page.locator(LAST + ".body")).to_have_text("Answer 3.")
    expect(page.locator("#server")).to_have_text("nanochat-d4-sft")
    assert [turn["content"] for turn in server.chats[-1]["messages"]] == ["one", "Answer 1.", "more"]


def test_half_an_answer_survives_a_reload(server, page):
    def reply(body):
        yield delta("Half of")
        server.go.wait(10)

    server.reply = reply
    ask(page, "hi", wait=False)
    expect(page.locator(LAST + ".body")).to_have_text("Half of")
    page.reload()
    assert messages(page) == ["hi", "Half of"]
    expect(page.locator(LAST + ".note")).to_have_text("Unfinished")


def test_rename_export_and_delete(page):
    ask(page, "hi")
    page.get_by_role("button", name="Rename chat").click()
    page.get_by_label("Title").fill("A greeting")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("A greeting")
    assert chat_titles(page) == ["A greeting"]
    with page.expect_download() as download:
        page.get_by_role("button", name="Export chat as JSON").click()
    assert download.value.suggested_filename == "A-greeting.json"
    exported = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    assert exported["title"] == "A greeting"
    assert exported["messages"] == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Answer 1."},
    ]
    page.get_by_role("button", name="Delete chat").click()
    page.get_by_role("button", name="Cancel").click()
    assert chat_titles(page) == ["A greeting"]
    page.get_by_role("button", name="Delete chat").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(page.locator("#chats button")).to_have_count(0)
    page.reload()
    assert chat_titles(page) == [] and messages(page) == []


def test_edit_and_regenerate_by_keyboard_keep_the_older_versions(server, page):
    keys = page.keyboard
    keys.type("one")
    keys.press("Shift+Enter")
    keys.type("more")
    keys.press("Enter")
    expect(page.locator(LAST + ".body")).to_have_text("Answer 1.")
    finished(page)
    page.get_by_role("log").focus()
    tab_to(page, "Regenerate")
    keys.press("Enter")
    expect(page.locator(LAST + ".body")).to_have_text("Answer 2.")
    finished(page)
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    page.get_by_role("log").focus()
    tab_to(page, "Previous version")
    keys.press("Enter")
    assert messages(page) == ["one\nmore", "Answer 1."]
    page.get_by_role("log").focus()
    tab_to(page, "Edit")
    keys.press("Enter")
    keys.press("Control+A")
    keys.type("two")
    keys.press("Enter")
    expect(page.locator(LAST + ".body")).to_have_text("Answer 3.")
    assert messages(page) == ["two", "Answer 3."]
    assert [chat["messages"] for chat in server.chats[1:]] == [
        [{"role": "user", "content": "one\nmore"}],
        [{"role": "user", "content": "two"}],
    ]
    page.get_by_role("log").focus()
    tab_to(page, "Previous version")
    keys.press("Enter")
    assert messages(page) == ["one\nmore", "Answer 2."]


def test_an_edit_can_be_canceled(server, page):
    ask(page, "one")
    page.locator("article.own").hover()
    page.get_by_role("button", name="Edit").click()
    page.keyboard.type("nothing")
    page.keyboard.press("Escape")
    assert messages(page) == ["one", "Answer 1."] and len(server.chats) == 1
    expect(page.get_by_label("Message", exact=True)).to_be_focused()


def test_two_tabs_do_not_overwrite_each_others_conversations(server, page):
    ask(page, "from the first tab")
    other = page.context.new_page()
    other.goto(server.url)
    ask(other, "from the second tab")
    expect(page.locator("#chats button")).to_have_count(2)
    other.get_by_role("button", name="from the first tab").click()

    # Both tabs now show the same chat. While the first tab gets an answer, the second one sends a message too.
    def reply(body):
        if body["messages"][-1]["content"] == "slow":
            yield delta("held")
            server.go.wait(10)
            yield from [delta(" back"), *ending()]
        else:
            yield from says("quick")

    server.reply = reply
    ask(page, "slow", wait=False)
    expect(page.locator(LAST + ".body")).to_have_text("held")
    expect(other.locator("#log article")).to_have_count(4)
    ask(other, "fast")
    server.go.set()
    finished(page)
    assert messages(page) == ["from the first tab", "Answer 1.", "slow", "held back"]
    assert messages(other)[-2:] == ["fast", "quick"]
    titles = ["from the first tab (copy)", "from the first tab", "from the second tab"]
    for tab in page, other:
        expect(tab.locator("#chats button")).to_have_text(titles)
        tab.reload()
        expect(tab.locator("#chats button")).to_have_text(titles)
    assert messages(page)[-1] == "held back" and messages(other)[-1] == "quick"
    # A chat that one tab deletes stays deleted, even if another tab is getting an answer in it.
    server.go.clear()
    ask(page, "slow", wait=False)
    expect(page.locator(LAST + ".body")).to_have_text("held")
    third = page.context.new_page()
    third.goto(page.url)
    third.get_by_role("button", name="Delete chat").click()
    third.get_by_role("button", name="Delete", exact=True).click()
    expect(page.get_by_role("heading", level=1)).to_have_text("New chat")
    server.go.set()
    page.reload()
    expect(page.locator("#chats button")).to_have_text(titles[1:])


def test_full_storage_is_reported_and_the_chat_goes_on(page):
    page.evaluate("localStorage.setItem('filler', 'x'.repeat(5 * 2 ** 20 - 200))")
    ask(page, "hi")
    expect(page.get_by_role("alert").filter(has_text="storage is full")).to_be_visible()
    assert messages(page) == ["hi", "Answer 1."]
    page.evaluate("localStorage.removeItem('filler')")
    ask(page, "again")
    expect(page.locator("#banner")).to_be_empty()
    page.reload()
    assert messages(page) == ["hi", "Answer 1.", "again", "Answer 2."]


# ---- Answers


def test_markdown(page):
    def check(text, *parts):
        html = render(page, text)
        for part in parts:
            assert part in html, html

    check("# One\n### Three ###x", "<h2>One</h2>", "<h4>Three ###x</h4>")
    check("a **b** *c* ***d*** __e__ ~~f~~", "<strong>b</strong>", "<em>c</em>", "<strong><em>d</em></strong>")
    check("snake_case_name 3*4*5 2 * 3 * 4 **open", "<p>snake_case_name 3*4*5 2 * 3 * 4 **open</p>")
    check("`a*b*` ``c`d`` `open \\*x\\*", "<code>a*b*</code>", "<code>c`d</code>", "`open *x*")
    check("1. a\n2. b\n   - c\n   - d\n\n3. e", "<ol", "<li><p>b</p><ul><li><p>c</p></li><li><p>d</p></li></ul></li>")
    check("3. c\n4. d", '<ol start="3"><li>')
    check("- a\n  goes on\n\n  and *more*\n\nend", "<p>a\ngoes on</p><p>and <em>more</em></p></li></ul><p>end</p>")
    check("> a\n> > b", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>")
    check("a\n***\nb", "<p>a</p><hr><p>b</p>")
    check("$a_1 * b_2$ and \\(x_1*y_1*\\)", '<span class="math">$a_1 * b_2$</span>', ">\\(x_1*y_1*\\)<")
    check("it costs $5 and $10", "<p>it costs $5 and $10</p>")
    check("$$\na_1\n$$\nend", '<p class="math">$$\na_1\n$$</p><p>end</p>')
    check("[a **b**](https://x.org/y_(z)_1)", 'href="https://x.org/y_(z)_1"', "<strong>b</strong></a>")
    check("see https://x.org/a_b_c.", 'href="https://x.org/a_b_c"', "</a>.")
    check("<mailto:me@x.org> a < b <b>", 'href="mailto:me@x.org"', " a &lt; b &lt;b&gt;")
    table = "| A | B |\n|:-:|--:|\n| `x` | \\|\n| 1 | 2 | 3 |"
    check(table, "<th", ">A</th>", "<td", "<code>x</code>", ">|</td>", ">2</td></tr></tbody>")
    assert "<table" not in render(page, "a | b\n---\nc")


@pytest.mark.parametrize("tail", ["", "\n```\nafter"])
def test_finished_and_unfinished_code_blocks(tail, page):
    html = render(page, "Look:\n```python\ndef f():\n\n    return '<b>' * 2 * 3" + tail)
    assert "<code>def f():\n\n    return '&lt;b&gt;' * 2 * 3</code></pre>" in html and ">python</span>" in html
    assert html.endswith("<p>after</p>" if tail else "</div>")


def test_finished_blocks_are_not_rebuilt_while_the_rest_streams(page):
    kept = page.evaluate(
        """() => {
            const body = el("div"), node = {content: "# Title\\n\\nfirst\\n\\nsec"};
            renderAnswer(body, node);
            const before = [...body.children];
            node.content += "ond\\n- item";
            renderAnswer(body, node);
            return [...body.children].map((child, i) => child === before[i]);
        }"""
    )
    assert kept == [True, True, False, False]


def test_copy_an_answer_and_a_code_block(server, open_page):
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    text = "Do *this*:\n```sh\nls -l\n```"
    server.reply = lambda body: says(text)
    ask(page, "hi")
    for name, copied in (("Copy code", "ls -l"), ("Copy", text)):
        page.locator("article").last.get_by_role("button", name=name, exact=True).click()
        expect(page.get_by_role("status")).to_have_text("Copied")
        assert page.evaluate("navigator.clipboard.readText()") == copied
        page.evaluate("announce('')")


def test_tool_calls_are_shown_at_their_position(server, page):
    first, second = "🎉 Twelve apples: ", "84 dollars.\n\n- and that: "
    steps = [
        {"type": "calculator", "expression": "12*7", "result": "84", "position": len(first)},
        {"type": "calculator", "expression": "<b>1/0</b>", "result": None, "position": len(first + second)},
    ]
    pieces = [delta(first), delta(tool_steps=steps[:1]), delta(second), delta(tool_steps=steps[1:])]
    server.reply = lambda body: [*pieces, delta("nothing \U000f0000"), *ending()]
    ask(page, "hi")
    for _ in range(2):
        expect(page.locator(LAST + "p").first).to_have_text("🎉 Twelve apples: calculator: 12*7→ 8484 dollars.")
        expect(page.locator(LAST + "li .tool")).to_have_text("calculator: <b>1/0</b>→ no result")
        expect(page.locator(LAST + "li")).to_contain_text("nothing \ufffd")
        expect(page.locator(LAST + ".tool")).to_have_count(2)
        page.reload()


XSS = [
    "<script>window.__pwned=1</script>",
    "<img src=x onerror=window.__pwned=1>",
    "<svg/onload=window.__pwned=1><svg><script>window.__pwned=1</script>",
    '<iframe srcdoc="<script>parent.__pwned=1</script>"',
    "<iframe src=javascript:parent.__pwned=1></iframe>",
    "[a](javascript:window.__pwned=1) [b](JaVaScRiPt:window.__pwned=1) [c](java\tscript:window.__pwned=1)",
    "[d](data:text/html;base64,PHNjcmlwdD4=) [e](vbscript:x) [f](//evil.example/x) [g](&#106;avascript:alert(1))",
    "![x](https://evil.example/pixel.png) ![x](javascript:window.__pwned=1) <javascript:window.__pwned=1>",
    '[h](https://evil.example/"onmouseover="window.__pwned=1) [i](<https://evil.example/> "t" onclick=x)',
    "[<img src=x onerror=window.__pwned=1>](https://evil.example) [j][k]\n\n[k]: javascript:window.__pwned=1",
    "`<img src=x onerror=window.__pwned=1>` **<b onclick=window.__pwned=1>x</b>**",
    "```<img src=x onerror=window.__pwned=1>\n</code></pre><script>window.__pwned=1</script>",
    '```"><script>window.__pwned=1</script>\nx\n```',
    "| <img src=x onerror=window.__pwned=1> | [a](javascript:1) |\n|-|-|\n| <script>window.__pwned=1</script> | b",
    "> - <details open ontoggle=window.__pwned=1>\n<form action=javascript:1><input onfocus=window.__pwned=1 autofocus",
    "<math><mtext><style><img src onerror=window.__pwned=1></style> <base href=https://evil.example/> <meta refresh>",
    "$<img src=x onerror=window.__pwned=1>$ \\(<script>window.__pwned=1</script>\\) \\<img src=x\\>",
    "<a href=https://evil.example style=position:fixed>x</a> <link rel=stylesheet href=https://evil.example/x.css>",
    "&lt;script&gt;window.__pwned=1&lt;/script&gt; \\u003cscript>window.__pwned=1</script> {{constructor}} ${alert(1)}",
    "<!--><img src=x onerror=window.__pwned=1>--> <![CDATA[<script>window.__pwned=1</script>]]>",
]


def test_model_output_never_becomes_markup_or_runs(server, page):
    server.reply = lambda body: says(*re.findall(r"(?s).{1,7}", body["messages"][-1]["content"]))
    elements = page.evaluate("document.querySelectorAll('script, style, link, base, meta, iframe').length")
    for text in XSS:
        ask(page, text)
    step = {"expression": XSS[1], "result": XSS[0], "position": 0}
    server.reply = lambda body: [delta(tool_steps=[step]), sse({"error": {"message": XSS[1]}}), b"data: [DONE]\n\n"]
    ask(page, XSS[1])
    expect(page.get_by_role("alert").filter(has_text=XSS[1])).to_be_visible()
    page.get_by_role("button", name="Rename chat").click()
    page.get_by_label("Title").fill(XSS[1])
    page.keyboard.press("Enter")
    page.reload()
    expect(page.locator("#log article")).to_have_count(2 * len(XSS) + 2)
    html = "script, img, svg, iframe, object, embed, form, input, style, link, base, meta, math, details, video, "
    assert page.locator("#log").locator(html + "[style]").count() == 0
    assert page.evaluate("document.querySelectorAll('script, style, link, base, meta, iframe').length") == elements
    attributes = "[...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames())"
    assert [name for name in page.evaluate(attributes) if name.startswith("on") or name == "srcdoc"] == []
    links = page.evaluate("[...document.querySelectorAll('#log a')].map(a => [a.protocol, a.rel, a.target])")
    assert links and {tuple(link) for link in links} == {("https:", "noopener noreferrer", "_blank")}
    for text in XSS[:5]:  # shown verbatim
        expect(page.locator("article.answer .body").filter(has_text=text.strip()).first).to_be_attached()
    assert page.evaluate("window.__pwned") is None


PATHOLOGICAL = '*a **b |[|[a](|![a](b "|`a``b```c|$a |\\(|\\[x|<http://|http://!|> |- |1. |_a*b~~c|#|\\|[a](b(| |~|`'
PATHOLOGICAL = PATHOLOGICAL.split("|")
PATHOLOGICAL += ["|-", "a|b\n|-|-|\n", "$$\n", "```\n~~~\n", " \n", "- a\n\n", "\t- x\n", "- a\nb\n", "> a\nb|c\n"]


def test_pathological_text_is_shown_completely_with_bounded_depth(page):
    js = """content => {
        const body = el("div"), depth = node => node ? 1 + depth(node.parentElement) : 0;
        renderAnswer(body, {content});
        return [Math.max(...[...body.querySelectorAll("*")].map(depth)), body.textContent];
    }"""
    for text in PATHOLOGICAL:
        depth, shown = page.evaluate(js, text * 5000 + "end")
        assert depth < 25 and "end" in shown


# ---- Errors


def error(page, text):
    return page.get_by_role("alert").filter(has_text=text)


def test_the_page_waits_for_a_loading_model(server, open_page):
    server.ready = False
    page = open_page(wait=False)
    expect(page.locator("#server")).to_have_text("Loading the model…")
    ask(page, "hi", wait=False)
    expect(page.locator(LAST + ".waiting")).to_have_text("The model is loading…")
    server.ready = True
    expect(page.locator(LAST + ".body")).to_have_text("Answer 2.")
    expect(page.locator("#server")).to_have_text("nanochat-d4-sft")


def test_waiting_can_be_stopped(server, page):
    server.ready = False
    ask(page, "hi", wait=False)
    expect(page.locator(LAST + ".waiting")).to_have_text("The model is loading…")
    page.keyboard.press("Escape")
    finished(page)
    expect(page.locator(LAST + ".note")).to_have_text("Stopped")


def test_requests_to_a_busy_server_are_retried(server, page):
    server.refusals = [(429, {"message": "queue full", "type": "rate_limit_error"})]
    ask(page, "hi", wait=False)
    expect(page.locator(LAST + ".waiting")).to_have_text("The server is busy, next try in 1 s…")
    expect(page.locator(LAST + ".body")).to_have_text("Answer 2.")


def test_a_server_that_stays_busy_is_reported_after_some_tries(server, page):
    server.refusals = [(429, {"message": "queue full", "type": "rate_limit_error"})] * 4
    ask(page, "hi")
    expect(error(page, "The server is busy")).to_be_visible()
    page.get_by_role("button", name="Retry").click()
    expect(page.locator(LAST + ".body")).to_have_text("Answer 5.")


def test_the_page_asks_for_the_api_key(server, open_page):
    server.key = "sesame"
    page = open_page(wait=False)
    expect(page.locator("#server")).to_have_text("API key needed")
    ask(page, "hi")
    expect(error(page, "valid API key")).to_be_visible()
    page.get_by_role("button", name="Enter API key").click()
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.type("sesame")
    page.keyboard.press("Enter")
    expect(page.locator("#server")).to_have_text("nanochat-d4-sft")
    page.get_by_role("button", name="Retry").click()
    expect(page.locator(LAST + ".body")).to_have_text("Answer 2.")
    assert messages(page) == ["hi", "Answer 2."]


def test_a_full_context_offers_to_leave_out_the_oldest_turns(server, page):
    full = {"message": "too long", "code": "context_length_exceeded", "n_prompt_tokens": 600, "n_ctx": 512}
    for text in "one", "two", "three":
        ask(page, text)
    server.refusals = [(400, full)] * 3
    ask(page, "four")
    expect(error(page, "600 tokens of 512")).to_be_visible()
    expect(page.get_by_role("alert").get_by_role("button", name="New chat")).to_be_visible()
    page.get_by_role("button", name="Leave out the oldest turns").click()
    expect(page.locator(LAST + ".body")).to_have_text("Answer 7.")
    assert [turn["content"] for turn in server.chats[-1]["messages"]] == ["three", "Answer 3.", "four"]
    assert len(messages(page)) == 8
    server.refusals = [(413, {"message": "the body is larger than 1,048,576 bytes"})] * 2
    ask(page, "five")
    expect(page.locator(LAST + ".body")).to_have_text("Answer 10.")
    assert len(server.chats[-1]["messages"]) == 5
    page.keyboard.press("Control+Shift+O")
    server.refusals = [(400, full)]
    ask(page, "much too long")
    expect(page.get_by_role("button", name="Leave out the oldest turns")).to_be_hidden()


@pytest.mark.parametrize("headers", [{}, {"Content-Length": "100000"}], ids=["ends", "breaks"])
def test_a_stream_that_breaks_off_keeps_its_text_and_can_be_retried(headers, server, page):
    def reply(body):
        yield delta("Half of")
        server.go.wait(10)

    server.headers, server.reply = headers, reply
    ask(page, "hi", wait=False)
    expect(page.locator(LAST + ".body")).to_have_text("Half of")
    server.go.set()
    expect(error(page, "broke off")).to_be_visible()
    assert messages(page) == ["hi", "Half of"]
    page.reload()
    assert messages(page) == ["hi", "Half of"]
    server.headers, server.reply = {}, lambda body: says("All of it")
    page.get_by_role("button", name="Retry").click()
    expect(page.locator(LAST + ".body")).to_have_text("All of it")
    page.get_by_role("button", name="Previous version").click()
    assert messages(page) == ["hi", "Half of"]


def test_errors_in_and_before_the_stream_are_shown(server, page):
    server.reply = lambda body: [delta("Half"), sse({"error": {"message": "the worker died"}}), b"data: [DONE]\n\n"]
    ask(page, "hi")
    expect(error(page, "the worker died")).to_be_visible()
    server.refusals = [(400, {"message": "temperature is 3, at most 2", "param": "temperature"})]
    ask(page, "again")
    expect(error(page, "temperature is 3, at most 2")).to_be_visible()
    server.reply = lambda body: says("fine")
    ask(page, "and again")  # two questions in a row are sent as one message
    assert [turn["role"] for turn in server.chats[-1]["messages"]] == ["user", "assistant", "user"]
    assert server.chats[-1]["messages"][-1]["content"] == "again\n\nand again"


# ---- Settings and appearance


def test_settings_are_sent_and_kept(server, page):
    server.models.append({"id": "nanochat-d8-rl", "context_length": 1024})
    page.reload()
    expect(page.locator("#server")).to_have_text("nanochat-d4-sft")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Model").select_option("nanochat-d8-rl")
    fields = {"Temperature": "0", "Top-k": "5", "Maximum length": "64", "System text": "Be brief.", "API key": "k"}
    for label, value in fields.items():
        page.get_by_label(label).fill(value)
    page.get_by_role("button", name="Close").click()
    page.reload()
    expect(page.locator("#server")).to_have_text("nanochat-d8-rl")
    ask(page, "hi")
    sent = server.chats[0]
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert [sent[name] for name in ("model", "temperature", "top_k", "max_tokens")] == ["nanochat-d8-rl", 0, 5, 64]
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("7")
    page.keyboard.press("Escape")
    ask(page, "hi")
    assert server.chats[1]["temperature"] == 0  # 7 is out of range


def background(page):
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def test_the_theme_follows_the_system_by_default(open_page):
    page = open_page(color_scheme="dark")
    dark = background(page)
    page.emulate_media(color_scheme="light")
    light = background(page)
    assert light != dark
    page.get_by_role("button", name="Theme: system").click()
    page.get_by_role("button", name="Theme: light").click()
    assert background(page) == dark
    page.reload()
    assert background(page) == dark
    page.get_by_role("button", name="Theme: dark").click()
    assert background(page) == light


WIDE = (
    "w" * 300 + "\n\n| a |" + " column |" * 20 + "\n|-|" + "-|" * 20 + "\n\n```\n" + "x " * 200 + "\n```\n# " + "h" * 90
)


def test_a_phone_needs_no_horizontal_scrolling(server, open_page):
    page = open_page(**PHONE)

    def fits():
        assert page.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [375, 375]
        log = page.get_by_role("log")
        assert log.evaluate("log => log.scrollWidth <= log.clientWidth")

    fits()
    server.reply = lambda body: [
        delta("x", tool_steps=[{"expression": "9" * 99, "result": "1", "position": 0}]),
        *says(WIDE),
    ]
    message = page.get_by_label("Message", exact=True)
    message.tap()
    page.keyboard.type("first line")
    page.keyboard.press("Enter")
    page.keyboard.type("y" * 200)
    assert server.chats == []
    page.get_by_role("button", name="Send").tap()
    finished(page)
    assert server.chats[0]["messages"][0]["content"] == "first line\n" + "y" * 200
    fits()
    server.reply = lambda body: [delta("cut")]
    ask(page, "again")
    fits()
    page.get_by_role("button", name="Edit").last.tap()
    fits()
    menu = page.locator("#menu")
    expect(page.get_by_role("navigation")).to_be_hidden()
    menu.tap()
    expect(menu).to_have_attribute("aria-expanded", "true")
    fits()
    page.keyboard.press("Escape")
    expect(page.get_by_role("navigation")).to_be_hidden()
    expect(menu).to_be_focused()
    menu.tap()
    page.get_by_role("button", name="Settings").tap()
    fits()


def test_targets_are_large_enough_and_motion_can_be_reduced(server, page):
    def reply(body):
        server.go.wait(10)
        yield from says("```\ncode\n```")

    server.reply = reply
    page.emulate_media(reduced_motion="reduce")
    ask(page, "hi", wait=False)
    animation = "getComputedStyle(document.querySelector('.waiting'), '::before').animationName"
    assert page.evaluate(animation) == "none"
    page.emulate_media(reduced_motion="no-preference")
    assert page.evaluate(animation) == "breathe"
    server.go.set()
    finished(page)
    page.get_by_role("button", name="Regenerate").click()
    finished(page)
    visible = "[...document.querySelectorAll('button')].filter(b => b.checkVisibility())"
    sizes = ".map(b => b.getBoundingClientRect()).map(box => Math.min(box.width, box.height))"
    boxes = page.evaluate(visible + sizes)
    assert len(boxes) > 10 and min(boxes) >= 24


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_only_minor_accessibility_problems(scheme, axe, server, open_page):
    page = open_page(color_scheme=scheme, bypass_csp=True)
    page.evaluate(axe)

    def check():
        violations = page.evaluate("axe.run().then(result => result.violations)")
        found = [(v["id"], [node["html"] for node in v["nodes"]]) for v in violations if v["impact"] != "minor"]
        assert found == []

    check()
    text = "# T\n\n> quote `code` [link](https://x.org)\n\n| a | b |\n|-|-|\n| 1 | 2 |\n\n```py\nx\n```\n\n1. $x$"
    step = {"expression": "1+1", "result": "2", "position": 0}
    server.reply = lambda body: [delta(tool_steps=[step]), *says(text)]
    ask(page, "hi")
    page.get_by_role("button", name="Regenerate").click()
    finished(page)
    server.reply = lambda body: [delta("cut")]
    ask(page, "again")
    check()
    for name in "Settings", "Rename chat", "Delete chat":
        page.get_by_role("button", name=name).click()
        check()
        page.keyboard.press("Escape")
    page.get_by_role("button", name="Edit").last.click()
    check()
