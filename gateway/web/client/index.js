/** The public names of the library: everything that a user imports from `bargein`. */

export { AudioService, SAMPLE_RATE } from "./audio-service.js";
export { consoleLog } from "./log.js";
export { MessageService, countCodePoints } from "./message-service.js";
export {
  ACK_TIMEOUT_MS,
  REGISTER_TIMEOUT_MS,
  RegistrationError,
  RequestError,
  SILENCE_TIMEOUT_MS,
  WebSocketClient,
} from "./websocket-client.js";

// Their types.

/** @typedef {import("./audio-service.js").AudioEvents} AudioEvents */
/** @typedef {import("./audio-service.js").AudioServiceOptions} AudioServiceOptions */
/** @typedef {import("./log.js").Log} Log */
/** @typedef {import("./message-service.js").Failure} Failure */
/** @typedef {import("./message-service.js").Message} Message */
/** @typedef {import("./message-service.js").MessageEvents} MessageEvents */
/** @typedef {import("./message-service.js").MessageOptions} MessageOptions */
/** @typedef {import("./message-service.js").MessageServiceOptions} MessageServiceOptions */
/** @typedef {import("./message-service.js").Player} Player */
/** @typedef {import("./message-service.js").SentMessage} SentMessage */
/** @typedef {import("./websocket-client.js").Answer} Answer */
/** @typedef {import("./websocket-client.js").Auth} Auth */
/** @typedef {import("./websocket-client.js").ClientEvents} ClientEvents */
/** @typedef {import("./websocket-client.js").ClientOptions} ClientOptions */
/** @typedef {import("./websocket-client.js").Clock} Clock */
/** @typedef {import("./websocket-client.js").ConnectionState} ConnectionState */
/** @typedef {import("./websocket-client.js").FunctionCall} FunctionCall */
/** @typedef {import("./websocket-client.js").FunctionDefinition} FunctionDefinition */
/** @typedef {import("./websocket-client.js").FunctionParameter} FunctionParameter */
/** @typedef {import("./websocket-client.js").Handlers} Handlers */
/** @typedef {import("./websocket-client.js").InterruptAck} InterruptAck */
/** @typedef {import("./websocket-client.js").InterruptOptions} InterruptOptions */
/** @typedef {import("./websocket-client.js").InterruptReason} InterruptReason */
/** @typedef {import("./websocket-client.js").InterruptResult} InterruptResult */
/** @typedef {import("./websocket-client.js").Registration} Registration */
/** @typedef {import("./websocket-client.js").RequestOptions} RequestOptions */
/** @typedef {import("./websocket-client.js").SentRequest} SentRequest */
/** @typedef {import("./websocket-client.js").ServerError} ServerError */
/** @typedef {import("./websocket-client.js").SessionSettings} SessionSettings */
/** @typedef {import("./websocket-client.js").Socket} Socket */
/** @typedef {import("./websocket-client.js").Usage} Usage */
