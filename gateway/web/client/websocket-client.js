/**
 * One session with a bargein gateway over one WebSocket. It reconnects when the connection is lost.
 *
 * This module knows requests by their id. Messages, pages and sound are the business of other modules.
 * In order of time:
 *
 *     connect()           opens a socket and sends REGISTER; REGISTER_ACK makes the state `ready`
 *     sendTextRequest()   sends REQUEST; frames with its `request_id` go to its handlers
 *     sendInterrupt()     sends INTERRUPT; from now on the frames of its targets are held back
 *     INTERRUPT_ACK       ALREADY_DONE: the request had ended before, so the held frames are delivered;
 *                         any other outcome: they are dropped. If no ack comes in time, the terminal
 *                         frame decides.
 *     connection lost     every live request fails; a new session is registered after a pause
 *
 * No DOM. Everything that it takes from the browser can be replaced: see `ClientOptions`.
 */

import { Emitter, guarded } from "./events.js";
import { newId } from "./ids.js";
import { SILENT } from "./log.js";

/** @import { Log } from "./log.js" */

const PROTOCOL_VERSION = "1.0";

/** How long to wait for an INTERRUPT_ACK, in milliseconds. Existing clients wait as long. */
export const ACK_TIMEOUT_MS = 15_000;

/**
 * A connection that receives nothing for this long is treated as lost, in milliseconds. The gateway
 * sends HEARTBEAT every 30 s.
 */
export const SILENCE_TIMEOUT_MS = 600_000;

/** Limit on the time from opening the socket to REGISTER_ACK, in milliseconds. */
export const REGISTER_TIMEOUT_MS = 15_000;

const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 20_000;

/** A session that lasted this long resets the count of failed attempts. */
const STABLE_MS = 5_000;

/** Close code "try again later", from the registry of RFC 6455. */
const TRY_AGAIN_LATER = 1013;

/** Half of a surrogate pair, left where a text was cut. It has no encoding in UTF-8. */
const LONE_SURROGATES = /\p{Surrogate}/gu;

// Types of the wire

/**
 * @typedef {{type: "API_KEY", api_key: string}
 *   | {type: "ACCOUNT", account: string, password: string}} Auth
 */

/**
 * @typedef {object} FunctionParameter
 * @property {string} name
 * @property {"string" | "number" | "integer" | "boolean" | "array" | "object"} type
 * @property {string} [description]
 * @property {boolean} [required]
 */

/**
 * @typedef {object} FunctionDefinition A function that the model may call.
 * @property {string} name
 * @property {string} [description]
 * @property {Record<string, any> | FunctionParameter[]} [parameters] A JSON Schema of type object,
 *   or a list of parameters.
 */

/**
 * @typedef {object} SessionSettings What REGISTER sets and a REQUEST can change.
 * @property {boolean} [require_tts]
 * @property {boolean} [enable_srs]
 * @property {FunctionDefinition[]} [function_calling]
 * @property {{role_description?: string, response_requirements?: string}} [system_prompt]
 * @property {{scene_description?: string, keywords?: string[]}} [scene_context]
 */

/**
 * @typedef {SessionSettings & {
 *   auth: Auth,
 *   platform?: "WEB" | "APP" | "MINI_PROGRAM" | "TV",
 *   on_new_request?: "interrupt" | "parallel" | "reject",
 * }} Registration The payload of REGISTER.
 */

/** @typedef {"USER_NEW_INPUT" | "USER_STOP" | "USER_VOICE_INPUT" | "CLIENT_ERROR"} InterruptReason */

/**
 * @typedef {object} FunctionCall
 * @property {string} name
 * @property {Record<string, any>} parameters
 * @property {string} [call_id] The argument for `sendFunctionResult`. Every bargein gateway sends it.
 */

/**
 * @typedef {object} Usage
 * @property {number} prompt_tokens
 * @property {number} completion_tokens
 * @property {number} total_tokens
 * @property {boolean} [estimated]
 */

/**
 * @typedef {object} InterruptResult
 * @property {string} request_id
 * @property {"STOPPED" | "ALREADY_DONE" | "UNKNOWN" | "TIMED_OUT"} outcome
 * @property {number} delivered_text_chars
 * @property {number | null} stream_closed_ms
 * @property {"yes" | "no" | "unknown"} [stops_on_close] Whether the provider stops generating when
 *   its connection is closed.
 */

