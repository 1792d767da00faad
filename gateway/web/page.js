/** The page: connects the client library, the settings and the elements. */

import { Announcer } from "./announcer.js";
import {
  AudioService,
  MessageService,
  RegistrationError,
  RequestError,
  WebSocketClient,
  consoleLog,
} from "./client/index.js";
import {
  EXAMPLE_FUNCTIONS,
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
} from "./settings.js";
import { Texts, pickLanguage } from "./texts.js";
import { AnswerView, makeQuestion, retireCalls } from "./views.js";

/** @import { ConnectionState, Message } from "./client/index.js" */
/** @import { Settings } from "./settings.js" */
/** @import { TextName } from "./texts.js" */

/** A scroll position this close to the end counts as being at the end. */
const AT_BOTTOM_PX = 48;

const NOTICE_MS = 6_000;

/**
 * @template {Element} T
 * @param {string} id
 * @param {new (...args: any[]) => T} type
 * @returns {T}
 */
function byId(id, type) {
  const element = document.getElementById(id);
  if (!(element instanceof type)) throw new Error(`no #${id}`);
  return element;
}

const messages = byId("messages", HTMLElement);
const scroller = byId("scroller", HTMLElement);
const welcome = byId("welcome", HTMLElement);
const composer = byId("composer", HTMLFormElement);
const input = byId("input", HTMLTextAreaElement);
const stopButton = byId("stop", HTMLButtonElement);
const sendButton = byId("send", HTMLButtonElement);
const toBottom = byId("to-bottom", HTMLButtonElement);

let settings = load(defaults(isLocalHost(location.hostname)), localStorage);
let key = loadKey(sessionStorage);
let texts = new Texts(settings.language || pickLanguage(navigator.languages));

const log = consoleLog(() => settings.debug);
const audio = new AudioService();
const client = new WebSocketClient({
  url: serverUrl(settings, document.baseURI),
  registration: () => registration(settings, key),
  log,
});
const service = new MessageService(client, {
  audio,
  log,
  countRendered: (message) => views.get(message)?.stream.drawnChars ?? 0,
});
const announcer = new Announcer(byId("announcer", HTMLElement));

/** @type {WeakMap<Message, AnswerView>} */
const views = new WeakMap();

// For debugging in the console, and for tests.
Object.assign(globalThis, { bargein: { client, service, audio } });

// Words

function applyLanguage() {
  document.documentElement.lang = texts.language === "zh" ? "zh-CN" : "en";
  for (const element of document.querySelectorAll("[data-text], [data-label], [data-hint]")) {
    if (!(element instanceof HTMLElement)) continue;
    const { text, label, hint } = element.dataset;
    if (text) element.textContent = texts.say(/** @type {TextName} */ (text));
    if (label) element.setAttribute("aria-label", texts.say(/** @type {TextName} */ (label)));
    if (hint) element.setAttribute("placeholder", texts.say(/** @type {TextName} */ (hint)));
  }
  document.title = texts.say("title");
}

const notice = byId("notice", HTMLElement);
const noticeText = byId("notice-text", HTMLElement);
/** @type {ReturnType<typeof setTimeout> | undefined} */
let noticeTimer;

/**
 * Show a notice.
 *
 * @param {string} words
 * @param {"info" | "error"} [kind] An info closes by itself; an error stays until it is closed or
 *   replaced.
 */
function notify(words, kind = "info") {
  clearTimeout(noticeTimer);
  notice.dataset.kind = kind;
  notice.hidden = false;
  noticeText.textContent = words;
  announcer.say(words);
  if (kind === "info") noticeTimer = setTimeout(closeNotice, NOTICE_MS);
}

function closeNotice() {
  clearTimeout(noticeTimer);
  notice.hidden = true;
  noticeText.textContent = "";
}

// The scroll position follows new text while the user is at the end.

let isFollowing = true;
let lastTop = 0;

function follow() {
  if (isFollowing) scroller.scrollTop = scroller.scrollHeight;
}

function updateFollowing() {
  const { scrollTop, scrollHeight, clientHeight } = scroller;
  if (scrollHeight - scrollTop - clientHeight <= AT_BOTTOM_PX) isFollowing = true;
  // Only scrolling up is the user leaving the end: new text moves the end away by itself.
  else if (scrollTop < lastTop) isFollowing = false;
  lastTop = scrollTop;
  toBottom.hidden = isFollowing;
}

