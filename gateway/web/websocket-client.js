/**
 * One session with a bargein gateway over one WebSocket, registered anew when it is lost.
 *
 * It knows requests by their id and nothing of messages, pages or sound. What runs, by time:
 *
 *     connect()           a socket, REGISTER, REGISTER_ACK: `ready`
 *     sendTextRequest()   REQUEST; its frames go to its handlers, by `request_id` only
 *     sendInterrupt()     INTERRUPT; from here on frames of its targets are kept, not handed on
 *     INTERRUPT_ACK       they had ended before (ALREADY_DONE): what was kept is handed on after all;
 *                         else it is dropped. Without an ack in time the terminal frame decides.
 *     a lost connection   ends every request; a new session begins after a pause
 *
 * No DOM, and nothing of the browser's but what can be handed in: see `ClientOptions`.
 */

import { Emitter, guarded } from "./events.js";
import { newId } from "./ids.js";
import { SILENT } from "./log.js";

export const VERSION = "1.0";

/** How long the ack of an INTERRUPT is waited for, in milliseconds: what existing clients wait. */
export const ACK_TIMEOUT_MS = 15_000;

/** The gateway says HEARTBEAT every 30 s; a connection that says nothing for this long is dead. */
export const SILENCE_TIMEOUT_MS = 600_000;

/** From opening the socket to REGISTER_ACK. */
export const REGISTER_TIMEOUT_MS = 15_000;

const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 20_000;

/** A session that held for this long was none of a row of failures. */
const STABLE_MS = 5_000;

/** Half of a surrogate pair, as is left where a text was cut: JSON could not carry it as UTF-8. */
const LONE_SURROGATES = /\p{Surrogate}/gu;

// Types: the wire.

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
 * @typedef {object} FunctionDefinition a function that the model may call.
 * @property {string} name
 * @property {string} [description]
 * @property {Record<string, any> | FunctionParameter[]} [parameters] a JSON Schema of type object,
 *   or the parameters one by one.
 */

/**
 * @typedef {object} SessionSettings what REGISTER says, and a REQUEST may change.
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
 * }} Registration the payload of REGISTER.
 */

/** @typedef {"USER_NEW_INPUT" | "USER_STOP" | "USER_VOICE_INPUT" | "CLIENT_ERROR"} InterruptReason */

/**
 * @typedef {object} FunctionCall
 * @property {string} name
 * @property {Record<string, any>} parameters
 * @property {string} [call_id] for `sendFunctionResult`; every bargein gateway sends it.
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
 */

// Types: the library.

/**
 * @typedef {object} InterruptAck what became of an INTERRUPT.
 * @property {string | null} requestId its target; null is all.
 * @property {"SUCCESS" | "PARTIAL" | "FAILED" | "NO_ACK"} status `NO_ACK`: none came in time, or
 *   the connection was gone.
 * @property {InterruptResult[]} results one for each target; empty from other servers.
 * @property {number | null} roundTripMs from sending it to its ack.
 */

/**
 * @typedef {object} Answer how a request ended that did not fail.
 * @property {string} requestId
 * @property {"COMPLETED" | "INTERRUPTED"} outcome
 * @property {string | null} interruptReason
 * @property {string | null} finishReason the provider's: `stop`, `length`, `content_filter`, …
 * @property {Usage | null} usage
 * @property {string} text all of it that was handed on.
 * @property {FunctionCall[]} functionCalls
 */

/**
 * @typedef {object} Handlers called in the order of the frames, never for an interrupted request.
 * @property {(text: string) => void} [onText] a piece of the answer.
 * @property {(call: FunctionCall) => void} [onFunctionCall]
 * @property {(voice: string) => void} [onVoice] base64 of 16 kHz 16-bit mono PCM.
 */

/**
 * @typedef {Handlers & {
 *   requestId?: string,
 *   update?: SessionSettings,
 *   signal?: AbortSignal,
 * }} RequestOptions `update` changes the session, for this request and those after it. Aborting
 *   `signal` sends INTERRUPT and rejects the promise with the signal's reason, as `fetch` does.
 */

/** @typedef {{requestId: string, promise: Promise<Answer>}} SentRequest */

/**
 * @typedef {object} ServerError an ERROR frame.
 * @property {string} code
 * @property {string} message what the code means.
 * @property {string} detail what happened.
 * @property {boolean} retryable
 */

