/** Makes ids that the protocol accepts: 1 to 64 printable ASCII characters, new in their session. */

const RANDOM_CHARS = 9;

/**
 * @param {string} prefix `req` or `msg`.
 * @param {number} now Milliseconds since the epoch.
 * @param {() => number} random Returns a number in [0, 1).
 * @returns {string} For example `req_1740000000000_ab12cd34e`.
 */
export function newId(prefix, now, random) {
  let tail = "";
  while (tail.length < RANDOM_CHARS) tail += Math.floor(random() * 36).toString(36);
  return `${prefix}_${Math.floor(now)}_${tail}`;
}
