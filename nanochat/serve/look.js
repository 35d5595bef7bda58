/* Look inside a text: its tokens, what could follow each, what each layer would say, where each head attends.
   Shared by the chat page and the pages that nanochat.share writes; each gives createLook() its own model. */

// Creates an element: el("button.quiet", {onclick}, "Copy"). Text enters a page only as text nodes.
function el(name, props = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  const node = document.createElement(tag);
  if (classes.length) node.className = classes.join(" ");
  Object.assign(node, props);
  node.append(...children);
  return node;
}

// What temperature, top-k and top-p leave of log-probabilities (largest first): the probabilities of a draw.
function shape(logprobs, {temperature, top_k, top_p}) {
  if (temperature < 1e-5) return logprobs.map((_, i) => i ? 0 : 1);
  const scale = values => {
    const total = values.reduce((a, b) => a + b, 0);
    return values.map(value => value / total);
  };
  const kept = logprobs.slice(0, top_k || logprobs.length);
  let before = 0;
  const nucleus = scale(kept.map(logprob => Math.exp((logprob - kept[0]) / temperature))).map((p, i) => {
    const inside = i === 0 || before < (top_p || 1);
    before += p;
    return inside ? p : 0;
  });
  return scale(nucleus).concat(Array(logprobs.length - kept.length).fill(0));
}

// An index drawn from probabilities.
function draw(probabilities) {
  let left = Math.random();
  const index = probabilities.findIndex(p => (left -= p) < 0);
  return index < 0 ? 0 : index;  // rounding errors
}

const MODES = {surprise: "Surprise", tokens: "Tokens", attention: "Attention"}, SHOWN = 12, GO_ON = 40;
const percent = p => p > 0 && p < 0.001 ? "< 0.1 %" : `${(100 * p).toFixed(1)} %`;
const visible = text => text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥") || "(nothing)";
const hex = bytes => Array.from(bytes, byte => byte.toString(16).padStart(2, "0")).join(" ");
// The text of a token, or its bytes if they are not whole characters.
const label = ({token, bytes}) => token.includes("\uFFFD") ? hex(bytes) : visible(token);

/* A dialog; open(request) shows a text. `inspect(request, signal)` resolves to an inspection, see
   nanochat/inspection.py. The request has `messages` or `prompt` (text or ids), `position`, `layer` and `head`; with
   `max_tokens` the text goes on first, drawn with `temperature`, `top_k` and `top_p`. `getTokenizer()` resolves to a
   Tokenizer, or to null if there is none for JavaScript. */
