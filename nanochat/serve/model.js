/* The model of a shared page in plain JavaScript: calculator, Transformer, sampling. No DOM. */

/* ------------------------------------------------------------------------------------------------------------------
   Calculator, see nanochat/calculator.py */

const MAX_CHARS = 256, DIGITS = 15;
const LEXEME = /[ \t]+|((?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+|[-+*/()])/g;
const QUOTED = String.raw`("[^"\\\n]*"|'[^'\\\n]*')`;
const SPACE = String.raw`[\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]*`;  // \s* in Python
const COUNT = new RegExp(["^", QUOTED, "\\.", "count", "\\(", QUOTED, "\\)", "$"].join(SPACE), "u");
const LETTERS = /^(letters|backwards|length|letter (-?[0-9]+)|count ([^\n])): *([^\n]+)$/u;
const PAIR = /^(larger|smaller|remainder): ([0-9]+), ([0-9]+)$/;

/* The result of an expression as text, or null if it is invalid or divides by zero. */
function calculate(expression) {
  if ([...expression].length > MAX_CHARS) return null;
  const request = LETTERS.exec(expression);
  if (request) return aboutLetters(...request.slice(1));
  const pair = PAIR.exec(expression);
  if (pair) return aboutNumbers(pair[1], BigInt(pair[2]), BigInt(pair[3]));
  const [, text, part] = (COUNT.exec(expression) ?? []).map(quoted => quoted.slice(1, -1));
  if (text !== undefined) return String(part ? text.split(part).length - 1 : [...text].length + 1);
  if (expression.replace(LEXEME, "")) return null;
  const lexemes = Array.from(expression.matchAll(LEXEME), match => match[1]).filter(Boolean);
  try {
    const value = sum(lexemes);
    const result = lexemes.length ? null : decimal(value);
    return result !== null && result.length <= MAX_CHARS ? result : null;
  } catch (problem) {
    if (problem instanceof SyntaxError || problem instanceof RangeError) return null;
    throw problem;
  }
}

function aboutLetters(request, position, counted, text) {
  const letters = text.toLowerCase().match(/\p{L}/gu) ?? [];
  if (position) return Number(position) ? letters.at(position - (position > 0)) ?? null : null;
  if (counted) return String(letters.filter(letter => letter === counted.toLowerCase()).length);
  if (request === "length") return String(letters.length);
  const result = (request === "letters" ? letters : letters.reverse()).join(" ");
  return result && [...result].length <= MAX_CHARS ? result : null;
}

function aboutNumbers(request, x, y) {
  if (request === "remainder") return y ? String(x % y) : null;
  return String((request === "larger") === (x > y) ? x : y);
}

/* Recursive descent over `lexemes`, which shrink. A value is a fraction [numerator, denominator] of BigInts. */
function sum(lexemes) {
  let [a, b] = product(lexemes);
  while (lexemes[0] === "+" || lexemes[0] === "-") {
    const sign = lexemes.shift() === "+" ? 1n : -1n, [c, d] = product(lexemes);
    [a, b] = [a * d + sign * c * b, b * d];
  }
  return [a, b];
}

function product(lexemes) {
  let [a, b] = factor(lexemes);
  while (lexemes[0] === "*" || lexemes[0] === "/") {
    const times = lexemes.shift() === "*", [c, d] = factor(lexemes);
    if (!times && c === 0n) throw new RangeError("division by zero");
    [a, b] = times ? [a * c, b * d] : [a * d, b * c];
  }
  return [a, b];
}

function factor(lexemes) {
  const lexeme = lexemes.shift() ?? ")";
  if (lexeme === "(") {
    const value = sum(lexemes);
    if (lexemes.shift() !== ")") throw new SyntaxError("an open parenthesis");
    return value;
  }
  if (lexeme === "+") return factor(lexemes);
  if (lexeme === "-") return factor(lexemes).map((part, i) => i ? part : -part);
  if (!/[0-9]/.test(lexeme)) throw new SyntaxError(`${lexeme} in the place of a number`);
  const [whole, decimals = ""] = lexeme.replaceAll(",", "").split(".");
  return [BigInt(whole + decimals), 10n ** BigInt(decimals.length)];
}

/* A fraction as text: exact if it is an integer, else rounded (half to even) to 15 significant digits. */
function decimal([a, b]) {
  const sign = (a < 0n) !== (b < 0n) && a !== 0n ? "-" : "", size = x => x < 0n ? -x : x;
  [a, b] = [size(a), size(b)];
  if (a % b === 0n) return sign + a / b;
  let places = DIGITS - String(a / b).length;  // after the point
  if (a < b) places = DIGITS + String(b / a).length - 1;
  const scaled = p => p < 0 ? [a, b * 10n ** BigInt(-p)] : [a * 10n ** BigInt(p), b];
  let [c, d] = scaled(places);
  if (String(c / d).length > DIGITS) [c, d] = scaled(--places);
  const twice = 2n * (c % d), digits = c / d + (twice > d || (twice === d && c / d % 2n) ? 1n : 0n);
  if (places <= 0) return sign + digits + "0".repeat(-places);
  const padded = String(digits).padStart(places + 1, "0");
  return sign + `${padded.slice(0, -places)}.${padded.slice(-places)}`.replace(/\.?0+$/, "");
}

/* ------------------------------------------------------------------------------------------------------------------
   Transformer, see nanochat/gpt.py. Activations of T tokens are a Float32Array with one row per token. */

const SOFTCAP = 15, EPS = 1.1920929e-7, BLOCK = 64, MAX_ATTENTION = 128;

/* The bytes of a base64 text that gzip has compressed. */
async function unpack(base64) {
  const text = atob(base64), bytes = new Uint8Array(text.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

/* x (T rows) times a matrix of int8 weights with a scale per row. Four tokens, or four rows of the matrix, at a time: no
   addition waits for the one before. Sums are in double precision, which is faster than with Math.fround(). */
function matmul(x, T, {weights, scales, rows, columns}) {
  const out = new Float32Array(T * rows);
  let t = 0;
  for (; t + 4 <= T; t += 4) {
    const x0 = t * columns, x1 = x0 + columns, x2 = x1 + columns, x3 = x2 + columns;
    for (let r = 0, w = 0; r < rows; r++) {
      let a = 0, b = 0, c = 0, d = 0;
      for (let i = 0; i < columns; i++, w++) {
        const weight = weights[w];
        a += weight * x[x0 + i];
        b += weight * x[x1 + i];
        c += weight * x[x2 + i];
        d += weight * x[x3 + i];
      }
      const o = t * rows + r, scale = scales[r];
      out[o] = a * scale;
      out[o + rows] = b * scale;
      out[o + 2 * rows] = c * scale;
      out[o + 3 * rows] = d * scale;
    }
  }
  for (; t < T; t++) {
    for (let row = 0; row < rows; row += 4) {
      const first = Math.max(0, Math.min(row, rows - 4)), o = t * rows + first;
      let a = 0, b = 0, c = 0, d = 0, w0 = first * columns, w1 = w0 + columns, w2 = w1 + columns, w3 = w2 + columns;
      for (let i = t * columns; i < (t + 1) * columns; i++) {
        const value = x[i];
        a += weights[w0++] * value;
        b += weights[w1++] * value;
        c += weights[w2++] * value;
        d += weights[w3++] * value;
      }
      [a, b, c, d].forEach((sum, k) => { out[o + k] = sum * scales[first + k]; });
    }
  }
  return out;
}

/* RMSNorm of each run of `size` values: in place, or into a copy. */
function normalize(x, size, out = x) {
  for (let start = 0; start < x.length; start += size) {
    let squares = 0;
    for (let i = start; i < start + size; i++) squares += x[i] * x[i];
    const scale = 1 / Math.sqrt(squares / size + EPS);
    for (let i = start; i < start + size; i++) out[i] = x[i] * scale;
  }
  return out;
}

class Model {
  /* config: that of GPT; buffer: the scales of all matrices in float32, then their int8 weights, see share.py. */
  constructor(config, buffer) {
    const {n_embd: C, n_head, n_kv_head, n_layer, vocab_size} = config, D = C / n_head, G = n_kv_head * D;
    const block = [[C, C], [G, C], [G, C], [C, C], [4 * C, C], [C, 4 * C]];
    const shapes = [[vocab_size, C], ...Array(n_layer).fill(block).flat(), [vocab_size, C]];
    let scale = 0, weight = 4 * shapes.reduce((total, [rows]) => total + rows, 0);
    const matrices = shapes.map(([rows, columns]) => {
      const scales = new Float32Array(buffer, scale, rows), weights = new Int8Array(buffer, weight, rows * columns);
      scale += 4 * rows;
      weight += rows * columns;
      return {weights, scales, rows, columns};
    });
    Object.assign(this, {config, D, G, wte: matrices[0], head: matrices.at(-1), context: config.sequence_len});
    this.layers = Array.from({length: n_layer}, (_, l) => matrices.slice(1 + 6 * l, 7 + 6 * l));
    const {fround} = Math;
    const frequencies = Array.from({length: D / 2}, (_, i) => fround(1 / fround(10000 ** fround(2 * i / D))));
    const angles = Array.from({length: this.context}, (_, p) => frequencies.map(f => fround(p * f))).flat();
    [this.cos, this.sin] = [Float32Array.from(angles, Math.cos), Float32Array.from(angles, Math.sin)];
    this.caches = {};
    this.reads = {};  // the last read of each cache
  }

  /* An empty cache of keys and values; a `traced` one also keeps what inspect() shows. */
  newCache(traced) {
    const {n_layer, n_head, n_embd} = this.config, size = this.context * this.G;
    const arrays = (n, size) => Array.from({length: n}, () => new Float32Array(size));
    const cache = {ids: [], keys: arrays(n_layer, size), values: arrays(n_layer, size)};
    if (!traced) return cache;
    const states = arrays(n_layer + 1, this.context * n_embd), logprobs = [];
    return {...cache, states, logprobs, attention: arrays(n_layer * n_head, MAX_ATTENTION ** 2)};
  }

  /* Activations of `ids` after the last norm; appends them to the cache. */
  forward(ids, cache) {
    const {n_embd: C, n_head, n_kv_head} = this.config, T = ids.length, start = cache.ids.length, {wte} = this;
    const x = new Float32Array(T * C);
    ids.forEach((id, t) => {
      for (let i = 0; i < C; i++) x[t * C + i] = wte.weights[id * C + i] * wte.scales[id];
    });
    normalize(x, C);
    cache.ids.push(...ids);
    cache.states?.[0].set(x, start * C);
    this.layers.forEach(([c_q, c_k, c_v, c_proj, mlp_fc, mlp_proj], layer) => {
      const add = rows => rows.forEach((value, i) => { x[i] += value; });
      const normed = () => normalize(x, C, new Float32Array(x.length));
      const h = normed(), q = this.rotate(matmul(h, T, c_q), n_head, start);
      cache.keys[layer].set(this.rotate(matmul(h, T, c_k), n_kv_head, start), start * this.G);
      cache.values[layer].set(matmul(h, T, c_v), start * this.G);
      add(matmul(this.attend(q, T, start, layer, cache), T, c_proj));
      add(matmul(matmul(normed(), T, mlp_fc).map(value => value > 0 ? value * value : 0), T, mlp_proj));
      cache.states?.[layer + 1].set(x, start * C);
    });
    return normalize(x, C);
  }

  /* Rotary embedding and norm of the heads of tokens from position `start` on, in place. */
  rotate(x, heads, start) {
    const {D, cos, sin} = this, half = D / 2;
    for (let row = 0; row < x.length / D; row++) {
      const angles = (start + Math.floor(row / heads)) * half;
      for (let i = 0; i < half; i++) {
        const a = row * D + i, b = a + half, c = cos[angles + i], s = sin[angles + i], x1 = x[a], x2 = x[b];
        x[a] = x1 * c + x2 * s;
        x[b] = x2 * c - x1 * s;
      }
    }
    return normalize(x, D);
  }

  attend(q, T, start, layer, cache) {
    const {D, G} = this, {n_head, n_kv_head} = this.config, out = new Float32Array(q.length);
    const keys = cache.keys[layer], values = cache.values[layer], scores = new Float32Array(start + T);
    for (let t = 0; t < T; t++) {
      for (let head = 0; head < n_head; head++) {
        const own = (t * n_head + head) * D, shared = Math.floor(head * n_kv_head / n_head) * D, end = start + t + 1;
        let most = -Infinity, total = 0;
        for (let j = 0; j < end; j++) {
          let score = 0;
          for (let i = 0, k = j * G + shared; i < D; i++) score += q[own + i] * keys[k + i];
          scores[j] = score / Math.sqrt(D);
          if (scores[j] > most) most = scores[j];
        }
        for (let j = 0; j < end; j++) total += scores[j] = Math.exp(scores[j] - most);
        for (let j = 0; j < end; j++) {
          const weight = scores[j] / total;
          if (end <= MAX_ATTENTION && cache.attention) {
            cache.attention[layer * n_head + head][(end - 1) * MAX_ATTENTION + j] = weight;
          }
          for (let i = 0, v = j * G + shared; i < D; i++) out[own + i] += weight * values[v + i];
        }
      }
    }
    return out;
  }

  /* Log-probabilities of the next token after each of T rows of activations, as T arrays. */
  logprobs(x, T) {
    const V = this.config.vocab_size, all = matmul(x, T, this.head);
    return Array.from({length: T}, (_, t) => {
      const row = all.subarray(t * V, (t + 1) * V).map(logit => SOFTCAP * Math.tanh(logit / SOFTCAP));
      const total = Math.log(row.reduce((sum, logit) => sum + Math.exp(logit), 0));
      return row.map(logit => logit - total);
    });
  }

  /* The cache `name` with all of `ids`, and the activations of the last one. Tokens that it holds are not computed again.
     Reads of a cache wait for each other, since a read lets the page go on in between; `signal` ends one. */
  read(ids, name, signal, eachBlock = () => {}) {
    const read = (this.reads[name] ?? Promise.resolve()).then(() => this.readNow(ids, name, signal, eachBlock));
    this.reads[name] = read.catch(() => {});
    return read;
  }

  async readNow(ids, name, signal, eachBlock) {
    const cache = this.caches[name] ??= this.newCache(name === "look");
    let known = cache.ids.findIndex((id, i) => id !== ids[i]);
    known = Math.min(known < 0 ? cache.ids.length : known, ids.length - 1);
    cache.ids.length = known;
    let x;
    for (let start = known; start < ids.length; start += BLOCK) {
      signal?.throwIfAborted();
      x = this.forward(ids.slice(start, start + BLOCK), cache);
      eachBlock(x, start);
      if (start + BLOCK < ids.length) await repaint();
    }
    return {cache, last: x.slice(-this.config.n_embd)};
  }
}

/* Lets the page paint and handle events. */
function repaint() {
  return new Promise(resolve => {
    const {port1, port2} = new MessageChannel();
    port1.onmessage = () => { port1.close(); resolve(); };
    port2.postMessage(null);
  });
}

/* ------------------------------------------------------------------------------------------------------------------
   Generation, see nanochat/inference/scheduler.py */

/* Yields {id, forced} after the prompt `ids`, up to the token that ends the answer; `forced`: the calculator's. A prompt
   may end within a call. */
async function* generate(model, tokenizer, ids, settings, signal, cache = "chat") {
  const {special} = tokenizer;
  let call = null, forced = [], painted = performance.now();
  const follow = id => {  // collects a call; at its end, forces its result
    if (id === special["<|python_start|>"]) call = [];
    else if (id === special["<|python_end|>"] && call) {
      const result = calculate(tokenizer.decode(call));
      if (result !== null) forced = [special["<|output_start|>"], ...tokenizer.encode(result), special["<|output_end|>"]];
      call = null;
    } else call?.push(id);
  };
  for (const id of ids) {
    forced = [];
    follow(id);
  }
  for (ids = [...ids]; ids.length < model.context;) {
    const {last} = await model.read(ids, cache, signal), isForced = forced.length > 0;
    const id = isForced ? forced.shift() : sample(model.logprobs(last, 1)[0], settings);
    ids.push(id);
    yield {id, forced: isForced};
    if (!isForced && (id === special["<|assistant_end|>"] || id === special["<|bos|>"])) return;
    follow(id);
    if (performance.now() - painted > 16) {
      await repaint();
      painted = performance.now();
    }
  }
}

/* A token drawn from log-probabilities; temperature 0 takes the likeliest. */
function sample(logprobs, settings) {
  if (settings.temperature < 1e-5) return logprobs.reduce((best, value, id) => value > logprobs[best] ? id : best, 0);
  const likeliest = largest(logprobs, settings.top_k || logprobs.length);
  return likeliest[draw(shape(likeliest.map(id => logprobs[id]), settings))];
}

/* The ids of the n largest values, largest first. */
function largest(values, n) {
  return Array.from(values.keys()).sort((a, b) => values[b] - values[a] || a - b).slice(0, n);
}

/* ------------------------------------------------------------------------------------------------------------------
   What is inside, in the form of nanochat/inspection.py */

async function inspect(model, tokenizer, {ids, position = ids.length - 1, layer, head}, signal) {
  const {n_embd: C, n_layer, n_head} = model.config;
  const {cache} = await model.read(ids, "look", signal, (x, start) => {
    model.caches.look.logprobs.length = start;
    model.caches.look.logprobs.push(...model.logprobs(x, x.length / C));
  });
  const token = (id, logprob) => {
    const bytes = [...arrayOf(tokenizer.tokens[id])];
    return {id, token: tokenizer.decode([id]), bytes, logprob, special: tokenizer.names.has(id)};
  };
  const logprobs = cache.logprobs[position];
  const likeliest = (logprobs, n) => largest(logprobs, n).map(id => token(id, logprobs[id]));
  const guesses = cache.states.map(states =>
    likeliest(model.logprobs(normalize(states.slice(position * C, (position + 1) * C), C), 1)[0], 5));
  const weights = cache.attention[layer * n_head + head];
  const row = (_, i) => [...weights.subarray(i * MAX_ATTENTION, i * MAX_ATTENTION + i + 1)];
  return {
    tokens: ids.map((id, i) => token(id, i ? cache.logprobs[i - 1][id] : null)),
    position, next: likeliest(logprobs, 20), logprobs: [...logprobs].sort((a, b) => b - a),
    layers: guesses, n_layer, n_head, attention: ids.length <= MAX_ATTENTION ? ids.map(row) : null,
  };
}