// Types of the library

/**
 * @typedef {object} InterruptAck The result of an INTERRUPT.
 * @property {string | null} requestId The target; null means all live requests.
 * @property {"SUCCESS" | "PARTIAL" | "FAILED" | "NO_ACK"} status `NO_ACK`: no ack came in time, or
 *   the connection was lost.
 * @property {InterruptResult[]} results One for each target. Servers other than bargein send none.
 * @property {number | null} roundTripMs From sending INTERRUPT to receiving its ack.
 */

/**
 * @typedef {object} Answer How a request ended, if it did not fail.
 * @property {string} requestId
 * @property {"COMPLETED" | "INTERRUPTED"} outcome
 * @property {string | null} interruptReason
 * @property {string | null} finishReason From the provider: `stop`, `length`, `content_filter`, …
 * @property {Usage | null} usage
 * @property {string} text All text that was delivered to `onText`.
 * @property {FunctionCall[]} functionCalls
 */

/**
 * @typedef {object} Handlers Called in the order of the frames. Not called after an interrupt, unless
 *   the answer had been complete before it.
 * @property {((text: string) => void) | undefined} [onText] Receives a piece of the answer.
 * @property {((call: FunctionCall) => void) | undefined} [onFunctionCall]
 * @property {((voice: string) => void) | undefined} [onVoice] Receives base64 of 16 kHz 16-bit mono
 *   PCM.
 */

/**
 * @typedef {Handlers & {
 *   requestId?: string | undefined,
 *   update?: SessionSettings | undefined,
 *   signal?: AbortSignal | undefined,
 * }} RequestOptions `requestId` must be new in the session: ids are made if it is left out. `update`
 *   changes the session, for this request and all later ones. Aborting `signal` sends INTERRUPT and
 *   rejects the promise with the signal's reason, as `fetch` does.
 */

/**
 * @typedef {object} InterruptOptions
 * @property {number | undefined} [deliveredTextChars] How many Unicode code points of the answer the
 *   user has seen. Rounded down to a whole number, 0 or more. Without it, or if it is not a finite
 *   number, the server counts what it sent.
 */

/** @typedef {{requestId: string, promise: Promise<Answer>}} SentRequest */

/**
 * @typedef {object} ServerError An ERROR frame.
 * @property {string} code
 * @property {string} message What the code means.
 * @property {string} detail What happened.
 * @property {boolean} retryable
 */

/**
 * @typedef {object} ConnectionState
 * @property {"offline" | "connecting" | "ready" | "waiting" | "refused"} name `waiting`: until the
 *   next attempt to connect. `refused`: the server rejected the registration; it is not repeated until
 *   `connect()` is called.
 * @property {"none" | "lost" | "restarting" | "expired"} cause Why the last connection ended.
 * @property {number} retryInMs Time until the next attempt; 0 in states other than `waiting`.
 * @property {ServerError | null} error The reason for `refused`; null in other states.
 * @property {boolean} isAgain Whether this client had a session before.
 */

/**
 * @typedef {{
 *   state: ConnectionState,
 *   warning: {remainingSeconds: number, message: string},
 *   error: ServerError,
 *   ack: InterruptAck,
 *   frame: {direction: "in" | "out", msgType: string, payload: Record<string, any>},
 * }} ClientEvents `error` carries an ERROR frame without a `request_id`.
 */

/**
 * @typedef {object} Socket The part of the browser's WebSocket that the client uses.
 * @property {(data: string) => void} send
 * @property {(code?: number, reason?: string) => void} close
 * @property {((event: any) => void) | null} onopen
 * @property {((event: any) => void) | null} onmessage
 * @property {((event: any) => void) | null} onclose
 * @property {((event: any) => void) | null} onerror
 */

/**
 * @typedef {object} Clock
 * @property {() => number} now Milliseconds since the epoch.
 * @property {() => number} monotonic Milliseconds since any fixed point.
 * @property {(callback: () => void, ms: number) => unknown} setTimeout
 * @property {(timer: any) => void} clearTimeout
 */

