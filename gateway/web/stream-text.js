/**
 * The text of one answer, drawn once per frame of the screen, as text nodes.
 *
 * What was drawn is counted in Unicode code points: that is what the user really got when the answer
 * is interrupted. What has come and is not drawn stays behind then, unless the answer turns out to
 * have been complete.
 */

import { countCodePoints } from "./message-service.js";

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
    if (this._isFrozen || this._isAsked) return;
    this._isAsked = true;
    this._screen.requestFrame(() => {
      this._isAsked = false;
      if (!this._isFrozen) this._draw();
    });
  }

  /** Draw nothing more, but keep it. */
  freeze() {
    this._isFrozen = true;
  }

  /** Draw all that has come, now: the answer is at its end. */
  finish() {
    this._isFrozen = true;
    this._draw();
  }

  /** Forget what was not drawn. */
  discard() {
    this._isFrozen = true;
    this._pending = "";
  }

  /** @param {() => void} callback called once `lastPaintAt` is known. */
  whenPainted(callback) {
    if (this._unpainted === 0) callback();
    else this._onPainted.push(callback);
  }

  _draw() {
    const text = this._pending;
    if (text === "") return;
    this._pending = "";
    this._element.append(text); // strings become text nodes, whatever is in them
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
