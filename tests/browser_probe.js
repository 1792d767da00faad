// tests/browser.py adds this to every document before the page's own scripts. It records the frames,
// and can hold back incoming ones, as a slow network would.
(() => {
  const probe = {
    sent: [],
    received: [],
    errors: [],
    alerts: [],
    /** @type {(frame) => boolean} whether to hold back an incoming frame. */
    holds: () => false,
    held: [],
    sockets: [],
  };
  globalThis.probe = probe;

  globalThis.addEventListener("error", (event) => probe.errors.push(`uncaught: ${event.message}`));
  globalThis.addEventListener("unhandledrejection", (event) =>
    probe.errors.push(`unhandled: ${event.reason}`),
  );
  globalThis.alert = (words) => probe.errors.push(`alert: ${words}`);

  const { send } = WebSocket.prototype;
  WebSocket.prototype.send = function (data) {
    probe.sent.push({ at: performance.now(), ...JSON.parse(data) });
    return send.call(this, data);
  };

  const onmessage = Object.getOwnPropertyDescriptor(WebSocket.prototype, "onmessage");
  const hand = (listener, event) => {
    if (typeof event.data === "string") probe.received.push(JSON.parse(event.data));
    listener(event);
  };
  Object.defineProperty(WebSocket.prototype, "onmessage", {
    ...onmessage,
    set(listener) {
      const mine = listener === null ? null : (event) => {
        // Frames keep their order: all frames after a held one are held as well.
        const frame = JSON.parse(event.data);
        if (probe.held.length > 0 || probe.holds(frame)) {
          probe.held.push({ frame, hand: () => hand(listener, event) });
        } else {
          hand(listener, event);
        }
      };
      if (listener !== null) probe.sockets.push({ socket: this, listener });
      onmessage.set.call(this, mine);
    },
  });

  /** Deliver the held frames, and hold back no more. */
  probe.release = () => {
    probe.holds = () => false;
    for (const one of probe.held.splice(0)) one.hand();
  };

  /** Deliver the held frames up to the first of a type, and keep holding the rest. */
  probe.releaseUpTo = (type) => {
    const index = probe.held.findIndex(({ frame }) => frame.msg_type === type);
    for (const one of probe.held.splice(0, index + 1)) one.hand();
  };

  /** How many frames of a type are held; with "end", how many terminal frames. */
  probe.heldOf = (type) =>
    probe.held.filter(({ frame }) =>
      type === "end" ? frame.payload.text_stream_seq === -1 : frame.msg_type === type,
    ).length;

  /** Deliver a frame as if the server had sent it now. */
  probe.inject = (msgType, payload) => {
    const { socket, listener } = probe.sockets.at(-1);
    const session_id = probe.received.find((frame) => frame.session_id)?.session_id ?? null;
    const frame = { version: "1.0", msg_type: msgType, session_id, payload, timestamp: Date.now() };
    listener.call(socket, new MessageEvent("message", { data: JSON.stringify(frame) }));
  };

  probe.until = async (look, ms) => {
    const end = performance.now() + ms;
    for (;;) {
      const value = look();
      if (value || performance.now() > end) return value;
      await new Promise((resolve) => setTimeout(resolve, 5));
    }
  };

  probe.connection = () => document.getElementById("connection")?.dataset.state;

  probe.notice = () => {
    const notice = document.getElementById("notice");
    return notice && !notice.hidden ? document.getElementById("notice-text").textContent : "";
  };

  /** Everything that was announced to a screen reader, including what was removed since. */
  probe.announced = [];
  document.addEventListener("DOMContentLoaded", () =>
    new MutationObserver((records) => {
      for (const { addedNodes } of records) {
        probe.announced.push(...[...addedNodes].map((node) => node.textContent));
      }
    }).observe(document.getElementById("announcer") ?? document, { childList: true }),
  );

  const inside = (element, selector) => element.querySelector(selector)?.textContent ?? "";

  probe.elements = () => [...document.querySelectorAll('#messages > [data-role="assistant"]')];

  probe.answers = () =>
    probe.elements().map((element) => ({
      ...element.dataset,
      text: inside(element, ".text"),
      status: inside(element, ".status"),
      retry: inside(element, ".retry"),
      isBusy: element.getAttribute("aria-busy") === "true",
      calls: [...element.querySelectorAll(".call")].map((card) => ({
        ...card.dataset,
        name: inside(card, ":is(h2, h3) code"),
        parameters: inside(card, "pre"),
      })),
    }));

  /** Times at which the text of an element changes, on the clock of `performance.now()`. */
  probe.watch = (element) => {
    const changes = [];
    new MutationObserver(() => changes.push(performance.now())).observe(element, {
      childList: true,
      characterData: true,
      subtree: true,
    });
    return changes;
  };

  /** The user's keys and clicks, on the same clock, before the page handles them. */
  probe.acts = [];
  for (const type of ["keydown", "click"]) {
    globalThis.addEventListener(
      type,
      (event) => probe.acts.push({ type, key: event.key ?? "", at: performance.now() }),
      { capture: true },
    );
  }
})();
