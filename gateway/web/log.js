/**
 * Lines for whoever debugs in the browser.
 *
 * @typedef {object} Log
 * @property {(line: string) => void} info what a user's action did.
 * @property {(line: string) => void} debug what followed from it.
 */

/** @type {Log} */
export const SILENT = { info: () => undefined, debug: () => undefined };

/**
 * @param {() => boolean} isOn asked before each line, so that it can be switched while it runs.
 * @param {Pick<Console, "log" | "debug">} sink
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
