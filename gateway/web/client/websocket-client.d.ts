/** How long to wait for an INTERRUPT_ACK, in milliseconds. Existing clients wait as long. */
export const ACK_TIMEOUT_MS: 15000;
/**
 * A connection that receives nothing for this long is treated as lost, in milliseconds. The gateway
 * sends HEARTBEAT every 30 s.
 */
export const SILENCE_TIMEOUT_MS: 600000;
/** Limit on the time from opening the socket to REGISTER_ACK, in milliseconds. */
export const REGISTER_TIMEOUT_MS: 15000;
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
    constructor(requestId: string, error: ServerError);
    requestId: string;
    code: string;
    detail: string;
    retryable: boolean;
}
/** The server rejected the registration. */
export class RegistrationError extends Error {
    /** @param {ServerError} error */
    constructor(error: ServerError);
    code: string;
    detail: string;
}
/** @type {Clock} */
export const SYSTEM_CLOCK: Clock;
/** @extends {Emitter<ClientEvents>} */
export class WebSocketClient extends Emitter<ClientEvents> {
    /** @param {ClientOptions} options */
    constructor(options: ClientOptions);
    /** The gateway's address. `close(url)` changes it. */
    url: string;
    /** @type {ConnectionState} */
    state: ConnectionState;
    /** From REGISTER_ACK; null without a session. @type {string | null} */
    sessionId: string | null;
    /** @private */
    private _registration;
    /** @private */
    private _WebSocket;
    /** @private */
    private _clock;
    /** @private */
    private _random;
    /** @private */
    private _log;
    /** @private */
    private _ackTimeoutMs;
    /** @private */
    private _silenceTimeoutMs;
    /** @private @type {Socket | null} */
    private _socket;
    /** @private */
    private _failures;
    /** @private */
    private _readyAt;
    /** @private */
    private _hadSession;
    /** What the server announced before it closed. @private @type {ConnectionState["cause"]} */
    private _announced;
    /** @private @type {unknown} */
    private _timer;
    /** @private @type {unknown} */
    private _silenceTimer;
    /** @private @type {Map<string, LiveRequest>} */
    private _live;
    /** In the order in which they were sent. @private @type {PendingInterrupt[]} */
    private _interrupts;
    /** @private @type {{resolve: () => void, reject: (error: Error) => void}[]} */
    private _connecting;
    /** Whether a session is registered, so that requests can be sent. */
    get isReady(): boolean;
    /**
     * Connect and register, and do so again whenever the connection is lost.
     *
     * @returns {Promise<void>} Resolves when a session is registered. Rejects with `RegistrationError`
     *   if the server rejects the registration, and with `Error` after `close()`.
     */
    connect(): Promise<void>;
    /** Try now instead of waiting for the next attempt, for example when the network is back. */
    retryNow(): void;
    /**
     * End the session and stay offline.
     *
     * @param {string} [url] Address of another server, for the next `connect()`.
     */
    close(url?: string): void;
    /** @private */
    private _open;
    /** @private */
    private _register;
    /** @private @param {Record<string, any>} payload Of REGISTER_ACK. */
    private _registered;
    /** @private @param {ServerError} error */
    private _refused;
    /** @private @param {number} code Of the close frame. */
    private _lost;
    /**
     * Half of the pause is random, so that the clients of a restarted server do not all return at once.
     *
     * @private
     * @returns {number} Milliseconds.
     */
    private _pause;
    /**
     * Close the socket and end everything that depended on it.
     *
     * @private
     * @param {ConnectionState["cause"]} cause
     */
    private _disconnect;
    /** @private @param {Partial<ConnectionState> & {name: ConnectionState["name"]}} state */
    private _setState;
    /** @private @param {Error} error */
    private _failConnecting;
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
    sendTextRequest(text: string, options?: RequestOptions): SentRequest;
    /**
     * Send the result of a function call while other calls of that answer still wait for theirs.
     *
     * @param {string} callId
     * @param {unknown} result Any value that JSON can represent; undefined is sent as null.
     * @returns {void}
     * @throws {RequestError} `NOT_CONNECTED`: nothing was sent.
     * @throws {TypeError} JSON cannot represent the result: nothing was sent.
     */
    sendFunctionResult(callId: string, result: unknown): void;
    /**
     * Send the result of the last (or only) function call of an answer, and let the model continue.
     *
     * @param {string} callId
     * @param {unknown} result Any value that JSON can represent; undefined is sent as null.
     * @param {Omit<RequestOptions, "update">} [options]
     * @returns {SentRequest} Like that of `sendTextRequest`.
     */
    continueWithResult(callId: string, result: unknown, options?: Omit<RequestOptions, "update">): SentRequest;
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
    sendInterrupt(requestId: string | null, reason?: InterruptReason, { deliveredTextChars }?: InterruptOptions): Promise<InterruptAck>;
    /**
     * @private
     * @param {string} msgType
     * @param {Record<string, any>} payload
     * @param {RequestOptions} options
     * @returns {SentRequest}
     */
    private _request;
    /**
     * @param {string} [requestId]
     * @returns {RequestError} The error of a request that cannot be sent.
     */
    notConnected(requestId?: string): RequestError;
    /**
     * @private
     * @param {string} msgType
     * @param {Record<string, any>} payload
     */
    private _send;
    /** @private @param {unknown} data Of a WebSocket message. */
    private _receive;
    /** @private @param {Record<string, any>} payload Of ERROR. */
    private _error;
    /**
     * An ERROR does not name the frame that it refuses, so it may refuse any INTERRUPT that has no ack yet.
     * Send each once more, with its target only. If the first one was accepted, the second changes nothing,
     * and its ack is ignored, like one that comes after the timeout.
     *
     * @private
     */
    private _repeatInterrupts;
    /**
     * @private
     * @param {string} type
     * @param {Record<string, any>} payload
     */
    private _route;
    /**
     * @private
     * @param {LiveRequest} live
     * @param {string} type
     * @param {Record<string, any>} payload
     */
    private _deliver;
    /** @private @param {Record<string, any>} payload Of INTERRUPT_ACK. */
    private _acked;
    /** @private @param {PendingInterrupt} interrupt */
    private _noAck;
    /**
     * @private
     * @param {PendingInterrupt} interrupt
     * @returns {LiveRequest[]} The requests that it stopped and that have not ended.
     */
    private _targetsOf;
    /** @private @param {LiveRequest} live */
    private _hasPendingInterrupt;
    /**
     * End an interrupted request. If it had ended before the interrupt, the held frames are delivered;
     * otherwise they are dropped.
     *
     * @private
     * @param {LiveRequest} live
     * @param {InterruptResult["outcome"] | null} outcome null: unknown.
     */
    private _settle;
    /**
     * @private
     * @param {LiveRequest} live
     * @param {Omit<Answer, "requestId" | "text" | "functionCalls">} ending
     */
    private _end;
    /**
     * @private
     * @param {LiveRequest} live
     * @param {ServerError} error
     */
    private _fail;
    /** @private @param {LiveRequest} live */
    private _forget;
}
export type Auth = {
    type: "API_KEY";
    api_key: string;
} | {
    type: "ACCOUNT";
    account: string;
    password: string;
};
export type FunctionParameter = {
    name: string;
    type: "string" | "number" | "integer" | "boolean" | "array" | "object";
    description?: string;
    required?: boolean;
};
/**
 * A function that the model may call.
 */