/**
 * @typedef {object} ClientOptions
 * @property {string} url For example `wss://chat.example.com/ws/agent/stream`.
 * @property {() => Registration} registration Called before each REGISTER.
 * @property {(new (url: string) => Socket) | undefined} [WebSocket] Default: the global one.
 * @property {Clock | undefined} [clock]
 * @property {(() => number) | undefined} [random] Returns a number in [0, 1).
 * @property {Log | undefined} [log]
 * @property {number | undefined} [ackTimeoutMs]
 * @property {number | undefined} [silenceTimeoutMs]
 */

/** A request failed. */
export class RequestError extends Error {
  /**
   * @param {string} requestId
   * @param {ServerError} error `code` is a code of the protocol, or `NOT_CONNECTED` (nothing was
   *   sent), or `CONNECTION_LOST`.
   */
  constructor(requestId, error) {
    super(`${error.code}: ${error.detail || error.message}`);
    this.name = "RequestError";
    this.requestId = requestId;
    this.code = error.code;
    this.detail = error.detail;
    this.retryable = error.retryable;
  }
}

/** The server rejected the registration. */
export class RegistrationError extends Error {
  /** @param {ServerError} error */
  constructor(error) {
    super(`${error.code}: ${error.detail || error.message}`);
    this.name = "RegistrationError";
    this.code = error.code;
    this.detail = error.detail;
  }
}

/** @type {Clock} */
export const SYSTEM_CLOCK = {
  now: () => Date.now(),
  monotonic: () => performance.now(),
  setTimeout: (callback, ms) => setTimeout(callback, ms),
  clearTimeout: (timer) => clearTimeout(timer),
};

/** A request that has not ended. */
class LiveRequest {
  /**
   * @param {string} requestId
   * @param {Handlers} handlers
   */
  constructor(requestId, handlers) {
    this.requestId = requestId;
    this.handlers = handlers;
    this.text = "";
    /** @type {FunctionCall[]} */
    this.functionCalls = [];
    /** @type {InterruptReason | null} */
    this.stopReason = null;
    this.isSilenced = false;
    /** Frames received after the interrupt. @type {{type: string, payload: any}[]} */
    this.heldFrames = [];
    /** @type {() => void} */
    this.forgetSignal = () => undefined;
    /** @type {(answer: Answer) => void} */
    this.resolve = () => undefined;
    /** @type {(error: unknown) => void} */
    this.reject = () => undefined;
    /** @type {Promise<Answer>} */
    this.promise = new Promise((resolve, reject) => {
      this.resolve = resolve;
      this.reject = reject;
    });
  }

  /** @returns {{type: string, payload: any} | undefined} */
  get heldTerminal() {
    return this.heldFrames.find(({ type, payload }) => isTerminal(type, payload));
  }
}

/** An INTERRUPT that is waiting for its ack. */
class PendingInterrupt {
  /**
   * @param {string | null} requestId The target; null means all live requests.
   * @param {number} sentAt On the monotonic clock.
   */
  constructor(requestId, sentAt) {
    this.requestId = requestId;
    this.sentAt = sentAt;
    /** Ids of the live requests that it stopped. @type {string[]} */
    this.targets = [];
    /** Whether it was sent a second time, after an ERROR. */
    this.isRepeated = false;
    /** @type {unknown} */
    this.timer = undefined;
    /** @type {(ack: InterruptAck) => void} */
    this.resolve = () => undefined;
  }
}

/** @extends {Emitter<ClientEvents>} */
export class WebSocketClient extends Emitter {
  /** @param {ClientOptions} options */
  constructor(options) {
    super();
    /** The gateway's address. `close(url)` changes it. */
    this.url = options.url;
    /** @type {ConnectionState} */
    this.state = { name: "offline", cause: "none", retryInMs: 0, error: null, isAgain: false };
    /** From REGISTER_ACK; null without a session. @type {string | null} */
    this.sessionId = null;

    /** @private */
    this._registration = options.registration;
    /** @private */
    this._WebSocket = options.WebSocket ?? /** @type {any} */ (globalThis).WebSocket;
    /** @private */
    this._clock = options.clock ?? SYSTEM_CLOCK;
    /** @private */
    this._random = options.random ?? Math.random;
    /** @private */
    this._log = options.log ?? SILENT;
    /** @private */
    this._ackTimeoutMs = options.ackTimeoutMs ?? ACK_TIMEOUT_MS;
    /** @private */
    this._silenceTimeoutMs = options.silenceTimeoutMs ?? SILENCE_TIMEOUT_MS;
    /** @private @type {Socket | null} */
    this._socket = null;
    /** @private */
    this._failures = 0;
    /** @private */
    this._readyAt = 0;
    /** @private */
    this._hadSession = false;
    /** What the server announced before it closed. @private @type {ConnectionState["cause"]} */
    this._announced = "none";
    /** @private @type {unknown} */
    this._timer = undefined;
    /** @private @type {unknown} */
    this._silenceTimer = undefined;
    /** @private @type {Map<string, LiveRequest>} */
    this._live = new Map();
    /** In the order in which they were sent. @private @type {PendingInterrupt[]} */
    this._interrupts = [];
    /** @private @type {{resolve: () => void, reject: (error: Error) => void}[]} */
    this._connecting = [];
  }

