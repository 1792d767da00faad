import assert from "node:assert/strict";
import { test } from "node:test";

import { countCodePoints } from "../../gateway/web/client/message-service.js";
import { ACK_TIMEOUT_MS, RequestError } from "../../gateway/web/client/websocket-client.js";
import { collectFaults, makeTalk, settled } from "./fakes.js";

test("state, request id and message id are never mixed up", async () => {
  const { service, socket, names } = makeTalk();
  assert.deepEqual([service.isReceivingResponse, service.currentRequestId, service.currentMessageId], [false, null, null]);
  const sent = service.sendTextMessage("hello");
  assert.match(sent.requestId, /^req_\d+_[0-9a-z]{9}$/);
  assert.match(sent.messageId, /^msg_\d+_[0-9a-z]{9}$/);
  assert.deepEqual(
    [service.isReceivingResponse, service.currentRequestId, service.currentMessageId],
    [true, sent.requestId, sent.messageId],
  );
  socket.text(sent.requestId, 0, "hi");
  socket.end(sent.requestId, { finish_reason: "length" });
  const message = await sent.promise;
  assert.deepEqual([message.state, message.text, message.finishReason], ["complete", "hi", "length"]);
  assert.deepEqual([service.isReceivingResponse, service.currentRequestId, service.currentMessageId], [false, null, null]);
  assert.deepEqual(names(), ["started", "text", "completed"]);
});

test("a new message interrupts the old one and is sent without waiting", async () => {
  const { audio, lines, service, socket } = makeTalk({ rendered: () => 3 });
  const old = service.sendTextMessage("a story");
  socket.text(old.requestId, 0, "Once upon");
  const stops = audio.stops;
  const before = lines.length;
  const fresh = service.sendTextMessage("停止");
  // All in one turn of the event loop: no promise callback has run yet.
  assert.equal(audio.stops, stops + 1);
  assert.deepEqual(
    socket.sent.slice(1).map(({ msg_type, payload }) => [msg_type, payload.request_id ?? payload.interrupt_request_id]),
    [["REQUEST", old.requestId], ["INTERRUPT", old.requestId], ["REQUEST", fresh.requestId]],
  );
  assert.deepEqual(socket.sentOf("INTERRUPT")[0], {
    interrupt_request_id: old.requestId,
    reason: "USER_NEW_INPUT",
    delivered_text_chars: 3,
  });
  assert.equal(service.currentRequestId, fresh.requestId);
  assert.deepEqual(lines.slice(before), [
    "[MessageService] 检测到新输入，打断当前响应",
    `[MessageService] 发送打断信号 - 请求ID: ${old.requestId}`,
    `[WebSocket] 发送打断请求: ${old.requestId}`,
    `[MessageService] 开始接收响应 - 请求ID: ${fresh.requestId}`,
  ]);
  socket.text(old.requestId, 1, " a time");
  socket.text(fresh.requestId, 0, "好的");
  socket.ack(old.requestId);
  socket.end(old.requestId, { interrupted: true });
  const message = await old.promise;
  await settled();
  assert.deepEqual([message.state, message.text, message.streamClosedMs], ["interrupted", "Once upon", 1.25]);
  assert.equal(service.currentRequestId, fresh.requestId);
  socket.end(fresh.requestId);
  assert.equal((await fresh.promise).text, "好的");
});

test("an interrupt silences, resets the state, marks the message, and sends, in this order", () => {
  const { audio, client, service, socket } = makeTalk();
  const { requestId } = service.sendTextMessage("a");
  socket.text(requestId, 0, "x");
  const seen = [];
  audio.stopAllPlayback = () => seen.push(`silence ${service.isReceivingResponse}`);
  service.on("state", ({ isReceivingResponse }) => seen.push(`state ${isReceivingResponse}`));
  service.on("interrupted", ({ message }) => seen.push(`${message.state} ${socket.sentOf("INTERRUPT").length}`));
  client.on("frame", ({ msgType }) => seen.push(msgType));
  service.interruptCurrentRequest("USER_STOP");
  assert.deepEqual(seen, ["silence true", "state false", "interrupted 0", "INTERRUPT"]);
});

test("a stop without an answer in progress sends nothing and logs that", () => {
  const { lines, service, socket } = makeTalk();
  assert.equal(service.interruptCurrentRequest(), null);
  assert.deepEqual(socket.sentOf("INTERRUPT"), []);
  assert.equal(lines.at(-1), "[MessageService] 没有正在进行的请求");
});

