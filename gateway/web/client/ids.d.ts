/**
 * @param {string} prefix `req` or `msg`.
 * @param {number} now Milliseconds since the epoch.
 * @param {() => number} random Returns a number in [0, 1).
 * @returns {string} For example `req_1740000000000_ab12cd34e`.
 */
export function newId(prefix: string, now: number, random: () => number): string;