  /** Whether a session is registered, so that requests can be sent. */
  get isReady() {
    return this.state.name === "ready";
  }

  // Connection

  /**
   * Connect and register, and do so again whenever the connection is lost.
   *
   * @returns {Promise<void>} Resolves when a session is registered. Rejects with `RegistrationError`
   *   if the server rejects the registration, and with `Error` after `close()`.
   */
  connect() {
    if (this.isReady) return Promise.resolve();
    /** @type {Promise<void>} */
    const promise = new Promise((resolve, reject) => this._connecting.push({ resolve, reject }));
    if (this.state.name !== "connecting") {
      this._failures = 0;
      this._open();
    }
    return promise;
  }

  /** Try now instead of waiting for the next attempt, for example when the network is back. */
  retryNow() {
    if (this.state.name === "waiting") this._open();
  }

  /**
   * End the session and stay offline.
   *
   * @param {string} [url] Address of another server, for the next `connect()`.
   */
  close(url) {
    if (this.isReady) this._send("SHUTDOWN", { reason: "CLIENT_CLOSED" });
    this._disconnect("none");
    this.url = url ?? this.url;
    this._setState({ name: "offline", cause: "none" });
    this._failConnecting(new Error("closed"));
  }

  /** @private */
  _open() {
    this._disconnect(this.state.cause);
    if (!this._WebSocket) {
      const detail = "pass one as the option `WebSocket`, as Node has none before version 22";
      this._refused({ code: "NO_WEBSOCKET", message: "no WebSocket here", detail, retryable: false });
      return;
    }
    /** @type {Socket} */
    let socket;
    try {
      socket = new this._WebSocket(this.url);
    } catch (error) {
      const detail = error instanceof Error ? error.message : String(error);
      this._refused({ code: "BAD_URL", message: "invalid address", detail, retryable: false });
      return;
    }
    this._socket = socket;
    this._announced = "none";
    // Events of a socket that has been replaced are ignored.
    socket.onopen = () => socket === this._socket && this._register();
    socket.onmessage = (event) => socket === this._socket && this._receive(event.data);
    socket.onclose = (event) => socket === this._socket && this._lost(event.code);
    socket.onerror = null; // a `close` event always follows
    this._timer = this._clock.setTimeout(() => this._lost(1006), REGISTER_TIMEOUT_MS);
    this._setState({ name: "connecting", cause: this.state.cause });
  }

  /** @private */
  _register() {
    this._send("REGISTER", { platform: "WEB", ...this._registration() });
  }

  /** @private @param {Record<string, any>} payload Of REGISTER_ACK. */
  _registered(payload) {
    this._clock.clearTimeout(this._timer);
    this.sessionId = payload.session_id;
    this._readyAt = this._clock.monotonic();
    this._setState({ name: "ready", cause: this.state.cause });
    this._hadSession = true;
    for (const { resolve } of this._connecting.splice(0)) resolve();
  }

  /** @private @param {ServerError} error */
  _refused(error) {
    this._disconnect("none");
    this._setState({ name: "refused", cause: "none", error });
    this._failConnecting(new RegistrationError(error));
  }

  /** @private @param {number} code Of the close frame. */
  _lost(code) {
    const wasReady = this.isReady;
    if (wasReady && this._clock.monotonic() - this._readyAt >= STABLE_MS) this._failures = 0;
    const cause =
      this._announced !== "none"
        ? this._announced
        : code === 1012 || code === 1001
          ? "restarting"
          : code === 1008
            ? "expired"
            : wasReady
              ? "lost"
              : this.state.cause === "none"
                ? "lost"
                : this.state.cause;
    this._log.debug(`[WebSocket] 连接断开: ${code}`);
    this._disconnect(cause);
    // The server ended the session and the network is fine: the first attempt needs no pause.
    const pause = cause === "expired" && this._failures === 0 ? 0 : this._pause();
    this._failures += 1;
    this._setState({ name: "waiting", cause, retryInMs: pause });
    this._timer = this._clock.setTimeout(() => this._open(), pause);
  }