test("drawn text is counted in code points", () => {
  assert.equal(countCodePoints("a停\u{1f600}e\u0301"), 5);
  const { service, socket } = makeTalk();
  const { requestId } = service.sendTextMessage("a");
  socket.text(requestId, 0, "停\u{1f600}");
  service.interruptCurrentRequest();
  assert.equal(socket.sentOf("INTERRUPT")[0].delivered_text_chars, 2);
});

test("a computed count of drawn text is sent as a whole number", () => {
  for (const [share, sent] of [[0.37, 1], [-0.01, 0], [Number.NaN, undefined]]) {
    const { service, socket } = makeTalk({ rendered: ({ text }) => text.length * share });
    const { requestId } = service.sendTextMessage("a");
    socket.text(requestId, 0, "hello");
    service.interruptCurrentRequest();
    assert.equal(socket.sentOf("INTERRUPT")[0].delivered_text_chars, sent, String(share));
  }
});

test("an answer that was complete before the stop arrived ends as complete", async () => {
  const { names, service, socket } = makeTalk();
  const sent = service.sendTextMessage("a");
  socket.text(sent.requestId, 0, "almost ");
  const interrupt = service.interruptCurrentRequest();
  socket.text(sent.requestId, 1, "done");
  socket.end(sent.requestId);
  await settled();
  assert.deepEqual(names(), ["started", "text", "interrupted"]);
  socket.ack(sent.requestId, "ALREADY_DONE");
  await interrupt;
  const message = await sent.promise;
  assert.deepEqual([message.state, message.text, message.interruptReason], ["complete", "almost done", null]);
  assert.deepEqual(names(), ["started", "text", "interrupted", "text", "completed"]);
});

test("an ack without a result for an answer does not change how the answer ended", async () => {
  for (const end of [
    (socket, id) => socket.end(id),
    (socket, id) => socket.error("INTERNAL_ERROR", { request_id: id }),
  ]) {
    for (const judge of [
      ({ socket }, id) => socket.ack(id, "STOPPED", { results: undefined }), // as servers other than bargein ack
      ({ time }) => time.pass(ACK_TIMEOUT_MS),
      ({ socket }) => socket.lose(1006),
    ]) {
      const stand = makeTalk();
      const { names, service, socket } = stand;
      const sent = service.sendTextMessage("a");
      const interrupt = service.interruptCurrentRequest();
      end(socket, sent.requestId);
      judge(stand, sent.requestId);
      const message = await sent.promise;
      await interrupt;
      assert.ok(["complete", "failed"].includes(message.state), message.state);
      assert.deepEqual(names().slice(1), ["interrupted", message.state === "complete" ? "completed" : "failed"]);
    }
  }
});

test("an interrupt is sent even if the page's own functions throw", async (context) => {
  const faults = collectFaults(context);
  const { audio, service, socket } = makeTalk({
    rendered: () => {
      throw new Error("count");
    },
  });
  const { requestId } = service.sendTextMessage("a");
  audio.stopAllPlayback = () => {
    throw new Error("silence");
  };
  service.interruptCurrentRequest();
  assert.deepEqual(socket.sentOf("INTERRUPT"), [{ interrupt_request_id: requestId, reason: "USER_STOP" }]);
  await settled();
  assert.deepEqual(faults, ["silence", "count"]);
});

test("a late ack does not touch the answer in progress", async () => {
  const { service, socket } = makeTalk();
  const old = service.sendTextMessage("a");
  const fresh = service.sendTextMessage("b");
  socket.end(old.requestId);
  socket.ack(old.requestId, "ALREADY_DONE");
  await old.promise;
  assert.equal(service.currentMessageId, fresh.messageId);
  assert.equal(service.isReceivingResponse, true);
});

test("ten in a row: nine interrupted, one complete, nothing mixed", async () => {
  const { service, socket } = makeTalk();
  const sent = [];
  for (let round = 0; round < 10; round += 1) {
    sent.push(service.sendTextMessage(`question ${round}`));
    socket.text(sent.at(-1).requestId, 0, `answer ${round}`);
  }
  for (const { requestId } of sent.slice(0, 9)) {
    socket.ack(requestId);
    socket.end(requestId, { interrupted: true });
  }
  socket.end(sent[9].requestId);
  const messages = await Promise.all(sent.map(({ promise }) => promise));
  assert.deepEqual(messages.map(({ text }) => text), sent.map((_, round) => `answer ${round}`));
  assert.deepEqual(messages.map(({ state }) => state), [...Array(9).fill("interrupted"), "complete"]);
  assert.equal(new Set(sent.flatMap(({ requestId, messageId }) => [requestId, messageId])).size, 20);
});

