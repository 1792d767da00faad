import assert from "node:assert/strict";
import { test } from "node:test";

import { splitSentences } from "../../gateway/web/announcer.js";
import { consoleLog } from "../../gateway/web/client/log.js";
import {
  defaults,
  isLocalHost,
  isServer,
  load,
  loadKey,
  parseFunctions,
  registration,
  save,
  saveKey,
  serverUrl,
  sessionSettings,
} from "../../gateway/web/settings.js";
import { StreamText } from "../../gateway/web/stream-text.js";
import { Texts, pickLanguage } from "../../gateway/web/texts.js";

// Drawing of text

class FakeElement {
  constructor() {
    this.children = [];
  }
  append(text) {
    this.children.push(text);
  }
  appendChild(element) {
    this.children.push(element);
    return element;
  }
  get textContent() {
    return this.children.map((child) => child.textContent ?? child).join("");
  }
}

function makeText(context) {
  globalThis.document = { createElement: () => new FakeElement() };
  context.after(() => delete globalThis.document);
  const element = new FakeElement();
  const frames = [];
  const paints = [];
  const screen = { time: 0, draws: 0 };
  const text = new StreamText(element, () => (screen.draws += 1), {
    requestFrame: (callback) => frames.push(callback),
    afterPaint: (callback) => paints.push(callback),
    now: () => screen.time,
  });
  const frame = () => frames.splice(0).forEach((callback) => callback());
  const paint = () => paints.splice(0).forEach((callback) => callback());
  return { element, text, screen, frames, frame, paint };
}

test("text is drawn once per frame, and counted in code points as it is drawn", (context) => {
  const { element, text, screen, frames, frame } = makeText(context);
  text.add("停");
  text.add("\u{1f600}");
  assert.equal(frames.length, 1);
  assert.deepEqual([element.textContent, text.drawnChars], ["", 0]);
  frame();
  assert.deepEqual([element.textContent, text.drawnChars, screen.draws], ["停\u{1f600}", 2, 1]);
  assert.equal(frames.length, 0);
  text.add("!");
  frame();
  assert.deepEqual([element.textContent, text.drawnChars], ["停\u{1f600}!", 3]);
});

test("a frozen text draws nothing until it is finished", (context) => {
  const { element, text, frame } = makeText(context);
  text.add("shown");
  frame();
  text.add(", kept");
  text.freeze();
  frame();
  text.add(", late");
  frame();
  assert.equal(element.textContent, "shown");
  assert.equal(text.drawnChars, 5);
  text.finish();
  assert.equal(element.textContent, "shown, kept, late");
  assert.equal(text.drawnChars, 17);
});

test("a long text is drawn piece by piece, and no character is split", (context) => {
  const { element, text, frame } = makeText(context);
  const flood = `${"x".repeat(1_999)}\u{1f600}${"y".repeat(3_000)}`;
  text.add(flood);
  frame();
  assert.equal(element.textContent, flood.slice(0, 2_001));
  assert.equal(text.drawnChars, 2_000);
  frame();
  frame();
  assert.equal(element.textContent, flood);
  assert.equal(text.drawnChars, 5_000);
});

test("a long text is split into blocks at line breaks, and none of it is lost", (context) => {
  const { element, text } = makeText(context);
  const lines = Array.from({ length: 400 }, (_, number) => `line ${number}\n${number % 7 ? "" : "\n"}`);
  const whole = lines.join("");
  for (const line of lines) text.add(line);
  text.finish();
  assert.equal(element.textContent, whole);
  assert.ok(element.children.length >= 4);
  for (const block of element.children.slice(0, -1)) {
    assert.ok(block.textContent.endsWith("\n"));
    assert.ok(block.textContent.length > 1_000 && block.textContent.length < 1_020);
  }
});

test("it knows when the last piece was painted", (context) => {
  const { text, screen, frame, paint } = makeText(context);
  text.add("a");
  frame();
  const seen = [];
  text.whenPainted(() => seen.push(text.lastPaintAt));
  assert.deepEqual(seen, []);
  screen.time = 7;
  paint();
  assert.deepEqual(seen, [7]);
  screen.time = 9;
  text.whenPainted(() => seen.push(text.lastPaintAt));
  assert.deepEqual(seen, [7, 7]);
});

// Texts

test("the language is the first preferred one that has texts", () => {
  assert.equal(pickLanguage(["fr", "zh-TW", "en"]), "zh");
  assert.equal(pickLanguage(["en-GB", "zh"]), "en");
  assert.equal(pickLanguage(["de"]), "en");
  assert.equal(pickLanguage([]), "en");
});