function goToBottom() {
  isFollowing = true;
  toBottom.hidden = true;
  follow();
}

scroller.addEventListener("scroll", updateFollowing, { passive: true });
new ResizeObserver(() => {
  updateFollowing(); // everything may fit now
  follow();
}).observe(scroller);
toBottom.addEventListener("click", () => {
  goToBottom();
  input.focus();
});

// Asking and stopping

/** When the user last clicked or pressed a key, on the clock of `performance.now()`. */
let actedAt = 0;
for (const type of ["click", "keydown"]) {
  globalThis.addEventListener(
    type,
    (event) => {
      actedAt = event.timeStamp;
    },
    { capture: true },
  );
}

/**
 * Send a question.
 *
 * @param {string} text
 * @returns {boolean} Whether it was sent.
 */
function ask(text) {
  if (!client.isReady) {
    client.retryNow();
    notify(texts.say("noticeNotReady"));
    return false;
  }
  if (settings.speech) void audio.unlock().catch(() => undefined);
  closeNotice();
  welcome.hidden = true;
  announcer.clear();
  messages.append(makeQuestion(text, texts));
  questions.set(service.sendTextMessage(text).messageId, text);
  goToBottom();
  return true;
}

/** The question of each answer, by `messageId`. @type {Map<string, string>} */
const questions = new Map();

function submit() {
  const text = input.value.trim();
  if (text === "" || !ask(text)) return;
  input.value = "";
  fitInput();
}

function stop() {
  const wasPlaying = audio.isPlaying;
  const isNothing = service.interruptCurrentRequest("USER_STOP") === null && !wasPlaying;
  if (isNothing) notify(texts.say("noticeNothing"));
}

function showStop() {
  const isNeeded = service.isReceivingResponse || audio.isPlaying;
  if (!isNeeded && document.activeElement === stopButton) input.focus();
  stopButton.hidden = !isNeeded;
}

function fitInput() {
  if (CSS.supports("field-sizing", "content")) return;
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

composer.addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
input.addEventListener("input", fitInput);
input.addEventListener("keydown", (event) => {
  // While an input method composes, Enter accepts its proposal. (Safari reports key code 229.)
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  if (!event.repeat) submit();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing || event.keyCode === 229) return;
  if (event.repeat || dialog.open) return;
  event.preventDefault();
  stop();
});
stopButton.addEventListener("click", stop);
for (const button of [stopButton, sendButton]) {
  // The input keeps the focus, so that the keyboard of a phone stays open.
  button.addEventListener("pointerdown", (event) => event.preventDefault());
  button.addEventListener("mousedown", (event) => event.preventDefault());
}
for (const idea of document.querySelectorAll(".idea")) {
  idea.addEventListener("click", () => {
    // The button disappears, so the focus moves to the input; not on a touch screen, where that would
    // open the keyboard.
    if (ask(idea.textContent ?? "") && !matchMedia("(pointer: coarse)").matches) input.focus();
  });
}
byId("close-notice", HTMLButtonElement).addEventListener("click", () => {
  closeNotice();
  input.focus();
});

// Events of the library

service.on("started", ({ message }) => {
  const view = new AnswerView(message, texts, follow);
  views.set(message, view);
  messages.append(view.element);
  follow();
});

service.on("text", ({ message, text }) => {
  views.get(message)?.stream.add(text);
  if (message.state === "streaming") announcer.add(text);
});

service.on("functioncall", ({ message, call }) => {
  const view = views.get(message);
  view?.addCall(call, (result) => {
    try {
      service.sendFunctionResult(message, call.call_id ?? "", result);
      if (message.continuation === null) notify(texts.say("callWaits"));
      else closeNotice();
      input.focus();
      return true;
    } catch (error) {
      if (!(error instanceof RequestError)) throw error;
      notify(texts.sayError(error.code, ""), "error");
      return false;
    }
  });
  announcer.say(`${texts.say("call")}: ${call.name}`);
  follow();
});

