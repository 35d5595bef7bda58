/* The tokenizer of nanochat/tokenizer.py in plain JavaScript, with the data of nanochat/share.py. The bytes of a token or
   word are a string with one character per byte. */

const bytesOf = text => Array.from(new TextEncoder().encode(text), byte => String.fromCharCode(byte)).join("");
const arrayOf = bytes => Uint8Array.from(bytes, character => character.charCodeAt());

class Tokenizer {
  /* tokens: bytes by id, null for special tokens; special: {name: id}; pattern: splits text into words. */
  constructor({tokens, special, pattern}) {
    this.tokens = [...tokens];
    this.ranks = new Map(tokens.map((bytes, id) => [bytes, id]).filter(([bytes]) => bytes !== null));
    this.pattern = new RegExp(pattern, "gv");
    this.special = special;
    this.names = new Map(Object.entries(special).map(([name, id]) => [id, name]));
    for (const [name, id] of Object.entries(special)) this.tokens[id] = name;
  }

  words(text) {
    return Array.from(text.matchAll(this.pattern), ([word]) => bytesOf(word));
  }

  encode(text) {
    const ids = [];
    for (const word of this.words(text)) {
      const whole = this.ranks.get(word);
      if (whole !== undefined) ids.push(whole);
      else for (const bytes of this.merge(word)) ids.push(this.ranks.get(bytes));
    }
    return ids;
  }

  /* The bytes of a word's tokens. Of all adjacent pairs, the one whose token has the lowest id is merged first. Calls
     onStep(parts) before each merge and at the end. */
  merge(word, onStep = () => {}) {
    const parts = [...word], rank = i => this.ranks.get(parts[i] + parts[i + 1]) ?? Infinity;
    const ranks = parts.map((_, i) => i + 1 < parts.length ? rank(i) : Infinity);
    for (;;) {
      onStep(parts);
      let best = 0;
      for (let i = 1; i < ranks.length; i++) if (ranks[i] < ranks[best]) best = i;
      if (!(ranks[best] < Infinity)) return parts;
      parts.splice(best, 2, parts[best] + parts[best + 1]);
      ranks.splice(best + 1, 1);
      for (const i of [best - 1, best]) if (i >= 0) ranks[i] = i + 1 < parts.length ? rank(i) : Infinity;
    }
  }

  decode(ids) {
    return new TextDecoder("utf-8", {ignoreBOM: true}).decode(arrayOf(ids.map(id => this.tokens[id]).join("")));
  }
}

/* The word that the token at `position` is a part of; "" for a special token. */
function wordAt(tokenizer, ids, position) {
  if (tokenizer.names.has(ids[position])) return "";
  let start = position, end = position;
  while (start && !tokenizer.names.has(ids[start - 1])) start--;
  while (end < ids.length && !tokenizer.names.has(ids[end])) end++;
  let offset = ids.slice(start, position).reduce((total, id) => total + tokenizer.tokens[id].length, 0);
  const text = tokenizer.decode(ids.slice(start, end));
  if (text.includes("\uFFFD")) return "";  // incomplete characters, whose bytes the text has lost
  for (const word of tokenizer.words(text)) {
    if (offset < word.length) return word;
    offset -= word.length;
  }
  return "";
}
