/**
 * One conversation as a user sees it: messages, of which at most one is being answered.
 *
 * It gives each answer a message (`msg_…`) and knows which request (`req_…`) fills it. Interrupting
 * waits for nothing: sound stops, the state is clean, the message is `interrupted`, INTERRUPT is on
 * its way; a new question follows in the same turn of the event loop. What the ack says later goes to
 * the old message only.
 *
 * No DOM: a page listens to `MessageEvents` and draws.
 */

import { Emitter, guarded } from "./events.js";
import { newId } from "./ids.js";
import { SILENT } from "./log.js";
import { RequestError, SYSTEM_CLOCK } from "./websocket-client.js";

/** @typedef {import("./websocket-client.js").Answer} Answer */
/** @typedef {import("./websocket-client.js").FunctionCall} FunctionCall */
/** @typedef {import("./websocket-client.js").InterruptAck} InterruptAck */
/** @typedef {import("./websocket-client.js").InterruptReason} InterruptReason */
/** @typedef {import("./websocket-client.js").SentRequest} SentRequest */
/** @typedef {import("./websocket-client.js").SessionSettings} SessionSettings */

/**
 * @typedef {object} Message an answer.
 * @property {string} messageId `msg_…`
 * @property {string} requestId `req_…`
 * @property {"streaming" | "complete" | "interrupted" | "failed"} state `interrupted`: by this user;
 *   what the server broke off has failed.
 * @property {string} text all of it that has come, shown or not.
 * @property {FunctionCall[]} functionCalls
 * @property {string | null} continuation request that goes on from its calls.
 * @property {InterruptReason | null} interruptReason
 * @property {number | null} streamClosedMs with `interrupted`, once the ack is there: from reading
 *   the INTERRUPT to the provider's stream being closed, measured by the gateway.
 * @property {number | null} roundTripMs with it: from sending it to its ack, measured here.
 * @property {string | null} finishReason with `complete`: the provider's.
 * @property {Failure | null} failure with `failed`.
 */

/**
 * @typedef {object} Failure
 * @property {string} code the protocol's, or `CONNECTION_LOST`, or, where the server ended it, its
 *   reason: `SERVER_SHUTDOWN`, `SESSION_TIMEOUT`, ….
 * @property {string} detail the server's words; may be empty.
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
 * }} MessageEvents `interrupted` comes at the user's word; then, after the ack, `acknowledged`, or
 *   `text` (as much as was kept) and `completed`, where the answer had been complete before.
 */

/**
 * @typedef {object} Player what `AudioService` does.
 * @property {(voice: string) => void} play base64 of PCM.
 * @property {() => void} stopAllPlayback
 */

/**
 * @typedef {object} MessageServiceOptions
 * @property {Player} [audio]
 * @property {(message: Message) => number} [countRendered] how many Unicode code points of a message
 *   are on the screen; without it, all that has come. Where it throws, the server counts what it sent.
 * @property {import("./log.js").Log} [log]
 * @property {import("./websocket-client.js").Clock} [clock]
 * @property {() => number} [random]
 */

/**
 * @typedef {object} SentMessage
 * @property {string} messageId of the answer.
 * @property {string} requestId
 * @property {Promise<Message>} promise resolves when the answer has ended, in whatever way; never
 *   rejects.
 */

/**
 * @param {string} text
 * @returns {number} Unicode code points, which is what the protocol counts.
 */
export function countCodePoints(text) {
  let count = 0;
  for (const _ of text) count += 1;
  return count;
}

/** @extends {Emitter<MessageEvents>} */
export class MessageService extends Emitter {
  /**
   * @param {import("./websocket-client.js").WebSocketClient} client
   * @param {MessageServiceOptions} [options]
   */
  constructor(client, options = {}) {
    super();
    this._client = client;
    this._audio = options.audio;
    this._countRendered = options.countRendered ?? (({ text }) => countCodePoints(text));
    this._log = options.log ?? SILENT;
    this._clock = options.clock ?? SYSTEM_CLOCK;
    this._random = options.random ?? Math.random;
    /** @type {Message | null} */
    this._current = null;
    /** @type {WeakMap<Message, Set<string>>} of each message the calls that have their result. */
    this._answered = new WeakMap();
  }