service.on("interrupted", ({ message }) => {
  views.get(message)?.interrupt(actedAt);
  announcer.clear();
  if (message.interruptReason === "USER_STOP") announcer.say(texts.say("announceStopped"));
  follow();
});

service.on("acknowledged", ({ message, ack }) => views.get(message)?.acknowledge(ack, follow));

service.on("completed", ({ message }) => {
  views.get(message)?.complete();
  finishReading();
  follow();
});

service.on("failed", ({ message }) => {
  const { code, detail } = message.failure ?? { code: "", detail: "" };
  const asked = questions.get(message.messageId);
  const again = () => {
    input.focus();
    return ask(asked ?? "");
  };
  views.get(message)?.fail(asked ? again : null); // an answer to a function's result has no question
  finishReading();
  announcer.say(texts.sayError(code, detail));
  follow();
});

/** Read the last sentence; not while another answer streams, as its text would be mixed in. */
function finishReading() {
  if (!service.isReceivingResponse) announcer.finish();
}

service.on("state", showStop);
audio.on("playing", showStop);

let wasReady = false;

client.on("state", (state) => {
  showConnection(state);
  if (state.name === "ready") {
    if (state.isAgain && messages.childElementCount > 0) {
      retireCalls(messages, texts);
      notify(texts.say("noticeBack"));
    } else if (notice.dataset.kind === "error") {
      closeNotice(); // the error was about the connection
    }
  } else if (wasReady && state.name === "waiting") {
    /** @type {Record<ConnectionState["cause"], TextName>} */
    const words = {
      none: "noticeLost",
      lost: "noticeLost",
      restarting: "noticeRestarting",
      expired: "noticeExpired",
    };
    notify(texts.say(words[state.cause]), "error");
  } else if (state.name === "refused") {
    const { code, detail } = state.error ?? { code: "INTERNAL_ERROR", detail: "" };
    // For a wrong key the page's own text is enough; the server's detail is in English only.
    const isKey = code === "AUTH_FAILED";
    const words = isKey ? "" : `${texts.say("noticeRefused")} `;
    notify(words + texts.sayError(code, isKey ? "" : detail), "error");
  }
  wasReady = state.name === "ready";
});

/** @param {ConnectionState} state */
function showConnection(state) {
  /** @type {Record<ConnectionState["name"], TextName>} */
  const words = {
    offline: "connectionOffline",
    connecting: "connectionConnecting",
    ready: "connectionReady",
    waiting: "connectionWaiting",
    refused: "connectionRefused",
  };
  byId("connection", HTMLElement).dataset.state = state.name;
  const seconds = Math.max(1, Math.round(state.retryInMs / 1000));
  byId("connection-text", HTMLElement).textContent = texts.say(words[state.name], { seconds });
}

client.on("warning", ({ remainingSeconds }) => {
  notify(texts.say("noticeExpireSoon", { seconds: remainingSeconds }), "error");
});
client.on("error", ({ code, detail }) => notify(texts.sayError(code, detail), "error"));

globalThis.addEventListener("online", () => client.retryNow());
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) client.retryNow();
});

// Settings

const dialog = byId("settings", HTMLDialogElement);
const settingsError = byId("settings-error", HTMLElement);
const saveButton = byId("save-settings", HTMLButtonElement);
const fields = {
  role: byId("setting-role", HTMLTextAreaElement),
  scene: byId("setting-scene", HTMLTextAreaElement),
  functions: byId("setting-functions", HTMLTextAreaElement),
  speech: byId("setting-speech", HTMLInputElement),
  language: byId("setting-language", HTMLSelectElement),
  server: byId("setting-server", HTMLInputElement),
  key: byId("setting-key", HTMLInputElement),
  debug: byId("setting-debug", HTMLInputElement),
};

function openSettings() {
  fields.role.value = settings.role;
  fields.scene.value = settings.scene;
  fields.functions.value = settings.functions;
  fields.speech.checked = settings.speech;
  fields.language.value = settings.language;
  fields.server.value = settings.server;
  fields.server.placeholder = serverUrl({ ...settings, server: "" }, document.baseURI);
  fields.key.value = key;
  fields.debug.checked = settings.debug;
  showFault("");
  dialog.showModal();
  byId("settings-fields", HTMLElement).scrollTop = 0;
}