export type FunctionDefinition = {
    name: string;
    description?: string;
    /**
     * A JSON Schema of type object,
     * or a list of parameters.
     */
    parameters?: Record<string, any> | FunctionParameter[];
};
/**
 * What REGISTER sets and a REQUEST can change.
 */
export type SessionSettings = {
    require_tts?: boolean;
    enable_srs?: boolean;
    function_calling?: FunctionDefinition[];
    system_prompt?: {
        role_description?: string;
        response_requirements?: string;
    };
    scene_context?: {
        scene_description?: string;
        keywords?: string[];
    };
};
/**
 * The payload of REGISTER.
 */
export type Registration = SessionSettings & {
    auth: Auth;
    platform?: "WEB" | "APP" | "MINI_PROGRAM" | "TV";
    on_new_request?: "interrupt" | "parallel" | "reject";
};
export type InterruptReason = "USER_NEW_INPUT" | "USER_STOP" | "USER_VOICE_INPUT" | "CLIENT_ERROR";
export type FunctionCall = {
    name: string;
    parameters: Record<string, any>;
    /**
     * The argument for `sendFunctionResult`. Every bargein gateway sends it.
     */
    call_id?: string;
};
export type Usage = {
    prompt_tokens: number;
    completion_tokens: number;
    total_tokens: number;
    estimated?: boolean;
};
export type InterruptResult = {
    request_id: string;
    outcome: "STOPPED" | "ALREADY_DONE" | "UNKNOWN" | "TIMED_OUT";
    delivered_text_chars: number;
    stream_closed_ms: number | null;
    /**
     * Whether the provider stops generating when
     * its connection is closed.
     */
    stops_on_close?: "yes" | "no" | "unknown";
};
/**
 * The result of an INTERRUPT.
 */
