import assert from "node:assert/strict";
import { test } from "node:test";

import { ACK_TIMEOUT_MS, RegistrationError, RequestError } from "../../gateway/web/client/websocket-client.js";
import { FakeSocket, collectFaults, makeStand, settled } from "./fakes.js";

/** Send a request, and record everything that is delivered. */
function ask(client, text = "hello", options = {}) {
  const got = { text: "", calls: [], voice: [] };
  const sent = client.sendTextRequest(text, {
    onText: (piece) => (got.text += piece),
    onFunctionCall: (call) => got.calls.push(call),
    onVoice: (voice) => got.voice.push(voice),
    ...options,
  });
  sent.promise.then(
    (answer) => (got.answer = answer),
    (error) => (got.error = error),
  );
  return Object.assign(got, sent);
}

// Connection

test("it registers first, and sends the session's id from then on", async () => {
  const { client, socket, connected } = makeStand({ isOpen: false });
  assert.equal(client.state.name, "connecting");
  assert.deepEqual(socket.sent, []);
  socket.onopen({});
  assert.deepEqual(socket.sent, [
    {
      version: "1.0",
      msg_type: "REGISTER",
      session_id: null,
      payload: { platform: "WEB", auth: { type: "API_KEY", api_key: "k" } },
      timestamp: 1_740_000_000_000,
    },
  ]);
  socket.register();
  await connected;
  assert.equal(client.state.name, "ready");
  ask(client);
  assert.equal(socket.sent[1].session_id, "sess_1");
});

test("a heartbeat is answered at once", () => {
  const { socket } = makeStand();
  socket.say("HEARTBEAT", { remaining_seconds: 3600 });
  assert.equal(socket.sent.at(-1).msg_type, "HEARTBEAT_REPLY");
});

test("a rejected registration is not repeated", async () => {
  const { client, connected, socket, sockets, time } = makeStand({ isOpen: false });
  socket.onopen({});
  socket.error("AUTH_FAILED");
  await assert.rejects(connected, (error) => error instanceof RegistrationError && error.code === "AUTH_FAILED");
  assert.equal(client.state.name, "refused");
  assert.equal(client.state.error.detail, "d");
  time.pass(1_000_000);
  assert.equal(sockets.length, 1);
  client.connect();
  assert.equal(sockets.length, 2);
});

test("a registration is repeated if the server was busy", async () => {
  const { client, connected, sockets, time } = makeStand({ isOpen: false, random: () => 0 });
  for (const [attempt, pause] of [250, 500].entries()) {
    sockets[attempt].onopen({});
    sockets[attempt].error("SERVER_BUSY");
    assert.equal(client.state.name, "waiting");
    assert.equal(client.state.retryInMs, pause);
    time.pass(pause);
  }
  sockets[2].accept();
  await connected;
  assert.equal(client.state.name, "ready");
});

test("an invalid address counts as refused", async () => {
  class Picky {
    constructor() {
      throw new SyntaxError("bad address");
    }
  }
  const { client, connected } = makeStand({ isOpen: false, WebSocket: Picky });
  await assert.rejects(connected, /bad address/);
  assert.equal(client.state.name, "refused");
});

test("without any WebSocket it says what to do", async (context) => {
  const { WebSocket } = globalThis;
  delete globalThis.WebSocket; // Node has one from version 22 on
  context.after(() => WebSocket && Object.assign(globalThis, { WebSocket }));
  const { connected } = makeStand({ isOpen: false, WebSocket: undefined });
  await assert.rejects(connected, { name: "RegistrationError", code: "NO_WEBSOCKET", detail: /option `WebSocket`/ });
});

