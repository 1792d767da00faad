/**
 * Draws the text of one answer, once per frame of the screen, as text nodes.
 *
 * It counts what it has drawn, in Unicode code points: when the answer is interrupted, that is what the
 * user got. Text that was received but not drawn is then kept back, and drawn only if the answer turns
 * out to have been complete.
 */

import { countCodePoints } from "./client/index.js";

/**
 * Limit per frame, in UTF-16 units: more than a user can read, and so little that the page reacts to
 * keys while a model sends very fast.
 */
const FRAME_CHARS = 2_000;

/** The first line break after this many starts a new block: the browser lays out only the last one. */
const BLOCK_CHARS = 1_000;

/**
 * @typedef {object} Screen
 * @property {(callback: () => void) => unknown} requestFrame
 * @property {(callback: () => void) => void} afterPaint Calls back after the frame was painted.
 * @property {() => number} now Monotonic, in milliseconds.
 */

/** @type {Screen} */
const BROWSER = {
  requestFrame: (callback) => requestAnimationFrame(callback),
  afterPaint: (callback) => {
    // The callbacks of a frame run before it is painted; messages are handled after that.
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
   * @param {() => void} onDrawn Called after each piece was drawn.
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
    /** Number of code points drawn. */
    this.drawnChars = 0;
    /** When the last piece was painted, on the clock of `performance.now()`. */
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

  /** Draw nothing more, but keep the text. */
  freeze() {
    this._isFrozen = true;
  }

  /** Draw all remaining text now: the answer has ended. */
  finish() {
    this._isFrozen = true;
    this._draw(this._pending.length);
  }

  /** @param {() => void} callback Called when `lastPaintAt` is final. */
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
      block.append(text.slice(start, end)); // strings become text nodes, never HTML
      this._blockChars += end - start;
      if (lineEnd !== 0) {
        this._block = null;
        this._blockChars = 0;
      }
      start = end;
    }
  }

  /** @param {number} limit In UTF-16 units. */
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
 * @returns {number} `limit`, or one more if `limit` would split a surrogate pair.
 */
function endOfWhole(text, limit) {
  if (limit >= text.length) return text.length;
  const code = text.charCodeAt(limit - 1);
  return code >= 0xd800 && code < 0xdc00 ? limit + 1 : limit;
}
