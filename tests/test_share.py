"""Pages of nanochat.share in a real Chromium, without a network, against the engine, the tokenizer and transformers."""

import json
import random
import re

import pytest
import torch
from helpers import ROOT, raises_user_error, random_model, random_words, transformers_model
from test_calculator import REFUSED, TABLE, random_expression

from nanochat import share
from nanochat.calculator import calculate
from nanochat.engine import Engine, Request
from nanochat.inference.cpu_backend import quantize
from nanochat.inspection import inspect
from nanochat.tokenizer import get_tokenizer

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (uv pip install playwright)")
expect = playwright.expect
PIECES = (
    "The cat's  don't WE'LL ſ'ſ 'LL 'ſ 123 4567,8 ١٢٣ Ⅷ² naïve e\u0301 你好世界 🎉👩‍👩‍👧 ﬀ \u2028 \u00a0 \u3000".split(
        " "
    )
)
PIECES += ["\x85", "\ufeff", "\0", "\r\n", "\n\n", " ", "  ", "\t", "   \n ", "<|bos|>", "</script>", "…", "a" * 40]
PIECES += ["\U0001fae8", "\U00016d40"]  # of recent versions of Unicode


def random_text(rng):
    kind = rng.randrange(3)
    if kind == 0:
        return random_words(rng, rng.randint(0, 12))
    if kind == 1:
        return "".join(rng.choices(PIECES, k=rng.randint(1, 30)))
    codes = (
        rng.choice([rng.randrange(0x300), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]) for _ in range(30)
    )
    return "".join(map(chr, codes))


