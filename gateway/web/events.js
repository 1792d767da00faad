/**
 * Listeners by the name of an event, with the type of what each event carries.
 *
 * @template {Record<string, any>} Events
 */
export class Emitter {
  constructor() {
    /** @type {Map<keyof Events, Set<(event: any) => void>>} */
    this._listeners = new Map();
  }

  /**
   * @template {keyof Events} Name
   * @param {Name} name
   * @param {(event: Events[Name]) => void} listener
   * @returns {() => void} takes the listener away again.
   */
  on(name, listener) {
    const listeners = this._listeners.get(name) ?? new Set();
    this._listeners.set(name, listeners.add(listener));
    return () => void listeners.delete(listener);
  }

  /**
   * @template {keyof Events} Name
   * @param {Name} name
   * @param {Events[Name]} event
   */
  emit(name, event) {
    for (const listener of [...(this._listeners.get(name) ?? [])]) guarded(() => listener(event));
  }
}

/**
 * Call what is not ours: its fault is reported as an uncaught one, and does not stop the frames.
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