test("it reconnects after growing pauses with a limit, half of each random", () => {
  const pauses = [];
  for (const random of [() => 0, () => 0.999999]) {
    const { client, socket, sockets, states, time } = makeStand({ random });
    socket.lose(1006);
    for (let round = 0; round < 8; round += 1) {
      assert.equal(client.state.name, "waiting");
      const { retryInMs } = states.at(-1);
      pauses.push(retryInMs);
      time.pass(retryInMs - 1);
      const before = sockets.length;
      time.pass(1);
      assert.equal(sockets.length, before + 1);
      sockets.at(-1).lose(1006);
    }
  }
  assert.deepEqual(pauses.slice(0, 8), [250, 500, 1000, 2000, 4000, 8000, 10000, 10000]);
  assert.deepEqual(pauses.slice(8), [500, 1000, 2000, 4000, 8000, 16000, 20000, 20000]);
});

test("a stable session resets the pauses, a short one does not", () => {
  const { socket, sockets, states, time } = makeStand({ random: () => 0 });
  socket.lose(1006);
  time.pass(250);
  sockets[1].accept();
  time.pass(4_999);
  sockets[1].lose(1006);
  assert.equal(states.at(-1).retryInMs, 500);
  time.pass(500);
  sockets[2].accept();
  time.pass(5_000);
  sockets[2].lose(1006);
  assert.equal(states.at(-1).retryInMs, 250);
});

test("the cause of a loss is restarting, expired, or lost", () => {
  for (const [code, reason, cause] of [
    [1012, "SERVER_SHUTDOWN", "restarting"],
    [1012, null, "restarting"],
    [1008, "session timeout", "expired"],
    [1008, null, "expired"],
    [1006, null, "lost"],
    [1011, null, "lost"],
  ]) {
    const { client, socket } = makeStand();
    if (reason) socket.say("SHUTDOWN", { reason });
    socket.lose(code);
    assert.equal(client.state.cause, cause, `${code} ${reason}`);
  }
});

test("an announced shutdown applies to its own connection only", () => {
  const { client, socket, sockets, time } = makeStand();
  socket.say("SHUTDOWN", { reason: "SERVER_SHUTDOWN" });
  socket.lose(1012);
  time.pass(1_000);
  sockets[1].accept();
  sockets[1].lose(1006);
  assert.equal(client.state.cause, "lost");
});

test("an expired session is registered again at once", () => {
  const { client, socket, sockets, time } = makeStand();
  time.pass(6_000);
  socket.lose(1008);
  time.pass(0);
  sockets[1].accept();
  assert.equal(client.state.name, "ready");
  assert.equal(client.state.isAgain, true);
  assert.equal(client.sessionId, "sess_2");
  assert.equal(sockets[1].sent[0].session_id, null);
});

test("SESSION_INVALID without a request is an expired session", () => {
  const { client, socket } = makeStand();
  const errors = [];
  client.on("error", (error) => errors.push(error.code));
  socket.error("SESSION_INVALID");
  assert.deepEqual(errors, ["SESSION_INVALID"]);
  assert.equal(client.state.cause, "expired");
  assert.equal(socket.isClosed, true);
});

test("events of an old socket are ignored", async () => {
  const { client, socket, sockets, time } = makeStand();
  const { onmessage, onclose } = socket;
  socket.lose(1006);
  time.pass(1_000);
  sockets[1].accept();
  const got = ask(client);
  const payload = { request_id: got.requestId, text_stream_seq: 0, content: { text: "ghost" } };
  onmessage({ data: JSON.stringify({ msg_type: "RESPONSE", payload }) });
  onclose({ code: 1006 });
  assert.equal(got.text, "");
  assert.equal(client.state.name, "ready");
});

test("a connection that is silent for ten minutes is lost, another is not", () => {
  const { client, socket, time } = makeStand();
  time.pass(599_999);
  socket.say("HEARTBEAT", { remaining_seconds: 1 });
  time.pass(599_999);
  assert.equal(client.state.name, "ready");
  time.pass(1);
  assert.equal(client.state.name, "waiting");
});