/**
 * @typedef {object} ConnectionState
 * @property {"offline" | "connecting" | "ready" | "waiting" | "refused"} name `waiting`: for the
 *   next attempt; `refused`: the server did not take the registration, and is not asked again.
 * @property {"none" | "lost" | "restarting" | "expired"} cause of the last loss.
 * @property {number} retryInMs with `waiting`.
 * @property {ServerError | null} error with `refused`.
 * @property {boolean} isAgain true when there was a session before.
 */

/**
 * @typedef {{
 *   state: ConnectionState,
 *   warning: {remainingSeconds: number, message: string},
 *   error: ServerError,
 *   ack: InterruptAck,
 *   frame: {direction: "in" | "out", msgType: string, payload: Record<string, any>},
 * }} ClientEvents `error` is one that belongs to no request.
 */

/**
 * @typedef {object} Socket the part of a browser's WebSocket that is used.
 * @property {(data: string) => void} send
 * @property {(code?: number, reason?: string) => void} close
 * @property {((event: any) => void) | null} onopen
 * @property {((event: any) => void) | null} onmessage
 * @property {((event: any) => void) | null} onclose
 * @property {((event: any) => void) | null} onerror
 */

/**
 * @typedef {object} Clock
 * @property {() => number} now milliseconds since the epoch.
 * @property {() => number} monotonic milliseconds since whenever.
 * @property {(callback: () => void, ms: number) => unknown} setTimeout
 * @property {(timer: any) => void} clearTimeout
 */

/**
 * @typedef {object} ClientOptions
 * @property {string} url as `wss://chat.example.com/ws/agent/stream`.
 * @property {() => Registration} registration asked at every registration.
 * @property {new (url: string) => Socket} [WebSocket]
 * @property {Clock} [clock]
 * @property {() => number} [random] in [0, 1).
 * @property {import("./log.js").Log} [log]
 * @property {number} [ackTimeoutMs]
 * @property {number} [silenceTimeoutMs]
 */

/** Why a request failed. */
export class RequestError extends Error {
  /**
   * @param {string} requestId
   * @param {ServerError} error `code` is the protocol's, or `NOT_CONNECTED` (nothing was sent) or
   *   `CONNECTION_LOST`.
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

/** The server did not take the registration. */
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

/** One request, from REQUEST to its end. */
class Live {
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
    /** Frames since it was interrupted. @type {{type: string, payload: any}[]} */
    this.kept = [];
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
  get keptTerminal() {
    return this.kept.find(({ type, payload }) => isTerminal(type, payload));
  }
}

/** An INTERRUPT whose ack is to come. */
class Waiter {
  /**
   * @param {string | null} requestId
   * @param {number} sentAt monotonic.
   */
  constructor(requestId, sentAt) {
    this.requestId = requestId;
    this.sentAt = sentAt;
    /** @type {string[]} what it stopped, as far as this client knows. */
    this.targets = [];
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
    this.url = options.url;
    this._registration = options.registration;
    this._WebSocket = options.WebSocket ?? /** @type {any} */ (globalThis).WebSocket;
    this._clock = options.clock ?? SYSTEM_CLOCK;
    this._random = options.random ?? Math.random;
    this._log = options.log ?? SILENT;
    this._ackTimeoutMs = options.ackTimeoutMs ?? ACK_TIMEOUT_MS;
    this._silenceTimeoutMs = options.silenceTimeoutMs ?? SILENCE_TIMEOUT_MS;

    /** @type {ConnectionState} */
    this.state = { name: "offline", cause: "none", retryInMs: 0, error: null, isAgain: false };
    /** @type {string | null} */
    this.sessionId = null;
    /** @type {Socket | null} */
    this._socket = null;
    this._failures = 0;
    this._readyAt = 0;
    this._hadSession = false;
    this._isClosing = false;
    /** @type {ConnectionState["cause"]} what the server said before it closed. */
    this._announced = "none";
    /** @type {unknown} */
    this._timer = undefined;
    /** @type {unknown} */
    this._silenceTimer = undefined;
    /** @type {Map<string, Live>} */
    this._live = new Map();
    /** @type {Waiter[]} in the order in which they were sent. */
    this._waiters = [];
    /** @type {{resolve: () => void, reject: (error: Error) => void}[]} */
    this._connecting = [];
  }

  get isReady() {
    return this.state.name === "ready";
  }

  // The connection.

