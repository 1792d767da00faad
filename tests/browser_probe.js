// Put into every document before the page's own scripts: tests/browser.py. It watches the wire, and
// can hold back what comes over it, as a slow network would.
(() => {
  const probe = {
    sent: [],
    received: [],
    errors: [],
    alerts: [],
    /** @type {(frame) => boolean} whether an incoming frame is to be held back. */
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
        // In the order of the wire: behind one that is held, all are.
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

  /** Hand on what was held back, and hold nothing more. */
  probe.release = () => {
    probe.holds = () => false;
    for (const one of probe.held.splice(0)) one.hand();
  };

  /** Hand on what was held back up to the first frame of a type, and hold on to the rest. */
  probe.releaseUpTo = (type) => {
    const index = probe.held.findIndex(({ frame }) => frame.msg_type === type);
    for (const one of probe.held.splice(0, index + 1)) one.hand();
  };

  /** How many frames of a type are held back, or how many ends of answers. */
  probe.heldOf = (type) =>
    probe.held.filter(({ frame }) =>
      type === "end" ? frame.payload.text_stream_seq === -1 : frame.msg_type === type,
    ).length;

  /** As if the server had sent it now. */
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

  /** All that a screen reader was given to read, also what was taken away since. */
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

  /** When the text of an element changes, on the clock of `performance.now()`. */
  probe.watch = (element) => {
    const changes = [];
    new MutationObserver(() => changes.push(performance.now())).observe(element, {
      childList: true,
      characterData: true,
      subtree: true,
    });
    return changes;
  };

  /** When the user last did something, on the same clock, before the page heard of it. */
  probe.acts = [];
  for (const type of ["keydown", "click"]) {
    globalThis.addEventListener(
      type,
      (event) => probe.acts.push({ type, key: event.key ?? "", at: performance.now() }),
      { capture: true },
    );
  }
})();
