/**
 * Calls listeners by the name of an event.
 *
 * @template {Record<string, any>} Events Type of the value that each event carries, by its name.
 */
export class Emitter {
  constructor() {
    /** @private @type {Map<keyof Events, Set<(event: any) => void>>} */
    this._listeners = new Map();
  }

  /**
   * Call a listener at each event of this name.
   *
   * @template {keyof Events} Name
   * @param {Name} name
   * @param {(event: Events[Name]) => void} listener
   * @returns {() => void} Removes the listener.
   */
  on(name, listener) {
    const listeners = this._listeners.get(name) ?? new Set();
    this._listeners.set(name, listeners.add(listener));
    return () => void listeners.delete(listener);
  }

  /**
   * Call the listeners of an event.
   *
   * @template {keyof Events} Name
   * @param {Name} name
   * @param {Events[Name]} event
   */
  emit(name, event) {
    for (const listener of [...(this._listeners.get(name) ?? [])]) guarded(() => listener(event));
  }
}

/**
 * Call a user's function. If it throws, the error is reported as uncaught, and the caller continues.
 *
 * @param {() => void} callback
 */
export function guarded(callback) {
  try {
    callback();
  } catch (error) {
    queueMicrotask(() => {
      throw error;
    });
  }
}