  /**
   * Half of the pause is random, so that the clients of a restarted server do not all return at once.
   *
   * @private
   * @returns {number} Milliseconds.
   */
  _pause() {
    const longest = Math.min(LONGEST_PAUSE_MS, FIRST_PAUSE_MS * 2 ** this._failures);
    return Math.round(longest * (0.5 + this._random() / 2));
  }

  /**
   * Close the socket and end everything that depended on it.
   *
   * @private
   * @param {ConnectionState["cause"]} cause
   */
  _disconnect(cause) {
    this._clock.clearTimeout(this._timer);
    this._clock.clearTimeout(this._silenceTimer);
    const socket = this._socket;
    this._socket = null;
    this.sessionId = null;
    this.state = { ...this.state, name: "offline", cause }; // the caller emits the next state
    if (socket) {
      socket.onopen = socket.onmessage = socket.onclose = null;
      socket.close(1000);
    }
    for (const interrupt of this._interrupts.splice(0)) this._noAck(interrupt);
    for (const live of [...this._live.values()]) {
      this._fail(live, {
        code: "CONNECTION_LOST",
        message: "connection lost",
        detail: "",
        retryable: true,
      });
    }
  }

  /** @private @param {Partial<ConnectionState> & {name: ConnectionState["name"]}} state */
  _setState(state) {
    this.state = {
      cause: "none",
      retryInMs: 0,
      error: null,
      isAgain: this._hadSession,
      ...state,
    };
    this._log.debug(`[WebSocket] 连接状态: ${this.state.name}`);
    this.emit("state", this.state);
  }

  /** @private @param {Error} error */
  _failConnecting(error) {
    for (const { reject } of this._connecting.splice(0)) reject(error);
  }

  // Requests

  /**
   * Send a REQUEST. An empty text only updates the session.
   *
   * @param {string} text
   * @param {RequestOptions} [options]
   * @returns {SentRequest} Its promise resolves when the answer is complete or interrupted, and
   *   rejects with `RequestError` if it failed, or with `TypeError` if JSON cannot represent
   *   `options.update`.
   * @throws {RangeError} `options.requestId` belongs to a live request.
   */
  sendTextRequest(text, options = {}) {
    /** @type {Record<string, any>} */
    const payload = {
      data_type: "TEXT",
      stream_flag: false,
      stream_seq: 0,
      content: { text },
    };
    if (options.update) payload.update_session = options.update;
    return this._request("REQUEST", payload, options);
  }

  /**
   * Send the result of a function call while other calls of that answer still wait for theirs.
   *
   * @param {string} callId
   * @param {unknown} result Any value that JSON can represent; undefined is sent as null.
   * @returns {void}
   * @throws {RequestError} `NOT_CONNECTED`: nothing was sent.
   * @throws {TypeError} JSON cannot represent the result: nothing was sent.
   */
  sendFunctionResult(callId, result) {
    if (!this.isReady) throw this.notConnected();
    this._send("FUNCTION_RESULT", { call_id: callId, result: result ?? null });
  }

  /**
   * Send the result of the last (or only) function call of an answer, and let the model continue.
   *
   * @param {string} callId
   * @param {unknown} result Any value that JSON can represent; undefined is sent as null.
   * @param {Omit<RequestOptions, "update">} [options]
   * @returns {SentRequest} Like that of `sendTextRequest`.
   */
  continueWithResult(callId, result, options = {}) {
    const payload = { call_id: callId, result: result ?? null };
    return this._request("FUNCTION_RESULT", payload, options);
  }

