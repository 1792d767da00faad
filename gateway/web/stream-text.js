/**
 * The text of one answer, drawn once per frame of the screen, as text nodes.
 *
 * What was drawn is counted in Unicode code points: that is what the user really got when the answer
 * is interrupted. What has come and is not drawn stays behind then, unless the answer turns out to
 * have been complete.
 */

import { countCodePoints } from "./client/index.js";

/**
 * Drawn in one frame at most, in UTF-16 units: more than anybody can read, and little enough for the
 * page to answer to a key while a model floods it.
 */
const FRAME_CHARS = 2_000;

/** A line break after so much begins a new block, so that the browser lays out only the last one. */
const BLOCK_CHARS = 1_000;

/**
 * @typedef {object} Screen
 * @property {(callback: () => void) => unknown} requestFrame
 * @property {(callback: () => void) => void} afterPaint calls back when the frame was painted.
 * @property {() => number} now monotonic, in milliseconds.
 */

/** @type {Screen} */
const BROWSER = {
  requestFrame: (callback) => requestAnimationFrame(callback),
  afterPaint: (callback) => {
    // A frame's callbacks run before it is painted; a message, after.
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      callback();
    };
    port2.postMessage(null);
  },
  now: () => performance.now(),
};

export class StreamText {
  /**
   * @param {HTMLElement} element
   * @param {() => void} onDrawn called after each piece was drawn.
   * @param {Screen} [screen]
   */
  constructor(element, onDrawn, screen = BROWSER) {
    this._element = element;
    this._onDrawn = onDrawn;
    this._screen = screen;
    this._pending = "";
    this._isFrozen = false;
    this._isAsked = false;
    /** @type {HTMLElement | null} */
    this._block = null;
    this._blockChars = 0;
    /** Code points that are in the page. */
    this.drawnChars = 0;
    /** When the last of them was painted, on the clock of `performance.now()`. */
    this.lastPaintAt = 0;
    this._unpainted = 0;
    /** @type {(() => void)[]} */
    this._onPainted = [];
  }

  /** @param {string} text */
  add(text) {
    this._pending += text;
    this._ask();
  }

  /** Draw nothing more, but keep it. */
  freeze() {
    this._isFrozen = true;
  }

  /** Draw all that has come, now: the answer is at its end. */
  finish() {
    this._isFrozen = true;
    this._draw(this._pending.length);
  }

  /** @param {() => void} callback called once `lastPaintAt` is known. */
  whenPainted(callback) {
    if (this._unpainted === 0) callback();
    else this._onPainted.push(callback);
  }

  _ask() {
    if (this._isFrozen || this._isAsked || this._pending === "") return;
    this._isAsked = true;
    this._screen.requestFrame(() => {
      this._isAsked = false;
      if (this._isFrozen) return;
      this._draw(FRAME_CHARS);
      this._ask();
    });
  }

  /** @param {string} text */
  _append(text) {
    let start = 0;
    while (start < text.length) {
      const block = (this._block ??= this._element.appendChild(document.createElement("span")));
      const room = Math.max(0, BLOCK_CHARS - this._blockChars);
      const lineEnd = text.indexOf("\n", start + room) + 1;
      const end = lineEnd === 0 ? text.length : lineEnd;
      block.append(text.slice(start, end)); // strings become text nodes, whatever is in them
      this._blockChars += end - start;
      if (lineEnd !== 0) {
        this._block = null;
        this._blockChars = 0;
      }
      start = end;
    }
  }

  /** @param {number} limit in UTF-16 units. */
  _draw(limit) {
    const text = this._pending.slice(0, endOfWhole(this._pending, limit));
    if (text === "") return;
    this._pending = this._pending.slice(text.length);
    this._append(text);
    this.drawnChars += countCodePoints(text);
    this._unpainted += 1;
    this._screen.afterPaint(() => {
      this.lastPaintAt = this._screen.now();
      this._unpainted -= 1;
      if (this._unpainted === 0) for (const callback of this._onPainted.splice(0)) callback();
    });
    this._onDrawn();
  }
}

/**
 * @param {string} text
 * @param {number} limit
 * @returns {number} `limit`, or one more where that would cut a character in two.
 */
function endOfWhole(text, limit) {
  if (limit >= text.length) return text.length;
  const code = text.charCodeAt(limit - 1);
  return code >= 0xd800 && code < 0xdc00 ? limit + 1 : limit;
}
