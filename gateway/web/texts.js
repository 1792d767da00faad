/** The texts of the page, in English and Chinese. `{name}` is replaced by a value. */

const EN = {
  title: "Guide",
  welcome: "What would you like to know?",
  welcomeMore: "Ask anything. Interrupt whenever you like: write, or press Stop.",
  idea1: "Tell me a very long story",
  idea2: "Who kept the light here?",
  conversation: "Conversation",
  you: "You: ",
  guide: "Guide: ",
  input: "Your message",
  inputHint: "Your message",
  send: "Send",
  stop: "Stop",
  keys: "Enter sends · Shift+Enter starts a new line · Esc stops",
  toBottom: "Scroll to the newest message",
  close: "Close",
  retry: "Ask again",

  connectionOffline: "Not connected",
  connectionConnecting: "Connecting…",
  connectionReady: "Connected",
  connectionWaiting: "Connecting again in {seconds}\u00a0s",
  connectionRefused: "Refused",

  noticeNothing: "no request in progress",
  noticeNotReady: "Not connected yet. Your message is kept; please send it again in a moment.",
  noticeLost: "The connection is lost. Connecting again.",
  noticeRestarting: "The server is restarting. Connecting again.",
  noticeExpired: "The session has expired. Starting a new one.",
  noticeBack: "Connected again. This is a new conversation: the assistant does not know the earlier one.",
  noticeRefused: "The server refused the registration. Please check the settings.",
  noticeExpireSoon: "The session ends in {seconds}\u00a0s unless you continue.",
  noticeSaved: "Settings are in effect.",
  noticeSavedOffline: "Settings are saved. They take effect once connected.",

  statusStopped: "stopped",
  statusStoppedIn: "stopped in {ms} ms",
  statusLastPaint: "last character {ms} ms after you stopped it",
  statusNoPaint: "no text was drawn after you stopped it",
  statusStillOpen: "Stopped. The provider's stream was still open after a second.",
  statusNoAck: "Stopped. The server has not confirmed it.",
  statusLength: "The answer was cut off at the maximum length.",
  statusFilter: "The provider's content filter cut the answer off.",
  statusEmpty: "The answer was empty.",
  announceStopped: "Stopped",

  codeAUTH_FAILED: "The server needs a valid access key. Please check it in Settings, Connection.",
  codeSESSION_INVALID: "The session is no longer valid. Starting a new one.",
  codeSTREAM_SEQ_ERROR: "The voice data arrived in the wrong order. Please try again.",
  codePAYLOAD_TOO_LARGE: "That was too long. Please make it shorter.",
  codeSERVER_BUSY: "The server is busy. Please try again in a moment.",
  codeMALFORMED_PAYLOAD: "The server did not understand that.",
  codeINTERNAL_ERROR: "Something went wrong with this answer. Please try again.",
  codeREQUEST_TIMEOUT: "The answer took too long. Please try again.",
  codeBAD_URL: "That is not a valid server address.",
  codeCONNECTION_LOST: "Broken off: the connection was lost.",
  codeSERVER_SHUTDOWN: "Broken off: the server is restarting.",
  codeSESSION_TIMEOUT: "Broken off: the session has expired.",
  codeNOT_CONNECTED: "Not connected yet.",
  codeOther: "This answer was broken off ({code}).",

  call: "Function call",
  callResult: "Result, as JSON",
  callSend: "Send result",
  callSent: "Result sent",
  callWaits: "Result sent. Waiting for the other results.",
  callGone: "The session of this call has ended, so no result can be sent.",
  notJson: "This is not valid JSON: {detail}",

  settings: "Settings",
  role: "Role",
  roleHint: "Who the assistant should be",
  scene: "Scene",
  sceneHint: "Where you are and what is around you",
  functions: "Functions, as JSON",
  functionsHelp:
    "A list of functions. Describe the parameters of each by a JSON Schema, or by a list with name, type, description and required.",
  functionsExample: "Insert an example",
  functionsNoList: "The functions must be a list: [ … ]",
  speech: "Speech",
  language: "Language",
  languageOfBrowser: "Same as the browser",
  connectionSettings: "Connection",
  server: "Server",
  key: "Access key",
  keyHelp: "Forgotten when this tab is closed.",
  debug: "Log to the browser's console",
  badServer: "The server's address must start with ws:// or wss://",
  cancel: "Cancel",
  save: "Save",
};

/** @typedef {keyof typeof EN} TextName */