test("an error, a lost connection and a server that stops fail the message", async () => {
  for (const [break_, code, detail] of [
    [(socket, id) => socket.error("SERVER_BUSY", { request_id: id }), "SERVER_BUSY", "d"],
    [(socket) => socket.lose(1006), "CONNECTION_LOST", ""],
    [(socket, id) => socket.end(id, { interrupted: true, interrupt_reason: "SERVER_SHUTDOWN" }), "SERVER_SHUTDOWN", ""],
  ]) {
    const { names, service, socket } = makeTalk();
    const sent = service.sendTextMessage("a");
    socket.text(sent.requestId, 0, "half");
    break_(socket, sent.requestId);
    const message = await sent.promise;
    assert.equal(message.state, "failed");
    assert.deepEqual([message.failure.code, message.failure.detail], [code, detail]);
    assert.equal(service.isReceivingResponse, false);
    assert.deepEqual(names(), ["started", "text", "failed"]);
  }
});

test("losing the connection after a stop does not fail the answer", async () => {
  const { names, service, socket } = makeTalk();
  const sent = service.sendTextMessage("a");
  service.interruptCurrentRequest();
  socket.lose(1006);
  assert.equal((await sent.promise).state, "interrupted");
  await settled();
  assert.deepEqual(names(), ["started", "interrupted", "acknowledged"]);
});

test("nor does losing it before the rest of a complete answer arrives", async () => {
  const { names, service, socket } = makeTalk();
  const sent = service.sendTextMessage("a");
  service.interruptCurrentRequest();
  socket.ack(sent.requestId, "ALREADY_DONE");
  socket.lose(1006);
  assert.equal((await sent.promise).state, "interrupted");
  assert.deepEqual(names(), ["started", "interrupted"]);
});

test("without a connection nothing is sent, and nothing changes", () => {
  const { events, service, socket } = makeTalk();
  socket.lose(1006);
  assert.throws(() => service.sendTextMessage("a"), (error) => error instanceof RequestError && error.code === "NOT_CONNECTED");
  assert.deepEqual(events, []);
  assert.equal(service.isReceivingResponse, false);
});

test("a signal interrupts its own message only", async () => {
  const { service, socket } = makeTalk();
  const controller = new AbortController();
  const old = service.sendTextMessage("a", { signal: controller.signal });
  const fresh = service.sendTextMessage("b");
  controller.abort();
  assert.deepEqual(socket.sentOf("INTERRUPT").map((one) => one.interrupt_request_id), [old.requestId]);
  assert.equal(service.currentRequestId, fresh.requestId);
  const other = new AbortController();
  const third = service.sendTextMessage("c", { signal: other.signal });
  other.abort();
  assert.equal(socket.sentOf("INTERRUPT").at(-1).interrupt_request_id, third.requestId);
  assert.equal(service.isReceivingResponse, false);
});

test("a signal that is aborted already sends nothing, and interrupts nothing", () => {
  const { service, socket } = makeTalk();
  const { requestId } = service.sendTextMessage("a");
  assert.throws(() => service.sendTextMessage("b", { signal: AbortSignal.abort() }), { name: "AbortError" });
  assert.deepEqual([service.currentRequestId, socket.sentOf("INTERRUPT").length], [requestId, 0]);
});

test("speech is played, and silenced by the next message", async () => {
  const { audio, service, socket } = makeTalk();
  const { requestId } = service.sendTextMessage("a");
  socket.say("RESPONSE", { request_id: requestId, text_stream_seq: 0, content: { voice: "AAAA" } });
  assert.deepEqual(audio.played, ["AAAA"]);
  socket.end(requestId);
  await settled();
  const { stops } = audio;
  service.sendTextMessage("b");
  assert.ok(audio.stops > stops); // speech may play after its text is complete
});