/** @param {string} words The error to show; "" hides it. */
function showFault(words) {
  settingsError.textContent = words;
  settingsError.hidden = words === "";
}

/** @returns {Settings} */
function readSettings() {
  return {
    role: fields.role.value,
    scene: fields.scene.value,
    functions: fields.functions.value,
    speech: fields.speech.checked,
    language: /** @type {Settings["language"]} */ (fields.language.value),
    server: fields.server.value.trim(),
    debug: fields.debug.checked,
  };
}

/**
 * @param {Settings} wanted
 * @returns {string} What is wrong with them, as far as the page can check; "" if nothing is.
 */
function faultOf(wanted) {
  if (!isServer(wanted.server)) return texts.say("badServer");
  try {
    parseFunctions(wanted.functions);
  } catch (error) {
    if (error instanceof TypeError) return texts.say("functionsNoList");
    const detail = error instanceof Error ? error.message : "";
    return texts.say("notJson", { detail });
  }
  return "";
}

/**
 * Apply and save settings. A registered session is updated by a REQUEST without text: the conversation
 * continues, an answer in progress is not interrupted, and an error is shown while the dialog is still
 * open. Only another server or another key needs a new session.
 *
 * @param {Settings} wanted
 * @param {string} wantedKey
 * @returns {Promise<TextName>} The notice to show.
 * @throws {RequestError | RegistrationError} The server rejected the settings. They are not saved, and
 *   an existing session continues unchanged.
 */
async function apply(wanted, wantedKey) {
  const url = serverUrl(wanted, document.baseURI);
  const update = sessionSettings(wanted);
  const isSame = JSON.stringify(update) === JSON.stringify(sessionSettings(settings));
  // A registration in progress may have sent the old settings.
  const mayBeStale = client.state.name === "connecting" && !isSame;
  const needsNewSession = url !== client.url || wantedKey !== key || mayBeStale;
  if (!needsNewSession && client.isReady && !isSame) {
    await client.sendTextRequest("", { update }).promise;
  }
  const wasRefused = client.state.name === "refused";
  settings = wanted;
  key = wantedKey;
  save(settings, localStorage);
  saveKey(key, sessionStorage);
  if (needsNewSession) {
    client.close(url);
    client.connect().catch(() => undefined); // the connection's state shows a failure
    return "noticeSavedOffline";
  }
  if (wasRefused) await connectOnce();
  return client.isReady ? "noticeSaved" : "noticeSavedOffline";
}

/**
 * Connect, and wait for one attempt only: the client tries an unreachable server again and again.
 *
 * @throws {RegistrationError} The server rejected the registration.
 */
async function connectOnce() {
  /** @type {() => void} */
  let forget = () => undefined;
  const missed = new Promise((resolve) => {
    forget = client.on("state", (state) => state.name === "waiting" && resolve(undefined));
  });
  await Promise.race([client.connect(), missed]).finally(forget);
}

byId("open-settings", HTMLButtonElement).addEventListener("click", openSettings);
byId("cancel-settings", HTMLButtonElement).addEventListener("click", () => dialog.close());
byId("functions-example", HTMLButtonElement).addEventListener("click", () => {
  fields.functions.value = EXAMPLE_FUNCTIONS;
  fields.functions.focus();
});
dialog.addEventListener("close", () => input.focus());
byId("settings-form", HTMLFormElement).addEventListener("submit", async (event) => {
  event.preventDefault();
  const wanted = readSettings();
  const fault = faultOf(wanted);
  showFault(fault);
  if (fault !== "") return;
  saveButton.disabled = true;
  try {
    const words = await apply(wanted, fields.key.value.trim());
    texts = new Texts(settings.language || pickLanguage(navigator.languages));
    applyLanguage();
    showConnection(client.state);
    dialog.close();
    notify(texts.say(words));
    if (settings.speech) void audio.unlock().catch(() => undefined);
  } catch (error) {
    if (!(error instanceof RequestError || error instanceof RegistrationError)) throw error;
    showFault(texts.sayError(error.code, error.detail));
  } finally {
    saveButton.disabled = false;
  }
});

// Start

applyLanguage();
showConnection(client.state);
client.connect().catch(() => undefined); // the connection's state shows a failure
