/** Fakes that the tests pass to the library: a clock moved by hand, and sockets kept in a list. */

import { MessageService } from "../../gateway/web/client/message-service.js";
import { WebSocketClient } from "../../gateway/web/client/websocket-client.js";

export class FakeClock {
  constructor() {
    this.time = 1_740_000_000_000;
    this.timers = new Map();
    this.next = 1;
    this.clock = {
      now: () => this.time,
      monotonic: () => this.time - 1_700_000_000_000,
      setTimeout: (callback, ms) => {
        this.timers.set(this.next, { at: this.time + ms, callback });
        return this.next++;
      },
      clearTimeout: (timer) => void this.timers.delete(timer),
    };
  }

  /** Let so many milliseconds pass, and call the timers that are due, in order. */
  pass(ms) {
    const end = this.time + ms;
    for (;;) {
      const due = [...this.timers].filter(([, { at }]) => at <= end);
      if (due.length === 0) break;
      due.sort(([, one], [, other]) => one.at - other.at);
      const [id, { at, callback }] = due[0];
      this.timers.delete(id);
      this.time = at;
      callback();
    }
    this.time = end;
  }
}

/** A socket, and the server's end of it. */
export class FakeSocket {
  constructor(url) {
    this.url = url;
    this.sent = [];
    this.isClosed = false;
    FakeSocket.all.push(this);
  }

  send(text) {
    this.sent.push(JSON.parse(text));
  }

  close() {
    this.isClosed = true;
  }

  /** The payloads of the sent frames of one type. */
  sentOf(type) {
    return this.sent.filter(({ msg_type }) => msg_type === type).map(({ payload }) => payload);
  }

  say(type, payload) {
    const frame = { version: "1.0", msg_type: type, session_id: "s", payload, timestamp: 1 };
    this.onmessage?.({ data: JSON.stringify(frame) });
  }

  text(requestId, seq, text) {
    this.say("RESPONSE", { request_id: requestId, text_stream_seq: seq, content: { text } });
  }

  end(requestId, fields = {}) {
    const outcome = fields.interrupted ? "INTERRUPTED" : "COMPLETED";
    const base = { request_id: requestId, text_stream_seq: -1, content: {}, outcome };
    this.say("RESPONSE", { ...base, finish_reason: "stop", usage: null, ...fields });
  }

  ack(requestId, outcome = "STOPPED", fields = {}) {
    const closed = outcome === "STOPPED" ? 1.25 : null;
    const one = { request_id: requestId, outcome, delivered_text_chars: 0, stream_closed_ms: closed };
    this.say("INTERRUPT_ACK", {
      interrupted_request_ids: outcome === "STOPPED" ? [requestId] : [],
      status: outcome === "STOPPED" ? "SUCCESS" : "FAILED",
      message: "",
      results: [one],
      interrupt_request_id: requestId,
      ...fields,
    });
  }

  error(code, fields = {}) {
    this.say("ERROR", { error_code: code, error_msg: "m", error_detail: "d", retryable: true, ...fields });
  }

  accept() {
    this.onopen?.({});
    this.register();
  }

  register() {
    this.say("REGISTER_ACK", { session_id: `sess_${FakeSocket.all.length}`, status: "SUCCESS" });
  }

  lose(code = 1006) {
    this.onclose?.({ code });
  }
}
FakeSocket.all = [];

/** Resolves after all pending promise callbacks have run. */
export const settled = () => new Promise((resolve) => setImmediate(resolve));

/** Collects the messages of uncaught exceptions while a test runs; they do not end the process. */
export function collectFaults(context) {
  const faults = [];
  const listeners = process.listeners("uncaughtException");
  process.removeAllListeners("uncaughtException");
  process.on("uncaughtException", (error) => faults.push(error.message));
  context.after(() => {
    process.removeAllListeners("uncaughtException");
    for (const listener of listeners) process.on("uncaughtException", listener);
  });
  return faults;
}

/** A client with fakes around it. It is registered unless `isOpen` is false. */
export function makeStand({ isOpen = true, random = () => 0.5, ...options } = {}) {
  FakeSocket.all = [];
  const time = new FakeClock();
  const lines = [];
  const log = { info: (line) => lines.push(line), debug: (line) => lines.push(`debug ${line}`) };
  const states = [];
  const client = new WebSocketClient({
    url: "ws://gateway.test/ws/agent/stream",
    registration: () => ({ auth: { type: "API_KEY", api_key: "k" } }),
    WebSocket: FakeSocket,
    clock: time.clock,
    random,
    log,
    ...options,
  });
  client.on("state", (state) => states.push(state));
  const connected = client.connect();
  connected.catch(() => undefined);
  const stand = {
    time,
    lines,
    states,
    log,
    client,
    connected,
    get socket() {
      return FakeSocket.all.at(-1);
    },
    get sockets() {
      return FakeSocket.all;
    },
  };
  if (isOpen) stand.socket.accept();
  return stand;
}

/** The same with a message service, whose events are recorded as `[name, requestId]`. */
export function makeTalk({ rendered, ...options } = {}) {
  const stand = makeStand(options);
  const audio = { played: [], stops: 0, play: (pcm) => audio.played.push(pcm), stopAllPlayback: () => audio.stops++ };
  let number = 1;
  const service = new MessageService(stand.client, {
    audio,
    log: stand.log,
    clock: stand.time.clock,
    // Random numbers that are the same in every run.
    random: () => (number = (number * 48_271) % 2_147_483_647) / 2_147_483_647,
    ...(rendered && { countRendered: rendered }),
  });
  const events = [];
  for (const name of ["started", "text", "functioncall", "interrupted", "acknowledged", "completed", "failed"]) {
    service.on(name, ({ message }) => events.push([name, message.requestId]));
  }
  return Object.assign(stand, { service, audio, events, names: () => events.map(([name]) => name) });
}
