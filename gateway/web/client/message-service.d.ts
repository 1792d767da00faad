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
export function countCodePoints(text: string): number;
/** @extends {Emitter<MessageEvents>} */
export class MessageService extends Emitter<MessageEvents> {
    /**
     * @param {WebSocketClient} client
     * @param {MessageServiceOptions} [options]
     */
    constructor(client: WebSocketClient, options?: MessageServiceOptions);
    /** @private */
    private _client;
    /** @private */
    private _audio;
    /** @private */
    private _countRendered;
    /** @private */
    private _log;
    /** @private */
    private _clock;
    /** @private */
    private _random;
    /** @private @type {Message | null} */
    private _current;
    /**
     * Per message, the ids of the calls that have a result.
     *
     * @private
     * @type {WeakMap<Message, Set<string>>}
     */
    private _answered;
    /** True from sending a question until its answer ends or is interrupted. */
    get isReceivingResponse(): boolean;
    /** @returns {string | null} `req_…`; null when no answer is in progress. */
    get currentRequestId(): string | null;
    /** @returns {string | null} `msg_…`; null when no answer is in progress. */
    get currentMessageId(): string | null;
    /**
     * Send a question. An answer in progress is interrupted first, without waiting for its ack.
     *
     * @param {string} text
     * @param {MessageOptions} [options]
     * @returns {SentMessage}
     * @throws {RequestError} `NOT_CONNECTED`: nothing was sent or interrupted.
     * @throws {unknown} The reason of a signal that is aborted already: nothing was sent or interrupted.
     */
    sendTextMessage(text: string, { update, signal }?: MessageOptions): SentMessage;
    /**
     * Stop the answer in progress, and all sound.
     *
     * @param {InterruptReason} [reason]
     * @returns {Promise<InterruptAck> | null} null if no answer was in progress; then nothing is sent.
     */
    interruptCurrentRequest(reason?: InterruptReason): Promise<InterruptAck> | null;
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
    sendFunctionResult(message: Message, callId: string, result: unknown): SentMessage | null;
    /** @private */
    private _check;
    /** @private */
    private _interruptOther;
    /**
     * @private
     * @param {(options: RequestOptions) => SentRequest} send
     * @param {AbortSignal} [signal]
     * @returns {SentMessage}
     */
    private _begin;
    /** @private @param {Message | null} message */
    private _setCurrent;
    /** @private @param {Message} message */
    private _release;
    /**
     * @private
     * @param {Message} message
     * @param {Answer} answer
     */
    private _answer;
    /**
     * @private
     * @param {Message} message
     * @param {unknown} error
     */
    private _failed;
    /**
     * @private
     * @param {Message} message
     * @param {string} code
     * @param {string} detail
     * @param {boolean} retryable
     */
    private _fail;
    /**
     * @private
     * @param {Message} message
     * @param {InterruptAck} ack
     */
    private _acknowledge;
}
/**
 * An answer.
 */
export type Message = {
    /**
     * `msg_…`
     */
    messageId: string;
    /**
     * `req_…`
     */
    requestId: string;
    /**
     * `interrupted`: by this
     * user. An answer that the server ended early is `failed`.
     */
    state: "streaming" | "complete" | "interrupted" | "failed";
    /**
     * All text received so far, drawn or not.
     */
    text: string;
    functionCalls: FunctionCall[];
    /**
     * Id of the request that continues with the results of its
     * function calls.
     */
    continuation: string | null;
    interruptReason: InterruptReason | null;
    /**
     * Set by the ack of an interrupt: time from reading INTERRUPT
     * to closing the provider's stream, measured by the gateway.
     */
    streamClosedMs: number | null;
    /**
     * Set by the ack of an interrupt: time from sending INTERRUPT to
     * receiving the ack, measured here.
     */
    roundTripMs: number | null;
    /**
     * Set when `complete`; from the provider.
     */
    finishReason: string | null;
    /**
     * Set when `failed`.
     */
    failure: Failure | null;
};
export type Failure = {
    /**
     * An error code of the protocol, or `CONNECTION_LOST`, or, if the server ended
     * the answer, its reason: `SERVER_SHUTDOWN`, `SESSION_TIMEOUT`, …
     */
    code: string;
    /**
     * In the server's words; may be empty.
     */
    detail: string;
    retryable: boolean;
};
/**
 * `interrupted` is emitted when the user interrupts. After the ack follows
 *   `acknowledged`; or, if the answer had been complete before the interrupt, `text` with the held
 *   text, and `completed`.
 */
export type MessageEvents = {
    started: {
        message: Message;
    };
    text: {
        message: Message;
        text: string;
    };
    functioncall: {
        message: Message;
        call: FunctionCall;
    };
    interrupted: {
        message: Message;
    };
    acknowledged: {
        message: Message;
        ack: InterruptAck;
    };
    completed: {
        message: Message;
    };
    failed: {
        message: Message;
    };
    state: {
        isReceivingResponse: boolean;
    };
};
/**
 * The part of `AudioService` that is used here.
 */
export type Player = {
    /**
     * Receives base64 of PCM.
     */
    play: (voice: string) => void;
    stopAllPlayback: () => void;
};
export type MessageServiceOptions = {
    /**
     * Plays speech. Without it, speech is ignored.
     */
    audio?: Player | undefined;
    /**
     * Returns how many Unicode code
     * points of a message are on the screen. Default: all that were received. It is rounded down. If it
     * throws, or returns no finite number, the server counts what it sent.
     */
    countRendered?: ((message: Message) => number) | undefined;
    log?: Log | undefined;
    clock?: Clock | undefined;
    /**
     * Returns a number in [0, 1).
     */
    random?: (() => number) | undefined;
};
export type MessageOptions = {
    /**
     * Changes the session, for this and later messages.
     */
    update?: SessionSettings | undefined;
    /**
     * Aborting it interrupts the answer.
     */
    signal?: AbortSignal | undefined;
};
export type SentMessage = {
    /**
     * Of the answer.
     */
    messageId: string;
    requestId: string;
    /**
     * Resolves when the answer has ended, in any way. Never rejects.
     */
    promise: Promise<Message>;
};
import { Emitter } from "./events.js";
import type { InterruptReason } from "./websocket-client.js";
import type { InterruptAck } from "./websocket-client.js";
import type { WebSocketClient } from "./websocket-client.js";
import type { FunctionCall } from "./websocket-client.js";
import type { Log } from "./log.js";
import type { Clock } from "./websocket-client.js";
import type { SessionSettings } from "./websocket-client.js";
