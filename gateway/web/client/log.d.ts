/**
 * Log to the browser's console.
 *
 * @param {() => boolean} isOn Called before each line, so that the log can be switched at any time.
 * @param {Pick<Console, "log" | "debug">} [sink]
 * @returns {Log}
 */
export function consoleLog(isOn: () => boolean, sink?: Pick<Console, "log" | "debug">): Log;
/**
 * Receives the library's log lines, for debugging.
 *
 * @typedef {object} Log
 * @property {(line: string) => void} info Receives what a user's action did.
 * @property {(line: string) => void} debug Receives acks and changes of the connection.
 */
/** Drops every line. @type {Log} */
export const SILENT: Log;
/**
 * Receives the library's log lines, for debugging.
 */
export type Log = {
    /**
     * Receives what a user's action did.
     */
    info: (line: string) => void;
    /**
     * Receives acks and changes of the connection.
     */
    debug: (line: string) => void;
};