test("a server that does not register in time is tried again", () => {
  const { client, sockets, time } = makeStand({ isOpen: false });
  time.pass(15_000);
  assert.equal(sockets[0].isClosed, true);
  assert.equal(client.state.name, "waiting");
});

test("close sends SHUTDOWN and stays offline", async () => {
  const { client, socket, sockets, time } = makeStand();
  client.close("ws://other.test/");
  assert.equal(socket.sent.at(-1).msg_type, "SHUTDOWN");
  assert.equal(socket.isClosed, true);
  time.pass(1_000_000);
  assert.equal(sockets.length, 1);
  client.connect();
  assert.equal(sockets[1].url, "ws://other.test/");
});

test("retryNow ends a pause, and does nothing else", () => {
  const { client, socket, sockets } = makeStand();
  client.retryNow();
  assert.equal(sockets.length, 1);
  socket.lose(1006);
  client.retryNow();
  assert.equal(sockets.length, 2);
  client.retryNow();
  assert.equal(sockets.length, 2);
});

test("warnings and errors without a request are emitted", () => {
  const { client, socket } = makeStand();
  const told = [];
  client.on("warning", (warning) => told.push(warning));
  client.on("error", (error) => told.push(error));
  socket.say("SESSION_WARN", { warn_type: "EXPIRE_SOON", remaining_seconds: 300, message: "soon" });
  socket.error("MALFORMED_PAYLOAD");
  assert.deepEqual(told, [
    { remainingSeconds: 300, message: "soon" },
    { code: "MALFORMED_PAYLOAD", message: "m", detail: "d", retryable: true },
  ]);
});

test("a message that is not a frame is ignored", () => {
  const { client, socket } = makeStand();
  for (const data of ["", "{", "null", "[]", '{"msg_type": 7}', '{"msg_type": "RESPONSE"}', new Uint8Array(2)]) {
    socket.onmessage({ data });
  }
  socket.say("FROM_THE_FUTURE", {});
  assert.equal(client.state.name, "ready");
});

// Requests

test("an answer is the sum of its pieces, in order", async () => {
  const { client, socket } = makeStand();
  const got = ask(client, "tell me");
  assert.match(got.requestId, /^req_1740000000000_[0-9a-z]{9}$/);
  const [payload] = socket.sentOf("REQUEST");
  assert.equal(payload.request_id, got.requestId);
  assert.deepEqual(payload.content, { text: "tell me" });
  assert.ok(!("update_session" in payload));
  socket.text(got.requestId, 0, "one ");
  socket.text(got.requestId, 1, "two");
  socket.end(got.requestId, { usage: { prompt_tokens: 1, completion_tokens: 2, total_tokens: 3 } });
  await settled();
  assert.equal(got.text, "one two");
  assert.deepEqual(got.answer, {
    requestId: got.requestId,
    outcome: "COMPLETED",
    interruptReason: null,
    finishReason: "stop",
    usage: { prompt_tokens: 1, completion_tokens: 2, total_tokens: 3 },
    text: "one two",
    functionCalls: [],
  });
});

test("frames are routed by their request_id alone", async () => {
  const { client, socket } = makeStand();
  const [one, two] = [ask(client), ask(client, "hello", { requestId: "req_2" })];
  socket.text("req_2", 0, "second");
  socket.text(one.requestId, 0, "first");
  socket.text("req_unknown", 0, "nobody's");
  socket.end("req_2");
  socket.text("req_2", 1, " too late");
  await settled();
  assert.deepEqual([one.text, two.text], ["first", "second"]);
  assert.equal(one.answer, undefined);
  assert.equal(two.answer.outcome, "COMPLETED");
});

test("the id of a live request is rejected, and that request continues", async () => {
  const { client, socket } = makeStand();
  const got = ask(client);
  assert.throws(() => ask(client, "again", { requestId: got.requestId }), RangeError);
  socket.end(got.requestId);
  assert.equal((await got.promise).outcome, "COMPLETED");
});