/** @type {Record<TextName, string>} */
const ZH = {
  title: "导览",
  welcome: "想了解些什么？",
  welcomeMore: "尽管问。随时可以打断：直接输入，或按“停止”。",
  idea1: "给我讲一个很长很长的故事",
  idea2: "这里从前是谁守灯？",
  conversation: "对话",
  you: "您：",
  guide: "导览：",
  input: "您的消息",
  inputHint: "输入消息",
  send: "发送",
  stop: "停止",
  keys: "Enter 发送 · Shift+Enter 换行 · Esc 停止",
  toBottom: "回到最新",
  close: "关闭",
  retry: "再问一次",

  connectionOffline: "未连接",
  connectionConnecting: "正在连接…",
  connectionReady: "已连接",
  connectionWaiting: "{seconds} 秒后重新连接",
  connectionRefused: "被拒绝",

  noticeNothing: "没有正在进行的请求",
  noticeNotReady: "尚未连接。您的消息已保留，请稍后再发送。",
  noticeLost: "连接已断开，正在重新连接。",
  noticeRestarting: "服务器正在重启，正在重新连接。",
  noticeExpired: "会话已过期，正在开始新的会话。",
  noticeBack: "已重新连接。这是新的对话：之前说过的内容已不再记得。",
  noticeRefused: "服务器没有接受注册，请检查设置。",
  noticeExpireSoon: "如果不继续，会话将在 {seconds} 秒后结束。",
  noticeSaved: "设置已生效。",
  noticeSavedOffline: "设置已保存，连接后生效。",

  statusStopped: "已停止",
  statusStoppedIn: "{ms} 毫秒内停止",
  statusLastPaint: "最后一个字在停止后 {ms} 毫秒",
  statusNoPaint: "此后没有再显示任何文字",
  statusStillOpen: "已停止。一秒后模型服务的数据流仍未关闭。",
  statusNoAck: "已停止。服务器没有确认。",
  statusLength: "到此为止：已达到回答长度上限。",
  statusFilter: "到此为止：被模型服务的内容过滤器截断。",
  statusEmpty: "没有得到回答：内容为空。",
  announceStopped: "已停止",

  codeAUTH_FAILED: "服务器需要有效的访问密钥，请检查“设置”中的“连接”。",
  codeSESSION_INVALID: "会话已失效，将开始新的会话。",
  codeSTREAM_SEQ_ERROR: "语音顺序有误，请再试一次。",
  codePAYLOAD_TOO_LARGE: "内容太长，请缩短一些。",
  codeSERVER_BUSY: "服务器繁忙，请稍后再试。",
  codeMALFORMED_PAYLOAD: "服务器没有理解这条内容。",
  codeINTERNAL_ERROR: "这次回答出了问题，请再试一次。",
  codeREQUEST_TIMEOUT: "回答超时，请再试一次。",
  codeBAD_URL: "这不是有效的服务器地址。",
  codeCONNECTION_LOST: "回答中断：连接已断开。",
  codeSERVER_SHUTDOWN: "回答中断：服务器正在重启。",
  codeSESSION_TIMEOUT: "回答中断：会话已过期。",
  codeNOT_CONNECTED: "尚未连接。",
  codeOther: "回答中断（{code}）。",

  call: "需要调用的函数",
  callResult: "结果（JSON）",
  callSend: "发送结果",
  callSent: "已发送的结果",
  callWaits: "结果已发送，等待其余结果。",
  callGone: "所属会话已结束，无法再发送结果。",
  notJson: "不是有效的 JSON：{detail}",

  settings: "设置",
  role: "角色",
  roleHint: "助手扮演谁",
  scene: "场景",
  sceneHint: "您在哪里，面前是什么",
  functions: "函数（JSON）",
  functionsHelp: "一个列表。每个函数的参数是 JSON Schema，或由 name、type、description、required 组成的列表。",
  functionsExample: "填入示例",
  functionsNoList: "函数必须是一个列表：[ … ]",
  speech: "语音",
  language: "语言",
  languageOfBrowser: "跟随浏览器",
  connectionSettings: "连接",
  server: "服务器",
  key: "访问密钥",
  keyHelp: "关闭此标签页后即忘记。",
  debug: "在浏览器控制台输出日志",
  badServer: "服务器地址以 ws:// 或 wss:// 开头",
  cancel: "取消",
  save: "保存",
};

/** @typedef {"en" | "zh"} Language */

/**
 * @param {readonly string[]} preferred For example `navigator.languages`.
 * @returns {Language} The first of them for which the page has texts; else English.
 */
export function pickLanguage(preferred) {
  for (const tag of preferred) {
    const language = tag.toLowerCase().split("-")[0];
    if (language === "en" || language === "zh") return language;
  }
  return "en";
}

export class Texts {
  /** @param {Language} language */
  constructor(language) {
    this.language = language;
    this._texts = language === "zh" ? ZH : EN;
  }

  /**
   * @param {TextName} name
   * @param {Record<string, string | number>} [values]
   * @returns {string}
   */
  say(name, values = {}) {
    return this._texts[name].replace(/\{(\w+)\}/g, (_, key) => String(values[key] ?? ""));
  }

  /**
   * @param {string} code Of an error.
   * @param {string} detail The server's own words; they are not translated.
   * @returns {string}
   */
  sayError(code, detail) {
    const name = /** @type {TextName} */ (`code${code}`);
    const words = Object.hasOwn(this._texts, name) ? this.say(name) : this.say("codeOther", { code });
    if (detail === "") return words;
    return this.language === "zh" ? `${words}（${detail}）` : `${words} (${detail})`;
  }
}