@pytest.fixture(scope="module")
def shared(pocket_base, tmp_path_factory):
    """(model with int8 weights, tokenizer, file of its page)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(pocket_base))
        tokenizer = get_tokenizer()
    model = random_model(tokenizer.get_vocab_size(), std=0.2, sequence_len=160, n_head=4, n_kv_head=2, n_embd=64)
    quantize(model.requires_grad_(False))
    file = tmp_path_factory.mktemp("share") / "nanochat.html"
    file.write_text(share.page(model, tokenizer, "nanochat-d2-rl"), encoding="utf-8")
    return model, tokenizer, file


@pytest.fixture
def page(shared, open_page):
    page = open_page(shared[2].as_uri())
    expect(page.locator("#send")).to_be_enabled()
    return page


def test_ids_equal_those_of_our_tokenizer(shared, page):
    rng = random.Random(0)
    texts = [random_text(rng) for _ in range(2000)]
    ids = page.evaluate("texts => texts.map(text => tokenizer.encode(text))", texts)
    for text, theirs, ours in zip(texts, ids, shared[1].encode(texts), strict=True):
        assert theirs == ours, text
    assert page.evaluate("ids => ids.map(ids => tokenizer.decode(ids))", ids) == texts


def test_calculator_equals_ours(page):
    rng = random.Random(0)
    expressions = [*TABLE, *REFUSED.replace("\n", "|").split("|"), "", "1\n+1", "((1)", "1 1", "9" * 256, "9" * 257]
    expressions += [random_expression(rng, 4)[0] for _ in range(2000)]
    expressions += ["".join(rng.choices("0123456789.,+-*/() '\"rab.count", k=rng.randint(1, 12))) for _ in range(2000)]
    requests = "letters,backwards,length,letter 2,letter -3,letter 0,count a,count É,letter,count".split(",")
    words = ["".join(rng.choices("abé'’É ßİ1?ΑΣς\U0001d400\n", k=rng.randint(0, 9))) for _ in range(2000)]
    expressions += [f"{rng.choice(requests)}:{rng.choice(' ,')}{word}" for word in words]
    expressions += ["letters: " + "𝐀" * 100, "backwards: " + "漢" * 120, "letter 00: a", "letter -0: a"]
    pairs = [(rng.randint(0, 10 ** rng.randint(1, 30)), rng.randint(0, 99)) for _ in range(300)]
    expressions += [f"{rng.choice(['larger', 'smaller', 'remainder'])}: {x}, {y}" for x, y in pairs]
    expressions += [f"{rng.randint(1, 10**20)}/{rng.randint(1, 10**9)}" for _ in range(500)]
    results = page.evaluate("expressions => expressions.map(calculate)", expressions)
    for expression, theirs in zip(expressions, results, strict=True):
        assert theirs == calculate(expression), expression


def test_greedy_tokens_equal_those_of_the_engine(shared, page):
    model, tokenizer, _ = shared
    rng = random.Random(0)
    prompts = [
        tokenizer.render_for_completion({"messages": [{"role": "user", "content": random_text(rng)[:60]}]})
        for _ in range(20)
    ]
    engine = Engine(model, tokenizer)
    script = """async ids => {
        const tokens = [], answer = generate(model, tokenizer, ids, {temperature: 0});
        for await (const {id, forced} of answer) tokens.push([id, Number(!forced)]);
        return tokens; }"""
    for prompt in prompts:
        theirs = page.evaluate(script, prompt)
        loop = engine.decode_loop(1)
        (row,) = loop.submit(Request(prompt, temperature=0))
        while loop.busy:
            loop.step()
        ours = list(map(list, zip(row.tokens, row.mask, strict=True)))
        if theirs != ours:
            n = next(i for i, pair in enumerate(zip(theirs, ours, strict=False)) if pair[0] != pair[1])
            best = model(torch.tensor([prompt + row.tokens[:n]]), last_only=True)[0, -1].topk(2).values
            assert best[0] - best[1] < 1e-4, (prompt, n)


def test_calculator_results_are_forced(shared, page):
    _, tokenizer, _ = shared
    names = ("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>", "<|assistant_end|>")
    start, stop, output, output_end, end = map(tokenizer.encode_special, names)
    written = [start, *tokenizer.encode("12*7"), stop, *tokenizer.encode("!"), end]
    expected = written[:-2] + [output, *tokenizer.encode("84"), output_end] + written[-2:]
    script = """async script => {
        const fake = {context: 100, read: async () => ({last: null}), logprobs: () => [{}]}, tokens = [];
        fake.logprobs = () => { const row = new Float32Array(600); row[script.shift()] = 1; return [row]; };
        for await (const token of generate(fake, tokenizer, [0], {temperature: 0})) tokens.push(token);
        return tokens; }"""
    tokens = page.evaluate(script, written)
    assert [token["id"] for token in tokens] == expected
    forced = expected.index(output), expected.index(output_end)
    assert [i for i, token in enumerate(tokens) if token["forced"]] == [*range(forced[0], forced[1] + 1)]


def test_an_answer_goes_on_within_a_call(shared, page):
    _, tokenizer, _ = shared
    start, stop = map(tokenizer.encode_special, ("<|python_start|>", "<|python_end|>"))
    script = """async ([prompt, script]) => {
        const fake = {context: 100, read: async () => ({last: null})}, tokens = [];
        fake.logprobs = () => { const row = new Float32Array(600); row[script.shift()] = 1; return [row]; };
        for await (const token of generate(fake, tokenizer, prompt, {temperature: 0})) tokens.push(token.id);
        return tokenizer.decode(tokens); }"""
    end = tokenizer.encode_special("<|assistant_end|>")
    call = [start, *tokenizer.encode("12*7")]
    result = "<|output_start|>84<|output_end|><|assistant_end|>"
    assert page.evaluate(script, [[0, *call], [stop, end]]) == f"<|python_end|>{result}"
    assert page.evaluate(script, [[0, *call, stop], [end]]) == result


def test_reads_of_one_cache_wait_for_each_other(shared, page):
    model, tokenizer, _ = shared
    texts = [
        [tokenizer.get_bos_token_id(), *tokenizer.encode(random_words(random.Random(n), 150))][:150] for n in range(2)
    ]
    script = "texts => Promise.all(texts.map(ids => inspect(model, tokenizer, {ids, layer: 0, head: 0})))"
    for ids, seen in zip([*texts, texts[0]], page.evaluate(script, [*texts, texts[0]]), strict=True):
        ours = inspect(Engine(model, tokenizer), ids)
        close([t["logprob"] for t in seen["tokens"][1:]], [t["logprob"] for t in ours["tokens"][1:]])
    aborted = "async ids => { const stop = new AbortController(); const read = model.read(ids, 'x', stop.signal); "
    aborted += "stop.abort(); return read.then(() => 'done', error => error.name); }"
    assert page.evaluate(aborted, texts[0]) == "AbortError"


def close(a, b):
    torch.testing.assert_close(torch.tensor(a, dtype=torch.float), torch.tensor(b), atol=1e-4, rtol=0)


@pytest.mark.parametrize("layer, head", [(0, 0), (1, 3)])
def test_inspection_equals_transformers(shared, layer, head):
    model, tokenizer, _ = shared
    hf = transformers_model(model)
    hf.set_attn_implementation("eager")
    ids = [tokenizer.get_bos_token_id(), *tokenizer.encode("The cat sat on the mat, didn't it?")]
    seen = inspect(Engine(model, tokenizer), ids, 5, layer, head)
    out = hf(torch.tensor([ids]), output_hidden_states=True, output_attentions=True)
    logprobs = out.logits[0].log_softmax(-1)
    close(
        [token["logprob"] for token in seen["tokens"][1:]],
        [logprobs[i, token].item() for i, token in enumerate(ids[1:])],
    )
    close(seen["logprobs"], logprobs[5].sort(descending=True).values.tolist())
    assert [token["id"] for token in seen["next"]] == logprobs[5].topk(20).indices.tolist()
    for i, row in enumerate(seen["attention"]):
        close(row, out.attentions[layer][0, head, i, : i + 1].tolist())
    for state, guesses in zip(out.hidden_states[:2], seen["layers"][:2], strict=True):  # the last one is normed already
        x = state[0, 5] * torch.rsqrt(state[0, 5].square().mean() + 1.2e-7)
        expected = (15 * torch.tanh(hf.lm_head(x) / 15)).log_softmax(-1).topk(5)
        assert [token["id"] for token in guesses] == expected.indices.tolist()
        close([token["logprob"] for token in guesses], expected.values.tolist())
    assert seen["layers"][2] == seen["next"][:5]
    with raises_user_error("head=4: expected 0 to 3"):
        inspect(Engine(model, tokenizer), ids, None, 0, 4)


def test_page_sees_what_the_server_sees(shared, page):
    model, tokenizer, _ = shared
    rng = random.Random(1)
    for n in range(6):
        ids = [tokenizer.get_bos_token_id(), *tokenizer.encode(random_text(rng) * 3)][: rng.choice([20, 128, 150])]
        where = {"position": rng.randrange(len(ids)), "layer": n % 2, "head": n % 4}
        theirs = page.evaluate("request => inspect(model, tokenizer, request)", {"ids": ids, **where})
        ours = inspect(Engine(model, tokenizer), ids, *where.values())
        assert theirs.keys() == ours.keys()
        for a, b in zip(theirs["tokens"], ours["tokens"], strict=True):
            assert {**a, "logprob": 0} == {**b, "logprob": 0}
        close([t["logprob"] for t in theirs["tokens"][1:]], [t["logprob"] for t in ours["tokens"][1:]])
        close(theirs["logprobs"], ours["logprobs"])
        for a, b in zip([theirs["next"], *theirs["layers"]], [ours["next"], *ours["layers"]], strict=True):
            close([token["logprob"] for token in a], [token["logprob"] for token in b])
        assert (theirs["attention"] is None) == (ours["attention"] is None) == (len(ids) > 128)
        for a, b in zip(theirs["attention"] or (), ours["attention"] or (), strict=True):
            close(a, b)


def test_merges_begin_with_bytes_and_end_with_tokens(shared, page):
    _, tokenizer, _ = shared
    ids = [tokenizer.get_bos_token_id(), *tokenizer.encode("a strawberry's"), tokenizer.get_bos_token_id()]
    script = "([ids, position]) => { const steps = []; const word = wordAt(tokenizer, ids, position); "
    script += "tokenizer.merge(word, parts => steps.push([...parts])); return [word, steps]; }"
    word, steps = page.evaluate(script, [ids, 3])
    assert word == " strawberry" and steps[0] == list(" strawberry")
    assert all(len(before) == len(after) + 1 for before, after in zip(steps, steps[1:], strict=False))
    assert steps[-1] == [tokenizer.decode([i]) for i in tokenizer.encode(" strawberry")]
    assert page.evaluate(script, [ids, 0]) == ["", [[]]]


def test_shaping_equals_the_sampler(page):
    from nanochat.inference.sampling import sample_on_device

    logits = torch.randn(50, generator=torch.Generator().manual_seed(0)).sort(descending=True).values * 2
    for temperature, top_k, top_p in [(1, 0, 1), (0.5, 10, 1), (1.5, 0, 0.7), (0.8, 20, 0.9), (0, 0, 1)]:
        settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        shaped = page.evaluate(
            "([values, settings]) => shape(values, settings)", [logits.log_softmax(-1).tolist(), settings]
        )
        uniforms = [(i + 0.5) / 4000 for i in range(4000)]
        drawn = sample_on_device(logits.repeat(4000, 1), uniforms, temperature, top_k, top_p, 0)
        counts = torch.bincount(drawn, minlength=50) / 4000 if temperature else torch.eye(50)[0]
        torch.testing.assert_close(torch.tensor(shaped, dtype=torch.float), counts, atol=1e-3, rtol=0)


def look_into(page, text):
    page.locator("#look").click()
    dialog = page.locator("dialog.look")
    dialog.get_by_label("Text to look into").fill(text)
    dialog.get_by_role("button", name="Show").click()
    expect(dialog.locator(".token").nth(1)).to_contain_text(text[0])
    return dialog


def test_branches_and_modes(shared, page):
    dialog = look_into(page, "The cat sat on the mat.")
    n = len(shared[1].encode("The cat sat on the mat.")) + 1
    expect(dialog.locator(".token")).to_have_count(n)
    dialog.locator(".token").nth(2).click()
    expect(dialog.locator(".token").nth(2)).to_have_attribute("aria-pressed", "true")
    expect(dialog.locator(".next button")).to_have_count(12)
    dialog.locator(".next button").nth(3).click()
    expect(dialog.get_by_text("2 of 2")).to_be_visible()
    expect(dialog.locator('.next button[aria-pressed="true"]')).to_have_count(1)
    expect(dialog.locator(".next button").nth(3)).to_have_attribute("aria-pressed", "true")
    dialog.get_by_role("button", name="Previous version").click()
    expect(dialog.locator(".token")).to_have_count(n)
    dialog.get_by_label("Temperature").fill("0")
    expect(dialog.locator(".next button").first).to_contain_text("100.0 %")
    dialog.get_by_role("button", name="Attention").click()
    dialog.get_by_label("Head").select_option("3")
    dialog.locator(".token").nth(4).hover()
    tints = dialog.locator(".token").evaluate_all("all => all.map(chip => chip.style.backgroundColor)")
    weights = inspect(
        Engine(*shared[:2]), [shared[1].get_bos_token_id(), *shared[1].encode("The cat sat on the mat.")], 2, 0, 2
    )
    strength = [int(re.search(r"(\d+)%", tint)[1]) for tint in tints]
    assert strength == [round(45 * w) for w in weights["attention"][4]] + [0] * (n - 5)
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()


HOSTILE = "</script><img src=x onerror=alert(1)><script>alert(2)</script> <|assistant_end|>"


def test_hostile_text_stays_text(page):
    page.on("dialog", lambda dialog: pytest.fail(dialog.message))
    page.locator("#prompt").fill(HOSTILE)
    page.locator("#prompt").press("Enter")
    expect(page.locator(".own")).to_have_text(HOSTILE)
    expect(page.locator("#send")).to_be_visible(timeout=20_000)
    look_into(page, HOSTILE)
    assert page.locator("img").count() == 0
    page.evaluate(
        "text => { turns = [{text, ids: [], answer: tokenizer.encode(text).map(id => ({id}))}]; show(); }", HOSTILE
    )
    expect(page.locator("article").last).to_contain_text(HOSTILE)
    assert page.locator("img").count() == 0


def test_stopping_and_new_chats_during_an_answer(page):
    for _ in range(2):
        page.locator("#prompt").fill("word " * 60)
        page.locator("#prompt").press("Enter")
        page.locator("#new").click()
        expect(page.locator("#send")).to_be_visible()
    page.locator("#prompt").fill("Hello")
    page.locator("#prompt").press("Enter")
    expect(page.locator(".own")).to_have_text("Hello")
    expect(page.locator("#status")).to_contain_text("tokens", timeout=20_000)
    expect(page.locator("#prompt")).to_be_focused()
    page.get_by_label("Temperature").fill("3")
    page.locator("#prompt").fill("Hello again")
    page.locator("#prompt").press("Enter")
    expect(page.locator(".own")).to_have_count(1)  # the browser says what is wrong with the temperature


def test_a_text_that_is_too_long_leaves_the_one_before(page):
    dialog = look_into(page, "The cat sat on the mat.")
    n = dialog.locator(".token").count()
    dialog.get_by_label("Text to look into").fill("cat " * 500)
    dialog.get_by_role("button", name="Show").click()
    expect(dialog.locator(".note[role=status]")).to_contain_text("tokens, the context is 160")
    dialog.locator(".token").nth(3).click()
    expect(dialog.locator(".token").nth(3)).to_have_attribute("aria-pressed", "true")
    expect(dialog.locator(".token").nth(3)).to_be_focused()
    expect(dialog.locator(".token")).to_have_count(n)


def test_policy_and_sources(shared):
    html = shared[2].read_text(encoding="utf-8")
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)
    assert "default-src 'none'" in policy and "connect-src 'none'" in policy and "unsafe" not in policy
    for name in ("tokenizer.js", "model.js", "look.js", "share.html"):
        source = (ROOT / "nanochat" / "serve" / name).read_text(encoding="utf-8")
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|fetch\(", source
        )


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_is_accessible(scheme, shared, open_page, axe):
    page = open_page(shared[2].as_uri(), color_scheme=scheme)
    page.locator("#prompt").fill("Hello")
    page.locator("#prompt").press("Enter")
    expect(page.locator("#send")).to_be_enabled()
    expect(page.locator("#send")).to_be_visible(timeout=20_000)
    page.evaluate(axe)
    for prepare in (lambda: None, lambda: look_into(page, "The cat sat on the mat.")):
        prepare()
        violations = page.evaluate("axe.run().then(result => result.violations)")
        assert [(v["id"], v["nodes"][0]["html"]) for v in violations] == []


@pytest.mark.slow
def test_page_fits_a_phone(shared, open_page):
    phone = {"viewport": {"width": 375, "height": 667}, "is_mobile": True, "has_touch": True}
    page = open_page(shared[2].as_uri(), **phone)
    page.locator("#prompt").fill("x" * 200)
    page.locator("#send").tap()
    expect(page.locator("#stop")).to_be_hidden(timeout=20_000)
    dialog = look_into(page, "The cat sat on the mat.")
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    assert dialog.evaluate("dialog => dialog.scrollWidth <= dialog.clientWidth")


def test_command_writes_the_page(sft_checkpoint, run_main, capsys, monkeypatch):
    file = sft_checkpoint / "nanochat.html"
    with raises_user_error("a page has int8 weights: leave --dtype and --quantize out"):
        run_main("nanochat.share", "-i", "sft", file, "--dtype=bfloat16")
    run_main("nanochat.share", "-i", "sft", file)
    assert capsys.readouterr().out.startswith(f"wrote {file} (")
    data = json.loads(re.search(r'id="data">(.*?)</script>', file.read_text(encoding="utf-8"), re.S)[1])
    assert data["name"] == "nanochat-d1-sft" and data["config"]["sequence_len"] == 128
    with raises_user_error("nanochat.html already exists; choose a new file"):
        run_main("nanochat.share", "-i", "sft", file)
    monkeypatch.setattr(share, "MAX_PARAMETERS", 1000)
    with raises_user_error("nanochat-d1-sft has .* parameters, a page holds 1,000: share a smaller model"):
        run_main("nanochat.share", "-i", "sft", sft_checkpoint / "other.html")


def test_foreign_patterns_are_refused():
    # The project's own pattern passes with other groups of digits, too.
    assert "{1,3}" in share.javascript_pattern(share.SPLIT_PATTERN.replace("{1,2}", "{1,3}"))
    with raises_user_error(r"the tokenizer splits texts by '\\\\w\+'; a page can hold only"):
        share.javascript_pattern(r"\w+")