test("a function call is delivered, and its result sent", async () => {
  const { client, socket } = makeStand();
  const got = ask(client);
  const call = { name: "open_map", parameters: { hall: 3 }, call_id: "call_1" };
  socket.say("RESPONSE", { request_id: got.requestId, text_stream_seq: 0, content: {}, function_call: call });
  socket.end(got.requestId, { finish_reason: "tool_calls" });
  await settled();
  assert.deepEqual(got.calls, [call]);
  assert.deepEqual(got.answer.functionCalls, [call]);
  client.sendFunctionResult("call_0", [1]);
  const sent = client.continueWithResult("call_1", { ok: true });
  assert.deepEqual(socket.sentOf("FUNCTION_RESULT"), [
    { call_id: "call_0", result: [1] },
    { request_id: sent.requestId, call_id: "call_1", result: { ok: true } },
  ]);
  socket.text(sent.requestId, 0, "there");
  socket.end(sent.requestId);
  assert.equal((await sent.promise).text, "there");
});

test("an update of the session goes with the request", () => {
  const { client, socket } = makeStand();
  ask(client, "", { update: { require_tts: true } });
  assert.deepEqual(socket.sentOf("REQUEST")[0].update_session, { require_tts: true });
});

test("an error ends its own request only, with the server's detail", async () => {
  const { client, socket } = makeStand();
  const [one, two] = [ask(client), ask(client, "b", { requestId: "req_2" })];
  socket.error("REQUEST_TIMEOUT", { request_id: one.requestId, error_detail: "no token in 30 s" });
  await settled();
  assert.ok(one.error instanceof RequestError);
  assert.deepEqual([one.error.code, one.error.detail, one.error.retryable], ["REQUEST_TIMEOUT", "no token in 30 s", true]);
  assert.equal(two.error, undefined);
});

test("a lost connection ends every request, and none is sent without one", async () => {
  const { client, socket } = makeStand();
  const got = ask(client);
  socket.lose(1006);
  const other = ask(client);
  await settled();
  assert.equal(got.error.code, "CONNECTION_LOST");
  assert.equal(other.error.code, "NOT_CONNECTED");
  assert.throws(() => client.sendFunctionResult("call_1", 1), { code: "NOT_CONNECTED" });
  assert.equal(socket.sentOf("REQUEST").length, 1);
});

test("a value that JSON cannot represent is not sent, and leaves no live request", async () => {
  const { client, socket } = makeStand();
  const { signal } = new AbortController();
  const sent = client.continueWithResult("call_1", 1n, { signal });
  const got = ask(client, "a", { update: { function_calling: [{ name: "f", parameters: { most: 1n } }] } });
  await assert.rejects(sent.promise, TypeError);
  await settled();
  assert.ok(got.error instanceof TypeError);
  assert.equal(client._live.size, 0);
  assert.throws(() => client.sendFunctionResult("call_1", 1n), TypeError);
  assert.equal(socket.sent.length, 1); // REGISTER
});

test("a function without a result sends null", () => {
  const { client, socket } = makeStand();
  client.sendFunctionResult("call_0", undefined);
  client.continueWithResult("call_1", undefined);
  assert.deepEqual(socket.sentOf("FUNCTION_RESULT").map(({ result }) => result), [null, null]);
});

test("half of a surrogate pair is not sent", () => {
  const { client, socket } = makeStand();
  ask(client, "cut \ud83d here, whole \u{1f600} there");
  assert.equal(socket.sentOf("REQUEST")[0].content.text, "cut \ufffd here, whole \u{1f600} there");
});

test("a handler that throws does not stop later frames", async (context) => {
  const faults = collectFaults(context);
  const { client, socket } = makeStand();
  const got = ask(client, "x", {
    onText: () => {
      throw new Error("mine");
    },
  });
  socket.text(got.requestId, 0, "one");
  socket.end(got.requestId);
  await settled();
  assert.equal(got.answer.text, "one");
  assert.deepEqual(faults, ["mine"]);
});