  /**
   * Stop one request, or all of them. From now on nothing of it is delivered, unless the ack reports
   * that it had ended before.
   *
   * If the server answers with an ERROR, the INTERRUPT is sent once more with its target only, so that no
   * other field can be the reason to refuse it.
   *
   * @param {string | null} requestId null stops every live request.
   * @param {InterruptReason} [reason]
   * @param {InterruptOptions} [options]
   * @returns {Promise<InterruptAck>} Never rejects.
   */
  sendInterrupt(requestId, reason = "USER_STOP", { deliveredTextChars } = {}) {
    const interrupt = new PendingInterrupt(requestId, this._clock.monotonic());
    /** @type {Promise<InterruptAck>} */
    const promise = new Promise((resolve) => {
      interrupt.resolve = resolve;
    });
    if (!this.isReady) {
      this._noAck(interrupt);
      return promise;
    }
    const targets = requestId === null ? [...this._live.keys()] : [requestId];
    for (const target of targets) {
      const live = this._live.get(target);
      if (live && live.stopReason === null) {
        live.stopReason = reason;
        live.isSilenced = true;
        interrupt.targets.push(target);
      }
    }
    /** @type {Record<string, any>} */
    const payload = { interrupt_request_id: requestId, reason };
    const chars = wholeCount(deliveredTextChars);
    if (chars !== undefined) payload.delivered_text_chars = chars;
    this._interrupts.push(interrupt);
    interrupt.timer = this._clock.setTimeout(() => {
      this._interrupts.splice(this._interrupts.indexOf(interrupt), 1);
      this._log.debug(`[WebSocket] 打断确认超时: ${requestId ?? "*"}`);
      this._noAck(interrupt);
    }, this._ackTimeoutMs);
    this._log.info(`[WebSocket] 发送打断请求: ${requestId ?? "*"}`);
    this._send("INTERRUPT", payload);
    return promise;
  }

  /**
   * @private
   * @param {string} msgType
   * @param {Record<string, any>} payload
   * @param {RequestOptions} options
   * @returns {SentRequest}
   */
  _request(msgType, payload, options) {
    const requestId = options.requestId ?? newId("req", this._clock.now(), this._random);
    if (this._live.has(requestId)) throw new RangeError(`request ${requestId} is live`);
    const live = new LiveRequest(requestId, options);
    const { signal } = options;
    if (signal?.aborted) {
      live.reject(signal.reason);
    } else if (!this.isReady) {
      live.reject(this.notConnected(requestId));
    } else {
      this._live.set(requestId, live);
      if (signal) {
        const abort = () => {
          live.reject(signal.reason);
          live.handlers = {}; // the promise is rejected: no later frame is delivered
          void this.sendInterrupt(requestId, "USER_STOP");
        };
        signal.addEventListener("abort", abort);
        live.forgetSignal = () => signal.removeEventListener("abort", abort);
      }
      try {
        this._send(msgType, { request_id: requestId, ...payload });
      } catch (error) {
        this._forget(live); // nothing was sent: JSON cannot represent the payload
        live.reject(error);
      }
    }
    return { requestId, promise: live.promise };
  }

  /**
   * @param {string} [requestId]
   * @returns {RequestError} The error of a request that cannot be sent.
   */
  notConnected(requestId = "") {
    const detail = this.state.name;
    const message = "not connected";
    return new RequestError(requestId, { code: "NOT_CONNECTED", message, detail, retryable: true });
  }

  // Frames

  /**
   * @private
   * @param {string} msgType
   * @param {Record<string, any>} payload
   */
  _send(msgType, payload) {
    const frame = {
      version: PROTOCOL_VERSION,
      msg_type: msgType,
      session_id: this.sessionId,
      payload,
      timestamp: this._clock.now(),
    };
    this._socket?.send(
      JSON.stringify(frame, (_key, value) =>
        typeof value === "string" ? value.replace(LONE_SURROGATES, "\ufffd") : value,
      ),
    );
    this.emit("frame", { direction: "out", msgType, payload });
  }

