/**
 * The user's settings. The browser stores them in `localStorage`; the access key is in `sessionStorage`,
 * which ends with the tab.
 */

/** @import { FunctionDefinition, Registration, SessionSettings } from "./client/index.js" */

/**
 * @typedef {object} Settings
 * @property {string} server "" means the gateway that served the page.
 * @property {string} role
 * @property {string} scene
 * @property {string} functions JSON; "" means none.
 * @property {boolean} speech
 * @property {"" | "en" | "zh"} language "" means the browser's.
 * @property {boolean} debug
 */

const SETTINGS = "bargein.settings";
const KEY = "bargein.key";

/** The protocol requires a key, even if the gateway does not check it. */
const NO_KEY = "anonymous";

/**
 * @param {boolean} isLocal Whether this machine serves the page. Then the console log is on.
 * @returns {Settings}
 */
export function defaults(isLocal) {
  return {
    server: "",
    role: "",
    scene: "",
    functions: "",
    speech: false,
    language: "",
    debug: isLocal,
  };
}

/**
 * @param {string} hostname
 * @returns {boolean}
 */
export function isLocalHost(hostname) {
  return hostname === "localhost" || hostname === "[::1]" || /^127\.\d+\.\d+\.\d+$/.test(hostname);
}

/**
 * @param {Settings} base Values for settings that are not stored.
 * @param {Storage} storage
 * @returns {Settings}
 */
export function load(base, storage) {
  /** @type {Record<string, unknown>} */
  let kept = {};
  try {
    kept = JSON.parse(storage.getItem(SETTINGS) ?? "{}") ?? {};
  } catch {
    // foreign data, or no storage: use the defaults
  }
  const settings = { ...base };
  for (const [name, value] of Object.entries(base)) {
    if (typeof kept[name] === typeof value) Object.assign(settings, { [name]: kept[name] });
  }
  try {
    parseFunctions(settings.functions);
  } catch {
    settings.functions = ""; // stored by an older page, or by hand: it would break each registration
  }
  return settings;
}

/**
 * @param {Settings} settings
 * @param {Storage} storage
 */
export function save(settings, storage) {
  try {
    storage.setItem(SETTINGS, JSON.stringify(settings));
  } catch {
    // no storage: the settings last as long as the page
  }
}

/**
 * @param {Storage} storage `sessionStorage`
 * @returns {string}
 */
export function loadKey(storage) {
  try {
    return storage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}

/**
 * @param {string} key
 * @param {Storage} storage `sessionStorage`
 */
export function saveKey(key, storage) {
  try {
    if (key === "") storage.removeItem(KEY);
    else storage.setItem(KEY, key);
  } catch {
    // no storage: the key lasts as long as the page
  }
}

/**
 * @param {string} text
 * @returns {FunctionDefinition[]} Not checked further: the server does that.
 * @throws {SyntaxError} The text is not JSON.
 * @throws {TypeError} The JSON is not a list.
 */
export function parseFunctions(text) {
  if (text.trim() === "") return [];
  const value = JSON.parse(text);
  if (!Array.isArray(value)) throw new TypeError("not a list");
  return value;
}

/**
 * All settings of the session, including empty ones: an update does not change what it leaves out.
 *
 * @param {Settings} settings
 * @returns {SessionSettings}
 */
export function sessionSettings(settings) {
  const role = settings.role.trim();
  const scene = settings.scene.trim();
  return {
    require_tts: settings.speech,
    system_prompt: role === "" ? {} : { role_description: role },
    scene_context: scene === "" ? {} : { scene_description: scene },
    function_calling: parseFunctions(settings.functions),
  };
}

/**
 * @param {Settings} settings
 * @param {string} key
 * @returns {Registration}
 */
export function registration(settings, key) {
  return {
    auth: { type: "API_KEY", api_key: key === "" ? NO_KEY : key },
    platform: "WEB",
    // This page interrupts, whatever the server's default is.
    on_new_request: "interrupt",
    ...sessionSettings(settings),
  };
}

/**
 * @param {Settings} settings
 * @param {string} baseUrl Of the page.
 * @returns {string} The WebSocket address.
 */
export function serverUrl(settings, baseUrl) {
  if (settings.server.trim() !== "") return settings.server.trim();
  const url = new URL("ws/agent/stream", baseUrl);
  url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
  return url.href;
}

/**
 * @param {string} text
 * @returns {boolean} Whether it can be the setting `server`.
 */
export function isServer(text) {
  if (text.trim() === "") return true;
  try {
    return /^wss?:$/.test(new URL(text.trim()).protocol);
  } catch {
    return false;
  }
}

export const EXAMPLE_FUNCTIONS = JSON.stringify(
  [
    {
      name: "open_map",
      description: "Show the way to a hall",
      parameters: {
        type: "object",
        properties: { hall: { type: "integer", description: "number of the hall" } },
        required: ["hall"],
      },
    },
  ],
  null,
  2,
);