  /**
   * Connect and register; afterwards, whenever the connection is lost, again. Does nothing while
   * that is under way.
   *
   * @returns {Promise<void>} resolves when a session stands. Rejects with `RegistrationError` when
   *   the server does not take the registration, with `Error` after `close()`.
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

  /** Do not wait for the next attempt: the network is said to be there again. */
  retryNow() {
    if (this.state.name === "waiting") this._open();
  }

  /**
   * End the session in order, and stay offline.
   *
   * @param {string} [url] of another server, for the next `connect()`.
   */
  close(url) {
    if (this.isReady) this._send("SHUTDOWN", { reason: "CLIENT_CLOSED" });
    this._drop("none");
    this.url = url ?? this.url;
    this._enter({ name: "offline", cause: "none" });
    this._failConnecting(new Error("closed"));
  }

  _open() {
    this._drop(this.state.cause);
    /** @type {Socket} */
    let socket;
    try {
      socket = new this._WebSocket(this.url);
    } catch (error) {
      const detail = error instanceof Error ? error.message : String(error);
      this._refused({ code: "BAD_URL", message: "no such server", detail, retryable: false });
      return;
    }
    this._socket = socket;
    this._announced = "none";
    // What an older socket still has to say is nobody's business any more.
    socket.onopen = () => socket === this._socket && this._register();
    socket.onmessage = (event) => socket === this._socket && this._receive(event.data);
    socket.onclose = (event) => socket === this._socket && this._lost(event.code);
    socket.onerror = null; // `close` always follows
    this._timer = this._clock.setTimeout(() => this._lost(1006), REGISTER_TIMEOUT_MS);
    this._enter({ name: "connecting", cause: this.state.cause });
  }

  _register() {
    this._send("REGISTER", { platform: "WEB", ...this._registration() });
  }

  /** @param {Record<string, any>} payload of REGISTER_ACK. */
  _registered(payload) {
    this._clock.clearTimeout(this._timer);
    this.sessionId = payload.session_id;
    this._readyAt = this._clock.monotonic();
    this._enter({ name: "ready", cause: this.state.cause });
    this._hadSession = true;
    for (const { resolve } of this._connecting.splice(0)) resolve();
  }

  /** @param {ServerError} error */
  _refused(error) {
    this._drop("none");
    this._enter({ name: "refused", cause: "none", error });
    this._failConnecting(new RegistrationError(error));
  }

  /** @param {number} code of the close frame. */
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
    this._drop(cause);
    // A session that is over is no fault of the network: the first attempt is made at once.
    const pause = cause === "expired" && this._failures === 0 ? 0 : this._pause();
    this._failures += 1;
    this._enter({ name: "waiting", cause, retryInMs: pause });
    this._timer = this._clock.setTimeout(() => this._open(), pause);
  }

  /** Half of it is chance, lest all clients of a server that restarts come back at once. */
  _pause() {
    const longest = Math.min(LONGEST_PAUSE_MS, FIRST_PAUSE_MS * 2 ** this._failures);
    return Math.round(longest * (0.5 + this._random() / 2));
  }

  /**
   * Let go of the socket and of everything that lived on it.
   *
   * @param {ConnectionState["cause"]} cause
   */
  _drop(cause) {
    this._clock.clearTimeout(this._timer);
    this._clock.clearTimeout(this._silenceTimer);
    const socket = this._socket;
    this._socket = null;
    this.sessionId = null;
    this.state = { ...this.state, name: "offline", cause }; // what follows is told by `_enter`
    if (socket) {
      socket.onopen = socket.onmessage = socket.onclose = null;
      socket.close(1000);
    }
    for (const waiter of this._waiters.splice(0)) this._noAck(waiter);
    for (const live of [...this._live.values()]) {
      this._fail(live, {
        code: "CONNECTION_LOST",
        message: "connection lost",
        detail: "",
        retryable: true,
      });
    }
  }

