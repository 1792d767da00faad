/** Of all sound, in Hz. */
export const SAMPLE_RATE: 16000;
/** @typedef {{playing: boolean}} AudioEvents `playing`: whether sound is playing or queued. */
/**
 * @typedef {object} AudioServiceOptions
 * @property {(() => AudioContext) | undefined} [createContext] Called at the first sound or `unlock()`.
 */
/** @extends {Emitter<AudioEvents>} */
export class AudioService extends Emitter<AudioEvents> {
    /** @param {AudioServiceOptions} [options] */
    constructor(options?: AudioServiceOptions);
    /** @private */
    private _createContext;
    /** @private @type {AudioContext | null} */
    private _context;
    /** @private @type {GainNode | null} */
    private _output;
    /** The node for all sources of the current speech. @private @type {GainNode | null} */
    private _speech;
    /** @private @type {Set<AudioBufferSourceNode>} */
    private _sources;
    /** End of the last source, in samples of the context's time. @private @type {number | null} */
    private _endsAt;
    /** First byte of a sample whose second byte has not arrived. @private @type {number | null} */
    private _half;
    /** Whether sound is playing or queued. */
    get isPlaying(): boolean;
    /** @returns {AudioContext} Created at first use. */
    get context(): AudioContext;
    /**
     * All sound goes through this node. Use it for a volume control or an analyser.
     *
     * @returns {GainNode}
     */
    get output(): GainNode;
    /**
     * Start the audio context. Browsers allow this only in the handler of a click or a key.
     *
     * @returns {Promise<void>}
     */
    unlock(): Promise<void>;
    /**
     * Play a piece of speech after everything that is queued.
     *
     * @param {string | ArrayBuffer | Uint8Array | Int16Array} pcm Base64, bytes or samples. A piece may
     *   end in the middle of a sample.
     */
    play(pcm: string | ArrayBuffer | Uint8Array | Int16Array): void;
    /** Silence all sound now, and drop what is queued. */
    stopAllPlayback(): void;
    /** @private @returns {{context: AudioContext, output: GainNode}} */
    private _open;
    /** @private @param {AudioBufferSourceNode} source */
    private _ended;
    /**
     * @private
     * @param {Uint8Array} bytes
     * @returns {Float32Array<ArrayBuffer>}
     */
    private _samples;
}
/**
 * `playing`: whether sound is playing or queued.
 */
export type AudioEvents = {
    playing: boolean;
};
export type AudioServiceOptions = {
    /**
     * Called at the first sound or `unlock()`.
     */
    createContext?: (() => AudioContext) | undefined;
};
import { Emitter } from "./events.js";