test("an error has a text in both languages, and keeps the server's detail", () => {
  const codes = "AUTH_FAILED SESSION_INVALID STREAM_SEQ_ERROR PAYLOAD_TOO_LARGE SERVER_BUSY MALFORMED_PAYLOAD " +
    "INTERNAL_ERROR REQUEST_TIMEOUT CONNECTION_LOST SERVER_SHUTDOWN SESSION_TIMEOUT NOT_CONNECTED BAD_URL";
  for (const language of ["en", "zh"]) {
    const texts = new Texts(language);
    const words = codes.split(" ").map((code) => texts.sayError(code, ""));
    assert.equal(new Set(words).size, words.length);
    assert.ok(words.every((one) => !/[A-Z]_[A-Z]/.test(one)));
    assert.match(texts.sayError("SERVER_BUSY", "too {many}"), /too \{many\}/);
    assert.match(texts.sayError("FROM_THE_FUTURE", ""), /FROM_THE_FUTURE/);
    assert.match(texts.sayError("constructor", ""), /constructor/);
  }
  assert.equal(new Texts("en").say("noticeNothing"), "no request in progress");
  assert.equal(new Texts("zh").say("noticeNothing"), "没有正在进行的请求");
  assert.equal(new Texts("en").say("statusStoppedIn", { ms: "1.2" }), "stopped in 1.2 ms");
});

test("sentences are announced as a whole", () => {
  assert.deepEqual(splitSentences("One. Two! Thr"), ["One. Two!", " Thr"]);
  assert.deepEqual(splitSentences("停在这里。然后"), ["停在这里。", "然后"]);
  assert.deepEqual(splitSentences("pi is 3.1415 and"), ["", "pi is 3.1415 and"]);
  assert.deepEqual(splitSentences("a line\nmore"), ["a line\n", "more"]);
});

test("console lines follow their switch", () => {
  let isOn = false;
  const lines = [];
  const log = consoleLog(() => isOn, { log: (line) => lines.push(line), debug: (line) => lines.push(`d ${line}`) });
  log.info("no");
  isOn = true;
  log.info("yes");
  log.debug("too");
  assert.deepEqual(lines, ["yes", "d too"]);
  for (const host of ["localhost", "127.0.0.1", "127.1.2.3", "[::1]"]) assert.ok(isLocalHost(host), host);
  for (const host of ["example.com", "127.0.0.1.example.com", "localhost.example"]) assert.ok(!isLocalHost(host), host);
});

// Settings

function makeStorage(items = {}) {
  const map = new Map(Object.entries(items));
  return {
    map,
    getItem: (name) => map.get(name) ?? null,
    setItem: (name, value) => void map.set(name, value),
    removeItem: (name) => void map.delete(name),
  };
}

test("settings are stored, and the key apart from them", () => {
  const local = makeStorage();
  const session = makeStorage();
  const settings = { ...defaults(false), role: "guide", functions: "[]", speech: true };
  save(settings, local);
  saveKey("secret", session);
  assert.deepEqual(load(defaults(true), local), settings);
  assert.equal(loadKey(session), "secret");
  assert.ok(![...local.map.values()].join().includes("secret"));
  saveKey("", session);
  assert.equal(session.map.size, 0);
});

test("stored data of another form is ignored", () => {
  const base = defaults(false);
  for (const kept of ["", "{", "null", "7", '{"role": 7, "speech": "yes", "other": 1}', '{"functions": "{"}']) {
    assert.deepEqual(load(base, makeStorage({ "bargein.settings": kept })), base);
  }
  const broken = { getItem: () => { throw new Error("denied"); }, setItem: () => { throw new Error("denied"); } };
  assert.deepEqual(load(base, broken), base);
  save(base, broken);
  assert.equal(loadKey(broken), "");
});

test("an update names all settings, so that emptied ones are cleared", () => {
  assert.deepEqual(sessionSettings(defaults(false)), {
    require_tts: false,
    system_prompt: {},
    scene_context: {},
    function_calling: [],
  });
  const set = { ...defaults(false), role: " guide ", scene: "hall 3", functions: '[{"name": "f"}]', speech: true };
  const payload = registration(set, "k");
  assert.deepEqual(payload, {
    auth: { type: "API_KEY", api_key: "k" },
    platform: "WEB",
    on_new_request: "interrupt",
    require_tts: true,
    system_prompt: { role_description: "guide" },
    scene_context: { scene_description: "hall 3" },
    function_calling: [{ name: "f" }],
  });
});

test("functions are a JSON list", () => {
  assert.deepEqual(parseFunctions(" \n"), []);
  assert.throws(() => parseFunctions("{"), SyntaxError);
  assert.throws(() => parseFunctions("{}"), TypeError);
});

test("the server is the one that served the page, unless another is set", () => {
  const settings = defaults(false);
  assert.equal(serverUrl(settings, "http://localhost:8000/?a=b#c"), "ws://localhost:8000/ws/agent/stream");
  assert.equal(serverUrl(settings, "https://x.example/chat/"), "wss://x.example/chat/ws/agent/stream");
  assert.equal(serverUrl({ ...settings, server: " ws://y.example/z " }, "http://x/"), "ws://y.example/z");
  for (const good of ["", "ws://a", "wss://a.example/b"]) assert.ok(isServer(good), good);
  for (const bad of ["a", "http://a", "ws://"]) assert.ok(!isServer(bad), bad);
});