  /** @param {Partial<ConnectionState> & {name: ConnectionState["name"]}} state */
  _enter(state) {
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

  /** @param {Error} error */
  _failConnecting(error) {
    for (const { reject } of this._connecting.splice(0)) reject(error);
  }

  // Requests.

  /**
   * Ask. An empty text only updates the session.
   *
   * @param {string} text
   * @param {RequestOptions} [options]
   * @returns {SentRequest} its promise resolves when the answer is complete or interrupted, and
   *   rejects with `RequestError` when it failed.
   * @throws {RangeError} `options.requestId` is that of a live request.
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
   * Say what a function of the model's returned. With `continueWith` the model goes on, as a request
   * of its own, once every call of that answer has its result.
   *
   * @param {string} callId
   * @param {unknown} result any JSON.
   * @returns {void}
   */
  sendFunctionResult(callId, result) {
    if (this.isReady) this._send("FUNCTION_RESULT", { call_id: callId, result });
  }

  /**
   * Say what the last (or only) function that an answer called has returned, and let the model go on.
   *
   * @param {string} callId
   * @param {unknown} result any JSON.
   * @param {Omit<RequestOptions, "update">} [options]
   * @returns {SentRequest} as of `sendTextRequest`.
   */
  continueWithResult(callId, result, options = {}) {
    return this._request("FUNCTION_RESULT", { call_id: callId, result }, options);
  }

  /**
   * Stop one request, or all. From here on nothing of it is handed on, unless the ack says that it
   * had ended before.
   *
   * @param {string | null} requestId null is every live one.
   * @param {InterruptReason} [reason]
   * @param {{deliveredTextChars?: number}} [options] how many Unicode code points of the answer the
   *   user really saw; without it, the server counts what it sent.
   * @returns {Promise<InterruptAck>} never rejects.
   */
  sendInterrupt(requestId, reason = "USER_STOP", { deliveredTextChars } = {}) {
    const waiter = new Waiter(requestId, this._clock.monotonic());
    /** @type {Promise<InterruptAck>} */
    const promise = new Promise((resolve) => {
      waiter.resolve = resolve;
    });
    if (!this.isReady) {
      this._noAck(waiter);
      return promise;
    }
    const targets = requestId === null ? [...this._live.keys()] : [requestId];
    for (const target of targets) {
      const live = this._live.get(target);
      if (live && live.stopReason === null) {
        live.stopReason = reason;
        live.isSilenced = true;
        waiter.targets.push(target);
      }
    }
    /** @type {Record<string, any>} */
    const payload = { interrupt_request_id: requestId, reason };
    if (deliveredTextChars !== undefined) payload.delivered_text_chars = deliveredTextChars;
    this._waiters.push(waiter);
    waiter.timer = this._clock.setTimeout(() => {
      this._waiters.splice(this._waiters.indexOf(waiter), 1);
      this._log.debug(`[WebSocket] 打断确认超时: ${requestId ?? "*"}`);
      this._noAck(waiter);
    }, this._ackTimeoutMs);
    this._log.info(`[WebSocket] 发送打断请求: ${requestId ?? "*"}`);
    this._send("INTERRUPT", payload);
    return promise;
  }

  /**
   * @param {string} msgType
   * @param {Record<string, any>} payload
   * @param {RequestOptions} options
   * @returns {SentRequest}
   */
  _request(msgType, payload, options) {
    const requestId = options.requestId ?? newId("req", this._clock.now(), this._random);
    if (this._live.has(requestId)) throw new RangeError(`request ${requestId} is live`);
    const live = new Live(requestId, options);
    const { signal } = options;
    if (signal?.aborted) {
      live.reject(signal.reason);
    } else if (!this.isReady) {
      const detail = this.state.name;
      const message = "not connected";
      live.reject(
        new RequestError(requestId, { code: "NOT_CONNECTED", message, detail, retryable: true }),
      );
    } else {
      this._live.set(requestId, live);
      if (signal) {
        const abort = () => {
          live.reject(signal.reason);
          void this.sendInterrupt(requestId, "USER_STOP");
        };
        signal.addEventListener("abort", abort);
        live.forgetSignal = () => signal.removeEventListener("abort", abort);
      }
      this._send(msgType, { request_id: requestId, ...payload });
    }
    return { requestId, promise: live.promise };
  }

  // Frames.

  /**
   * @param {string} msgType
   * @param {Record<string, any>} payload
   */
  _send(msgType, payload) {
    const frame = {
      version: VERSION,
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

  /** @param {unknown} data of a WebSocket message. */
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
      default: // SESSION_INFO and HEALTH_CHECK_ACK are for whoever listens to `frame`
        break;
    }
    this.emit("frame", { direction: "in", msgType: type, payload });
  }

  /** @param {Record<string, any>} payload of ERROR. */
  _error(payload) {
    if (typeof payload.request_id === "string") {
      this._route("ERROR", payload);
      return;
    }
    const error = serverError(payload);
    // A server that is full, or about to go, closes the connection; it is tried again later.
    if (this.state.name === "connecting" && error.code !== "SERVER_BUSY") {
      this._refused(error);
      return;
    }
    this.emit("error", error);
    if (error.code === "SESSION_INVALID") {
      this._announced = "expired";
      this._lost(1008);
    }
  }

  /**
   * @param {string} type
   * @param {Record<string, any>} payload
   */
  _route(type, payload) {
    const live = this._live.get(payload.request_id);
    if (!live) return; // ended, or never ours
    if (live.stopReason !== null) live.kept.push({ type, payload });
    else this._handOn(live, type, payload);
    // Only the ack of an INTERRUPT says that nothing more will come, and where that was lost, the end.
    if (isTerminal(type, payload) && live.stopReason !== null && !this._isAwaited(live)) {
      this._decide(live, null);
    }
  }

  /**
   * @param {Live} live
   * @param {string} type
   * @param {Record<string, any>} payload
   */
  _handOn(live, type, payload) {
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
    // Sound that was late stays away: the user has silenced it.
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

  /** @param {Record<string, any>} payload of INTERRUPT_ACK. */
  _acked(payload) {
    const target = payload.interrupt_request_id || null;
    const index = this._waiters.findIndex((waiter) => waiter.requestId === target);
    const [waiter] = index < 0 ? [] : this._waiters.splice(index, 1);
    this._log.debug(`[WebSocket] 收到打断确认: ${target ?? "*"}`);
    if (!waiter) return; // after its time
    this._clock.clearTimeout(waiter.timer);
    /** @type {InterruptAck} */
    const ack = {
      requestId: waiter.requestId,
      status: payload.status,
      results: payload.results ?? [],
      roundTripMs: this._clock.monotonic() - waiter.sentAt,
    };
    // First what it was about, so that whoever waits for the ack finds everything in its place.
    for (const live of this._stopping(waiter)) {
      const result = ack.results.find((one) => one.request_id === live.requestId);
      if (result || live.keptTerminal) this._decide(live, result?.outcome ?? null);
    }
    waiter.resolve(ack);
    this.emit("ack", ack);
  }

  /** @param {Waiter} waiter */
  _noAck(waiter) {
    this._clock.clearTimeout(waiter.timer);
    for (const live of this._stopping(waiter)) this._decide(live, null);
    /** @type {InterruptAck} */
    const ack = { requestId: waiter.requestId, status: "NO_ACK", results: [], roundTripMs: null };
    waiter.resolve(ack);
    this.emit("ack", ack);
  }

  /**
   * @param {Waiter} waiter
   * @returns {Live[]} what it stopped and has not ended.
   */
  _stopping(waiter) {
    return waiter.targets.flatMap((target) => this._live.get(target) ?? []);
  }

  /** @param {Live} live */
  _isAwaited(live) {
    return this._waiters.some((waiter) => waiter.targets.includes(live.requestId));
  }

  /**
   * End an interrupted request: with what was kept, if it had ended by itself; else without.
   *
   * @param {Live} live
   * @param {InterruptResult["outcome"] | null} outcome null: not known.
   */
  _decide(live, outcome) {
    const terminal = live.keptTerminal;
    const hadEnded = terminal !== undefined && !terminal.payload.interrupted;
    if (outcome === "ALREADY_DONE" || (outcome === null && hadEnded)) {
      live.stopReason = null; // an ack goes ahead of what is queued: more may be on its way
      for (const { type, payload } of live.kept.splice(0)) this._handOn(live, type, payload);
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
   * @param {Live} live
   * @param {Omit<Answer, "requestId" | "text" | "functionCalls">} ending
   */
  _end(live, ending) {
    this._forget(live);
    const { requestId, text, functionCalls } = live;
    live.resolve({ requestId, text, functionCalls, ...ending });
  }

  /**
   * @param {Live} live
   * @param {ServerError} error
   */
  _fail(live, error) {
    this._forget(live);
    live.reject(new RequestError(live.requestId, error));
  }

  /** @param {Live} live */
  _forget(live) {
    this._live.delete(live.requestId);
    live.forgetSignal();
  }
}

/**
 * @param {string} type
 * @param {Record<string, any>} payload
 */
function isTerminal(type, payload) {
  // A RESPONSE without a place in the text is the last one for existing clients, too.
  return type === "ERROR" || (payload.text_stream_seq ?? -1) === -1;
}

/**
 * @param {Record<string, any>} payload of ERROR.
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