function createLook(inspect, getTokenizer) {
  const versions = [];  // texts so far: {ids, position}; versions[at] is shown, `seen` is its inspection
  let at = -1, seen = null, tokenizer = null, mode = "surprise", running = new AbortController();
  const field = (text, props, off) => {
    const input = el("input", {type: "range", ...props}), value = el("output"), print = () => {
      value.textContent = input.value === off ? "off" : input.value;
    };
    input.oninput = () => { print(); drawNext(); };
    print();
    return {input, node: el("label", {}, text, input, value)};
  };
  const sliders = {
    temperature: field("Temperature", {min: 0, max: 2, step: 0.05, value: 1}),
    top_k: field("Top-k", {min: 0, max: 100, step: 1, value: 0}, "0"),
    top_p: field("Top-p", {min: 0.05, max: 1, step: 0.05, value: 1}, "1"),
  };
  const settings = () => Object.fromEntries(Object.entries(sliders).map(([name, {input}]) => [name, +input.value]));
  const choose = (name, onchange) => el("select", {ariaLabel: name, onchange});
  const layer = choose("Layer", () => show({})), head = choose("Head", () => show({}));
  const push = (text, onclick, props = {}) => el("button.quiet", {type: "button", onclick, ...props}, text);
  const text = el("textarea", {rows: 2, ariaLabel: "Text to look into", placeholder: "Any text"});
  const back = push("‹", () => turn(-1), {ariaLabel: "Previous version"});
  const forth = push("›", () => turn(1), {ariaLabel: "Next version"});
  const place = el("span.note"), note = el("span.note", {role: "status"});
  const tokens = el("div.tokens", {role: "group", ariaLabel: "Tokens", onkeydown: moveFocus});
  const modes = Object.entries(MODES).map(([name, title]) => push(title, () => { mode = name; drawTokens(); }));
  const heads = el("span.heads", {}, "layer ", layer, " head ", head);
  const next = el("div.next");
  const layers = el("div.layers", {tabIndex: 0, role: "region", ariaLabel: "Guesses of the layers"});
  const merges = el("ol.merges"), nextTitle = el("h3"), mergesTitle = el("h3", {}, "How its word is merged");
  const content = el("div", {hidden: true},
    el("div.row", {}, ...modes, heads, back, place, forth),
    tokens,
    el("section", {}, nextTitle, el("div.row", {}, ...Object.values(sliders).map(({node}) => node)), next),
    el("section", {}, el("h3", {}, "What each layer would say"), layers),
    el("section", {}, mergesTitle, merges));
  const dialog = el("dialog.look", {ariaLabel: "Look inside"},
    el("div.row", {}, el("h2", {}, "Look inside"), note, push("Close", () => dialog.close())),
    el("form.row", {onsubmit: event => { event.preventDefault(); show({prompt: text.value}, null); }}, text,
      el("button.quiet", {type: "submit"}, "Show")),
    content);
  dialog.onclose = () => {
    running.abort();
    dialog.remove();
  };

  // Shows the version `base` with the changes of `request`, or a new text if it is null. A later call ends this one.
  async function show(request, base = versions[at]) {
    running.abort();
    const {signal} = running = new AbortController();
    note.textContent = "computing…";
    try {
      const chosen = {layer: Math.max(0, layer.selectedIndex), head: Math.max(0, head.selectedIndex)};
      const answer = await inspect({prompt: base?.ids, position: base?.position, ...chosen, ...request}, signal);
      tokenizer ??= await getTokenizer();
      if (signal.aborted) return;
      seen = answer;
      const version = {ids: seen.tokens.map(({id}) => id), position: seen.position};
      if (!base) versions.length = 0;
      if (version.ids.join() === base?.ids.join()) versions[at = versions.indexOf(base)] = version;
      else at = versions.push(version) - 1;
      drawAll();
    } catch (problem) {
      if (!signal.aborted) note.textContent = problem.message;
    }
  }

  function open(request) {
    content.hidden = true;
    if (!dialog.isConnected) document.body.append(dialog);
    if (!dialog.open) dialog.showModal();
    return show(request, null);
  }

  function turn(step) {
    if (versions[at + step]) show({}, versions[at + step]);
  }

  // Goes on from the chosen token with another one.
  function branch(id) {
    const prompt = [...versions[at].ids.slice(0, seen.position + 1), id];
    show({prompt, max_tokens: GO_ON, ...settings()});
  }

  function drawAll() {
    for (const [select, n] of [[layer, seen.n_layer], [head, seen.n_head]]) {
      if (select.length !== n) select.replaceChildren(...Array.from({length: n}, (_, i) => el("option", {}, i + 1)));
    }
    place.textContent = versions.length > 1 ? `${at + 1} of ${versions.length}` : "";
    back.hidden = forth.hidden = versions.length < 2;
    back.disabled = at === 0;
    forth.disabled = at === versions.length - 1;
    const focused = [tokens, next].find(part => part.contains(document.activeElement));  // its buttons are made anew
    content.hidden = false;
    drawTokens();
    drawNext();
    (focused?.querySelector('[aria-pressed="true"]') ?? focused?.firstElementChild)?.focus();
    drawLayers();
    if (tokenizer) drawMerges();
  }

  function drawTokens() {
    modes.forEach((button, i) => { button.ariaPressed = String(Object.keys(MODES)[i] === mode); });
    heads.hidden = mode !== "attention";
    note.textContent = seen.attention || heads.hidden ? "" : "attention is shown for up to 128 tokens";
    let forced = false;  // between the marks of the calculator's result
    tokens.replaceChildren(...seen.tokens.map((token, i) => {
      if (token.special && token.token === "<|output_start|>") forced = true;
      const chosen = i === seen.position, loss = token.logprob === null ? null : -token.logprob;
      const facts = [`token ${i}, id ${token.id}`, `bytes ${hex(token.bytes)}`];
      if (loss !== null) facts.push(`loss ${loss.toFixed(4)}, probability ${Math.exp(-loss).toFixed(4)}`);
      if (forced) facts.push("the calculator's result");
      const shown = token.token.includes("\uFFFD") ? label(token) : token.token.replaceAll("\n", "↵");
      const chip = push(shown, () => show({position: i}), {
        className: ["token", token.special && "special", forced && "forced"].filter(Boolean).join(" "),
        title: facts.join("\n"), tabIndex: chosen ? 0 : -1,
        onpointerenter: () => attend(i), onfocus: () => attend(i),
      });
      chip.ariaPressed = String(chosen);
      if (mode === "surprise" && loss !== null) tint(chip, "--warm", Math.min(1, loss / 8));
      if (mode === "tokens") tint(chip, ["--warm", "--accent", "--violet"][i % 3], 0.5);
      if (token.special && token.token === "<|output_end|>") forced = false;
      return chip;
    }));
    attend(seen.position);
  }

  const tint = (chip, color, strength) => {
    chip.style.backgroundColor = `color-mix(in srgb, var(${color}) ${Math.round(45 * strength)}%, transparent)`;
  };

  // Colors the tokens that token `i` attends to.
  function attend(i) {
    if (mode !== "attention" || !seen.attention) return;
    [...tokens.children].forEach((chip, j) => {
      const weight = seen.attention[i][j] ?? 0;
      tint(chip, "--accent", weight);
      chip.dataset.attention = weight.toFixed(4);
    });
  }

  function moveFocus(event) {
    const step = {ArrowLeft: -1, ArrowRight: 1}[event.key], chip = document.activeElement;
    if (!step) return;
    event.preventDefault();
    (step < 0 ? chip.previousElementSibling : chip.nextElementSibling)?.focus();
  }

  function drawNext() {
    const after = seen.tokens[seen.position], taken = seen.tokens[seen.position + 1];
    nextTitle.textContent = `What may follow ${label(after)}`;
    const probabilities = shape(seen.logprobs, settings());
    next.replaceChildren(...seen.next.slice(0, SHOWN).map((token, i) => {
      const bar = el("span.bar"), raw = Math.exp(token.logprob);
      bar.style.width = `${100 * probabilities[i]}%`;
      const title = `go on with id ${token.id}; probability ${raw.toFixed(4)}, with the sliders ${probabilities[i].toFixed(4)}`;
      const row = push(el("code", {}, label(token)), () => branch(token.id), {title});
      row.append(el("span.track", {}, bar), el("span", {}, percent(probabilities[i])), el("small", {}, percent(raw)));
      row.ariaPressed = String(token.id === taken?.id);
      return row;
    }));
  }

  function drawLayers() {
    const rows = seen.layers.map((guesses, i) => el("tr", {}, el("th", {scope: "row"}, i ? `Layer ${i}` : "Embedding"),
      ...guesses.map(token => el("td", {title: `id ${token.id}, probability ${Math.exp(token.logprob).toFixed(4)}`},
        el("code", {}, label(token)), ` ${percent(Math.exp(token.logprob))}`))));
    layers.replaceChildren(el("table", {}, el("tbody", {}, ...rows)));
  }

  function drawMerges() {
    const steps = [], decoder = new TextDecoder(), {ids, position} = versions[at];
    tokenizer.merge(wordAt(tokenizer, ids, position), parts => { if (steps.length < 60) steps.push([...parts]); });
    mergesTitle.hidden = merges.hidden = steps.length < 2;
    merges.replaceChildren(...steps.map(parts => el("li", {}, ...parts.map(part => {
      const bytes = arrayOf(part);
      return el("code", {}, label({token: decoder.decode(bytes), bytes: [...bytes]}));
    }))));
  }

  return {open};
}
