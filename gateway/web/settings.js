/**
 * What a user has set. It is remembered in the browser, but for the key: that one lives in the session
 * storage, which ends with the tab.
 */

/** @import { FunctionDefinition, Registration, SessionSettings } from "./client/index.js" */

/**
 * @typedef {object} Settings
 * @property {string} server "" is the gateway that served the page.
 * @property {string} role
 * @property {string} scene
 * @property {string} functions JSON; "" is none.
 * @property {boolean} speech
 * @property {"" | "en" | "zh"} language "" is the browser's.
 * @property {boolean} debug
 */

const SETTINGS = "bargein.settings";
const KEY = "bargein.key";

/** The protocol wants one, also of gateways that let anybody in. */
const NO_KEY = "anonymous";

/**
 * @param {boolean} isLocal whether the page comes from this very machine: then somebody develops.
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
 * @param {Settings} base what is not remembered.
 * @param {Storage} storage
 * @returns {Settings}
 */
export function load(base, storage) {
  /** @type {Record<string, unknown>} */
  let kept = {};
  try {
    kept = JSON.parse(storage.getItem(SETTINGS) ?? "{}") ?? {};
  } catch {
    // not ours, or no storage: as if nothing had been set
  }
  const settings = { ...base };
  for (const [name, value] of Object.entries(base)) {
    if (typeof kept[name] === typeof value) Object.assign(settings, { [name]: kept[name] });
  }
  try {
    parseFunctions(settings.functions);
  } catch {
    settings.functions = ""; // by an older page, or by hand: it must not keep this one from registering
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
    // no storage: they hold as long as the page
  }
}

/**
 * @param {Storage} storage of the session.
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
 * @param {Storage} storage of the session.
 */
export function saveKey(key, storage) {
  try {
    if (key === "") storage.removeItem(KEY);
    else storage.setItem(KEY, key);
  } catch {
    // as above
  }
}

/**
 * @param {string} text
 * @returns {FunctionDefinition[]} whether they are good functions is for the server to say.
 * @throws {SyntaxError} it is no JSON.
 * @throws {TypeError} it is no list.
 */
export function parseFunctions(text) {
  if (text.trim() === "") return [];
  const value = JSON.parse(text);
  if (!Array.isArray(value)) throw new TypeError("no list");
  return value;
}

/**
 * All of the session's settings, also those that are empty: an update leaves what it does not name.
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
    // Whatever the server does by default: this page interrupts.
    on_new_request: "interrupt",
    ...sessionSettings(settings),
  };
}

/**
 * @param {Settings} settings
 * @param {string} baseUrl of the page.
 * @returns {string}
 */
export function serverUrl(settings, baseUrl) {
  if (settings.server.trim() !== "") return settings.server.trim();
  const url = new URL("ws/agent/stream", baseUrl);
  url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
  return url.href;
}

/**
 * @param {string} text
 * @returns {boolean}
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
