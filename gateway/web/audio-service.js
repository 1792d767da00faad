/**
 * Plays speech as it comes: 16 kHz 16-bit little-endian mono PCM, through Web Audio.
 *
 * Each piece is a source that starts on the sample after the one before. All sources of one speech go
 * through one gain node, and to silence them is to cut that node off: Web Audio takes that up with the
 * next 128 samples, whatever was queued.
 */

import { Emitter } from "./events.js";

export const SAMPLE_RATE = 16_000;

/** Played after a gap, or at the beginning: so much later, lest the next piece be late as well. */
const LEAD_SECONDS = 0.02;

/** @typedef {{playing: boolean}} AudioEvents `playing`: whether anything is to be heard. */

/**
 * @typedef {object} AudioServiceOptions
 * @property {() => AudioContext} [createContext] called at the first sound, or `unlock()`.
 */

/** @extends {Emitter<AudioEvents>} */
export class AudioService extends Emitter {
  /** @param {AudioServiceOptions} [options] */
  constructor(options = {}) {
    super();
    // At the rate of the sound, no piece is resampled by itself, which would be heard at its edges.
    this._createContext =
      options.createContext ?? (() => new AudioContext({ sampleRate: SAMPLE_RATE }));
    /** @type {AudioContext | null} */
    this._context = null;
    /** @type {GainNode | null} */
    this._output = null;
    /** @type {GainNode | null} what the sources of the present speech go through. */
    this._speech = null;
    /** @type {Set<AudioBufferSourceNode>} */
    this._sources = new Set();
    /** When the last of them ends, in samples of the context's time. @type {number | null} */
    this._endsAt = null;
    /** @type {number | null} the first byte of a sample whose second has not come. */
    this._half = null;
  }

  /** True while something is to be heard. */
  get isPlaying() {
    return this._sources.size > 0;
  }

  /** @returns {AudioContext} */
  get context() {
    return this._open().context;
  }

  /**
   * Everything that is heard goes through here: for a volume, or an analyser.
   *
   * @returns {GainNode}
   */
  get output() {
    return this._open().output;
  }

  /**
   * Let the context run. Browsers allow that from a click or a key only.
   *
   * @returns {Promise<void>}
   */
  unlock() {
    return this.context.resume();
  }

  /**
   * Play after what is queued.
   *
   * @param {string | ArrayBuffer | Uint8Array | Int16Array} pcm base64, bytes or samples. A sample
   *   may be cut in two by the end of a piece.
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
    // In whole samples: fractions would add up, and be interpolated.
    const soonest = Math.ceil(context.currentTime * SAMPLE_RATE);
    const endsAt = this._endsAt ?? -1;
    const startsAt = endsAt >= soonest ? endsAt : soonest + LEAD_SECONDS * SAMPLE_RATE;
    source.start(startsAt / SAMPLE_RATE);
    this._endsAt = startsAt + samples.length;
    this._sources.add(source);
    if (this._sources.size === 1) this.emit("playing", true);
  }

  /** Be silent now, and forget what was queued. */
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

  /** @returns {{context: AudioContext, output: GainNode}} */
  _open() {
    if (!this._context || !this._output) {
      this._context = this._createContext();
      this._output = this._context.createGain();
      this._output.connect(this._context.destination);
    }
    return { context: this._context, output: this._output };
  }

  /** @param {AudioBufferSourceNode} source */
  _ended(source) {
    source.disconnect();
    if (this._sources.delete(source) && this._sources.size === 0) this.emit("playing", false);
  }

  /**
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
