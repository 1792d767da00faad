/** Announces an answer to screen readers, sentence by sentence instead of token by token. */

const SENTENCE_END = /[.!?。！？…](?=["”’)）】]*(?:\s|$))|[。！？]|\n/gu;

/** Limit on the lines in the region; older ones are removed. */
const MAX_LINES = 30;

/** A longer sentence is announced in pieces. */
const MAX_CHARS = 500;

/**
 * @param {string} text
 * @returns {[string, string]} The whole sentences, and the rest.
 */
export function splitSentences(text) {
  let end = 0;
  for (const match of text.matchAll(SENTENCE_END)) end = match.index + match[0].length;
  return [text.slice(0, end), text.slice(end)];
}

export class Announcer {
  /** @param {HTMLElement} region A polite live region. */
  constructor(region) {
    this._region = region;
    this._rest = "";
  }

  /** @param {string} text A piece of an answer. */
  add(text) {
    const [whole, rest] = splitSentences(this._rest + text);
    const isTooLong = rest.length > MAX_CHARS;
    this._rest = isTooLong ? "" : rest;
    this.say(isTooLong ? whole + rest : whole);
  }

  /** Announce the rest: the answer is complete. */
  finish() {
    this.say(this._rest);
    this._rest = "";
  }

  /** Drop everything that was not read yet. */
  clear() {
    this._rest = "";
    this._region.replaceChildren();
  }

  /** @param {string} text Announced as it is. */
  say(text) {
    if (text.trim() === "") return;
    const line = document.createElement("p");
    line.textContent = text.trim();
    this._region.append(line);
    while (this._region.childElementCount > MAX_LINES) this._region.firstElementChild?.remove();
  }
}
