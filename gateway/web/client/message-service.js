/**
 * One conversation as the user sees it: a list of messages, with at most one answer in progress.
 *
 * Each answer is a message (`msg_…`), filled by one request (`req_…`). Interrupting is synchronous: in
 * one call the sound stops, the state is reset, the message becomes `interrupted`, and INTERRUPT is
 * sent. A new question can be sent in the same turn of the event loop. What the ack reports later
 * changes the old message only.
 *
 * No DOM: a page listens to `MessageEvents` and draws.
 */

import { Emitter, guarded } from "./events.js";
import { newId } from "./ids.js";
import { SILENT } from "./log.js";
import { RequestError, SYSTEM_CLOCK } from "./websocket-client.js";

/** @import { Log } from "./log.js" */
/** @import { Answer, Clock, FunctionCall, InterruptAck, InterruptReason } from "./websocket-client.js" */
/** @import { RequestOptions, SentRequest, SessionSettings } from "./websocket-client.js" */
/** @import { WebSocketClient } from "./websocket-client.js" */

/**
 * @typedef {object} Message An answer.
 * @property {string} messageId `msg_…`
 * @property {string} requestId `req_…`
 * @property {"streaming" | "complete" | "interrupted" | "failed"} state `interrupted`: by this
 *   user. An answer that the server ended early is `failed`.
 * @property {string} text All text received so far, drawn or not.
 * @property {FunctionCall[]} functionCalls
 * @property {string | null} continuation Id of the request that continues with the results of its
 *   function calls.
 * @property {InterruptReason | null} interruptReason
 * @property {number | null} streamClosedMs Set by the ack of an interrupt: time from reading INTERRUPT
 *   to closing the provider's stream, measured by the gateway.
 * @property {number | null} roundTripMs Set by the ack of an interrupt: time from sending INTERRUPT to
 *   receiving the ack, measured here.
 * @property {string | null} finishReason Set when `complete`; from the provider.
 * @property {Failure | null} failure Set when `failed`.
 */

/**
 * @typedef {object} Failure
 * @property {string} code An error code of the protocol, or `CONNECTION_LOST`, or, if the server ended
 *   the answer, its reason: `SERVER_SHUTDOWN`, `SESSION_TIMEOUT`, …
 * @property {string} detail In the server's words; may be empty.
 * @property {boolean} retryable
 */

/**
 * @typedef {{
 *   started: {message: Message},
 *   text: {message: Message, text: string},
 *   functioncall: {message: Message, call: FunctionCall},
 *   interrupted: {message: Message},
 *   acknowledged: {message: Message, ack: InterruptAck},
 *   completed: {message: Message},
 *   failed: {message: Message},
 *   state: {isReceivingResponse: boolean},
 * }} MessageEvents `interrupted` is emitted when the user interrupts. After the ack follows
 *   `acknowledged`; or, if the answer had been complete before the interrupt, `text` with the held
 *   text, and `completed`.
 */

/**
 * @typedef {object} Player The part of `AudioService` that is used here.
 * @property {(voice: string) => void} play Receives base64 of PCM.
 * @property {() => void} stopAllPlayback
 */

/**
 * @typedef {object} MessageServiceOptions
 * @property {Player | undefined} [audio] Plays speech. Without it, speech is ignored.
 * @property {((message: Message) => number) | undefined} [countRendered] Returns how many Unicode code
 *   points of a message are on the screen. Default: all that were received. It is rounded down. If it
 *   throws, or returns no finite number, the server counts what it sent.
 * @property {Log | undefined} [log]
 * @property {Clock | undefined} [clock]
 * @property {(() => number) | undefined} [random] Returns a number in [0, 1).
 */

/**
 * @typedef {object} MessageOptions
 * @property {SessionSettings | undefined} [update] Changes the session, for this and later messages.
 * @property {AbortSignal | undefined} [signal] Aborting it interrupts the answer.
 */

/**
 * @typedef {object} SentMessage
 * @property {string} messageId Of the answer.
 * @property {string} requestId
 * @property {Promise<Message>} promise Resolves when the answer has ended, in any way. Never rejects.
 */

/**
 * @param {string} text
 * @returns {number} Unicode code points, the unit in which the protocol counts text.
 */
export function countCodePoints(text) {
  let count = 0;
  for (const _ of text) count += 1;
  return count;
}