test("the model continues once every call has its result", async () => {
  const { service, socket, names } = makeTalk();
  const sent = service.sendTextMessage("a");
  for (const [seq, id] of ["call_1", "call_2"].entries()) {
    const function_call = { name: "f", parameters: {}, call_id: id };
    socket.say("RESPONSE", { request_id: sent.requestId, text_stream_seq: seq, content: {}, function_call });
  }
  socket.end(sent.requestId);
  const message = await sent.promise;
  assert.equal(service.sendFunctionResult(message, "call_2", 2), null);
  const next = service.sendFunctionResult(message, "call_1", 1);
  assert.deepEqual(socket.sentOf("FUNCTION_RESULT"), [
    { call_id: "call_2", result: 2 },
    { request_id: next.requestId, call_id: "call_1", result: 1 },
  ]);
  assert.notEqual(next.requestId, sent.requestId);
  assert.equal(message.continuation, next.requestId);
  assert.deepEqual(socket.sentOf("INTERRUPT"), []);
  socket.text(next.requestId, 0, "go on");
  socket.end(next.requestId);
  assert.equal((await next.promise).text, "go on");
  assert.deepEqual(names(), ["started", "functioncall", "functioncall", "completed", "started", "text", "completed"]);
});

test("a result that cannot be sent can be replaced by another", async () => {
  const { service, socket } = makeTalk();
  const sent = service.sendTextMessage("a");
  for (const [seq, id] of ["call_1", "call_2"].entries()) {
    const function_call = { name: "f", parameters: {}, call_id: id };
    socket.say("RESPONSE", { request_id: sent.requestId, text_stream_seq: seq, content: {}, function_call });
  }
  socket.end(sent.requestId);
  const message = await sent.promise;
  assert.throws(() => service.sendFunctionResult(message, "call_1", 1n), TypeError);
  assert.equal(service.sendFunctionResult(message, "call_2", 2), null); // call_1 still has no result
  assert.throws(() => service.sendFunctionResult(message, "call_1", 1n), TypeError);
  assert.equal(service.isReceivingResponse, false);
  const next = service.sendFunctionResult(message, "call_1", 1);
  assert.deepEqual(socket.sentOf("FUNCTION_RESULT"), [
    { call_id: "call_2", result: 2 },
    { request_id: next.requestId, call_id: "call_1", result: 1 },
  ]);
  socket.end(next.requestId);
  assert.equal((await next.promise).state, "complete");
});

test("a message whose update cannot be sent fails, and the next one is sent", async () => {
  const { names, service, socket } = makeTalk();
  const update = { system_prompt: { role_description: 1n } };
  const failed = await service.sendTextMessage("a", { update }).promise;
  assert.deepEqual([failed.state, failed.failure.code], ["failed", "INTERNAL_ERROR"]);
  assert.equal(service.isReceivingResponse, false);
  assert.deepEqual(names(), ["started", "failed"]);
  const sent = service.sendTextMessage("b");
  socket.end(sent.requestId);
  assert.equal((await sent.promise).state, "complete");
  assert.deepEqual(socket.sentOf("INTERRUPT"), []);
});

test("the result of a late call goes to the message that waits for it", async () => {
  const { service, socket } = makeTalk();
  const sent = service.sendTextMessage("a");
  const call = (seq, id) => {
    const function_call = { name: "f", parameters: {}, call_id: id };
    socket.say("RESPONSE", { request_id: sent.requestId, text_stream_seq: seq, content: {}, function_call });
  };
  let message;
  service.on("functioncall", (event) => (message = event.message));
  call(0, "call_1");
  const next = service.sendFunctionResult(message, "call_1", 1);
  call(1, "call_2");
  socket.end(sent.requestId);
  await sent.promise;
  assert.equal(service.sendFunctionResult(message, "call_2", 2), null);
  assert.deepEqual(socket.sentOf("FUNCTION_RESULT").at(-1), { call_id: "call_2", result: 2 });
  assert.deepEqual(socket.sentOf("INTERRUPT"), []);
  assert.equal(service.currentRequestId, next.requestId);
  socket.end(next.requestId);
  assert.equal((await next.promise).state, "complete");
});

test("a result interrupts another answer, but not the answer with its call", async () => {
  const { service, socket } = makeTalk();
  const sent = service.sendTextMessage("a");
  const function_call = { name: "f", parameters: {}, call_id: "call_1" };
  let message;
  service.on("functioncall", (event) => (message = event.message));
  socket.say("RESPONSE", { request_id: sent.requestId, text_stream_seq: 0, content: {}, function_call });
  const next = service.sendFunctionResult(message, "call_1", 1); // before its terminal frame
  assert.deepEqual(socket.sentOf("INTERRUPT"), []);
  socket.end(sent.requestId);
  await sent.promise;
  assert.equal(service.currentRequestId, next.requestId);
  service.sendFunctionResult(message, "call_1", 2);
  assert.deepEqual(socket.sentOf("INTERRUPT").map((one) => one.interrupt_request_id), [next.requestId]);
});
