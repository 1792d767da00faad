/**
 * Receives the library's log lines, for debugging.
 *
 * @typedef {object} Log
 * @property {(line: string) => void} info Receives what a user's action did.
 * @property {(line: string) => void} debug Receives acks and changes of the connection.
 */

/** Drops every line. @type {Log} */
export const SILENT = { info: () => undefined, debug: () => undefined };

/**
 * Log to the browser's console.
 *
 * @param {() => boolean} isOn Called before each line, so that the log can be switched at any time.
 * @param {Pick<Console, "log" | "debug">} [sink]
 * @returns {Log}
 */
export function consoleLog(isOn, sink = console) {
  return {
    info: (line) => {
      if (isOn()) sink.log(line);
    },
    debug: (line) => {
      if (isOn()) sink.debug(line);
    },
  };
}