  /** @private @param {unknown} data Of a WebSocket message. */
  _receive(data) {
    this._clock.clearTimeout(this._silenceTimer);
    this._silenceTimer = this._clock.setTimeout(() => this._lost(1006), this._silenceTimeoutMs);
    /** @type {any} */
    let frame;
    try {
      frame = JSON.parse(String(data));
    } catch {
      frame = null;
    }
    const type = frame?.msg_type;
    const payload = frame?.payload;
    if (typeof type !== "string" || typeof payload !== "object" || payload === null) {
      this._log.debug("[WebSocket] 收到无法解析的帧");
      return;
    }
    switch (type) {
      case "RESPONSE":
        this._route(type, payload);
        break;
      case "INTERRUPT_ACK":
        this._acked(payload);
        break;
      case "HEARTBEAT":
        this._send("HEARTBEAT_REPLY", { client_status: "ONLINE" });
        break;
      case "REGISTER_ACK":
        if (this.state.name === "connecting") this._registered(payload);
        break;
      case "ERROR":
        this._error(payload);
        break;
      case "SESSION_WARN":
        this.emit("warning", {
          remainingSeconds: Number(payload.remaining_seconds),
          message: String(payload.message ?? ""),
        });
        break;
      case "SHUTDOWN":
        this._announced = payload.reason === "session timeout" ? "expired" : "restarting";
        break;
      default: // SESSION_INFO and HEALTH_CHECK_ACK: only listeners of `frame` get them
        break;
    }
    this.emit("frame", { direction: "in", msgType: type, payload });
  }

  /** @private @param {Record<string, any>} payload Of ERROR. */
  _error(payload) {
    if (typeof payload.request_id === "string") {
      this._route("ERROR", payload);
      return;
    }
    const error = serverError(payload);
    if (this.state.name === "connecting") {
      // A server that drains or is full may accept the same registration later; a wrong key stays wrong.
      if (error.retryable && error.code !== "AUTH_FAILED") this._lost(TRY_AGAIN_LATER);
      else this._refused(error);
      return;
    }
    if (error.code !== "SESSION_INVALID") this._repeatInterrupts();
    this.emit("error", error);
    if (error.code === "SESSION_INVALID") {
      this._announced = "expired";
      this._lost(1008);
    }
  }

  /**
   * An ERROR does not name the frame that it refuses, so it may refuse any INTERRUPT that has no ack yet.
   * Send each once more, with its target only. If the first one was accepted, the second changes nothing,
   * and its ack is ignored, like one that comes after the timeout.
   *
   * @private
   */
  _repeatInterrupts() {
    const isOneRunning = [...this._live.values()].some(({ stopReason }) => stopReason === null);
    for (const interrupt of this._interrupts) {
      // "All requests" would now include one that was sent after the interrupt.
      if (interrupt.isRepeated || (interrupt.requestId === null && isOneRunning)) continue;
      interrupt.isRepeated = true;
      this._log.info(`[WebSocket] 发送打断请求: ${interrupt.requestId ?? "*"}`);
      this._send("INTERRUPT", { interrupt_request_id: interrupt.requestId });
    }
  }

  /**
   * @private
   * @param {string} type
   * @param {Record<string, any>} payload
   */
  _route(type, payload) {
    const live = this._live.get(payload.request_id);
    if (!live) return; // ended before, or unknown
    if (live.stopReason !== null) live.heldFrames.push({ type, payload });
    else this._deliver(live, type, payload);
    // The ack settles an interrupted request. If no ack is expected any more, the terminal frame does.
    if (isTerminal(type, payload) && live.stopReason !== null && !this._hasPendingInterrupt(live)) {
      this._settle(live, null);
    }
  }

  /**
   * @private
   * @param {LiveRequest} live
   * @param {string} type
   * @param {Record<string, any>} payload
   */
  _deliver(live, type, payload) {
    if (type === "ERROR") {
      this._fail(live, serverError(payload));
      return;
    }
    const { handlers } = live;
    const { text, voice } = payload.content ?? {};
    if (typeof text === "string" && text !== "") {
      live.text += text;
      guarded(() => handlers.onText?.(text));
    }
    if (payload.function_call) {
      live.functionCalls.push(payload.function_call);
      guarded(() => handlers.onFunctionCall?.(payload.function_call));
    }
    // Held sound is not played: the user has silenced it.
    if (typeof voice === "string" && voice !== "" && !live.isSilenced) {
      guarded(() => handlers.onVoice?.(voice));
    }
    if (isTerminal(type, payload)) {
      this._end(live, {
        outcome: payload.interrupted ? "INTERRUPTED" : "COMPLETED",
        interruptReason: payload.interrupt_reason ?? null,
        finishReason: payload.finish_reason ?? null,
        usage: payload.usage ?? null,
      });
    }
  }

