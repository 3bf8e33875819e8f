// A client of the wire in docs/protocol.md, for browsers and for Node 22 or newer (Node 20: --experimental-websocket).
//
// Life cycle: `connect` waits for the server's metadata; requests may be in flight together; `close` ends it. A
// connection that is lost rejects what was in flight, and a new one needs to be told nothing: requests carry all.
// Error policy: what the server answers with an error is a PolicyError with its code; the connection stays open.

import { EncodedImage, NdArray, WireError, pack, unpack } from "./msgpack.js";

export { EncodedImage, NdArray, WireError };

/** The server refused: `code` as in docs/protocol.md, `retryAfterMs` where it says when to come back. */
export class PolicyError extends Error {
  constructor(code, message, retryAfterMs) {
    super(message);
    Object.assign(this, { code, retryAfterMs });
  }
}

export class PolicyClient {
  /**
   * Connect to `url`, such as ws://gpu-machine:8000 or ws://gpu-machine:8000/lift.
   * `apiKey` needs a WebSocket that takes headers, as Node's does; browsers have none.
   */
  static connect(url, { apiKey } = {}) {
    const options = apiKey ? { headers: { Authorization: `Api-Key ${apiKey}` } } : undefined;
    const socket = options ? new WebSocket(url, options) : new WebSocket(url);
    socket.binaryType = "arraybuffer";
    return new Promise((resolve, reject) => {
      socket.onerror = () => reject(new WireError(`${url} does not answer, or refused the key`));
      socket.onclose = ({ code, reason }) => reject(new WireError(`${url} closed the connection (${code} ${reason})`));
      socket.onmessage = ({ data }) => {
        try {
          if (typeof data === "string") throw textError(data);
          resolve(new PolicyClient(socket, unpack(data)));
        } catch (error) {
          socket.close();
          reject(error);
        }
      };
    });
  }

  constructor(socket, metadata) {
    if (!metadata.protocol) throw new WireError("a plain openpi server: it knows bare observations only");
    this.metadata = metadata;
    /** What the policy takes and gives: cameras, states, action_names, unit, horizon, …; null on an idle server. */
    this.policy = metadata.policy;
    this.socket = socket;
    this.waiting = new Map();
    this.seq = 0;
    socket.onmessage = ({ data }) => this.#answered(data);
    socket.onclose = ({ code, reason }) => this.#lost(new WireError(`the connection ended (${code} ${reason})`));
    socket.onerror = () => {};
  }

  /**
   * The chunk for one observation: {actions: NdArray (horizon, action_dim), server_timing, …}.
   *
   * obs: {images: {name: NdArray (H, W, 3) uint8 or EncodedImage}, states: {part: NdArray (n,) float32}, task}.
   * history: the observations of the ticks before, oldest first, where policy.n_obs_steps is above 1.
   * Of two that are in flight the older one may be rejected as SUPERSEDED.
   */
  infer(obs, { history, prompt, episode, captureTime } = {}) {
    return this.#ask({ op: "infer", obs, history, prompt, episode, capture_time: captureTime });
  }

  /** {ready, policy, sessions, queue, running, …} */
  status() {
    return this.#ask({ op: "status" });
  }

  /** The prompt of this connection, for requests that name none. */
  setPrompt(prompt) {
    return this.#ask({ op: "set_prompt", prompt });
  }

  /** Forget what this connection was told. */
  reset() {
    return this.#ask({ op: "reset" });
  }

  close() {
    this.socket.close();
  }

  #ask(message) {
    const seq = ++this.seq;
    return new Promise((resolve, reject) => {
      if (this.socket.readyState !== WebSocket.OPEN) throw new WireError("the connection is closed");
      this.socket.send(pack({ ...message, seq }));
      this.waiting.set(seq, { resolve, reject });
    });
  }

  #answered(data) {
    let reply;
    try {
      if (typeof data === "string") throw textError(data);
      reply = unpack(data);
    } catch (error) {
      this.#lost(error);
      this.socket.close();
      return;
    }
    const waiting = this.waiting.get(reply.seq);
    if (!waiting || reply.op === "progress") return;
    this.waiting.delete(reply.seq);
    if (reply.op === "error") waiting.reject(new PolicyError(reply.code, reply.message, reply.retry_after_ms));
    else waiting.resolve(reply);
  }

  #lost(error) {
    for (const { reject } of this.waiting.values()) reject(error);
    this.waiting.clear();
  }
}

/** A text frame: `CODE: sentence`. */
function textError(line) {
  const [, code, message] = /^([A-Z_]+): (.*)$/s.exec(line) ?? [null, "INTERNAL", line];
  return new PolicyError(code, message);
}
