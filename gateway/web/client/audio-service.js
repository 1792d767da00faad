/**
 * Plays speech while it arrives: 16 kHz 16-bit little-endian mono PCM, through Web Audio.
 *
 * Each piece is a source that starts on the sample after the previous one. All sources of one speech
 * go through one gain node. Disconnecting that node silences them: Web Audio applies it with the next
 * 128 samples, however much was queued.
 */

import { Emitter } from "./events.js";

/** Of all sound, in Hz. */
export const SAMPLE_RATE = 16_000;

/** Delay of the first piece, and of the first after a gap, so that the next one arrives in time. */
const LEAD_SECONDS = 0.02;

/** @typedef {{playing: boolean}} AudioEvents `playing`: whether sound is playing or queued. */

/**
 * @typedef {object} AudioServiceOptions
 * @property {(() => AudioContext) | undefined} [createContext] Called at the first sound or `unlock()`.
 */

/** @extends {Emitter<AudioEvents>} */
export class AudioService extends Emitter {
  /** @param {AudioServiceOptions} [options] */
  constructor(options = {}) {
    super();
    // With the sound's own rate, pieces are not resampled one by one, which would click at their edges.
    /** @private */
    this._createContext =
      options.createContext ?? (() => new AudioContext({ sampleRate: SAMPLE_RATE }));
    /** @private @type {AudioContext | null} */
    this._context = null;
    /** @private @type {GainNode | null} */
    this._output = null;
    /** The node for all sources of the current speech. @private @type {GainNode | null} */
    this._speech = null;
    /** @private @type {Set<AudioBufferSourceNode>} */
    this._sources = new Set();
    /** End of the last source, in samples of the context's time. @private @type {number | null} */
    this._endsAt = null;
    /** First byte of a sample whose second byte has not arrived. @private @type {number | null} */
    this._half = null;
  }

  /** Whether sound is playing or queued. */
  get isPlaying() {
    return this._sources.size > 0;
  }

  /** @returns {AudioContext} Created at first use. */
  get context() {
    return this._open().context;
  }

  /**
   * All sound goes through this node. Use it for a volume control or an analyser.
   *
   * @returns {GainNode}
   */
  get output() {
    return this._open().output;
  }

  /**
   * Start the audio context. Browsers allow this only in the handler of a click or a key.
   *
   * @returns {Promise<void>}
   */
  unlock() {
    return this.context.resume();
  }

  /**
   * Play a piece of speech after everything that is queued.
   *
   * @param {string | ArrayBuffer | Uint8Array | Int16Array} pcm Base64, bytes or samples. A piece may
   *   end in the middle of a sample.
   */
  play(pcm) {
    const samples = this._samples(bytesOf(pcm));
    if (samples.length === 0) return;
    const { context, output } = this._open();
    if (context.state === "suspended") void context.resume();
    if (!this._speech) {
      this._speech = context.createGain();
      this._speech.connect(output);
    }
    const buffer = context.createBuffer(1, samples.length, SAMPLE_RATE);
    buffer.copyToChannel(samples, 0);
    const source = context.createBufferSource();
    source.buffer = buffer;
    source.connect(this._speech);
    source.onended = () => this._ended(source);
    // In whole samples: fractions would add up, and would be interpolated.
    const soonest = Math.ceil(context.currentTime * SAMPLE_RATE);
    const endsAt = this._endsAt ?? -1;
    const startsAt = endsAt >= soonest ? endsAt : soonest + LEAD_SECONDS * SAMPLE_RATE;
    source.start(startsAt / SAMPLE_RATE);
    this._endsAt = startsAt + samples.length;
    this._sources.add(source);
    if (this._sources.size === 1) this.emit("playing", true);
  }

  /** Silence all sound now, and drop what is queued. */
  stopAllPlayback() {
    this._speech?.disconnect();
    this._speech = null;
    this._endsAt = null;
    this._half = null;
    const sources = [...this._sources];
    this._sources.clear();
    for (const source of sources) {
      source.stop();
      source.disconnect();
    }
    if (sources.length > 0) this.emit("playing", false);
  }

  /** @private @returns {{context: AudioContext, output: GainNode}} */
  _open() {
    if (!this._context || !this._output) {
      this._context = this._createContext();
      this._output = this._context.createGain();
      this._output.connect(this._context.destination);
    }
    return { context: this._context, output: this._output };
  }

  /** @private @param {AudioBufferSourceNode} source */
  _ended(source) {
    source.disconnect();
    if (this._sources.delete(source) && this._sources.size === 0) this.emit("playing", false);
  }

  /**
   * @private
   * @param {Uint8Array} bytes
   * @returns {Float32Array<ArrayBuffer>}
   */
  _samples(bytes) {
    let all = bytes;
    if (this._half !== null) {
      all = new Uint8Array(bytes.length + 1);
      all[0] = this._half;
      all.set(bytes, 1);
    }
    const count = all.length >> 1;
    this._half = all.length % 2 === 1 ? (all.at(-1) ?? null) : null;
    const view = new DataView(all.buffer, all.byteOffset, all.byteLength);
    const samples = new Float32Array(count);
    for (let index = 0; index < count; index += 1) {
      samples[index] = view.getInt16(2 * index, true) / 32768;
    }
    return samples;
  }
}

/**
 * @param {string | ArrayBuffer | Uint8Array | Int16Array} pcm
 * @returns {Uint8Array}
 */
function bytesOf(pcm) {
  if (typeof pcm === "string") return Uint8Array.from(atob(pcm), (char) => char.charCodeAt(0));
  if (pcm instanceof ArrayBuffer) return new Uint8Array(pcm);
  return new Uint8Array(pcm.buffer, pcm.byteOffset, pcm.byteLength);
}