  /** @private @param {Record<string, any>} payload Of INTERRUPT_ACK. */
  _acked(payload) {
    const target = payload.interrupt_request_id || null;
    const index = this._interrupts.findIndex((interrupt) => interrupt.requestId === target);
    const [interrupt] = index < 0 ? [] : this._interrupts.splice(index, 1);
    this._log.debug(`[WebSocket] 收到打断确认: ${target ?? "*"}`);
    if (!interrupt) return; // it came after the timeout
    this._clock.clearTimeout(interrupt.timer);
    /** @type {InterruptAck} */
    const ack = {
      requestId: interrupt.requestId,
      status: payload.status,
      results: payload.results ?? [],
      roundTripMs: this._clock.monotonic() - interrupt.sentAt,
    };
    // The targets first, so that code that awaits the ack sees them settled.
    for (const live of this._targetsOf(interrupt)) {
      const result = ack.results.find((one) => one.request_id === live.requestId);
      if (result || live.heldTerminal) this._settle(live, result?.outcome ?? null);
    }
    interrupt.resolve(ack);
    this.emit("ack", ack);
  }

  /** @private @param {PendingInterrupt} interrupt */
  _noAck(interrupt) {
    this._clock.clearTimeout(interrupt.timer);
    for (const live of this._targetsOf(interrupt)) this._settle(live, null);
    /** @type {InterruptAck} */
    const ack = { requestId: interrupt.requestId, status: "NO_ACK", results: [], roundTripMs: null };
    interrupt.resolve(ack);
    this.emit("ack", ack);
  }

  /**
   * @private
   * @param {PendingInterrupt} interrupt
   * @returns {LiveRequest[]} The requests that it stopped and that have not ended.
   */
  _targetsOf(interrupt) {
    return interrupt.targets.flatMap((target) => this._live.get(target) ?? []);
  }

  /** @private @param {LiveRequest} live */
  _hasPendingInterrupt(live) {
    return this._interrupts.some((interrupt) => interrupt.targets.includes(live.requestId));
  }

  /**
   * End an interrupted request. If it had ended before the interrupt, the held frames are delivered;
   * otherwise they are dropped.
   *
   * @private
   * @param {LiveRequest} live
   * @param {InterruptResult["outcome"] | null} outcome null: unknown.
   */
  _settle(live, outcome) {
    const terminal = live.heldTerminal;
    const hadEnded = terminal !== undefined && !terminal.payload.interrupted;
    if (outcome === "ALREADY_DONE" || (outcome === null && hadEnded)) {
      live.stopReason = null; // the ack overtakes queued data: more frames may follow
      for (const { type, payload } of live.heldFrames.splice(0)) this._deliver(live, type, payload);
      return;
    }
    this._end(live, {
      outcome: "INTERRUPTED",
      interruptReason: live.stopReason,
      finishReason: null,
      usage: terminal?.payload.usage ?? null,
    });
  }

  /**
   * @private
   * @param {LiveRequest} live
   * @param {Omit<Answer, "requestId" | "text" | "functionCalls">} ending
   */
  _end(live, ending) {
    this._forget(live);
    const { requestId, text, functionCalls } = live;
    live.resolve({ requestId, text, functionCalls, ...ending });
  }

  /**
   * @private
   * @param {LiveRequest} live
   * @param {ServerError} error
   */
  _fail(live, error) {
    this._forget(live);
    live.reject(new RequestError(live.requestId, error));
  }

  /** @private @param {LiveRequest} live */
  _forget(live) {
    this._live.delete(live.requestId);
    live.forgetSignal();
  }
}

/**
 * @param {unknown} count
 * @returns {number | undefined} A whole number, 0 or more; undefined if it is not a finite number.
 */
function wholeCount(count) {
  if (typeof count !== "number" || !Number.isFinite(count)) return undefined;
  // A larger one would be written as 1e21. No answer is that long.
  return Math.min(Math.max(Math.floor(count), 0), Number.MAX_SAFE_INTEGER);
}

/**
 * @param {string} type
 * @param {Record<string, any>} payload
 */
function isTerminal(type, payload) {
  // Existing clients take a RESPONSE without `text_stream_seq` for the last one, too.
  return type === "ERROR" || (payload.text_stream_seq ?? -1) === -1;
}

/**
 * @param {Record<string, any>} payload Of ERROR.
 * @returns {ServerError}
 */
function serverError(payload) {
  return {
    code: String(payload.error_code ?? "INTERNAL_ERROR"),
    message: String(payload.error_msg ?? ""),
    detail: String(payload.error_detail ?? ""),
    retryable: payload.retryable === true,
  };
}
