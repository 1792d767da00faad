/** Tells a screen reader what an answer says, sentence by sentence rather than token by token. */

const SENTENCE_END = /[.!?。！？…](?=["”’)）】]*(?:\s|$))|[。！？]|\n/gu;

/** More would only be removed before they are read. */
const MAX_LINES = 30;

/** A sentence that is longer is read in pieces. */
const MAX_CHARS = 500;

/**
 * @param {string} text
 * @returns {[string, string]} the whole sentences in it, and what is left.
 */
export function splitSentences(text) {
  let end = 0;
  for (const match of text.matchAll(SENTENCE_END)) end = match.index + match[0].length;
  return [text.slice(0, end), text.slice(end)];
}

export class Announcer {
  /** @param {HTMLElement} region a polite live region. */
  constructor(region) {
    this._region = region;
    this._rest = "";
  }

  /** @param {string} text a piece of an answer. */
  add(text) {
    const [whole, rest] = splitSentences(this._rest + text);
    const isTooLong = rest.length > MAX_CHARS;
    this._rest = isTooLong ? "" : rest;
    this.say(isTooLong ? whole + rest : whole);
  }

  /** The answer is complete. */
  finish() {
    this.say(this._rest);
    this._rest = "";
  }

  /** What was not read yet is not wanted any more. */
  clear() {
    this._rest = "";
    this._region.replaceChildren();
  }

  /** @param {string} text */
  say(text) {
    if (text.trim() === "") return;
    const line = document.createElement("p");
    line.textContent = text.trim();
    this._region.append(line);
    while (this._region.childElementCount > MAX_LINES) this._region.firstElementChild?.remove();
  }
}