export type InterruptAck = {
    /**
     * The target; null means all live requests.
     */
    requestId: string | null;
    /**
     * `NO_ACK`: no ack came in time, or
     * the connection was lost.
     */
    status: "SUCCESS" | "PARTIAL" | "FAILED" | "NO_ACK";
    /**
     * One for each target. Servers other than bargein send none.
     */
    results: InterruptResult[];
    /**
     * From sending INTERRUPT to receiving its ack.
     */
    roundTripMs: number | null;
};
/**
 * How a request ended, if it did not fail.
 */
export type Answer = {
    requestId: string;
    outcome: "COMPLETED" | "INTERRUPTED";
    interruptReason: string | null;
    /**
     * From the provider: `stop`, `length`, `content_filter`, …
     */
    finishReason: string | null;
    usage: Usage | null;
    /**
     * All text that was delivered to `onText`.
     */
    text: string;
    functionCalls: FunctionCall[];
};
/**
 * Called in the order of the frames. Not called after an interrupt, unless
 *   the answer had been complete before it.
 */
export type Handlers = {
    /**
     * Receives a piece of the answer.
     */
    onText?: ((text: string) => void) | undefined;
    onFunctionCall?: ((call: FunctionCall) => void) | undefined;
    /**
     * Receives base64 of 16 kHz 16-bit mono
     * PCM.
     */
    onVoice?: ((voice: string) => void) | undefined;
};
/**
 * `requestId` must be new in the session: ids are made if it is left out. `update`
 *   changes the session, for this request and all later ones. Aborting `signal` sends INTERRUPT and
 *   rejects the promise with the signal's reason, as `fetch` does.
 */
export type RequestOptions = Handlers & {
    requestId?: string | undefined;
    update?: SessionSettings | undefined;
    signal?: AbortSignal | undefined;
};
export type InterruptOptions = {
    /**
     * How many Unicode code points of the answer the
     * user has seen. Rounded down to a whole number, 0 or more. Without it, or if it is not a finite
     * number, the server counts what it sent.
     */
    deliveredTextChars?: number | undefined;
};
export type SentRequest = {
    requestId: string;
    promise: Promise<Answer>;
};
/**
 * An ERROR frame.
 */
export type ServerError = {
    code: string;
    /**
     * What the code means.
     */
    message: string;
    /**
     * What happened.
     */
    detail: string;
    retryable: boolean;
};
export type ConnectionState = {
    /**
     * `waiting`: until the
     * next attempt to connect. `refused`: the server rejected the registration; it is not repeated until
     * `connect()` is called.
     */
    name: "offline" | "connecting" | "ready" | "waiting" | "refused";
    /**
     * Why the last connection ended.
     */
    cause: "none" | "lost" | "restarting" | "expired";
    /**
     * Time until the next attempt; 0 in states other than `waiting`.
     */
    retryInMs: number;
    /**
     * The reason for `refused`; null in other states.
     */
    error: ServerError | null;
    /**
     * Whether this client had a session before.
     */
    isAgain: boolean;
};
/**
 * `error` carries an ERROR frame without a `request_id`.
 */
export type ClientEvents = {
    state: ConnectionState;
    warning: {
        remainingSeconds: number;
        message: string;
    };
    error: ServerError;
    ack: InterruptAck;
    frame: {
        direction: "in" | "out";
        msgType: string;
        payload: Record<string, any>;
    };
};
/**
 * The part of the browser's WebSocket that the client uses.
 */
export type Socket = {
    send: (data: string) => void;
    close: (code?: number, reason?: string) => void;
    onopen: ((event: any) => void) | null;
    onmessage: ((event: any) => void) | null;
    onclose: ((event: any) => void) | null;
    onerror: ((event: any) => void) | null;
};
export type Clock = {
    /**
     * Milliseconds since the epoch.
     */
    now: () => number;
    /**
     * Milliseconds since any fixed point.
     */
    monotonic: () => number;
    setTimeout: (callback: () => void, ms: number) => unknown;
    clearTimeout: (timer: any) => void;
};
export type ClientOptions = {
    /**
     * For example `wss://chat.example.com/ws/agent/stream`.
     */
    url: string;
    /**
     * Called before each REGISTER.
     */
    registration: () => Registration;
    /**
     * Default: the global one.
     */
    WebSocket?: (new (url: string) => Socket) | undefined;
    clock?: Clock | undefined;
    /**
     * Returns a number in [0, 1).
     */
    random?: (() => number) | undefined;
    log?: Log | undefined;
    ackTimeoutMs?: number | undefined;
    silenceTimeoutMs?: number | undefined;
};
import { Emitter } from "./events.js";
import type { Log } from "./log.js";
