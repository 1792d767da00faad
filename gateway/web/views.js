/** The elements of the conversation: questions, answers, function calls. */

import { StreamText } from "./stream-text.js";

/** @import { FunctionCall, InterruptAck, Message } from "./client/index.js" */
/** @import { Texts } from "./texts.js" */

/**
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {string} [className]
 * @param {(Node | string)[]} children Strings become text nodes.
 * @returns {HTMLElementTagNameMap[Tag]}
 */
function make(tag, className = "", ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

/**
 * @param {"user" | "assistant"} role
 * @param {string} label Says whose message it is, for screen readers.
 * @param {HTMLElement} bubble
 */
function makeMessage(role, label, bubble) {
  const element = make("li", "message", make("span", "unseen", label), bubble);
  element.dataset.role = role;
  return element;
}

/**
 * @param {string} text
 * @param {Texts} texts
 * @returns {HTMLLIElement}
 */
export function makeQuestion(text, texts) {
  return makeMessage("user", texts.say("you"), make("div", "bubble", make("p", "text", text)));
}

/** An answer: the waiting dots, its text, its function calls, and how it ended. */
export class AnswerView {
  /**
   * @param {Message} message
   * @param {Texts} texts
   * @param {() => void} onDrawn Called after each piece of text was drawn.
   */
  constructor(message, texts, onDrawn) {
    this._message = message;
    this._texts = texts;
    const text = make("p", "text");
    const waiting = make("div", "waiting", make("i"), make("i"), make("i"));
    waiting.setAttribute("aria-hidden", "true");
    this._calls = make("div", "calls");
    this._status = make("p", "status");
    this._bubble = make("div", "bubble", text, waiting, this._calls, this._status);
    this.element = makeMessage("assistant", texts.say("guide"), this._bubble);
    this.element.dataset.messageId = message.messageId;
    this.element.dataset.requestId = message.requestId;
    this.stream = new StreamText(text, onDrawn);
    /** When the user acted, on the clock of `performance.now()`. */
    this._stoppedAt = 0;
    this._show();
  }

  /**
   * @param {FunctionCall} call
   * @param {(result: unknown) => boolean} onResult Sends the result; false if it could not.
   */
  addCall(call, onResult) {
    this._calls.append(new CallCard(call, this._texts, onResult).element);
  }

  /** @param {number} stoppedAt When the user acted, on the clock of `performance.now()`. */
  interrupt(stoppedAt) {
    this.stream.freeze();
    this._stoppedAt = stoppedAt;
    this.element.dataset.renderedChars = String(this.stream.drawnChars);
    this._show(make("strong", "", this._texts.say("statusStopped")));
  }

  /**
   * @param {InterruptAck} ack
   * @param {() => void} onShown Called after each change of the status line.
   */
  acknowledge(ack, onShown) {
    const { streamClosedMs, roundTripMs } = this._message;
    const outcome = ack.results.find((one) => one.request_id === this._message.requestId)?.outcome;
    const words =
      ack.status === "NO_ACK"
        ? this._texts.say("statusNoAck")
        : outcome === "TIMED_OUT"
          ? this._texts.say("statusStillOpen")
          : streamClosedMs === null
            ? this._texts.say("statusStopped")
            : this._texts.say("statusStoppedIn", { ms: streamClosedMs.toFixed(1) });
    const { dataset } = this.element;
    if (streamClosedMs !== null) dataset.streamClosedMs = String(streamClosedMs);
    if (roundTripMs !== null) dataset.roundTripMs = String(roundTripMs);
    const line = make("strong", "", words);
    this._show(line);
    onShown();
    if (this.stream.drawnChars === 0) return;
    // The last piece may be drawn but not painted yet.
    this.stream.whenPainted(() => {
      const late = Math.max(0, this.stream.lastPaintAt - this._stoppedAt);
      dataset.lastPaintMs = String(late);
      const measured =
        late === 0
          ? this._texts.say("statusNoPaint")
          : this._texts.say("statusLastPaint", { ms: late.toFixed(late < 10 ? 1 : 0) });
      this._show(line, " ", make("span", "", measured));
      onShown();
    });
  }

  complete() {
    this.stream.finish();
    const { finishReason, text, functionCalls } = this._message;
    for (const name of ["renderedChars", "code"]) delete this.element.dataset[name];
    if (finishReason === "length") this._show(this._texts.say("statusLength"));
    else if (finishReason === "content_filter") this._show(this._texts.say("statusFilter"));
    else if (text === "" && functionCalls.length === 0) this._show(this._texts.say("statusEmpty"));
    else this._show();
  }

  /** @param {(() => boolean) | null} onRetry Sends the question again; false if it could not. */
  fail(onRetry) {
    this.stream.finish();
    const { code, detail, retryable } = this._message.failure ?? {
      code: "INTERNAL_ERROR",
      detail: "",
      retryable: true,
    };
    this.element.dataset.code = code;
    const words = make("strong", "", this._texts.sayError(code, ""));
    this._show(words, ...(detail ? [" ", make("span", "", detail)] : []));
    if (!retryable || onRetry === null) return;
    const retry = make("button", "retry", this._texts.say("retry"));
    retry.type = "button";
    retry.addEventListener("click", () => {
      if (onRetry()) retry.remove();
    });
    this._bubble.append(retry);
  }

  /** @param {(Node | string)[]} status */
  _show(...status) {
    this.element.dataset.state = this._message.state;
    this.element.setAttribute("aria-busy", String(this._message.state === "streaming"));
    this._status.replaceChildren(...status);
  }
}

let cards = 0;

/** A function call of the model, with a form for its result. */
class CallCard {
  /**
   * @param {FunctionCall} call
   * @param {Texts} texts
   * @param {(result: unknown) => boolean} onResult Sends the result; false if it could not.
   */
  constructor(call, texts, onResult) {
    cards += 1;
    const id = `call-result-${cards}`;
    const title = make("h2", "", `${texts.say("call")} · `, make("code", "", call.name));
    const parameters = make("pre", "", JSON.stringify(call.parameters ?? {}, null, 2));
    const label = make("label", "", texts.say("callResult"));
    label.htmlFor = id;
    const input = make("textarea", "code");
    input.id = id;
    input.rows = 2;
    input.spellcheck = false;
    input.value = '{"ok": true}';
    const fault = make("p", "fault");
    fault.id = `${id}-fault`;
    fault.setAttribute("role", "alert");
    fault.hidden = true;
    const button = make("button", "", texts.say("callSend"));
    button.type = "submit";
    const form = make("form", "", label, input, fault, button);
    form.noValidate = true;
    this.element = make("section", "call", title, parameters);
    this.element.setAttribute("aria-label", `${texts.say("call")}: ${call.name}`);
    this.element.dataset.state = "waiting";
    if (!call.call_id) return; // servers other than bargein take no results
    this.element.dataset.callId = call.call_id;
    this.element.append(form);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      /** @type {unknown} */
      let result;
      try {
        result = JSON.parse(input.value);
      } catch (error) {
        const detail = error instanceof Error ? error.message : "";
        fault.textContent = texts.say("notJson", { detail });
        fault.hidden = false;
        input.setAttribute("aria-invalid", "true");
        input.setAttribute("aria-describedby", fault.id);
        input.focus();
        return;
      }
      fault.hidden = true;
      input.removeAttribute("aria-invalid");
      if (!onResult(result)) return;
      this.element.dataset.state = "answered";
      const sent = make("pre", "result", JSON.stringify(result, null, 2));
      form.replaceWith(make("p", "label", texts.say("callSent")), sent);
    });
  }
}

/**
 * Remove the forms of calls whose session has ended: their results would be rejected.
 *
 * @param {HTMLElement} messages
 * @param {Texts} texts
 */
export function retireCalls(messages, texts) {
  for (const form of messages.querySelectorAll('.call[data-state="waiting"] form')) {
    const card = /** @type {HTMLElement} */ (form.parentElement);
    card.dataset.state = "gone";
    form.replaceWith(make("p", "fault", texts.say("callGone")));
  }
}
