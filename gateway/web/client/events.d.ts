/**
 * Call a user's function. If it throws, the error is reported as uncaught, and the caller continues.
 *
 * @param {() => void} callback
 */
export function guarded(callback: () => void): void;
/**
 * Calls listeners by the name of an event.
 *
 * @template {Record<string, any>} Events Type of the value that each event carries, by its name.
 */
export class Emitter<Events extends Record<string, any>> {
    /** @private @type {Map<keyof Events, Set<(event: any) => void>>} */
    private _listeners;
    /**
     * Call a listener at each event of this name.
     *
     * @template {keyof Events} Name
     * @param {Name} name
     * @param {(event: Events[Name]) => void} listener
     * @returns {() => void} Removes the listener.
     */
    on<Name extends keyof Events>(name: Name, listener: (event: Events[Name]) => void): () => void;
    /**
     * Call the listeners of an event.
     *
     * @template {keyof Events} Name
     * @param {Name} name
     * @param {Events[Name]} event
     */
    emit<Name extends keyof Events>(name: Name, event: Events[Name]): void;
}