// Interrupts

test("an interrupt names target and reason, and its ack settles it", async () => {
  const { client, lines, socket, time } = makeStand();
  const got = ask(client);
  socket.text(got.requestId, 0, "shown");
  const interrupt = client.sendInterrupt(got.requestId, "USER_STOP", { deliveredTextChars: 5 });
  assert.deepEqual(socket.sentOf("INTERRUPT"), [
    { interrupt_request_id: got.requestId, reason: "USER_STOP", delivered_text_chars: 5 },
  ]);
  time.pass(3);
  socket.ack(got.requestId);
  socket.end(got.requestId, { interrupted: true });
  const ack = await interrupt;
  await settled();
  assert.equal(ack.status, "SUCCESS");
  assert.equal(ack.roundTripMs, 3);
  assert.equal(ack.results[0].stream_closed_ms, 1.25);
  assert.equal(got.answer.outcome, "INTERRUPTED");
  assert.equal(got.answer.interruptReason, "USER_STOP");
  assert.equal(got.text, "shown");
  assert.deepEqual(lines.slice(-2), [
    `[WebSocket] 发送打断请求: ${got.requestId}`,
    `debug [WebSocket] 收到打断确认: ${got.requestId}`,
  ]);
});

test("an interrupt sends a whole figure, or none", () => {
  for (const [given, sent] of [
    [12.5, 12],
    [0.999, 0],
    [-1, 0],
    [-0.3, 0],
    [7, 7],
    [1e300, Number.MAX_SAFE_INTEGER],
    [Number.NaN, undefined],
    [Number.POSITIVE_INFINITY, undefined],
    ["12", undefined],
    [null, undefined],
    [12n, undefined], // JSON cannot represent it
  ]) {
    const { client, socket } = makeStand();
    const { requestId } = ask(client);
    void client.sendInterrupt(requestId, "USER_STOP", { deliveredTextChars: given });
    const base = { interrupt_request_id: requestId, reason: "USER_STOP" };
    const expected = sent === undefined ? base : { ...base, delivered_text_chars: sent };
    assert.deepEqual(socket.sentOf("INTERRUPT"), [expected], String(given));
  }
});

test("an interrupt that gets an ERROR is sent once more, with its target only", async () => {
  for (const target of ["req_1", null]) {
    const { client, socket, time } = makeStand();
    const got = ask(client, "a", { requestId: "req_1" });
    const interrupt = client.sendInterrupt(target, "USER_STOP", { deliveredTextChars: 3 });
    time.pass(2);
    socket.error("MALFORMED_PAYLOAD");
    socket.text("req_1", 0, "late");
    assert.deepEqual(socket.sentOf("INTERRUPT").slice(1), [{ interrupt_request_id: target }]);
    socket.error("MALFORMED_PAYLOAD"); // once more is enough
    assert.equal(socket.sentOf("INTERRUPT").length, 2);
    time.pass(3);
    socket.ack("req_1", "STOPPED", { interrupt_request_id: target });
    const ack = await interrupt;
    assert.deepEqual([ack.requestId, ack.status, ack.roundTripMs], [target, "SUCCESS", 5]);
    socket.end("req_1", { interrupted: true });
    await settled();
    assert.deepEqual([got.answer.outcome, got.text], ["INTERRUPTED", ""]);
  }
});

