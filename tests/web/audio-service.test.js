import assert from "node:assert/strict";
import { test } from "node:test";

import { AudioService } from "../../gateway/web/client/audio-service.js";

class FakeNode {
  constructor() {
    this.to = null;
  }
  connect(node) {
    this.to = node;
  }
  disconnect() {
    this.to = null;
  }
}

/** An AudioContext with a clock moved by hand. */
function makeContext() {
  const context = {
    currentTime: 0,
    state: "running",
    destination: new FakeNode(),
    sources: [],
    resume: async () => undefined,
    createGain: () => new FakeNode(),
    createBuffer: (channels, length, rate) => ({
      channels,
      length,
      rate,
      copyToChannel(samples) {
        this.samples = samples;
      },
    }),
    createBufferSource() {
      const source = Object.assign(new FakeNode(), {
        onended: null,
        startedAt: null,
        isStopped: false,
        start: (time) => (source.startedAt = time),
        stop: () => (source.isStopped = true),
      });
      context.sources.push(source);
      return source;
    },
  };
  return context;
}

function makeAudio() {
  const context = makeContext();
  const audio = new AudioService({ createContext: () => context });
  const playing = [];
  audio.on("playing", (is) => playing.push(is));
  return { audio, context, playing };
}

/** Whether the sound of a source reaches the output. */
function isHeard({ to }, context) {
  for (; to; to = to.to) if (to === context.destination) return true;
  return false;
}

test("pieces follow each other to the sample", () => {
  const { audio, context } = makeAudio();
  for (const length of [333, 1_000, 1]) audio.play(new Int16Array(length));
  const starts = context.sources.map(({ startedAt }) => startedAt * 16_000);
  assert.deepEqual(starts, [320, 320 + 333, 320 + 1_333]);
  assert.ok(context.sources.every((source) => isHeard(source, context)));
});

test("after a gap it starts from now, not in the past", () => {
  const { audio, context } = makeAudio();
  audio.play(new Int16Array(160));
  context.currentTime = 5.00001;
  audio.play(new Int16Array(160));
  assert.equal(context.sources[1].startedAt * 16_000, 80_001 + 320);
});

test("base64, bytes and samples give the same sound", () => {
  const samples = Int16Array.from([0, 16_384, -32_768]);
  const { audio, context } = makeAudio();
  audio.play(samples);
  audio.play(new Uint8Array(samples.buffer));
  audio.play(samples.buffer);
  audio.play(Buffer.from(samples.buffer).toString("base64"));
  for (const { buffer } of context.sources) {
    assert.deepEqual([...buffer.samples], [0, 0.5, -1]);
    assert.deepEqual([buffer.channels, buffer.rate], [1, 16_000]);
  }
});

test("a piece may end in the middle of a sample", () => {
  const { audio, context } = makeAudio();
  for (const bytes of [[0], [64, 0], [0xc0, 1]]) audio.play(Uint8Array.from(bytes));
  assert.deepEqual(context.sources.flatMap(({ buffer }) => [...buffer.samples]), [0.5, -0.5]);
  audio.stopAllPlayback();
  audio.play(Uint8Array.from([0, 64]));
  assert.deepEqual([...context.sources.at(-1).buffer.samples], [0.5]);
});

test("stopping silences all sound at once and drops what is queued", () => {
  const { audio, context, playing } = makeAudio();
  for (let piece = 0; piece < 20; piece += 1) audio.play(new Int16Array(16_000));
  assert.equal(audio.isPlaying, true);
  context.currentTime = 0.1;
  const { to: speech } = context.sources[0];
  audio.stopAllPlayback();
  assert.equal(speech.to, null); // one node for all sources is disconnected as well
  assert.ok(context.sources.every((source) => source.isStopped && !isHeard(source, context)));
  assert.equal(audio.isPlaying, false);
  for (const source of context.sources) source.onended?.(); // browsers report the end a little later
  audio.play(new Int16Array(160));
  const fresh = context.sources.at(-1);
  assert.equal(fresh.startedAt * 16_000, 1_600 + 320); // now, not after the dropped twenty seconds
  assert.ok(isHeard(fresh, context));
  fresh.onended();
  assert.deepEqual(playing, [true, false, true, false]);
});

test("stopping without sound does nothing and creates no context", () => {
  const audio = new AudioService({ createContext: () => assert.fail("made") });
  audio.stopAllPlayback();
  assert.equal(audio.isPlaying, false);
});