  /** True from the question to the end of its answer, or its interruption. */
  get isReceivingResponse() {
    return this._current !== null;
  }

  /** @returns {string | null} `req_…` */
  get currentRequestId() {
    return this._current?.requestId ?? null;
  }

  /** @returns {string | null} `msg_…` */
  get currentMessageId() {
    return this._current?.messageId ?? null;
  }

  /**
   * Ask. An answer that still streams is interrupted first, without waiting for anything.
   *
   * @param {string} text
   * @param {{update?: SessionSettings, signal?: AbortSignal}} [options] `signal` interrupts.
   * @returns {SentMessage}
   * @throws {RequestError} `NOT_CONNECTED`: nothing was sent, nothing was interrupted.
   */
  sendTextMessage(text, { update, signal } = {}) {
    this._check();
    signal?.throwIfAborted();
    this._makeWay();
    return this._begin(
      (options) => this._client.sendTextRequest(text, { ...options, ...(update && { update }) }),
      signal,
    );
  }

  /**
   * Stop the answer that streams.
   *
   * @param {InterruptReason} [reason]
   * @returns {Promise<InterruptAck> | null} null when nothing runs: nothing was sent.
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
   * Say what a function returned that an answer called. With the result of its last call the model
   * goes on, in a message of its own.
   *
   * @param {Message} message the answer with the call.
   * @param {string} callId
   * @param {unknown} result any JSON.
   * @returns {SentMessage | null} null while other calls of the answer wait for their result, or
   *   where the message that goes on from them has waited for this one.
   * @throws {RequestError} `NOT_CONNECTED`: nothing was sent.
   */
  sendFunctionResult(message, callId, result) {
    this._check();
    const answered = this._answered.get(message) ?? new Set();
    // A call may come when the results of those before it were sent, and the model waits for it.
    const { continuation } = message;
    const isAwaited =
      continuation !== null && continuation === this.currentRequestId && !answered.has(callId);
    this._answered.set(message, answered.add(callId));
    const areOpen = message.functionCalls.some(({ call_id }) => !answered.has(call_id ?? ""));
    if (areOpen || isAwaited) {
      this._client.sendFunctionResult(callId, result);
      return null;
    }
    // The answer that it goes on from may still have its last frame to come.
    if (this._current !== message) this._makeWay();
    const sent = this._begin((options) =>
      this._client.continueWithResult(callId, result, options),
    );
    message.continuation = sent.requestId;
    return sent;
  }

  _check() {
    if (!this._client.isReady) throw this._client.notConnected();
  }

  _makeWay() {
    if (this._current !== null) {
      this._log.info("[MessageService] 检测到新输入，打断当前响应");
      void this.interruptCurrentRequest("USER_NEW_INPUT");
    } else {
      guarded(() => this._audio?.stopAllPlayback()); // speech outlasts text
    }
  }

  /**
   * @param {(options: import("./websocket-client.js").RequestOptions) => SentRequest} send
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

  /** @param {Message | null} message */
  _setCurrent(message) {
    const was = this.isReceivingResponse;
    this._current = message;
    if (was !== this.isReceivingResponse) {
      this.emit("state", { isReceivingResponse: this.isReceivingResponse });
    }
  }

  /** @param {Message} message */
  _release(message) {
    if (this._current === message) this._setCurrent(null);
  }

  /**
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
   * @param {Message} message
   * @param {unknown} error
   */
  _failed(message, error) {
    this._release(message);
    if (error instanceof RequestError) {
      // The user has turned away from it, and was told so: what failed later is no news.
      if (message.state === "interrupted" && error.code === "CONNECTION_LOST") return;
      this._fail(message, error.code, error.detail, error.retryable);
    } else {
      this._fail(message, "INTERNAL_ERROR", String(error), false);
    }
  }

  /**
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
   * @param {Message} message
   * @param {InterruptAck} ack
   */
  _acknowledge(message, ack) {
    const result = ack.results.find((one) => one.request_id === message.requestId);
    // Its end says it all: it is on its way, or was there before an ack that says nothing of it.
    if (result?.outcome === "ALREADY_DONE" || message.state !== "interrupted") return;
    message.streamClosedMs = result?.stream_closed_ms ?? null;
    message.roundTripMs = ack.roundTripMs;
    this.emit("acknowledged", { message, ack });
  }
}