test("the ack of an interrupt that was sent twice without need changes nothing", async () => {
  const { client, socket, time } = makeStand();
  const acks = [];
  client.on("ack", (ack) => acks.push(ack.status));
  ask(client);
  const first = ask(client, "b", { requestId: "req_2" });
  const interrupt = client.sendInterrupt("req_2");
  socket.error("MALFORMED_PAYLOAD"); // of another frame
  socket.ack("req_2", "STOPPED");
  socket.end("req_2", { interrupted: true });
  const next = ask(client, "c", { requestId: "req_3" });
  socket.ack("req_2", "ALREADY_DONE");
  socket.text("req_3", 0, "all");
  socket.end("req_3");
  assert.equal((await interrupt).results[0].outcome, "STOPPED");
  await settled();
  assert.deepEqual([first.answer.outcome, next.answer.outcome, next.text], ["INTERRUPTED", "COMPLETED", "all"]);
  assert.deepEqual(acks, ["SUCCESS"]);
  // Nor does it take the place of the next interrupt's ack.
  const other = client.sendInterrupt("req_1x");
  socket.ack("req_2", "ALREADY_DONE");
  time.pass(ACK_TIMEOUT_MS);
  assert.equal((await other).status, "NO_ACK");
});

test("an interrupt of all is not repeated if that would stop a later request", async () => {
  const { client, socket } = makeStand();
  ask(client);
  void client.sendInterrupt(null);
  const later = ask(client, "b", { requestId: "req_2" });
  socket.error("MALFORMED_PAYLOAD");
  assert.equal(socket.sentOf("INTERRUPT").length, 1);
  void client.sendInterrupt("req_2");
  socket.error("MALFORMED_PAYLOAD"); // now nothing else runs: both can be repeated
  assert.deepEqual(
    socket.sentOf("INTERRUPT").slice(2),
    [{ interrupt_request_id: null }, { interrupt_request_id: "req_2" }],
  );
  socket.ack("req_2", "STOPPED");
  assert.equal((await later.promise).outcome, "INTERRUPTED");
});

test("an ERROR with a request's id, or of a session that is over, repeats no interrupt", async () => {
  const { client, socket } = makeStand();
  const got = ask(client);
  void client.sendInterrupt(got.requestId);
  socket.error("INTERNAL_ERROR", { request_id: got.requestId });
  socket.error("SESSION_INVALID");
  assert.equal(socket.sentOf("INTERRUPT").length, 1);
});

test("held frames of an interrupted request are dropped at its ack", async () => {
  const { client, socket } = makeStand();
  const got = ask(client);
  client.sendInterrupt(got.requestId);
  socket.text(got.requestId, 0, "late");
  socket.ack(got.requestId);
  socket.text(got.requestId, 1, "later");
  await settled();
  assert.equal(got.text, "");
  assert.equal(got.answer.text, "");
});

test("an answer that ended before the interrupt is complete, with all its text", async () => {
  const { client, socket } = makeStand();
  const got = ask(client);
  socket.text(got.requestId, 0, "one ");
  const interrupt = client.sendInterrupt(got.requestId);
  socket.text(got.requestId, 1, "two ");
  socket.text(got.requestId, 2, "three");
  socket.end(got.requestId);
  await settled();
  assert.equal(got.text, "one ");
  assert.equal(got.answer, undefined);
  socket.ack(got.requestId, "ALREADY_DONE");
  await interrupt;
  await settled();
  assert.equal(got.text, "one two three");
  assert.equal(got.answer.outcome, "COMPLETED");
  assert.equal(got.answer.text, "one two three");
});

test("an ack may overtake the rest of an answer that ended before", async () => {
  const { client, socket } = makeStand();
  const got = ask(client);
  client.sendInterrupt(got.requestId);
  socket.text(got.requestId, 0, "one ");
  socket.ack(got.requestId, "ALREADY_DONE");
  socket.text(got.requestId, 1, "two");
  assert.equal(got.text, "one two");
  socket.end(got.requestId);
  await settled();
  assert.equal(got.answer.outcome, "COMPLETED");
  assert.equal(got.answer.text, "one two");
});

test("held sound is not played with the held text", async () => {
  const { client, socket } = makeStand();
  const got = ask(client);
  client.sendInterrupt(got.requestId);
  socket.say("RESPONSE", { request_id: got.requestId, text_stream_seq: 0, content: { text: "a", voice: "AAAA" } });
  socket.end(got.requestId);
  socket.ack(got.requestId, "ALREADY_DONE");
  await settled();
  assert.equal(got.text, "a");
  assert.deepEqual(got.voice, []);
});