/** @extends {Emitter<MessageEvents>} */
export class MessageService extends Emitter {
  /**
   * @param {WebSocketClient} client
   * @param {MessageServiceOptions} [options]
   */
  constructor(client, options = {}) {
    super();
    /** @private */
    this._client = client;
    /** @private */
    this._audio = options.audio;
    /** @private */
    this._countRendered = options.countRendered ?? (({ text }) => countCodePoints(text));
    /** @private */
    this._log = options.log ?? SILENT;
    /** @private */
    this._clock = options.clock ?? SYSTEM_CLOCK;
    /** @private */
    this._random = options.random ?? Math.random;
    /** @private @type {Message | null} */
    this._current = null;
    /**
     * Per message, the ids of the calls that have a result.
     *
     * @private
     * @type {WeakMap<Message, Set<string>>}
     */
    this._answered = new WeakMap();
  }

  /** True from sending a question until its answer ends or is interrupted. */
  get isReceivingResponse() {
    return this._current !== null;
  }

  /** @returns {string | null} `req_…`; null when no answer is in progress. */
  get currentRequestId() {
    return this._current?.requestId ?? null;
  }

  /** @returns {string | null} `msg_…`; null when no answer is in progress. */
  get currentMessageId() {
    return this._current?.messageId ?? null;
  }

  /**
   * Send a question. An answer in progress is interrupted first, without waiting for its ack.
   *
   * @param {string} text
   * @param {MessageOptions} [options]
   * @returns {SentMessage}
   * @throws {RequestError} `NOT_CONNECTED`: nothing was sent or interrupted.
   * @throws {unknown} The reason of a signal that is aborted already: nothing was sent or interrupted.
   */
  sendTextMessage(text, { update, signal } = {}) {
    this._check();
    signal?.throwIfAborted();
    this._interruptOther();
    return this._begin(
      (options) => this._client.sendTextRequest(text, { ...options, update }),
      signal,
    );
  }

  /**
   * Stop the answer in progress, and all sound.
   *
   * @param {InterruptReason} [reason]
   * @returns {Promise<InterruptAck> | null} null if no answer was in progress; then nothing is sent.
   */
  interruptCurrentRequest(reason = "USER_STOP") {
    guarded(() => this._audio?.stopAllPlayback());
    const message = this._current;
    if (message === null) {
      this._log.info("[MessageService] 没有正在进行的请求");
      return null;
    }
    this._setCurrent(null);
    message.state = "interrupted";
    message.interruptReason = reason;
    /** @type {number | undefined} */
    let deliveredTextChars;
    guarded(() => {
      deliveredTextChars = this._countRendered(message);
    });
    this.emit("interrupted", { message });
    this._log.info(`[MessageService] 发送打断信号 - 请求ID: ${message.requestId}`);
    const promise = this._client.sendInterrupt(message.requestId, reason, { deliveredTextChars });
    return promise.then((ack) => {
      this._acknowledge(message, ack);
      return ack;
    });
  }

  /**
   * Send the result of a function call. After the result of the last call, the model continues in a
   * new message.
   *
   * @param {Message} message The answer with the call.
   * @param {string} callId
   * @param {unknown} result Any value that JSON can represent; undefined is sent as null.
   * @returns {SentMessage | null} The new message. null while other calls of the answer have no
   *   result, and if the new message exists already and was waiting for this result.
   * @throws {RequestError} `NOT_CONNECTED`: nothing was sent.
   * @throws {TypeError} JSON cannot represent the result: nothing was sent.
   */
  sendFunctionResult(message, callId, result) {
    this._check();
    JSON.stringify(result); // if it throws, nothing has changed, and another result can be sent
    const answered = this._answered.get(message) ?? new Set();
    // A call can arrive after the results of all earlier calls were sent. Then the request that
    // continues from them is already waiting for this result.
    const { continuation } = message;
    const isAwaited =
      continuation !== null && continuation === this.currentRequestId && !answered.has(callId);
    this._answered.set(message, answered.add(callId));
    const areOpen = message.functionCalls.some(({ call_id }) => !answered.has(call_id ?? ""));
    if (areOpen || isAwaited) {
      this._client.sendFunctionResult(callId, result);
      return null;
    }
    // The answer with the call may still wait for its last frame. It is not interrupted.
    if (this._current !== message) this._interruptOther();
    const sent = this._begin((options) =>
      this._client.continueWithResult(callId, result, options),
    );
    message.continuation = sent.requestId;
    return sent;
  }

