// node ask.js ws://127.0.0.1:8000 [API_KEY]: ask any policy for a chunk, with grey pictures and joints at zero.

import { NdArray, PolicyClient } from "./client.js";

const [url = "ws://127.0.0.1:8000", apiKey] = process.argv.slice(2);
const client = await PolicyClient.connect(url, { apiKey });
const { policy } = client;
console.log(`${policy.type}: ${policy.horizon} actions of ${policy.action_dim} values (${policy.unit})`);

const images = {};
for (const { name, height, width } of policy.cameras) {
  images[name] = new NdArray(new Uint8Array(height * width * 3).fill(128), [height, width, 3]);
}
const states = {};
for (const { name, size } of policy.states) states[name] = new NdArray(new Float32Array(size), [size]);

const started = performance.now();
const reply = await client.infer({ images, states }, { prompt: "lift up the red cube" });
const took = performance.now() - started;

console.log(`chunk ${reply.actions.shape.join(" x ")} in ${took.toFixed(0)} ms, ${reply.server_timing.infer_ms.toFixed(0)} ms of it inference`);
policy.action_names.forEach((name, index) => console.log(`  ${name.padEnd(20)} ${reply.actions.row(0)[index].toFixed(2)}`));
client.close();