test("an answer that failed before the interrupt ends as failed", async () => {
  const { client, socket } = makeStand();
  const got = ask(client);
  client.sendInterrupt(got.requestId);
  socket.error("INTERNAL_ERROR", { request_id: got.requestId });
  socket.ack(got.requestId, "ALREADY_DONE");
  await settled();
  assert.equal(got.error.code, "INTERNAL_ERROR");
});

test("without an ack in time the terminal frame decides", async () => {
  const { client, socket, time } = makeStand();
  const [done, stopped] = [ask(client), ask(client, "b", { requestId: "req_2" })];
  const acks = [client.sendInterrupt(done.requestId), client.sendInterrupt("req_2")];
  socket.text(done.requestId, 0, "all");
  socket.end(done.requestId);
  socket.text("req_2", 0, "some");
  time.pass(ACK_TIMEOUT_MS - 1);
  await settled();
  assert.equal(done.answer, undefined);
  time.pass(1);
  assert.deepEqual((await Promise.all(acks)).map(({ status }) => status), ["NO_ACK", "NO_ACK"]);
  await settled();
  assert.equal(done.answer.outcome, "COMPLETED");
  assert.equal(done.text, "all");
  assert.equal(stopped.answer.outcome, "INTERRUPTED");
  assert.equal(stopped.text, "");
});

test("if an ack has no results, the terminal frame decides", async () => {
  const { client, socket } = makeStand();
  const [done, stopped] = [ask(client), ask(client, "b", { requestId: "req_2" })];
  for (const { requestId } of [done, stopped]) {
    void client.sendInterrupt(requestId);
    socket.ack(requestId, "STOPPED", { results: undefined });
  }
  socket.text(done.requestId, 0, "all");
  await settled();
  assert.equal(done.answer, undefined);
  socket.end(done.requestId);
  socket.end("req_2", { interrupted: true });
  await settled();
  assert.equal(done.answer.outcome, "COMPLETED");
  assert.equal(done.text, "all");
  assert.equal(stopped.answer.outcome, "INTERRUPTED");
});

test("two interrupts of one request get an ack each, in their order", async () => {
  const { client, socket, time } = makeStand();
  const got = ask(client);
  const first = client.sendInterrupt(got.requestId, "USER_STOP");
  time.pass(1);
  const second = client.sendInterrupt(got.requestId, "USER_NEW_INPUT");
  time.pass(1);
  socket.ack(got.requestId, "STOPPED");
  socket.ack(got.requestId, "ALREADY_DONE");
  assert.deepEqual(
    (await Promise.all([first, second])).map(({ roundTripMs, results }) => [roundTripMs, results[0].outcome]),
    [[2, "STOPPED"], [1, "ALREADY_DONE"]],
  );
  assert.equal((await got.promise).interruptReason, "USER_STOP");
});

test("acks are matched to their interrupts by the request's id", async () => {
  const { client, socket } = makeStand();
  const [one, two] = [ask(client), ask(client, "b", { requestId: "req_2" })];
  const acks = [client.sendInterrupt(one.requestId), client.sendInterrupt("req_2")];
  socket.ack("req_2", "STOPPED");
  await settled();
  assert.deepEqual([one.answer, two.answer.outcome], [undefined, "INTERRUPTED"]);
  socket.ack(one.requestId, "STOPPED");
  assert.deepEqual((await Promise.all(acks)).map(({ requestId }) => requestId), [one.requestId, "req_2"]);
});