  /** @private */
  _check() {
    if (!this._client.isReady) throw this._client.notConnected();
  }

  /** @private */
  _interruptOther() {
    if (this._current !== null) {
      this._log.info("[MessageService] 检测到新输入，打断当前响应");
      void this.interruptCurrentRequest("USER_NEW_INPUT");
    } else {
      guarded(() => this._audio?.stopAllPlayback()); // speech may still play after its text is complete
    }
  }

  /**
   * @private
   * @param {(options: RequestOptions) => SentRequest} send
   * @param {AbortSignal} [signal]
   * @returns {SentMessage}
   */
  _begin(send, signal) {
    /** @type {Message} */
    const message = {
      messageId: newId("msg", this._clock.now(), this._random),
      requestId: newId("req", this._clock.now(), this._random),
      state: "streaming",
      text: "",
      functionCalls: [],
      continuation: null,
      interruptReason: null,
      streamClosedMs: null,
      roundTripMs: null,
      finishReason: null,
      failure: null,
    };
    const { messageId, requestId } = message;
    const abort = () => {
      if (this._current === message) void this.interruptCurrentRequest("USER_STOP");
    };
    signal?.addEventListener("abort", abort);
    this._setCurrent(message);
    this._log.info(`[MessageService] 开始接收响应 - 请求ID: ${requestId}`);
    this.emit("started", { message });
    const { promise } = send({
      requestId,
      onText: (text) => {
        message.text += text;
        this.emit("text", { message, text });
      },
      onFunctionCall: (call) => {
        message.functionCalls.push(call);
        this.emit("functioncall", { message, call });
      },
      onVoice: (voice) => this._audio?.play(voice),
    });
    const ended = promise
      .then(
        (answer) => this._answer(message, answer),
        (error) => this._failed(message, error),
      )
      .then(() => {
        signal?.removeEventListener("abort", abort);
        return message;
      });
    return { messageId, requestId, promise: ended };
  }

  /** @private @param {Message | null} message */
  _setCurrent(message) {
    const was = this.isReceivingResponse;
    this._current = message;
    if (was !== this.isReceivingResponse) {
      this.emit("state", { isReceivingResponse: this.isReceivingResponse });
    }
  }

  /** @private @param {Message} message */
  _release(message) {
    if (this._current === message) this._setCurrent(null);
  }

  /**
   * @private
   * @param {Message} message
   * @param {Answer} answer
   */
  _answer(message, answer) {
    this._release(message);
    if (answer.outcome === "COMPLETED") {
      message.state = "complete";
      message.interruptReason = null;
      message.finishReason = answer.finishReason;
      this.emit("completed", { message });
    } else if (message.state !== "interrupted") {
      this._fail(message, answer.interruptReason ?? "OTHER", "", true);
    }
  }

  /**
   * @private
   * @param {Message} message
   * @param {unknown} error
   */
  _failed(message, error) {
    this._release(message);
    if (error instanceof RequestError) {
      // The user has interrupted this answer and has seen that; losing it now changes nothing.
      if (message.state === "interrupted" && error.code === "CONNECTION_LOST") return;
      this._fail(message, error.code, error.detail, error.retryable);
    } else {
      this._fail(message, "INTERNAL_ERROR", String(error), false);
    }
  }

  /**
   * @private
   * @param {Message} message
   * @param {string} code
   * @param {string} detail
   * @param {boolean} retryable
   */
  _fail(message, code, detail, retryable) {
    message.state = "failed";
    message.failure = { code, detail, retryable };
    this.emit("failed", { message });
  }

  /**
   * @private
   * @param {Message} message
   * @param {InterruptAck} ack
   */
  _acknowledge(message, ack) {
    const result = ack.results.find((one) => one.request_id === message.requestId);
    // ALREADY_DONE: `completed` or `failed` follows. Not `interrupted`: one of them came before the ack.
    if (result?.outcome === "ALREADY_DONE" || message.state !== "interrupted") return;
    message.streamClosedMs = result?.stream_closed_ms ?? null;
    message.roundTripMs = ack.roundTripMs;
    this.emit("acknowledged", { message, ack });
  }
}