test("an answer that ends between an interrupt of all and its ack waits for the ack", async () => {
  const { client, socket } = makeStand();
  const got = ask(client);
  void client.sendInterrupt(null);
  socket.text(got.requestId, 0, "all");
  socket.end(got.requestId);
  assert.equal(got.text, "");
  const results = [{ request_id: got.requestId, outcome: "ALREADY_DONE", stream_closed_ms: null }];
  socket.say("INTERRUPT_ACK", { status: "FAILED", results, interrupt_request_id: null });
  assert.equal((await got.promise).text, "all");
});

test("the ack of an interrupt of all has no id, and all are stopped", async () => {
  const { client, socket } = makeStand();
  const [one, two] = [ask(client), ask(client, "b", { requestId: "req_2" })];
  const interrupt = client.sendInterrupt(null);
  assert.equal(socket.sentOf("INTERRUPT")[0].interrupt_request_id, null);
  socket.text("req_2", 0, "late");
  const results = [one.requestId, "req_2"].map((id) => ({ request_id: id, outcome: "STOPPED" }));
  socket.say("INTERRUPT_ACK", { status: "SUCCESS", results, interrupt_request_id: null });
  assert.equal((await interrupt).requestId, null);
  await settled();
  assert.deepEqual([one.answer.outcome, two.answer.outcome], ["INTERRUPTED", "INTERRUPTED"]);
  assert.equal(two.text, "");
});

test("a lost connection ends the wait for an ack", async () => {
  const { client, socket } = makeStand();
  const got = ask(client);
  const interrupt = client.sendInterrupt(got.requestId);
  socket.lose(1006);
  assert.equal((await interrupt).status, "NO_ACK");
  assert.equal((await got.promise).outcome, "INTERRUPTED");
  assert.equal((await client.sendInterrupt(got.requestId)).status, "NO_ACK");
});

test("aborting is an interrupt, and rejects at once", async () => {
  const { client, socket } = makeStand();
  const controller = new AbortController();
  const got = ask(client, "a", { signal: controller.signal });
  controller.abort();
  await settled();
  assert.equal(got.error.name, "AbortError");
  assert.deepEqual(socket.sentOf("INTERRUPT"), [{ interrupt_request_id: got.requestId, reason: "USER_STOP" }]);
  socket.text(got.requestId, 0, "late");
  socket.ack(got.requestId);
  assert.equal(got.text, "");
});

test("nothing more is delivered of an aborted request, even if it was complete", async () => {
  const { client, socket } = makeStand();
  const controller = new AbortController();
  const got = ask(client, "a", { signal: controller.signal });
  controller.abort();
  socket.text(got.requestId, 0, "all");
  socket.end(got.requestId);
  socket.ack(got.requestId, "ALREADY_DONE");
  await settled();
  assert.equal(got.error.name, "AbortError");
  assert.equal(got.text, "");
});

test("a signal aborted before sends nothing; aborted after the end, it does nothing", async () => {
  const { client, socket } = makeStand();
  const before = ask(client, "a", { signal: AbortSignal.abort() });
  await settled();
  assert.equal(before.error.name, "AbortError");
  assert.deepEqual(socket.sentOf("REQUEST"), []);
  const controller = new AbortController();
  const after = ask(client, "b", { signal: controller.signal });
  socket.end(after.requestId);
  controller.abort();
  await settled();
  assert.equal(after.answer.outcome, "COMPLETED");
  assert.deepEqual(socket.sentOf("INTERRUPT"), []);
});

test("many requests leave nothing behind", async () => {
  const { client, socket, time } = makeStand();
  for (let round = 0; round < 50; round += 1) {
    const got = ask(client, "x", { requestId: `req_${round}` });
    void client.sendInterrupt(got.requestId);
    if (round % 2) socket.end(got.requestId);
    socket.ack(got.requestId, round % 2 ? "ALREADY_DONE" : "STOPPED");
  }
  await settled();
  assert.equal(client._live.size, 0);
  assert.equal(client._interrupts.length, 0);
  assert.equal(time.timers.size, 1); // the timeout for a silent connection
  assert.equal(FakeSocket.all.length, 1);
});
